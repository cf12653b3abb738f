"""Scorers with models against their definitions: pooled states, MaxSim, pair logits; their cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
)

from cluster.config import BiEncoderScorer, CrossEncoderScorer, TokenMaxSimScorer
from cluster.registry import Registry
from cluster.scorers import (
    Candidates,
    build_scorer,
    cross_encoder,
    encoders,
    vectors,
)
from cluster.scorers.encoders import PooledEncoder
from cluster.scorers.vectors import Encoded, KeptVectors, VectorCache, VectorScorer
from cluster.sources import LabelledSource
from colbert_core import precision
from colbert_core.encoder import ColBERT
from colbert_core.errors import ConfigError, ModelError
from colbert_core.formats import save_model
from colbert_core.vectors import RaggedVectors
from tests.tiny_data import data_recipe
from tests.tiny_models import tiny_bert_dir, tiny_xlmr_dir
from tests.tiny_scorers import CORPUS, QUERIES, SOURCE, build


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 depends on the processor; the definitions are checked in fp32."""
    for module in (precision, encoders, cross_encoder):
        monkeypatch.setattr(module, "bf16_is_fast", lambda _: False)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert_dir(tmp_path_factory.mktemp("models") / "bert")


def last_states(directory: Path, text: str) -> torch.Tensor:
    """Hidden states of one text, run alone."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory).eval()
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", [tiny_bert_dir, tiny_xlmr_dir])
def test_bi_encoder_is_the_cosine_of_pooled_states(tmp_path: Path, pooling: str, kind: object) -> None:
    directory = kind(tmp_path / "model")  # type: ignore[operator]
    scorer = build(
        BiEncoderScorer(
            kind="bi_encoder",
            model=str(directory),
            pooling=pooling,  # type: ignore[arg-type]
            query_prefix="query: ",
            document_prefix="document: ",
        ),
        tmp_path,
    )
    ids = list(CORPUS)
    scores = scorer.score(["q1"], [ids])[0]

    def pooled(text: str) -> torch.Tensor:
        states = last_states(directory, text)
        return states.mean(dim=0) if pooling == "mean" else states[0]

    query = pooled("query: " + QUERIES["q1"])
    expected = [float(torch.cosine_similarity(query, pooled("document: " + CORPUS[i]), dim=0)) for i in ids]
    np.testing.assert_allclose(scores, expected, atol=5e-4)


def test_token_maxsim_takes_all_raw_token_states(bert: Path, tmp_path: Path) -> None:
    scorer = build(TokenMaxSimScorer(kind="token_maxsim", model=str(bert)), tmp_path)
    normalize = torch.nn.functional.normalize
    query = normalize(last_states(bert, QUERIES["q1"]), dim=-1)
    expected = [
        float((query @ normalize(last_states(bert, text), dim=-1).T).max(dim=1).values.sum())
        for text in CORPUS.values()
    ]
    np.testing.assert_allclose(scorer.score(["q1"], [list(CORPUS)])[0], expected, rtol=5e-4)


def test_colbert_scorer_agrees_with_the_model(bert: Path, tmp_path: Path) -> None:
    recipe = data_recipe(tmp_path)
    model = ColBERT.create(bert, recipe.model.colbert)
    save_model(model, tmp_path / "colbert")
    recipe = data_recipe(tmp_path, scorers={"it": {"kind": "colbert", "model": str(tmp_path / "colbert")}})
    scorer = build_scorer(recipe, "it", SOURCE, Registry.open(recipe.storage))
    query = model.encode_queries([QUERIES["q1"]])[0]
    documents = model.encode_documents(list(CORPUS.values()))
    expected = [float((query @ vectors.T).max(dim=1).values.sum()) for vectors in documents]
    np.testing.assert_allclose(scorer.score(["q1"], [list(CORPUS)])[0], expected, rtol=5e-4)
    best = list(CORPUS)[int(np.argmax(expected))]
    assert scorer.search(["q1"], 1)[0][0][0] == best


def test_search_and_score_agree_for_encoders(bert: Path, tmp_path: Path) -> None:
    scorer = build(TokenMaxSimScorer(kind="token_maxsim", model=str(bert)), tmp_path)
    for query, hits in zip(QUERIES, scorer.search(list(QUERIES), 5), strict=True):
        assert len(hits) == 5
        scores = scorer.score([query], [[document for document, _ in hits]])[0]
        np.testing.assert_allclose(scores, [score for _, score in hits], rtol=1e-5)
        assert hits == sorted(hits, key=lambda hit: (-hit[1], hit[0]))


def test_long_texts_are_cut_and_counted(bert: Path, tmp_path: Path) -> None:
    config = BiEncoderScorer(kind="bi_encoder", model=str(bert), max_length=6)
    encoder = PooledEncoder.load(config)
    encoded = encoder.documents(["cat dog river", "cat dog river mountain city train"])
    assert encoded.cut == [False, True]
    # [CLS] and [SEP] stay: four words are left.
    expected = encoder.queries(["cat dog river mountain"]).vectors.vectors
    torch.testing.assert_close(encoded.vectors.vectors[1:], expected)
    with pytest.raises(ConfigError, match=r"max_length is 600, but .* has 512 positions"):
        build(BiEncoderScorer(kind="bi_encoder", model=str(bert), max_length=600), tmp_path)


class CountingEncoder:
    """Encodes a text as its length, cuts those of more than two letters, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str]) -> Encoded:
        self.asked += texts
        vectors = RaggedVectors(
            torch.tensor([[float(len(text))] for text in texts]).view(-1, 1),
            torch.ones(len(texts), dtype=torch.int64),
        )
        return Encoded(vectors, [len(text) > 2 for text in texts])

    queries = documents = __call__


