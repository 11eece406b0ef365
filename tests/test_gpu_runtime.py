"""The GPU's half of the run half, as far as a machine without a GPU can tell.

Our own kernels run for real here, from their own sources, on the processor (kernels/cuda/host.h): what is tested is
which of them are launched, with what, in which order. What CUDA and TensorRT do is for `python -m bench.gpu`.
"""

import ctypes
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

from bench.gpu_kernels import check_kernels
from bench.roofline import make_card
from kernels.bundle import EMBEDDED, HeadShape, load_manifest
from kernels.cuda_compile import SOURCES, compile_for_host
from kernels.device import Device, DeviceArray, Kernel, Staging
from kernels.errors import BundleError, InputError
from kernels.gpu_kernels import Crops, DeviceRows
from kernels.gpu_runtime import GpuRuntime, batches, check_capability, check_shape
from kernels.head import Head, HeadState, HostRows, Maps, Rows
from kernels.preprocess import crop, normalise
from kernels.tensorrt import load_module

SHAPE = HeadShape(2, 3, 8, 2, 5, 6, 1.0, 0.0, 1.0)  # K, W, C, H, reach, E
COLUMNS = {"keys_0": (2, 4), "keys_1": (2, 4), "values_0": (2, 4), "values_1": (2, 4), "history": (6,)}
TYPES = {"P": ctypes.c_void_p, "i": ctypes.c_int, "q": ctypes.c_longlong, "f": ctypes.c_float}
PROFILES = {"rows": [1, 16, 1000], "words": [3, 12, 77], "streams": [1, 1, 8]}


PLANTED = [  # what is right in a source, and what a careless hand would make of it
    ("preprocess", "staged[x - left] = packed(", "staged[x - left] = 1 + packed("),
    ("preprocess", "channel(colour, luma, blue, red)", "channel(colour, luma, red, blue)"),
    ("preprocess", "+ affine[3 + channel]", "- affine[3 + channel]"),
    ("ring", "const int slot = (int)(count % window);", "const int slot = (int)((count + 1) % window);"),
    ("ring", "const int slot = (int)(counts[row] % length);", "const int slot = (int)((counts[row] + 1) % length);"),
    ("ring", "from < 0 ? 0 :", "from < 1 ? 0 :"),
    ("saliency", "1.0f / sqrtf(total)", "1.0f / total"),
]


def has_gpu() -> bool:
    try:
        Device()
    except BundleError:
        return False
    return True


class HostDevice(Device):
    """The processor and its memory in place of a GPU and its own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._libraries = folder, dict[str, ctypes.CDLL]()
        self.name, self.compute_capability = "the processor", "0.0"

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> DeviceArray:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert size, "CUDA gives no memory of no size"
        owner = np.full(size, 0xAB, np.uint8)  # anything
        return DeviceArray(owner.ctypes.data, tuple(shape), np.dtype(dtype), size, owner)

    def zero(self, array: DeviceArray) -> None:
        seen(array)[...] = 0

    def write(self, target: DeviceArray, values: NDArray[Any]) -> None:
        assert target.shape == values.shape
        seen(target)[...] = values

    def read(self, arrays: Sequence[DeviceArray]) -> list[NDArray[Any]]:
        return [seen(array).copy() for array in arrays]

    def synchronize(self) -> None:
        pass

    def kernel(self, source: str, name: str, signature: str) -> Kernel:
        assert signature == declared(source, name)
        if source not in self._libraries:
            self._libraries[source] = ctypes.CDLL(str(compile_for_host(source, self._folder)))
        return Kernel(HostFunction(self._libraries[source][f"launch_{name}"], signature), None)


class HostFunction:
    """Called as PyCUDA's functions are."""

    def __init__(self, launch: Callable[..., None], signature: str) -> None:
        self._launch, self._types = launch, [TYPES[letter] for letter in signature]

    def prepared_async_call(
        self, grid: tuple[int, int, int], block: tuple[int, int, int], stream: None, *given: Any
    ) -> None:
        values = [kind(each) for kind, each in zip(self._types, given, strict=True)]
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(each) for each in values))
        assert grid[2] == 1 and block[1:] == (1, 1)
        self._launch(grid[0], grid[1], block[0], places)


