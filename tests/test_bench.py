"""The benchmarks and the demo, end to end on small videos."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import capacity, distractors, ops
from bench.camera import clips_folder
from bench.demo import BICYCLE, MAN, QUERIES
from kernels.build import export_graph
from kernels.recipe import make_recipe
from livemoments import main
from models.graphs import Graph as Exported
from models.r2_types import R2Config
from tests.media import truncate, write_video
from tests.parsed import Parsed
from tests.test_clip import TINY, publish
from tests.tv import make_tvstream
from trainer.metrics import Prediction, read_jsonl
from trainer.render import FPS, Kind, Segment, render

pytestmark = pytest.mark.timeout(600)  # engines are made, and streams watched, on however slow a machine

REQUIRED = (
    "queries frame_ap f1_default hd_map hit1 mr_r1_50 mr_r1_70 mr_map sr_1 sr_3 smd_1 sd ed false_alarms_per_hour"
)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One video with a man at 4 to 12 s, and a bicycle that never comes; truth.jsonl beside it."""
    folder = tmp_path_factory.mktemp("recordings")
    man = Segment(Kind.CLIP, 8 * FPS, clips_folder() / "carphone_pristine.mp4")
    render([Segment(Kind.ROOM, 4 * FPS), man, Segment(Kind.ROOM, 8 * FPS)], folder / "phone.mp4")
    rows = [
        {
            "qid": 7,
            "query": MAN,
            "vid": "phone",
            "duration": 20.0,
            "relevant_windows": [[4.0, 12.0]],
            "relevant_clip_ids": [2, 3, 4, 5],
            "saliency_scores": [[4, 4, 4]] * 4,
        },
        {
            "qid": 9,
            "query": BICYCLE,
            "vid": "phone",
            "duration": 20.0,
            "relevant_windows": [],
            "relevant_clip_ids": [],
            "saliency_scores": [],
        },
    ]
    (folder / "truth.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_accuracy_scores_what_was_published(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plots, page = tmp_path / "found.jsonl", tmp_path / "plots", tmp_path / "report.html"
    words = ["--streams", str(recordings / "truth.jsonl"), "--videos", str(recordings), "--out", str(out)]
    assert main(["bench", "accuracy", *words, "--plot", str(plots), "--report", str(page)]) == 0
    shown = capsys.readouterr().out.splitlines()
    result = json.loads(shown[-1])
    assert set(REQUIRED.split()) <= result.keys()
    assert result["queries"] == 2
    assert result["frame_ap"] > 0.9 and result["f1_default"] > 0.7
    assert result["mr_r1_50"] == 100 and result["hit1"] == 100
    assert result["moments_opened"] == result["moments_true"] == 1 and result["sr_1"] == 1
    assert result["false_alarms_per_hour"] == 0
    # A moment is told a little after it began, and its end only when the score has stayed low.
    assert -1.5 < result["sd"] < 2.5 and 0 < result["ed"] < 6
    assert {"device", "versions", "commit"} <= result.keys()
    found, silent = read_jsonl(out, Prediction)
    assert found.qid == 7 and np.abs(found.windows[0, :2] - [4, 12]).max() < 2
    assert silent.qid == 9 and len(silent.windows) == 0
    assert (plots / "phone.png").stat().st_size > 5000
    report = Parsed(page.read_text("utf-8"))
    assert [query["truth"] for query in report.data["streams"][0]["queries"]] == [[[4, 12]], []]
    start, end, _ = found.windows[0]
    assert [report.data["streams"][0]["queries"][0]["moments"][0][name] for name in ("start", "end")] == [start, end]
    assert len(report.pictures) == 1
    assert {"frame_ap", f"{result['frame_ap']:.3f}"} <= set(report.texts["td"])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda text: text.replace("phone", "forest"), "no video for vid forest"),
        (lambda text: text.replace('"qid": 9', '"qid": 7'), "qid 7 came before"),
        (lambda text: text[:-30], "truth.jsonl:2: not JSON"),
        (lambda text: "", "nothing to score"),
        (lambda text: text.replace('"duration": 20.0', '"duration": 0'), "truth.jsonl:1: duration: must be above 0"),
        (lambda text: text.replace('"duration": 20.0', '"duration": ' + "9" * 5000), "truth.jsonl:1: cannot be read"),
        (lambda text: "[" * 200_000, "truth.jsonl:1: "),
    ],
)
def test_accuracy_names_what_is_wrong_with_the_truth(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: object, line: str
) -> None:
    assert callable(change)
    truth = tmp_path / "truth.jsonl"
    truth.write_text(change((recordings / "truth.jsonl").read_text()))
    assert main(["bench", "accuracy", "--streams", str(truth), "--videos", str(recordings)]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said


def test_a_video_that_breaks_off_is_not_half_scored(
    recordings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    video = write_video(tmp_path / "phone.mp4", frames=600, size=(160, 120), options={"movflags": "faststart"})
    truncate(video, 0.5)
    words = ["bench", "accuracy", "--streams", str(recordings / "truth.jsonl"), "--videos", str(tmp_path)]
    assert main(words) == 2
    assert "it may be truncated" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["accuracy", "--out", "/nowhere/x.jsonl"], "cannot write /nowhere/x.jsonl"),
        (["accuracy", "--plot", "/dev/null/plots"], "cannot make the folder /dev/null/plots"),
        (["latency", "--plot", "/nowhere/x.png"], "cannot write /nowhere/x.png"),
        (["accuracy", "--report", "/nowhere/x.html"], "cannot write /nowhere/x.html"),
        (["accuracy", "--report", "x.html", "--features", "x", "--checkpoint", "y"], "--report shows recordings"),
        (["latency", "--report", "/nowhere/x.html"], "cannot write /nowhere/x.html"),
        (["latency", "--compare-queries", "--report", "x.html"], "leave it or --compare-queries out"),
        (["latency", "--seconds", "1"], "at least 5"),
        (["latency", "--queries", "0"], "--queries must be from 1 to 1000"),
        (["latency", "--hop", "0.5"], "trained at a hop of 1 s"),
        (["latency", "--compare-queries", "--plot", "x.png"], "leave it or --compare-queries out"),
        (["capacity", "--seconds", "2"], "at least 3"),
        (["capacity", "--most", "0"], "--most must be from 1 to 1000"),
        (["capacity", "--engine", "/nowhere"], "/nowhere"),
        (["capacity", "--plot", "/nowhere/x.png"], "cannot write /nowhere/x.png"),
        (["soak", "--minutes", "nan"], "at least 0.1"),
        (["soak", "--streams", "65"], "--streams must be from 1 to 64"),
        (["page", "--rounds", "0"], "--rounds must be at least 1"),
        (["backfill", "--seconds", "nan"], "--seconds must be from 10 to 86400"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_work(
    recordings: Path, words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if words[0] == "accuracy":
        words = [*words, "--streams", str(recordings / "truth.jsonl"), "--videos", str(recordings)]
    assert main(["bench", *words]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said


def test_latency_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot, page = tmp_path / "latency.png", tmp_path / "latency.html"
    words = ["--seconds", "6", "--queries", "9", "--plot", str(plot), "--report", str(page)]
    assert main(["bench", "latency", *words]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["windows"] >= 5 and result["events"] >= 9 * 5 and result["queries"] == 9
    assert 0 < result["glass_to_event_p50_ms"] <= result["glass_to_event_p95_ms"]
    assert result["glass_to_event_p50_ms"] < result["glass_to_client_p50_ms"] + 5
    # A client hears of an event only once it is stored.
    assert 0 < result["event_to_stored_p50_ms"] < result["glass_to_client_p50_ms"]
    assert sum(result["share"].values()) == pytest.approx(1, abs=0.01)
    ratios = result["ratio_to_image_engine"]
    assert ratios["image"] == 1
    assert result["rest"] == pytest.approx(sum(ratios.values()) - 1 - ratios["decode"], abs=0.01)
    assert result["rest_without_wait"] == pytest.approx(result["rest"] - ratios["wait"], abs=0.01)
    assert plot.stat().st_size > 5000
    report = Parsed(page.read_text("utf-8"))
    assert {f"{result['glass_to_event_p95_ms']:.1f} ms", f"{ratios['head']:.2f}", "rest without wait"} <= set(
        report.texts["td"]
    )
    assert report.tags.count("svg") == 1 and "1280x720" in report.texts["dd"]


def test_a_window_with_more_queries_takes_longer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "latency", "--compare-queries", "--seconds", "20"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["windows"] == 20 and result["queries"] == [10, 100]
    assert result["rest_ratio"] == pytest.approx(result["rest_100_queries_ms"] / result["rest_10_queries_ms"], abs=0.01)
    assert result["rest_ratio"] > 1
    for queries in (10, 100):
        assert result[f"rest_{queries}_queries_ms"] < result[f"window_{queries}_queries_ms"]


@pytest.mark.parametrize(("bears", "most"), [(0, 8), (1, 8), (5, 32), (6, 7), (7, 7), (20, 32), (32, 32), (40, 33)])
def test_a_search_ends_between_what_is_borne_and_what_is_not(bears: int, most: int) -> None:
    left: list[int] = []
    steps = capacity.search(lambda n: {"streams": n, "borne": n <= bears}, most, left.append)
    tried = [step["streams"] for step in steps]
    assert tried == sorted(set(tried)) and len(tried) == len(left) <= left[0]
    assert max((step["streams"] for step in steps if step["borne"]), default=0) == min(bears, most)
    if bears < most:
        assert bears + 1 in tried
    # Each step brings the end nearer by one at least.
    assert all(after < before for before, after in pairwise(left)) and left[-1] >= 1


def test_capacity_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "capacity.png"
    assert main(["bench", "capacity", "--seconds", "3", "--most", "2", "--plot", str(plot)]) == 0
    shown = capsys.readouterr().out.splitlines()
    result = json.loads(shown[-1])
    assert [step["streams"] for step in result["steps"]] == [1, 2]
    assert result["capacity"] == max((step["streams"] for step in result["steps"] if step["borne"]), default=0)
    assert result["next_bottleneck"] in shown[-2] and "processors" in result["next_bottleneck"]
    for step in result["steps"]:
        assert step["borne"] == (not step["problems"])
        # Each stream is a window a second and an event a window and query; its frames come at the camera's pace.
        assert step["events"] >= 8 * 2 * step["streams"]
        assert step["decoded"] == pytest.approx(3 * 25 * step["streams"], rel=0.25)
        assert 0 < step["glass_to_event_p50_ms"] <= step["glass_to_client_p95_ms"] + 5
        # The stages are all that the process takes, but for what threads took that have ended since.
        assert 0.75 * step["cpu_service"] < sum(step["cpu"].values()) < step["cpu_service"] + 0.03
        assert all(value >= 0 for value in step["cpu"].values())
        assert step["cpu"]["decode"] > step["cpu"]["head"] > 0 and step["cpu"]["image"] > 0 < step["cpu"]["delivery"]
        assert step["cpu_cameras"] > 0
    assert plot.stat().st_size > 5000


def test_soak_watches_memory_and_latency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "soak.png"
    words = ["--streams", "1", "--minutes", "0.1", "--queries", "4", "--plot", str(plot)]
    assert main(["bench", "soak", *words]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["streams"] == 1 and result["queries"] == 4 and result["minutes"] == 0.1
    assert 50 < result["rss_settled_mb"] <= result["rss_highest_mb"] >= result["rss_at_end_mb"]
    assert result["growth"] == pytest.approx(result["rss_at_end_mb"] / result["rss_settled_mb"] - 1, abs=1e-4)
    assert result["decoded"] == pytest.approx(6 * 25, rel=0.25)
    assert result["events"] > 0 and result["glass_to_client_p95_ms"] > 0
    assert plot.stat().st_size > 5000


def test_page_and_clips_are_weighed_in_turns(capsys: pytest.CaptureFixture[str]) -> None:
    # The room is empty for 5 s at a time: a shorter turn might see no moment.
    assert main(["bench", "page", "--seconds", "8", "--rounds", "1", "--clients", "2", "--queries", "4"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    without, beside = result["turns"]
    assert (without["kind"], beside["kind"]) == ("without", "with") and result["clients"] == 2
    assert "clips" not in without and beside["clips"] >= 1 and beside["clips_mb"] > 0
    assert result["ratio"] == pytest.approx(beside["p95_ms"] / without["p95_ms"], abs=0.01)


def test_backfill_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "backfill", "--seconds", "20", "--rounds", "1", "--queries", "3"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["windows"] == 20 and list(result["answered_ms"]) == ["1", "3"]
    assert all(ms > 0 for ms in result["answered_ms"].values())


def test_the_demo_finds_every_clip() -> None:
    """All of it: server, detector and subscriber in processes of their own. Exit code 1 says that a clip was missed."""
    words = [sys.executable, "-m", "bench.demo"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for text in QUERIES:
        assert text in " ".join(done.stdout.split())


def test_model_measures_a_window_in_both_runtimes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    towers = TINY.image.width, TINY.text.width, TINY.projection
    small = R2Config("causal", *towers, depth=1, width=32, window=4, strides=(1, 2))
    monkeypatch.setattr("bench.model.VIT_B32", TINY)
    monkeypatch.setattr("bench.model.CAUSAL", small)
    monkeypatch.setattr("bench.model.TURN_S", 0.001)
    plot = tmp_path / "cost.png"
    assert main(["bench", "model", "--rounds", "1", "--windows", "200", "--plot", str(plot)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    for runtime in ("torch", "onnxruntime", "arithmetic"):
        assert result[runtime].keys() == {
            "published_again_over_window",
            "window_16_queries_over_tower",
            "tower_over_further_query",
        }
    # The operations are counted, so they do not depend on the machine: 90 more queries cost 90 times one more.
    gflop = [result["gflop"][f"causal window, {queries} queries"] for queries in (10, 100, 1000)]
    assert gflop[2] - gflop[1] == pytest.approx(10 * (gflop[1] - gflop[0]), rel=1e-3)
    assert plot.stat().st_size > 10_000
    assert main(["bench", "model", "--windows", "5"]) == 2
    assert "--windows more than 100" in capsys.readouterr().err


def test_ops_stand_beside_their_reference_and_their_floor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny CLIP in the place of both backbones: real engines, a real head."""
    recipe = make_recipe(str(publish(TINY, tmp_path)), None)
    monkeypatch.setattr(ops, "VIT_B32", TINY)
    monkeypatch.setattr(ops, "make_recipe", lambda *_: recipe)
    monkeypatch.setattr(ops, "OPENVINO_GROUP", 8)
    monkeypatch.setattr(ops, "class_captions", lambda: ["a photo of a dog", "a photo of a cat"])
    small = R2Config("causal", 32, 24, embedding=16, depth=1, width=32, heads=2, window=4, strides=(1, 2))
    monkeypatch.setattr(ops, "CAUSAL", small)
    assert main(["bench", "ops", "--rounds", "1"]) == 0
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    found = {(row["op"], row["runtime"]): row for row in result["ops"]}
    assert {runtime for op, runtime in found if op == "image tower, ViT-B/32"} >= {"torch", "ONNX Runtime int8"}
    kernels = {"preprocessing, 720p", "ring attention, 1000 rows", "saliency and crossings, 1000 rows"}
    assert kernels | {"text tower, lite", "head, 16 queries", "head, 1000 queries"} <= {op for op, _ in found}
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 for row in found.values())
    assert found["head, 1000 queries", "torch"]["floor_ms"] > found["head, 16 queries", "torch"]["floor_ms"]
    assert all(rate > 0.1 for rate in result["giga_per_s"].values())


def test_an_engine_that_disagrees_with_torch_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Exported(torch.nn.Linear(8, 8).requires_grad_(False), {"x": torch.randn(4, 8)}, ("y",), {"x": {0: "n"}})
    x = [torch.randn(4, 8)]
    exported = export_graph(graph)
    assert "ONNX Runtime fp32" in ops._engine("right", graph, exported, x, x, ("fp32",)).runtimes
    monkeypatch.setattr(ops, "_onnxruntime", lambda *_: [np.ones((4, 8), np.float32)])
    assert "ONNX Runtime fp32" not in ops._engine("wrong", graph, exported, x, x, ("fp32",)).runtimes


def test_distractors_tell_likely_texts_from_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Made-up features in which every frame answers every text a little, some frames more than others."""
    folder = make_tvstream(tmp_path / "tv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench.distractors", "--features", str(folder)])
        assert distractors.main() == 0
        ways = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["ways"]
        assert next(iter(ways)) == "cosine" and len(ways) == 5
        assert all(0 < row["frame_ap"] <= 1 and 0 < row["f1"] <= 1 for row in ways.values())
        patch.setattr(sys, "argv", ["bench.distractors", "--features", str(tmp_path / "none")])
        assert distractors.main() == 2
    assert "no such file" in capsys.readouterr().err.lower()


def test_common_answers_cancel_against_distractors() -> None:
    """A part that every text shares moves the cosine, and not the odds."""
    rng = np.random.default_rng(0)
    texts = np.linalg.qr(rng.normal(size=(16, 16)))[0].astype(np.float32)
    frames = np.stack([texts[3], texts[5]]) + 0.2 * texts.sum(0) * np.array([[0.0], [3.0]], np.float32)
    frames = (frames / np.linalg.norm(frames, axis=1, keepdims=True)).astype(np.float32)
    ways = distractors.ways(texts)
    odds = ways["likelier than distractors, temperature 0.02"](frames, 3)
    assert odds[0] > 2 > odds[1]
