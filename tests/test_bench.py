"""The benchmarks and the demo, end to end on small videos."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.camera import clips_folder
from bench.demo import BICYCLE, MAN, QUERIES
from livemoments import main
from models.r2_types import R2Config
from tests.media import truncate, write_video
from tests.test_clip import TINY
from trainer.metrics import Prediction, read_jsonl
from trainer.render import FPS, Kind, Segment, render

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
    out, plots = tmp_path / "found.jsonl", tmp_path / "plots"
    words = ["--streams", str(recordings / "truth.jsonl"), "--videos", str(recordings), "--out", str(out)]
    assert main(["bench", "accuracy", *words, "--plot", str(plots)]) == 0
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
        (["latency", "--seconds", "1"], "at least 5"),
        (["soak", "--minutes", "nan"], "at least 0.5"),
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
    plot = tmp_path / "latency.png"
    assert main(["bench", "latency", "--seconds", "6", "--plot", str(plot)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["windows"] >= 5 and result["events"] >= 8 * 5
    assert 0 < result["glass_to_event_p50_ms"] <= result["glass_to_event_p95_ms"]
    assert result["glass_to_event_p50_ms"] < result["glass_to_client_p50_ms"] + 5
    assert sum(result["share"].values()) == pytest.approx(1, abs=0.01)
    assert result["ratio_to_image_engine"]["image"] == 1
    assert plot.stat().st_size > 5000


def test_the_demo_finds_every_clip() -> None:
    """All of it: server, detector and subscriber in processes of their own. Exit code 1 says that a clip was missed."""
    words = [sys.executable, "-m", "bench.demo"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for text in QUERIES:
        assert text in " ".join(done.stdout.split())


def test_model_measures_a_window_in_both_runtimes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = R2Config(
        "causal", TINY.image.width, TINY.text.width, embedding=TINY.projection, depth=2, width=32, window=4
    )
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
