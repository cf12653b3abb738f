"""Trackers: fed in order and in the background, never in the way; real clients where they are installed."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from cluster import training_trackers
from cluster.config import MlflowConfig, StorageConfig, TrackConfig, WandbConfig, parse_recipe
from cluster.storage import open_store
from cluster.training_log import RunLog
from cluster.training_trackers import BackgroundTracker, open_trackers, require_trackers
from colbert_core.errors import ConfigError
from tests.unit.test_training_log import record


class Service:
    """Keeps what it is sent; can be slow or broken."""

    def __init__(self, broken: tuple[int, ...] = (), gate: threading.Event | None = None) -> None:
        self.broken, self.gate = broken, gate
        self.seen: list[tuple[int, float]] = []
        self.ended: list[bool] = []

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        if self.gate is not None:
            self.gate.wait(10)
        if step in self.broken:
            raise ConnectionError(f"no answer at step {step}")
        self.seen.append((step, figures["train/loss"]))

    def close(self, finished: bool) -> None:
        self.ended.append(finished)


def run_log(path: Path, service: Service, steps: int) -> RunLog:
    store = open_store(StorageConfig(root=str(path)))
    trackers = [BackgroundTracker("service", service)]
    return RunLog(store, "runs/r/", start=0, steps=steps, attempt="one", trackers=trackers)


def test_every_step_arrives_in_order_and_the_end_says_how_it_went(tmp_path: Path) -> None:
    for made, finished in ((4, True), (3, False)):
        service = Service()
        log = run_log(tmp_path, service, steps=4)
        for step in range(1, made + 1):
            log.add(record(step))
        log.close()
        assert service.seen == [(step, 1 / step) for step in range(1, made + 1)]
        assert service.ended == [finished]


def test_a_slow_service_does_not_hold_up_a_step(tmp_path: Path) -> None:
    gate = threading.Event()
    service = Service(gate=gate)
    log = run_log(tmp_path, service, steps=50)
    begin = time.perf_counter()
    for step in range(1, 51):
        log.add(record(step))
    assert time.perf_counter() - begin < 1.0
    assert service.seen == []
    gate.set()
    log.close()
    assert [step for step, _ in service.seen] == list(range(1, 51))


def test_what_a_service_refuses_is_said_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service(broken=(2, 3))
    log = run_log(tmp_path, service, steps=4)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 5):
            log.add(record(step))
        log.close()
    assert [step for step, _ in service.seen] == [1, 4]
    assert [message for message in caplog.messages if "service" in message] == [
        "service refuses figures, which stay in the run's log: no answer at step 2"
    ]


def test_a_service_that_hangs_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training_trackers, "DRAIN_S", 0.2)
    gate = threading.Event()
    log = run_log(tmp_path, Service(gate=gate), steps=1)
    log.add(record(1))
    with caplog.at_level(logging.WARNING):
        log.close()
    gate.set()
    assert "service does not answer: its run may lack the last steps" in caplog.messages


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_package_is_a_config_error_that_names_its_extra(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    sys.path_importer_cache.clear()
    if find_spec(name) is not None:
        pytest.skip(f"{name} has been imported by something else")
    config = TrackConfig.model_validate({name: {}})
    with pytest.raises(
        ConfigError, match=rf"track\.{name}: the package is missing; install raycolbert\[{name}\]"
    ):
        require_trackers(config)
    require_trackers(None)


def test_the_section_is_checked_with_the_recipe() -> None:
    tree: dict[str, Any] = {
        "name": "r",
        "storage": {"root": "s"},
        "model": {"name": "m", "base": "b"},
        "track": {},
    }
    with pytest.raises(ConfigError, match="track: names no service; there are: mlflow, wandb"):
        parse_recipe(tree)
    tree["track"] = {"wandb": {"mode": "sometimes"}}
    with pytest.raises(ConfigError, match=r"track\.wandb\.mode"):
        parse_recipe(tree)


def test_mlflow_goes_on_under_the_same_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra raycolbert[mlflow] is not installed")
    pytest.importorskip("sqlalchemy", reason="a store in a file needs the whole package mlflow")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = TrackConfig(mlflow=MlflowConfig(uri=uri, experiment="tests"))
    for steps in ((1, 2), (3, 4)):
        (tracker,) = open_trackers(config, "m-p-0123", {"phase": {"optimizer": {"lr": 3e-5}}})
        for step in steps:
            made = record(step, parts={"kl": 2 / step}, validation={"dev/nDCG@10": 0.5})
            tracker.log(step, {f"train/{name}": value for name, value in made.scalars().items()})
        tracker.close(finished=steps[-1] == 4)
    client = mlflow.tracking.MlflowClient(uri)
    experiment = client.get_experiment_by_name("tests")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("m-p-0123", "FINISHED")
    assert run.data.params == {"phase.optimizer.lr": "3e-05"}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, 1 / step) for step in range(1, 5)]
    assert run.data.metrics["train/loss/kl"] == 0.5
    assert run.data.metrics["train/validation/dev/nDCG_at_10"] == 0.5


def test_wandb_writes_an_offline_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="the extra raycolbert[wandb] is not installed")
    config = TrackConfig(wandb=WandbConfig(project="tests", mode="offline", directory=str(tmp_path)))
    (tracker,) = open_trackers(config, "m-p-0123", {"phase": {"steps": 2}})
    for step in (1, 2):
        tracker.log(step, {"train/loss": 1 / step})
    tracker.close(finished=True)
    (written,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = written.read_bytes()
    assert b"train/loss" in content
    assert b"m-p-0123" in content


def test_a_tracker_that_cannot_open_its_run_is_a_config_error() -> None:
    pytest.importorskip("mlflow", reason="the extra raycolbert[mlflow] is not installed")
    config = TrackConfig(mlflow=MlflowConfig(uri="nonsense://nowhere"))
    with pytest.raises(ConfigError, match=r"track\.mlflow: no run can be opened"):
        open_trackers(config, "m-p-0123", {})
