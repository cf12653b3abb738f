"""Changes of a published index that need no model: deletions, compaction, refusals, kills at any moment."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from cluster.artifacts import ArtifactRef
from cluster.config import Recipe
from cluster.index_change import read_change
from cluster.manifest import Parent, parse_ref
from cluster.registry import Registry
from colbert_core.config import SearchConfig
from colbert_core.errors import ArtifactNotFound, ConfigError, DataError, PreconditionFailed, VersionExists
from colbert_core.index import delete_documents, open_index
from colbert_core.index.directory import current_generation, open_shards, with_counts, write_generation
from jobs import compact_index, update_index
from serving.shards import shard_paths
from tests.clustered_vectors import build, make_corpus, make_queries, train_codec
from tests.processes import begun
from tests.tiny_data import data_recipe

CORPUS = make_corpus(200)
QUERIES = make_queries(CORPUS, 20)
SETTINGS = SearchConfig(probes=4, candidates=80, rerank=30)
CODEC = train_codec(CORPUS)
BUILT = ArtifactRef("indexes", "i", "built")
MODEL = ArtifactRef("models", "m", "v1")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe whose storage holds an index of three shards, in production."""
    given = data_recipe(tmp_path, index={"name": "i", "sources": ["s"], "model": "base"}, **SOURCES)
    registry = Registry.open(given.storage)
    directory = build(tmp_path / "built", CODEC, CORPUS, 3)
    registry.publish(BUILT, directory, parents=[Parent(MODEL)], extra={"dim": 32})
    registry.promote(BUILT, "production")
    return given


SOURCES = {"data": {"sources": {"s": {"corpus": "c.jsonl", "queries": "q.jsonl", "qrels": "r.tsv"}}}}


def write_ids(recipe: Recipe, ids: list[str], name: str = "ids.txt") -> str:
    (Path(recipe.data.root) / name).write_text("".join(f"{key}\n" for key in ids), encoding="utf-8")
    return name


def write_documents(recipe: Recipe, ids: list[str], name: str = "new.jsonl") -> str:
    rows = [json.dumps({"_id": key, "text": f"text of {key}"}) + "\n" for key in ids]
    (Path(recipe.data.root) / name).write_text("".join(rows), encoding="utf-8")
    return name


def answers(recipe: Recipe, version: str) -> Any:
    searcher = open_index(Registry.open(recipe.storage).pull(parse_ref(version)), verify="full")
    hits = searcher.search(QUERIES, 15, SETTINGS)
    searcher.close()
    return hits


def test_deletions_make_a_version_of_their_own(recipe: Recipe, tmp_path: Path) -> None:
    registry = Registry.open(recipe.storage)
    before = registry.manifest(BUILT)
    gone = CORPUS.ids[:60]
    report = update_index.run(recipe, delete=write_ids(recipe, gone), promote=True)
    (version,) = report.artifacts
    manifest = registry.manifest(parse_ref(version))
    assert manifest.parents == (Parent(BUILT), Parent(MODEL))
    assert report.metrics["deleted"] == report.metrics["tombstones"] == 60
    assert report.metrics["documents"] == manifest.extra["documents"] == 140
    assert report.metrics["drift_before"] == pytest.approx(1, abs=0.05)
    assert any("compact" in warning for warning in report.warnings)
    # What was published stays, and what it consists of is in the new version, with its digests.
    assert registry.manifest(BUILT) == before
    assert registry.verify(BUILT) == registry.verify(manifest.ref) == []
    for path, entry in before.files.items():
        assert manifest.files[path].sha256 == entry.sha256
    assert registry.resolve("indexes", "i@production") == manifest.ref
    directory = build(tmp_path / "other", CODEC, CORPUS, 3)
    delete_documents(directory, gone)
    searcher = open_index(directory)
    assert answers(recipe, version) == searcher.search(QUERIES, 15, SETTINGS)
    searcher.close()


def test_the_same_change_is_made_once(recipe: Recipe) -> None:
    ids = write_ids(recipe, CORPUS.ids[:5])
    (version,) = update_index.run(recipe, delete=ids).artifacts
    assert update_index.run(recipe, delete=ids).skipped == [version]
    # The alias may be moved later, by the same command; and the command may then be repeated.
    assert update_index.run(recipe, delete=ids, promote=True).details["promoted"] == "production"
    assert update_index.run(recipe, delete=ids, promote=True).skipped == [version]
    other = update_index.run(recipe, delete=write_ids(recipe, CORPUS.ids[5:9])).artifacts
    assert other not in ([], [version])
    parents = Registry.open(recipe.storage).manifest(parse_ref(other[0])).parents
    assert parents[0] == Parent(parse_ref(version))


