"""The configuration of one ColBERT model, stored with its weights.

It is a frozen pydantic model so that a recipe (:mod:`cluster.config`), a saved model
(:mod:`colbert_core.formats`) and the tokenisation (:mod:`colbert_core.text`) share one definition.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class FrozenModel(BaseModel):
    """Base of every config: frozen, unknown keys refused, defaults validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


QueryLengthRule = Literal["fixed", "multiple", "released"]


class ColBERTConfig(FrozenModel):
    """How texts become token vectors.

    Sources: ColBERT (Khattab and Zaharia 2020) for markers, [MASK] expansion and the punctuation
    skiplist; JaColBERTv2.5 section 3.5 for the ``multiple`` query-length rule; ``released`` is the
    rule in the author's evaluator, which differs from the paper's.
    """

    dim: int = Field(128, ge=1, description="dimensions of a token vector")
    query_length: int = Field(32, ge=4, description="query tokens in training, and under rule 'fixed'")
    document_length: int = Field(300, ge=4, description="document tokens, markers included")
    query_length_rule: QueryLengthRule = Field(
        "multiple", description="query length at inference; training is always 'fixed'"
    )
    query_length_multiple: int = Field(32, ge=1, description="the multiple of the two dynamic rules")
    min_expansion: int = Field(8, ge=0, description="fewest [MASK] tokens under the dynamic rules")
    expand_queries: bool = Field(True, description="pad queries with [MASK] tokens that take part in MaxSim")
    attend_to_expansion: bool = Field(False, description="may other tokens attend to the [MASK] tokens")
    query_marker: str = Field("[unused0]", description="token at index 1 of a query")
    document_marker: str = Field("[unused1]", description="token at index 1 of a document")
    query_marker_init: str | None = Field(
        None, description="a marker new to the vocabulary starts as the mean embedding of this text"
    )
    document_marker_init: str | None = Field(None, description="the same for the document marker")
    skip_punctuation: bool | tuple[str, ...] = Field(
        True,
        description="drop ASCII punctuation vectors of documents; a list: of exactly these tokens instead",
    )
    do_lower_case: bool = Field(False, description="lower-case texts before tokenising")

    @model_validator(mode="after")
    def _markers_differ(self) -> ColBERTConfig:
        if self.query_marker == self.document_marker:
            raise ValueError(f"query_marker and document_marker are both {self.query_marker!r}")
        return self


class LossConfig(FrozenModel):
    """The distillation objective: a weighted sum of terms over the n documents of a query.

    The paper's recipe is the default: KL divergence between min-max normalised student and teacher
    scores at temperature 1, no in-batch negatives (JaColBERTv2.5 sections 3.1 to 3.3).
    """

    normalize: Literal["both", "teacher", "none"] = Field(
        "both", description="whose scores are min-max normalised per query before the KL term"
    )
    student_temperature: float = Field(1.0, gt=0)
    teacher_temperature: float = Field(1.0, gt=0)
    kl: float = Field(1.0, ge=0, description="weight of the KL term")
    margin_mse: float = Field(0.0, ge=0, description="weight of MarginMSE on the scores as they are")
    contrastive: float = Field(
        0.0, ge=0, description="weight of cross-entropy with the first document as the positive"
    )
    in_batch_negatives: bool = Field(
        False, description="the contrastive term also counts the other queries' documents as negatives"
    )
    contrastive_temperature: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _has_a_term(self) -> LossConfig:
        if self.kl + self.margin_mse + self.contrastive == 0:
            raise ValueError("all loss weights are 0: set at least one of kl, margin_mse, contrastive")
        if self.in_batch_negatives and self.contrastive == 0:
            raise ValueError("in_batch_negatives needs a contrastive weight above 0")
        return self


class CodecConfig(FrozenModel):
    """How an index compresses token vectors: one centroid id plus a quantised residual each."""

    centroids: int | None = Field(
        None, ge=1, description="number of centroids; default: the PLAID rule 2^floor(log2(16 sqrt(tokens)))"
    )
    residual_bits: Literal[2, 4, 8] = Field(4, description="bits per dimension of a residual")
    kmeans_iterations: int = Field(8, ge=1)
    sample_tokens: int = Field(2_000_000, ge=1, description="token vectors sampled to train the codec")
    seed: int = Field(42, ge=0)


class SearchConfig(FrozenModel):
    """The quality settings of a search; all may be given per request."""

    probes: int = Field(16, ge=1, description="centroids probed per query token")
    candidates: int = Field(2000, ge=1, description="documents scored by their centroids alone")
    rerank: int = Field(400, ge=1, description="documents scored from compressed residuals")
