"""An ablation study on a real local Ray, killed half-way and run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from cluster.ablation import Trial, expand
from cluster.artifacts import tuples_ref
from cluster.checkpoints import RunCheckpoints
from cluster.config import Recipe, load_recipe
from cluster.evaluation import Evaluator, mean
from cluster.ray_session import ray_session
from cluster.registry import Registry
from cluster.run_lease import RunLease
from cluster.trainer import run_name
from colbert_core.errors import TrainingError
from colbert_core.metrics import paired_bootstrap
from jobs import ablate, evaluate
from tests.processes import family, kill
from tests.tiny_data import word_source
from tests.tiny_models import tiny_bert_dir
from tests.tiny_training import Killing

METRICS = ["nDCG@10", "R@1"]
STEPS = 60  # enough to kill a training of some milliseconds a step in between


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file: two variants, two seeds, 200 questions to learn from and 60 to judge by."""
    root = tmp_path_factory.mktemp("ablate")
    tree: dict[str, Any] = {
        "name": "study",
        "storage": {"root": str(root / "store"), "cache_dir": str(root / "cache")},
        "ray": {"num_cpus": 2, "object_store_mb": 100},
        "model": {
            "name": "tiny",
            "base": str(tiny_bert_dir(root / "base")),
            "colbert": {"dim": 16, "query_length": 8, "document_length": 32},
        },
        "data": {
            "root": str(root),
            "sources": {
                "train": word_source(root / "train", documents=60, queries=200),
                "dev": word_source(root / "dev", documents=60, queries=120, seed=1),
            },
            "tuples": {
                "mined": {
                    "mine": {"source": "train", "pools": [{"scorer": "bm25", "take": 3}]},
                    "score": {"scorers": {"bm25": 1.0, "labels": 1.0}},
                }
            },
        },
        "scorers": {"bm25": {"kind": "bm25", "tokenizer": "whitespace"}, "labels": {"kind": "labels"}},
        "train": [
            {
                "name": "p",
                "data": ["mined"],
                "nway": 4,
                "steps": STEPS,
                "queries_per_step": 8,
                "micro_batch": 8,
                "precision": "fp32",
                "zero_stage": 0,
                "optimizer": {"lr": 3.0e-3},
                "checkpoint": {"every_steps": 6},
            }
        ],
        "evaluate": {
            "sources": ["dev"],
            "metrics": METRICS,
            "max_queries": 60,
            "systems": {"start": {"model": "base"}, "bm25": {"scorer": "bm25"}},
        },
        "ablate": {
            "axes": {"loss": {"mse": {"train.0.loss": {"kl": 0, "margin_mse": 0.1}}}},
            "seeds": [1, 2],
        },
    }
    path = root / "study.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def finished(trials: list[Trial], judge: Evaluator) -> list[Trial]:
    return [trial for trial in trials if judge.knows_model(trial.ref, METRICS)]


@pytest.fixture(scope="module")
def judge(study: Path) -> Evaluator:
    recipe = load_recipe(study)
    return Evaluator(recipe, Registry.open(recipe.storage), "dev", 100, 60)


def test_a_killed_study_goes_on_where_it_was(study: Path, judge: Evaluator, tmp_path: Path) -> None:
    recipe, registry = load_recipe(study), judge.registry
    trials = expand(recipe)
    second = RunCheckpoints(registry.store, run_name(trials[1].recipe, "p"))
    job = subprocess.Popen(
        [sys.executable, "-m", "jobs.ablate", str(study), "--set", "ablate.at_once=1"],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "RAY_ADDRESS": ""},
    )
    killing = Killing(second, lambda: kill(family(job.pid)))
    try:
        while not second.steps():
            assert job.poll() is None, "the job ended before it was killed"
            time.sleep(0.02)
    finally:
        killing()
        job.wait()
    assert 0 < killing.reached < STEPS, "not in mid-training"
    done = finished(trials, judge)
    assert [str(trial) for trial in done] == ["baseline · seed 1"]
    tuples = registry.manifest(tuples_ref(recipe, "mined")).created_at
    made = registry.manifest(done[0].ref).created_at
    # As if the time had passed after which a dead holder's lease may be taken over.
    for item in list(registry.store.list("runs/")):
        if item.key.endswith("lease.json"):
            registry.store.delete(item.key)

    report = ablate.run(recipe, report=tmp_path)
    assert report.skipped == [str(done[0].ref)]
    assert sorted(report.artifacts) == sorted(str(trial.ref) for trial in trials[1:])
    assert registry.manifest(done[0].ref).created_at == made
    killing.assert_nothing_was_repeated()
    assert registry.manifest(tuples_ref(recipe, "mined")).created_at == tuples
    _check_figures(recipe, judge, trials, report.details)
    assert json.loads((tmp_path / "report.json").read_text())["details"] == report.details


