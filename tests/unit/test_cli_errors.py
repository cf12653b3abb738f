"""Bad input of every kind: exit status 2, one line that names what and where, and no traceback."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from jobs.cli import app
from tests.tiny_data import write_source
from tests.tiny_models import tiny_bert_dir

DOCUMENTS = [{"_id": "d1", "title": "", "text": "red cat"}, {"_id": "d2", "title": "", "text": "blue dog"}]
QUERIES = [{"_id": "q1", "text": "cat"}]
LABELS = [("q1", "d1", 1)]


class Case:
    """A recipe file that the test spoils, and the command line that meets it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source = write_source(root / "set", DOCUMENTS, QUERIES, LABELS)
        self.tree: dict[str, Any] = {
            "name": "bad",
            "storage": {"root": str(root / "store"), "cache_dir": str(root / "cache")},
            "model": {"name": "m", "base": str(root / "base"), "colbert": {"dim": 16}},
            "data": {"root": str(root), "sources": {"set": self.source}},
            "scorers": {"bm25": {"kind": "bm25", "tokenizer": "whitespace"}},
            "index": {"name": "i", "model": "base", "sources": ["set"]},
        }

    def mine(self) -> None:
        """Adds a training set that is mined from the source."""
        pools = [{"scorer": "bm25", "take": 1}]
        mined = {"mine": {"source": "set", "pools": pools}, "score": {"scorers": {"bm25": 1}}}
        self.tree["data"]["tuples"] = {"t": mined}

    def read(self, rows: list[dict[str, Any]]) -> None:
        """Adds a training set that is read from a file of these rows."""
        pq.write_table(pa.Table.from_pylist(rows), self.root / "tuples.parquet")
        self.tree["data"]["tuples"] = {"t": {"read": {"format": "tuples", "tuples": "tuples.parquet"}}}

    def error_of(self, job: str, *options: str) -> str:
        """Runs the job; asserts that it failed as a user error does; returns its message on one line."""
        recipe = self.root / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(self.tree), encoding="utf-8")
        result = CliRunner().invoke(app, [job, str(recipe), *options])
        assert result.exit_code == 2, result.output
        assert isinstance(result.exception, SystemExit)
        assert "Traceback" not in result.output
        return " ".join(result.output.split())


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def unknown_key(case: Case) -> tuple[str, list[str]]:
    case.tree["model"]["colbert"]["dmi"] = 3
    return "mine_negatives", ["unknown key 'model.colbert.dmi'", "allowed here:", "document_length"]


def missing_recipe(case: Case) -> tuple[str, list[str]]:
    case.tree = {"schema_version": 1}
    return "train", ["recipe.yaml", "storage"]


def missing_column(case: Case) -> tuple[str, list[str]]:
    case.mine()
    pq.write_table(pa.table({"_id": ["d1"], "body": ["x"]}), case.root / "set" / "corpus.parquet")
    return "mine_negatives", ["set/corpus.parquet", "no column 'text'", "body"]


def duplicate_id(case: Case) -> tuple[str, list[str]]:
    case.mine()
    write_source(case.root / "set", [DOCUMENTS[0], DOCUMENTS[0]], QUERIES, LABELS)
    return "mine_negatives", ["set/corpus.parquet", "row 2", "'d1'"]


def unknown_label_id(case: Case) -> tuple[str, list[str]]:
    case.mine()
    write_source(case.root / "set", DOCUMENTS, QUERIES, [("q1", "d9", 1)])
    return "mine_negatives", ["set/qrels.tsv", "'d9'"]


def missing_file(case: Case) -> tuple[str, list[str]]:
    case.mine()
    (case.root / "set" / "queries.parquet").unlink()
    return "mine_negatives", ["set/queries.parquet"]


def empty_documents(case: Case) -> tuple[str, list[str]]:
    good = {"query": "cat", "documents": ["a", "b"], "scores": [1.0, 0.0]}
    case.read([good, {"query": "dog", "documents": [], "scores": []}])
    return "score_teacher", ["tuples.parquet", "row 2"]


def nan_score(case: Case) -> tuple[str, list[str]]:
    case.read([{"query": "cat", "documents": ["a", "b"], "scores": [1.0, math.nan]}])
    return "score_teacher", ["tuples.parquet", "row 1"]


def missing_model_file(case: Case) -> tuple[str, list[str]]:
    tiny_bert_dir(case.root / "base")
    (case.root / "base" / "model.safetensors").unlink()
    return "index", ["base"]


def wrong_dimension(case: Case) -> tuple[str, list[str]]:
    tiny_bert_dir(case.root / "base")
    case.tree["model"] |= {"projection": "pca", "pca_source": "set", "colbert": {"dim": 999}}
    return "index", ["999"]


def unreachable_storage(case: Case) -> tuple[str, list[str]]:
    case.mine()
    case.tree["storage"] |= {
        "root": "s3://bucket/prefix",
        "endpoint_url": "http://127.0.0.1:9",
        "request_timeout_s": 2,
    }
    return "mine_negatives", ["127.0.0.1:9"]


def missing_input(case: Case) -> tuple[str, list[str]]:
    case.mine()
    return "score_teacher", ["run mine_negatives first"]


@pytest.mark.parametrize(
    "spoil",
    [
        unknown_key,
        missing_recipe,
        missing_column,
        duplicate_id,
        unknown_label_id,
        missing_file,
        empty_documents,
        nan_score,
        missing_model_file,
        wrong_dimension,
        unreachable_storage,
        missing_input,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_bad_input_is_one_line_and_status_2(
    case: Case, spoil: Callable[[Case], tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")
    job, expected = spoil(case)
    message = case.error_of(job)
    assert all(part in message for part in expected), message


def test_debug_shows_the_traceback(case: Case) -> None:
    case.mine()
    (case.root / "set" / "queries.parquet").unlink()
    recipe = case.root / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(case.tree), encoding="utf-8")
    result = CliRunner().invoke(app, ["mine_negatives", str(recipe), "--debug"])
    assert result.exit_code == 2
    assert "Traceback" in result.output


def test_a_compacted_index_has_a_shard_at_least(case: Case) -> None:
    assert "--shards 0: at least 1 is expected" in case.error_of("compact_index", "--shards", "0")
