"""The ColBERT model: a Hugging Face backbone, a bias-free projection, and ragged batch encoding."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from colbert_core.batching import TokenBudgetBatches
from colbert_core.config import ColBERTConfig
from colbert_core.errors import ConfigError, DimensionError, ModelError, NonFiniteError
from colbert_core.pooling import pool_vectors
from colbert_core.precision import Precision
from colbert_core.text import TextProcessor, TokenBatch, find_token
from colbert_core.vectors import RaggedVectors

__all__ = ["ColBERT", "RaggedVectors", "TokenBatch"]


class ColBERT(nn.Module):
    """Texts to L2-normalised token vectors.

    Attributes:
        backbone: the encoder that :class:`transformers.AutoModel` gives for the base.
        projection: ``nn.Linear(hidden, dim, bias=False)``.
        config: lengths, markers and the rest of the text rules.
        tokenizer: the backbone's, with both markers in its vocabulary.
        text: tokenises for this model; its ``truncation`` counts what was cut.

    Raises:
        ConfigError: a length in ``config`` exceeds the positions that the backbone has.
        DimensionError: the projection does not map the backbone's width to ``config.dim``.
        ModelError: the tokenizer has more tokens than the backbone has embeddings, or lacks a marker or
            the mask token.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        projection: nn.Linear,
        tokenizer: PreTrainedTokenizerBase,
        config: ColBERTConfig,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = projection
        self.tokenizer = tokenizer
        self.config = config
        hidden = _hidden_size(backbone)
        if (projection.in_features, projection.out_features) != (hidden, config.dim):
            raise DimensionError(
                f"the projection maps {projection.in_features} to {projection.out_features} dimensions, but "
                f"the backbone has {hidden} and config.dim is {config.dim}"
            )
        rows = _word_embeddings(backbone).num_embeddings
        if len(tokenizer) > rows:
            raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, the backbone {rows} embeddings")
        self._position_offset, self.max_positions = numbered_positions(backbone)
        for name in ("query_length", "document_length"):
            if self.max_positions is not None and getattr(config, name) > self.max_positions:
                raise ConfigError(
                    f"{name} is {getattr(config, name)}, but the backbone has {self.max_positions} positions"
                )
        self.text = TextProcessor(tokenizer, config, self.max_positions)
        # A pooler does not take part in token vectors; left trainable it would be a parameter that never
        # gets a gradient, which data-parallel engines refuse or wait for.
        pooler = getattr(backbone, "pooler", None)
        if isinstance(pooler, nn.Module):
            pooler.requires_grad_(False)

    @classmethod
    def create(
        cls,
        base: str | Path,
        config: ColBERTConfig,
        *,
        projection: Literal["random"] | Tensor = "random",
        seed: int = 42,
    ) -> ColBERT:
        """Builds an untrained ColBERT from an encoder.

        Markers that the vocabulary lacks are added as special tokens; their embedding starts as the mean
        embedding of ``query_marker_init``'s (``document_marker_init``'s) tokens, or of all tokens.

        Args:
            base: directory or hub id of any encoder that :class:`transformers.AutoModel` loads.
            config: the model's configuration.
            projection: ``random`` (normal, standard deviation 0.02, as in ColBERT), or the weight
                ``[dim, hidden]``, for example from :func:`colbert_core.projection.pca_projection`.
            seed: of every weight that is not loaded.

        Returns:
            The model on the CPU in fp32, in eval mode.

        Raises:
            ModelError: the base cannot be loaded, or is no encoder.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                tokenizer = AutoTokenizer.from_pretrained(base)
                backbone = AutoModel.from_pretrained(base, dtype=torch.float32)
            except (OSError, ValueError, KeyError) as error:
                raise ModelError(f"{base}: no encoder and tokenizer to be loaded: {error}") from error
            if backbone.config.is_encoder_decoder:
                raise ModelError(f"{base}: is an encoder-decoder; a backbone is an encoder alone")
            add_markers(backbone, tokenizer, config)
            linear = nn.Linear(_hidden_size(backbone), config.dim, bias=False)
            with torch.no_grad():
                if isinstance(projection, Tensor):
                    if projection.shape != linear.weight.shape:
                        raise DimensionError(
                            f"projection is {list(projection.shape)}, expected {list(linear.weight.shape)}"
                        )
                    linear.weight.copy_(projection)
                else:
                    nn.init.normal_(linear.weight, std=0.02)
        return cls(backbone, linear, tokenizer, config).eval()

    @property
    def device(self) -> torch.device:
        return self.projection.weight.device

    def word_embeddings(self, input_ids: Tensor) -> Tensor:
        """The backbone's embeddings of token ids of any shape, without positions: ``[..., hidden]``."""
        embeddings: Tensor = _word_embeddings(self.backbone)(input_ids)
        return embeddings

    def hidden_states(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """The backbone's last hidden states ``[n, length, hidden]``; see :meth:`forward`."""
        given = {"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens}
        if self._position_offset is not None:
            # These models count positions over ids that are not padding; ours are known.
            positions = torch.arange(tokens.shape[1], device=tokens.device) + self._position_offset
            given["position_ids"] = positions.expand(tokens.shape[:2])
        return self.backbone(attention_mask=attention_mask, **given).last_hidden_state

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Token vectors of padded texts.

        Args:
            tokens: int64 ids ``[n, length]``, or their :meth:`word_embeddings` ``[n, length, hidden]``.
            attention_mask: int64 or bool ``[n, length]``: 1 where other tokens may attend. A position
                with 0 still gets a vector (that of a [MASK] token counts; that of padding means nothing).

        Returns:
            fp32 ``[n, length, dim]``, each vector of length 1.
        """
        projected = self.projection(self.hidden_states(tokens, attention_mask))
        return F.normalize(projected.float(), dim=-1)

    def batches(self, batch: TokenBatch, token_budget: int | None = None) -> TokenBudgetBatches:
        """Padded batches of similar length, on the model's device."""
        pad = self.tokenizer.pad_token_id
        # Padding is not attended to, so any id serves a tokenizer that has none of its own.
        return TokenBudgetBatches(batch, token_budget, pad if isinstance(pad, int) else 0, self.device)

    def encode_tokens(self, batch: TokenBatch, token_budget: int | None = None) -> RaggedVectors:
        """Vectors of tokenised texts, differentiable if gradients are enabled.

        Texts are sorted by length and run in padded batches of at most ``token_budget`` tokens
        (default: by device), a longer text alone; the result is in the order given.

        Returns:
            fp32 vectors on the model's device, one per position that ``batch.score`` marks.
        """
        batches = self.batches(batch, token_budget)
        pieces, rows = [], []
        for part in batches:
            pieces.append(self(part.input_ids, part.attention_mask)[part.score])
            rows.append(part.rows)
        if not pieces:
            empty = torch.zeros(0, self.config.dim, device=self.device)
            return RaggedVectors(empty, batches.lengths, batches.padding_fraction)
        place = torch.empty(sum(len(r) for r in rows), dtype=torch.int64)
        place[torch.cat(rows)] = torch.arange(len(place))
        return RaggedVectors(
            torch.cat(pieces)[place.to(self.device)], batches.lengths, batches.padding_fraction
        )

    def encode_queries(
        self,
        texts: Sequence[str] | TokenBatch,
        *,
        token_budget: int | None = None,
        progress: bool = False,
        precision: Precision = "fp32",
    ) -> RaggedVectors:
        """Query vectors for search: no gradients, no dropout, under the configured length rule.

        Args:
            texts: the queries, or what ``text.queries`` made of them.
            token_budget: most tokens of one batch, padding included; default: by device.
            progress: show a progress bar, if the output is a terminal.
            precision: ``bf16`` runs the matrix products in bfloat16.

        Returns:
            fp32 vectors on the CPU.

        Raises:
            DataError: an item is not a text.
            NonFiniteError: a vector holds a NaN or an infinity; the message names the text's position.
        """
        batch = texts if isinstance(texts, TokenBatch) else self.text.queries(texts)
        return self._encode(batch, token_budget, progress, precision, "queries")

    def encode_documents(
        self,
        texts: Sequence[str] | TokenBatch,
        *,
        token_budget: int | None = None,
        progress: bool = False,
        pool_factor: int = 1,
        precision: Precision = "fp32",
    ) -> RaggedVectors:
        """Document vectors for an index; as :meth:`encode_queries`.

        Args:
            texts: the documents, or what ``text.documents`` made of them.
            token_budget: most tokens of one batch, padding included; default: by device.
            progress: show a progress bar, if the output is a terminal.
            pool_factor: keep one vector in this many, see :func:`colbert_core.pooling.pool_vectors`.
            precision: ``bf16`` runs the matrix products in bfloat16.
        """
        batch = texts if isinstance(texts, TokenBatch) else self.text.documents(texts)
        vectors = self._encode(batch, token_budget, progress, precision, "documents")
        return pool_vectors(vectors, pool_factor) if pool_factor > 1 else vectors

    def _encode(
        self, batch: TokenBatch, token_budget: int | None, progress: bool, precision: Precision, what: str
    ) -> RaggedVectors:
        batches = self.batches(batch, token_budget)
        # Written in place batch by batch: the peak is the result plus one batch.
        result = torch.empty(int(batches.lengths.sum()), self.config.dim)
        console = Console(stderr=True)
        with self.inference(precision):
            for part in track(
                batches, f"encoding {what}", console=console, disable=not (progress and console.is_terminal)
            ):
                result[part.rows] = self(part.input_ids, part.attention_mask)[part.score].cpu()
        output = RaggedVectors(result, batches.lengths, batches.padding_fraction)
        if not torch.isfinite(result).all():
            row = int((~torch.isfinite(result).all(dim=1)).nonzero()[0])
            text = int(torch.searchsorted(output.offsets, row, right=True)) - 1
            raise NonFiniteError(f"{what}: text {text} has vectors that are not finite; check the weights")
        return output

    @contextmanager
    def inference(self, precision: Precision = "fp32") -> Iterator[None]:
        """No gradients and no dropout inside the block; ``bf16`` autocasts to bfloat16."""
        was_training = self.training
        if was_training:
            self.eval()
        try:
            with (
                torch.no_grad(),
                torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"),
            ):
                yield
        finally:
            if was_training:
                self.train()


def add_markers(backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: ColBERTConfig) -> None:
    """Adds the markers that the vocabulary lacks, in place, and starts their embeddings.

    Raises:
        ConfigError: a marker's init text has no tokens.
    """
    known = _word_embeddings(backbone).num_embeddings
    used = len(tokenizer)
    starts: dict[str, Tensor] = {}
    weight = _word_embeddings(backbone).weight.detach()
    for key in ("query_marker", "document_marker"):
        marker, text = getattr(config, key), getattr(config, f"{key}_init")
        if find_token(tokenizer, marker) is not None:
            continue
        start = weight[:used].mean(dim=0)
        if text is not None:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise ConfigError(f"{key}_init: the text {text!r} has no tokens")
            start = weight[np.asarray(ids)].mean(dim=0)
        starts[marker] = start.clone()
    if not starts:
        return
    tokenizer.add_tokens(
        [AddedToken(marker, special=True, normalized=False) for marker in starts], special_tokens=True
    )
    if len(tokenizer) > known:
        backbone.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for marker, start in starts.items():
            _word_embeddings(backbone).weight[tokenizer.convert_tokens_to_ids(marker)] = start


def _word_embeddings(backbone: PreTrainedModel) -> nn.Embedding:
    embeddings = backbone.get_input_embeddings()
    if not isinstance(embeddings, nn.Embedding):
        raise ModelError(f"{type(backbone).__name__} has no table of word embeddings")
    return embeddings


def _hidden_size(backbone: PreTrainedModel) -> int:
    return int(backbone.config.hidden_size)


def numbered_positions(backbone: PreTrainedModel) -> tuple[int | None, int | None]:
    """How a backbone numbers positions.

    RoBERTa and its kin reserve the first rows of the position table for padding and number tokens from
    ``padding_idx + 1``; BERT and rotary models number from 0.

    Returns:
        The number of the first position, if it must be passed (else None), and how many positions there
        are (None: no bound).
    """
    bound = getattr(backbone.config, "max_position_embeddings", None)
    bound = int(bound) if bound is not None and bound > 0 else None
    for name, module in backbone.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            if module.padding_idx is None:
                return None, module.num_embeddings
            first = module.padding_idx + 1
            if "position_ids" not in inspect.signature(backbone.forward).parameters:
                return None, module.num_embeddings - first
            return first, module.num_embeddings - first
    return None, bound
