"""Jobs on a real cluster: `ray job submit` by hand, and the CLI with --address."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.artifacts import ArtifactRef, averaged_ref
from cluster.config import StorageConfig, parse_recipe
from cluster.registry import Registry
from colbert_core.config import ColBERTConfig
from colbert_core.encoder import ColBERT
from colbert_core.formats import save_model
from tests.ray_head import BIN, RayHead, ray_head
from tests.tiny_models import tiny_bert_dir


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayHead]:
    with ray_head() as head:
        yield head


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe that averages two published tiny models."""
    folder = tmp_path_factory.mktemp("job")
    storage = StorageConfig(root=str(folder / "store"), cache_dir=str(folder / "cache"))
    registry = Registry.open(storage)
    config = ColBERTConfig(dim=8, query_length=16, document_length=32)
    for seed, version in enumerate(("one", "two")):
        base = tiny_bert_dir(folder / f"base-{version}", seed=seed)
        save_model(ColBERT.create(base, config, seed=seed), folder / version)
        registry.publish(ArtifactRef("models", "tiny", version), folder / version)
    tree = {
        "name": "submitted",
        "storage": storage.model_dump(),
        "model": {"name": "tiny", "base": str(folder / "base-one")},
        "average": {"inputs": [{"model": "tiny@one"}, {"model": "tiny@two"}]},
    }
    project = folder / "project"
    project.mkdir()
    (project / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    return project


def stored_reports(workspace: Path) -> list[dict[str, Any]]:
    paths = (workspace.parent / "store").glob("reports/submitted/average/*.json")
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(paths)]


def test_ray_job_submit_runs_a_job(cluster: RayHead, workspace: Path) -> None:
    done = cluster.run(
        *(str(BIN / "ray"), "job", "submit", "--address", cluster.address, "--working-dir", "."),
        *("--", "python", "-m", "jobs.average", "recipe.yaml"),
        cwd=workspace,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    recipe = parse_recipe(yaml.safe_load((workspace / "recipe.yaml").read_text(encoding="utf-8")))
    ref = averaged_ref(recipe)
    assert str(ref) in done.stdout
    assert Registry.open(recipe.storage).exists(ref)
    (report,) = stored_reports(workspace)
    assert report["artifacts"] == [str(ref)]
    assert report["metrics"]["models_averaged"] == 2


def test_the_cli_submits_follows_the_log_and_shows_the_report(cluster: RayHead, workspace: Path) -> None:
    done = cluster.run(
        *(str(BIN / "raycolbert"), "average", "recipe.yaml", "--set", "average.inputs.0.weight=3"),
        *("--address", cluster.address),
        cwd=workspace,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "submitted" in done.stdout and "models_averaged" in done.stdout
    parents = stored_reports(workspace)[-1]["details"]["parents"]
    assert parents == {"models/tiny@one": 0.75, "models/tiny@two": 0.25}


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("RAY_AUTH_MODE", "disabled", "no Ray dashboard there takes jobs from here"),
        ("RAY_ADDRESS", "http://127.0.0.1:1", "RAY_ADDRESS is http://127.0.0.1:1, which Ray would submit to"),
    ],
)
def test_a_cluster_that_takes_no_job_from_here_is_one_line(
    cluster: RayHead, workspace: Path, variable: str, value: str, message: str
) -> None:
    stranger = replace(cluster, environment={**cluster.environment, variable: value})
    done = stranger.run(
        *(str(BIN / "raycolbert"), "average", "recipe.yaml", "--address", cluster.address), cwd=workspace
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_failing_recipe_fails_the_command_with_one_line_and_the_jobs_status(
    cluster: RayHead, workspace: Path
) -> None:
    before = len(stored_reports(workspace))
    done = cluster.run(
        *(str(BIN / "raycolbert"), "average", "recipe.yaml", "--set", "average.inputs.1.model=tiny@three"),
        *("--address", cluster.address),
        cwd=workspace,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "ArtifactNotFound" in done.stdout and "tiny@three" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert len(stored_reports(workspace)) == before


def test_a_recipe_that_is_not_valid_is_refused_before_it_is_submitted(
    cluster: RayHead, workspace: Path
) -> None:
    done = cluster.run(
        *(str(BIN / "raycolbert"), "average", "recipe.yaml", "--set", "average.inptus=[]"),
        *("--address", cluster.address),
        cwd=workspace,
    )
    assert done.returncode == 2
    assert "average.inptus" in done.stderr and "submitted" not in done.stdout
