"""The grid of an ablation: what it expands to, what is refused, and the figures of its table."""

from __future__ import annotations

from copy import deepcopy
from io import StringIO
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cluster.ablation import compare, expand, references, room
from cluster.artifacts import base_ref, candidates_ref, phase_ref, tuples_ref
from cluster.config import AblateConfig, Recipe, parse_recipe
from cluster.report import Report
from colbert_core.errors import ConfigError
from jobs.ablate import comparison_table
from tests import recipe_tree
from tests.recipe_tree import FILES, PHASE

TREE: dict[str, Any] = {
    **recipe_tree.TREE,
    "seed": 7,
    "train": [{"name": "pre", **PHASE}, {"name": "post", "init": "pre", **PHASE}],
    "average": {"inputs": [{"phase": "pre"}, {"phase": "post"}]},
    "evaluate": {
        "sources": ["test"],
        "systems": {
            "bm25": {"scorer": "bm25"},
            "start": {"model": "base"},
            "released": {"model": "other@production"},
            "trained": {"model": "post"},
            "averaged": {"model": "averaged"},
        },
    },
    "ablate": {
        "axes": {
            "loss": {
                "mse": {"train.0.loss": {"kl": 0, "margin_mse": 1}},
                "both": {"train.0.loss.margin_mse": 0.05},
            },
            "teacher": {"mixed": {"data.tuples.mined.score.scorers": {"teacher": 1, "bm25": 1}}},
        },
        "seeds": [3, 5],
    },
}


def recipe(**ablate: Any) -> Recipe:
    tree = deepcopy(TREE)
    tree["ablate"].update(ablate)
    return parse_recipe(tree)


def test_one_at_a_time_is_the_baseline_and_each_option_alone() -> None:
    trials = expand(recipe())
    assert [(trial.variant, trial.seed) for trial in trials] == [
        (variant, seed)
        for variant in ("baseline", "loss=mse", "loss=both", "teacher=mixed")
        for seed in (3, 5)
    ]
    by_name = {(trial.variant, trial.seed): trial for trial in trials}
    plain = by_name["baseline", 3].recipe
    assert [phase.seed for phase in plain.train] == [3, 3]
    assert plain.train[0].loss == recipe().train[0].loss
    mse, both = by_name["loss=mse", 5].recipe, by_name["loss=both", 5].recipe
    assert (mse.train[0].loss.kl, mse.train[0].loss.margin_mse, mse.train[0].seed) == (0, 1, 5)
    assert (both.train[0].loss.kl, both.train[0].loss.margin_mse) == (1, 0.05)
    assert mse.train[1].loss == plain.train[1].loss


def test_a_full_design_is_every_combination() -> None:
    variants = recipe(design="full").ablate
    assert variants is not None
    assert list(variants.variants()) == [
        "baseline",
        "teacher=mixed",
        "loss=mse",
        "loss=mse,teacher=mixed",
        "loss=both",
        "loss=both,teacher=mixed",
    ]
    assert variants.variants()["loss=both,teacher=mixed"] == {
        **TREE["ablate"]["axes"]["loss"]["both"],
        **TREE["ablate"]["axes"]["teacher"]["mixed"],
    }


def test_trials_share_what_their_settings_do_not_touch() -> None:
    trials = {(trial.variant, trial.seed): trial.recipe for trial in expand(recipe())}
    one, other = trials["baseline", 3], trials["teacher=mixed", 5]
    assert base_ref(one) == base_ref(other)
    assert candidates_ref(one, "mined") == candidates_ref(other, "mined")
    assert tuples_ref(one, "mined") != tuples_ref(other, "mined")
    assert tuples_ref(one, "mined") == tuples_ref(trials["loss=mse", 5], "mined")
    # A later phase inherits what an earlier one was changed by.
    assert len({phase_ref(trial, "post") for trial in trials.values()}) == len(trials)


