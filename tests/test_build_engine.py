"""`livemoments build-engine`: what it builds runs, what is wrong is refused, and a refused build leaves nothing."""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from kernels.build import PRECISIONS, build, export_graph, formed
from kernels.bundle import EMBEDDED, Manifest, load_manifest
from kernels.engine import Engine
from kernels.errors import BundleError
from kernels.head import HostRows
from kernels.onnx_runtime import Graph
from kernels.preprocess import crop
from kernels.quantise import fold_constants, fuse_attention, quantise
from kernels.recipe import Recipe, make_recipe
from livemoments import main
from models.graphs import Graph as Exported
from stream.detector import make_query
from stream.moments import MomentOptions
from stream.session import Session
from stream.types import NS, Frame, Kind
from tests.conftest import Export, one_weight_off
from tests.media import frames_of
from tests.test_clip import TINY

pytestmark = [
    pytest.mark.timeout(600),  # engines of full size are built, on however slow a machine
    pytest.mark.usefixtures("quick_builds"),
]


@pytest.fixture(scope="module")
def plain(quick_builds: None, tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle in fp32. Others copy it."""
    folder = tmp_path_factory.mktemp("plain") / "bundle"
    build(tiny_recipe, "onnxruntime", "fp32", folder)
    return folder


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# -- for a CPU


def test_a_cpu_bundle_of_a_clip_agrees_with_torch_and_runs(tiny_recipe: Recipe, tmp_path: Path) -> None:
    manifest, parts = build(tiny_recipe, "onnxruntime", "int8", tmp_path / "bundle")
    assert files(tmp_path / "bundle") == {*manifest.files, "manifest.json"}
    assert set(manifest.files) == {"image.onnx", "text.onnx", "tokenizer.json", "distractors.npy"}
    assert isinstance(manifest.parity, dict) and min(manifest.parity.values()) >= 0.999
    assert {part.name: part.form for part in parts} == manifest.precision
    assert all(part.ms and part.torch_ms for part in parts)
    engine = Engine(tmp_path / "bundle")
    assert engine.manifest == manifest and engine.distractors is not None
    np.testing.assert_allclose(np.linalg.norm(engine.distractors, axis=1), 1, atol=1e-3)
    frame = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    with torch.no_grad():
        cut = torch.from_numpy(crop(frame, resize=24, size=24).copy())[None]
        want = tiny_recipe.backbone.image(cut)[1].numpy()
    given = engine.embed_frames([frame]).pooled
    assert (given * want).sum() / np.linalg.norm(given) / np.linalg.norm(want) > 0.999
    session = Session(engine, "cam", NS, MomentOptions(), recorded=True)
    session.add(make_query(engine, "a dog"))


def test_what_int8_blunts_is_built_larger(tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each engine takes the smallest form that agrees with torch, and says which that was and why."""
    told: list[str] = []

    def blunt(model: onnx.ModelProto) -> onnx.ModelProto:
        model = quantise(model)
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 2:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) // 32 * 32, tensor.name))
        return model

    monkeypatch.setattr("kernels.build.quantise", blunt)
    manifest, _ = build(tiny_recipe, "onnxruntime", "int8", tmp_path / "bundle", told.append)
    assert manifest.precision["image"] == "fp16 weights"
    assert any("image.pooled does not agree with torch" in line and line.endswith("not as int8") for line in told)


def test_a_head_on_a_clip_is_built_and_serves(tiny_head: Path, tmp_path: Path) -> None:
    manifest, _ = build(make_recipe(None, tiny_head), "onnxruntime", "int8", tmp_path / "bundle")
    assert manifest.head is not None and manifest.head.depth == 2
    assert {manifest.precision[name] for name in ("video", "query", "head")} == {"fp16 weights"}
    assert manifest.precision["image"] == "int8", "it does not agree with torch in layers and pooled"
    engine = Engine(tmp_path / "bundle")
    session = Session(engine, "cam", NS, MomentOptions(), recorded=True)
    session.add(make_query(engine, "a dog"))
    assert engine.head is not None and engine.embed_frames([np.zeros((30, 40, 3), np.uint8)]).layers is not None


