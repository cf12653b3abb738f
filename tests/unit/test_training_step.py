"""One unit's loss and gradient: however it is batched, shared, accumulated or recomputed."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.config import TrainPhase
from cluster.streams import TrainingTuple, UnitSlot
from cluster.training_model import load_weights, prepare_model
from cluster.training_step import UnitObjective
from cluster.training_units import TokenisedUnit, pack_unit, tokenise_unit, unpack_unit
from colbert_core.config import ColBERTConfig
from colbert_core.encoder import ColBERT
from colbert_core.errors import ConfigError
from tests.tiny_models import WORDS, tiny_bert_dir

NWAY = 4
CONFIG = ColBERTConfig(dim=16, query_length=8, document_length=40)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert_dir(tmp_path_factory.mktemp("bert") / "base")


def phase(**more: Any) -> TrainPhase:
    settings: dict[str, Any] = {"name": "p", "data": ["t"], "steps": 1, "nway": NWAY, "dropout": 0.0}
    return TrainPhase(**{**settings, **more})


def model_for(base: Path, settings: TrainPhase) -> ColBERT:
    return prepare_model(ColBERT.create(base, CONFIG, seed=1), settings)


def tuples(count: int, *, shared: bool) -> list[TrainingTuple]:
    """Queries over a few documents of very different lengths, if ``shared`` the same ones."""
    source = random.Random(3)
    words = WORDS.split()
    documents = [" ".join(source.choices(words, k=source.randint(1, 36))) for _ in range(NWAY * count)]
    return [
        TrainingTuple(
            label=f"q{i}",
            query=" ".join(source.choices(words, k=4)),
            documents=documents[:NWAY] if shared else documents[NWAY * i : NWAY * (i + 1)],
            scores=np.asarray([source.random() for _ in range(NWAY)], dtype=np.float32),
        )
        for i in range(count)
    ]


def slot(count: int, weight: float = 1.0, position: int = 0) -> UnitSlot:
    return UnitSlot(position=position, epoch=0, unit=0, first=0, count=count, weight=weight)


def unit_of(model: ColBERT, items: list[TrainingTuple], **place: Any) -> TokenisedUnit:
    return tokenise_unit(slot(len(items), **place), items, model.text)


def gradient(
    model: ColBERT, settings: TrainPhase, units: list[TokenisedUnit], passes: int = 0
) -> tuple[float, dict[str, torch.Tensor]]:
    """Weighted loss and gradient over units, accumulated as the engine does."""
    model.zero_grad()
    total = 0.0
    for unit in units:
        work = UnitObjective(settings).prepare(model, unit)
        work.passes += passes
        loss, outcome = UnitObjective(settings)(model, work)
        assert outcome.non_finite is None
        (loss * unit.slot.weight).backward()
        total += unit.slot.weight * outcome.loss
    return total, {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def relative(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Distance of two gradients over the length of the second, all parameters together."""
    assert left.keys() == right.keys()
    distance = sum(float((left[name] - right[name]).double().square().sum()) for name in left)
    return (distance / sum(float(value.double().square().sum()) for value in right.values())) ** 0.5


def test_every_trainable_parameter_gets_a_gradient(base: Path) -> None:
    model = model_for(base, phase())
    _, found = gradient(model, phase(), [unit_of(model, tuples(2, shared=False))])
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_shared_documents_are_encoded_once_with_the_same_gradient(base: Path) -> None:
    model = model_for(base, phase())
    items = tuples(5, shared=True)
    shared = unit_of(model, items)
    assert (shared.document_of.size, len(shared.documents)) == (20, NWAY)
    listed = [text for item in items for text in item.documents]
    apart = replace(
        shared,
        documents=model.text.documents(listed),
        document_of=np.arange(20).reshape(5, NWAY),
    )
    loss, found = gradient(model, phase(), [shared])
    expected_loss, expected = gradient(model, phase(), [apart])
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert relative(found, expected) <= 1e-6
    objective = UnitObjective(phase())
    outcome = objective(model, objective.prepare(model, shared))[1]
    apart_outcome = objective(model, objective.prepare(model, apart))[1]
    assert outcome.tokens < apart_outcome.tokens / 2.5


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"kl": 0.0, "contrastive": 1.0, "in_batch_negatives": True},
        {"margin_mse": 0.1, "contrastive": 0.3, "in_batch_negatives": True, "normalize": "teacher"},
    ],
)
@pytest.mark.parametrize("change", ["budget", "checkpointing", "company"])
def test_batching_leaves_loss_and_gradient_alone(base: Path, loss: dict[str, Any], change: str) -> None:
    plain = phase(loss=loss)
    model = model_for(base, plain)
    unit = unit_of(model, tuples(6, shared=False))
    expected_loss, expected = gradient(model, plain, [unit])
    # 24 documents of up to 40 tokens: one batch in the reference, several with this budget.
    whole, cut = (UnitObjective(phase(token_budget=b)).prepare(model, unit) for b in (100_000, 512))
    assert whole.passes < cut.passes
    other = {
        "budget": plain.model_copy(update={"token_budget": 512}),
        "checkpointing": plain.model_copy(update={"token_budget": 512, "gradient_checkpointing": True}),
        "company": plain,
    }[change]
    found_loss, found = gradient(model, other, [unit], passes=3 if change == "company" else 0)
    assert found_loss == pytest.approx(expected_loss, rel=1e-6)
    assert relative(found, expected) <= 1e-6