def test_a_moved_alias_is_not_moved_back(recipe: Recipe) -> None:
    registry = Registry.open(recipe.storage)
    promote = Registry.promote

    def overtaken(self: Registry, *arguments: Any, **options: Any) -> Any:
        Registry.promote = promote  # type: ignore[method-assign]
        other = parse_ref(update_index.run(recipe, delete=write_ids(recipe, CORPUS.ids[:1])).artifacts[0])
        registry.promote(other, "production")
        return promote(self, *arguments, **options)

    Registry.promote = overtaken  # type: ignore[method-assign]
    try:
        with pytest.raises(PreconditionFailed):
            update_index.run(recipe, delete=write_ids(recipe, CORPUS.ids[1:3], "b.txt"), promote=True)
    finally:
        Registry.promote = promote  # type: ignore[method-assign]
    assert answers(recipe, str(registry.resolve("indexes", "i@production")))


@pytest.mark.parametrize("shards", [None, 2])
def test_compaction_is_what_a_fresh_build_makes(recipe: Recipe, tmp_path: Path, shards: int | None) -> None:
    registry = Registry.open(recipe.storage)
    assert compact_index.run(recipe).skipped == [str(BUILT)]
    (changed,) = update_index.run(recipe, delete=write_ids(recipe, CORPUS.ids[:60]), promote=True).artifacts
    report = compact_index.run(recipe, shards=shards, promote=True)
    (compacted,) = report.artifacts
    manifest = registry.manifest(parse_ref(compacted))
    assert manifest.parents == (Parent(parse_ref(changed)), Parent(MODEL))
    assert report.metrics["documents_removed"] == 60
    fresh = build(tmp_path / "fresh", CODEC, CORPUS.part(range(60, 200)), shards or 3)
    there = registry.pull(manifest.ref)
    names = {path.relative_to(fresh).as_posix() for path in fresh.rglob("*") if path.is_file()}
    assert set(manifest.files) == names
    assert all((there / name).read_bytes() == (fresh / name).read_bytes() for name in names)
    assert answers(recipe, compacted) == answers(recipe, changed)
    assert compact_index.run(recipe, shards=shards).skipped == [compacted]
    assert registry.resolve("indexes", "i@production") == manifest.ref


def test_served_are_the_shards_of_the_generation_with_the_highest_number(
    recipe: Recipe, tmp_path: Path
) -> None:
    directory = build(tmp_path / "old", CODEC, CORPUS, 2)
    whole = with_counts(current_generation(directory, CODEC), open_shards(directory, CODEC))
    for number, shards in ((99_999, whole.shards[:1]), (100_000, whole.shards)):
        write_generation(directory, whole.model_copy(update={"number": number, "shards": shards}))
    # A change that is killed leaves its generation under a name that does not count.
    (directory / "generations" / ".100001.json-123").write_text("{", encoding="utf-8")
    ref = ArtifactRef("indexes", "i", "old")
    registry = Registry.open(recipe.storage)
    registry.publish(ref, directory, parents=[Parent(MODEL)])
    assert shard_paths(registry, ref) == ["shards/00000", "shards/00001"]


def unknown_id(recipe: Recipe) -> tuple[dict[str, Any], type[Exception], str]:
    ids = write_ids(recipe, [CORPUS.ids[0], "nobody"])
    return {"delete": ids}, DataError, r"ids.txt row 2: the index has no document 'nobody'"


def id_deleted_twice(recipe: Recipe) -> tuple[dict[str, Any], type[Exception], str]:
    ids = write_ids(recipe, [CORPUS.ids[0], "", CORPUS.ids[0]])
    return {"delete": ids}, DataError, r"ids.txt row 3: id '.*' occurs twice, first in row 1"


def id_added_twice(recipe: Recipe) -> tuple[dict[str, Any], type[Exception], str]:
    return (
        {"add": write_documents(recipe, ["a", "b", "a"])},
        DataError,
        r"new.jsonl row 3: id 'a' occurs twice",
    )


def id_there_already(recipe: Recipe) -> tuple[dict[str, Any], type[Exception], str]:
    added = write_documents(recipe, ["a", CORPUS.ids[3]])
    return {"add": added}, DataError, rf"new.jsonl row 2: the index has a document '{CORPUS.ids[3]}' already"


