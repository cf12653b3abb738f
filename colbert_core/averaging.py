"""The weighted mean of checkpoints, and the greedy choice of which to take.

The inputs are read in parts, wherever they lie (``mean_plan.py``), and summed in an order that follows
from their content: the result is the same to the bit in whatever order they are given.

Sources: Izmailov et al. 2018 (weight averaging), Wortsman et al. 2022 (model soups, greedy soup),
JaColBERTv2.5 section 3.6 (plain mean of pre-training checkpoints and post-trained models).
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from colbert_core.errors import ConfigError, ModelError, NonFiniteError, StorageError
from colbert_core.mean_plan import BLOCK_BYTES, MeanPlan, Piece
from colbert_core.model_files import LocalFile, ModelFiles, RangedFile, common_files, read_range
from colbert_core.tensor_files import TensorFileWriter

Candidate = TypeVar("Candidate")

_LEAST_WEIGHT = 1e-300  # the reciprocal of a sum of such is still a number

Compute = Callable[[MeanPlan], Iterable[Piece]]
"""Computes all pieces of a mean, in any order: here, or elsewhere."""


def average_files(inputs: Sequence[Path], weights: Sequence[float], output: Path) -> None:
    """Writes the weighted mean of local safetensors files.

    Floating-point tensors are averaged and written as fp32, within one ulp of the float64 mean.
    Integer and boolean tensors (buffers such as position ids) must be equal and are kept.

    Args:
        inputs: one or more files with the same tensors.
        weights: one positive number each; only their ratios matter.
        output: the file to write; it appears complete or not at all.

    Raises:
        ConfigError: the weights do not fit the inputs.
        ModelError: a file is unreadable, or keys, shapes, dtypes or integer tensors differ; the message
            lists what differs.
        NonFiniteError: an input holds a NaN or an infinity; the file and the tensor are named.
        StorageError: the output cannot be written, as on a full disk.
    """
    _check_weights(len(inputs), weights)
    files = [LocalFile(path) for path in inputs]
    order = _canonical_order([file.sha256 for file in files], weights)
    with _typed(output):
        _write_mean([files[i] for i in order], [weights[i] for i in order], output, MeanPlan.pieces)


def average_models(
    models: Sequence[ModelFiles], weights: Sequence[float], output: Path, compute: Compute = MeanPlan.pieces
) -> None:
    """Writes the weighted mean of models.

    Every safetensors file is averaged; everything else (configs, tokenizer) must be the same in all
    inputs and is copied. Version stamps, model cards and Stanford's record of the training run may
    differ; those of the input that is summed first are taken.

    Args:
        models: one or more models of the same layout, local or not.
        weights: one positive number each; only their ratios matter.
        output: directory to create; it appears complete or not at all.
        compute: computes the means; by default in this thread, reading one block ahead.

    Raises:
        ConfigError: the weights do not fit the inputs.
        ModelError: ``output`` exists, or the inputs differ in a file, which is named; or as
            :func:`average_files`.
        NonFiniteError, StorageError: as :func:`average_files`.
        RaycolbertError: what reading a file raises.
    """
    _check_weights(len(models), weights)
    if output.exists():
        raise ModelError(f"{output}: exists already; a model is never overwritten")
    names = common_files(models)
    tensor_files = [name for name in names if name.endswith(".safetensors")]
    # One order for all files of a model: a tensor that two files hold (the projection) stays one tensor.
    order = _canonical_order(
        ["".join(model[name].sha256 for name in tensor_files) for model in models], weights
    )
    models, weights = [models[i] for i in order], [weights[i] for i in order]
    with _typed(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
        try:
            for name in names:
                target = staging / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if name in tensor_files:
                    _write_mean([model[name] for model in models], weights, target, compute)
                else:
                    _copy(models[0][name], target)
            staging.chmod(0o755)
            staging.rename(output)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@dataclass(frozen=True)
class Soup(Generic[Candidate]):
    """What :func:`greedy_soup` chose.

    Attributes:
        chosen: the candidates of the mean, in the order they were added.
        score: the metric of their mean.
        trials: every set that was scored, with its score, in order.
    """

    chosen: tuple[Candidate, ...]
    score: float
    trials: tuple[tuple[tuple[Candidate, ...], float], ...]


def greedy_soup(
    candidates: Sequence[Candidate], score: Callable[[Sequence[Candidate]], float]
) -> Soup[Candidate]:
    """Chooses checkpoints one by one, each only if the metric of the mean rises.

    The candidates are tried from the best to the worst single score (ties: as given); the first is
    always taken (Wortsman et al. 2022, recipe 1).

    Args:
        candidates: at least one.
        score: metric of the mean of some candidates; larger is better. Called once per set.

    Raises:
        ConfigError: there are no candidates.
        NonFiniteError: a score is not a finite number.
    """
    if not candidates:
        raise ConfigError("greedy soup: no candidates")
    trials: list[tuple[tuple[Candidate, ...], float]] = []

    def scored(chosen: tuple[Candidate, ...]) -> float:
        value = float(score(chosen))
        if not math.isfinite(value):
            raise NonFiniteError(f"greedy soup: the metric of {', '.join(map(str, chosen))} is {value}")
        trials.append((chosen, value))
        return value

    singles = [scored((candidate,)) for candidate in candidates]
    ranked = sorted(range(len(candidates)), key=lambda i: -singles[i])
    chosen: tuple[Candidate, ...] = (candidates[ranked[0]],)
    best = singles[ranked[0]]
    for i in ranked[1:]:
        wider = (*chosen, candidates[i])
        value = scored(wider)
        if value > best:
            chosen, best = wider, value
    return Soup(chosen, best, tuple(trials))


@contextmanager
def _typed(output: Path) -> Iterator[None]:
    """Makes a typed error of what the file system refuses, a full disk for one."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"averaging into {output}: {error}") from None


def _check_weights(inputs: int, weights: Sequence[float]) -> None:
    if inputs == 0 or inputs != len(weights):
        raise ConfigError(f"a mean needs one weight per input: {inputs} inputs, {len(weights)} weights")
    if not all(math.isfinite(weight) and weight > _LEAST_WEIGHT for weight in weights):
        raise ConfigError(f"weights of a mean are positive numbers, not {list(weights)}")


def _canonical_order(digests: Sequence[str], weights: Sequence[float]) -> list[int]:
    """An order that follows from the inputs' content: floating-point addition is not associative."""
    return sorted(range(len(digests)), key=lambda i: (weights[i], digests[i]))


def _write_mean(
    files: Sequence[RangedFile], weights: Sequence[float], output: Path, compute: Compute
) -> None:
    """Averages files, summing in the order given; see :func:`average_files`."""
    plan = MeanPlan.of(files, weights)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        TensorFileWriter(output, plan.specs) as writer,
    ):
        task = progress.add_task(f"averaging {len(files)} models", total=sum(file.size for file in files))
        for piece in compute(plan):
            writer.write_at(piece.name, piece.offset, piece.values)
            progress.advance(task, piece.read)


def _copy(file: RangedFile, target: Path) -> None:
    with target.open("wb") as stream:
        for start in range(0, file.size, BLOCK_BYTES):
            stream.write(read_range(file, start, BLOCK_BYTES))
