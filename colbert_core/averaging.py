"""The weighted mean of checkpoints, and the greedy choice of which to take.

A mean reads its inputs in pieces of rows and accumulates them in float64, so memory depends neither
on how many inputs there are nor on how large a tensor is. The inputs are summed in an order that
follows from their content, so the result is the same to the bit in whatever order they are given.

Sources: Izmailov et al. 2018 (weight averaging), Wortsman et al. 2022 (model soups, greedy soup),
JaColBERTv2.5 section 3.6 (plain mean of pre-training checkpoints and post-trained models).
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError, safe_open

from colbert_core.errors import ConfigError, ModelError, NonFiniteError
from colbert_core.tensor_files import TensorFileWriter, TensorSpec, file_sha256

_FLOATS = ("F64", "F32", "F16", "BF16")
_ELEMENTS_PER_PIECE = 1 << 19  # 4 MB of float64
_SHOWN_DIFFERENCES = 6
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Files that say nothing about what a model computes.
_IGNORED_FILES = ("README.md", ".gitattributes")
# Keys that only say which release wrote a file.
_IGNORED_KEYS = frozenset({"transformers_version", "__version__", "_name_or_path"})
# The keys of Stanford's metadata that determine the vectors; the rest describes the training run.
_STANFORD_METADATA = "artifact.metadata"
_STANFORD_KEYS = frozenset(
    [
        *("query_token_id", "doc_token_id", "query_maxlen", "doc_maxlen", "dim"),
        *("mask_punctuation", "attend_to_mask_tokens", "interaction", "similarity"),
    ]
)

Candidate = TypeVar("Candidate")


def average_files(inputs: Sequence[Path], weights: Sequence[float], output: Path) -> None:
    """Writes the weighted mean of safetensors files.

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
    """
    _check_weights(len(inputs), weights)
    order = _canonical_order([file_sha256(path) for path in inputs], weights)
    _write_mean([inputs[i] for i in order], [weights[i] for i in order], output)


def average_models(directories: Sequence[Path], weights: Sequence[float], output: Path) -> None:
    """Writes the weighted mean of model directories.

    Every safetensors file is averaged; everything else (configs, tokenizer) must be the same in all
    inputs and is copied. Version stamps, model cards and Stanford's record of the training run may
    differ; the first directory's are taken.

    Args:
        directories: one or more model directories of the same layout.
        weights: one positive number each; only their ratios matter.
        output: directory to create; it appears complete or not at all.

    Raises:
        ConfigError: the weights do not fit the inputs.
        ModelError: ``output`` exists, or the inputs differ in a file, which is named; or as
            :func:`average_files`.
        NonFiniteError: as :func:`average_files`.
    """
    _check_weights(len(directories), weights)
    if output.exists():
        raise ModelError(f"{output}: exists already; a model is never overwritten")
    names = _common_files(directories)
    tensor_files = [name for name in names if name.endswith(".safetensors")]
    # One order for all files of a model: a tensor that two files hold (the projection) stays one tensor.
    digests = ["".join(file_sha256(folder / name) for name in tensor_files) for folder in directories]
    order = _canonical_order(digests, weights)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        for name in names:
            target = staging / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if name in tensor_files:
                _write_mean([directories[i] / name for i in order], [weights[i] for i in order], target)
            else:
                shutil.copyfile(directories[0] / name, target)
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


def _canonical_order(digests: Sequence[str], weights: Sequence[float]) -> list[int]:
    """An order that follows from the inputs' content: floating-point addition is not associative."""
    return sorted(range(len(digests)), key=lambda i: (weights[i], digests[i]))


def _write_mean(paths: Sequence[Path], weights: Sequence[float], output: Path) -> None:
    """Averages files, summing in the order given; see :func:`average_files`."""
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(path)) for path in paths]
        specs = _common_specs(files, paths)
        written = {
            name: TensorSpec("F32", spec.shape) if spec.dtype in _FLOATS else spec
            for name, spec in specs.items()
        }
        console = Console(stderr=True)
        progress = stack.enter_context(
            Progress(console=console, transient=True, disable=not console.is_terminal)
        )
        task = progress.add_task(f"averaging {len(paths)} models", total=len(specs))
        writer = stack.enter_context(TensorFileWriter(output, written))
        for name, spec in specs.items():
            pieces = _mean_pieces if spec.dtype in _FLOATS else _equal_pieces
            writer.write(name, pieces(name, spec, files, paths, weights))
            progress.advance(task)


def _check_weights(inputs: int, weights: Sequence[float]) -> None:
    if inputs == 0 or inputs != len(weights):
        raise ConfigError(f"a mean needs one weight per input: {inputs} inputs, {len(weights)} weights")
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ConfigError(f"weights of a mean are positive numbers, not {list(weights)}")


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not readable as safetensors: {error}") from None


