"""Additions, deletions and compaction: nothing rewritten, nothing half done, compaction equal to a build."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from colbert_core.config import SearchConfig
from colbert_core.errors import DataError, DimensionError, IndexFormatError, NonFiniteError
from colbert_core.index import (
    Codec,
    add_documents,
    commit_change,
    compact_index,
    delete_documents,
    known_documents,
    maintenance,
    measure_drift,
    open_index,
    write_shard,
)
from colbert_core.index.directory import (
    ShardEntry,
    current_generation,
    open_shards,
    with_counts,
    write_generation,
)
from tests.clustered_vectors import Corpus, build, make_corpus, make_queries, train_codec, unit
from tests.processes import begun

CORPUS = make_corpus(300)
BUILT, ADDED = CORPUS.part(range(200)), CORPUS.part(range(200, 300))
QUERIES = make_queries(CORPUS, 40)
SETTINGS = SearchConfig(probes=4, candidates=80, rerank=30)
CODEC = train_codec(BUILT)


def tree(directory: Path) -> dict[str, bytes]:
    """All files below a directory."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def add(directory: Path, part: Corpus, **options: bool) -> int:
    return add_documents(directory, part.ids, part.vectors, part.lengths, part.metadata, **options)


def ids_of(directory: Path) -> set[str]:
    searcher = open_index(directory, verify="full")
    found = {hit.id for hit in searcher.search_exact(QUERIES[:1], 10_000)[0]}
    assert len(found) == len(searcher)
    searcher.close()
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return build(tmp_path / "i", CODEC, BUILT, 2)


def test_deleted_documents_are_gone_and_nothing_is_rewritten(directory: Path) -> None:
    before = tree(directory)
    assert delete_documents(directory, [*BUILT.ids[:30], "unknown", BUILT.ids[0]]) == 30
    assert ids_of(directory) == set(BUILT.ids[30:])
    assert delete_documents(directory, BUILT.ids[20:50]) == 20
    assert ids_of(directory) == set(BUILT.ids[50:])
    after = tree(directory)
    assert {name: after[name] for name in before} == before
    assert [name for name in after if name.startswith("generations")] == [
        "generations/00001.json",
        "generations/00002.json",
    ]
    # A change that changes nothing leaves nothing.
    assert delete_documents(directory, BUILT.ids[:50]) == 0
    assert tree(directory) == after


def test_added_documents_are_found_as_if_built_in(directory: Path, tmp_path: Path) -> None:
    before = tree(directory)
    assert add(directory, ADDED) == 0
    searcher = open_index(directory)
    whole = open_index(build(tmp_path / "whole", CODEC, CORPUS))
    assert searcher.search(QUERIES, 10, SETTINGS) == whole.search(QUERIES, 10, SETTINGS)
    assert {name: tree(directory)[name] for name in before} == before


def test_an_update_is_a_deletion_and_an_addition(directory: Path) -> None:
    """The content of forty documents is replaced by that of others; ten of the ids are new."""
    ids = [*BUILT.ids[:40], *(f"new-{i}" for i in range(10))]
    part = ADDED.part(range(50))
    changed = Corpus(ids, part.vectors, part.lengths, part.metadata)
    with pytest.raises(DataError, match=r"has a document .* already"):
        add(directory, changed)
    assert "generations" not in {path.name for path in directory.iterdir()}
    assert add(directory, changed, replace=True) == 40
    assert ids_of(directory) == {*BUILT.ids, *ids}
    searcher = open_index(directory)
    query = part.vectors[: part.lengths[0]]
    assert searcher.search([query], 1)[0][0].id == ids[0]
    assert searcher.records(ids[:1])[ids[0]]["number"] == part.metadata["number"][0].as_py()
    # Deleted, then added again.
    delete_documents(directory, ids[:1])
    assert ids[0] not in ids_of(directory)
    add(directory, changed.part([0]))
    assert open_index(directory).search([query], 1)[0][0].id == ids[0]


def test_unfit_additions_change_nothing(directory: Path) -> None:
    before = tree(directory)
    part = ADDED.part([0, 1])
    cases = [
        (DataError, ["a", "a"], part.vectors, part.lengths, part.metadata),
        (DataError, ["a", "b"], part.vectors, part.lengths, None),
        (DataError, ["a", "b"], part.vectors, part.lengths, part.metadata.select(["number"])),
        (DimensionError, ["a", "b"], part.vectors[:, :16], part.lengths, part.metadata),
        (NonFiniteError, ["a", "b"], part.vectors * np.float32(np.inf), part.lengths, part.metadata),
    ]
    for error, *arguments in cases:
        with pytest.raises(error):
            add_documents(directory, *arguments)  # type: ignore[arg-type]
    assert tree(directory) == before


