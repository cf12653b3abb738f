"""The model: creation from any encoder, ragged encoding, gradients, PCA start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, T5Config, T5Model

from colbert_core.batching import TokenBudgetBatches
from colbert_core.config import ColBERTConfig
from colbert_core.encoder import ColBERT
from colbert_core.errors import ConfigError, DataError, DimensionError, ModelError, NonFiniteError
from colbert_core.projection import pca_projection
from colbert_core.text import TokenBatch
from tests import tiny_models

FAMILIES = ("bert", "japanese", "xlmr", "modernbert")
CONFIG = ColBERTConfig(dim=16, document_length=60)
TEXTS = [
    "the cat, on the river! 東京の図書館です。",
    "",
    "!?.",
    "fast train to tokyo " * 30,
    "dog",
    "日本の音楽と歴史の研究",
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: getattr(tiny_models, f"tiny_{name}_dir")(tmp_path_factory.mktemp(name)) for name in FAMILIES
    }


@pytest.fixture(scope="module")
def models(bases: dict[str, Path]) -> dict[str, ColBERT]:
    return {name: ColBERT.create(path, CONFIG) for name, path in bases.items()}


@pytest.fixture
def bert(bases: dict[str, Path]) -> ColBERT:
    """A model that a test may change."""
    return ColBERT.create(bases["bert"], CONFIG)


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_do_not_depend_on_the_company_of_a_text(models: dict[str, ColBERT], family: str) -> None:
    model = models[family]
    together = model.encode_documents(TEXTS)
    assert together.vectors.dtype == torch.float32
    assert together.lengths[[1, 2]].tolist() == [3, 3] and together.lengths[3] == 60
    torch.testing.assert_close(together.vectors.norm(dim=1), torch.ones(len(together.vectors)))
    tight = model.encode_documents(TEXTS, token_budget=64)
    torch.testing.assert_close(tight.vectors, together.vectors, atol=1e-5, rtol=0)
    for i, text in enumerate(TEXTS):
        alone = model.encode_documents([text])
        torch.testing.assert_close(together[i], alone.vectors, atol=1e-5, rtol=0)
    queries = model.encode_queries(["cat", "東京 " * 40])
    assert queries.lengths[0] == 32
    torch.testing.assert_close(queries[0], model.encode_queries(["cat"]).vectors, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_the_projected_states_of_the_backbone(models: dict[str, ColBERT], family: str) -> None:
    model = models[family]
    batch = model.text.documents([TEXTS[0]])
    ids = torch.from_numpy(batch.ids[0].astype(np.int64))[None]
    with torch.no_grad():
        states = model.backbone(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        expected = states[torch.from_numpy(batch.score[0])] @ model.projection.weight.T
    expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.encode_documents([TEXTS[0]]).vectors, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_tokens_yield_vectors_but_are_not_attended_to(bases: dict[str, Path], family: str) -> None:
    def vectors(**options: Any) -> torch.Tensor:
        config = CONFIG.model_copy(update=options)
        return ColBERT.create(bases[family], config).encode_queries(["cat and dog"]).vectors

    plain, expanded = vectors(expand_queries=False), vectors()
    attended = vectors(attend_to_expansion=True)
    real = len(plain)
    assert real < len(expanded) == len(attended) == 32
    torch.testing.assert_close(expanded[:real], plain, atol=1e-5, rtol=0)
    assert (attended[:real] - plain).abs().max() > 1e-3
    if family != "modernbert":  # rotary: a [MASK] beyond the local window sees no position
        assert torch.pdist(expanded[real:]).min() > 0.1


def test_positions_of_xlmr_count_on_over_literal_padding_tokens(models: dict[str, ColBERT]) -> None:
    """XLM-R would give a '<pad>' in the text the padding position, and shift all that follow."""
    model = models["xlmr"]
    ids = torch.tensor([[0, 10, 1, 12, 2]])
    seen: list[torch.Tensor] = []
    table = model.backbone.embeddings.position_embeddings
    handle = table.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    try:
        model(ids, torch.ones_like(ids))
    finally:
        handle.remove()
    assert seen[0].tolist() == [[2, 3, 4, 5, 6]]
    assert model.max_positions == 512


def test_gradients_do_not_depend_on_the_batches(bert: ColBERT) -> None:
    batch = bert.text.documents(TEXTS)
    weights = torch.randn(int(sum(s.sum() for s in batch.score)), CONFIG.dim)
    gradients = []
    for budget in (40, 100_000):
        bert.zero_grad()
        vectors = bert.encode_tokens(batch, budget)
        assert vectors.vectors.requires_grad
        torch.testing.assert_close(
            vectors.vectors.detach(), bert.encode_documents(TEXTS).vectors, atol=1e-5, rtol=0
        )
        (vectors.vectors * weights).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in bert.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        assert not bert.encode_tokens(batch).vectors.requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trainable_parameter_gets_a_gradient(bases: dict[str, Path], family: str) -> None:
    model = ColBERT.create(bases[family], CONFIG).train()
    vectors = model.encode_tokens(model.text.documents(TEXTS)).vectors
    (vectors * torch.randn_like(vectors)).sum().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen <= {"pooler"}


def test_encoding_has_no_dropout_and_leaves_the_mode_alone(bert: ColBERT) -> None:
    bert.train()
    first, second = bert.encode_documents(TEXTS), bert.encode_documents(TEXTS)
    assert torch.equal(first.vectors, second.vectors)
    assert bert.training and not first.vectors.requires_grad
    assert not torch.equal(
        bert.encode_tokens(bert.text.documents(TEXTS)).vectors,
        bert.encode_tokens(bert.text.documents(TEXTS)).vectors,
    )


def test_bf16_gives_fp32_vectors_close_to_those_of_fp32(bert: ColBERT) -> None:
    full, half = bert.encode_documents(TEXTS), bert.encode_documents(TEXTS, precision="bf16")
    assert half.vectors.dtype == torch.float32
    difference = (full.vectors - half.vectors).abs().max()
    assert 0 < difference < 0.05


def test_empty_input_gives_an_empty_result(bert: ColBERT) -> None:
    assert bert.encode_documents([]).vectors.shape == (0, 16)
    assert bert.encode_tokens(TokenBatch([], [], [])).vectors.shape == (0, 16)
    assert len(bert.encode_documents([], pool_factor=2)) == 0


def test_broken_weights_and_broken_texts_are_named(bert: ColBERT) -> None:
    with pytest.raises(DataError, match="text 1 is NoneType"):
        bert.encode_documents(["a", None])  # type: ignore[list-item]
    marker = bert.tokenizer.convert_tokens_to_ids("dog")
    with torch.no_grad():
        bert.backbone.embeddings.word_embeddings.weight[marker] = torch.nan
    with pytest.raises(NonFiniteError, match="documents: text 4 has vectors that are not finite"):
        bert.encode_documents(TEXTS, token_budget=1)


def test_progress_is_quiet_where_nobody_watches(bert: ColBERT, capfd: pytest.CaptureFixture[str]) -> None:
    bert.encode_documents(TEXTS, progress=True)
    assert capfd.readouterr() == ("", "")


def test_batches_keep_to_the_budget_and_give_back_every_text() -> None:
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(110), 0.6, 300).astype(int), 5, 300)
    lengths[7] = 3000
    score = [generator.random(n) < 0.8 for n in lengths]
    batch = TokenBatch([np.full(n, i, np.int32) for i, n in enumerate(lengths)], score, score)
    batches = TokenBudgetBatches(batch, 2048, 0, torch.device("cpu"))
    rows, seen, run = [], [], 0
    for part in batches:
        assert part.input_ids.numel() <= 2048 or part.input_ids.shape[0] == 1
        assert part.input_ids[:, 0].tolist() == part.texts.tolist()
        seen += part.texts.tolist()
        rows += part.rows.tolist()
        run += part.input_ids.numel()
        for text, ids, attention in zip(part.texts, part.input_ids, part.attention_mask, strict=True):
            assert attention[: lengths[text]].bool().tolist() == score[text].tolist()
            assert not attention[lengths[text] :].any()
            assert (ids[: lengths[text]] == text).all()
    assert sorted(seen) == list(range(300)) and sorted(rows) == list(range(sum(s.sum() for s in score)))
    assert batches.padding_fraction == pytest.approx(1 - lengths.sum() / run)
    # 128 of them fit into two batches of 16,384 tokens, a third of which would be padding.
    some = TokenBatch(batch.ids[8:136], score[8:136], score[8:136])
    assert TokenBudgetBatches(some, 16_384, 0, torch.device("cpu")).padding_fraction < 0.2


def test_known_markers_are_used_and_unknown_ones_added(bases: dict[str, Path]) -> None:
    known = ColBERT.create(bases["bert"], CONFIG)
    assert len(known.tokenizer) == len(AutoTokenizer.from_pretrained(bases["bert"]))
    base = AutoModel.from_pretrained(bases["bert"])
    config = CONFIG.model_copy(
        update={"query_marker": "[Q]", "document_marker": "[D]", "query_marker_init": "検索 query"}
    )
    model = ColBERT.create(bases["bert"], config)
    old, new = base.get_input_embeddings().weight, model.backbone.get_input_embeddings().weight
    assert len(new) == len(old) + 2 == len(model.tokenizer) == model.backbone.config.vocab_size
    assert torch.equal(new[: len(old)], old)
    pieces = model.tokenizer("検索 query", add_special_tokens=False)["input_ids"]
    assert model.tokenizer.unk_token_id not in pieces
    torch.testing.assert_close(new[model.text.query_marker_id], old[pieces].mean(dim=0))
    torch.testing.assert_close(new[model.text.document_marker_id], old.mean(dim=0))
    assert model.text.query_marker_id != model.text.document_marker_id
    with pytest.raises(ConfigError, match="query_marker_init: the text ' ' has no tokens"):
        ColBERT.create(bases["bert"], config.model_copy(update={"query_marker_init": " "}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("marker", ["[Q]", "[Q] "])  # PyLate's own default ends in a space
def test_added_markers_survive_saving(
    bases: dict[str, Path], family: str, marker: str, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"query_marker": marker, "document_marker": "検索文書: "})
    model = ColBERT.create(bases[family], config)
    model.backbone.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    again = ColBERT.create(tmp_path, config, projection=model.projection.weight.detach())
    assert again.text.query_marker_id == model.text.query_marker_id
    assert torch.equal(
        again.backbone.get_input_embeddings().weight, model.backbone.get_input_embeddings().weight
    )
    assert torch.equal(again.encode_queries(TEXTS).vectors, model.encode_queries(TEXTS).vectors)
    assert torch.equal(again.encode_documents(TEXTS).vectors, model.encode_documents(TEXTS).vectors)


def test_creation_is_reproducible_and_its_projection_can_be_given(bases: dict[str, Path]) -> None:
    torch.manual_seed(1)
    first = ColBERT.create(bases["bert"], CONFIG, seed=3)
    state = torch.random.get_rng_state()
    second = ColBERT.create(bases["bert"], CONFIG, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    other = ColBERT.create(bases["bert"], CONFIG, seed=4)
    assert not torch.equal(first.projection.weight, other.projection.weight)
    given = ColBERT.create(bases["bert"], CONFIG, projection=other.projection.weight.detach())
    assert torch.equal(given.projection.weight, other.projection.weight)
    assert not given.training
    with pytest.raises(DimensionError, match=r"projection is \[4, 32\], expected \[16, 32\]"):
        ColBERT.create(bases["bert"], CONFIG, projection=torch.zeros(4, 32))


def test_bases_that_do_not_fit_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        ColBERT.create(tmp_path / "nowhere", CONFIG)
    with pytest.raises(ConfigError, match="document_length is 513, but the backbone has 512 positions"):
        ColBERT.create(bases["xlmr"], CONFIG.model_copy(update={"document_length": 513}))
    tokenizer = AutoTokenizer.from_pretrained(bases["bert"])
    T5Model(
        T5Config(vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    ).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="encoder-decoder"):
        ColBERT.create(tmp_path / "t5", CONFIG)
    model = ColBERT.create(bases["bert"], CONFIG)
    with pytest.raises(DimensionError, match=r"config\.dim is 8"):
        ColBERT(model.backbone, model.projection, tokenizer, CONFIG.model_copy(update={"dim": 8}))
    tokenizer.add_tokens(["[more]"])
    with pytest.raises(ModelError, match="the tokenizer has"):
        ColBERT(model.backbone, model.projection, tokenizer, CONFIG)
    plain = AutoTokenizer.from_pretrained(bases["bert"])
    plain.mask_token = None
    with pytest.raises(ModelError, match="no mask token"):
        ColBERT(model.backbone, model.projection, plain, CONFIG)


def test_pca_keeps_what_tells_token_states_apart_and_drops_their_mean(bert: ColBERT) -> None:
    def states() -> torch.Tensor:
        with torch.no_grad():
            parts = [bert.hidden_states(p.input_ids, p.attention_mask)[p.score] for p in bert.batches(batch)]
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    # An output norm as training leaves it: the states differ in length, which must not weigh.
    with torch.no_grad():
        bert.backbone.encoder.layer[-1].output.LayerNorm.weight.copy_(torch.linspace(0.1, 3.0, 32))
    batch = bert.text.documents(TEXTS)
    full = pca_projection(bert, TEXTS, 32)
    torch.testing.assert_close(full @ full.T, torch.eye(32), atol=1e-5, rtol=0)
    weight = pca_projection(bert, TEXTS)
    torch.testing.assert_close(weight, full[:16])
    torch.testing.assert_close(pca_projection(bert, TEXTS, token_budget=64), weight, atol=1e-4, rtol=0)
    x = states()
    mean = x.mean(dim=0)
    assert (weight @ mean).abs().max() < 1e-5 < mean.norm()
    direction = torch.nn.functional.normalize(mean, dim=0)
    x = x - torch.outer(x @ direction, direction)
    x = x - x.mean(dim=0)
    gram = x @ x.T

    def error(rows: torch.Tensor) -> float:
        return float((gram - (x @ rows.T) @ (x @ rows.T).T).norm())

    # The best rank-16 approximation of the Gram matrix leaves the tail of its spectrum.
    tail = torch.linalg.eigvalsh(gram)[:-16].norm()
    assert error(weight) == pytest.approx(float(tail), rel=1e-3)
    assert error(torch.linalg.qr(torch.randn(32, 16)).Q.T) > 2 * error(weight)


def test_pca_refuses_what_it_cannot_do(bert: ColBERT) -> None:
    with pytest.raises(DimensionError, match="the backbone has 32"):
        pca_projection(bert, TEXTS, 33)
    with pytest.raises(DataError, match="needs documents"):
        pca_projection(bert, [])