def test_the_cache_encodes_a_text_once_and_stays_within_its_limit() -> None:
    encode = CountingEncoder()
    cache = VectorCache(limit=3 * 2)

    def lengths(*texts: str) -> list[float]:
        found = cache.encoded(texts, encode)
        assert found.cut == [len(text) > 2 for text in texts]
        return found.vectors.vectors.flatten().tolist()

    assert lengths("a", "bb", "a") == [1.0, 2.0, 1.0]
    assert lengths("bb", "ccc") == [2.0, 3.0]
    assert encode.asked == ["a", "bb", "ccc"]
    # A fourth text drops the least recently used, "a".
    lengths("dddd")
    assert lengths("bb", "ccc", "dddd") == [2.0, 3.0, 4.0]
    assert encode.asked == ["a", "bb", "ccc", "dddd"]
    lengths("a")
    assert encode.asked[-1] == "a"
    assert lengths() == []


def test_scorers_of_one_encoder_share_its_vectors_and_count_what_is_cut_for_themselves() -> None:
    source = LabelledSource("words", {"1": "aa", "2": "bbbb"}, {"q": "ccc"}, {})
    encoder, loaded = CountingEncoder(), []

    def load() -> CountingEncoder:
        loaded.append(1)
        return encoder

    kept = KeptVectors()
    one, other = (VectorScorer(name, source, load, kept) for name in "ab")
    for scorer in (one, other):
        assert scorer.statistics() == {"truncated_queries": 0, "truncated_documents": 0}
        scorer.search(["q"], 2)
        scorer.search(["q"], 2)
        assert scorer.statistics() == {"truncated_queries": 1, "truncated_documents": 1}
    assert encoder.asked == ["ccc", "aa", "bbbb"]
    # A third one, made when there are vectors, does without the encoder until it meets a new text.
    before = len(loaded)
    third = VectorScorer("c", source, load, kept)
    third.search(["q"], 2)
    assert len(loaded) == before
    third.checked(Candidates(["q"], ["dd"], [["1"]], [["aa"]]))
    assert len(loaded) == before + 1


def test_a_process_keeps_vectors_by_weights_and_settings(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bert, base)
    asked: list[str] = []
    encode = PooledEncoder._encode

    def counted(self: PooledEncoder, texts: list[str]) -> Encoded:
        asked.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(PooledEncoder, "_encode", counted)
    config = BiEncoderScorer(kind="bi_encoder", model=str(base))

    def searched(config: BiEncoderScorer) -> int:
        asked.clear()
        build(config, tmp_path).search(list(QUERIES), 3)
        return len(asked)

    everything = len(set(CORPUS.values())) + len(QUERIES)
    assert searched(config) == everything
    assert searched(config) == 0
    assert searched(config.model_copy(update={"query_prefix": "query: "})) == everything
    weights = base / "model.safetensors"
    os.utime(weights, (1.0, 1.0))
    assert searched(config) == everything
    # Too much in all: what was used longest ago is dropped.
    monkeypatch.setattr(vectors, "_limit", lambda: 1)
    build(config.model_copy(update={"document_prefix": "text: "}), tmp_path)
    assert searched(config) == everything


def pair_logits(directory: Path, query: str, document: str, **cut: object) -> NDArray[np.float32]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        return model(**tokenizer(query, document, return_tensors="pt", **cut)).logits[0].numpy()