class TorchRuntime:
    """The graphs of a recipe in torch, in the place of a bundle's."""

    def __init__(self, recipe: Recipe, manifest: Manifest) -> None:
        self.recipe, self.manifest, self.graphs = recipe, manifest, recipe.crop_graphs()

    def graph(self, name: str) -> Callable[..., Mapping[str, NDArray[Any]]]:
        def call(**inputs: NDArray[Any]) -> dict[str, NDArray[Any]]:
            with torch.no_grad():
                found = self.graphs[name].module(*(torch.from_numpy(inputs[each]) for each in self.graphs[name].inputs))
            outputs = [found] if isinstance(found, Tensor) else found
            return {output: each.numpy() for output, each in zip(self.graphs[name].outputs, outputs, strict=True)}

        return call

    def see(self, frames: Sequence[NDArray[np.uint8]]) -> Mapping[str, NDArray[Any]]:
        b = self.recipe.backbone
        return self.graph("image")(crops=np.stack([crop(each, resize=b.resize, size=b.size) for each in frames]))

    rows = HostRows


Told = tuple[list[float], list[tuple[float, float]]]


def watch(engine: Engine, frames: Sequence[Frame], query: str) -> Told:
    """The score of every window, and start and end of what is told, in seconds."""
    session = Session(engine, "v", NS, MomentOptions(), recorded=True)
    session.add(make_query(engine, query))
    steps = [*map(session.push, frames), session.drain()]
    scores = [saliency[0].score for step in steps for _, saliency in step.scores]
    closed = [event.moment for step in steps for event in step.events if event.kind is Kind.CLOSED and event.moment]
    return scores, [(moment.start_ns / NS, (moment.end_ns or 0) / NS) for moment in closed]


@pytest.mark.shared
def test_every_cpu_bundle_tells_the_moments_of_torch(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores to 0.005, and the same moments: an edge may move by a hop only where torch's score is that close to it."""
    recipe = make_recipe("lite", None)
    streams = [json.loads(line) for line in (shared_data / "clips" / "streams.jsonl").read_text().splitlines()]
    for precision in ("fp32", "fp16"):
        build(recipe, "onnxruntime", precision, tmp_path / precision)
    (tmp_path / "int8").symlink_to(EMBEDDED)  # what int8 comes to with lite: fp16 images, texts in int8 weights
    with monkeypatch.context() as patch:
        patch.setattr("kernels.engine._runtime", lambda _folder, manifest, _threads: TorchRuntime(recipe, manifest))
        reference = Engine(tmp_path / "fp32")
    for stream in streams:
        frames = list(frames_of(shared_data / "clips" / f"{stream['vid']}.mp4"))
        scores, moments = watch(reference, frames, stream["query"])
        close = [hop for hop, score in enumerate(scores) if abs(score - MomentOptions().threshold) < 0.005]
        assert len(moments) >= 3 and len(close) <= 1, "or there is nothing to agree on"
        for precision in PRECISIONS["onnxruntime"]:
            found, told = watch(Engine(tmp_path / precision, zero_shot=True), frames, stream["query"])
            np.testing.assert_allclose(found, scores, atol=0.005)
            for ours, theirs in zip(told, moments, strict=True):
                moved = [edge for edge, want in zip(ours, theirs, strict=True) if edge != want]
                assert precision != "fp32" or not moved
                assert len(moved) <= len(close) and all(abs(edge - hop) <= 1.5 for edge in moved for hop in close)


def test_a_clip_is_served_by_the_command(plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "test:ball", "-q", "a dog", "--for", "3", "--engine", str(plain)]) == 0
    assert "Traceback" not in capsys.readouterr().err


# -- what the gate is for