def seen(array: DeviceArray) -> NDArray[Any]:
    memory: NDArray[np.uint8] = array.owner
    return memory[: array.nbytes].view(array.dtype).reshape(array.shape)


def declared(source: str, name: str) -> str:
    """The parameters of a kernel, as its source has them, in the letters of `Device.kernel`."""
    text = re.sub(r"//.*", "", (SOURCES / f"{source}.cu").read_text()).replace("\\\n", "\n")
    pattern = rf"__global__ void\s+(?:__launch_bounds__\(\w+\)\s+)?{name.removesuffix('_half')}(?:##suffix)?\(([^)]*)\)"
    found = re.search(pattern, text)
    assert found, f"{source}.cu has no kernel {name}"
    kinds = {"int": "i", "long long": "q", "float": "f"}
    return "".join("P" if "*" in each else kinds[each.strip().rsplit(" ", 1)[0]] for each in found[1].split(","))


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> HostDevice:
    if shutil.which("g++") is None:
        pytest.skip("g++ is missing")
    return HostDevice(tmp_path_factory.mktemp("kernels"))


# -- rows


def query(rng: np.random.Generator, words: int) -> Maps:
    shapes = {"word_tokens_0": (words, 8), "word_keys_0": (2, words, 4), "query_bias": (words,), "query_pooled": (8,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def columns(rng: np.random.Generator, rows: int) -> dict[str, NDArray[np.float32]]:
    return {f"new_{name}": rng.normal(size=(rows, *size)).astype(np.float32) for name, size in COLUMNS.items()}


class Past:
    """One row in the plainest way: its query, and every column that it was given."""

    def __init__(self, maps: Maps) -> None:
        self.maps = maps
        self.columns: list[dict[str, NDArray[np.float32]]] = []

    def ring(self, name: str, length: int) -> NDArray[np.float32]:
        ring = np.zeros((length, *COLUMNS[name]), np.float32)
        for window, column in enumerate(self.columns):
            ring[window % length] = column[name]
        return ring if name == "history" else ring.swapaxes(0, 1)


def go_on(past: list[Past], states: list[HeadState], new: dict[str, NDArray[np.float32]], device: HostDevice) -> None:
    """A window more, in both stores and in the plain list."""
    for row, each in enumerate(past):
        each.columns.append({name: new[f"new_{name}"][row] for name in COLUMNS})
    for state in states:
        state.inputs()  # as a step does
    states[0].append(new)
    states[1].append({name: device.upload(each) for name, each in new.items()})


def test_rows_remember_what_they_were_given_on_either_machine(device: HostDevice) -> None:
    """Queries come, go and are reset at random; both stores hold what a plain list of the past holds, bit for bit."""
    rng = np.random.default_rng(3)
    states = [HeadState(HostRows(SHAPE)), HeadState(DeviceRows(device, SHAPE))]
    past: list[Past] = []
    for window in range(60):
        if window % 3 == 0 or not past:
            maps = query(rng, words=int(rng.integers(2, 7)))
            past.append(Past(maps))
            for state in states:
                state.add(maps)
        if window % 4 == 1:
            row = int(rng.integers(len(past)))
            del past[row]
            for state in states:
                state.remove(row)
        if window % 7 == 5:  # others, with a past of their own, join
            joining = [Past(query(rng, words=int(rng.integers(2, 7)))) for _ in range(int(rng.integers(0, 3)))]
            others = [HeadState(HostRows(SHAPE)), HeadState(DeviceRows(device, SHAPE))]
            for each, other in itertools.product(joining, others):
                other.add(each.maps)
            for _ in range(4 if joining else 0):
                go_on(joining, others, columns(rng, len(joining)), device)
            for state, other in zip(states, others, strict=True):
                state.absorb(other)
            past += joining
        if window == 40:
            past = [Past(each.maps) for each in past]
            for state in states:
                state.reset()
        if not past:
            continue
        for state in states:
            given = {
                name: seen(each) if isinstance(each, DeviceArray) else each for name, each in state.inputs().items()
            }
            assert given["count"].tolist() == [len(each.columns) for each in past]
            for name in COLUMNS:
                length = SHAPE.reach if name == "history" else SHAPE.window
                np.testing.assert_array_equal(given[name], np.stack([each.ring(name, length) for each in past]))
            for row, each in enumerate(past):
                words = len(each.maps["query_bias"])
                np.testing.assert_array_equal(given["word_tokens_0"][row, :words], each.maps["word_tokens_0"])
                np.testing.assert_array_equal(given["word_keys_0"][row, :, :words], each.maps["word_keys_0"])
                np.testing.assert_array_equal(given["query_pooled"][row], each.maps["query_pooled"])
                assert (given["query_bias"][row, words:] == -np.inf).all()
        go_on(past, states, columns(rng, len(past)), device)
    assert max(len(each.columns) for each in past) > SHAPE.reach, "the rings went round"


def test_rows_go_to_other_memory_only_when_they_move(device: HostDevice) -> None:
    """Between windows nothing is copied: a CUDA graph that read the rings once may read them again."""
    rng, state = np.random.default_rng(0), HeadState(DeviceRows(device, SHAPE))
    state.add(query(rng, 4))
    before = {name: each.pointer for name, each in state.inputs().items() if isinstance(each, DeviceArray)}
    for _ in range(3):
        state.append({name: device.upload(each) for name, each in columns(rng, 1).items()})
        after = {name: each.pointer for name, each in state.inputs().items() if isinstance(each, DeviceArray)}
        assert after == before
    state.remove(0)
    assert len(state.inputs()["count"]) == 0, "and without any row nothing is allocated"


class Step:
    """A step of a head with no mathematics."""

    def __init__(self, *inputs: str) -> None:
        self.inputs = list(inputs)
        self.given: dict[str, Any] = {}

    def __call__(self, **inputs: Any) -> Mapping[str, Any]:
        self.given = inputs
        return columns(np.random.default_rng(0), len(inputs["count"]))


@pytest.mark.parametrize("many", [True, False])
def test_a_graph_of_many_streams_is_told_that_all_rows_watch_the_only_one(many: bool) -> None:
    step = Step("video_tokens", "count", *(["row_stream"] if many else []))
    made: list[Rows] = []

    def rows(shape: HeadShape) -> Rows:
        made.append(HostRows(shape))
        return made[-1]

    head, rng = Head(SHAPE, step, step, step, rows), np.random.default_rng(0)
    state = head.new_state()
    for _ in range(3):
        state.add(query(rng, 4))
    head.step({"video_tokens": np.zeros((2, 5, 8), np.float32)}, state)
    assert len(made) == 1 and state.rings is made[0].rings
    assert step.given["video_tokens"].shape == (1, 2, 5, 8)
    if many:
        assert step.given["row_stream"].dtype == np.int64 and step.given["row_stream"].tolist() == [0, 0, 0]
    else:
        assert "row_stream" not in step.given


# -- frames


@pytest.mark.parametrize("frame", [(45, 80), (80, 45), (24, 24), (23, 301)])
def test_pixels_are_those_of_the_cpu(frame: tuple[int, int], device: HostDevice) -> None:
    manifest = replace(
        load_manifest(EMBEDDED), image_resize=20, image_size=16, mean=[127.0, 120.0, 99.0], std=[128.0, 64.0, 60.0]
    )
    crops, rng = Crops(device, manifest), np.random.default_rng(sum(frame))
    for _ in range(2):  # the plan of a size is made once
        frames = [rng.integers(0, 256, (*size, 3), np.uint8) for size in (frame, (30, 40))]
        found = seen(crops(frames))
        assert found.dtype == np.float16 and found.shape == (2, 3, 16, 16)
        mean, std = ([value / 255 for value in each] for each in (manifest.mean, manifest.std))
        want = np.stack([normalise(crop(each, resize=20, size=16), mean, std) for each in frames])
        np.testing.assert_array_equal(found, want)
        plain = (crop(frames[0], resize=20, size=16) - np.array(manifest.mean)) / np.array(manifest.std)
        np.testing.assert_allclose(found[0].transpose(1, 2, 0), plain, atol=2e-3)


# -- copies


def test_pieces_of_staging_memory_never_meet_before_all_copies_are_done() -> None:
    rng, allocated = np.random.default_rng(0), list[NDArray[np.uint8]]()
    in_use: list[tuple[NDArray[np.uint8], int]] = []

    def allocate(size: int) -> NDArray[np.uint8]:
        allocated.append(np.zeros(size, np.uint8))
        return allocated[-1]

    def wait() -> None:
        for piece, number in in_use:
            assert (piece == number).all(), "it was written to while it was copied"
        in_use.clear()

    staging = Staging(allocate, wait)
    for number in range(300):
        size = int(rng.integers(1, 5000))
        piece = staging.take(size)
        assert piece.shape == (size,) and (piece.ctypes.data - allocated[-1].ctypes.data) % 256 == 0
        piece[:] = number % 251
        in_use.append((piece, number % 251))
        if number % 50 == 49:
            wait()
            staging.release()
    assert len(allocated) < 10 and len(allocated[-1]) <= 10_000
    assert staging.take(0).size == 0


def test_samples_are_given_as_an_engine_takes_them() -> None:
    tokens, mask = np.arange(14).reshape(7, 2), np.ones((7, 2))
    parts = list(batches({"tokens": tokens, "mask": mask}, most=3))
    assert [len(part["mask"]) for part in parts] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([part["tokens"] for part in parts]), tokens)
    rows = {"video_tokens": np.ones((1, 2)), "count": np.zeros(7)}
    assert list(batches(rows, most=1)) == [rows], "rows of one window stay together"


# -- what an engine takes


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((1200, 12, 8), "1200 rows, this engine takes 1000"),
        ((16, 78, 8), "78 words, this engine takes 77"),
        ((16, 2, 8), "2 words, this engine takes no fewer than 3"),
        ((16, 12, 9), "9 on axis 2 of word_tokens_0, this engine takes 8"),
        ((16, 12), "word_tokens_0 has 2 axes, this engine takes 3"),
    ],
)
def test_a_shape_beyond_the_profile_is_told_in_one_line(shape: tuple[int, ...], says: str) -> None:
    limits = (1, 3, 8), (16, 12, 8), (1000, 77, 8)
    with pytest.raises(InputError, match=f"^{says}$"):
        check_shape("word_tokens_0", shape, limits, PROFILES)
    for fits in limits:
        check_shape("word_tokens_0", fits, limits, PROFILES)


