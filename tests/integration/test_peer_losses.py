"""Losses and gradients against PyLate's and sentence-transformers', where the definitions agree.

Each library runs in an environment of its own, named by a variable (see CONTRIBUTING.md); without it these
tests are skipped. Model, questions, documents and teacher scores are the same on both sides, so that text
processing, MaxSim and loss are compared in one.

Where the definitions differ, and what is done about it here:

- PyLate min-max scales the student's scores only. It agrees with ``normalize: both`` on teacher scores that
  are scaled already, and with ``none`` when told not to scale.
- sentence-transformers never scales scores, and multiplies the KL term by the square of the student's
  temperature; here temperatures only divide, as in the paper. Its trainer puts the markers in front of
  texts only where ``prompts`` says so for each column.
- PyLate's GradCache back-propagates sums: its gradient is the batch size times that of its own plain loss.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.support.line_protocol import Peer
from colbert_core.config import ColBERTConfig, LossConfig
from colbert_core.distillation import distillation_loss
from colbert_core.encoder import ColBERT
from colbert_core.formats import load_model, save_model
from colbert_core.maxsim import maxsim_pairs
from tests.tiny_models import WORDS, tiny_bert_dir

QUERY_LENGTH, DOCUMENT_LENGTH, QUERIES, NWAY = 16, 40, 4, 5
VARIABLES = {
    "pylate": "RAYCOLBERT_PYLATE_PYTHON",
    "sentence-transformers": "RAYCOLBERT_SENTENCE_TRANSFORMERS_PYTHON",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    config = ColBERTConfig(dim=16, query_length=QUERY_LENGTH, document_length=DOCUMENT_LENGTH)
    save_model(ColBERT.create(tiny_bert_dir(folder / "bert"), config, seed=0), folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Tuples whose documents are all different, some with punctuation; teacher scores scaled to 0 … 1."""
    source, words = random.Random(0), WORDS.split()
    made = []
    for number in range(QUERIES):
        documents = [
            " ".join([f"{number} {way},", *source.choices(words, k=source.randint(4, 30))]) + "."
            for way in range(NWAY)
        ]
        scores = [1.0, *(source.random() for _ in range(NWAY - 2)), 0.0]
        made.append({"query": " ".join(source.choices(words, k=5)), "documents": documents, "scores": scores})
    return made


def connect(name: str, model: Path) -> Iterator[Peer]:
    python = os.environ.get(VARIABLES[name])
    if not python:
        pytest.skip(f"{VARIABLES[name]} does not name a Python with {name}")
    environment = {"RAYCOLBERT_PEER": name, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with Peer(name, python, "tests.peer_losses", environment) as peer:
        peer.call("load", model=str(model), lengths={"query": QUERY_LENGTH, "document": DOCUMENT_LENGTH})
        yield peer


@pytest.fixture(scope="module")
def pylate(model: Path) -> Iterator[Peer]:
    yield from connect("pylate", model)


@pytest.fixture(scope="module")
def sentence_transformers(model: Path) -> Iterator[Peer]:
    yield from connect("sentence-transformers", model)


def ours(model: Path, rows: list[dict[str, Any]], **loss: Any) -> tuple[float, torch.Tensor]:
    """This project's loss, and its gradient with respect to the projection."""
    config = LossConfig(**loss)
    colbert = load_model(model)
    queries = colbert.encode_tokens(colbert.text.queries([row["query"] for row in rows], training=True))
    texts = [text for row in rows for text in row["documents"]]
    documents = colbert.encode_tokens(colbert.text.documents(texts))
    every = torch.cartesian_prod(torch.arange(QUERIES), torch.arange(QUERIES * NWAY))
    scores = maxsim_pairs(queries, documents, every).view(QUERIES, QUERIES, NWAY)
    own = torch.eye(QUERIES, dtype=torch.bool)
    others = scores.masked_fill(own[:, :, None], -torch.inf).flatten(1)
    teacher = torch.tensor([row["scores"] for row in rows])
    value, _ = distillation_loss(
        scores[own], teacher, config, in_batch=others if config.in_batch_negatives else None
    )
    value.backward()
    gradient = colbert.projection.weight.grad
    assert gradient is not None
    return float(value.detach()), gradient


def check(expected: tuple[float, torch.Tensor], found: dict[str, Any], *, factor: float = 1.0) -> None:
    """The peer's loss and gradient are ours, times a factor that its definition has."""
    loss, gradient = expected
    assert abs(loss) > 1e-6
    assert found["loss"] == pytest.approx(factor * loss, rel=1e-4)
    theirs = torch.tensor(found["gradient"])
    assert float((theirs - factor * gradient).norm() / gradient.norm()) < 1e-3 * factor


@pytest.mark.parametrize(("scaled", "normalize"), [(True, "both"), (False, "none")])
def test_kl_is_pylate_s(
    pylate: Peer, model: Path, rows: list[dict[str, Any]], scaled: bool, normalize: str
) -> None:
    found = pylate.call("loss", kind="kl", options={"normalize_scores": scaled}, rows=rows)
    check(ours(model, rows, normalize=normalize), found)


def test_in_batch_contrastive_is_pylate_s(pylate: Peer, model: Path, rows: list[dict[str, Any]]) -> None:
    expected = ours(model, rows, kl=0, contrastive=1, in_batch_negatives=True)
    check(expected, pylate.call("loss", kind="contrastive", options={}, rows=rows))


def test_pylate_s_cached_gradient_is_the_batch_size_times_too_large(
    pylate: Peer, model: Path, rows: list[dict[str, Any]]
) -> None:
    found = pylate.call("loss", kind="cached_contrastive", options={"mini_batch_size": 2}, rows=rows)
    loss, gradient = ours(model, rows, kl=0, contrastive=1, in_batch_negatives=True)
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    assert float(torch.tensor(found["gradient"]).norm() / gradient.norm()) == pytest.approx(QUERIES, rel=1e-3)


@pytest.mark.parametrize(("student", "teacher"), [(1.0, 1.0), (2.0, 0.25)])
def test_kl_is_sentence_transformers_times_its_squared_temperature(
    sentence_transformers: Peer, model: Path, rows: list[dict[str, Any]], student: float, teacher: float
) -> None:
    temperatures = {"student_temperature": student, "teacher_temperature": teacher}
    found = sentence_transformers.call("loss", kind="kl", options=temperatures, rows=rows)
    check(ours(model, rows, normalize="none", **temperatures), found, factor=student**2)


def test_margin_mse_is_sentence_transformers(
    sentence_transformers: Peer, model: Path, rows: list[dict[str, Any]]
) -> None:
    found = sentence_transformers.call("loss", kind="margin_mse", options={}, rows=rows)
    check(ours(model, rows, kl=0, margin_mse=1), found)


def test_in_batch_contrastive_is_sentence_transformers(
    sentence_transformers: Peer, model: Path, rows: list[dict[str, Any]]
) -> None:
    found = sentence_transformers.call("loss", kind="contrastive", options={}, rows=rows)
    check(ours(model, rows, kl=0, contrastive=1, in_batch_negatives=True), found)