def one_weight(graph: Exported, export: Export) -> onnx.ModelProto:
    """The export, in which one number of the image tower is another."""
    return one_weight_off(export(graph), "post_layernorm.bias", 3, 10)


class Turned(nn.Module):
    """Rows for columns."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pictures: Tensor) -> Tensor:
        found: Tensor = self.tower(pictures.transpose(1, 2) if pictures.shape[-1] == 3 else pictures.mT)
        return found


def transposed(graph: Exported, export: Export) -> onnx.ModelProto:
    """The export, in which pictures lie on their side."""
    picture = {"crops", "pixels"} & set(graph.inputs)
    return export(graph._replace(module=Turned(graph.module)) if picture else graph)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
@pytest.mark.parametrize(("model", "fault"), [("clip", one_weight), ("lite", transposed)])
def test_a_planted_error_leaves_no_bundle(
    model: str,
    fault: Callable[[Exported, Export], onnx.ModelProto],
    target: str,
    tiny_recipe: Recipe,
    export_once: Export,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pictures that lie on their side are told with real weights; with random ones all pictures look alike."""
    recipe = tiny_recipe if model == "clip" else make_recipe("lite", None)
    monkeypatch.setattr("kernels.build.export_graph", lambda graph: fault(graph, export_once))
    with pytest.raises(BundleError, match=r"image\.pooled does not agree with torch: worst cosine"):
        build(recipe, target, "fp32", tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_build_leaves_the_old_bundle_alone(
    plain: Path, tiny_recipe: Recipe, tmp_path: Path, export_once: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = load_manifest(Path(shutil.copytree(plain, tmp_path / "bundle")))
    monkeypatch.setattr("kernels.build.export_graph", lambda graph: one_weight(graph, export_once))
    with pytest.raises(BundleError, match="does not agree"):
        build(tiny_recipe, "onnxruntime", "fp32", tmp_path / "bundle")
    assert load_manifest(tmp_path / "bundle") == old


# -- products in int8


def test_products_by_constants_are_whole_numbers_and_no_others(tiny_recipe: Recipe, export_once: Export) -> None:
    image, text = (kinds(formed(export_once(tiny_recipe.crop_graphs()[each]), "int8")) for each in ("image", "text"))
    blocks = TINY.image.layers
    # Of a block: one behind the attention, two of the MLP; and before and after all blocks.
    assert image["MatMulInteger"] == 3 * blocks + 2
    assert image["QAttention"] == blocks  # with the product of queries, keys and values in it
    assert not {"MatMul", "Softmax", "Split"} & set(image)
    # A text has a mask, which keeps its attention as it was: scores, and what is mixed by them.
    assert text["MatMulInteger"] == 4 * TINY.text.layers + 1
    assert text["MatMul"] == 2 * TINY.text.layers and "QAttention" not in text


def test_a_fused_attention_gives_what_its_parts_gave(tiny_clip: Path) -> None:
    recipe = make_recipe(str(tiny_clip), None)
    blocks = recipe.backbone.pixels.get_submodule("encoder.layers")
    with torch.no_grad():
        for name, weight in blocks.named_parameters():
            if "q_proj" in name:
                weight.mul_(40)  # random weights look at all alike, and no error of a scale would be seen
    parts = quantise(fold_constants(export_graph(recipe.crop_graphs()["image"])))
    crops = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), dtype=np.uint8)
    whole, unfused = (Graph(each.SerializeToString())(crops=crops) for each in (fuse_attention(parts), parts))
    np.testing.assert_allclose(whole["pooled"], unfused["pooled"], rtol=0, atol=1e-5)


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_no_other_form_has_operators_of_one_runtime(tiny_recipe: Recipe, export_once: Export) -> None:
    crops, pixels = tiny_recipe.crop_graphs()["image"], tiny_recipe.pixel_graphs()["image"]
    for graph, form in (crops, "fp32"), (crops, "fp16 weights"), (pixels, "fp32"):
        assert {node.domain for node in formed(export_once(graph), form).graph.node} == {""}