def test_a_bundle_for_other_gpus_is_refused_in_one_line() -> None:
    manifest = replace(load_manifest(EMBEDDED), compute_capabilities=["8.6", "8.9"])
    check_capability(Path("b"), manifest, "L4", "8.9")
    check_capability(Path("b"), replace(manifest, compute_capabilities=[]), "T4", "7.5")  # built on this very machine
    with pytest.raises(BundleError, match=r"^b is built for .* 8\.6, 8\.9, this one, T4, has 7\.5: build it for that$"):
        check_capability(Path("b"), manifest, "T4", "7.5")


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_a_machine_without_gpu_says_so_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"PyCUDA|NVIDIA GPU") as caught:
        GpuRuntime(tmp_path, load_manifest(EMBEDDED))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not find_spec("tensorrt_rtx_bindings"), reason="tensorrt-rtx-cu13-bindings is missing")
def test_what_is_called_of_tensorrt_rtx_is_there() -> None:
    trt = load_module("tensorrt-rtx")
    used = {
        "Runtime": ["deserialize_cuda_engine"],
        "ICudaEngine": [
            *("num_io_tensors", "get_tensor_name", "get_tensor_mode", "get_tensor_dtype", "get_tensor_shape"),
            *("get_tensor_profile_shape", "create_runtime_config", "create_execution_context"),
        ],
        "IExecutionContext": [
            *("set_input_shape", "set_tensor_address", "infer_shapes", "get_tensor_shape", "execute_async_v3"),
        ],
        "IRuntimeConfig": ["cuda_graph_strategy"],
        "CudaGraphStrategy": ["WHOLE_GRAPH_CAPTURE"],
        "TensorIOMode": ["INPUT"],
        "DataType": ["FLOAT", "HALF", "INT64", "INT32", "BOOL", "UINT8"],
    }
    missing = [
        f"{name}.{each}" for name, names in used.items() for each in names if not hasattr(getattr(trt, name), each)
    ]
    assert not missing
    assert "runtime_config: " in trt.ICudaEngine.create_execution_context.__doc__
    assert trt.DataType.HALF.name == "HALF" and tuple(trt.Dims([1, -1, 3])) == (1, -1, 3)


