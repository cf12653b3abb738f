"""What the workers tell each other about a step: one row of numbers each, and the record it makes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cluster.engine import StepOutcome
from cluster.training_log import StepRecord
from cluster.training_step import UnitOutcome
from cluster.training_units import TokenisedUnit

LOSS_TERMS = ("kl", "margin_mse", "contrastive")


class StepFigures:
    """A step's figures of all workers.

    Args:
        rows: float64 ``[workers, columns]``, each as :meth:`row` makes it.
    """

    COLUMNS = (
        "bad",
        "wait",
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
        uploaded: bool,
        save_due: bool,
        report_due: bool,
    ) -> list[float]:
        """What one worker knows.

        Args:
            units: its units of the step.
            outcomes: what their forward passes found.
            wait_s: how long it waited for them.
            uploaded: is its part of the save in flight in storage.
            save_due, report_due: is it time; only rank 0 says so.
        """
        both = list(zip(units, outcomes, strict=True))
        cut = [unit.truncation for unit in units]
        values: dict[str, float] = {
            "bad": any(outcome.non_finite for outcome in outcomes),
            "wait": wait_s,
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

    def record(self, update: StepOutcome, epoch: float, seconds: float, workers: int) -> StepRecord:
        """The step's log record."""

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
        )
