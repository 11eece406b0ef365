"""`livemoments train` as a user runs it: real processes on a small folder of the tvstream form."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from livemoments import main
from models.checkpoint import load_checkpoint
from tests.tv import make_tvstream

ROOT = Path(__file__).parent.parent
# fmt: off
SMALL = [
    "--width", "32", "--window", "6", "--length", "24", "--crops", "8", "--lr", "3e-3", "--warmup", "3",
    "--dropout", "0.1", "--zero-shot", "1", "--weight-saliency", "1", "--weight-batch", "0",
]
# fmt: on


@pytest.fixture(autouse=True)
def one_thread_in_children_too(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of summation depends on it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tvstream(tmp_path_factory.mktemp("features"))


def train(features: Path, out: Path, *options: str) -> int:
    return main(["train", "--features", str(features), "--out", str(out), *SMALL, *options])


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return found


def test_a_run_beats_zero_shot_and_leaves_checkpoint_table_picture_and_log(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(features, tmp_path / "run", "--epochs", "20") == 0
    told = result(capsys)
    assert told["trained"]["frame_ap_seen"] > told["zero-shot"]["frame_ap_seen"] + 0.1
    run = tmp_path / "run"
    assert (run / "report.png").stat().st_size > 10_000 and list((run / "log").iterdir())
    model, provenance = load_checkpoint(run / "best.safetensors", mode="causal")
    assert model.config.window == 6 and provenance.hop_s == 2.0 and set(provenance.calibration) == {"centre", "slope"}
    assert provenance.notes["config"]["lr"] == 3e-3 and "thing 0" not in provenance.notes["queries"]
    assert json.loads((run / "report.json").read_text())["trained"] == told["trained"]


def test_a_run_killed_in_the_middle_and_resumed_ends_as_one_that_was_not(features: Path, tmp_path: Path) -> None:
    options = ["--epochs", "4", "--refine", "joint"]
    assert train(features, tmp_path / "whole", *options) == 0
    command = [
        sys.executable,
        "-m",
        "livemoments",
        "train",
        "--features",
        str(features),
        "--out",
        str(tmp_path / "cut"),
    ]
    process = subprocess.Popen(
        [*command, *SMALL, *options], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    state = tmp_path / "cut" / "state.pt"
    deadline = time.monotonic() + 120
    while not (state.exists() and torch.load(state, weights_only=True)["done"] >= 1):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = torch.load(state, weights_only=True)["done"]
    assert 1 <= done < 4
    assert train(features, tmp_path / "cut", *options, "--resume") == 0
    for name in ("last.safetensors", "best.safetensors"):
        whole, cut = (load_file(tmp_path / run / name) for run in ("whole", "cut"))
        assert whole.keys() == cut.keys()
        assert all(torch.equal(whole[key], cut[key]) for key in whole), name


def test_other_seeds_give_other_weights_and_the_same_seed_the_same(features: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert train(features, tmp_path / name, "--epochs", "1", "--seed", seed) == 0
    a, b, c = (load_file(tmp_path / name / "last.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


@pytest.mark.parametrize(
    "options",
    [
        ["--mode", "clip"],
        ["--refine", "before", "--refine-epochs", "1"],
        ["--refine", "joint", "--inputs", "clip"],
        ["--amp"],
        ["--align", "5", "--piece", "6", "--queries", "3"],
        ["--queries", "4", "--query-noise", "0.3", "--learn-zero-shot"],
    ],
    ids=lambda options: " ".join(options),
)
def test_every_way_to_train_gives_a_checkpoint_that_scores(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert train(features, tmp_path / "run", "--epochs", "1", *options) == 0
    assert 0 < result(capsys)["trained"]["frame_ap"] <= 1


def test_refining_before_the_training_is_over_when_the_training_begins(features: Path, tmp_path: Path) -> None:
    assert train(features, tmp_path / "run", "--epochs", "2", "--refine", "before", "--refine-epochs", "2") == 0
    history = load_checkpoint(tmp_path / "run" / "last.safetensors")[1].notes["history"]
    assert [("mlrl" in row, "focal" in row, "val_ap" in row) for row in history] == [
        (True, False, False), (True, False, False), (False, True, True), (False, True, True)
    ]  # fmt: skip


def test_alignment_teaches_which_window_goes_with_which_text(features: Path, tmp_path: Path) -> None:
    """Untrained, a pair is one of as many as there are in a step; 56 of them make a loss of 2 log 56 = 8."""
    assert train(features, tmp_path / "run", "--epochs", "1", "--align", "60") == 0
    history = load_checkpoint(tmp_path / "run" / "last.safetensors")[1].notes["history"]
    assert set(history[0]) == {"epoch", "video", "layer", "total"} and history[0]["video"] < 6.5


def test_resuming_a_finished_run_changes_nothing(features: Path, tmp_path: Path) -> None:
    assert train(features, tmp_path / "run", "--epochs", "2") == 0
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("best.safetensors", "report.json")}
    assert train(features, tmp_path / "run", "--epochs", "2", "--resume") == 0
    model, provenance = load_checkpoint(tmp_path / "run" / "best.safetensors")
    (tmp_path / "old").write_bytes(before["best.safetensors"])
    old, known = load_checkpoint(tmp_path / "old")
    assert provenance.calibration == known.calibration and model.zero_shot == old.zero_shot
    assert (tmp_path / "run" / "report.json").read_bytes() == before["report.json"]


def test_a_causal_student_learns_from_a_teacher_that_sees_ahead(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(features, tmp_path / "teacher", "--epochs", "1", "--mode", "clip") == 0
    teacher = str(tmp_path / "teacher" / "best.safetensors")
    said = {}
    for weight in ("1e-9", "10"):
        out = tmp_path / weight
        assert train(features, out, "--epochs", "8", "--teacher", teacher, "--distil", weight) == 0
        said[weight] = load_checkpoint(out / "last.safetensors")[1].notes["history"][-1]["distil"]
    assert said["10"] < 0.9 * said["1e-9"], "it says what the teacher says, and would not have otherwise"


def test_a_run_can_begin_with_the_weights_of_another(features: Path, tmp_path: Path) -> None:
    assert train(features, tmp_path / "first", "--epochs", "1") == 0
    first = tmp_path / "first" / "last.safetensors"
    # A rate of next to nothing: what comes out is what went in.
    assert train(features, tmp_path / "second", "--epochs", "1", "--init", str(first), "--lr", "1e-12") == 0
    a, b = load_file(first), load_file(tmp_path / "second" / "last.safetensors")
    assert all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)


def test_two_processes_train_one_model(features: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "livemoments"]
    command += ["train", "--features", str(features), "--out", str(tmp_path / "run"), *SMALL, "--epochs", "2"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=170, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.strip().splitlines()[-1])["trained"]["frame_ap"] > 0
    assert load_checkpoint(tmp_path / "run" / "best.safetensors")[1].calibration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--lr", "-1"], "--lr must be above 0"),
        (["--lr", "1e9", "--clip-norm", "1e9"], "lower --lr"),
        (["--distil", "1"], "--teacher and --distil belong together"),
        (["--init", "nowhere.safetensors"], "nowhere.safetensors: no such file"),
        (["--hop", "3"], "hop of 3 s"),
        (["--train", "x.jsonl"], "holds its own truth"),
        (["--resume"], "holds no run to resume"),
        (["--align", "5", "--mode", "clip"], "--align is for causal models"),
        (["--piece", "1"], "--piece must be 0, or at least 2"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--weight-focal", "nan"], "--weight-focal must be at least 0"),
        (["--crops", "4000", "--lr", "1e9", "--clip-norm", "1e9"], "lower --lr"),
    ],
)
def test_mistakes_are_told_in_one_line(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert train(features, tmp_path / "run", "--epochs", "1", *options) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("livemoments: ") and message in told


def test_a_finished_run_is_not_overwritten_and_not_resumed_with_other_options(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(features, tmp_path / "run", "--epochs", "1") == 0
    before = (tmp_path / "run" / "best.safetensors").read_bytes()
    assert train(features, tmp_path / "run", "--epochs", "1") == 2
    assert "holds a run: go on with --resume" in capsys.readouterr().err
    assert train(features, tmp_path / "run", "--epochs", "2", "--resume") == 2
    assert "was made with other options (epochs)" in capsys.readouterr().err
    other = make_tvstream(tmp_path / "other", seed=1)
    assert train(other, tmp_path / "run", "--epochs", "1", "--resume") == 2
    assert "was made with other options (features)" in capsys.readouterr().err
    assert (tmp_path / "run" / "best.safetensors").read_bytes() == before


def test_a_torn_state_is_told_and_not_loaded(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(features, tmp_path / "run", "--epochs", "1") == 0
    state = tmp_path / "run" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    assert train(features, tmp_path / "run", "--epochs", "1", "--resume") == 2
    assert "state.pt cannot be read" in capsys.readouterr().err


def test_bench_accuracy_scores_other_folders_window_by_window(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(features, tmp_path / "run", "--epochs", "6") == 0
    capsys.readouterr()
    best = str(tmp_path / "run" / "best.safetensors")
    # The same things under new names, and new recordings: all of them are unseen.
    other = make_tvstream(tmp_path / "other", seed=0, videos=4)
    index = json.loads((other / "index.json").read_text())
    index["classes"] = [f"new {name}" for name in index["classes"]]
    (other / "index.json").write_text(json.dumps(index))
    for folder, kinds in ((features, {"seen", "unseen"}), (other, {"unseen"})):
        assert main(["bench", "accuracy", "--features", str(folder), "--checkpoint", best]) == 0
        told = result(capsys)
        assert main(["bench", "accuracy", "--features", str(folder), "--checkpoint", best, "--whole"]) == 0
        assert result(capsys)["trained"]["frame_ap"] == pytest.approx(told["trained"]["frame_ap"], abs=1e-3)
        assert told["split"] == "test"
        assert {kind for kind in ("seen", "unseen") if f"frame_ap_{kind}" in told["trained"]} == kinds
        assert told["trained"]["frame_ap"] > 0.3 and told["zero-shot"]["frame_ap"] > 0.3


def test_unseen_is_what_was_kept_out_of_training_not_what_happened_to_be_missing(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(features, tmp_path / "run", "--epochs", "1") == 0
    best, rows = tmp_path / "run" / "best.safetensors", tmp_path / "rows.jsonl"
    assert main(["bench", "accuracy", "--features", str(features), "--checkpoint", str(best), "--out", str(rows)]) == 0
    told = result(capsys)["trained"]
    aps = {line["query"]: line["trained"] for line in map(json.loads, rows.read_text().splitlines())}
    unseen = [ap for query, ap in aps.items() if query in ("thing 0", "thing 8")]
    assert len(unseen) == 2 and told["frame_ap_unseen"] == pytest.approx(sum(unseen) / 2)
    assert told["frame_ap"] == pytest.approx(sum(aps.values()) / len(aps))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "x.safetensors"], "go together"),
        (["--features", ".", "--checkpoint", "x.safetensors", "--videos", "y"], "go together"),
        (["--features", ".", "--checkpoint", "x.safetensors"], "x.safetensors: no such file"),
        ([], "nothing to score"),
    ],
)
def test_bench_accuracy_tells_what_is_missing(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["bench", "accuracy", *arguments]) == 2
    assert message in capsys.readouterr().err
