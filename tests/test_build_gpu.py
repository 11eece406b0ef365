"""`livemoments build-engine` for a GPU, on a machine without one."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.build import build
from kernels.bundle import load_manifest
from kernels.engine import Engine
from kernels.errors import BundleError
from kernels.onnx_runtime import Graph
from kernels.recipe import Recipe, make_recipe
from kernels.rounding import rounded
from kernels.tensorrt import CAPABILITIES, compute_capability, load_module
from livemoments import main
from models.clip import VIT_B32
from tests.conftest import Export
from tests.test_clip import publish

pytestmark = [
    pytest.mark.timeout(600),  # engines of full size are built, on however slow a machine
    pytest.mark.usefixtures("quick_builds"),
]


def test_a_gpu_bundle_is_built_here_and_judged_there(tiny_head: Path, tmp_path: Path) -> None:
    recipe = make_recipe(None, tiny_head)
    manifest, _ = build(recipe, "tensorrt-rtx", "fp16", tmp_path / "bundle")
    engines = {f"{name}.engine" for name in ("image", "text", "video", "query", "head")}
    assert set(manifest.files) == engines | {"tokenizer.json", "distractors.npy", "reference.npz"}
    assert manifest.parity == "pending" and min(manifest.onnx_parity.values()) >= 0.999
    assert manifest.compute_capabilities == list(CAPABILITIES) and manifest.profiles["rows"] == [1, 16, 10_000]
    assert manifest.precision["image"] == "fp16" and manifest.precision["head"] == "fp32"
    graphs = recipe.pixel_graphs()
    with np.load(tmp_path / "bundle" / "reference.npz") as reference:
        for name, graph in graphs.items():
            inputs = [torch.from_numpy(reference[f"{name}/in/{each}"]) for each in graph.inputs]
            with torch.no_grad():
                found = graph.module(*inputs)
            for output, each in zip(graph.outputs, found, strict=True):
                np.testing.assert_allclose(reference[f"{name}/out/{output}"], each, atol=2e-2, rtol=2e-3)
    with pytest.raises(BundleError, match=r"GPU|PyCUDA") as caught:
        Engine(tmp_path / "bundle")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["lite", "ViT-B/32"])
def test_full_size_backbones_become_gpu_bundles(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command itself; of the CLIP the weights are random, which proves the build only."""
    if model == "ViT-B/32":
        (tmp_path / "clip").mkdir()
        model = str(publish(VIT_B32, tmp_path / "clip"))
    out = tmp_path / "bundle"
    assert main(["build-engine", "--model", model, "--target", "tensorrt-rtx", "--out", str(out)]) == 0
    assert load_manifest(out).precision == {"image": "fp16", "text": "fp16"}
    told = capsys.readouterr().out
    assert "image.pooled" in told and "held against it when they first meet a GPU" in told


def test_bf16_is_rounded_where_nothing_computes_it(tiny_recipe: Recipe, export_once: Export) -> None:
    """What the gate runs in place of the graph is coarser than fp32, as coarse as torch's own bf16."""
    graph = tiny_recipe.pixel_graphs(torch.bfloat16)["image"]
    pixels = torch.randn(4, 3, 24, 24).half()
    given = Graph(rounded(export_once(graph)).SerializeToString())(pixels=pixels.numpy())["pooled"]
    with torch.no_grad():
        exact = tiny_recipe.pixel_graphs()["image"].module(pixels).numpy()
        narrow = graph.module(pixels).numpy()
    off, wanted = np.abs(given - exact).mean(), np.abs(narrow - exact).mean()
    assert 0.5 * wanted < off < 2 * wanted


def test_an_overflow_of_fp16_is_refused_and_bf16_is_not(tiny_clip: Path, tmp_path: Path) -> None:
    """Activations of 10^5 in the middle of a block, of weights that fp16 holds: harmless in fp32, infinite in fp16."""
    recipe = make_recipe(str(tiny_clip), None)
    block = recipe.backbone.pixels.get_submodule("encoder.layers.0.mlp")
    with torch.no_grad():
        for name in ("fc1.weight", "fc1.bias"):
            block.get_parameter(name).mul_(2e5)
            assert float(block.get_parameter(name).abs().max()) < 65504
        block.get_parameter("fc2.weight").div_(2e5)
    with pytest.raises(BundleError, match=r"image\.pooled does not agree with torch: worst cosine -1"):
        build(recipe, "tensorrt-rtx", "fp16", tmp_path / "fp16")
    assert list(tmp_path.iterdir()) == []
    assert build(recipe, "tensorrt-rtx", "bf16", tmp_path / "bf16")[0].precision["image"] == "bf16"


def test_a_capability_that_the_compiler_lacks_is_told(tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"does not build for compute capability 9\.0, but for .*8\.6"):
        build(tiny_recipe, "tensorrt-rtx", "fp16", tmp_path / "bundle", capabilities=["9.0"])
    with pytest.raises(BundleError, match="does not build for compute capability 86, but for"):
        compute_capability(load_module("tensorrt-rtx"), "86")
    assert list(tmp_path.iterdir()) == []


def test_tensorrt_that_is_not_installed_is_told(tiny_recipe: Recipe, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings")
    try:
        importlib.import_module("tensorrt")
    except ImportError:
        with pytest.raises(BundleError, match="the target tensorrt needs the package tensorrt: pip install"):
            build(tiny_recipe, "tensorrt", "fp16", tmp_path / "bundle")
        assert list(tmp_path.iterdir()) == []
    else:
        pytest.skip("it is installed here")
