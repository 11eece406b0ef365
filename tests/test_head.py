"""A bundle with a trained head: built, checked, and run on a stream without torch; held against R2 in torch."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from kernels import build
from kernels.engine import Engine, Images
from kernels.errors import BundleError
from kernels.head import HeadState
from kernels.preprocess import Pixels, crop
from kernels.recipe import Recipe, make_recipe
from livemoments import main
from models.checkpoint import Provenance, save_checkpoint
from models.errors import ModelError
from models.graphs import Graph
from models.lite import EMBEDDING, FLOOR
from models.r2 import R2
from models.r2_types import R2Config
from stream.detector import make_query
from stream.ingest import open_source
from stream.moments import MomentOptions
from stream.run import play
from stream.session import Session
from stream.sources import parse_source
from stream.types import NS, Frame
from tests.conftest import Export, one_weight_off
from tests.media import write_video
from tests.test_session import frame

CONFIG = R2Config("causal", 320, EMBEDDING, EMBEDDING, FLOOR, width=32, heads=2, window=8)
PROVENANCE = Provenance("a test", "lite", 1.0, calibration={"centre": 0.2, "slope": 1.5})
TEXTS = ("a dog", "a man in a suit who is interviewed in front of a house with a door", "cars")

pytestmark = [
    pytest.mark.timeout(600),  # the first test builds the bundle, on however slow a machine
    pytest.mark.usefixtures("quick_builds"),
]


@dataclass
class Built:
    folder: Path
    recipe: Recipe
    model: R2


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, quick_builds: None) -> Built:
    """A small head with random weights, sharp enough that words, windows and rows all matter."""
    torch.manual_seed(0)
    model = R2(CONFIG).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("query.weight", "key.weight", "project_query.weight", "map_query.6.weight")):
            weight.data.mul_(3)
        elif name.endswith(("pooling", "gate")):
            weight.data.normal_()
        elif name == "zero_shot":
            weight.data.fill_(0.3)
    folder = tmp_path_factory.mktemp("head")
    save_checkpoint(folder / "r2.safetensors", model, PROVENANCE)
    recipe = make_recipe(None, folder / "r2.safetensors")
    build.build(recipe, "onnxruntime", "int8", folder / "bundle")
    return Built(folder / "bundle", recipe, model)


class Watching(Engine):
    """The real engine, which keeps the crops it was given."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.crops: list[Pixels] = []

    def embed_frames(self, frames: Sequence[Pixels]) -> Images:
        m = self.manifest
        self.crops += [crop(each, resize=m.image_resize, size=m.image_size) for each in frames]
        return super().embed_frames(frames)


@pytest.fixture(scope="module")
def engine(built: Built) -> Engine:
    return Engine(built.folder)


# -- the build


def test_a_bundle_says_what_its_head_is_and_was_checked_on_every_output(built: Built) -> None:
    manifest = json.loads((built.folder / "manifest.json").read_text())
    heads = built.model.heads
    assert manifest["head"] == {
        **{"depth": 4, "window": 8, "width": 32, "heads": 2, "reach": heads.reach, "column": heads.column},
        **{"hop_s": 1.0, "centre": 0.2, "slope": 1.5},
    }
    agreed = manifest["parity"]
    outputs = {
        f"{Path(name).stem}.{output.name}"
        for name in manifest["files"]
        if name.endswith(".onnx")
        for output in onnx.load(built.folder / name).graph.output
    }
    assert set(agreed) == outputs and {"image.layers", "text.sentence", "head.saliency", "head.new_history"} <= outputs
    assert min(agreed.values()) >= 0.999
    assert manifest["sources"][-1]["trained"] == "a test"
    assert set(manifest["precision"]) == {"image", "text", "video", "query", "head"}
    assert {manifest["precision"][name] for name in ("video", "query", "head")} == {"fp16 weights"}