def test_the_judged_model_decides_which_phases_are_trained() -> None:
    def judged(model: str | None) -> tuple[str, list[str]]:
        trial = expand(recipe(model=model))[0]
        return trial.ref.version.split("-")[0], [phase.name for phase in trial.phases]

    assert judged(None) == ("post", ["pre", "post"])
    assert judged("pre") == ("pre", ["pre"])
    assert judged("averaged") == ("averaged", ["pre", "post"])


def test_references_need_no_training() -> None:
    assert list(references(recipe())) == ["bm25", "start", "released"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train.0.los.kl": 1}, "variant 'a=b': train.0.los: Extra inputs are not permitted"),
        ({"train.9.loss.kl": 1}, "variant 'a=b': the recipe has no place 'train.9.loss.kl'"),
        ({"train.0.loss.kl": -1}, "variant 'a=b': train.0.loss.kl: Input should be greater"),
        ({"data.tuples.mined.score.scorers": {"no": 1}}, "variant 'a=b': .*no scorer 'no'"),
        ({"storage.root": "elsewhere"}, "axes.a.b: 'storage.root' is not to be varied; allowed are model"),
        ({"data.sources.test": FILES}, "axes.a.b: 'data.sources.test' is not to be varied"),
        ({"train.0.seed": 1}, "axes.a.b: 'train.0.seed': ablate.seeds says which seeds are run"),
        ({}, "axes.a.b: it overrides nothing"),
    ],
)
def test_an_impossible_variant_is_refused_with_the_recipe(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(axes={"a": {"b": overrides}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": [1, 1]}, "names one twice"),
        ({"seeds": []}, "ablate.seeds"),
        ({"axes": {}}, "ablate.axes"),
        ({"axes": {"a": {}}}, "axes.a: at least one option"),
        ({"model": "middle"}, "no model 'middle'; it has: averaged, pre, post"),
        ({"design": "half"}, "one_at_a_time"),
        ({"repeats": 3}, "unknown key 'ablate.repeats'; allowed here: .*design"),
    ],
)
def test_an_impossible_study_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(**settings)


def test_a_study_needs_something_to_train_and_to_judge_by() -> None:
    for section in ("evaluate", "train"):
        tree = {name: value for name, value in deepcopy(TREE).items() if name not in (section, "average")}
        if "evaluate" in tree:
            tree["evaluate"]["systems"] = {"bm25": {"scorer": "bm25"}}
        with pytest.raises(ConfigError, match="ablate: needs 'train'"):
            parse_recipe(tree)


@pytest.mark.parametrize(
    "overrides", [{"train.0.loss.kl": 1.0}, {"train.1.num_workers": 2}, {"train.0.zero_stage": 0}]
)
def test_a_variant_that_changes_no_model_is_refused(overrides: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"a=b · seed 3 would train the same model as baseline · seed 3"):
        expand(recipe(axes={"a": {"b": overrides}}))


def test_a_study_changes_no_name_of_the_recipe_s_own_outputs() -> None:
    without = parse_recipe({name: value for name, value in TREE.items() if name != "ablate"})
    assert phase_ref(recipe(), "post") == phase_ref(without, "post")


def test_the_table_s_figures_by_hand() -> None:
    values = {
        "baseline": {1: {"q1": 0.0, "q2": 0.5, "q3": 1.0}, 2: {"q1": 0.5, "q2": 0.5, "q3": 0.5}},
        "better": {1: {"q1": 0.5, "q2": 1.0, "q3": 1.0}, 2: {"q1": 0.5, "q2": 0.75, "q3": 1.0}},
    }
    found = compare(values, seed=11)
    assert found["baseline"].difference is None
    assert found["baseline"].mean == pytest.approx(0.5)
    assert found["better"].by_seed == pytest.approx({1: 2.5 / 3, 2: 2.25 / 3})
    assert found["better"].mean == pytest.approx(4.75 / 6)
    assert found["better"].difference is not None
    difference, low, high = found["better"].difference
    # Means over the seeds: .25 .5 .75 against .5 .875 1; differences .25 .375 .25.
    assert difference == pytest.approx(0.875 / 3)
    # Of 27 equally likely resamples of three, one is all .375 and eight are all .25: 30 % of the
    # means are exactly .25 and 4 % exactly .375, more than the 2.5 % beyond each bound.
    assert (low, high) == pytest.approx((0.25, 0.375))


def test_the_interval_is_of_pairs() -> None:
    random = np.random.default_rng(0)
    hard = {f"q{i}": float(value) for i, value in enumerate(random.random(200))}
    shifted = {query: value + 0.01 for query, value in hard.items()}
    found = compare({"baseline": {1: hard}, "v": {1: shifted}}, seed=0)["v"].difference
    assert found is not None
    # Questions differ by .3 from each other, and the two variants by .01 on each.
    assert found == pytest.approx((0.01, 0.01, 0.01), abs=1e-9)


def test_without_a_baseline_there_is_no_difference() -> None:
    assert compare({"v": {1: {"q": 1.0}}}, seed=0)["v"].difference is None


def test_later_axes_hold_where_two_set_the_same_key() -> None:
    axes = {"a": {"x": {"train.0.steps": 1}}, "b": {"y": {"train.0.steps": 2}}}
    config = AblateConfig.model_validate({"axes": axes, "design": "full"})
    assert config.variants()["a=x,b=y"] == {"train.0.steps": 2}


def test_as_many_trials_run_at_once_as_the_cluster_has_room_for() -> None:
    def at_once(resources: dict[str, float], **phase: Any) -> int:
        tree = deepcopy(TREE)
        tree["train"][0].update(phase)
        return room(expand(parse_recipe(tree)), resources)

    # Two CPUs a trial: its worker's, and one to list what it reads.
    assert [at_once({"CPU": cpus}) for cpus in (1.0, 3.0, 4.0, 7.0)] == [1, 1, 2, 3]
    # No more than there are trials.
    assert at_once({"CPU": 100.0}) == 8
    # The largest phase counts, and of a range of workers its upper end.
    assert at_once({"CPU": 20.0}, num_workers=2, cpus_per_worker=4.0) == 2
    assert at_once({"CPU": 20.0}, num_workers=[1, 3], cpus_per_worker=3.0) == 2
    # What is short decides.
    assert at_once({"CPU": 100.0, "GPU": 4.0}, num_workers=2, gpus_per_worker=1.0) == 2
    assert at_once({"CPU": 4.0, "GPU": 8.0}, gpus_per_worker=1.0) == 2
    assert at_once({"CPU": 100.0}, gpus_per_worker=1.0) == 1


def test_the_printed_table() -> None:
    report = Report(job="ablate", recipe="r")
    report.details.update(
        seeds=[3, 5],
        queries={"dev": 1200},
        references={"dev": {"bm25": {"nDCG@10": 0.5}}},
        scores={
            "dev": {
                "baseline": {"nDCG@10": {"mean": 0.6, "by_seed": {"3": 0.59, "5": 0.61}}},
                "loss=mse": {"nDCG@10": {"mean": 0.55, "by_seed": {"3": 0.54, "5": 0.56}}},
            }
        },
        intervals={"dev": {"loss=mse": {"nDCG@10": [-0.05, -0.0712, -0.0301]}}},
        failed={"loss=both · seed 3": "the loss is inf"},
    )
    printed = Console(width=100, file=StringIO(), record=True)
    printed.print(comparison_table(report, "dev", ["nDCG@10"]))
    lines = [" ".join(line.replace("│", " ").split()) for line in printed.export_text().splitlines()]
    assert lines[0] == "dev · 1,200 questions · seeds 3, 5"
    rows = [line for line in lines if any(character.isalnum() for character in line)][1:9]
    assert rows == [
        "┃ variant ┃ nDCG@10 ┃",
        "bm25 0.5000",
        "baseline 0.6000",
        "0.5900 0.6100",
        "loss=mse 0.5500",
        "0.5400 0.5600",
        "-0.0500 (-0.0712, -0.0301)",
        "loss=both · seed 3 failed",
    ]
