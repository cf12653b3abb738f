"""Names of everything that a recipe makes.

A version is a fingerprint of all that determines its content, parents included. A job can therefore
tell from the recipe alone whether its output exists, and a changed recipe never meets a stale output. What
the data files hold is no part of a recipe: :mod:`cluster.data_files` compares it.
Jobs replace aliases by versions first (:func:`cluster.models.pinned`): here they are taken as written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from cluster.config import AverageInput, Recipe, TrainPhase, fingerprint
from colbert_core.errors import ConfigError

Kind = Literal["models", "data", "indexes"]

# How mining and scoring are spread does not change what they find.
_PARALLEL = {"workers", "cpus_per_worker", "gpus_per_worker"}


@dataclass(frozen=True, order=True)
class ArtifactRef:
    """One published version: ``models/jacolbert@pretrain-0f3a…``."""

    kind: Kind
    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}@{self.version}"

    @property
    def prefix(self) -> str:
        """The storage key that all files of this version start with, with a closing slash."""
        return f"{self.kind}/{self.name}/{self.version}/"


def base_ref(recipe: Recipe) -> ArtifactRef:
    """The untrained start: backbone, markers and initial projection."""
    source = recipe.data.sources[recipe.model.pca_source] if recipe.model.pca_source else None
    place = _place(recipe) if source else recipe.data.edition
    digest = fingerprint(recipe.model, source, place, recipe.seed)
    return ArtifactRef("models", recipe.model.name, f"base-{digest}")


def candidates_ref(recipe: Recipe, tuples: str) -> ArtifactRef:
    """Candidates of a tuple set, not yet scored: mined, or read from files to be scored again."""
    tuple_set = recipe.data.tuples[tuples]
    name = f"{recipe.name}-{tuples}-candidates"
    if tuple_set.read is not None:
        return ArtifactRef("data", name, fingerprint(tuple_set.read, _place(recipe)))
    mining = tuple_set.mine
    assert mining is not None  # a tuple set has exactly one origin
    scorers = {pool.scorer: scorer_identity(recipe, pool.scorer) for pool in mining.pools}
    digest = fingerprint(
        mining.model_dump(mode="json", exclude=_PARALLEL),
        recipe.data.sources[mining.source],
        _place(recipe),
        scorers,
    )
    return ArtifactRef("data", name, digest)


def tuples_ref(recipe: Recipe, tuples: str) -> ArtifactRef:
    """A training set in native tuple form, teacher scores included."""
    tuple_set = recipe.data.tuples[tuples]
    if tuple_set.read is not None:
        origin: object = [tuple_set.read.model_dump(mode="json"), _place(recipe)]
    else:
        origin = candidates_ref(recipe, tuples).version
    scoring = tuple_set.score
    scorers = {name: scorer_identity(recipe, name) for name in scoring.scorers} if scoring else {}
    score_plain = scoring.model_dump(mode="json", exclude=_PARALLEL) if scoring else None
    return ArtifactRef("data", f"{recipe.name}-{tuples}", fingerprint(origin, score_plain, scorers))


def phase_ref(recipe: Recipe, phase: str, step: int | None = None) -> ArtifactRef:
    """The x-view model that a training phase publishes at its end, or at an earlier step."""
    config = training_phase(recipe, phase)
    version = f"{phase}-{phase_fingerprint(recipe, config)}"
    if step is not None and step != config.steps:
        version += f"-step{step:08d}"
    return ArtifactRef("models", recipe.model.name, version)


def phase_fingerprint(recipe: Recipe, phase: TrainPhase) -> str:
    """Digest of all that determines a phase's result; how it is run in parallel does not."""
    parallel = {
        "num_workers",
        "cpus_per_worker",
        "gpus_per_worker",
        "threads_per_worker",
        "max_failures",
        "checkpoint",
        "validation",
        "zero_stage",
        "gradient_checkpointing",
        "token_budget",
    }
    config = phase.model_dump(mode="json", exclude=parallel)
    start = phase.init if "@" in phase.init else model_ref(recipe, phase.init).version
    return fingerprint(config, start, [tuples_ref(recipe, name).version for name in phase.data])


