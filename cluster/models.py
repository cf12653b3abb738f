"""Models of a recipe: the untrained start, and finding and loading what is published."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import torch

from cluster.artifacts import ArtifactRef, base_ref, model_ref
from cluster.config import Recipe, TrainPhase
from cluster.data_files import MODELS_KEY, DataFiles, check_same_files, model_files
from cluster.registry import Registry
from cluster.sources import document_text, read_records
from colbert_core.config import ColBERTConfig, FrozenModel
from colbert_core.encoder import ColBERT
from colbert_core.errors import ArtifactNotFound, ConfigError, DataError, VersionExists
from colbert_core.formats import CONFIG_FILE, has_projection, load_model, read_config, save_model
from colbert_core.formats_stanford import StanfordExportWarning
from colbert_core.pretrained import resolve_base
from colbert_core.projection import pca_projection

Section = TypeVar("Section", bound=FrozenModel)


def save_for_registry(model: ColBERT, directory: Path) -> None:
    """Writes a model in all layouts. Who takes Stanford's out of the registry is told what it cannot say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StanfordExportWarning)
        save_model(model, directory)


def ensure_base(recipe: Recipe, registry: Registry) -> ArtifactRef:
    """The untrained start of the recipe, made and published if it does not exist yet.

    A base that is a ColBERT model already (in any layout) keeps its projection. Any other encoder gets a
    random one, or the principal components of its token states over a seeded sample of documents.

    Raises:
        ConfigError: ``projection: pca`` for a base that has a projection.
        ModelError: the base cannot be loaded.
        DataError: the source of the PCA has no documents or is malformed; it or the base's directory was
            changed since the start was made of it.
    """
    ref, settings = base_ref(recipe), recipe.model
    paths = [recipe.data.sources[settings.pca_source].corpus] if settings.pca_source else []
    if registry.exists(ref):
        check_same_files(recipe, registry, ref, paths)
        return ref
    data, base = DataFiles(recipe, paths), DataFiles(recipe, model_files(settings.base))
    model = _build_base(recipe)
    with tempfile.TemporaryDirectory(prefix="raycolbert-base-") as folder:
        directory = Path(folder) / "model"
        save_for_registry(model, directory)
        try:
            registry.publish(
                ref,
                directory,
                recipe=recipe.model_dump(mode="json"),
                fingerprint=data.fingerprint if paths else None,
                extra={
                    "base": settings.base,
                    "projection": settings.projection,
                    "seed": recipe.seed,
                    **data.record(),
                    **base.record(MODELS_KEY),
                },
            )
        except VersionExists:
            # Another job of this recipe was first; both built the same from the same settings.
            return ref
    return ref


def pinned(recipe: Recipe, registry: Registry) -> Recipe:
    """The recipe with the version in place of each alias of a model, as it stands now.

    Every job does this first: its outputs are then named after what went into them, an alias that moves
    leads to new outputs and never to stale ones, and what is published tells which version it was. A
    version or alias that does not exist stays as it is, for the job that needs it to say so.
    """

    def pin(spec: str) -> str:
        if "@" not in spec:
            return spec
        try:
            ref = registry.resolve("models", spec)
        except ArtifactNotFound:
            return spec
        return f"{ref.name}@{ref.version}"

    def pin_in(section: Section, key: str) -> Section:
        spec = getattr(section, key, None)
        return section.model_copy(update={key: pin(spec)}) if isinstance(spec, str) else section

    changed: dict[str, Any] = {"train": tuple(pin_in(phase, "init") for phase in recipe.train)}
    changed["scorers"] = {
        name: pin_in(scorer, "model") if scorer.kind == "colbert" else scorer
        for name, scorer in recipe.scorers.items()
    }
    if recipe.average is not None:
        inputs = tuple(pin_in(item, "model") for item in recipe.average.inputs)
        changed["average"] = recipe.average.model_copy(update={"inputs": inputs})
    if recipe.index is not None:
        changed["index"] = pin_in(recipe.index, "model")
    if recipe.evaluate is not None:
        systems = {name: pin_in(system, "model") for name, system in recipe.evaluate.systems.items()}
        changed["evaluate"] = recipe.evaluate.model_copy(update={"systems": systems})
    return recipe.model_copy(update=changed)


