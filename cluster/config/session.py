"""Where a job stores and where it runs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from colbert_core.config import FrozenModel


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


class MlflowConfig(FrozenModel):
    """An MLflow experiment. Credentials come from the environment."""

    uri: str | None = Field(None, description="tracking server; default: MLFLOW_TRACKING_URI")
    experiment: str = Field("raycolbert", min_length=1)


class WandbConfig(FrozenModel):
    """A Weights & Biases project. The key comes from the environment."""

    project: str = Field("raycolbert", min_length=1)
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"
    directory: str | None = Field(None, description="where offline runs are written; default: WANDB_DIR")


class TrackConfig(FrozenModel):
    """Services that get each training step's figures, beside the run's own log."""

    mlflow: MlflowConfig | None = Field(None, description="needs the extra raycolbert[mlflow]")
    wandb: WandbConfig | None = Field(None, description="needs the extra raycolbert[wandb]")

    @model_validator(mode="after")
    def _names_one(self) -> TrackConfig:
        if self.mlflow is None and self.wandb is None:
            raise ValueError("names no service; there are: mlflow, wandb")
        return self
