"""An ablation study: its trials, and what their scores say about the variants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.artifacts import ArtifactRef, model_ref
from cluster.config import Recipe, System, TrainPhase
from cluster.config.ablation import BASELINE
from cluster.evaluation import mean
from colbert_core.errors import ConfigError
from colbert_core.metrics import paired_bootstrap


@dataclass(frozen=True)
class Trial:
    """One variant trained from one seed.

    Attributes:
        variant: name of the variant.
        seed: of its training phases.
        recipe: what it runs.
        model: the phase it is judged by, or 'averaged'.
    """

    variant: str
    seed: int
    recipe: Recipe
    model: str

    def __str__(self) -> str:
        return f"{self.variant} · seed {self.seed}"

    @property
    def ref(self) -> ArtifactRef:
        """The model that it is judged by; equal refs are equal models."""
        return model_ref(self.recipe, self.model)

    @property
    def phases(self) -> list[TrainPhase]:
        """The phases that the judged model needs, in order."""
        names = [phase.name for phase in self.recipe.train]
        last = names.index(self.model) if self.model in names else len(names) - 1
        return list(self.recipe.train[: last + 1])


@dataclass(frozen=True)
class VariantScore:
    """What one metric says about a variant on one source.

    Attributes:
        mean: over queries and seeds.
        by_seed: seed to the mean over queries.
        difference: to the baseline, of the mean over seeds, with the bounds of its paired bootstrap 95 %
            interval over queries; None for the baseline itself.
    """

    mean: float
    by_seed: dict[int, float]
    difference: tuple[float, float, float] | None


def expand(recipe: Recipe) -> list[Trial]:
    """The trials of a recipe's study: every variant from every seed, the baseline first.

    Raises:
        ConfigError: there is no ``ablate`` section, or two variants would train the same model.
    """
    if recipe.ablate is None:
        raise ConfigError("the recipe has no 'ablate' section")
    trials, owners = [], dict[ArtifactRef, Trial]()
    for variant, overrides in recipe.ablate.variants().items():
        for seed in recipe.ablate.seeds:
            trial_recipe = recipe.trial(overrides, seed)
            trial = Trial(variant, seed, trial_recipe, recipe.ablate.model or trial_recipe.train[-1].name)
            if (owner := owners.setdefault(trial.ref, trial)) is not trial:
                raise ConfigError(
                    f"ablate: {trial} would train the same model as {owner}: what it sets is what the "
                    "recipe says anyway, or only spreads the work"
                )
            trials.append(trial)
    return trials


def references(recipe: Recipe) -> dict[str, System]:
    """The systems of ``evaluate`` that need no training: shown beside the variants."""
    systems = recipe.evaluate.systems if recipe.evaluate else {}
    return {
        name: system
        for name, system in systems.items()
        if not system.index and (system.model is None or system.model == "base" or "@" in system.model)
    }


def room(trials: Sequence[Trial], resources: Mapping[str, float]) -> int:
    """How many trials a Ray cluster of so many resources has room for at once; at least 1.

    A trial needs what the workers of its largest phase claim, and one CPU to list what they read.
    """
    phases = [phase for trial in trials for phase in trial.phases]
    need = {
        "CPU": max(_workers(phase) * phase.cpus_per_worker for phase in phases) + 1.0,
        "GPU": max(_workers(phase) * phase.gpus_per_worker for phase in phases),
    }
    fits = [resources.get(name, 0.0) // amount for name, amount in need.items() if amount]
    return max(1, min(len(trials), int(min(fits))))


def compare(values: Mapping[str, Mapping[int, Mapping[str, float]]], seed: int) -> dict[str, VariantScore]:
    """Each variant's score, and its difference to the baseline where that has one.

    The interval is over queries: each query's value is first averaged over the seeds, in both variants,
    and queries are resampled in pairs. It says how much the difference owes to the choice of questions,
    and nothing about what another seed would give.

    Args:
        values: variant to seed to query id to value of one metric.
        seed: of the resampling.
    """
    base = _over_seeds(values[BASELINE]) if BASELINE in values else None
    return {
        variant: VariantScore(
            mean=mean(_over_seeds(by_seed)),
            by_seed={number: mean(each) for number, each in by_seed.items()},
            difference=(
                None
                if base is None or variant == BASELINE
                else paired_bootstrap(_over_seeds(by_seed), base, seed=seed)
            ),
        )
        for variant, by_seed in values.items()
    }


def _over_seeds(by_seed: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Each query's mean over the seeds."""
    queries = next(iter(by_seed.values()))
    return {query: sum(values[query] for values in by_seed.values()) / len(by_seed) for query in queries}


def _workers(phase: TrainPhase) -> int:
    return phase.num_workers if isinstance(phase.num_workers, int) else phase.num_workers[1]
