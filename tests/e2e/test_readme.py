"""Every command that README shows is run here, on the real path with a tiny model.

The commands are read from README itself: one that this file does not know how to run fails the test.
The first is the whole quickstart pipeline, shrunken by overrides alone: real Ray, DeepSpeed, index
build and Serve.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.json
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from cluster.artifacts import averaged_ref, base_ref, index_ref
from cluster.config import load_recipe
from cluster.ray_session import ray_session
from cluster.registry import Registry
from jobs.cli import app
from tests.tiny_models import tiny_japanese_dir

REPOSITORY = Path(__file__).parents[2]
RECIPE = "recipes/quickstart.yaml"
START_TIMEOUT_SECONDS = 240
# README's service is open to all; here it is not, and the pipeline has to know how to ask it.
KEY = "key-of-the-readme-tests"


def commands() -> list[str]:
    """The lines of README's console blocks that a user types."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```console\n(.*?)```", text, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(line[2:].split()) for line in lines if line.startswith("$ ")]


def job_commands(kind: str) -> list[str]:
    return [command for command in commands() if command.startswith(kind)]


# Commands of README that need more than this machine's local Ray, and the test that runs them.
ELSEWHERE = {
    "make quickstart": "the pipeline below is its only command",
    "make test": "this is it",
    "make bench": "benchmarks are programs of their own",
    "ray get-auth-token --generate": "tests/integration/test_job_submit.py",
    "ray up ray_cluster.yaml": "tests/unit/test_ray_cluster_yaml.py: needs a cloud account",
    "ray dashboard ray_cluster.yaml": "as ray up",
    "export RAY_AUTH_MODE=token": "tests/integration/test_job_submit.py",
    "ray job submit": "tests/integration/test_job_submit.py",
}


def test_every_command_is_run_by_a_test() -> None:
    here = ("raycolbert ", "curl ")
    unknown = [line for line in commands() if not line.startswith((*here, *ELSEWHERE))]
    assert commands()
    assert not unknown, f"README shows commands that no test runs: {unknown}"


def tiny_settings(root: Path) -> dict[str, object]:
    """What makes any of our small recipes tiny: own storage, a tiny Japanese model, two steps."""
    base = tiny_japanese_dir(root / "base")
    return {
        "storage.root": root / "store",
        "storage.cache_dir": root / "cache",
        "model.base": base,
        "model.colbert.dim": 16,
        "model.colbert.document_length": 64,
        "scorers.dense.model": base,
        "scorers.token_maxsim.model": base,
        "train.0.steps": 2,
        "train.0.queries_per_step": 8,
        "train.0.micro_batch": 4,
        "train.0.freeze": "[embeddings.word_embeddings]",
        "train.0.checkpoint": "{every_steps: 1, publish_every_steps: 1}",
        "evaluate.gate.tolerance": 1,
    }


class World:
    """A place for the quickstart recipe: own storage, a tiny Japanese model, two steps a phase."""

    def __init__(self, root: Path) -> None:
        self.root = root
        settings = tiny_settings(root) | {
            "train.0.validation.every_steps": 1,
            "train.1.steps": 1,
            "train.1.num_workers": 1,
            "train.1.queries_per_step": 8,
            "train.1.micro_batch": 4,
            "train.1.freeze": "[embeddings.word_embeddings]",
            "average.inputs.0.step": 1,
            "serve.port": 8123,
            "serve.api_keys_env": "RAYCOLBERT_README_KEY",
        }
        os.environ["RAYCOLBERT_README_KEY"] = KEY
        self.overrides = [f"{key}={value}" for key, value in settings.items()]
        self.recipe = load_recipe(REPOSITORY / RECIPE, self.overrides)

    def arguments(self, command: str) -> list[str]:
        """The command's arguments, with this world's places instead of README's."""
        words = shlex.split(command.replace("quickstart/store", str(self.root / "store")))[1:]
        if "--report" in words:
            words[words.index("--report") + 1] = str(self.root / "report")
        if words[0] != "registry":
            words += [word for override in self.overrides for word in ("--set", override)]
        return words


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("readme"))