def other_columns(recipe: Recipe) -> tuple[dict[str, Any], type[Exception], str]:
    registry = Registry.open(recipe.storage)
    told = recipe.model_dump(mode="json")
    known = ArtifactRef("indexes", "i", "known")
    registry.publish(known, registry.pull(BUILT), parents=[Parent(MODEL)], recipe=told)
    asked = {"index": "i@known", "add": write_documents(recipe, ["a"])}
    return asked, DataError, r"new.jsonl: cannot be added to indexes/i@known: metadata columns are title"


def how_encoded_is_not_known(recipe: Recipe) -> tuple[dict[str, Any], type[Exception], str]:
    return {"add": write_documents(recipe, ["a"])}, ConfigError, "not made from a recipe"


def nothing_to_do(recipe: Recipe) -> tuple[dict[str, Any], type[Exception], str]:
    return {}, DataError, "nothing to change"


def empty_file(recipe: Recipe) -> tuple[dict[str, Any], type[Exception], str]:
    return {"delete": write_ids(recipe, [])}, DataError, "ids.txt: there are no ids in it"


def no_such_file(recipe: Recipe) -> tuple[dict[str, Any], type[Exception], str]:
    return {"delete": "missing.txt"}, DataError, "no file 'missing.txt'"


def no_such_index(recipe: Recipe) -> tuple[dict[str, Any], type[Exception], str]:
    return {"index": "i@x", "delete": write_ids(recipe, ["a"])}, ArtifactNotFound, "i@x"


def a_version_to_promote(recipe: Recipe) -> tuple[dict[str, Any], type[Exception], str]:
    asked = {"index": "i@built", "delete": write_ids(recipe, CORPUS.ids[:1]), "promote": True}
    return asked, ConfigError, "i@built is a version"


@pytest.mark.parametrize(
    "case",
    [
        unknown_id,
        id_deleted_twice,
        id_added_twice,
        id_there_already,
        other_columns,
        how_encoded_is_not_known,
        nothing_to_do,
        empty_file,
        no_such_file,
        no_such_index,
        a_version_to_promote,
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(
    recipe: Recipe, case: Callable[[Recipe], tuple[dict[str, Any], type[Exception], str]]
) -> None:
    asked, error, message = case(recipe)
    store = Registry.open(recipe.storage).store
    before = list(store.list())
    with pytest.raises(error, match=message):
        update_index.run(recipe, **asked)
    assert list(store.list()) == before


def test_a_digest_names_the_change(recipe: Recipe) -> None:
    first = read_change(recipe, write_documents(recipe, ["a", "b"]), None, False)
    assert read_change(recipe, write_documents(recipe, ["a", "b"], "copy.jsonl"), None, False).digest == (
        first.digest
    )
    others = [
        read_change(recipe, write_documents(recipe, ["a"]), write_ids(recipe, ["b"]), False),
        read_change(recipe, write_documents(recipe, ["a", "b"]), None, True),
        read_change(recipe, write_documents(recipe, ["a", "c"]), None, False),
        read_change(recipe, None, write_ids(recipe, ["a", "b"]), False),
    ]
    assert len({change.digest for change in (first, *others)}) == 5


def delete_and_compact(recipe: Recipe, begin: Event) -> None:
    begin.set()
    update_index.run(recipe, index="i@production", delete="ids.txt")
    changed = update_index.run(recipe, index="i@production", delete="ids.txt").skipped[0]
    compact_index.run(recipe, index=changed.removeprefix("indexes/"))


def test_a_killed_change_leaves_published_versions_whole(recipe: Recipe) -> None:
    """Killed at random moments of deleting and compacting, and repeated until it is through."""
    registry = Registry.open(recipe.storage)
    write_ids(recipe, CORPUS.ids[:60])
    moments = random.Random(os.getpid())
    killed = 0
    while True:
        process = begun(delete_and_compact, recipe)
        if killed < 3:
            time.sleep(moments.random() * 0.4)
            process.kill()
            killed += 1
        process.join()
        for version in registry.versions("indexes", "i"):
            assert registry.verify(ArtifactRef("indexes", "i", version)) == []
        if process.exitcode == 0:
            break
    built, *_ = registry.versions("indexes", "i")
    assert built == "built"
    kinds = sorted(version.partition("-")[0] for version in registry.versions("indexes", "i"))
    assert kinds == ["built", "compact", "update"]
    assert registry.resolve("indexes", "i@production") == BUILT
    with pytest.raises(VersionExists):
        registry.staging(BUILT)
