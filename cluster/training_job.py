"""What Ray Train hands to a training worker: the function to run, and the phase with all it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cluster.artifacts import ArtifactRef
from cluster.config import Recipe, TrainPhase
from cluster.run_lease import LeaseClaim
from cluster.streams import TupleIndex, UnitSchedule


@dataclass(frozen=True)
class PhaseJob:
    """All that a worker needs to run a training phase.

    Attributes:
        recipe: the whole recipe.
        phase: the phase to run.
        run: name of the run in storage.
        init: the model to start from.
        data: the training sets, in order.
        index: where their tuples are.
        data_fingerprint: digest of their content.
        readers: Ray Data processes that read and tokenise for one worker.
        claim: to the run, by whoever started it.
    """

    recipe: Recipe
    phase: TrainPhase
    run: str
    init: ArtifactRef
    data: tuple[ArtifactRef, ...]
    index: TupleIndex
    data_fingerprint: str
    readers: int
    claim: LeaseClaim

    @property
    def schedule(self) -> UnitSchedule:
        phase = self.phase
        return UnitSchedule(self.index.tuples, phase.micro_batch, phase.queries_per_step, phase.seed)


def run_worker(config: dict[Any, Any]) -> dict[str, Any]:
    """The training function of Ray Train; ``config['job']`` is a :class:`PhaseJob`.

    It stands here, and imports the loop only when it runs, because Ray Train's controller loads this module
    too: it starts some seconds earlier without the model's libraries.

    What it reports to Ray Train are the figures of the last step, and under ``steps`` those of every step
    since the last report.

    Returns:
        ``{"failure": [class name, message]}`` when going on is pointless (malformed data, a loss that is no
        number, a run that is another's by now): raising would make Ray Train try the same again. Else the
        last step's figures.
    """
    from cluster.training_loop import TrainingLoop

    return TrainingLoop(config["job"]).run()