@pytest.mark.parametrize("ids", ["文書-1", "ab", [1, 2], ["a", None], [["a"], ["b"]], 7])
def test_ids_are_a_list_of_strings(directory: Path, ids: Any) -> None:
    before, part = tree(directory), ADDED.part([0, 1])

    def add_to_it(replace: bool) -> None:
        add_documents(directory, ids, part.vectors, part.lengths, part.metadata, replace=replace)

    for change in (
        lambda: delete_documents(directory, ids),
        lambda: known_documents(directory, ids),
        lambda: commit_change(directory, "a", deleted=ids),
        lambda: add_to_it(False),
        lambda: add_to_it(True),
    ):
        with pytest.raises(DataError, match="string"):
            change()
    assert tree(directory) == before


@pytest.mark.parametrize("shards", [1, 2, 3, None])
def test_compaction_is_a_fresh_build(directory: Path, tmp_path: Path, shards: int | None) -> None:
    add(directory, ADDED)
    delete_documents(directory, [*BUILT.ids[:30], *ADDED.ids[:10]])
    add(directory, ADDED.part([3]))
    add(directory, BUILT.part(range(5)))
    before = tree(directory)
    compact_index(directory, tmp_path / "compact", shards)
    live = [*range(5), *range(30, 200), 203, *range(210, 300)]
    fresh = build(tmp_path / "fresh", CODEC, CORPUS.part(live), shards or 2)
    assert tree(tmp_path / "compact") == tree(fresh)
    assert tree(directory) == before
    old, new = open_index(directory), open_index(tmp_path / "compact")
    assert old.search(QUERIES, 20, SETTINGS) == new.search(QUERIES, 20, SETTINGS)
    with pytest.raises(DataError, match="exists"):
        compact_index(directory, tmp_path / "compact")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compact", "fresh", "i"]


def overtake(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, other: Callable[[], object]) -> None:
    """Another change is made just before the next call of a function."""
    function = getattr(owner, name)

    def overtaken(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(owner, name, function)
        other()
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, overtaken)


def test_a_change_on_a_stale_view_fails_and_leaves_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between reading and committing of one change, another one commits."""

    def other() -> None:
        delete_documents(directory, BUILT.ids[5:10])

    for attempt in (lambda: add(directory, ADDED), lambda: delete_documents(directory, BUILT.ids[:5])):
        shutil.rmtree(directory / "generations", ignore_errors=True)
        shutil.rmtree(directory / "tombstones", ignore_errors=True)
        overtake(monkeypatch, maintenance._Change, "commit", other)
        with pytest.raises(IndexFormatError, match="changed at the same time"):
            attempt()
        assert ids_of(directory) == {*BUILT.ids[:5], *BUILT.ids[10:]}
        assert list((directory / "deltas").glob("*")) == []
        assert len(list((directory / "tombstones").iterdir())) == 1


def test_a_change_that_is_overtaken_while_it_opens_the_shards_fails(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other change adds a shard, which the generation that was read does not have."""
    overtake(monkeypatch, maintenance, "open_shards", lambda: add(directory, ADDED))
    with pytest.raises(IndexFormatError, match="changed at the same time"):
        delete_documents(directory, BUILT.ids[:5])
    assert ids_of(directory) == set(CORPUS.ids)


