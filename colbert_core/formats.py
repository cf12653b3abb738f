"""Saves and loads ColBERT models in the layouts that others read.

One directory serves three readers:

* this package: ``raycolbert.json`` holds the whole :class:`ColBERTConfig`, with a schema version;
* PyLate and sentence-transformers: ``modules.json``, ``1_Dense``, ``config_sentence_transformers.json``;
* Stanford's ColBERT, RAGatouille and rerankers: ``artifact.metadata``, ``"architectures": ["HF_ColBERT"]``
  and one weights file with prefixed backbone keys and ``linear.weight``.

The two foreign layouts want different keys in ``model.safetensors``, and the prefixed ones serve both:
``AutoModel``, which PyLate loads with, strips a known base prefix and leaves keys it does not know, as it
does for every checkpoint with a head. Only the small projection is stored twice. PyLate's own Stanford
import (``HF_ColBERT`` and fewer than two modules) does not trigger, since modules.json lists two.

What the foreign layouts cannot say is lost to their readers, not to ours: the dynamic query-length rules
(they expand to ``query_length``), and for Stanford lower-casing and queries without expansion.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from colbert_core.config import ColBERTConfig
from colbert_core.encoder import ColBERT, numbered_positions
from colbert_core.errors import ConfigError, ModelError, SchemaVersionError
from colbert_core.formats_pylate import (
    MODULES_FILE,
    backbone_folder,
    is_multi_vector,
    read_projection,
    read_settings,
    write_pylate,
)
from colbert_core.formats_stanford import (
    ARCHITECTURE,
    METADATA_FILE,
    projection_of,
    read_metadata,
    stated_dim,
    write_stanford,
)
from colbert_core.formats_weights import (
    LINEAR_KEY,
    load_backbone,
    load_tokenizer,
    parsed_config,
    projection_from,
    read_object,
    read_tensors,
    write_backbone,
    write_json,
    write_tokenizer,
)

SCHEMA_VERSION = 1
CONFIG_FILE = "raycolbert.json"
LAYOUTS = ("pylate", "stanford")

Layout = Literal["pylate", "stanford"]
Detected = Literal["raycolbert", "pylate", "stanford", "backbone"]

_HUB_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model", METADATA_FILE)
_TELLING_FILES = ("config.json", MODULES_FILE, CONFIG_FILE, METADATA_FILE)


def save_model(
    model: ColBERT, directory: str | Path, *, layouts: Sequence[Layout] = ("pylate", "stanford")
) -> None:
    """Writes a model, fp32 and safetensors only.

    The same weights and config always give the same bytes, whatever the model was loaded from.

    Args:
        model: the model; it is not changed.
        directory: where to; must not exist or be empty. It appears complete or not at all.
        layouts: which foreign layouts the directory must also have; at least one.

    Raises:
        ConfigError: ``layouts`` is empty or names an unknown layout.
        ModelError: the directory holds files already.
    """
    directory = Path(directory)
    unknown = [name for name in layouts if name not in LAYOUTS]
    if unknown or not layouts:
        raise ConfigError(f"layouts {list(layouts)}: one or more of {', '.join(LAYOUTS)} are expected")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ModelError(f"{directory}: holds files already; a model is never overwritten")
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        write_tokenizer(model.tokenizer, staging)
        backbone = model.backbone
        if "stanford" in layouts:
            projection = {LINEAR_KEY: model.projection.weight}
            write_backbone(backbone, staging, ARCHITECTURE, projection, f"{backbone.base_model_prefix}.")
            write_stanford(model, staging)
        else:
            write_backbone(backbone, staging, type(backbone).__name__, {}, "")
        if "pylate" in layouts:
            write_pylate(model, staging)
        settings = {"schema_version": SCHEMA_VERSION, "colbert": model.config.model_dump(mode="json")}
        write_json(staging / CONFIG_FILE, settings)
        staging.chmod(0o755)
        staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_model(source: str | Path, *, overrides: ColBERTConfig | None = None) -> ColBERT:
    """Loads a model in any of the layouts.

    Settings that a foreign layout does not have take its own defaults; its query length is ``fixed``.

    Args:
        source: directory or hub id.
        overrides: use this config instead of the stored one; its ``dim`` must be the projection's.

    Returns:
        The model on the CPU in fp32 and eval mode.

    Raises:
        ModelError: a file is missing, damaged or pickled, files contradict each other, or there is only
            a backbone; the message names the file or the key.
        SchemaVersionError: the model was saved by a newer version of this package.
        DimensionError, ConfigError: ``overrides`` does not fit the weights.
    """
    directory = _located(source)
    layout = detect_layout(directory)
    if layout == "backbone":
        raise ModelError(
            f"{directory}: a backbone without a projection; start training from it with model.base or "
            "ColBERT.create"
        )
    has_modules = (directory / MODULES_FILE).is_file() and layout != "stanford"
    folder = backbone_folder(directory) if has_modules else directory
    tokenizer = load_tokenizer(folder)
    tensors = read_tensors(folder)
    if has_modules:
        projection = read_projection(directory)
        if LINEAR_KEY in tensors and not torch.equal(tensors[LINEAR_KEY].float(), projection):
            raise ModelError(f"{directory}: {LINEAR_KEY} is not the projection that {MODULES_FILE} leads to")
    else:
        projection = projection_of(tensors, directory)
    backbone = load_backbone(folder, tensors)
    config = overrides or _stored_config(layout, directory, tokenizer, projection, backbone)
    return ColBERT(backbone, projection_from(projection), tokenizer, config).eval()


def detect_layout(directory: Path) -> Detected:
    """Which layout a directory has: ours, PyLate's, Stanford's, or a backbone.

    A sentence-transformers model that pools its tokens into one vector is a backbone.

    Raises:
        ModelError: none of them; the message names the missing file.
    """
    if (directory / CONFIG_FILE).is_file():
        return "raycolbert"
    if (directory / MODULES_FILE).is_file() and is_multi_vector(directory):
        return "pylate"
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory}: no model: config.json is missing")
    architectures = read_object(directory / "config.json").get("architectures") or []
    if ARCHITECTURE in architectures or (directory / METADATA_FILE).is_file():
        return "stanford"
    return "backbone"


def has_projection(source: str | Path) -> bool:
    """Whether a directory or hub id holds a ColBERT model, and not a plain or single-vector encoder.

    Of a hub model only the small files that tell are fetched.

    Raises:
        ModelError: there is no such directory or hub model.
    """
    return detect_layout(_located(source, _TELLING_FILES)) != "backbone"


def _located(source: str | Path, patterns: Sequence[str] = _HUB_PATTERNS) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if isinstance(source, Path) or path.is_absolute() or source.startswith("."):
        raise ModelError(f"{source}: no such model directory")
    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{source}: neither a directory nor a model of the hub: {error}") from None


def read_config(path: Path) -> ColBERTConfig:
    """The settings in a ``raycolbert.json``, which every model that this package has saved holds.

    Raises:
        ModelError: it is missing or damaged.
        SchemaVersionError: it was written by a newer version of this package.
    """
    return parsed_config(_own_settings(path), path)


def _own_settings(path: Path) -> dict[str, Any]:
    tree = read_object(path)
    version = tree.get("schema_version")
    if not isinstance(version, int) or not isinstance(tree.get("colbert"), dict):
        raise ModelError(f"{path}: 'schema_version' and 'colbert' are expected")
    if version > SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{path}: written with schema version {version}, this is {SCHEMA_VERSION}: upgrade raycolbert"
        )
    return dict(tree["colbert"])


def _stored_config(
    layout: Detected,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    projection: Tensor,
    backbone: PreTrainedModel,
) -> ColBERTConfig:
    dim = projection.shape[0]
    values: dict[str, Any]
    if layout == "raycolbert":
        path = directory / CONFIG_FILE
        values = _own_settings(path)
        stated = values.get("dim")
    elif layout == "pylate":
        path = directory / MODULES_FILE
        _, positions = numbered_positions(backbone)
        values, stated = read_settings(directory, tokenizer, positions), dim
    else:
        path = directory / METADATA_FILE
        values, stated = read_metadata(directory, tokenizer), stated_dim(directory) or dim
    if stated != dim:
        raise ModelError(f"{path}: dim is {stated}, but the projection has {dim} rows")
    return parsed_config({**values, "dim": dim}, path)
