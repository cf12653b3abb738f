"""Weights and tokenizers of model directories: reading with typed errors, writing fp32 safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from colbert_core.config import ColBERTConfig
from colbert_core.errors import ModelError
from colbert_core.tensor_files import TensorFileWriter, TensorSpec

WEIGHTS_FILE = "model.safetensors"
LINEAR_KEY = "linear.weight"

_INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt")
_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_SHOWN_KEYS = 5
# Buffers that old releases stored, and heads that take no part in token vectors.
_DROPPED_ENDINGS = ("position_ids", "token_type_ids")
_DROPPED_BEGINNINGS = ("cls.", "lm_head.", "score_scaler.", "head.", "decoder.", "classifier.")
# Keys of tokenizer_config.json that say where the tokenizer was loaded from, not what it does.
_TOKENIZER_ORIGIN_KEYS = ("is_local", "local_files_only", "name_or_path", "backend")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ModelError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """As :func:`read_json`, for a file that holds one JSON object."""
    tree = read_json(path)
    if not isinstance(tree, dict):
        raise ModelError(f"{path}: a JSON object is expected, not {type(tree).__name__}")
    return tree


def write_json(path: Path, tree: Any) -> None:
    """Writes JSON in one fixed form, so that equal content is equal bytes."""
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def parsed_config(values: Mapping[str, Any], origin: Path) -> ColBERTConfig:
    """A config from a file's values.

    Raises:
        ModelError: a value is refused; the message names the file and the key.
    """
    try:
        return ColBERTConfig.model_validate(dict(values))
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']} (given: {e['input']!r})"
            for e in error.errors()
        ]
        raise ModelError(f"{origin}: {'; '.join(lines)}") from None


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of ``model.safetensors``, or of the shards that its index names.

    Raises:
        ModelError: there are no safetensors weights (pickled ones are never loaded) or a file is damaged.
    """
    if (directory / WEIGHTS_FILE).is_file():
        names = [WEIGHTS_FILE]
    elif (directory / _INDEX_FILE).is_file():
        names = sorted(set(read_object(directory / _INDEX_FILE).get("weight_map", {}).values()))
    else:
        pickles = [name for name in _PICKLES if (directory / name).is_file()]
        if pickles:
            raise ModelError(
                f"{directory}: holds only {pickles[0]}; pickled weights are never loaded, since loading them "
                "can run any code. Convert them where you trust them: transformers' "
                f"save_pretrained writes {WEIGHTS_FILE}"
            )
        raise ModelError(f"{directory / WEIGHTS_FILE}: missing")
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            with safe_open(directory / name, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{directory / name}: not readable as safetensors: {error}") from None
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors sorted by name: floating point as fp32, the rest as it is."""

    def stored(tensor: Tensor) -> torch.dtype:
        return torch.float32 if tensor.is_floating_point() else tensor.dtype

    ordered = {name: tensors[name] for name in sorted(tensors)}
    specs = {name: TensorSpec(_DTYPE_NAMES[stored(t)], tuple(t.shape)) for name, t in ordered.items()}
    with TensorFileWriter(path, specs) as writer:
        for name, tensor in ordered.items():
            writer.write(name, [tensor.detach().to(device="cpu", dtype=stored(tensor)).contiguous().numpy()])


def load_backbone(directory: Path, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """Builds the encoder of ``directory/config.json`` around weights.

    Keys may carry the architecture's base prefix ("bert." and so on) or not, and layer norms the names of
    the first BERTs (gamma, beta). A pooler that the weights
    lack is left out of the model. fp32 weights are used where they are: tensors mapped from a file stay
    so until they are written to, and the replicas on a machine share its pages.

    Returns:
        The encoder in fp32 and eval mode, its values bit for bit those of the file if that is fp32.

    Raises:
        ModelError: the config is missing or unknown, or a key is missing, unknown or of another shape.
    """
    config_file = directory / "config.json"
    read_object(config_file)
    try:
        config = AutoConfig.from_pretrained(directory)
        with no_init_weights():
            backbone = AutoModel.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{config_file}: not an encoder that transformers knows: {error}") from None
    expected = backbone.state_dict()
    prefix = f"{backbone.base_model_prefix}."
    stripped = any(key.startswith(prefix) and key.removeprefix(prefix) in expected for key in tensors)
    given = {
        _present_name(key.removeprefix(prefix) if stripped else key): tensor
        for key, tensor in tensors.items()
        if key != LINEAR_KEY
    }
    missing = sorted(set(expected) - set(given))
    if missing and all(key.startswith("pooler.") for key in missing):
        backbone.pooler = None
        expected, missing = backbone.state_dict(), []
    unknown = sorted(
        key
        for key in set(given) - set(expected)
        if not key.endswith(_DROPPED_ENDINGS) and not key.startswith(_DROPPED_BEGINNINGS)
    )
    problems = [f"missing {', '.join(missing[:_SHOWN_KEYS])}"] if missing else []
    problems += [f"unknown {', '.join(unknown[:_SHOWN_KEYS])}"] if unknown else []
    problems += [
        f"{key} is {list(given[key].shape)}, the config says {list(tensor.shape)}"
        for key, tensor in expected.items()
        if key in given and given[key].shape != tensor.shape
    ]
    if problems:
        raise ModelError(f"{directory}: the weights do not fit config.json: {'; '.join(problems)}")
    weights = {key: _as_stored(given[key], like=tensor) for key, tensor in expected.items()}
    backbone.load_state_dict(weights, assign=True)
    return backbone.eval()


def _present_name(key: str) -> str:
    """The key that AutoModel gives a layer norm of the first BERTs; transformers 5.3 writes these again."""
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if key.endswith(old):
            return key.removesuffix(old) + new
    return key


def _as_stored(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.float() if like.is_floating_point() else tensor


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory.

    Raises:
        ModelError: there is none, or its files are incomplete.
    """
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ModelError(f"{directory}: no tokenizer.json and no tokenizer_config.json")
    try:
        return AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{directory}: the tokenizer cannot be loaded: {error}") from None


def write_backbone(
    backbone: PreTrainedModel, directory: Path, architecture: str, extra: Mapping[str, Tensor], prefix: str
) -> None:
    """Writes config.json and model.safetensors.

    Args:
        backbone: the encoder.
        directory: where to.
        architecture: entry of ``architectures`` in config.json.
        extra: tensors beside the backbone's.
        prefix: put in front of the backbone's keys.
    """
    backbone.config.save_pretrained(directory)
    config = read_object(directory / "config.json")
    config |= {"architectures": [architecture], "dtype": "float32"}
    config.pop("_name_or_path", None)
    write_json(directory / "config.json", config)
    state = {f"{prefix}{key}": tensor for key, tensor in backbone.state_dict().items()}
    write_tensors(directory / WEIGHTS_FILE, state | dict(extra))


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Writes the tokenizer's files in a form that transformers 4 and 5 read, without its origin."""
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = read_object(path)
    for key in _TOKENIZER_ORIGIN_KEYS:
        config.pop(key, None)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows too
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(path, config)


def projection_from(weight: Tensor) -> nn.Linear:
    """A bias-free linear layer with this weight ``[dim, hidden]``."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        linear.weight.copy_(weight)
    return linear
