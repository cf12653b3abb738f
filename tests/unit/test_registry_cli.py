"""``raycolbert registry``: tables and JSON of every command, and errors in one line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from rich.filesize import decimal
from typer.testing import CliRunner, Result

from cluster.config import StorageConfig
from cluster.registry import Parent, Registry
from jobs.registry_cli import app
from tests.registry_contract.artifacts import FILES, contents, ref, write

Run = Callable[..., Result]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Two versions and an index made from the second, which is in production."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    registry = Registry.open(StorageConfig(root=str(tmp_path / "root")))
    source = write(tmp_path / "source")
    registry.publish(ref("v1"), source, metrics={"nDCG@10": 0.25}, recipe={"seed": 1})
    parents = [Parent(ref("v1"), 0.5)]
    registry.publish(ref("v2"), source, metrics={"nDCG@10": 0.5}, recipe={"seed": 2}, parents=parents)
    index = ref("i1", kind="indexes", name="corpus")
    registry.publish(index, source, parents=[Parent(ref("v2"))])
    registry.promote(ref("v1"), "production", by="first")
    registry.promote(ref("v2"), "production", by="second")
    return registry


@pytest.fixture
def run(registry: Registry) -> Run:
    def run(*arguments: str, status: int = 0) -> Result:
        result = CliRunner().invoke(app, [*arguments, "--root", registry.store.uri])
        assert result.exit_code == status, result.output
        return result

    return run


def plain(result: Result) -> Any:
    """The JSON that a command printed."""
    return json.loads(result.stdout)


def test_list(run: Run) -> None:
    table = run("list").stdout
    for text in ("models/ja@v1", "models/ja@v2", "indexes/corpus@i1", "production"):
        assert text in table
    found = plain(run("list", "--json"))
    assert [(row["ref"], row["aliases"]) for row in found] == [
        ("indexes/corpus@i1", []),
        ("models/ja@v2", ["production"]),
        ("models/ja@v1", []),
    ]
    assert found[1]["size"] == sum(map(len, FILES.values()))
    assert [row["ref"] for row in plain(run("list", "indexes", "--json"))] == ["indexes/corpus@i1"]
    assert len(plain(run("list", "models/ja", "--json"))) == 2
    assert plain(run("list", "data", "--json")) == []
    assert "models, data, indexes" in run("list", "weights", status=2).stderr


def test_a_name_is_never_cut(
    run: Run, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    version = "0f3c9a7be21d4c55-distilled-step-00002000-of-a-long-name"
    long = ref(version, name="quickstart-student-of-a-teacher")
    registry.publish(long, tmp_path / "source", parents=[Parent(ref("v1"))])
    registry.promote(long, "production")
    for command in (
        ["list"],
        ["show", str(long)],
        ["diff", "models/ja@v1", str(long)],
        ["gc", "--days", "0"],
    ):
        printed = run(*command).stdout
        assert "…" not in printed, printed
    columns = [re.split("[│┃]", line)[1].strip() for line in run("list").stdout.splitlines() if "│" in line]
    assert str(long) in "".join(columns)
    assert str(long) in run("lineage", str(long)).stdout.splitlines()[0]
    pushed = run("push", str(tmp_path / "source"), f"{long}-again").stdout
    assert pushed.splitlines() == [
        f"published {long}-again: 3 files, {decimal(sum(map(len, FILES.values())))}"
    ]


def test_brackets_are_no_markup(run: Run, tmp_path: Path) -> None:
    """A file of this name, in a table and in an error."""
    run("push", str(write(tmp_path / "odd", {"[red]w[1].bin": b"x"})), "models/odd@v1")
    assert "[red]w[1].bin" in run("show", "models/odd@v1").stdout
    assert "'[/]w'" in run("pull", "models/odd@v1", "--only", "[/]w", status=2).stderr


def test_where_nothing_is(tmp_path: Path) -> None:
    empty = ["--root", str(tmp_path / "nothing")]
    for pattern in ([], ["models/ja"]):
        result = CliRunner().invoke(app, ["list", *pattern, *empty])
        where = f" under {pattern[0]}" if pattern else ""
        assert (result.exit_code, result.stdout) == (0, f"nothing is published{where} in {empty[1]}\n")
    assert plain(CliRunner().invoke(app, ["list", "--json", *empty])) == []
    assert CliRunner().invoke(app, ["gc", *empty]).stdout == "nothing to remove; 0 versions kept\n"


def test_list_shows_the_rest_of_what_cannot_be_read(run: Run, registry: Registry) -> None:
    registry.store.put("models/ja/v1/manifest.json", b"{}")
    result = run("list", status=2)
    assert "models/ja@v2" in result.stdout
    assert "unreadable" in result.stdout
    assert "models/ja/v1/manifest.json" in result.stderr
    found = plain(run("list", "models", "--json", status=2))
    assert [(row["ref"], "problem" in row) for row in found] == [
        ("models/ja@v1", True),
        ("models/ja@v2", False),
    ]


def test_show(run: Run) -> None:
    table = run("show", "models/ja@production").stdout
    for text in ("models/ja@v2", "model.bin", "nDCG@10", "0.5000", "models/ja@v1 × 0.5", "second"):
        assert text in table
    found = plain(run("show", "models/ja@production", "--json"))
    assert (found["version"], found["recipe"]) == ("v2", {"seed": 2})
    assert [move["by"] for move in found["aliases"]["production"]["history"]] == ["first", "second"]
    assert "there are: v1, v2, production" in run("show", "models/ja@v9", status=2).stderr


def test_verify(run: Run, registry: Registry) -> None:
    assert "intact" in run("verify", "models/ja@v1", "models/ja@production").stdout
    registry.store.put("models/ja/v2/files/model.bin", b"x")
    assert plain(run("verify", "models/ja@v1", "--json")) == {"models/ja@v1": []}
    result = run("verify", "models/ja@v1", "models/ja@v2", status=2)
    assert "model.bin: 1 bytes" in result.stdout
    assert "damaged: models/ja@v2" in result.stderr


def test_promote_and_rollback(run: Run, registry: Registry) -> None:
    assert (
        "points to v2, not to v9"
        in run("promote", "models/ja@v1", "production", "--expected", "v9", status=2).stderr
    )
    moved = plain(run("promote", "models/ja@v1", "production", "--expected", "v2", "--json"))
    assert (moved["version"], len(moved["history"])) == ("v1", 3)
    assert "alias models/ja@production → v2" in run("rollback", "models/ja@production").stdout
    assert registry.resolve("models", "ja@production") == ref("v2")
    assert "does not exist" in run("rollback", "models/ja@staging", status=2).stderr


def test_diff_and_lineage(run: Run) -> None:
    table = run("diff", "models/ja@v1", "models/ja@v2").stdout
    for text in ("recipe", "seed", "nDCG@10", "0.25", "parents"):
        assert text in table
    changes = plain(run("diff", "models/ja@v1", "models/ja@v2", "--json"))
    assert {"section": "recipe", "key": "seed", "before": 1, "after": 2} in changes
    assert "same content" in run("diff", "models/ja@v1", "models/ja@v1").stdout
    tree = run("lineage", "indexes/corpus@i1").stdout.splitlines()
    assert [next(w for w in line.split() if "@" in w) for line in tree] == [
        "indexes/corpus@i1",
        "models/ja@v2",
        "models/ja@v1",
    ]
    assert "× 0.5" in tree[2]
    found = plain(run("lineage", "indexes/corpus@i1", "--json"))
    assert found["parents"][0]["parents"][0] == {
        "ref": "models/ja@v1",
        "weight": 0.5,
        "exists": True,
        "metrics": {"nDCG@10": 0.25},
        "parents": [],
    }


def test_lineage_of_a_mean_of_five(run: Run, registry: Registry, tmp_path: Path) -> None:
    """The tree of JaColBERTv2.5: three steps of pre-training, two models post-trained from the last."""
    source = write(tmp_path / "weights", {"f": b"x"})
    made_from = {
        "v1-base": {},
        "step-46000": {"v1-base": 1.0},
        "step-48000": {"v1-base": 1.0},
        "last": {"v1-base": 1.0},
        "full": {"last": 1.0},
        "no-mmarco": {"last": 1.0},
        "averaged": {"step-46000": 0.2, "step-48000": 0.2, "last": 0.2, "full": 0.3, "no-mmarco": 0.1},
    }
    for version, parents in made_from.items():
        listed = [Parent(ref(parent), weight) for parent, weight in parents.items()]
        registry.publish(ref(version), source, parents=listed, metrics={"nDCG@10": 0.5})
    registry.promote(ref("averaged"), "production")

    drawn = run("lineage", "models/ja@production").stdout.splitlines()
    assert [re.split(r" \d{4}-", line)[0] for line in drawn] == [
        "models/ja@averaged",
        "├── models/ja@step-46000 × 0.2",
        "│   └── models/ja@v1-base",
        "├── models/ja@step-48000 × 0.2",
        "│   └── models/ja@v1-base",
        "├── models/ja@last × 0.2",
        "│   └── models/ja@v1-base",
        "├── models/ja@full × 0.3",
        "│   └── models/ja@last",
        "│       └── models/ja@v1-base",
        "└── models/ja@no-mmarco × 0.1",
        "    └── models/ja@last",
        "        └── models/ja@v1-base",
    ]
    assert all(line.endswith("nDCG@10 0.5") for line in drawn)

    def edges(node: dict[str, Any]) -> dict[str, float]:
        found = {}
        for parent in node["parents"]:
            found[f"{node['ref']} < {parent['ref']}"] = parent["weight"]
            found |= edges(parent)
        return found

    found = plain(run("lineage", "models/ja@production", "--json"))
    assert (found["ref"], found["exists"], found["weight"]) == ("models/ja@averaged", True, 1.0)
    assert edges(found) == {
        f"models/ja@{version} < models/ja@{parent}": weight
        for version, parents in made_from.items()
        for parent, weight in parents.items()
    }


def test_gc_looks_first(run: Run, registry: Registry, tmp_path: Path) -> None:
    registry.publish(ref("unused"), write(tmp_path / "other", {"f": b"x" * 5000}))
    assert plain(run("gc", "--json"))["garbage"] == []
    looked = run("gc", "--days", "0").stdout
    assert "models/ja@unused" in looked
    assert "nothing was removed" in looked
    found = plain(run("gc", "--days", "0", "--delete", "--json"))
    assert {item["name"] for item in found["garbage"]} == {"models/ja@unused", "indexes/corpus@i1"}
    assert found["kept_versions"] == 2
    assert datetime.fromisoformat(found["garbage"][0]["modified"]) > datetime.now(timezone.utc) - timedelta(
        hours=1
    )
    assert registry.versions("models", "ja") == ["v1", "v2"]


def test_push_and_pull(run: Run, tmp_path: Path) -> None:
    source = str(tmp_path / "source")
    assert "published models/ja@v3: 3 files" in run("push", source, "models/ja@v3").stdout
    pushed = plain(run("push", source, "models/ja@v4", "--parent", "models/ja@production", "--json"))
    assert pushed["ref"] == "models/ja@v4"
    assert plain(run("lineage", "models/ja@v4", "--json"))["parents"][0]["ref"] == "models/ja@v2"
    assert "never rewritten" in run("push", source, "models/ja@v3", status=2).stderr
    cached = Path(run("pull", "models/ja@v3").stdout.strip())
    assert contents(cached) == FILES
    copy = tmp_path / "copy"
    assert plain(run("pull", "models/ja@production", "--to", str(copy), "--json"))["directory"] == str(copy)
    assert contents(copy) == FILES
    (copy / "model.bin").write_bytes(b"a copy may be changed")
    assert contents(cached) == FILES
    assert "exists already" in run("pull", "models/ja@v3", "--to", str(copy), status=2).stderr
    assert "holds no .safetensors" in run("push", source, "models/ja@v5").stderr
    weights = str(write(tmp_path / "weights", {"model.safetensors": b"x"}))
    assert run("push", weights, "models/ja@v6").stderr == run("push", source, "data/ja@v1").stderr == ""
    part = tmp_path / "part"
    run("pull", "models/ja@v3", "--only", "config.json", "--to", str(part))
    assert os.listdir(part) == ["config.json"]  # noqa: PTH208


def test_the_storage_may_come_from_a_recipe(registry: Registry, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: r\nstorage: {{root: {registry.store.uri}}}\nmodel: {{name: ja, base: nowhere}}\n",
        encoding="utf-8",
    )
    result = CliRunner().invoke(app, ["list", "--json", "--recipe", str(recipe)])
    assert len(plain(result)) == 3
    result = CliRunner().invoke(app, ["list"], env={"RAYCOLBERT_ROOT": registry.store.uri})
    assert "models/ja@v1" in result.stdout
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 2
    assert "say where: --root" in result.stderr
    elsewhere = {"RAYCOLBERT_ROOT": str(tmp_path / "elsewhere"), "RAYCOLBERT_ENDPOINT_URL": "http://nowhere"}
    result = CliRunner().invoke(app, ["list", "--json", "--recipe", str(recipe)], env=elsewhere)
    assert len(plain(result)) == 3
    result = CliRunner().invoke(app, ["list", "--root", "here", "--recipe", str(recipe)])
    assert (result.exit_code, "both say where" in result.stderr) == (2, True)