def resolve_model(recipe: Recipe, registry: Registry, spec: str) -> ArtifactRef:
    """The version that a model spec of a recipe stands for.

    Args:
        recipe: gives 'base', 'averaged' and the phases their versions; these need not be published yet.
        registry: where aliases are looked up.
        spec: 'base', 'averaged', a phase's name, or NAME@VERSION-or-alias.

    Raises:
        ConfigError: ``spec`` is none of these.
        ArtifactNotFound: there is no such version or alias.
    """
    return registry.resolve("models", spec) if "@" in spec else model_ref(recipe, spec)


def check_start(recipe: Recipe, registry: Registry, phase: TrainPhase, ref: ArtifactRef) -> None:
    """Is the start of a phase published, and made with the settings that the recipe asks for?

    A phase that starts from a published model keeps that model's settings.

    Args:
        recipe: whose ``model.colbert`` is compared, as far as it is not at its defaults.
        registry: of the recipe's storage.
        phase: the phase.
        ref: what its ``init`` stands for.

    Raises:
        ArtifactNotFound: the start is not published.
        ConfigError: it was made with other settings; the message names the keys.
    """
    registry.manifest(ref)
    if "@" not in phase.init:
        return
    asked, usual = recipe.model.colbert, ColBERTConfig()
    found = read_config(registry.pull(ref, paths=[CONFIG_FILE]) / CONFIG_FILE)
    unlike = [
        f"model.colbert.{key} is {wanted!r}, that model has {getattr(found, key)!r}"
        for key, wanted in asked
        if wanted != getattr(usual, key) and wanted != getattr(found, key)
    ]
    if unlike:
        raise ConfigError(
            f"training phase {phase.name!r} starts from {phase.init} and keeps its settings: "
            f"{'; '.join(unlike)}; set the same values, or none"
        )


def start_of(recipe: Recipe, spec: str) -> str:
    """What the training of a model began with: 'base', or a published NAME@VERSION.

    Of an averaged model it is what the first of its phases began with.
    """
    phases = {phase.name: phase for phase in recipe.train}
    if spec == "averaged" and recipe.average is not None:
        spec = next((item.phase for item in recipe.average.inputs if item.phase is not None), "base")
    while spec in phases:
        spec = phases[spec].init
    return spec


def load_model_ref(registry: Registry, ref: ArtifactRef) -> ColBERT:
    """A published model, every byte checked against its manifest, on the CPU in fp32 and eval mode.

    Raises:
        ArtifactNotFound: it is not published.
        IntegrityError: a file is damaged.
        ModelError: it is no ColBERT model.
    """
    return load_model(registry.pull(ref))


def sample_documents(recipe: Recipe, source: str, count: int, seed: int) -> list[str]:
    """A uniform sample of a source's documents, in file order; all of them if there are no more.

    The corpus is streamed: memory is that of the sample.

    Raises:
        DataError: the corpus is empty or malformed.
    """
    generator = Random(seed)
    kept: list[tuple[int, str]] = []
    path = recipe.data.sources[source].corpus
    records = read_records(recipe, path, ("_id", "text"), optional=("title",))
    for position, (_, record) in enumerate(records):
        item = (position, document_text(record["title"], record["text"]))
        if len(kept) < count:
            kept.append(item)
            continue
        # Algorithm R: the n-th document takes a place with probability count / n.
        place = generator.randrange(position + 1)
        if place < count:
            kept[place] = item
    if not kept:
        raise DataError(f"{path}: the corpus has no documents")
    return [text for _, text in sorted(kept)]


def _build_base(recipe: Recipe) -> ColBERT:
    settings = recipe.model
    base = resolve_base(settings.base)
    if has_projection(base):
        if settings.projection == "pca":
            raise ConfigError(
                f"model.projection is 'pca', but the base {settings.base!r} has a projection already; "
                "remove the key to keep that one"
            )
        return load_model(base, overrides=settings.colbert)
    model = ColBERT.create(base, settings.colbert, seed=recipe.seed)
    if settings.projection == "pca":
        assert settings.pca_source is not None  # the recipe was checked
        texts = sample_documents(recipe, settings.pca_source, settings.pca_documents, recipe.seed)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        projection = pca_projection(model, texts)
        with torch.no_grad():
            model.projection.weight.copy_(projection)
    return model
