"""The grid of an ablation study: what is varied, from which seeds, and how much of it runs at once."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, JsonValue, model_validator

from cluster.config.base import Name
from colbert_core.config import FrozenModel

BASELINE = "baseline"

# What a variant may change. The rest says where things lie, or what the variants are compared by.
VARIED = ("model.", "data.tuples.", "scorers.", "train.", "average.")

Overrides = Mapping[str, JsonValue]


class AblateConfig(FrozenModel):
    """Variants of the recipe. The recipe as it is, is the variant ``baseline``.

    An axis is a choice that the recipe makes; its options are other choices, each a set of
    ``dotted.key: value`` overrides as ``--set`` takes them.
    """

    axes: dict[Name, dict[Name, dict[str, JsonValue]]] = Field(
        min_length=1, description="axis to option to overrides, e.g. loss: {mse: {train.0.loss.kl: 0}}"
    )
    design: Literal["one_at_a_time", "full"] = Field(
        "one_at_a_time",
        description="one_at_a_time: the baseline, and each option alone; full: every combination",
    )
    seeds: tuple[int, ...] = Field((1, 2), min_length=1, description="each takes the place of train.*.seed")
    model: str | None = Field(None, description="what is judged: a phase or 'averaged'; default: last phase")
    at_once: int | None = Field(
        None, ge=1, description="trials that run together; default: as many as the cluster has room for"
    )

    @model_validator(mode="after")
    def _options_are_overrides(self) -> AblateConfig:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} names one twice")
        for axis, options in self.axes.items():
            if not options:
                raise ValueError(f"axes.{axis}: at least one option is needed")
            for option, overrides in options.items():
                where = f"axes.{axis}.{option}"
                if not overrides:
                    raise ValueError(f"{where}: it overrides nothing; the baseline is a variant anyway")
                for key in overrides:
                    if not key.startswith(VARIED):
                        allowed = ", ".join(f"{start}…" for start in VARIED)
                        raise ValueError(f"{where}: {key!r} is not to be varied; allowed are {allowed}")
                    if key.startswith("train.") and key.endswith(".seed"):
                        raise ValueError(f"{where}: {key!r}: ablate.seeds says which seeds are run")
        return self

    def variants(self) -> dict[str, dict[str, JsonValue]]:
        """Name to overrides, the baseline first: ``loss=mse``, or ``loss=mse,optimizer=adamw``.

        Where two axes of a full design set the same key, the later axis holds.
        """
        if self.design == "one_at_a_time":
            chosen = [((axis, option),) for axis, options in self.axes.items() for option in options]
            combinations: list[tuple[tuple[str, str | None], ...]] = [(), *chosen]
        else:
            choices = [[(axis, option) for option in (None, *options)] for axis, options in self.axes.items()]
            combinations = list(itertools.product(*choices))
        found: dict[str, dict[str, JsonValue]] = {}
        for combination in combinations:
            taken = [(axis, option) for axis, option in combination if option is not None]
            name = ",".join(f"{axis}={option}" for axis, option in taken) or BASELINE
            found[name] = {}
            for axis, option in taken:
                found[name].update(self.axes[axis][option])
        return found