@pytest.fixture(scope="module")
def pipeline(world: World) -> dict:
    """Runs README's pipeline command and returns its report."""
    (command,) = (line for line in job_commands("raycolbert pipeline") if RECIPE in line)
    result = CliRunner().invoke(app, world.arguments(command), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads((world.root / "report" / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def shared_ray(world: World, pipeline: dict) -> Iterator[None]:
    """One Ray for the commands that follow; the pipeline has started and stopped its own."""
    with ray_session(world.recipe):
        yield


def test_the_pipeline_goes_from_text_to_answers(world: World, pipeline: dict) -> None:
    assert pipeline["skipped"] == []
    scores = pipeline["details"]["evaluate"]["scores"]["test"]
    assert set(scores) == set(world.recipe.evaluate.systems)
    assert set(scores["bm25"]) == {"nDCG@10", "R@1", "R@3", "R@10"}
    # BM25 does not depend on the tiny model: this is its real score on the held-out questions.
    assert 0.5 < scores["bm25"]["nDCG@10"] < 0.9
    # A search of the index finds what exact MaxSim over the same model's vectors finds.
    assert scores["averaged-index"]["R@10"] == pytest.approx(scores["averaged"]["R@10"], abs=0.05)
    answers = pipeline["details"]["answers"]
    assert [answer["question"] for answer in answers] == list(world.recipe.serve.questions)
    assert all(answer["shards"] == {"ok": 2, "total": 2} | answer["shards"] for answer in answers)
    assert all(len(answer["hits"]) == 3 for answer in answers)
    assert pipeline["metrics"]["peak_memory_mb"] > 100


def test_what_the_pipeline_made_is_published_and_promoted(world: World, pipeline: dict) -> None:
    registry = Registry.open(world.recipe.storage)
    averaged = averaged_ref(world.recipe)
    assert registry.resolve("models", f"{averaged.name}@production") == averaged
    assert registry.resolve("indexes", "quickstart@production") == index_ref(world.recipe)
    assert len(registry.manifest(averaged).parents) == 3
    assert registry.exists(base_ref(world.recipe))


def test_the_report_page_is_self_contained(world: World, pipeline: dict) -> None:
    page = (world.root / "report" / "report.html").read_text(encoding="utf-8")
    assert "<polyline" in page
    assert "dev/nDCG@10 of “pretrain”, measured while it trained" in page
    measured = pipeline["details"]["train"]["validation_curves"]
    assert [step for step, _ in measured["pretrain"]["dev/nDCG@10"]] == [1, 2]
    assert [step for step, _ in measured["posttrain"]["dev/nDCG@10"]] == [1]
    assert all(system in page for system in world.recipe.evaluate.systems)
    assert not re.search(r"""(src|href)=["'](?!#)""", page)


def _in_beir_parquet(root: Path) -> None:
    """The sample corpus in the layout that the JaQuAD recipe reads."""
    sample = REPOSITORY / "samples" / "ja"
    for place, split in (("jaquad/train", "train"), ("jaquad/dev", "dev"), ("jsquad/valid", "test")):
        folder = root / place
        folder.mkdir(parents=True)
        qrels = (sample / "qrels" / f"{split}.tsv").read_text(encoding="utf-8")
        (folder / "qrels.tsv").write_text(qrels, encoding="utf-8")
        asked = {line.split("\t")[0] for line in qrels.splitlines()}
        corpus = pyarrow.json.read_json(sample / "corpus.jsonl").select(["_id", "title", "text"])
        queries = pyarrow.json.read_json(sample / "queries.jsonl").to_pylist()
        parquet.write_table(corpus, folder / "corpus.parquet")
        parquet.write_table(
            pyarrow.Table.from_pylist([query for query in queries if query["_id"] in asked]),
            folder / "queries.parquet",
        )


def test_the_recipe_for_real_input_runs(shared_ray: None, tmp_path: Path) -> None:
    (command,) = (line for line in job_commands("raycolbert pipeline") if "jaquad" in line)
    _in_beir_parquet(tmp_path / "data")
    fewer = {"average.inputs": "[{phase: pretrain, step: 1}, {phase: pretrain}]", "train.0.num_workers": 1}
    words = shlex.split(command.replace("DIRECTORY", str(tmp_path / "data")))[1:]
    words[words.index("--report") + 1] = str(tmp_path / "report")
    for key, value in (tiny_settings(tmp_path) | fewer).items():
        words += ["--set", f"{key}={value}"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))
    scores = report["details"]["evaluate"]["scores"]
    assert set(scores) == {"jaquad-dev", "jsquad"}
    for systems in scores.values():
        assert set(systems) == {"bm25", "dense", "start", "trained", "averaged"}
        assert systems["bm25"]["R@1"] <= systems["bm25"]["R@3"] <= systems["bm25"]["R@10"]


@pytest.mark.parametrize(
    "command",
    [c for c in job_commands("raycolbert ") if not c.startswith(("raycolbert pipeline", "raycolbert serve"))],
)
def test_a_command_works_and_makes_nothing_again(world: World, shared_ray: None, command: str) -> None:
    result = CliRunner().invoke(app, world.arguments(command), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "written" not in result.output


def test_the_service_answers_readmes_request(world: World, pipeline: dict) -> None:
    (serve,) = job_commands("raycolbert serve")
    (curl,) = job_commands("curl ")
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *world.arguments(serve)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        _wait_until_it_serves(process)
        request = [*shlex.split(curl.replace(":8000", ":8123")), "-H", f"Authorization: Bearer {KEY}"]
        answer = json.loads(subprocess.run(request, check=True, capture_output=True, text=True).stdout)
        assert answer["shards"]["ok"] == answer["shards"]["total"] == 2
        assert len(answer["results"][0]) == 3
    finally:
        process.terminate()  # as Ctrl-C, which tests run in a shell's background would ignore
        process.wait(timeout=120)
    assert process.returncode == 0


def _wait_until_it_serves(process: subprocess.Popen) -> None:
    assert process.stdout is not None
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "Ctrl-C stops it" in line:
            return
        if time.monotonic() > deadline:
            break
    pytest.fail(f"the service did not start: {''.join(seen)}")