# -- what bench.gpu checks


def test_the_check_of_the_kernels_passes_where_they_are_right_and_notices_where_not(
    device: HostDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = replace(load_manifest(EMBEDDED), image_resize=20, image_size=16)
    found = check_kernels(device, manifest, seed=0, rows=40)
    assert len(found) == 10 and all(error <= allowed for error, allowed in found.values()), found
    for path in SOURCES.iterdir():
        shutil.copy(path, tmp_path)
    for name, right, wrong in PLANTED:
        source = tmp_path / f"{name}.cu"
        text = source.read_text()
        assert right in text, f"nothing to plant in {name}.cu"
        source.write_text(text.replace(right, wrong, 1))
    monkeypatch.setattr("kernels.cuda_compile.SOURCES", tmp_path)
    (tmp_path / "wrong").mkdir()
    found = check_kernels(HostDevice(tmp_path / "wrong"), manifest, seed=0, rows=40)
    assert {name for name, (error, allowed) in found.items() if error <= allowed} == {"advance"}, found


def test_what_a_card_can_do_at_best_is_what_its_maker_says() -> None:
    """By their data sheets: RTX 4090, whose tensor cores reach this when they add in fp16, and A100 40 GB."""
    ada = make_card("RTX 4090", "8.9", 128, 2_520_000, 10_501_000, 384)
    assert ada.gigabytes_s == pytest.approx(1008, rel=1e-3)
    assert (ada.fp32_gflop_s, ada.fp16_gflop_s) == pytest.approx((82.6e3, 330e3), rel=1e-2)
    ampere = make_card("A100", "8.0", 108, 1_410_000, 1_215_000, 5120)
    assert ampere.gigabytes_s == pytest.approx(1555, rel=1e-3)
    assert (ampere.fp32_gflop_s, ampere.fp16_gflop_s) == pytest.approx((19.5e3, 312e3), rel=1e-2)
    assert ada.least_ms(1008, 0.001, half=True) == pytest.approx(1.0, rel=1e-3), "bound by memory"
    assert ada.least_ms(1, 826, half=False) == pytest.approx(10.0, rel=1e-2), "bound by arithmetic"
    unknown = make_card("next year's", "99.0", 1, 1, 1_000_000, 8)
    assert unknown.fp16_gflop_s is None and unknown.least_ms(2, 1e9, half=True) == 1.0


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_the_check_on_a_gpu_says_that_there_is_none() -> None:
    done = subprocess.run([sys.executable, "-m", "bench.gpu"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.count("\n") == 1 and not done.stderr
    assert done.stdout.startswith("no check on a GPU: ")
