"""Data files that are edited in place: refused by name, and never taken for what they were."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.artifacts import candidates_ref, tuples_ref
from cluster.config import Recipe, System
from cluster.data_files import DataFiles, source_files
from cluster.evaluation import Evaluator
from cluster.models import ensure_base
from cluster.registry import Registry
from colbert_core.errors import DataError
from jobs import mine_negatives, score_teacher
from tests.tiny_data import data_recipe, word_source
from tests.tiny_models import tiny_bert_dir, tiny_cross_encoder_dir

MINED: dict[str, Any] = {
    "mine": {"source": "words", "pools": [{"scorer": "bm25", "take": 3}]},
    "score": {"scorers": {"labels": 1.0}},
}
READ: dict[str, Any] = {"read": {"format": "tuples", "tuples": "given/*.parquet"}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    word_source(tmp_path / "words", documents=20, queries=10)
    (tmp_path / "given").mkdir()
    write_tuples(tmp_path / "given" / "a.parquet", "red")
    return tmp_path


def recipe(root: Path, edition: str | None = None, **more: Any) -> Recipe:
    return data_recipe(
        root,
        scorers={"bm25": {"kind": "bm25", "tokenizer": "whitespace"}, "labels": {"kind": "labels"}},
        data={"tuples": {"mined": MINED, "given": READ}, "edition": edition},
        **more,
    )


def write_tuples(path: Path, query: str) -> None:
    rows = {"query": [query], "documents": [["cat", "dog"]], "scores": [[1.0, 0.0]]}
    pq.write_table(pa.table(rows), path)


def relabel(root: Path) -> None:
    """Another document answers the first question; the file is as long as before."""
    path = root / "words" / "qrels.tsv"
    path.write_text(path.read_text().replace("q000\td000", "q000\td001"))


def test_candidates_of_an_edited_source_are_refused(root: Path) -> None:
    given = recipe(root)
    registry = Registry.open(given.storage)
    mine_negatives.run(given)
    ref = candidates_ref(given, "mined")
    manifest = registry.manifest(ref)
    files = DataFiles(given, source_files(given, "words"))
    assert manifest.data_fingerprint == files.fingerprint
    # The same bytes, written anew.
    os.utime(root / "words" / "qrels.tsv")
    assert mine_negatives.run(given).skipped == [str(ref)]
    relabel(root)
    message = r"words/qrels.tsv: the file holds other bytes, since data/test-mined-candidates@\w+ was made"
    for job in (mine_negatives, score_teacher):
        with pytest.raises(DataError, match=message):
            job.run(given)
    again = recipe(root, edition="2")
    assert mine_negatives.run(again).artifacts == [str(candidates_ref(again, "mined"))]
    assert DataFiles(again, source_files(again, "words")).fingerprint != files.fingerprint
    # A machine that has none of the files takes what is there.
    for path in (root / "words").iterdir():
        path.unlink()
    assert mine_negatives.run(again).skipped == [str(candidates_ref(again, "mined"))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: write_tuples(folder / "a.parquet", "a longer one"),
            r"given/a.parquet: .* bytes in",
        ),
        (lambda folder: write_tuples(folder / "c.parquet", "red"), r"given/c.parquet: the file is new"),
        (lambda folder: (folder / "b.parquet").unlink(), r"given/b.parquet: the file is gone"),
    ],
)
def test_a_training_set_of_other_files_is_refused(root: Path, change: Any, message: str) -> None:
    write_tuples(root / "given" / "b.parquet", "blue")
    given = data_recipe(root, data={"tuples": {"given": READ}})
    ref = tuples_ref(given, "given")
    assert score_teacher.run(given).artifacts == [str(ref)]
    assert score_teacher.run(given).skipped == [str(ref)]
    change(root / "given")
    with pytest.raises(DataError, match=message):
        score_teacher.run(given)


def test_a_file_that_is_edited_meanwhile_is_found_out(root: Path) -> None:
    given = recipe(root)
    files = DataFiles(given, source_files(given, "words"))
    assert files.record().keys() == {"data_files"}
    relabel(root)
    with pytest.raises(DataError, match=r"words/qrels.tsv: the file was changed while"):
        files.record()


def test_parts_that_a_killed_job_made_of_other_files_are_not_used(root: Path) -> None:
    given = recipe(root)
    registry = Registry.open(given.storage)
    ref = candidates_ref(given, "mined")
    staged, part = registry.staging(ref), root / "part"
    part.write_bytes(b"of the killed job")
    staged.begin("of then")
    staged.upload("part-000000.parquet", part)
    staged.begin("of then")
    assert list(staged.parts()) == ["part-000000.parquet"]
    mine_negatives.run(given)
    rows = pq.read_table(registry.pull(ref) / "part-000000.parquet")
    assert rows.num_rows == 10


def test_an_edited_source_is_evaluated_anew(root: Path) -> None:
    given = recipe(root)
    registry = Registry.open(given.storage)

    def values() -> tuple[float, bool]:
        found, known = Evaluator(given, registry, "words").values(System(scorer="bm25"), ["nDCG@10"])
        return found["nDCG@10"]["q000"], known

    before, known = values()
    assert (before > 0, known) == (True, False)
    assert values() == (before, True)
    relabel(root)
    after, known = values()
    assert (after < before, known) == (True, False)


def test_a_start_whose_pca_saw_other_documents_is_refused(root: Path) -> None:
    model = {
        "name": "tiny",
        "base": str(tiny_bert_dir(root / "bert")),
        "colbert": {"dim": 8},
        "projection": "pca",
        "pca_source": "words",
    }
    given = recipe(root, model=model)
    registry = Registry.open(given.storage)
    ref = ensure_base(given, registry)
    # Labels have no part in it.
    relabel(root)
    assert ensure_base(given, registry) == ref
    word_source(root / "words", documents=21, queries=10)
    with pytest.raises(DataError, match=r"words/corpus.parquet: .* since models/tiny@base-\w+ was"):
        ensure_base(given, registry)


def test_a_base_that_was_trained_again_in_place_is_refused(root: Path) -> None:
    model = {"name": "tiny", "base": str(tiny_bert_dir(root / "bert", seed=1)), "colbert": {"dim": 8}}
    given = recipe(root, model=model)
    registry = Registry.open(given.storage)
    ref = ensure_base(given, registry)
    (root / "bert" / "notes.md").write_text("of no matter")
    assert ensure_base(given, registry) == ref
    tiny_bert_dir(root / "bert", seed=2)
    with pytest.raises(DataError, match=r"bert/model.safetensors: .* since models/tiny@base-\w+ was made"):
        ensure_base(given, registry)
    again = ensure_base(recipe(root, edition="2", model=model), registry)
    assert again != ref
    # Where the directory is not, what was made of it is taken.
    shutil.rmtree(root / "bert")
    assert ensure_base(given, registry) == ref


def test_scores_of_a_teacher_that_was_trained_again_in_place_are_not_used(root: Path) -> None:
    teacher = tiny_cross_encoder_dir(root / "teacher", seed=1)
    given = data_recipe(
        root,
        scorers={"teacher": {"kind": "cross_encoder", "model": str(teacher)}},
        data={"tuples": {"given": READ | {"score": {"scorers": {"teacher": 1.0}}}}},
    )
    assert str(tuples_ref(given, "given")) in score_teacher.run(given).artifacts
    assert str(tuples_ref(given, "given")) in score_teacher.run(given).skipped
    tiny_cross_encoder_dir(root / "teacher", seed=2)
    with pytest.raises(DataError, match=r"teacher/model.safetensors: .* since data/test-given@\w+ was made"):
        score_teacher.run(given)


def test_what_an_encoder_found_before_it_was_trained_again_in_place_is_not_used(root: Path) -> None:
    encoder = {"kind": "bi_encoder", "model": str(tiny_bert_dir(root / "bert", seed=1))}
    mined = MINED | {"mine": {"source": "words", "pools": [{"scorer": "states", "take": 3}]}}
    scorers = {"states": encoder, "labels": {"kind": "labels"}}
    given = data_recipe(root, scorers=scorers, data={"tuples": {"mined": mined}})
    registry = Registry.open(given.storage)

    def known() -> bool:
        return Evaluator(given, registry, "words").values(System(scorer="states"), ["nDCG@10"])[1]

    mine_negatives.run(given)
    assert [known(), known()] == [False, True]
    tiny_bert_dir(root / "bert", seed=2)
    assert not known()
    with pytest.raises(DataError, match=r"bert/model.safetensors: .* since data/test-mined-candidates@\w+"):
        mine_negatives.run(given)
