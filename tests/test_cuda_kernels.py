"""The CUDA kernels: they compile for every GPU, and their source, run on the CPU, equals the numpy references.

What the references say of a model is held against torch here too. Each equality test is shown to notice faults that
are planted in the source.
"""

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels import cuda_compile
from kernels.cuda_compile import ARCHITECTURES, SOURCES, compile_for_host, compile_kernels, nvcc
from kernels.errors import BundleError
from kernels.preprocess import BITS, COLOURS, STAGED, affine, crop, normalise, nv12_to_rgb, plan
from kernels.ring import LONGEST, WIDEST, advance, append, gather_rows, ring_attention
from kernels.saliency import Calibration, background, crossings, row_saliency, saliency, units
from models.temporal import Attention

NAMES = sorted(path.stem for path in SOURCES.glob("*.cu"))
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is absent: nothing runs the kernels here")


class Kernels:
    """A .cu file on the CPU. Arrays are passed as pointers, None as NULL, int and float as the kernel's own."""

    def __init__(self, name: str, folder: Path) -> None:
        self._library = ctypes.CDLL(str(compile_for_host(name, folder)))

    def launch(self, kernel: str, grid: tuple[int, int], block: int, *arguments: object) -> None:
        values = [_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        self._library[f"launch_{kernel}"](*grid, block, pointers)


def _value(argument: object) -> ctypes.c_void_p | ctypes.c_int | ctypes.c_float:
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        return ctypes.c_void_p(argument.ctypes.data)
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    assert argument is None or isinstance(argument, int)
    return ctypes.c_void_p(None) if argument is None else ctypes.c_int(argument)


@pytest.fixture(scope="module")
def preprocessing(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels("preprocess", tmp_path_factory.mktemp("preprocess"))


@pytest.fixture(scope="module")
def rings(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels("ring", tmp_path_factory.mktemp("ring"))


@pytest.fixture(scope="module")
def scoring(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels("saliency", tmp_path_factory.mktemp("saliency"))


# ---- compilers


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_compiles_for_every_gpu(name: str, arch: str) -> None:
    try:
        nvcc()
    except BundleError as error:
        pytest.skip(str(error))
    assert compile_kernels(name, arch)[:4] == b"\x7fELF"


def test_a_source_that_does_not_compile_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(SOURCES / "host.h", tmp_path)
    (tmp_path / "odd.cu").write_text('extern "C" __global__ void odd() { missing(); }\n')
    monkeypatch.setattr(cuda_compile, "SOURCES", tmp_path)
    with pytest.raises(BundleError, match=r"there is no kernel .*absent\.cu"):
        compile_kernels("absent", "sm_90")
    if shutil.which("g++"):
        with pytest.raises(BundleError, match=r"g\+\+ failed: .*missing") as caught:
            compile_for_host("odd", tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "constant", "value"),
    [
        ("preprocess", "STAGED", STAGED),
        ("preprocess", "BITS", BITS),
        ("ring", "WIDEST", WIDEST),
        ("ring", "LONGEST", LONGEST),
    ],
)
def test_both_languages_mean_the_same_constant(name: str, constant: str, value: int) -> None:
    assert f"constexpr int {constant} = {value};" in (SOURCES / f"{name}.cu").read_text()


def test_compilers_that_are_missing_say_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_compile, "_compilers", lambda: iter([tmp_path / "nvcc"]))
    with pytest.raises(BundleError, match="nvcc is missing: pip install nvidia-cuda-nvcc nvidia-cuda-cccl"):
        nvcc()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BundleError, match=r"g\+\+ is missing: apt install g"):
        compile_for_host("ring", tmp_path)


# ---- preprocess


def check_crop(kernels: Kernels, height: int, width: int, resize: int, size: int, colour: str | None) -> None:
    """Image 1 of a batch of 3, from rows with a pitch."""
    rng, pad = np.random.default_rng(height), 6
    if colour is None:
        frame = rng.integers(0, 256, (height, 3 * width + pad), dtype=np.uint8)
        pixels, chroma, matrix = frame[:, : 3 * width].reshape(height, width, 3), None, None
    else:
        frame = rng.integers(0, 256, (height, width + pad), dtype=np.uint8)
        chroma = rng.integers(0, 256, (-(-height // 2), width + width % 2 + pad), dtype=np.uint8)
        tints = chroma[:, : width + width % 2].reshape(len(chroma), -1, 2)
        matrix = COLOURS[colour]
        pixels = nv12_to_rgb(frame[:, :width], tints, matrix)
    planned = plan(height, width, resize=resize, size=size)
    columns, rows, per_block = planned.columns, planned.rows, min(planned.per_block, 9)
    narrow = np.zeros((3, planned.row_count, size), np.uint8)
    kernels.launch(
        "resample_rows", (-(-size // per_block), planned.row_count), 16, frame, frame.strides[0], chroma,
        0 if chroma is None else chroma.strides[0], matrix, columns.first, columns.weights, len(columns.weights), size,
        per_block, planned.first_row, narrow,
    )  # fmt: skip
    batch = np.full((3, 3, size, size), 7, np.float16)
    kernels.launch(
        "resample_columns", (-(-size // 16), 3 * size), 16, narrow, rows.first, rows.weights, len(rows.weights), size,
        planned.row_count, affine(MEAN, STD), batch, 1,
    )  # fmt: skip
    expected = normalise(crop(pixels, resize=resize, size=size), MEAN, STD)
    apart = np.abs(batch[1].astype(np.float32) - expected.astype(np.float32)).max((1, 2))
    assert (apart <= 1 / 255 / np.array(STD)).all(), apart
    # Pillow's integers: no pixel differs, but fp16 may be rounded the other way after a fused multiply and add.
    assert colour is not None or (apart <= 0.003).all(), apart
    assert (batch[[0, 2]] == 7).all()


@needs_compiler
@pytest.mark.parametrize("shape", [(90, 160), (64, 48), (37, 53), (16, 16), (9, 14), (201, 75)])
@pytest.mark.parametrize("colour", [None, "bt601", "bt709-full"])
def test_the_crop_on_the_gpu_is_pillows(preprocessing: Kernels, shape: tuple[int, int], colour: str | None) -> None:
    check_crop(preprocessing, *shape, resize=32, size=28, colour=colour)


# ---- ring


def ring_inputs(heads: int, window: int, size: int, stored: type[np.floating]) -> list[NDArray[Any]]:
    """Rows of every fill, twice: the second half of them partly idle. Slots that were never written hold anything."""
    rng = np.random.default_rng(window)
    count = np.array([0, 1, window - 1, window, window + 1, 10**6 + 3] * 2, np.int64)
    rows = len(count)
    now = [rng.normal(size=(rows, heads, size)).astype(np.float32) for _ in range(3)]
    now[0] /= np.float32(size**0.5)
    past = [rng.normal(size=(rows, heads, window, size)).astype(stored) for _ in range(2)]
    rates = np.tile(10_000.0 ** (-np.arange(0, size, 2) / size), 2).astype(np.float32)
    active = np.arange(rows) % 3 != 1
    active[: rows // 2] = True
    return [*now, *past, count, rates, active.astype(np.uint8)]


def check_ring(
    kernels: Kernels, heads: int, window: int, size: int, stored: type[np.floating] = np.float32, block: int = 32
) -> None:
    inputs = ring_inputs(heads, window, size, stored)
    copies = [array.copy() for array in inputs]
    expected = ring_attention(*inputs)
    mixed = np.full_like(expected, 9)
    name = "ring_attention" if stored is np.float32 else "ring_attention_half"
    kernels.launch(name, (heads, len(mixed)), block, *copies, window, size, mixed)
    np.testing.assert_allclose(mixed, expected, atol=1e-5)
    for ring, written in zip(inputs[3:5], copies[3:5], strict=True):
        np.testing.assert_allclose(written, ring, atol=1e-5 if stored is np.float32 else 2e-3)
    np.testing.assert_array_equal(copies[5], inputs[5])  # the count is another kernel's
    idle = inputs[7] == 0
    assert not mixed[idle].any() and idle.any()


@needs_compiler
@pytest.mark.parametrize(
    ("heads", "window", "size", "block"), [(2, 4, 6, 32), (1, 1, 2, 16), (3, 16, 32, 32), (2, 33, 20, 48)]
)
@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_ring_attention(
    rings: Kernels, heads: int, window: int, size: int, block: int, stored: type[np.floating]
) -> None:
    check_ring(rings, heads, window, size, stored, block)


@needs_compiler
def test_ring_attention_at_its_largest(rings: Kernels) -> None:
    check_ring(rings, 1, 128, 128, block=128)


@needs_compiler
@pytest.mark.parametrize("active", [None, np.array([1, 0, 1, 1], np.uint8)])
def test_rings_take_columns_and_rows_move(rings: Kernels, active: NDArray[np.uint8] | None) -> None:
    rng, count = np.random.default_rng(0), np.array([0, 4, 5, 10**6 + 3], np.int64)
    for stored, name in ((np.float32, "append"), (np.float16, "append_half")):
        ring: NDArray[Any] = rng.normal(size=(4, 3, 5, 7)).astype(stored)
        columns, written = rng.normal(size=(4, 3, 7)).astype(np.float32), ring.copy()
        append(ring, columns, count, active)
        rings.launch(name, (4, 1), 16, written, columns, count, active, 3, 5, 7)
        np.testing.assert_array_equal(written, ring)
    counted = count.copy()
    advance(count, active)
    rings.launch("advance", (2, 1), 3, counted, active, 4)
    np.testing.assert_array_equal(counted, count)
    place = np.array([3, -1, 0, 0, -1, 2], np.int32)
    for old in (ring[..., :6].copy(), columns, count):
        gathered = np.full((6, *old.shape[1:]), 9, old.dtype)
        rings.launch("gather_rows", (6, 1), 16, old, gathered, place, old[0].nbytes // 4)
        np.testing.assert_array_equal(gathered, gather_rows(old, place))
        assert not gathered[1].any() and (gathered[0] == old[3]).all()


@pytest.mark.parametrize(("width", "heads", "window"), [(24, 3, 5), (16, 1, 1), (64, 2, 16)])
def test_the_reference_is_the_attention_of_the_model(width: int, heads: int, window: int) -> None:
    """Row 0 sees every window, row 1 every third, row 2 begins after a million."""
    torch.manual_seed(0)
    attention = Attention(width, heads)
    count = np.array([0, 0, 10**6 + 1], np.int64)
    keys, values = (np.zeros((3, heads, window, width // heads), np.float32) for _ in range(2))
    torch_keys, torch_values = torch.zeros(keys.shape), torch.zeros(values.shape)
    history, columns = np.zeros((3, 1, 4, width), np.float32), np.zeros((3, 1, width), np.float32)
    with torch.no_grad():
        for step in range(2 * window + 3):
            x, seen = torch.randn(3, width), torch.tensor(count)
            out, key, value = attention.ring(x, torch_keys, torch_values, attention.turn(seen, window))
            active = np.array([1, step % 3 == 0, 1], np.uint8)
            new = (attention._scaled(x), attention.key(x), attention.value(x))
            query, own, given = (each.view(3, heads, -1).numpy() for each in new)
            mixed = ring_attention(query, own, given, keys, values, count, attention.rates.numpy(), active)
            got = attention.out(torch.tensor(mixed).flatten(1))
            for row in np.flatnonzero(active):
                torch_keys[row, :, count[row] % window] = key[row]
                torch_values[row, :, count[row] % window] = value[row]
                torch.testing.assert_close(got[row], out[row], atol=1e-5, rtol=1e-4)
            np.testing.assert_allclose(keys, torch_keys.numpy(), atol=1e-5)
            np.testing.assert_allclose(values, torch_values.numpy(), atol=1e-6)
            columns[:] = x[:, None].numpy()
            append(history, columns, count, active)
            assert (history[0, 0, count[0] % 4] == x[0].numpy()).all()
            advance(count, active)
    assert count.tolist() == [2 * window + 3, -(-(2 * window + 3) // 3), 10**6 + 2 * window + 4]


# ---- saliency

CALIBRATION = Calibration(floor=0.3, centre=1.0, slope=1.5, temperature=0.05)


def unit(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    vectors = rng.normal(size=shape).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors


def check_saliency(kernels: Kernels, texts: int, width: int = 36, block: int = 32) -> None:
    """Three ticks of the same rows; the second stream brings nothing at the second of them."""
    rng, rows, streams = np.random.default_rng(texts), 45, 6
    queries, distractors = unit(rng, rows, width), unit(rng, texts, width)
    row_stream = rng.integers(0, streams, rows).astype(np.int32)
    level, spread = (rng.uniform(low, 0.3, rows).astype(np.float32) for low in (-0.1, 0.05))
    threshold = rng.uniform(0.01, 0.5, rows).astype(np.float32)
    state, written = np.zeros(rows, np.uint8), np.zeros(rows, np.uint8)
    common, crossed = np.full(streams, 9, np.float32), np.array([3], np.int32)
    vectors = np.zeros((streams, width), np.float32)
    scores = np.full(rows, 9, np.float32)
    which, what = np.zeros(5 * rows, np.int32), np.zeros(5 * rows, np.float32)  # a faulty counter writes on and on
    seen = 0
    for tick in range(3):
        windows = rng.normal(size=(streams, width)).astype(np.float32)
        windows[1] = np.nan if tick == 1 else windows[1]
        _, score = row_saliency(windows, row_stream, queries, level, spread, CALIBRATION, distractors)
        threshold[:5] = score[:5] if tick == 0 else threshold[:5]
        kernels.launch(
            "stream_background", (streams, 1), block, windows, distractors, texts, width, CALIBRATION.floor,
            CALIBRATION.temperature, vectors, common, crossed,
        )  # fmt: skip
        np.testing.assert_allclose(vectors, units(windows, CALIBRATION.floor), atol=1e-5)
        expected = background(units(windows, CALIBRATION.floor), distractors, CALIBRATION.temperature)
        np.testing.assert_allclose(common, expected, atol=1e-5)
        if tick == 0:  # ties to the bit, whatever the last bit is
            kernels.launch(
                "row_saliency", (-(-rows // (block // 16)), 1), block, vectors, common, row_stream, queries, level,
                spread, threshold, rows, width, CALIBRATION.centre, CALIBRATION.slope, written.copy(), crossed.copy(),
                which, what, scores,
            )  # fmt: skip
            threshold[:5] = scores[:5]
            score[:5] = scores[:5]
        kernels.launch(
            "row_saliency", (-(-rows // (block // 16)), 1), block, vectors, common, row_stream, queries, level, spread,
            threshold, rows, width, CALIBRATION.centre, CALIBRATION.slope, written, crossed, which, what,
            None if tick == 2 else scores,
        )  # fmt: skip
        if tick < 2:
            np.testing.assert_allclose(scores, score, atol=1e-5)
        found = crossings(score, threshold, state)
        order = np.argsort(which[: crossed[0]])
        np.testing.assert_array_equal(which[: crossed[0]][order], found)
        np.testing.assert_allclose(what[: crossed[0]][order], score[found], atol=1e-5)
        np.testing.assert_array_equal(written, state)
        assert tick != 0 or set(range(5)) <= set(found)  # a tie is at the threshold
        assert tick != 1 or not (row_stream[found] == 1).any()
        seen += len(found)
    assert seen > 10


@needs_compiler
@pytest.mark.parametrize("texts", [0, 1, 63, 150])
def test_saliency_and_crossings(scoring: Kernels, texts: int) -> None:
    check_saliency(scoring, texts)


def test_one_window_is_the_rows_of_one_stream() -> None:
    rng = np.random.default_rng(0)
    window, queries, distractors = rng.normal(size=8).astype(np.float32), unit(rng, 5, 8), unit(rng, 7, 8)
    level, spread = np.full(5, 0.1, np.float32), np.full(5, 0.2, np.float32)
    for texts in (None, distractors):
        alone = saliency(window, queries, level, spread, CALIBRATION, texts)
        rows = row_saliency(window[None], np.zeros(5, np.int32), queries, level, spread, CALIBRATION, texts)
        for one, other in zip(alone, rows, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)
            assert one.dtype == np.float32


def test_distractors_quiet_what_resembles_everything() -> None:
    rng = np.random.default_rng(1)
    v = unit(rng, 1, 8)
    answers = unit(rng, 4, 8)
    plain = np.log(np.mean(np.exp((answers @ v[0]).astype(np.float64) / 0.05)))
    np.testing.assert_allclose(background(v, answers, 0.05), plain, atol=1e-5)
    assert np.isfinite(background(v, answers, 1e-3)).all()  # exp(1000) is not
    with pytest.raises(ValueError, match="distractors need a temperature above 0, not 0"):
        background(v, answers, 0.0)


def test_crossings_go_both_ways_once() -> None:
    threshold, state = np.full(4, 0.5, np.float32), np.array([0, 0, 1, 1], np.uint8)
    score = np.array([0.5, np.nan, 0.49, np.nan], np.float32)
    assert crossings(score, threshold, state).tolist() == [0, 2]
    assert state.tolist() == [1, 0, 0, 1]
    assert crossings(score, threshold, state).tolist() == []


# ---- planted faults


@needs_compiler
@pytest.mark.parametrize(
    ("name", "right", "wrong", "check"),
    [
        ("preprocess", "weights[tap * size + column]", "weights[column * taps + tap]", (90, 160, 32, 28, None)),
        ("preprocess", "colours[x / 2 * 2 + 1]", "colours[x / 2 * 2]", (64, 48, 32, 28, "bt601")),
        ("preprocess", "HALF = 1 << (BITS - 1)", "HALF = 0", (64, 48, 32, 28, None)),
        ("ring", "at > slot]", "at < slot]", (2, 4, 6)),
        ("ring", "(int)(count % window)", "(int)((count + 1) % window)", (2, 4, 6)),
        ("ring", "at != slot && at < seen))", "at < seen))", (2, 4, 6)),
        ("ring", "-x[channel + half] : x", "x[channel + half] : -x", (2, 4, 6)),
        ("saliency", "score >= threshold[row]", "score > threshold[row]", (3,)),
        ("saliency", "score == score && ", "", (3,)),
        ("saliency", "*crossed = 0;", ";", (3,)),
        ("saliency", "expf(highest[each] - most) + expf", "1.0f + expf", (150,)),
    ],
)
def test_the_equality_tests_notice_a_fault(
    name: str, right: str, wrong: str, check: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (SOURCES / f"{name}.cu").read_text()
    assert right in source
    (tmp_path / f"{name}.cu").write_text(source.replace(right, wrong))
    shutil.copy(SOURCES / "host.h", tmp_path)
    monkeypatch.setattr(cuda_compile, "SOURCES", tmp_path)
    checks: dict[str, Callable[..., None]] = {"preprocess": check_crop, "ring": check_ring, "saliency": check_saliency}
    broken = Kernels(name, tmp_path)
    with pytest.raises(AssertionError):
        checks[name](broken, *check)