def test_a_head_with_one_wrong_weight_is_refused_and_leaves_no_bundle(
    built: Built, export_once: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(graph: Graph) -> onnx.ModelProto:
        return one_weight_off(export_once(graph), "layer.contract.bias", 0, 2)

    monkeypatch.setattr("kernels.build.export_graph", spoilt)
    with pytest.raises(BundleError, match=r"head\.\w+ does not agree with torch"):
        build.build(built.recipe, "onnxruntime", "fp16", tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_too_large_to_travel_is_refused(built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.build.EMBEDDED", tmp_path / "bundle")
    monkeypatch.setattr("kernels.build._EMBEDDED_BYTES", 30_000_000)
    with pytest.raises(BundleError, match=r"takes \d+\.\d MB, the embedded one 30 MB at most"):
        build.build(built.recipe, "onnxruntime", "fp16", tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "provenance", "says"),
    [
        ({"mode": "clip"}, {}, 'is of mode "clip", this needs "causal"'),
        ({}, {"calibration": {}}, "carries no calibration"),
        ({"floor": 0.0}, {}, r"of \(320, 384, 384, 0.0\), those of lite are \(320, 384, 384, 0.02\)"),
    ],
)
def test_a_checkpoint_that_no_bundle_can_hold_is_refused_in_one_line(
    config: dict[str, Any], provenance: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "r2.safetensors"
    save_checkpoint(path, R2(replace(CONFIG, **config)), replace(PROVENANCE, **provenance))
    with pytest.raises(ModelError, match=says) as caught:
        make_recipe(None, path)
    assert "\n" not in str(caught.value)


# -- the stream


def test_a_session_publishes_what_torch_says_of_the_same_pictures(built: Built, tmp_path: Path) -> None:
    """A real file through ingest, windows, towers, maps and rings; longer than a ring, and queries of three lengths."""
    engine = Watching(built.folder)
    video = open_source(parse_source(str(write_video(tmp_path / "v.mp4", frames=30 * 14))), hop_ns=NS, pace="max")
    told: dict[str, list[float]] = {}
    try:
        session = Session(engine, "v", NS, MomentOptions(), recorded=True)
        for text in TEXTS:
            session.add(make_query(engine, text))
        for step in play(video, session):
            for _, scores in step.scores if step else ():
                for score in scores:
                    told.setdefault(score.query, []).append(score.score)
    finally:
        video.close()
    expected = reference(built, engine, engine.crops)
    assert len(engine.crops) == 14 and expected.shape == (3, 13)
    np.testing.assert_allclose([told[query.id] for query in session.queries], expected, atol=1e-3)
    assert expected.std(1).min() > 5e-3, "or any constant would pass"


@torch.no_grad()
def reference(built: Built, engine: Engine, crops: Sequence[Pixels]) -> np.ndarray:
    """Scores (queries, windows) in torch, but for the texts, whose tower is stored in int8 and checked by the build."""
    layers, embedding = built.recipe.backbone.image(torch.from_numpy(np.stack(crops)))
    layers, embedding = ((each[1:] + each[:-1]) / 2 for each in (layers, embedding))  # two frames a window
    rows = []
    for text in TEXTS:
        tokens, mask = engine.tokenise([text])
        found = engine._text(tokens=tokens, mask=mask)
        words, sentence = (torch.from_numpy(found[name]) for name in ("layers", "sentence"))
        query = built.model.query_maps(words, sentence, torch.from_numpy(mask) > 0)
        outputs, _ = built.model.prefill(built.model.video_maps(layers[None], embedding[None]), query)
        rows.append(torch.sigmoid(1.5 * (outputs.saliency[0] - 0.2)))
    return torch.stack(rows).numpy()


def scores(session: Session, frames: Sequence[Frame]) -> list[dict[str, float]]:
    """Of each window, by the query's text."""
    text = {query.id: query.text for query in session.queries}
    steps = [session.push(each) for each in frames]
    return [{text[s.query]: s.score for s in each} for step in steps for _, each in step.scores]


def new_session(engine: Engine, *texts: str) -> Session:
    session = Session(engine, "cam", NS, MomentOptions(), recorded=True)
    for text in texts:
        session.add(make_query(engine, text))
    return session


def test_a_query_that_joins_remembers_nothing_and_one_that_leaves_disturbs_nobody(engine: Engine) -> None:
    frames = [frame(hop) for hop in range(20)]
    alone = scores(new_session(engine, "cars"), frames)
    shared = new_session(engine, "a dog", "cars")
    told = scores(shared, frames[:8])
    shared.add(make_query(engine, TEXTS[1]))  # longer than the others
    told += scores(shared, frames[8:13])
    shared.remove(shared.queries[0].id)
    told += scores(shared, frames[13:])
    assert [each["cars"] for each in told] == pytest.approx([each["cars"] for each in alone], abs=1e-5)
    late = scores(new_session(engine, TEXTS[1]), frames[7:])  # its first window is the one of frames 7 and 8
    assert [each[TEXTS[1]] for each in told if TEXTS[1] in each] == pytest.approx(
        [each[TEXTS[1]] for each in late], abs=1e-5
    )
    whole = scores(new_session(engine, TEXTS[1]), frames)[7:]
    assert max(abs(a[TEXTS[1]] - b[TEXTS[1]]) for a, b in zip(late, whole, strict=True)) > 1e-3, "the past matters"


def test_a_break_makes_all_rows_forget(engine: Engine) -> None:
    frames = [frame(hop, discontinuity=hop == 9) for hop in range(14)]
    broken, fresh = (scores(new_session(engine, *TEXTS), frames[start:]) for start in (0, 9))
    unbroken = scores(new_session(engine, *TEXTS), [replace(each, discontinuity=False) for each in frames])
    for text in TEXTS:
        after = [each[text] for each in broken[-4:]]
        assert after == pytest.approx([each[text] for each in fresh], abs=1e-5)
        assert max(abs(a - each[text]) for a, each in zip(after, unbroken[-4:], strict=True)) > 1e-4


def test_rows_that_stay_keep_their_past_bit_for_bit(engine: Engine) -> None:
    """Whatever moves around them; and a row in the place of one that left finds nothing of it."""
    assert engine.head is not None
    state = filled(engine, windows=11)
    before = {name: ring.copy() for name, ring in state.rings.items()}
    state.remove(1)
    maps = engine.embed_texts([TEXTS[1]]).maps
    assert maps is not None
    state.add(maps[0])
    state.add(maps[0])
    state.remove(3)  # it came and went between two windows
    inputs = state.inputs()
    assert inputs["count"].tolist() == [11, 11, 0]
    for name, ring in before.items():
        np.testing.assert_array_equal(inputs[name][:2], ring[[0, 2]])
        assert not inputs[name][2].any() and ring.any((-1, -2)).all()
    state.reset()
    assert not any(state.inputs()[name].any() for name in (*before, "count"))


def test_a_row_goes_on_bit_for_bit_when_another_leaves(engine: Engine) -> None:
    """Two states of one past, in one of which a row leaves: what the others then say and remember is the same."""
    assert engine.head is not None
    one, other = filled(engine, windows=5), filled(engine, windows=5)
    other.remove(0)
    rng = np.random.default_rng(7)
    for _ in range(10):
        video = window(engine, rng)
        kept, alone = engine.head.step(video, one)["saliency"][1:], engine.head.step(video, other)["saliency"]
        np.testing.assert_array_equal(alone, kept)
    for name, ring in other.rings.items():
        np.testing.assert_array_equal(ring, one.rings[name][1:])


def filled(engine: Engine, windows: int) -> HeadState:
    """Three rows that have seen the same noise."""
    assert engine.head is not None
    state, rng = engine.head.new_state(), np.random.default_rng(0)
    for maps in engine.embed_texts(TEXTS).maps or ():
        state.add(maps)
    for _ in range(windows):
        engine.head.step(window(engine, rng), state)
    return state


def window(engine: Engine, rng: np.random.Generator) -> Mapping[str, Any]:
    assert engine.head is not None
    layers = rng.normal(size=(4, 50, 320)).astype(np.float32)
    return engine.head.map_video(layers, rng.normal(size=EMBEDDING).astype(np.float32))


# -- the commands


@pytest.mark.parametrize("command", ["run", "bench accuracy"])
def test_a_head_serves_its_own_hop_only(
    command: str, built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = write_video(tmp_path / "v.mp4", frames=60)
    truth = {"qid": 1, "query": "a dog", "vid": "v", "duration": 2.0, "relevant_windows": [[0, 1]]}
    truth |= {"relevant_clip_ids": [0], "saliency_scores": [[4, 4, 4]]}
    (tmp_path / "truth.jsonl").write_text(json.dumps(truth) + "\n")
    given = {
        "run": [str(video), "-q", "a dog"],
        "bench accuracy": ["--streams", str(tmp_path / "truth.jsonl"), "--videos", str(tmp_path)],
    }[command]
    assert main([*command.split(), *given, "--engine", str(built.folder), "--hop", "2"]) == 2
    told = capsys.readouterr().err
    assert (
        "trained at a hop of 1 s and serves no other: give --hop 1, not 2, or --zero-shot" in told
        and told.count("\n") == 1
    )
    assert main([*command.split(), *given, "--engine", str(built.folder)]) == 0


def test_a_head_is_served_without_torch(built: Built) -> None:
    script = (
        "import sys; from livemoments import main;"
        f"code = main(['run', 'test:ball', '-q', 'ball', '--for', '3', '--engine', {str(built.folder)!r}]);"
        "heavy = {'torch', 'transformers', 'onnx', 'models'} & set(sys.modules);"
        "sys.exit(code or (f'loaded {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
