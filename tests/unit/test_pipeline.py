"""What a pipeline refuses at once, and what its gate compares with."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Recipe, parse_recipe
from cluster.models import start_of
from colbert_core.errors import ConfigError, RaycolbertError
from jobs import pipeline
from tests.recipe_tree import TREE


def recipe(**changes: Any) -> Recipe:
    return parse_recipe(copy.deepcopy(TREE) | changes)


def test_a_mean_that_nobody_makes_is_missed_before_the_first_stage() -> None:
    with pytest.raises(ConfigError, match="average"):
        pipeline.run(recipe(average=None))


def test_keys_that_the_service_will_want_are_missed_before_the_first_stage() -> None:
    serve = {"questions": ["cat"], "api_keys_env": "RAYCOLBERT_NO_SUCH_KEYS"}
    with pytest.raises(ConfigError, match="RAYCOLBERT_NO_SUCH_KEYS"):
        pipeline.run(recipe(serve=serve))


@pytest.mark.parametrize(
    ("serve", "message"),
    [
        ({"index": "i"}, "name the index as NAME@VERSION-or-alias"),
        ({"groups": 9}, "serve.groups: 9, but index"),
    ],
)
def test_a_service_that_could_not_start_is_missed_before_the_first_stage(
    serve: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline.run(recipe(serve={"questions": ["cat"], **serve}))


def test_the_report_is_written_whatever_a_passage_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Brackets are no markup; and what hours have made is told even if the last minute fails."""
    hits = [{"id": "d1", "score": 1.0, "text": "a cat [citation needed] [/url]"}]
    shards = {"ok": 2, "total": 2}
    answers: list[Any] = [
        [{"question": "[cat]?", "hits": hits, "shards": shards}],
        RaycolbertError("no answer"),
    ]

    def ask(_: Recipe) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(pipeline, "_stages", lambda _: [])
    monkeypatch.setattr(pipeline, "_ask", ask)
    monkeypatch.setattr(pipeline, "ray_session", lambda _: nullcontext())
    monkeypatch.setattr(pipeline, "refuse_second_service", lambda: None)
    storage = {"root": str(tmp_path / "store"), "cache_dir": str(tmp_path / "cache")}
    given = recipe(storage=storage, index=None, serve={"index": "i@v", "questions": ["[cat]?"]})
    pipeline.run(given, tmp_path / "first")
    printed = capsys.readouterr()
    assert "[cat]?" in printed.err and "a cat [citation needed] [/url]" in printed.err
    assert printed.out == ""
    assert (tmp_path / "first" / "report.json").exists()
    with pytest.raises(RaycolbertError, match="no answer"):
        pipeline.run(given, tmp_path / "second")
    assert (tmp_path / "second" / "report.json").exists()


@pytest.mark.parametrize("spec", ["averaged", "pre", "post", "base"])
def test_the_gate_compares_with_what_training_began_with(spec: str) -> None:
    assert start_of(recipe(), spec) == "base"
    phases = copy.deepcopy(TREE["train"])
    phases[0]["init"] = "other@v1"
    assert start_of(recipe(train=phases), spec) == ("base" if spec == "base" else "other@v1")