def averaged_ref(recipe: Recipe) -> ArtifactRef:
    """The mean of the models that ``average.inputs`` names."""
    if recipe.average is None:
        raise ConfigError("the recipe has no 'average' section")
    inputs: list[tuple[str, float]] = []
    for item in recipe.average.inputs:
        if item.model is not None:
            inputs.append((item.model, item.weight))
            continue
        versions = [ref.version for ref in input_refs(recipe, item)]
        if item.best is not None:
            choice = fingerprint(versions, item.best, item.metric, _source_identity(recipe, item.source))
            versions = [f"best-{choice}"]
        inputs += [(version, item.weight) for version in versions]
    greedy = recipe.average.greedy
    soup = [greedy.metric, _source_identity(recipe, greedy.source)] if greedy else None
    return ArtifactRef("models", recipe.model.name, f"averaged-{fingerprint(sorted(inputs), soup)}")


def input_refs(recipe: Recipe, item: AverageInput) -> list[ArtifactRef]:
    """The steps of a phase that an average input stands for; for its best ones, those to choose from.

    Raises:
        ConfigError: the phase publishes fewer.
    """
    assert item.phase is not None  # other inputs need a registry
    wanted = item.last or item.best
    if wanted is None:
        return [phase_ref(recipe, item.phase, None if item.step == "last" else item.step)]
    steps = training_phase(recipe, item.phase).published_steps
    if wanted > len(steps):
        which = ", ".join(map(str, steps))
        raise ConfigError(
            f"average.inputs: {wanted} steps of phase {item.phase!r}, but it publishes {len(steps)}: {which}"
        )
    return [phase_ref(recipe, item.phase, step) for step in steps[-item.last if item.last else 0 :]]


def _source_identity(recipe: Recipe, source: str | None) -> Any:
    """What determines a data source's content, as far as a recipe says it."""
    assert source is not None  # the recipe was checked
    return [recipe.data.sources[source].model_dump(mode="json"), _place(recipe)]


def _place(recipe: Recipe) -> Any:
    """Where the data files are, and which edition of them it is."""
    data = recipe.data
    return data.root if data.edition is None else [data.root, data.edition]


def model_ref(recipe: Recipe, spec: str) -> ArtifactRef:
    """The version that 'base', 'averaged' or a phase's name stands for in this recipe.

    Raises:
        ConfigError: ``spec`` is none of these; NAME@VERSION specs need a registry to be resolved.
    """
    if spec == "base":
        return base_ref(recipe)
    if spec == "averaged":
        return averaged_ref(recipe)
    phases = [phase.name for phase in recipe.train]
    if spec in phases:
        return phase_ref(recipe, spec)
    raise ConfigError(f"no model {spec!r} in this recipe; there are: base, averaged, {', '.join(phases)}")


def index_ref(recipe: Recipe) -> ArtifactRef:
    """The index that ``index`` describes."""
    if recipe.index is None:
        raise ConfigError("the recipe has no 'index' section")
    content = recipe.index.model_dump(
        mode="json", exclude={"name", "encode_workers", "cpus_per_worker", "gpus_per_worker", "token_budget"}
    )
    spec = recipe.index.model
    model = spec if "@" in spec else model_ref(recipe, spec).version
    sources = {name: recipe.data.sources[name].model_dump(mode="json") for name in recipe.index.sources}
    return ArtifactRef("indexes", recipe.index.name, fingerprint(content, model, sources, _place(recipe)))


def training_phase(recipe: Recipe, name: str) -> TrainPhase:
    """The phase of this name.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    for phase in recipe.train:
        if phase.name == name:
            return phase
    names = ", ".join(phase.name for phase in recipe.train) or "none"
    raise ConfigError(f"no training phase {name!r}; there are: {names}")


def is_own_model(recipe: Recipe, spec: str) -> bool:
    """Does a model spec name the recipe's base, its average or one of its phases?"""
    return spec in ("base", "averaged", *(phase.name for phase in recipe.train))


def scorer_identity(recipe: Recipe, name: str) -> dict[str, Any]:
    """A scorer's settings; one that is a model of this recipe stands for that model's version."""
    config = recipe.scorers[name]
    plain = config.model_dump(mode="json")
    if config.kind == "colbert" and is_own_model(recipe, config.model):
        plain["model"] = model_ref(recipe, config.model).version
    return plain
