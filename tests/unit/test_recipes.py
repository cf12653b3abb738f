"""The recipes that come with the project: all load, and the paper's says what the paper says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from cluster.artifacts import (
    averaged_ref,
    base_ref,
    candidates_ref,
    index_ref,
    phase_ref,
    training_phase,
    tuples_ref,
)
from cluster.config import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture
def paper() -> Recipe:
    return load_recipe(ROOT / "recipes" / "jacolbert-v2.5.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_names_each_of_its_outputs_once(path: Path) -> None:
    recipe = load_recipe(path)
    refs = [base_ref(recipe)]
    for name, tuple_set in recipe.data.tuples.items():
        refs.append(tuples_ref(recipe, name))
        refs += [candidates_ref(recipe, name)] if tuple_set.mine else []
    refs += [phase_ref(recipe, phase.name) for phase in recipe.train]
    refs += [averaged_ref(recipe)] if recipe.average else []
    refs += [index_ref(recipe)] if recipe.index else []
    assert [ref for ref, count in Counter(refs).items() if count > 1] == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_data_that_come_with_the_project_are_where_a_recipe_looks(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    data = load_recipe(path).data
    if "://" in data.root or not Path(data.root).is_relative_to(ROOT / "samples"):
        pytest.skip("its data do not come with the project")
    files = {file for source in data.sources.values() for file in source.model_dump().values()}
    assert files and [file for file in files if not (Path(data.root) / file).is_file()] == []


def test_the_paper_s_phases_run_in_its_order(paper: Recipe) -> None:
    assert [(phase.name, phase.init) for phase in paper.train] == [
        ("pretrain", "base"),
        ("posttrain_full", "pretrain"),
        ("posttrain_no_mmarco", "pretrain"),
    ]
    assert paper.model.base == "bclavie/JaColBERT"
    full, without = (training_phase(paper, phase).data for phase in ("posttrain_full", "posttrain_no_mmarco"))
    assert training_phase(paper, "pretrain").data == ("mmarco",)
    assert set(full) - set(without) == {"mmarco-sample"}
    assert set(without) == {"miracl", "jqara", "jagovfaqs"}


@pytest.mark.parametrize("name", ["pretrain", "posttrain_full", "posttrain_no_mmarco"])
def test_settings_of_table_7_hold_in_every_phase(paper: Recipe, name: str) -> None:
    phase = training_phase(paper, name)
    assert (phase.nway, phase.queries_per_step, phase.micro_batch) == (32, 64, 16)
    assert (phase.num_workers, phase.gpus_per_worker) == (4, 1)
    assert phase.optimizer.name == "schedule_free_adamw"
    assert (phase.optimizer.lr, phase.optimizer.weight_decay, phase.gradient_clipping) == (3e-5, 0, 0)
    assert (phase.optimizer.betas, phase.optimizer.eps) == ((0.9, 0.999), 1e-8)
    loss = phase.loss
    assert (loss.normalize, loss.kl, loss.margin_mse, loss.contrastive) == ("both", 1, 0, 0)
    assert (loss.in_batch_negatives, loss.student_temperature, loss.teacher_temperature) == (False, 1, 1)
    assert phase.precision == "autocast"
    assert phase.dropout is None


def test_lengths_of_the_phases_are_one_pass_over_the_paper_s_tuples(paper: Recipe) -> None:
    passes = {phase.name: (phase.steps, phase.optimizer.warmup_steps) for phase in paper.train}
    assert passes["pretrain"] == (3_200_000 // 64, 2500)
    assert passes["posttrain_full"] == (198_000 // 64, round(0.05 * 3093))
    assert passes["posttrain_no_mmarco"] == (180_000 // 64, round(0.05 * 2812))


def test_the_paper_s_text_settings(paper: Recipe) -> None:
    colbert = paper.model.colbert
    assert (colbert.dim, colbert.document_length, colbert.query_length) == (128, 300, 32)
    rule = (colbert.query_length_rule, colbert.query_length_multiple, colbert.min_expansion)
    assert rule == ("multiple", 32, 8)
    assert (colbert.query_marker, colbert.document_marker) == ("[unused0]", "[unused1]")
    assert (colbert.expand_queries, colbert.attend_to_expansion, colbert.skip_punctuation) == (
        True,
        False,
        True,
    )


def test_the_mean_is_of_the_five_models_of_the_paper(paper: Recipe) -> None:
    assert paper.average is not None
    assert paper.average.greedy is None
    last = paper.train[0].steps
    found = [(item.phase, item.step, item.weight) for item in paper.average.inputs]
    early, late = (step for _, step, _ in found if step != "last")
    assert isinstance(early, int) and isinstance(late, int) and early < late < last
    assert early % 2000 == late % 2000 == 0, "the paper keeps every 2,000th step"
    assert sorted(map(str, found)) == sorted(
        map(
            str,
            [
                ("pretrain", early, 1.0),
                ("pretrain", late, 1.0),
                ("pretrain", "last", 1.0),
                ("posttrain_full", "last", 1.0),
                ("posttrain_no_mmarco", "last", 1.0),
            ],
        )
    )


def test_the_paper_s_data(paper: Recipe) -> None:
    sets = paper.data.tuples
    released = sets["mmarco"].read
    assert released is not None and released.format == "mmarco"
    assert sets["mmarco"].score is None, "the released scores are the teacher's"
    for name in ("miracl", "jqara", "jagovfaqs"):
        mined, scored = sets[name].mine, sets[name].score
        assert mined is not None and scored is not None
        assert mined.source == f"{name}-train"
        assert 1 + sum(pool.take for pool in mined.pools) == 32
        (teacher,) = scored.scorers
        config = paper.scorers[teacher]
        assert (config.kind, getattr(config, "model", None)) == ("cross_encoder", "BAAI/bge-reranker-v2-m3")
        assert scored.normalize
    assert paper.evaluate is not None
    assert not {f"{name}-train" for name in sets} & set(paper.evaluate.sources)
