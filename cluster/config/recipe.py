"""The whole recipe: its sections, and what they must agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from cluster.config.ablation import AblateConfig, Overrides
from cluster.config.base import Name, assign
from cluster.config.data import DataConfig, Scorer
from cluster.config.retrieval import EvaluateConfig, IndexConfig, ServeConfig
from cluster.config.session import RayConfig, StorageConfig, TrackConfig
from cluster.config.training import AverageConfig, ModelConfig, TrainPhase
from colbert_core.config import FrozenModel


class Recipe(FrozenModel):
    """Everything that the jobs read. See ``recipes/`` for worked examples."""

    schema_version: Literal[1] = 1
    name: Name
    seed: int = Field(42, ge=0)
    storage: StorageConfig
    ray: RayConfig = RayConfig()
    track: TrackConfig | None = None
    model: ModelConfig
    data: DataConfig = DataConfig()
    scorers: dict[Name, Scorer] = Field(default_factory=dict)
    train: tuple[TrainPhase, ...] = ()
    average: AverageConfig | None = None
    index: IndexConfig | None = None
    evaluate: EvaluateConfig | None = None
    serve: ServeConfig | None = None
    ablate: AblateConfig | None = None

    @model_validator(mode="after")
    def _references_exist(self) -> Recipe:
        sources, tuples, phases = set(self.data.sources), set(self.data.tuples), [p.name for p in self.train]

        def check(key: str, value: str | None, allowed: Sequence[str] | set[str], what: str) -> None:
            if value is not None and value not in allowed:
                raise ValueError(
                    f"{key}: no {what} {value!r}; there are: {', '.join(sorted(allowed)) or 'none'}"
                )

        check("model.pca_source", self.model.pca_source, sources, "data source")
        for name, tuple_set in self.data.tuples.items():
            if tuple_set.mine:
                check(f"data.tuples.{name}.mine.source", tuple_set.mine.source, sources, "data source")
                for pool in tuple_set.mine.pools:
                    check(f"data.tuples.{name}.mine.pools", pool.scorer, set(self.scorers), "scorer")
            for scorer in tuple_set.score.scorers if tuple_set.score else ():
                check(f"data.tuples.{name}.score.scorers", scorer, set(self.scorers), "scorer")
        if len(set(phases)) != len(phases):
            raise ValueError(f"train: two phases share a name: {phases}")
        for position, phase in enumerate(self.train):
            for tuple_name in phase.data:
                check(f"train.{position}.data", tuple_name, tuples, "tuple set")
            if phase.validation:
                check(f"train.{position}.validation.source", phase.validation.source, sources, "data source")
            if phase.name in ("base", "averaged"):
                raise ValueError(f"train.{position}.name: {phase.name!r} is reserved")
            if "@" not in phase.init:
                check(f"train.{position}.init", phase.init, ["base", *phases[:position]], "earlier phase")
        for position, item in enumerate(self.average.inputs if self.average else ()):
            check(f"average.inputs.{position}.phase", item.phase, phases, "phase")
            check(f"average.inputs.{position}.source", item.source, sources, "data source")
        if self.average and self.average.greedy:
            check("average.greedy.source", self.average.greedy.source, sources, "data source")
        for source in self.index.sources if self.index else ():
            check("index.sources", source, sources, "data source")
        if self.index and "@" not in self.index.model:
            check("index.model", self.index.model, ["base", "averaged", *phases], "model")
        if self.evaluate:
            for source in self.evaluate.sources:
                check("evaluate.sources", source, sources, "data source")
            for name, system in self.evaluate.systems.items():
                for scorer in [system.scorer] if system.scorer else system.ensemble or ():
                    check(f"evaluate.systems.{name}", scorer, set(self.scorers), "scorer")
                if system.model and "@" not in system.model:
                    allowed = ["base", "averaged", *phases]
                    check(f"evaluate.systems.{name}.model", system.model, allowed, "model")
            check("evaluate.baseline", self.evaluate.baseline, set(self.evaluate.systems), "system")
            if self.evaluate.gate:
                check("evaluate.gate.source", self.evaluate.gate.source, sources, "data source")
        return self

    @model_validator(mode="after")
    def _jobs_fit_together(self) -> Recipe:
        """Refuses now what a job would refuse only after the one before it has run for hours."""
        for name, tuple_set in self.data.tuples.items():
            for pool in tuple_set.mine.pools if tuple_set.mine else ():
                self._require_search(f"data.tuples.{name}.mine.pools", [pool.scorer])
        for position, phase in enumerate(self.train):
            for name in phase.data:
                mined = self.data.tuples[name].mine
                documents = 1 + sum(pool.take for pool in mined.pools) if mined else phase.nway
                if documents < phase.nway:
                    raise ValueError(
                        f"train.{position}.nway: {phase.nway}, but the tuples of {name!r} are mined with "
                        f"{documents} documents (the positive and what the pools take)"
                    )
        by_name = {phase.name: phase for phase in self.train}
        for position, item in enumerate(self.average.inputs if self.average else ()):
            if item.phase is None:
                continue
            phase, key = by_name[item.phase], f"average.inputs.{position}"
            every = phase.checkpoint.publish_every_steps
            published = f"every {every} steps and its last" if every else "its last step only"
            says = f"phase {item.phase!r} publishes {published} (checkpoint.publish_every_steps)"
            # What is past the end is left to the average job: a shortened trial of the phase is no mistake.
            if item.step != "last" and item.step < phase.steps and item.step not in phase.published_steps:
                raise ValueError(f"{key}.step: {item.step}, but {says}")
            for name, count in (("last", item.last), ("best", item.best)):
                if count is not None and count > 1 and not every:
                    raise ValueError(f"{key}.{name}: {count}, but {says}")
        return self

    @model_validator(mode="after")
    def _systems_can_search(self) -> Recipe:
        for name, system in self.evaluate.systems.items() if self.evaluate else ():
            key = f"evaluate.systems.{name}"
            self._require_search(key, [system.scorer] if system.scorer else [*(system.ensemble or ())])
            if not system.index or self.index is None:
                continue
            assert system.model is not None and self.evaluate is not None  # both were checked
            if "@" not in system.model + self.index.model and system.model != self.index.model:
                raise ValueError(
                    f"{key}: the recipe's index is of {self.index.model!r}, and cannot be searched with "
                    f"{system.model!r}"
                )
            for source in self.evaluate.sources:
                if source not in self.index.sources:
                    raise ValueError(
                        f"{key}: the recipe's index does not hold evaluate.sources' {source!r}; it holds: "
                        f"{', '.join(self.index.sources)}"
                    )
        return self

    def _require_search(self, key: str, scorers: Sequence[str]) -> None:
        """Scores of several are combined over what those find that can search: one is enough."""
        kinds = {name: self.scorers[name].kind for name in scorers}
        if kinds and all(kind in ("cross_encoder", "labels") for kind in kinds.values()):
            told = ", ".join(f"{name!r} is of kind {kind}" for name, kind in kinds.items())
            raise ValueError(f"{key}: {told}, which scores pairs and cannot search a corpus")

    @model_validator(mode="after")
    def _variants_are_recipes(self) -> Recipe:
        if self.ablate is None:
            return self
        if self.evaluate is None or not self.train:
            raise ValueError("ablate: needs 'train', what is varied, and 'evaluate', what it is judged by")
        for name, overrides in self.ablate.variants().items():
            try:
                trial = self.trial(overrides, self.ablate.seeds[0])
            except ValidationError as error:
                reasons = "; ".join(
                    ": ".join(filter(None, (".".join(map(str, detail["loc"])), detail["msg"])))
                    for detail in error.errors()
                ).replace("Value error, ", "")
                raise ValueError(f"ablate: variant {name!r}: {reasons}") from None
            except KeyError as error:
                raise ValueError(f"ablate: variant {name!r}: the recipe has no place {error}") from None
            allowed = ["averaged"] if trial.average else []
            allowed += [phase.name for phase in trial.train]
            if self.ablate.model is not None and self.ablate.model not in allowed:
                raise ValueError(
                    f"ablate.model: variant {name!r} has no model {self.ablate.model!r}; "
                    f"it has: {', '.join(allowed)}"
                )
        return self

    def trial(self, overrides: Overrides, seed: int) -> Recipe:
        """This recipe as one trial of an ablation runs it: overridden, and with one seed for all phases.

        Args:
            overrides: dotted key to value.
            seed: takes the place of every ``train.*.seed``.

        Raises:
            ValidationError: the result is no recipe.
            KeyError: a key leads nowhere.
        """
        tree: dict[str, Any] = self.model_dump(mode="json", exclude={"ablate", "index", "serve"})
        for key, value in overrides.items():
            assign(tree, key, value)
        for phase in tree["train"]:
            phase["seed"] = seed
        return Recipe.model_validate(tree)