# -- the command


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "nothing to build: give --model lite"),
        (["--model", "lite", "--target", "tensorrt-rtx", "--precision", "int8"], "tensorrt-rtx is not built in int8"),
        (["--model", "lite", "--precision", "bf16"], "onnxruntime is not built in bf16, but in int8, fp16, fp32"),
        (["--model", "lite", "--compute-capability", "8.6"], "--compute-capability belongs to --target tensorrt-rtx"),
        (["--model", "/none/such"], "/none/such: no such folder"),
        (["--checkpoint", "none.safetensors"], "none.safetensors: no such file"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    arguments: Sequence[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build-engine", *arguments, "--out", str(tmp_path / "bundle")]) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1, told
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_bundle_is_never_replaced(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for name, text in {"": "", "manifest.json": '{"name": "a web app"}'}.items():
        if name:
            (tmp_path / name).write_text(text)
        with pytest.raises(BundleError, match="is there, and is no engine bundle or more than one: give another --out"):
            build(tiny_recipe, "onnxruntime", "fp32", tmp_path)
        assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert main(["build-engine", "--model", "lite", "--out", str(EMBEDDED)]) == 2
    assert "it would lose its trained head" in capsys.readouterr().err


def test_what_lies_beside_a_bundle_is_never_removed(plain: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "bundle"))
    (folder / "best.safetensors").write_text("weeks of training")
    with pytest.raises(BundleError, match="more than one"):
        build(tiny_recipe, "onnxruntime", "fp32", folder)
    assert (folder / "best.safetensors").exists() and load_manifest(folder)


def test_a_build_that_is_interrupted_in_its_last_step_keeps_the_old_bundle(
    plain: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = Path(shutil.copytree(plain, tmp_path / "bundle")), Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tiny_recipe, "onnxruntime", "fp32", folder)
    assert load_manifest(folder) and list(tmp_path.iterdir()) == [folder]


def test_a_link_to_a_bundle_is_followed(plain: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "real"))
    (tmp_path / "link").symlink_to(folder)
    manifest, _ = build(tiny_recipe, "onnxruntime", "fp16", tmp_path / "link")
    assert load_manifest(folder) == manifest and (tmp_path / "link").is_symlink()


def test_another_backbone_under_a_head_is_refused(
    tiny_head: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build-engine", "--model", "lite", "--checkpoint", str(tiny_head), "--out", str(tmp_path / "b")]) == 2
    told = capsys.readouterr().err
    assert "reads features (video, text, embedding, floor) of (32, 24, 16, 0.0), those of lite are" in told


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("target", "abacus", "is built for abacus, which this version does not run"),
        ("image_size", 32, "does not fit its engines, in image_size or head"),
        ("image_size", "32", "manifest.json is damaged: width, image_resize, image_size or max_tokens"),
        ("calibration", [], "manifest.json is damaged: calibration"),
        ("calibration", {"floor": 0, "centre": 1, "slope": 1, "level": 2}, "manifest.json is damaged: calibration"),
        ("calibration", {"floor": 0, "centre": 1, "slope": 1, "temperature": -1}, "is damaged: calibration"),
        ("mean", None, "manifest.json is damaged: mean or std"),
        ("profiles", None, "manifest.json is damaged: precision, profiles or compute_capabilities"),
        ("width", 99, "distractors.npy does not fit the engines"),
    ],
)
def test_a_bundle_that_does_not_fit_is_refused_at_load(
    field: str, value: object, says: str, plain: Path, tmp_path: Path
) -> None:
    manifest = load_manifest(Path(shutil.copytree(plain, tmp_path / "bundle")))
    changed: Manifest = replace(manifest, **{field: value})  # type: ignore[arg-type]
    changed.write(tmp_path / "bundle")
    with pytest.raises(BundleError, match=says) as caught:
        Engine(tmp_path / "bundle")
    assert "\n" not in str(caught.value)