def opinionated_cross_encoder(directory: Path, bert: Path, classes: int) -> Path:
    """A random cross-encoder whose weights are large enough to tell pairs apart."""
    config = BertConfig.from_pretrained(bert, num_labels=classes, initializer_range=0.4)
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(bert).save_pretrained(directory)
    return directory


def test_cross_encoder_scores_each_pair_and_cuts_the_document_only(tmp_path: Path, bert: Path) -> None:
    directory = opinionated_cross_encoder(tmp_path / "cross", bert, 1)
    corpus = CORPUS | {"long": "red green fast slow search index model token query document"}
    source = LabelledSource("words", corpus, QUERIES | {"wordy": "cat dog river mountain city train"}, {})
    config = CrossEncoderScorer(kind="cross_encoder", model=str(directory), max_length=10)
    scorer = build(config, tmp_path, source)
    scores = scorer.score(["q1", "q2"], [["d1", "long"], ["d5"]])
    cut = {"truncation": "only_second", "max_length": 10}
    expected = [
        pair_logits(directory, QUERIES["q1"], corpus["d1"])[0],
        pair_logits(directory, QUERIES["q1"], corpus["long"], **cut)[0],
        pair_logits(directory, QUERIES["q2"], corpus["d5"])[0],
    ]
    np.testing.assert_allclose(np.concatenate(scores), expected, atol=1e-4)
    assert len({round(float(score), 3) for score in expected}) == 3
    assert scorer.statistics() == {"truncated_queries": 0, "truncated_documents": 1}
    # A query that fills more than half of the room is cut too, and the document is not lost.
    overlong = scorer.score(["wordy"], [["long"]])[0]
    cut["truncation"] = "longest_first"
    expected_overlong = pair_logits(directory, source.queries["wordy"], corpus["long"], **cut)
    np.testing.assert_allclose(overlong, expected_overlong, atol=1e-4)
    assert scorer.statistics() == {"truncated_queries": 1, "truncated_documents": 2}
    with pytest.raises(ConfigError, match="scorer 'it' cannot search"):
        scorer.search(["q1"], 1)


@pytest.mark.parametrize("classes", [2, 3])
def test_two_classes_are_a_margin_and_three_are_refused(tmp_path: Path, bert: Path, classes: int) -> None:
    directory = opinionated_cross_encoder(tmp_path / "cross", bert, classes)
    settings = CrossEncoderScorer(kind="cross_encoder", model=str(directory), max_length=32)
    if classes == 3:
        with pytest.raises(ConfigError, match="has 3 classes; a cross-encoder has 1 or 2"):
            build(settings, tmp_path)
        return
    scores = build(settings, tmp_path).score(["q1"], [["d2", "d5"]])[0]
    logits = [pair_logits(directory, QUERIES["q1"], CORPUS[document]) for document in ("d2", "d5")]
    np.testing.assert_allclose(scores, [row[1] - row[0] for row in logits], atol=1e-4)


def test_models_that_are_not_there_are_typed_errors(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nothing")
    for config in (
        CrossEncoderScorer(kind="cross_encoder", model=nowhere),
        BiEncoderScorer(kind="bi_encoder", model=nowhere),
    ):
        with pytest.raises(ModelError, match="nothing"):
            build(config, tmp_path)


def test_a_model_without_a_trained_head_is_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there are no weights for classifier.bias, classifier.weight"):
        build(CrossEncoderScorer(kind="cross_encoder", model=str(bert)), tmp_path)


def test_bfloat16_stays_close(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TokenMaxSimScorer(kind="token_maxsim", model=str(bert))
    texts = list(CORPUS.values())
    exact = PooledEncoder.load(config).documents(texts).vectors
    monkeypatch.setattr(encoders, "bf16_is_fast", lambda _: True)
    half = PooledEncoder.load(config).documents(texts).vectors
    cosine = torch.cosine_similarity(exact.vectors, half.vectors, dim=1)
    assert 0.999 < float(cosine.min()) < 1.0


def test_vector_scorer_scores_texts_without_a_source(bert: Path) -> None:
    config = TokenMaxSimScorer(kind="token_maxsim", model=str(bert))
    scorer = VectorScorer("it", None, lambda: PooledEncoder.load(config))
    same = Candidates(["a", "b"], ["cat", "dog"], [["1", "2"], []], [["cat", "dog river"], []])
    first, second = scorer.checked(same)
    # A text against itself: every token meets itself.
    np.testing.assert_allclose(first[0], len(last_states(bert, "cat")), rtol=1e-3)
    assert len(second) == 0
    with pytest.raises(ConfigError, match="needs a labelled data source"):
        scorer.search(["a"], 1)