def _common_specs(files: Sequence[Any], paths: Sequence[Path]) -> dict[str, TensorSpec]:
    """Specs of all tensors, sorted by name, after checking that every file has the same."""
    every = []
    for file in files:
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        every.append({name: TensorSpec(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()})
    first, differences = every[0], []
    for path, specs in zip(paths[1:], every[1:], strict=True):
        differences += [f"{name} is only in {paths[0]}" for name in first if name not in specs]
        differences += [f"{name} is only in {path}" for name in specs if name not in first]
        differences += [
            f"{name} is {first[name].dtype}{list(first[name].shape)} in {paths[0]} and "
            f"{spec.dtype}{list(spec.shape)} in {path}"
            for name, spec in specs.items()
            if name in first and first[name] != spec
        ]
    _refuse_differences(differences)
    return first


def _refuse_differences(differences: Sequence[str]) -> None:
    if not differences:
        return
    more = len(differences) - _SHOWN_DIFFERENCES
    shown = "; ".join(differences[:_SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
    raise ModelError(f"these models cannot be averaged: {shown}")


def _row_ranges(spec: TensorSpec) -> Iterator[slice | None]:
    """Ranges of rows of a bounded number of elements; None stands for a tensor without dimensions."""
    if not spec.shape:
        yield None
        return
    rows = max(1, _ELEMENTS_PER_PIECE // max(1, math.prod(spec.shape[1:])))
    for begin in range(0, spec.shape[0], rows):
        yield slice(begin, begin + rows)


def _piece(file: Any, name: str, rows: slice | None) -> torch.Tensor:
    return file.get_tensor(name) if rows is None else file.get_slice(name)[rows]


def _mean_pieces(
    name: str, spec: TensorSpec, files: Sequence[Any], paths: Sequence[Path], weights: Sequence[float]
) -> Iterator[np.ndarray]:
    whole = math.fsum(weights)
    # Buffers for all pieces of a tensor: allocating per piece would let the heap grow by fragments.
    row = math.prod(spec.shape[1:])
    longest = min(math.prod(spec.shape), max(row, _ELEMENTS_PER_PIECE))
    total_buffer = torch.empty(longest, dtype=torch.float64)
    term_buffer = torch.empty(longest, dtype=torch.float64)
    mean_buffer = torch.empty(longest, dtype=torch.float32)
    for rows in _row_ranges(spec):
        count = 0
        for position, (file, weight) in enumerate(zip(files, weights, strict=True)):
            piece = _piece(file, name, rows).reshape(-1)
            count = piece.numel()
            term = (term_buffer if position else total_buffer)[:count].copy_(piece).mul_(weight)
            if position:
                total_buffer[:count].add_(term)
        mean = mean_buffer[:count].copy_(total_buffer[:count].div_(whole))
        if not math.isfinite(float(mean.sum(dtype=torch.float64))):
            pieces = zip(paths, (_piece(file, name, rows) for file in files), strict=True)
            guilty = [str(path) for path, piece in pieces if not torch.isfinite(piece).all()]
            raise NonFiniteError(f"{name} is not finite in {', '.join(guilty) or 'the mean (overflow)'}")
        yield mean.numpy()


def _equal_pieces(
    name: str, spec: TensorSpec, files: Sequence[Any], paths: Sequence[Path], weights: Sequence[float]
) -> Iterator[np.ndarray]:
    del weights
    for rows in _row_ranges(spec):
        first = _piece(files[0], name, rows)
        for file, path in zip(files[1:], paths[1:], strict=True):
            if not torch.equal(_piece(file, name, rows), first):
                _refuse_differences([f"{name} ({spec.dtype}) has other values in {paths[0]} than in {path}"])
        yield first.numpy()


def _common_files(directories: Sequence[Path]) -> list[str]:
    """Relative paths of the files of a model, after checking that all directories agree on them."""
    listings = [_listing(directory) for directory in directories]
    first, differences = listings[0], []
    for directory, listing in zip(directories[1:], listings[1:], strict=True):
        differences += [f"{name} is only in {directories[0]}" for name in first if name not in listing]
        differences += [f"{name} is only in {directory}" for name in listing if name not in first]
        differences += [
            f"{name} differs between {directories[0]} and {directory}{detail}"
            for name in first
            if name in listing
            and (detail := _difference(directories[0] / name, directory / name)) is not None
        ]
    _refuse_differences(differences)
    if not any(name.endswith(".safetensors") for name in first):
        raise ModelError(f"{directories[0]}: no .safetensors file")
    return first


def _listing(directory: Path) -> list[str]:
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such model directory")
    names = sorted(str(p.relative_to(directory).as_posix()) for p in directory.rglob("*") if p.is_file())
    for name in names:
        if name.endswith(_PICKLES):
            raise ModelError(f"{directory / name}: pickled weights are never loaded; convert to safetensors")
    return [name for name in names if name not in _IGNORED_FILES]


def _difference(left: Path, right: Path) -> str | None:
    """None if two files mean the same, else a remark for the error message (may be empty)."""
    if left.suffix == ".safetensors" or left.read_bytes() == right.read_bytes():
        return None
    if left.suffix != ".json" and left.name != _STANFORD_METADATA:
        return ""
    try:
        a, b = _meaning(left), _meaning(right)
    except ValueError:
        return ""
    if a == b:
        return None
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(key for key in {*a, *b} if a.get(key) != b.get(key))
        return f" in {', '.join(keys[:_SHOWN_DIFFERENCES])}"
    return ""


def _meaning(path: Path) -> Any:
    """A JSON file's content without what does not bear on the model."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict):
        return tree
    if path.name == _STANFORD_METADATA:
        flat = tree.get("config", tree)
        return {key: flat.get(key) for key in _STANFORD_KEYS}
    return {key: value for key, value in tree.items() if key not in _IGNORED_KEYS}
