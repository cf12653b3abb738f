"""PyLate, sentence-transformers and colbert-ai loading, making and saving models; runs in their environments.

``RAYCOLBERT_PEER`` says which library. Scores are MaxSim over the vectors that the library's own encoder
gives for each text, one text at a time: what is compared is the model, its tokeniser and its settings.
"""

from __future__ import annotations

import contextlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.line_protocol import serve


class PyLate:
    """``pylate.models.ColBERT``."""

    libraries = ("pylate", "sentence-transformers", "transformers", "torch")

    def __init__(self, model: str, **settings: Any) -> None:
        from pylate import models

        self.model = models.ColBERT(model_name_or_path=model, device="cpu", **settings)

    @classmethod
    def make(cls, backbone: str, dim: int, lengths: tuple[int, int]) -> PyLate:
        query, document = lengths
        return cls(backbone, embedding_size=dim, query_length=query, document_length=document)

    def encode(self, text: str, is_query: bool) -> torch.Tensor:
        (found,) = self.model.encode(
            [text], is_query=is_query, convert_to_numpy=False, show_progress_bar=False
        )
        return found

    def save(self, directory: str) -> None:
        self.model.save_pretrained(directory)


class SentenceTransformers:
    """``sentence_transformers.MultiVectorEncoder``."""

    libraries = ("sentence-transformers", "transformers", "torch")

    def __init__(self, model: str, **settings: Any) -> None:
        from sentence_transformers import MultiVectorEncoder

        self.model = MultiVectorEncoder(model, device="cpu", **settings)

    @classmethod
    def make(cls, backbone: str, dim: int, lengths: tuple[int, int]) -> SentenceTransformers:
        """Its projection of a plain backbone has 128 dimensions, whatever ``dim``."""
        markers = ["[unused0]", "[unused1]"]
        made = cls(backbone, prompts={"query": f"{markers[0]} ", "document": f"{markers[1]} "})
        # Or a prompt would be cut into several tokens.
        made.model.tokenizer.add_special_tokens({"additional_special_tokens": markers})
        made.model[0].model.resize_token_embeddings(len(made.model.tokenizer))
        return made

    def encode(self, text: str, is_query: bool) -> torch.Tensor:
        encode = self.model.encode_query if is_query else self.model.encode_document
        return torch.as_tensor(encode([text], show_progress_bar=False)[0])

    def save(self, directory: str) -> None:
        self.model.save_pretrained(directory)


class ColbertAi:
    """``colbert.modeling.checkpoint.Checkpoint``."""

    libraries = ("colbert-ai", "transformers", "torch")

    def __init__(self, model: str, **settings: Any) -> None:
        from colbert.infra import ColBERTConfig
        from colbert.modeling.checkpoint import Checkpoint

        # Compiled C++, for the scores of an index only.
        Checkpoint.loaded_extensions = True
        self.model = Checkpoint(model, colbert_config=ColBERTConfig(**settings))

    @classmethod
    def make(cls, backbone: str, dim: int, lengths: tuple[int, int]) -> ColbertAi:
        """Its markers are [unused0] and [unused1], or any pieces where a vocabulary lacks these.

        It adds none, and would take [UNK] for both.
        """
        from transformers import AutoTokenizer

        query, document = lengths
        tokenizer = AutoTokenizer.from_pretrained(backbone)
        markers = ["[unused0]", "[unused1]"]
        if tokenizer.unk_token_id in tokenizer.convert_tokens_to_ids(markers):
            markers = tokenizer.convert_ids_to_tokens([1000, 1001])
        ids = {"query_token_id": markers[0], "doc_token_id": markers[1]}
        return cls(backbone, checkpoint=backbone, dim=dim, query_maxlen=query, doc_maxlen=document, **ids)

    def encode(self, text: str, is_query: bool) -> torch.Tensor:
        if is_query:
            return self.model.queryFromText([text])[0]
        return self.model.docFromText([text], keep_dims=False)[0]

    def save(self, directory: str) -> None:
        self.model.save(directory)


PEERS: dict[str, Any] = {
    "pylate": PyLate,
    "sentence-transformers": SentenceTransformers,
    "colbert-ai": ColbertAi,
}


class Answers:
    """The commands; a model stays loaded until another is asked for."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind
        self._peer: Any = None

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in self._kind.libraries}

    def load(self, model: str) -> None:
        self._peer = self._kind(model)

    def make(self, backbone: str, dim: int, lengths: tuple[int, int]) -> None:
        """A model of the peer's own: a plain backbone, and a random projection."""
        torch.manual_seed(0)
        self._peer = self._kind.make(backbone, dim, lengths)

    def save(self, directory: str) -> None:
        self._peer.save(directory)

    def scores(self, pairs: str) -> list[float]:
        """MaxSim of the pairs in a JSON file, a query and a document each."""
        found = []
        with torch.inference_mode():
            for query, document in json.loads(Path(pairs).read_text(encoding="utf-8")):
                vectors = [self._peer.encode(text, text is query).float() for text in (query, document)]
                found.append(float((vectors[0] @ vectors[1].T).max(dim=1).values.sum()))
        return found


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        torch.set_num_threads(1)
        answers = Answers(PEERS[os.environ["RAYCOLBERT_PEER"]])
        names = ("versions", "load", "make", "save", "scores")
        serve({name: getattr(answers, name) for name in names})