def test_in_batch_negatives_leave_own_documents_out(base: Path) -> None:
    """Against cross-entropy written out by hand over the documents of the other queries."""
    settings = phase(loss={"kl": 0.0, "contrastive": 1.0, "in_batch_negatives": True})
    model = model_for(base, settings)
    items = tuples(3, shared=False)
    items[1] = replace(items[1], documents=[items[0].documents[1], *items[1].documents[1:]])
    unit = unit_of(model, items)
    with torch.no_grad():
        loss, _ = UnitObjective(settings)(model, UnitObjective(settings).prepare(model, unit))
        queries = [
            model.encode_tokens(model.text.queries([item.query], training=True)).vectors for item in items
        ]
        texts = sorted({text for item in items for text in item.documents})
        vectors = {text: model.encode_tokens(model.text.documents([text])).vectors for text in texts}
        terms = []
        for query, item in zip(queries, items, strict=True):
            score = {text: (query @ vectors[text].T).amax(dim=1).sum() for text in texts}
            others = [score[text] for text in texts if text not in item.documents]
            scores = torch.stack([*(score[text] for text in item.documents), *others])
            terms.append(torch.logsumexp(scores, dim=0) - scores[0])
    assert float(loss) == pytest.approx(float(torch.stack(terms).mean()), rel=1e-5)


def test_accumulated_ragged_units_give_the_full_batch_gradient(base: Path) -> None:
    model = model_for(base, phase())
    items = tuples(7, shared=False)
    expected_loss, expected = gradient(model, phase(), [unit_of(model, items)])
    parts = [
        unit_of(model, items[:3], weight=3 / 7),
        unit_of(model, items[3:6], weight=3 / 7),
        unit_of(model, items[6:], weight=1 / 7),
    ]
    found_loss, found = gradient(model, phase(), parts)
    assert found_loss == pytest.approx(expected_loss, rel=1e-6)
    assert relative(found, expected) <= 1e-6


def test_dropout_depends_on_the_place_in_the_run_alone(base: Path) -> None:
    settings = phase(dropout=0.3)
    model = model_for(base, settings)
    items = tuples(2, shared=False)
    torch.manual_seed(1)
    first = gradient(model, settings, [unit_of(model, items, position=5)])[1]
    torch.manual_seed(2)
    again = gradient(model, settings, [unit_of(model, items, position=5)])[1]
    elsewhere = gradient(model, settings, [unit_of(model, items, position=6)])[1]
    assert relative(again, first) == 0.0
    assert relative(elsewhere, first) > 1e-3
    recomputed = settings.model_copy(update={"gradient_checkpointing": True})
    assert relative(gradient(model, recomputed, [unit_of(model, items, position=5)])[1], first) <= 1e-6


def test_a_score_that_is_no_number_names_its_tuples(base: Path) -> None:
    model = model_for(base, phase())
    items = tuples(3, shared=False)
    with torch.no_grad():
        marked = model.tokenizer.convert_tokens_to_ids("cat")
        model.backbone.get_input_embeddings().weight[marked] = float("nan")
    clean = [replace(item, query="dog", documents=["dog"] * NWAY) for item in items]
    clean[1] = replace(clean[1], query="cat")
    objective = UnitObjective(phase())
    _, outcome = objective(model, objective.prepare(model, unit_of(model, clean)))
    assert outcome.non_finite is not None
    assert outcome.non_finite.endswith("for the tuples q1")


def test_a_unit_survives_its_journey_through_arrow(base: Path) -> None:
    model = model_for(base, phase())
    unit = unit_of(model, tuples(3, shared=True), position=17)
    assert unit.truncation.truncated_documents == 0
    back = unpack_unit(pack_unit(unit))
    assert (back.slot, back.labels, back.truncation) == (unit.slot, unit.labels, unit.truncation)
    np.testing.assert_array_equal(back.document_of, unit.document_of)
    np.testing.assert_array_equal(back.teacher, unit.teacher)
    for name in ("queries", "documents"):
        for part in ("ids", "attend", "score"):
            ours, theirs = getattr(getattr(unit, name), part), getattr(getattr(back, name), part)
            assert len(ours) == len(theirs)
            for left, right in zip(ours, theirs, strict=True):
                assert left.dtype == right.dtype
                np.testing.assert_array_equal(left, right)


def test_truncation_is_counted_per_unit(base: Path) -> None:
    model = model_for(base, phase())
    long = TrainingTuple("q", "cat " * 20, ["dog " * 100, "dog", "cat", "city"], np.zeros(NWAY, np.float32))
    tokenise_unit(slot(1), [long], model.text)
    cut = tokenise_unit(slot(1), [long], model.text).truncation
    assert (cut.truncated_documents, cut.truncated_queries, cut.documents, cut.queries) == (1, 1, 4, 1)
    assert cut.dropped_tokens == 100 - (40 - 3)


def test_freeze_and_dropout_settings_reach_the_model(base: Path) -> None:
    model = model_for(base, phase(freeze=["embeddings", "layer.0."], dropout=0.25))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all("embeddings" in n or "layer.0." in n or "pooler" in n for n in frozen)
    assert any("layer.0." in name for name in frozen)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    assert model.training
    with pytest.raises(ConfigError, match=r"contains 'embedings'"):
        model_for(base, phase(freeze=["embedings"]))


def test_load_weights_changes_named_parameters_only(base: Path) -> None:
    model, other = model_for(base, phase()), ColBERT.create(base, CONFIG, seed=2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    load_weights(model, {"projection.weight": other.projection.weight.detach()})
    for name, parameter in model.named_parameters():
        expected = other.projection.weight if name == "projection.weight" else before[name]
        assert torch.equal(parameter, expected), name
