"""The algebra of means, what is refused, and that memory does not grow."""

from __future__ import annotations

import ctypes
import json
import resource
import threading
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file, save_file

from colbert_core import mean_plan
from colbert_core.averaging import average_files, greedy_soup
from colbert_core.averaging import average_models as average_model_files
from colbert_core.errors import ConfigError, ModelError, NonFiniteError, StorageError
from colbert_core.model_files import local_model

floats = st.floats(-(2.0**100), 2.0**100, width=32)
weight = st.floats(2**-10, 2**10)
few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def weighted(draw: st.DrawFn) -> tuple[np.ndarray, list[float]]:
    """Up to 6 inputs of up to 12 values, [inputs, values] fp32, and their weights."""
    inputs, values = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    stack = draw(hnp.arrays(np.float32, (inputs, values), elements=floats))
    return stack, draw(st.lists(weight, min_size=inputs, max_size=inputs))


def average_models(directories: Sequence[Path], weights: Sequence[float], output: Path) -> None:
    average_model_files([local_model(directory) for directory in directories], weights, output)


def mean_of(directory: Path, stack: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Writes one file per row, averages them, and returns the values read back."""
    paths = []
    for i, row in enumerate(stack):
        paths.append(directory / f"{i}.safetensors")
        save_file({"w": torch.from_numpy(np.array(row))}, paths[-1])
    average_files(paths, weights, directory / "mean.safetensors")
    return load_file(directory / "mean.safetensors")["w"].numpy()


@few
@given(weighted())
def test_the_mean_is_within_one_ulp_of_the_float64_mean(tmp_path, case):
    stack, weights = case
    exact = np.average(stack.astype(np.float64), axis=0, weights=weights)
    got = mean_of(tmp_path, stack, weights)
    # Where terms cancel, float64 itself is only good to an epsilon of the largest term.
    rounding = len(stack) * np.finfo(np.float64).eps * np.abs(stack.astype(np.float64)).max(axis=0)
    assert got.dtype == np.float32
    assert np.all(np.abs(got - exact) <= np.spacing(np.abs(exact).astype(np.float32)) + rounding)


@few
@given(weighted(), st.randoms(use_true_random=False))
def test_the_order_of_the_inputs_changes_no_bit(tmp_path, case, random):
    stack, weights = case
    order = list(range(len(stack)))
    random.shuffle(order)
    given_order = mean_of(tmp_path, stack, weights)
    shuffled = mean_of(tmp_path, stack[order], [weights[i] for i in order])
    assert given_order.tobytes() == shuffled.tobytes()


def test_cancelling_inputs_show_that_the_order_would_matter(tmp_path):
    rows = np.array([[3e30], [1.0], [-3e30]], np.float32)
    plain = {float(np.sum(np.array([rows[i, 0] for i in p], np.float64))) for p in permutations(range(3))}
    assert len(plain) > 1
    ours = {mean_of(tmp_path, rows[list(p)], [1, 1, 1]).tobytes() for p in permutations(range(3))}
    assert len(ours) == 1


@few
@given(weighted())
def test_the_mean_lies_between_its_inputs(tmp_path, case):
    stack, weights = case
    got = mean_of(tmp_path, stack, weights)
    assert np.all(stack.min(axis=0) <= got) and np.all(got <= stack.max(axis=0))


@few
@given(hnp.arrays(np.float32, 8, elements=floats), st.lists(weight, min_size=1, max_size=5))
def test_the_mean_of_one_model_with_itself_is_that_model(tmp_path, row, weights):
    assert np.array_equal(mean_of(tmp_path, [row] * len(weights), weights), row)


@few
@given(weighted(), st.integers(-8, 8))
def test_only_the_ratios_of_the_weights_matter(tmp_path, case, exponent):
    stack, weights = case
    scaled = [w * 2.0**exponent for w in weights]
    assert np.array_equal(mean_of(tmp_path, stack, weights), mean_of(tmp_path, stack, scaled))


def test_tensors_longer_than_a_piece_and_scalars_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(mean_plan, "BLOCK_BYTES", 256)
    monkeypatch.setattr(mean_plan, "_ELEMENTS_AT_ONCE", 10)
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (37, 5), "cube": (3, 4, 5), "empty": (0, 4), "scalar": (), "vector": (7,)}
    models = [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(3)
    ]
    for i, model in enumerate(models):
        save_file(model, tmp_path / f"{i}.safetensors")
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    average_files(paths, [1, 2, 1], tmp_path / "mean.safetensors")
    mean = load_file(tmp_path / "mean.safetensors")
    assert set(mean) == set(shapes)
    for name in shapes:
        a, b, c = (model[name].double() for model in models)
        torch.testing.assert_close(mean[name], ((a + 2 * b + c) / 4).float(), rtol=1e-7, atol=1e-9)


def test_half_precision_inputs_give_an_fp32_mean(tmp_path):
    values = [
        torch.tensor([1.0, 3.0], dtype=torch.bfloat16),
        torch.tensor([1.0078125, 4.0], dtype=torch.bfloat16),
    ]
    for i, value in enumerate(values):
        save_file({"w": value}, tmp_path / f"{i}.safetensors")
    average_files(
        [tmp_path / "0.safetensors", tmp_path / "1.safetensors"], [1, 1], tmp_path / "m.safetensors"
    )
    mean = load_file(tmp_path / "m.safetensors")["w"]
    assert mean.dtype == torch.float32
    assert mean.tolist() == [1.00390625, 3.5]  # the first is no bf16 number


def write(path: Path, **tensors: torch.Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def test_equal_integer_buffers_are_kept_and_others_refused(tmp_path):
    a = write(tmp_path / "a.safetensors", ids=torch.arange(4), flag=torch.tensor([True, False]))
    b = write(tmp_path / "b.safetensors", ids=torch.arange(4), flag=torch.tensor([True, False]))
    c = write(tmp_path / "c.safetensors", ids=torch.arange(4) + 1, flag=torch.tensor([True, False]))
    out = tmp_path / "m.safetensors"
    average_files([a, b], [1, 1], out)
    assert load_file(out)["ids"].tolist() == [0, 1, 2, 3]
    assert load_file(out)["flag"].tolist() == [True, False]
    out.unlink()
    with pytest.raises(ModelError, match=r"ids \(I64\) has other values"):
        average_files([a, c], [1, 1], out)
    assert not out.exists() and not list(tmp_path.glob("*.partial"))


def test_every_difference_of_keys_shapes_and_dtypes_is_listed(tmp_path):
    a = write(
        tmp_path / "a.safetensors", same=torch.ones(2), old=torch.ones(1), s=torch.ones(2, 3), d=torch.ones(1)
    )
    b = write(
        tmp_path / "b.safetensors",
        same=torch.ones(2),
        new=torch.ones(1),
        s=torch.ones(3, 2),
        d=torch.ones(1).half(),
    )
    with pytest.raises(ModelError) as caught:
        average_files([a, b], [1, 1], tmp_path / "m.safetensors")
    message = str(caught.value)
    assert f"old is only in {a}" in message and f"new is only in {b}" in message
    assert "s is F32[2, 3]" in message and "F32[3, 2]" in message
    assert "d is F32[1]" in message and "F16[1]" in message
    assert "same" not in message


def test_a_nan_is_reported_with_its_file_and_tensor(tmp_path):
    a = write(tmp_path / "a.safetensors", w=torch.ones(3))
    b = write(tmp_path / "b.safetensors", w=torch.tensor([1.0, float("nan"), 1.0]))
    with pytest.raises(NonFiniteError, match=r"w is not finite in .*b\.safetensors$"):
        average_files([a, b], [1, 1], tmp_path / "m.safetensors")


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 0.0], [1.0, -1.0], [1.0, float("nan")]])
def test_impossible_weights_are_refused(tmp_path, weights):
    a = write(tmp_path / "a.safetensors", w=torch.ones(3))
    with pytest.raises(ConfigError):
        average_files([a, a], weights, tmp_path / "m.safetensors")


def test_a_damaged_file_is_named(tmp_path):
    a = write(tmp_path / "a.safetensors", w=torch.ones(3))
    b = tmp_path / "b.safetensors"
    b.write_bytes(a.read_bytes()[:-4])
    with pytest.raises(ModelError, match=r"b\.safetensors: not readable"):
        average_files([a, b], [1, 1], tmp_path / "m.safetensors")


def test_a_full_disk_is_a_typed_error_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the disk."""
    a = model_dir(tmp_path / "a", 1.0)
    save_file({"w": torch.ones(500_000)}, a / "model.safetensors")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(StorageError, match=r"averaging into .*out: .*File too large"):
            average_models([a, a], [1, 1], tmp_path / "out")
        with pytest.raises(StorageError, match=r"averaging into .*mean\.safetensors: .*File too large"):
            average_files([a / "model.safetensors"], [1], tmp_path / "mean.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def anonymous_peak_kb(action) -> int:
    """Largest growth of this process's anonymous memory while ``action`` runs."""

    def now() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    ctypes.CDLL(None).malloc_trim(0)  # or memory freed earlier would hide what is allocated now
    start, peak, done = now(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], now() - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        action()
    finally:
        done.set()
        watcher.join()
    return peak[0]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_grows_neither_with_the_inputs_nor_with_a_tensor(tmp_path):
    megabytes = 128
    path = write(tmp_path / "model.safetensors", w=torch.ones(megabytes * 1024, 256))
    average_files([path], [1], tmp_path / "warm.safetensors")
    peak = anonymous_peak_kb(lambda: average_files([path] * 6, [1] * 6, tmp_path / "mean.safetensors"))
    assert peak < megabytes * 1024 / 2  # half of one input, which is one tensor


def model_dir(path: Path, fill: float, **extra: str) -> Path:
    path.mkdir()
    save_file({"w": torch.full((2,), fill)}, path / "model.safetensors")
    write(path / "1_Dense" / "model.safetensors", **{"linear.weight": torch.full((1, 2), fill)})
    files = {
        "config.json": json.dumps({"hidden_size": 2, "transformers_version": f"5.{fill}"}),
        "vocab.txt": "a\nb\n",
        "README.md": f"model {fill}",
        "artifact.metadata": json.dumps({"dim": 1, "query_token_id": "[unused0]", "maxsteps": fill}),
    }
    for name, text in (files | extra).items():
        (path / name.replace("_json", ".json")).write_text(text, encoding="utf-8")
    return path


def test_directories_are_averaged_with_all_their_parts(tmp_path):
    a, b = model_dir(tmp_path / "a", 1.0), model_dir(tmp_path / "b", 2.0)
    average_models([a, b], [3, 1], tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].tolist() == [1.25, 1.25]
    assert load_file(tmp_path / "out" / "1_Dense" / "model.safetensors")["linear.weight"].tolist() == [
        [1.25, 1.25]
    ]
    names = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert names == {
        "model.safetensors",
        "1_Dense/model.safetensors",
        "config.json",
        "vocab.txt",
        "artifact.metadata",
    }
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "out"}
    with pytest.raises(ModelError, match="exists already"):
        average_models([a, b], [3, 1], tmp_path / "out")


def test_a_tensor_that_two_files_hold_stays_one_tensor(tmp_path):
    # Values that cancel, so that a different order of summing gives a different mean.
    values = [torch.tensor([1e30]), torch.tensor([-1e30]), torch.tensor([1.0])]
    seen = set()
    for salt in range(6):  # other bytes beside the tensor, hence other digests and orders
        directories = []
        for i, value in enumerate(values):
            directory = tmp_path / f"{salt}-{i}"
            for j, path in enumerate(("model.safetensors", "1_Dense/model.safetensors")):
                noise = torch.tensor([float((i * 7 + j * 3 + salt * 5) % 11)])
                write(directory / path, shared=value, noise=noise)
            directories.append(directory)
        out = tmp_path / f"out-{salt}"
        average_models(directories, [1, 1, 1], out)
        copies = [load_file(path)["shared"].item() for path in out.rglob("*.safetensors")]
        assert copies[0] == copies[1]
        seen.add(copies[0])
    assert len(seen) > 1  # the orders did differ between the salts


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"vocab.txt": "a\nc\n"}, r"vocab\.txt differs"),
        ({"config_json": json.dumps({"hidden_size": 3})}, r"config\.json differs .* in hidden_size"),
        (
            {"artifact.metadata": json.dumps({"dim": 1, "query_token_id": "[Q]"})},
            r"artifact\.metadata differs .* in query_token_id",
        ),
        ({"merges.txt": "a b"}, r"merges\.txt is only in .*b"),
        ({"pytorch_model.bin": ""}, r"pickled weights are never loaded"),
    ],
)
def test_models_with_another_config_or_tokenizer_are_refused_by_name(tmp_path, extra, message):
    a, b = model_dir(tmp_path / "a", 1.0), model_dir(tmp_path / "b", 2.0, **extra)
    with pytest.raises(ModelError, match=message):
        average_models([a, b], [1, 1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_greedy_soup_takes_only_what_raises_the_metric():
    single = {"a": 0.5, "b": 0.7, "c": 0.6, "d": 0.4}
    sets = {"bc": 0.72, "bca": 0.72, "bcd": 0.75}

    def score(chosen: Sequence[str]) -> float:
        return single[chosen[0]] if len(chosen) == 1 else sets["".join(chosen)]

    soup = greedy_soup(list("abcd"), score)
    assert soup.chosen == ("b", "c", "d") and soup.score == 0.75
    # "a" left the metric where it was, so it stayed out.
    assert [("".join(chosen), value) for chosen, value in soup.trials[4:]] == [
        ("bc", 0.72),
        ("bca", 0.72),
        ("bcd", 0.75),
    ]


def test_a_greedy_soup_needs_candidates_and_finite_scores():
    with pytest.raises(ConfigError, match="no candidates"):
        greedy_soup([], lambda chosen: 0.0)
    with pytest.raises(NonFiniteError, match="metric of a is nan"):
        greedy_soup(["a"], lambda chosen: float("nan"))
