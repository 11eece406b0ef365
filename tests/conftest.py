"""Fixtures that many tests share."""

import os
import pickle
from collections.abc import Callable, Iterator
from functools import cache
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor

from kernels.build import export_graph
from kernels.parity import real_crops
from kernels.recipe import Recipe, make_recipe
from models.checkpoint import Provenance, save_checkpoint
from models.graphs import Graph
from models.lite import ImageTower, QueryTower
from models.lite_packages import class_captions, towers
from models.r2 import R2
from models.r2_types import R2Config

Export = Callable[[Graph], onnx.ModelProto]
SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """The data beside the checkout. Tests that use it carry the mark `shared`."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: its data does not travel with the project")
    return SHARED


@pytest.fixture(scope="session")
def lite_towers() -> tuple[ImageTower, QueryTower]:
    """The towers of lite in torch, made once: it takes seconds."""
    return towers()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tensors so small that threads only wait for each other, for minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Content(pickle.Pickler):
    """The same bytes for the same things: tensors by what they hold, not by where they lie."""

    def reducer_override(self, thing: object) -> Any:
        if not isinstance(thing, Tensor):
            return NotImplemented
        held = thing.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        return bytes, (f"{thing.dtype} {thing.shape}".encode() + sha256(held).digest(),)


def content(thing: object) -> bytes:
    Content(out := BytesIO()).dump(thing)
    return sha256(out.getvalue()).digest()


@pytest.fixture(scope="session")
def export_once(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """`export_graph`, which remembers: that takes longer than all the rest of a build."""
    # One folder for all processes of this run, each of which has a folder of its own in it.
    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "exports"
    shared.mkdir(exist_ok=True)

    def remembered(graph: Graph) -> onnx.ModelProto:
        # Of the examples only the shapes are traced.
        shapes = {name: (each.dtype, each.shape) for name, each in graph.inputs.items()}
        key = content((graph.module, shapes, graph.outputs, graph.axes))
        file = shared / f"{key.hex()}.onnx"
        if not file.exists():
            part = file.with_suffix(f".{os.getpid()}")
            onnx.save(export_graph(graph), part)
            part.rename(file)
        return onnx.load(file)

    return remembered


def one_weight_off(model: onnx.ModelProto, name: str, place: int, more: float) -> onnx.ModelProto:
    """The graph itself, in which one number is larger: of the weights whose names end in `name`."""
    for tensor in model.graph.initializer:
        if tensor.name.endswith(name):
            values = numpy_helper.to_array(tensor).copy()
            values[place] += more
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return model


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP with random weights, as the hub holds it."""
    from tests.test_clip import TINY, publish  # here: pytest rewrites a module of tests only before its first import

    return publish(TINY, tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def tiny_recipe(tiny_clip: Path) -> Recipe:
    return make_recipe(str(tiny_clip), None)


@pytest.fixture(scope="session")
def tiny_head(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a head with random weights that reads it."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("head") / "r2.safetensors"
    model = R2(R2Config("causal", 32, 24, 16, depth=2, width=16, heads=2, window=4, strides=(1, 2)))
    save_checkpoint(path, model, Provenance("a test", str(tiny_clip), 1.0, calibration={"centre": 0.2, "slope": 1.5}))
    return path


@pytest.fixture(scope="module")
def quick_builds(lite_towers: tuple[ImageTower, QueryTower], export_once: Export) -> Iterator[None]:
    """Bundles on fewer texts, and as many frames as the gate must have at least; towers of lite that stand already."""
    captions = [caption for caption in class_captions() if len(caption) < 30][:40]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.backbone.towers", lambda: lite_towers)
        for module in ("parity", "recipe"):
            patch.setattr(f"kernels.{module}.class_captions", lambda: captions)
        patch.setattr("kernels.parity.FRAMES", 32)
        decoded = cache(lambda resize, size: list(real_crops(resize, size)))  # once for all builds
        patch.setattr("kernels.parity.real_crops", decoded)
        patch.setattr("kernels.parity.KEPT", 8)
        patch.setattr("kernels.build._TIMED", 1)
        patch.setattr("kernels.build.export_graph", export_once)
        yield