def test_of_two_that_make_one_named_change_the_first_stays_whole(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = directory / "deltas" / "named"
    write_shard(path, CODEC, ADDED.ids, ADDED.vectors, ADDED.lengths, ADDED.metadata)
    delta = ShardEntry(path="deltas/named", documents=len(ADDED.ids))

    def change() -> None:
        commit_change(directory, "named", deleted=BUILT.ids[:5], delta=delta)

    overtake(monkeypatch, maintenance._Change, "commit", change)
    with pytest.raises(IndexFormatError, match="changed at the same time"):
        change()
    assert ids_of(directory) == {*BUILT.ids[5:], *ADDED.ids}


def test_generations_go_by_their_numbers(directory: Path) -> None:
    generation = with_counts(current_generation(directory, CODEC), open_shards(directory, CODEC))
    write_generation(directory, generation.model_copy(update={"number": 99_999}))
    for number in range(3):
        assert delete_documents(directory, BUILT.ids[number : number + 1]) == 1
    assert current_generation(directory, CODEC).number == 100_002
    assert ids_of(directory) == set(BUILT.ids[3:])


def test_what_a_killed_writer_left_is_no_shard(directory: Path) -> None:
    shutil.copytree(directory / "shards" / "00000", directory / "shards" / ".00000-123")
    assert [shard.directory.name for shard in open_index(directory).shards] == ["00000", "00001"]


def test_damaged_generations_and_tombstones_are_refused(directory: Path) -> None:
    delete_documents(directory, BUILT.ids[:30])
    rng = np.random.default_rng(0)
    for path in [*(directory / "generations").iterdir(), *(directory / "tombstones").glob("*/*")]:
        data = path.read_bytes()
        for place in rng.integers(0, len(data), 25):
            damaged = bytearray(data)
            damaged[place] ^= 1 << int(rng.integers(8))
            for content in (bytes(damaged), data[:place]):
                if content.split() == data.split():  # space between JSON tokens
                    continue
                path.write_bytes(content)
                with pytest.raises(IndexFormatError):
                    open_index(directory)
        path.unlink()
        if path.parent.name != "generations":
            with pytest.raises(IndexFormatError):
                open_index(directory)
        path.write_bytes(data)
    open_index(directory).close()


def test_an_index_of_another_codec_is_refused(directory: Path) -> None:
    delete_documents(directory, BUILT.ids[:1])
    train_codec(BUILT, seed=5).save(directory / "codec")
    with pytest.raises(IndexFormatError, match="codec"):
        open_index(directory)
    with pytest.raises(IndexFormatError, match="codec"):
        delete_documents(directory, BUILT.ids[1:2])


def test_drift_shows_how_well_the_codec_fits(directory: Path) -> None:
    fitting = measure_drift(open_index(directory).shards)
    assert fitting.tokens == BUILT.lengths.sum()
    assert fitting.mean_residual == pytest.approx(1, abs=0.01)
    assert fitting.beyond < 0.001
    rng = np.random.default_rng(0)
    strange = Corpus(
        [f"s{i}" for i in range(100)],
        unit(rng.standard_normal((1000, 32))),
        np.full(100, 10),
        ADDED.metadata,
    )
    add(directory, strange)
    *_, delta = open_index(directory).shards
    drifted = measure_drift([delta])
    norms = CODEC.encode(strange.vectors).residual_norms
    assert norms is not None
    assert drifted.mean_residual == pytest.approx(norms.mean() / CODEC.training["residual_norm"], rel=0.05)
    assert drifted.mean_residual > 1.2
    assert fitting.mean_residual < measure_drift(open_index(directory).shards).mean_residual


def change_for_ever(directory: Path, begin: Event) -> None:
    rng = np.random.default_rng()
    ids = [f"d{i}" for i in range(40)]
    while True:
        vectors = rng.standard_normal((80, 32)).astype("f4")
        add_documents(directory, ids, vectors, [2] * 40, replace=True)
        begin.set()
        delete_documents(directory, ids[::2])
        compact_index(directory, directory.parent / f"compact-{rng.integers(1 << 62)}")


def test_a_killed_change_leaves_the_index_whole(tmp_path: Path) -> None:
    """Adds, deletes and compacts in another process until that is killed, at a random moment."""
    codec = train_codec(BUILT)
    directory = tmp_path / "i"
    codec.save(directory / "codec")
    write_shard(directory / "shards" / "00000", codec, BUILT.ids, BUILT.vectors, BUILT.lengths)
    moments = random.Random(os.getpid())
    for _ in range(3):
        process = begun(change_for_ever, directory)
        time.sleep(moments.random())
        process.kill()
        process.join()
        found = ids_of(directory) - set(BUILT.ids)
        assert found in ({f"d{i}" for i in range(40)}, {f"d{i}" for i in range(1, 40, 2)})
    for compacted in tmp_path.glob("compact-*"):
        assert set(BUILT.ids) <= ids_of(compacted)


def test_codecs_of_changed_indexes_are_the_same(directory: Path) -> None:
    add(directory, ADDED)
    assert Codec.load(directory / "codec").sha256 == CODEC.sha256
