"""Data artifacts: numbered Parquet parts of candidates or of scored tuples.

A part is the unit of work and of resumption: it is written, uploaded and recorded on its own, and a job
that was killed goes on with the parts that are missing.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.artifacts import ArtifactRef
from cluster.registry import Registry, StagedArtifact
from cluster.streams import ROW_GROUP_TUPLES, TupleWriter
from cluster.tuples import Row
from colbert_core.errors import DataError, IntegrityError

PART_ROWS = 1024
CANDIDATE_SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string()),
        pa.field("query", pa.string()),
        pa.field("document_ids", pa.list_(pa.string())),
        pa.field("documents", pa.list_(pa.string())),
    ]
)


def part_name(number: int) -> str:
    """The path of a part in its artifact; names sort as numbers do."""
    return f"part-{number:06d}.parquet"


def write_part(path: Path, rows: Sequence[Row], *, scored: bool) -> None:
    """Writes one part: native tuples with ids if ``scored``, else candidates."""
    if scored:
        with TupleWriter(path, ids=True) as writer:
            for row in rows:
                writer.write(row)
        return
    names = CANDIDATE_SCHEMA.names
    table = pa.Table.from_pylist([{name: row[name] for name in names} for row in rows], CANDIDATE_SCHEMA)
    pq.write_table(table, path, row_group_size=ROW_GROUP_TUPLES, compression="zstd", write_page_checksum=True)


def upload_parts(
    staged: StagedArtifact, rows: Iterable[Row], *, scored: bool, rows_per_part: int = PART_ROWS
) -> dict[str, int]:
    """Cuts rows into parts and uploads those that are not there yet; holds one part at a time.

    Returns:
        Rows by path, of all parts.
    """
    done = staged.parts()
    iterator = iter(rows)
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="raycolbert-parts-") as folder:
        while block := list(islice(iterator, rows_per_part)):
            path = part_name(len(counts))
            counts[path] = len(block)
            if path not in done:
                local = Path(folder) / path
                write_part(local, block, scored=scored)
                staged.upload(path, local)
                local.unlink()
    return counts


def read_part(registry: Registry, ref: ArtifactRef, path: str) -> list[Row]:
    """The rows of a published part.

    Raises:
        DataError: the file is no part of candidates.
        IntegrityError: the file is not what its manifest records.
    """
    with registry.open_file(ref, path) as handle:
        content = handle.read()
    if hashlib.sha256(content).hexdigest() != registry.manifest(ref).files[path].sha256:
        raise IntegrityError(f"{ref} {path}: the content does not match its SHA-256")
    try:
        table = pq.read_table(pa.BufferReader(content), columns=CANDIDATE_SCHEMA.names)
        return table.to_pylist()
    except (pa.ArrowInvalid, KeyError) as error:
        raise DataError(f"{ref} {path}: not a part of candidates: {error}") from None
