"""The losses of PyLate and of sentence-transformers, answering over lines; runs in their environments.

``RAYCOLBERT_PEER`` says which library. Nothing of this project but the line protocol is imported here.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from benchmarks.support.line_protocol import serve
from benchmarks.support.train_peers import column

Row = dict[str, Any]


class PyLateLosses:
    """``kl``, ``contrastive`` and ``cached_contrastive`` of PyLate."""

    def load(self, model: str, lengths: dict[str, int]) -> None:
        from pylate import models

        self._model = models.ColBERT(
            model_name_or_path=model,
            device="cpu",
            query_length=lengths["query"],
            document_length=lengths["document"],
        ).eval()

    def loss(self, kind: str, options: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
        from pylate import losses, utils

        collate = utils.ColBERTCollator(tokenize_fn=self._model.tokenize)
        if kind == "kl":
            batch = collate(rows)
            features = [column(batch, name) for name in ("query", "documents")]
            value = losses.Distillation(self._model, **options)(features, batch["label"])
            return _outcome(self._model, value)
        names, spread = _columns(rows)
        batch = collate(spread)
        features = [column(batch, name) for name in names]
        loss = {"contrastive": losses.Contrastive, "cached_contrastive": losses.CachedContrastive}[kind]
        return _outcome(self._model, loss(self._model, **options)(features))


class SentenceTransformersLosses:
    """``kl``, ``margin_mse`` and ``contrastive`` of sentence-transformers' multi-vector encoder."""

    def load(self, model: str, lengths: dict[str, int]) -> None:
        from sentence_transformers import MultiVectorEncoder

        del lengths  # stored with the model
        self._model = MultiVectorEncoder(model, device="cpu").eval()

    def loss(self, kind: str, options: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
        from sentence_transformers.multi_vector_encoder import losses
        from sentence_transformers.multi_vector_encoder.data_collator import MultiVectorEncoderDataCollator

        names, spread = _columns(rows)
        # Its trainer puts no marker in front of a text unless it is told to, column by column.
        prompts = self._model.prompts
        collate = MultiVectorEncoderDataCollator(
            preprocess_fn=self._model.preprocess,
            prompts={name: prompts["query" if name == "query" else "document"] for name in names},
        )
        batch = collate([{**row, "label": given["scores"]} for row, given in zip(spread, rows, strict=True)])
        features = [column(batch, name) for name in names]
        loss = {
            "kl": losses.MultiVectorDistillKLDivLoss,
            "margin_mse": losses.MultiVectorMarginMSELoss,
            "contrastive": losses.MultiVectorMultipleNegativesRankingLoss,
        }[kind]
        return _outcome(self._model, loss(self._model, **options)(features, batch["label"]))


def _columns(rows: list[Row]) -> tuple[list[str], list[Row]]:
    """Rows with a column for each document, and the columns in their order."""
    names = ["query", *(f"document_{i}" for i in range(len(rows[0]["documents"])))]
    spread = [dict(zip(names, [row["query"], *row["documents"]], strict=True)) for row in rows]
    return names, spread


def _outcome(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, Any]:
    """The loss, and its gradient with respect to the projection."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    (weight,) = (p for name, p in model.named_parameters() if name.endswith("linear.weight"))
    assert weight.grad is not None
    return {"loss": float(loss), "gradient": weight.grad.tolist()}


if __name__ == "__main__":
    peers: dict[str, Any] = {"pylate": PyLateLosses, "sentence-transformers": SentenceTransformersLosses}
    peer = peers[os.environ["RAYCOLBERT_PEER"]]()
    serve({"load": peer.load, "loss": peer.loss})
