"""Shards: any ids, one content for one set of documents, and no damage that goes unnoticed or crashes."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from colbert_core.config import SearchConfig
from colbert_core.errors import (
    DataError,
    DimensionError,
    IndexFormatError,
    NonFiniteError,
    RaycolbertError,
    SchemaVersionError,
)
from colbert_core.index import Codec, Searcher, Shard, ShardWriter, shard_of, write_shard
from tests.clustered_vectors import make_corpus, make_queries, train_codec

CORPUS = make_corpus(200)
CODEC = train_codec(CORPUS)
STRANGE_IDS = [
    "",
    " ",
    "a/b",
    "a\nb",
    "\x00",
    "日本語",
    "e\u0301",
    "é",
    "🗾",
    "z" * 5000,
    "-1",
    "\uffff",
    "\U0010ffff",
]


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    return written(tmp_path / "shard")


def written(directory: Path) -> Shard:
    write_shard(directory, CODEC, CORPUS.ids, CORPUS.vectors, CORPUS.lengths, CORPUS.metadata)
    return Shard.open(directory, CODEC, "full")


def test_a_shard_holds_what_was_written(shard: Shard) -> None:
    assert len(shard) == 200
    assert shard.manifest.tokens == len(CORPUS.vectors) == len(shard.codes)
    assert shard.id_array.to_pylist() == sorted(CORPUS.ids)
    places = shard.find(CORPUS.ids)
    assert shard.ids(places) == CORPUS.ids
    expected = CODEC.encode(CORPUS.vectors)
    for document in (0, 17, 199):
        rows = slice(CORPUS.offsets[document], CORPUS.offsets[document + 1])
        tokens = shard.tokens(int(places[document]))
        np.testing.assert_array_equal(tokens.centroids, expected.centroids[rows])
        np.testing.assert_array_equal(tokens.residuals, expected.residuals[rows])
        np.testing.assert_array_equal(tokens.scales, expected.scales[rows])
    assert shard.metadata is not None
    assert shard.metadata.take(places).equals(CORPUS.metadata)
    counts = np.bincount(expected.scales[:, 1], minlength=256)
    assert shard.manifest.residual_factor_counts == tuple(counts)


def test_postings_list_each_document_once_a_centroid(shard: Shard) -> None:
    for centroid in range(len(CODEC.centroids)):
        listed = shard.postings[shard.posting_offsets[centroid] : shard.posting_offsets[centroid + 1]]
        owners = np.repeat(np.arange(200), np.diff(shard.offsets))[shard.codes == centroid]
        assert listed.tolist() == sorted(set(owners.tolist()))


def test_content_depends_on_the_documents_not_on_their_order(tmp_path: Path) -> None:
    written(tmp_path / "whole")
    with ShardWriter(tmp_path / "pieces", CODEC) as writer:
        for documents in np.array_split(np.random.default_rng(0).permutation(200), 7):
            part = CORPUS.part(documents)
            writer.add(part.ids, part.vectors, part.lengths, part.metadata)
        writer.finish()
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "pieces")


def test_any_string_is_an_id(tmp_path: Path) -> None:
    part = CORPUS.part(range(len(STRANGE_IDS)))
    write_shard(tmp_path / "s", CODEC, STRANGE_IDS, part.vectors, part.lengths)
    shard = Shard.open(tmp_path / "s", CODEC)
    assert shard.ids(shard.find(STRANGE_IDS)) == STRANGE_IDS
    assert shard.ids(range(len(shard))) == sorted(STRANGE_IDS)
    assert shard.find(["nothing", "\ud800"]).tolist() == [-1, -1]
    # A long list takes another way.
    assert shard.find([*STRANGE_IDS * 20, "nothing", "\ud800"]).tolist() == [
        *shard.find(STRANGE_IDS).tolist() * 20,
        -1,
        -1,
    ]


def test_shards_are_chosen_by_a_stable_hash() -> None:
    names = [f"d{i}" for i in range(4000)]
    assert [shard_of(name, 7) for name in ("a", "日本", "")] == [6, 5, 2]
    assert np.bincount([shard_of(name, 4) for name in names]).min() > 900


def test_an_empty_shard_opens_and_finds_nothing(tmp_path: Path) -> None:
    write_shard(tmp_path / "s", CODEC, [], CORPUS.vectors[:0], [], CORPUS.metadata[:0])
    shard = Shard.open(tmp_path / "s", CODEC, "full")
    assert len(shard) == 0
    assert shard.find(["a"]).tolist() == [-1]
    assert Searcher(CODEC, [shard]).search([CORPUS.vectors[:3]], 5) == [[]]


def test_unfit_documents_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    part = CORPUS.part([0, 1, 2])

    def write(**changes: object) -> None:
        values = {
            "ids": part.ids,
            "vectors": part.vectors,
            "lengths": part.lengths,
            "metadata": part.metadata,
        }
        write_shard(tmp_path / "s", CODEC, **values | changes)  # type: ignore[arg-type]

    with pytest.raises(DataError, match="two documents have the id 'twice'"):
        write(ids=["twice", "b", "twice"])
    with pytest.raises(DataError, match=f"'{part.ids[1]}' has no tokens"):
        write(lengths=[len(part.vectors), 0, 0])
    with pytest.raises(DimensionError, match="lengths add up to 3"):
        write(lengths=[1, 1, 1])
    with pytest.raises(DimensionError, match="3 ids have"):
        write(lengths=part.lengths[:2])
    with pytest.raises(DimensionError):
        write(vectors=part.vectors[:, :16])
    with pytest.raises(NonFiniteError):
        write(vectors=part.vectors * np.float32("nan"))
    with pytest.raises(DataError, match="not a Unicode string"):
        write(ids=["a", "b", "\ud800"])
    with pytest.raises(DataError, match="document 1 has no id"):
        write(ids=["a", None, "c"])
    with pytest.raises(DataError, match="2 rows for 3 documents"):
        write(metadata=part.metadata[:2])
    assert list(tmp_path.iterdir()) == []
    write()
    with pytest.raises(DataError, match="exists"):
        write()


def test_a_writer_goes_on_after_refused_vectors(tmp_path: Path) -> None:
    first, second, both = CORPUS.part([0, 1]), CORPUS.part([2, 3]), CORPUS.part(range(4))
    with ShardWriter(tmp_path / "s", CODEC) as writer:
        writer.add(first.ids, first.vectors, first.lengths, first.metadata)
        for vectors in (second.vectors * np.float32("nan"), second.vectors[:, :16]):
            with pytest.raises((NonFiniteError, DimensionError)):
                writer.add(second.ids, vectors, second.lengths, second.metadata)
        assert (writer.documents, writer.tokens) == (2, len(first.vectors))
        writer.add(second.ids, second.vectors, second.lengths, second.metadata)
        writer.finish()
    write_shard(tmp_path / "whole", CODEC, both.ids, both.vectors, both.lengths, both.metadata)
    assert files_of(tmp_path / "s") == files_of(tmp_path / "whole")


def test_metadata_columns_must_agree(tmp_path: Path) -> None:
    part = CORPUS.part([0, 1])
    other = part.metadata.select(["number"])
    for first, second in ((part.metadata, other), (part.metadata, None), (None, part.metadata)):
        with ShardWriter(tmp_path / "s", CODEC) as writer:
            writer.add(["a", "b"], part.vectors, part.lengths, first)
            with pytest.raises(DataError, match="metadata"):
                writer.add(["c", "d"], part.vectors, part.lengths, second)
    assert list(tmp_path.iterdir()) == []


def test_another_codec_is_refused(shard: Shard) -> None:
    with pytest.raises(IndexFormatError, match="encoded with codec"):
        Shard.open(shard.directory, train_codec(CORPUS, seed=1))


def test_missing_and_newer_files_are_named(shard: Shard, tmp_path: Path) -> None:
    for name in ("residuals", "manifest.json", "ids"):
        copy = tmp_path / f"without-{name}"
        shutil.copytree(shard.directory, copy)
        (copy / name).unlink()
        with pytest.raises(IndexFormatError, match=name):
            Shard.open(copy, CODEC)
    path = shard.directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 2}))
    with pytest.raises(SchemaVersionError, match="schema version 2"):
        Shard.open(shard.directory, CODEC)
    with pytest.raises(IndexFormatError):
        Shard.open(tmp_path / "nowhere", CODEC)


def test_every_truncation_is_noticed(shard: Shard) -> None:
    for path in sorted(shard.directory.iterdir()):
        data = path.read_bytes()
        last = len(data.rstrip())  # the line break at a manifest's end carries nothing
        for keep in {0, 1, last // 2, last - 1}:
            path.write_bytes(data[:keep])
            with pytest.raises(IndexFormatError):
                Shard.open(shard.directory, CODEC)
        path.write_bytes(data + b"\x00")
        with pytest.raises(IndexFormatError):
            Shard.open(shard.directory, CODEC)
        path.write_bytes(data)
    Shard.open(shard.directory, CODEC, "full")


def use(shard: Shard, queries: list[np.ndarray]) -> None:
    """Everything that reads a shard's content."""
    searcher = Searcher(CODEC, [shard])
    try:
        searcher.search(queries, 10, SearchConfig(probes=4, candidates=40, rerank=20))
        searcher.search_exact(queries, 200)
        searcher.search(queries, 10, filter=pa.compute.field("colour") == "red")
        shard.find([*CORPUS.ids, "x"])
        shard.find(CORPUS.ids[:3])
    finally:
        searcher.close()


