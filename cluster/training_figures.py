"""What the workers tell each other: decisions, and one row of numbers a step, of which the record is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from cluster.engine import Precision, StepOutcome
from cluster.training_log import StepRecord
from cluster.training_step import UnitOutcome
from cluster.training_units import TokenisedUnit

LOSS_TERMS = ("kl", "margin_mse", "contrastive")


class WorkerGroup:
    """The workers of a run, as far as they talk on their CPUs; all methods are collective.

    Attributes:
        rank: of this worker.
        count: of all.
    """

    def __init__(self) -> None:
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None

    def agree_on(self, value: Any) -> Any:
        """Rank 0's value, on every worker."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def every(self, value: Any) -> list[Any]:
        """The values of all workers, by rank."""
        values = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def first_of(self, value: Any) -> Any:
        """The lowest rank's value that is not None, on every worker."""
        return next((found for found in self.every(value) if found is not None), None)

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest value of each place."""
        vector = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(vector, op=dist.ReduceOp.MAX, group=self._group)
        found: list[float] = vector.tolist()
        return found

    def gather(self, row: Sequence[float]) -> NDArray[np.float64]:
        """``[workers, columns]``, the rows of all workers."""
        mine = torch.tensor(row, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(everyone, mine, group=self._group)
        return torch.stack(everyone).numpy()

    def barrier(self) -> None:
        """Waits until all workers have come here."""
        dist.barrier(group=self._group)


class StepFigures:
    """A step's figures of all workers.

    Args:
        rows: float64 ``[workers, columns]``, each as :meth:`row` makes it.
    """

    COLUMNS = (
        "bad",
        "wait",
        "save",
        "uploading",
        "loss",
        *LOSS_TERMS,
        "tokens",
        "padding",
        "listed",
        "encoded",
        "truncated_documents",
        "truncated_queries",
        "dropped",
        "uploaded",
        "save_due",
        "report_due",
    )

    def __init__(self, rows: NDArray[np.float64]) -> None:
        self._columns = dict(zip(self.COLUMNS, rows.T, strict=True))

    @classmethod
    def row(
        cls,
        units: Sequence[TokenisedUnit],
        outcomes: Sequence[UnitOutcome],
        *,
        wait_s: float,
        save_s: float,
        uploading: bool,
        uploaded: bool,
        save_due: bool,
        report_due: bool,
    ) -> list[float]:
        """What one worker knows.

        Args:
            units: its units of the step.
            outcomes: what their forward passes found.
            wait_s: how long it waited for them.
            save_s: how long it waited for resume states and models since the step before.
            uploading: is anything on its way to storage.
            uploaded: is its part of the save in flight in storage.
            save_due, report_due: is it time; only rank 0 says so.
        """
        both = list(zip(units, outcomes, strict=True))
        cut = [unit.truncation for unit in units]
        values: dict[str, float] = {
            "bad": any(outcome.non_finite for outcome in outcomes),
            "wait": wait_s,
            "save": save_s,
            "uploading": uploading,
            "loss": sum(unit.slot.weight * outcome.loss for unit, outcome in both),
            "tokens": sum(outcome.tokens for outcome in outcomes),
            "padding": sum(outcome.padding for outcome in outcomes),
            "listed": sum(unit.document_of.size for unit in units),
            "encoded": sum(len(unit.documents) for unit in units),
            "truncated_documents": sum(count.truncated_documents for count in cut),
            "truncated_queries": sum(count.truncated_queries for count in cut),
            "dropped": sum(count.dropped_tokens + count.dropped_query_tokens for count in cut),
            "uploaded": uploaded,
            "save_due": save_due,
            "report_due": report_due,
        }
        for term in LOSS_TERMS:
            values[term] = sum(unit.slot.weight * outcome.parts.get(term, 0.0) for unit, outcome in both)
        return [float(values[name]) for name in cls.COLUMNS]

    @property
    def any_bad(self) -> bool:
        return bool(self._columns["bad"].any())

    @property
    def all_uploaded(self) -> bool:
        return bool(self._columns["uploaded"].all())

    @property
    def save_due(self) -> bool:
        return bool(self._columns["save_due"].any())

    @property
    def report_due(self) -> bool:
        return bool(self._columns["report_due"].any())

    def record(
        self,
        update: StepOutcome,
        *,
        epoch: float,
        seconds: float,
        workers: int,
        precision: Precision,
        validation: dict[str, float],
        validation_s: float,
    ) -> StepRecord:
        """The step's log record; arguments as its attributes."""

        def total(name: str) -> float:
            return float(self._columns[name].sum())

        tokens, padding = total("tokens"), total("padding")
        return StepRecord(
            step=update.step,
            epoch=epoch,
            loss=total("loss"),
            parts={term: total(term) for term in LOSS_TERMS if total(term)},
            lr=update.lr,
            gradient_norm=update.gradient_norm,
            seconds=seconds,
            data_wait_s=float(self._columns["wait"].max()),
            tokens=int(tokens),
            tokens_per_s=tokens / seconds,
            padding_fraction=padding / max(1.0, tokens + padding),
            documents_listed=int(total("listed")),
            documents_encoded=int(total("encoded")),
            truncated_documents=int(total("truncated_documents")),
            truncated_queries=int(total("truncated_queries")),
            dropped_tokens=int(total("dropped")),
            workers=workers,
            precision=precision,
            save_s=float(self._columns["save"].max()),
            uploading=bool(self._columns["uploading"].any()),
            validation=validation,
            validation_s=validation_s,
        )
