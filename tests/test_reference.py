"""The published R2-Tuning: its reference outputs, number for number, and the loading of its weights."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import reference
from models.errors import ModelError
from models.published import from_published, load_published, to_causal
from models.r2 import R2
from models.r2_types import ClipOutputs, R2Config
from tests.test_r2 import build, record

pytestmark = pytest.mark.usefixtures("one_thread")

Tensors = dict[str, Tensor]

# What the published code calls our modules.
PUBLISHED = {
    "map_video": "adapter.video_map",
    "map_query": "adapter.query_map",
    "project_video": "adapter.v_map",
    "project_query": "adapter.q_map",
    "pooling": "adapter.scale",
    "gate": "adapter.gate",
    "layer.cross.query": "adapter.tem.cross_att.q",
    "layer.cross.key": "adapter.tem.cross_att.k",
    "layer.cross.value": "adapter.tem.cross_att.v",
    "layer.cross.out": "adapter.tem.cross_att.m",
    "layer.time.query": "adapter.tem.self_att.q",
    "layer.time.key": "adapter.tem.self_att.k",
    "layer.time.value": "adapter.tem.self_att.v",
    "layer.time.out": "adapter.tem.self_att.m",
    "layer.norm_cross": "adapter.tem.cross_att_norm",
    "layer.norm_time": "adapter.tem.self_att_norm",
    "layer.norm_feed_forward": "adapter.tem.ffn_norm",
    "layer.expand": "adapter.tem.ffn.mapping.0",
    "layer.contract": "adapter.tem.ffn.mapping.2",
    "word_weight": "pooling.att",
    "heads.levels.1.convs.0": "pyramid.blocks.1.1",
    "heads.levels.1.norms.0": "pyramid.blocks.1.3",
    "heads.levels.2.convs.0": "pyramid.blocks.2.1",
    "heads.levels.2.norms.0": "pyramid.blocks.2.3",
    "heads.levels.2.convs.1": "pyramid.blocks.2.6",
    "heads.levels.2.norms.1": "pyramid.blocks.2.8",
    "heads.levels.3.convs.0": "pyramid.blocks.3.1",
    "heads.levels.3.norms.0": "pyramid.blocks.3.3",
    "heads.levels.3.convs.1": "pyramid.blocks.3.6",
    "heads.levels.3.norms.1": "pyramid.blocks.3.8",
    "heads.levels.3.convs.2": "pyramid.blocks.3.11",
    "heads.levels.3.norms.2": "pyramid.blocks.3.13",
    "heads.classify.hidden": "class_head.module.1",
    "heads.classify.out": "class_head.module.3",
    "heads.locate.hidden": "coord_head.module.1",
    "heads.locate.out": "coord_head.module.3",
    "heads.scales": "coef",
}


def published(model: R2) -> Tensors:
    """Our weights under the published names, convolutions as (outputs, inputs, taps)."""
    weights: Tensors = {"loss._loss_sal.scale": torch.ones(1)}
    for name, value in model.state_dict().items():
        own = next(own for own in PUBLISHED if name == own or name.startswith(f"{own}."))
        weights[PUBLISHED[own] + name.removeprefix(own)] = value.mT.contiguous() if value.ndim == 3 else value.clone()
    return weights


def synthetic(length: int = 11, words: int = 3, patches: int = 2, **shape: Any) -> Tensors:
    """A reference file as our own model would have written it."""
    model = build("clip", **{"heads": 8, "embedding": 0} | shape)
    video, query = record(model, length, patches=patches).layers, torch.randn(1, words, model.config.depth, 20)
    with torch.no_grad():
        maps = model.query_maps(query.transpose(1, 2), torch.zeros(1, 0), torch.ones(1, words, dtype=torch.bool))
        outputs = model(video, torch.zeros(1, 0), maps)
    assert isinstance(outputs, ClipOutputs)
    spans = outputs.boundaries(model.config.strides)[0]
    tensors = {
        "inputs/video": video,
        "inputs/query": query,
        "outputs/hidden": outputs.hidden,
        "outputs/saliency": outputs.saliency[0],
        "outputs/boundary": torch.cat([spans[:, :2] * 2, spans[:, 2:]], -1),  # seconds, at a window each two
        "outputs/query_pooled": maps.pooled[:, None],
    }
    for i, logits in enumerate(outputs.logits):
        tensors[f"outputs/class_level{i}"] = logits[..., None]
    tensors |= {f"weights/{name}": value for name, value in published(model).items()}
    return {name: value.contiguous() for name, value in tensors.items()}


def saved(tensors: Tensors, folder: Path) -> Path:
    save_file(tensors, path := folder / "reference.safetensors")
    return path


def run(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "models.reference", str(path)]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)


# -- the file of the published model


@pytest.fixture
def official(shared_data: Path) -> Path:
    path = shared_data / "r2_reference" / "reference.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is absent: it does not travel with the project")
    return path


@pytest.mark.shared
def test_every_output_is_the_published_one(official: Path) -> None:
    errors = reference.compare(official)
    levels = {f"{kind}_level{i}" for kind in ("class", "coord") for i in range(4)}
    steps = {f"coll_v{i}" for i in range(4)}
    assert errors.keys() == levels | steps | {"hidden", "query_last", "query_pooled", "saliency", "boundary"}
    assert {name: error for name, error in errors.items() if not error < 1e-4} == {}


@pytest.mark.shared
def test_the_command_ends_with_its_errors_in_json(official: Path) -> None:
    done = run(official)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout.splitlines()[-1]).keys() == reference.compare(official).keys()


@pytest.mark.shared
@pytest.mark.parametrize(
    "name", ["adapter.gate", "adapter.scale", "adapter.tem.self_att.q.bias", "pyramid.blocks.3.11.bias", "coef"]
)
def test_weights_that_are_off_show(official: Path, tmp_path: Path, name: str) -> None:
    tensors = load_file(official)
    tensors[f"weights/{name}"] += 0.1 * torch.rand(tensors[f"weights/{name}"].shape)
    assert max(reference.compare(saved(tensors, tmp_path)).values()) > reference.TOLERANCE


# -- files of the same form


@pytest.mark.parametrize(
    ("length", "words", "patches", "shape", "levels"),
    [
        (5, 3, 2, {}, 3),  # level 8 is longer than the recording
        (1, 1, 0, {"depth": 1}, 1),
        (11, 7, 4, {"depth": 3, "width": 48, "ratio": 2}, 4),
        (75, 2, 1, {"strides": (1, 2, 4)}, 3),
    ],
)
def test_shapes_are_read_from_the_file(
    tmp_path: Path, length: int, words: int, patches: int, shape: dict[str, Any], levels: int
) -> None:
    tensors = synthetic(length, words, patches, **shape)
    assert sum(name.startswith("outputs/class_level") for name in tensors) == levels
    assert tensors["outputs/boundary"].shape == (min(50, sum(length // 2**i for i in range(levels))), 3)
    errors = reference.compare(saved(tensors, tmp_path))
    assert len(errors) == 4 + levels
    assert max(errors.values()) <= 1e-5


def test_a_model_that_is_off_exits_with_1(tmp_path: Path) -> None:
    tensors = synthetic()
    tensors["weights/adapter.gate"][0] += 0.1
    done = run(saved(tensors, tmp_path))
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout.splitlines()[-1])["hidden"] > 1e-4


def test_a_number_that_is_none_is_an_error(tmp_path: Path) -> None:
    tensors = synthetic()
    tensors["outputs/saliency"][0] = torch.nan
    assert not reference.compare(saved(tensors, tmp_path))["saliency"] <= reference.TOLERANCE


def without(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def with_(name: str, value: Tensor) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: value})


MISFITS = ((1, 11, 4, 3, 5), (1, 0, 4, 3, 24), (1, 11, 4, 0, 24), (1, 11, 5, 3, 24), (2, 11, 4, 3, 24))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without("inputs/video"), "inputs/video is missing"),
        (without("inputs/query"), "inputs/query is missing"),
        (without("weights/adapter.gate"), "lacks 1 tensors, gate for one"),
        (without("weights/coef"), "not of an R2-Tuning model"),
        (without("weights/pyramid.blocks.1.3.bias"), "lacks 1 tensors"),
        (with_("weights/adapter.gate", torch.zeros(7)), r"gate is \(7,\), this model has \(3,\)"),
        (with_("weights/adapter.other", torch.zeros(7)), "1 tensors that this model has not, adapter.other"),
        (with_("other", torch.zeros(7)), "none of weights/, inputs/, outputs/"),
        *((with_("inputs/video", torch.zeros(shape)), "inputs/video is .* its weights want") for shape in MISFITS),
        (with_("inputs/video", torch.zeros(4)), "with 1 axes, 5 of float32 are wanted"),
        (with_("inputs/query", torch.zeros(1, 3, 4, 5)), "inputs/query is .* its weights want"),
        (with_("inputs/query", torch.zeros(1, 0, 4, 20)), "inputs/query is .* its weights want"),
        (with_("inputs/query", torch.zeros(1, 3, 4, 20).long()), "is torch.int64"),
        (with_("weights/coef", torch.zeros(())), "not of an R2-Tuning model"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("outputs/")], "no outputs/"),
        (with_("outputs/saliency", torch.zeros(11) > 0), "outputs/saliency is torch.bool"),
        (with_("outputs/saliency", torch.zeros(5)), r"outputs/saliency is \(5,\), ours is \(11,\)"),
        (with_("outputs/other", torch.zeros(5)), "nothing of ours compares with outputs/other"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, spoil: Callable[[Tensors], object], message: str) -> None:
    tensors = synthetic()
    spoil(tensors)
    with pytest.raises(ModelError, match=message) as refusal:
        reference.compare(saved(tensors, tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", "no video"])
def test_the_command_refuses_a_file_in_one_line(
    tmp_path: Path, content: bytes | str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "reference.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        tensors = synthetic()
        del tensors["inputs/video"]
        saved(tensors, tmp_path)
    monkeypatch.setattr(sys, "argv", ["reference", str(path)])
    assert reference.main() == 2
    told = capsys.readouterr()
    (line,) = told.err.splitlines()
    assert line.startswith("error: ") and str(path) in line and not told.out


def test_a_file_that_is_not_there_exits_with_2(tmp_path: Path) -> None:
    done = run(tmp_path / "none.safetensors")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and "none.safetensors" in done.stderr


# -- published checkpoints


def same_weights(ours: R2, theirs: R2) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_published_checkpoint_loads_however_it_was_saved(tmp_path: Path, prefix: str, wrapped: bool) -> None:
    model = build("clip", heads=8, embedding=0, depth=3, ratio=2)
    weights = {prefix + name: value for name, value in published(model).items()}
    torch.save({"state_dict": weights, "meta": {"epoch": 30}} if wrapped else weights, path := tmp_path / "r2.pth")
    loaded = load_published(path)
    assert loaded.config == R2Config("clip", 24, 20, 0, depth=3, width=32, heads=8, ratio=2)
    assert not loaded.training
    same_weights(loaded, model)


class Nasty:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must not run",)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build("clip", heads=8, embedding=0)
    torch.save({"state_dict": published(model), "hook": Nasty()}, path := tmp_path / "r2.pth")
    with pytest.raises(ModelError, match=r"r2\.pth is no plain checkpoint of tensors"):
        load_published(path)
    path.write_bytes(pickle.dumps(Nasty()))
    with pytest.raises(ModelError, match=r"r2\.pth"):
        load_published(path)
    assert "this must not run" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no state dict"),
        ({"state_dict": {"a": 1}}, "holds no state dict"),
        ({"state_dict": {}}, "not of an R2-Tuning model"),
        ({"conv.weight": torch.ones(2)}, "not of an R2-Tuning model"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, path := tmp_path / "r2.pth")
    with pytest.raises(ModelError, match=message) as refusal:
        load_published(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [None, b"", b"what is this", b"PK\x03\x04 half a zip"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "r2.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"r2\.pth") as refusal:
        load_published(path)
    assert "\n" not in str(refusal.value)


def test_the_causal_model_begins_with_all_published_weights_but_the_end_points() -> None:
    clip = from_published(published(build("clip", heads=8, embedding=0)), "ours")
    causal = to_causal(clip, window=16, embedding=6)
    assert causal.config == R2Config("causal", 24, 20, 6, depth=4, width=32, heads=8, window=16)
    before, after = clip.state_dict(), causal.state_dict()
    assert after.keys() - before.keys() == {"zero_shot"} and not before.keys() - after.keys()
    cut = {"map_video.0.weight", "map_video.0.bias", "map_video.2.weight"}  # the last two inputs of 26
    for name, weight in before.items():
        kept = weight[..., :24] if name in cut else weight
        assert torch.equal(after[name], kept), name
    recording = record(causal, 5)
    query = causal.query_maps(torch.randn(1, 4, 3, 20), torch.randn(1, 7), torch.ones(1, 3, dtype=torch.bool))
    assert causal(recording.layers, recording.embedding, query).saliency.isfinite().all()