def _check_figures(recipe: Recipe, judge: Evaluator, trials: list[Trial], details: dict[str, Any]) -> None:
    values = {(t.variant, t.seed): judge.model_values(t.ref, METRICS)[0] for t in trials}
    assert details["queries"] == {"dev": 60}
    assert details["failed"] == {}
    for metric in METRICS:
        rows = {
            variant: {
                query: (values[variant, 1][metric][query] + values[variant, 2][metric][query]) / 2
                for query in values[variant, 1][metric]
            }
            for variant in ("baseline", "loss=mse")
        }
        for variant, row in rows.items():
            score = details["scores"]["dev"][variant][metric]
            assert score["mean"] == pytest.approx(mean(row))
            assert score["by_seed"] == {
                str(seed): pytest.approx(mean(values[variant, seed][metric])) for seed in (1, 2)
            }
        expected = paired_bootstrap(rows["loss=mse"], rows["baseline"], seed=recipe.seed)
        assert details["intervals"]["dev"].keys() == {"loss=mse"}
        assert details["intervals"]["dev"]["loss=mse"][metric] == pytest.approx(list(expected))
    # Four models, all different, none of them the start.
    found = [judge.model_values(trial.ref, ["nDCG@10"])[0]["nDCG@10"] for trial in trials]
    assert len({tuple(each.values()) for each in found}) == 4
    assert details["references"]["dev"].keys() == {"start", "bm25"}
    # What the job of the same name says about these systems.
    plain = evaluate.run(recipe)
    assert details["references"]["dev"] == plain.details["scores"]["dev"]


def test_a_finished_study_is_told_again_without_ray(study: Path) -> None:
    recipe = load_recipe(study)
    report = ablate.run(recipe)
    assert not ray.is_initialized()
    assert report.artifacts == []
    assert report.skipped == [str(trial.ref) for trial in expand(recipe)]
    assert report.timings == {}


@pytest.fixture(scope="module")
def shared_ray(study: Path) -> Iterator[None]:
    with ray_session(load_recipe(study)):
        yield


def test_a_variant_that_diverges_is_shown_as_failed(study: Path, shared_ray: None) -> None:
    # Scores scaled to 0 and 1 over this temperature and times this weight are beyond fp32.
    endless = "{kl: 1.0e+6, student_temperature: 1.0e-36}"
    seeds, option = "ablate.seeds=[1]", f"ablate.axes.scale={{endless: {{train.0.loss: {endless}}}}}"
    report = ablate.run(load_recipe(study, [seeds, option]))
    failed = report.details["failed"]
    assert failed.keys() == {"scale=endless · seed 1"}
    assert "the loss is inf over the tuples" in failed["scale=endless · seed 1"]
    assert report.warnings == [f"{name} failed: {reason}" for name, reason in failed.items()]
    assert report.details["scores"]["dev"].keys() == {"baseline", "loss=mse"}


def test_without_a_baseline_there_is_nothing_to_compare_with(
    study: Path, judge: Evaluator, shared_ray: None
) -> None:
    # The variant is what an earlier trial was; the baseline's run is taken.
    recipe = load_recipe(study, ["ablate.seeds=[1]", "train.0.loss={kl: 2}"])
    baseline = expand(recipe)[0]
    lease = f"{RunCheckpoints(judge.registry.store, run_name(baseline.recipe, 'p')).prefix}lease.json"
    with (
        RunLease(judge.registry.store, lease),
        pytest.raises(TrainingError, match=r"baseline · seed 1: .*in use by process"),
    ):
        ablate.run(recipe)
