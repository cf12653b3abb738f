"""Forward pass and loss of one unit: what the training engine differentiates."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cluster.config import TrainPhase
from cluster.training_units import TokenisedUnit
from colbert_core.batching import TokenBudgetBatches
from colbert_core.distillation import distillation_loss
from colbert_core.dropout import CpuDropout
from colbert_core.encoder import ColBERT
from colbert_core.maxsim import maxsim_pairs
from colbert_core.vectors import RaggedVectors


@dataclass
class UnitWork:
    """One call of the objective.

    Attributes:
        unit: the unit, or None on a rank that only keeps the others company.
        batches: the unit's queries and documents in padded batches; of None, none.
        words: int64, sorted: the token ids that the passes meet.
        passes: forward passes to make in all. What the batches leave is filled up with a single short
            text that has no part in the loss.
    """

    unit: TokenisedUnit | None
    batches: Sequence[TokenBudgetBatches]
    words: Tensor
    passes: int


@dataclass(frozen=True)
class _Words:
    """Token ids int64 ``[n]``, sorted, and their embeddings ``[n, hidden]``."""

    ids: Tensor
    embeddings: Tensor


@dataclass
class UnitOutcome:
    """What one forward pass found.

    Attributes:
        loss: mean over the unit's tuples, detached.
        parts: the terms of the loss.
        tokens: tokens run through the encoder, without padding.
        padding: padding tokens run.
        non_finite: why the loss is no number, or None.
    """

    loss: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    padding: int = 0
    non_finite: str | None = None


class UnitObjective:
    """The distillation loss of a unit, as an objective of :class:`cluster.engine.TrainingEngine`.

    Dropout draws from a stream of its own for each unit, chosen by the seed and the unit's place in the
    run: the same on any worker, and after any restart.

    Args:
        phase: loss, seed, token budget, gradient checkpointing.
    """

    def __init__(self, phase: TrainPhase) -> None:
        self._phase = phase

    def prepare(self, model: ColBERT, unit: TokenisedUnit | None) -> UnitWork:
        """Cuts a unit into padded batches.

        Not part of the call: under ZeRO-3, merely looking at a parameter inside the forward pass, as
        the model does to find its device, is a collective that every rank would have to join.
        """
        device = next(model.parameters()).device
        marker = model.text.document_marker_id
        if unit is None:
            return UnitWork(None, (), torch.tensor([marker], device=device), 0)
        # Padding is not attended to, so any id serves a tokenizer that has none of its own.
        pad = model.tokenizer.pad_token_id if isinstance(model.tokenizer.pad_token_id, int) else 0
        batches = [
            TokenBudgetBatches(batch, self._phase.token_budget, pad, device)
            for batch in (unit.queries, unit.documents)
        ]
        ids = [ids for batch in (unit.queries, unit.documents) for ids in batch.ids]
        words = torch.from_numpy(np.unique(np.concatenate([*ids, [pad, marker]]).astype(np.int64)))
        return UnitWork(unit, batches, words.to(device), sum(len(padded) for padded in batches))

    def __call__(self, module: nn.Module, work: UnitWork) -> tuple[Tensor, UnitOutcome]:
        assert isinstance(module, ColBERT)
        idle = work.passes - sum(len(padded) for padded in work.batches)
        # Looked up once, not in each pass: every lookup's gradient is as large as the whole table.
        words = _Words(work.words, module.word_embeddings(work.words))
        if work.unit is None:
            return self._keep_company(module, words, idle), UnitOutcome()
        unit, outcome = work.unit, UnitOutcome()
        torch.manual_seed(_stream(self._phase.seed, unit.slot.position))
        vectors = []
        for batch, padded in zip((unit.queries, unit.documents), work.batches, strict=True):
            vectors.append(self._encode(module, words, padded))
            tokens = sum(len(ids) for ids in batch.ids)
            outcome.tokens += tokens
            outcome.padding += round(tokens / (1.0 - padded.padding_fraction)) - tokens
        queries, documents = vectors
        with torch.autocast(queries.vectors.device.type, enabled=False):
            loss = self._loss(unit, queries, documents, outcome)
        if idle > 0:
            loss = loss + self._keep_company(module, words, idle)
        return loss, outcome

    def _loss(
        self, unit: TokenisedUnit, queries: RaggedVectors, documents: RaggedVectors, outcome: UnitOutcome
    ) -> Tensor:
        config = self._phase.loss
        count, nway = unit.document_of.shape
        pairs = np.stack([np.repeat(np.arange(count), nway), unit.document_of.reshape(-1)], axis=1)
        student = maxsim_pairs(queries, documents, torch.from_numpy(pairs)).view(count, nway)
        bad = (~torch.isfinite(student.detach())).any(dim=1).nonzero().flatten().tolist()
        if bad:
            names = ", ".join(unit.labels[row] for row in bad)
            outcome.non_finite = f"the model's scores are not finite for the tuples {names}"
            return student.nan_to_num().sum() * 0.0
        teacher = torch.from_numpy(np.array(unit.teacher)).to(student.device)
        others = _others(unit, queries, documents) if config.in_batch_negatives else None
        loss, parts = distillation_loss(student, teacher, config, in_batch=others)
        outcome.loss = float(loss.detach())
        outcome.parts = {name: float(value) for name, value in parts.items()}
        if not np.isfinite(outcome.loss):
            outcome.non_finite = f"the loss is {outcome.loss} over the tuples {', '.join(unit.labels)}"
        return loss

    def _encode(self, model: ColBERT, words: _Words, batches: TokenBudgetBatches) -> RaggedVectors:
        """As ``ColBERT.encode_tokens``, but each batch's activations may be recomputed in backward.

        With gradient checkpointing the memory of a unit is its vectors plus the activations of one
        token-budget batch, for one more forward pass: what GradCache does, with the gradient exact by
        construction.
        """
        pieces, rows = [], []
        for part in batches:
            vectors = self._pass(model, words, part.input_ids, part.attention_mask)
            pieces.append(vectors[part.score])
            rows.append(part.rows)
        order = torch.cat(rows)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        vectors = torch.cat(pieces)
        return RaggedVectors(vectors[place.to(vectors.device)], batches.lengths)

    def _pass(self, model: ColBERT, words: _Words, ids: Tensor, mask: Tensor) -> Tensor:
        places = torch.searchsorted(words.ids, ids)
        if not self._phase.gradient_checkpointing:
            return _vectors(model, words.embeddings, places, mask)
        vectors: Tensor = checkpoint(_vectors, model, words.embeddings, places, mask, use_reentrant=False)
        return vectors

    def _keep_company(self, model: ColBERT, words: _Words, passes: int) -> Tensor:
        """Forward passes whose gradient is zero, for ranks that must match the others' number."""
        device = next(model.parameters()).device
        ids = torch.full((1, 1), model.text.document_marker_id, device=device)
        total = torch.zeros((), device=device)
        for _ in range(max(1, passes)):
            vectors = self._pass(model, words, ids, torch.ones_like(ids))
            total = total + vectors.sum() * 0.0
        return total


def _vectors(model: ColBERT, embeddings: Tensor, places: Tensor, mask: Tensor) -> Tensor:
    """A forward pass, made again in the backward pass with gradient checkpointing."""
    with CpuDropout() if places.device.type == "cpu" else nullcontext():
        vectors: Tensor = model(F.embedding(places, embeddings), mask)
    return vectors


def _others(unit: TokenisedUnit, queries: RaggedVectors, documents: RaggedVectors) -> Tensor:
    """Scores ``[n, distinct documents]`` of each query, minus infinity for its own documents."""
    count, distinct = len(queries), len(documents)
    pairs = torch.cartesian_prod(torch.arange(count), torch.arange(distinct))
    scores = maxsim_pairs(queries, documents, pairs).view(count, distinct)
    own = torch.zeros(count, distinct, dtype=torch.bool)
    own[torch.arange(count)[:, None], torch.from_numpy(unit.document_of)] = True
    return scores.masked_fill(own.to(scores.device), -torch.inf)


def _stream(seed: int, position: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