def test_flipped_bits_are_noticed_or_at_least_harmless(shard: Shard) -> None:
    """In full verification none passes; in fast verification the process survives."""
    rng = np.random.default_rng(0)
    queries = make_queries(CORPUS, 3)
    use(shard, queries)
    survived = 0
    for path in sorted(shard.directory.iterdir()):
        data = path.read_bytes()
        for _ in range(12):
            damaged = bytearray(data)
            for place in rng.integers(0, len(data), rng.integers(1, 20)):
                damaged[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(bytes(damaged))
            if path.suffix == ".json":
                # A flipped bit may make white space of white space.
                with suppress(IndexFormatError, SchemaVersionError):
                    assert Shard.open(shard.directory, CODEC, "full").manifest == shard.manifest
            elif damaged != data:
                with pytest.raises(IndexFormatError, match="damaged"):
                    Shard.open(shard.directory, CODEC, "full")
            try:
                use(Shard.open(shard.directory, CODEC, "fast"), queries)
                survived += 1
            except RaycolbertError:
                continue
        path.write_bytes(data)
    assert survived > 0


def test_a_code_of_another_centroid_count_cannot_read_outside(tmp_path: Path) -> None:
    """All codes and postings set to the largest number there is."""
    shard = written(tmp_path / "s")
    for name in ("codes", "postings"):
        path = shard.directory / name
        data = path.read_bytes()
        path.write_bytes(b"\xff" * len(data))
        use(Shard.open(shard.directory, CODEC, "fast"), make_queries(CORPUS, 2))
        path.write_bytes(data)


def test_memory_does_not_grow_with_the_vectors(tmp_path: Path) -> None:
    """Three times the documents, of 100 tokens each, once buffers are full: only ids and lengths may stay."""
    vectors = np.resize(CORPUS.vectors, (5000, 32))

    def peak(chunks: int) -> int:
        tracemalloc.start()
        with ShardWriter(tmp_path / str(chunks), CODEC) as writer:
            for chunk in range(chunks):
                writer.add([f"{chunk}-{i}" for i in range(50)], vectors, [100] * 50)
            manifest = writer.finish()
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert manifest.documents == 50 * chunks
        return highest

    peak(1)
    few, many = peak(40), peak(120)
    assert (many - few) / (80 * 50) < 300  # bytes a document; its compressed vectors have 2000


def test_the_number_type_of_codes_follows_the_centroids() -> None:
    codec = Codec(
        4,
        CODEC.rotation,
        np.zeros((70_000, 32), dtype=np.int8),
        CODEC.centroid_scale,
        CODEC.length_factors,
        CODEC.residual_factors,
        {},
    )
    assert (CODEC.code_dtype, codec.code_dtype) == (np.dtype("<u2"), np.dtype("<u4"))
