"""MLflow and Weights & Biases beside a run's own log: optional, in the background, never in its way.

A tracker gets each step's figures once the step is made. It is sent to from a thread of its own, so that
training does not wait for a service; what a service refuses is reported once and not sent again, because
the run's log in storage has it anyway. A resumed run goes on under the tracker's same run.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol

from cluster.config import MlflowConfig, TrackConfig, WandbConfig
from colbert_core.errors import ConfigError

logger = logging.getLogger(__name__)

# How long the end of a run waits for figures that are still to be sent.
DRAIN_S = 30.0
RUN_TAG = "raycolbert.run"


class Tracker(Protocol):
    """One tracking service, as its own client speaks to it."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Sends a step's figures; may block and may raise what the client raises."""
        ...

    def close(self, finished: bool) -> None:
        """Ends the service's run."""
        ...


class BackgroundTracker:
    """Feeds a tracker from a thread of its own.

    Args:
        name: what to call it in messages.
        tracker: the service.
    """

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker
        self._queue: queue.SimpleQueue[tuple[int, Mapping[str, float]] | bool] = queue.SimpleQueue()
        self._failed = 0
        self._thread = threading.Thread(target=self._send, name=f"track-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes a step's figures; returns at once."""
        self._queue.put((step, figures))

    def close(self, finished: bool) -> None:
        """Waits, for a bounded time, until all is sent, and ends the service's run."""
        self._queue.put(finished)
        self._thread.join(DRAIN_S)
        if self._thread.is_alive():
            logger.warning("%s does not answer: its run may lack the last steps", self._name)

    def _send(self) -> None:
        while True:
            item = self._queue.get()
            # A service's client can raise anything; none of it is a reason to stop a training run.
            try:
                if isinstance(item, bool):
                    self._tracker.close(item)
                    return
                self._tracker.log(*item)
            except Exception as error:
                if isinstance(item, bool):
                    logger.warning("%s: its run could not be ended: %s", self._name, error)
                    return
                self._failed += 1
                if self._failed == 1:
                    logger.warning("%s refuses figures, which stay in the run's log: %s", self._name, error)


def require_trackers(config: TrackConfig | None) -> None:
    """Refuses a recipe whose trackers are not installed here.

    Raises:
        ConfigError: says which extra installs it.
    """
    for name in ("mlflow", "wandb"):
        if config is not None and getattr(config, name) is not None and find_spec(name) is None:
            raise ConfigError(f"track.{name}: the package is missing; install raycolbert[{name}]")


def open_trackers(
    config: TrackConfig | None, run: str, settings: Mapping[str, Any]
) -> list[BackgroundTracker]:
    """The trackers that a recipe asks for, ready for figures of this run.

    Args:
        config: the recipe's section ``track``.
        run: name of the run; the same name goes on under the same run of the service.
        settings: plain data to store with the run.

    Raises:
        ConfigError: a tracker is not installed, or its service cannot be reached at the start.
    """
    require_trackers(config)
    builders: dict[str, Callable[[], Tracker]] = {}
    if config is not None and config.mlflow is not None:
        builders["mlflow"] = partial(MlflowTracker, config.mlflow, run, settings)
    if config is not None and config.wandb is not None:
        builders["wandb"] = partial(WandbTracker, config.wandb, run, settings)
    found = []
    for name, build in builders.items():
        try:
            found.append(BackgroundTracker(name, build()))
        except Exception as error:
            raise ConfigError(f"track.{name}: no run can be opened: {error}") from error
    return found


class MlflowTracker:
    """MLflow, through its client: no global state, so that other runs of the process are left alone."""

    def __init__(self, config: MlflowConfig, run: str, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=config.uri)
        experiment = self._client.get_experiment_by_name(config.experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(config.experiment)
        found = self._client.search_runs([number], filter_string=f"tags.`{RUN_TAG}` = '{run}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._client.create_run(number, run_name=run, tags={RUN_TAG: run}).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in _flat(settings).items()]
        for first in range(0, len(params), 100):
            self._client.log_batch(self._run, params=params[first : first + 100])

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(
            self._run, metrics=[Metric(name, value, now, step) for name, value in figures.items()]
        )

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._run, status="FINISHED" if finished else "FAILED")


class WandbTracker:
    """Weights & Biases. Of a step that a resumed run repeats, the service keeps the first figures."""

    def __init__(self, config: WandbConfig, run: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            dir=config.directory,
            id=hashlib.sha256(run.encode()).hexdigest()[:16],
            name=run,
            resume="allow" if config.mode == "online" else None,
            config=dict(settings),
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
