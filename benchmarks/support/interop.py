"""The same pairs scored by this project and by another library, each loading what the other has made."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.support.line_protocol import Peer, PeerError
from colbert_core.config import ColBERTConfig
from colbert_core.encoder import ColBERT
from colbert_core.errors import RaycolbertError
from colbert_core.formats import load_model, save_model
from colbert_core.formats_stanford import masked_ids
from colbert_core.maxsim import maxsim_pairs
from colbert_core.text import skip_setting

TOLERANCE = 1e-5
QUERY_LENGTH, DOCUMENT_LENGTH = 32, 180
SAMPLES = Path(__file__).parents[2] / "samples" / "ja"
ENGLISH = (
    ("What is late interaction?", "Late interaction compares every query token with all document tokens."),
    ("fast train to the city", "A fast train (express) runs to the city; it stops twice: here, and there!"),
    ("cat & dog", "The cat and the dog -- old friends -- slept on the red paper."),
    ("UPPER lower", "Case may matter: UPPER, lower, MiXeD."),
    ("price in $", "It costs $3.50, 10% less than e-mail/web prices [see note]."),
)

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Agreement:
    """How far two libraries' scores of the same pairs lie apart.

    Attributes:
        ours: largest difference where the other loads our export.
        saved: where we load that export as the other has saved it again.
        theirs: where we load what the other has made from a plain backbone.
        versions: of the other library and those under it.
        reasons: why a figure is missing.
    """

    ours: float | None
    saved: float | None
    theirs: float | None
    versions: dict[str, str]
    reasons: dict[str, str]


def sample_pairs(count: int = 50) -> list[tuple[str, str]]:
    """Questions with passages of the samples, relevant or not, and some English with punctuation."""

    def records(name: str) -> list[dict[str, str]]:
        lines = (SAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    generator = random.Random(0)
    questions = generator.sample(records("queries"), count - len(ENGLISH))
    passages = records("corpus")
    return [*ENGLISH, *((each["text"], generator.choice(passages)["text"]) for each in questions)]


def our_scores(directory: Path, pairs: Pairs) -> list[float]:
    """MaxSim of each pair with the model in a directory."""
    model = load_model(directory)
    queries = model.encode_queries([query for query, _ in pairs])
    documents = model.encode_documents([document for _, document in pairs])
    numbers = torch.arange(len(pairs))
    return maxsim_pairs(queries, documents, torch.stack([numbers, numbers], dim=1)).tolist()


def export(backbone: str | Path, directory: Path, dim: int, peer: str) -> None:
    """Our export of a backbone with a random projection, with settings that the peer's layout can say.

    Stanford's says "punctuation", and its code takes the first piece of each symbol. That is all of it with
    WordPiece; with SentencePiece other pieces, which are named here.
    """
    skipped: bool | tuple[str, ...] = True
    if peer == "colbert-ai":
        tokenizer = AutoTokenizer.from_pretrained(backbone)
        skipped = skip_setting(tokenizer, masked_ids(tokenizer))
    config = ColBERTConfig(
        dim=dim,
        query_length=QUERY_LENGTH,
        document_length=DOCUMENT_LENGTH,
        query_length_rule="fixed",
        skip_punctuation=skipped,
    )
    save_model(ColBERT.create(backbone, config, seed=0), directory)


def compare(name: str, python: str, backbone: str | Path, pairs: Pairs, dim: int, folder: Path) -> Agreement:
    """Compares one library on one backbone.

    Args:
        name: 'pylate', 'sentence-transformers' or 'colbert-ai'.
        python: the interpreter of its environment.
        backbone: directory of a plain encoder.
        pairs: what is scored.
        dim: of the projection.
        folder: for models; it must exist.

    Raises:
        PeerError: the library cannot be imported there.
    """
    environment = {"RAYCOLBERT_PEER": name, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["OMP_NUM_THREADS"] = "1"
    found: dict[str, float | None] = {}
    reasons: dict[str, str] = {}
    with (
        tempfile.TemporaryDirectory(dir=folder) as work,
        Peer(name, python, "benchmarks.support.interop_peers", environment) as peer,
    ):
        versions = peer.call("versions")  # of a library that is not there, this says why
        listed = Path(work) / "pairs.json"
        listed.write_text(json.dumps(list(pairs)), encoding="utf-8")
        export(backbone, Path(work) / "ours", dim, name)
        steps: Mapping[str, tuple[str, dict[str, object]]] = {
            "ours": ("load", {"model": str(Path(work) / "ours")}),
            "saved": ("load", {"model": str(Path(work) / "ours")}),
            "theirs": (
                "make",
                {"backbone": str(backbone), "dim": dim, "lengths": (QUERY_LENGTH, DOCUMENT_LENGTH)},
            ),
        }
        for step, (command, arguments) in steps.items():
            directory = Path(work) / step
            try:
                peer.call(command, **arguments)
                if step != "ours":
                    peer.call("save", directory=str(directory))
                theirs = peer.call("scores", pairs=str(listed))
                ours = our_scores(directory, pairs)
                found[step] = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            except (PeerError, RaycolbertError) as error:
                found[step] = None
                reasons[step] = str(error).strip().splitlines()[-1][:300]
    return Agreement(**found, versions=versions, reasons=reasons)
