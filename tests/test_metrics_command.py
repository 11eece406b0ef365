"""`livemoments metrics`, from the files to what is printed, and what it says of files that are wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from livemoments import main
from tests.conftest import SHARED
from trainer.benchmark_metrics import RECALL_IOUS
from trainer.metrics import IOU_THRESHOLDS
from trainer.metrics_command import KINDS

ROOT = Path(__file__).parent.parent
Row = dict[str, Any]

TRUTH: Row = {
    "qid": 1,
    "query": "a dog",
    "vid": "v",
    "duration": 10,
    "relevant_windows": [[2, 6]],
    "relevant_clip_ids": [1, 2],
    "saliency_scores": [[4, 4, 4], [4, 4, 4]],
}
GUESS: Row = {"qid": 1, "pred_relevant_windows": [[2, 6, 0.5]], "pred_saliency_scores": [0, 0.9, 0.8, 0, 0]}
TVSUM: Row = {"qid": "x", "domain": "VU", "label": [[5] * 20, [1] * 20, [1] * 20], "relevant_windows": None}
YOUTUBE: Row = {"qid": "x", "domain": "dog", "label": [[1], [0], [0]], "match": [1, 0, -1]}
SCORED: Row = {"qid": "x", "pred_saliency_scores": [0.9, 0.5, 0.7]}
TOLD: Row = {"qid": 1, "opened": [[3, 2.5]], "closed": [[8, 2.5, 6.5, 0.9]]}


def write(path: Path, *rows: Row | str) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def metrics(capsys: pytest.CaptureFixture[str], gt: Path, pred: Path, kind: str | None = None) -> Row:
    words = ["--kind", kind] if kind else []
    assert main(["metrics", "--gt", str(gt), "--pred", str(pred), *words]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    result: Row = json.loads(shown.out, parse_constant=pytest.fail)
    return result


@pytest.mark.shared
@pytest.mark.usefixtures("shared_data")
def test_the_official_file_comes_out_to_the_last_digit() -> None:
    folder = SHARED / "qvhighlights"
    words = ["--gt", str(folder / "highlight_val_release.jsonl"), "--pred", str(folder / "moment_detr_val_preds.jsonl")]
    command = [sys.executable, "livemoments.py", "metrics", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == (folder / "moment_detr_val_metrics.json").read_text().strip()


def test_the_base_install_is_enough(tmp_path: Path) -> None:
    gt, pred = write(tmp_path / "t.jsonl", TRUTH), write(tmp_path / "p.jsonl", GUESS)
    script = (
        "import sys; from livemoments import main;"
        f"code = main(['metrics', '--gt', {str(gt)!r}, '--pred', {str(pred)!r}]);"
        "other = {'torch', 'scipy', 'sklearn', 'onnxruntime', 'gi', 'rich', 'models', 'stream'} & set(sys.modules);"
        "sys.exit(code or (f'loaded {other}' if other else 0))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_perfect_predictions_score_100_and_what_cannot_be_measured_is_null(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = metrics(capsys, write(tmp_path / "t.jsonl", TRUTH), write(tmp_path / "p.jsonl", GUESS))
    assert result["brief"]["MR-full-mAP"] == result["brief"]["HL-min-VeryGood-Hit1"] == 100.0
    assert result["full"]["MR-R1"] == dict.fromkeys(map(str, IOU_THRESHOLDS), 100.0)
    assert result["brief"]["MR-long-mAP"] is None  # no true window is that long


@pytest.mark.parametrize("kind", RECALL_IOUS)
def test_recall_needs_no_saliency(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    starts = {1: 2, "b": 12, 3: 22, 4: 32}
    truths = [{"qid": qid, "duration": 50, "relevant_windows": [[start, start + 4]]} for qid, start in starts.items()]
    guesses: list[Row] = [  # in another order
        {"qid": 4, "pred_relevant_windows": [[0, 1, 0.1], [32, 36, 0.9]]},
        {"qid": "b", "pred_relevant_windows": []},
        {"qid": 3, "pred_relevant_windows": [[22, 24, 0.2]]},
        {"qid": 1, "pred_relevant_windows": [[2, 6, 0.1], [0, 1, 0.9]]},
    ]
    brief = metrics(capsys, write(tmp_path / "t.jsonl", *truths), write(tmp_path / "p.jsonl", *guesses), kind)["brief"]
    assert (brief["MR-full-R1@0.5"], brief["MR-full-R1@0.7"], brief["MR-full-R5@0.7"]) == (50.0, 25.0, 50.0)
    assert brief["MR-full-mIoU"] == 37.5


def test_highlights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pred = write(tmp_path / "p.jsonl", SCORED)
    tvsum = metrics(capsys, write(tmp_path / "t.jsonl", TVSUM), pred, "tvsum")
    assert tvsum == {"brief": {"mAP": 100.0}, "domains": {"VU": 100.0}, "videos": {"x": 100.0}}
    backward = write(tmp_path / "b.jsonl", SCORED | {"pred_saliency_scores": [0.1, 0.5, 0.7]})
    youtube = metrics(capsys, write(tmp_path / "y.jsonl", YOUTUBE), backward, "youtube")
    assert youtube["domains"] == {"dog": 16.67}  # the third of three: (0 + 1/3) / 2


def test_streaming(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    never = TRUTH | {"qid": 2, "relevant_windows": []}
    silent: Row = {"qid": 2, "opened": [], "closed": []}
    result = metrics(
        capsys, write(tmp_path / "t.jsonl", TRUTH, never), write(tmp_path / "p.jsonl", TOLD, silent), "streaming"
    )
    assert result == {
        "queries": 2,
        "moments_true": 1,
        "moments_opened": 1,
        "recall": 1.0,
        **{f"sr_{k}": 1.0 for k in (1, 2, 3)},
        **{f"smd_{k}": 0.5 for k in (1, 2, 3)},
        "sd": 1.0,
        "ed": 2.0,
        "false_alarms_per_hour": 0.0,
    }
    result = metrics(
        capsys, write(tmp_path / "t.jsonl", TRUTH), write(tmp_path / "p.jsonl", silent | {"qid": 1}), "streaming"
    )
    assert result["smd_1"] == 10.0 and result["sd"] is None


def test_strings_may_hold_line_separators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gt = tmp_path / "t.jsonl"
    gt.write_text(json.dumps(TRUTH | {"query": "a\u2028dog\x85 "}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert metrics(capsys, gt, write(tmp_path / "p.jsonl", GUESS))["brief"]["MR-full-mAP"] == 100.0


# What is wrong is told in one line


def complaint(capsys: pytest.CaptureFixture[str], gt: Path, pred: Path, kind: str = "qvhighlights") -> str:
    assert main(["metrics", "--gt", str(gt), "--pred", str(pred), "--kind", kind]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and len(shown.err) < 500
    assert shown.err.startswith("livemoments: ")
    return shown.err.removeprefix("livemoments: ").rstrip("\n")


BAD_LINES: list[tuple[str, Row | str, str]] = [
    ("broken JSON", '{"qid": 2, "pred_relevant_windows": [[', "not JSON: Expecting value"),
    ("two objects", '{"qid": 2} {"qid": 3}', "not JSON: Extra data"),
    ("no object", "[1, 2]", "not a JSON object"),
    ("bottomless", "[" * 100_000, "cannot be read: maximum recursion depth"),
    ("endless", '{"qid": ' + "9" * 5000 + "}", "cannot be read: Exceeds the limit"),
    ("duplicate", GUESS, "qid 1 came before, in line 1"),
    ("unknown", GUESS | {"qid": 99}, "qid 99 is not in"),
    ("another type of qid", GUESS | {"qid": "2"}, "qid '2' is not in"),
    ("another video", GUESS | {"qid": 2, "vid": "w"}, "vid 'w' of qid 2 is 'v' in"),
    ("another query", GUESS | {"qid": 2, "vid": "v", "query": "a cat"}, "query 'a cat' of qid 2 is 'a dog' in"),
    ("no qid", {k: v for k, v in GUESS.items() if k != "qid"}, "missing key 'qid'"),
    ("qid of a fraction", GUESS | {"qid": 2.0}, "qid must be a whole number or a string, got 2.0"),
    ("qid true", GUESS | {"qid": True}, "qid must be a whole number or a string, got True"),
    ("qid of lists", GUESS | {"qid": [[0] * 9] * 999}, "qid must be a whole number or a string, got [[0, 0"),
    ("no windows", {"qid": 2, "pred_saliency_scores": []}, "missing key 'pred_relevant_windows'"),
    ("no saliency", {"qid": 2, "pred_relevant_windows": []}, "missing key 'pred_saliency_scores'"),
    (
        "backward",
        GUESS | {"qid": 2, "pred_relevant_windows": [[1, 2, 0.5], [6, 2, 0.5]]},
        "ends before it starts: [6.0, 2.0",
    ),
    (
        "no score",
        GUESS | {"qid": 2, "pred_relevant_windows": [[2, 6]]},
        "expected numbers of shape (-1, 3), got [[2, 6]]",
    ),
    (
        "ragged",
        GUESS | {"qid": 2, "pred_relevant_windows": [[2, 6, 1], [3]]},
        "pred_relevant_windows: expected numbers",
    ),
    (
        "words",
        GUESS | {"qid": 2, "pred_relevant_windows": [["2", "6", "1"]]},
        "pred_relevant_windows: expected numbers",
    ),
    ("a text", GUESS | {"qid": 2, "pred_relevant_windows": "a\nb"}, "pred_relevant_windows: expected numbers"),
    ("null", GUESS | {"qid": 2, "pred_saliency_scores": None}, "pred_saliency_scores: expected numbers"),
    ("true", GUESS | {"qid": 2, "pred_saliency_scores": [True, 1]}, "pred_saliency_scores: expected numbers"),
    ("NaN", GUESS | {"qid": 2, "pred_saliency_scores": [float("nan")]}, "NaN is not a number"),
    ("infinite", GUESS | {"qid": 2, "pred_relevant_windows": [[0, float("inf"), 1]]}, "Infinity is not a number"),
    ("too large", '{"qid": 2, "pred_relevant_windows": [[0, 1e999, 1]]}', "holds a number that is not finite"),
    ("far away", GUESS | {"qid": 2, "pred_relevant_windows": [[-1e300, 1e300, 1]]}, "a window lies beyond 1e+06 s"),
]


@pytest.mark.parametrize(("bad", "cause"), [c[1:] for c in BAD_LINES], ids=[c[0] for c in BAD_LINES])
def test_a_bad_prediction_is_named_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: Row | str, cause: str
) -> None:
    gt = write(tmp_path / "t.jsonl", TRUTH, TRUTH | {"qid": 2})
    pred = write(tmp_path / "p.jsonl", GUESS, "", bad)
    said = complaint(capsys, gt, pred)
    assert said.startswith(f"{pred}:3: ") and cause in said


def test_a_missing_prediction_is_named_with_the_line_that_asks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gt = write(tmp_path / "t.jsonl", TRUTH, TRUTH | {"qid": 2}, TRUTH | {"qid": 3})
    pred = write(tmp_path / "p.jsonl", GUESS)
    said = complaint(capsys, gt, pred)
    assert said == f"{pred}:1: the file ends without a prediction for qid 2 of {gt}:2 (and 1 more)"


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_an_empty_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    full, empty = write(tmp_path / "full.jsonl", TRUTH | GUESS), tmp_path / "empty.jsonl"
    empty.write_bytes(content)
    for kind in KINDS[:4]:
        assert complaint(capsys, full, empty, kind) == f"{empty}:1: the file is empty, so there is nothing to score"
        assert complaint(capsys, empty, full, kind) == f"{empty}:1: the file is empty, so there is nothing to score"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gt, latin = write(tmp_path / "t.jsonl", TRUTH), tmp_path / "latin.jsonl"
    latin.write_bytes(json.dumps(GUESS).encode() + b'\n{"qid": "caf\xe9"}\n')
    assert complaint(capsys, gt, latin).startswith(f"{latin}:2: cannot be read: 'utf-8' codec can't decode")
    assert complaint(capsys, gt, tmp_path / "none") == f"{tmp_path / 'none'}: cannot be read: No such file or directory"
    assert complaint(capsys, tmp_path, gt) == f"{tmp_path}: cannot be read: Is a directory"


@pytest.mark.parametrize(
    ("kind", "truth", "guess", "cause"),
    [
        ("qvhighlights", TRUTH | {"relevant_windows": [[2, 2]]}, GUESS, "a window ends where it starts"),
        ("qvhighlights", TVSUM, SCORED, "missing key 'duration'"),
        ("charades", TRUTH | {"relevant_windows": []}, GUESS, "recall asks for one"),
        ("nlq", TRUTH | {"relevant_windows": [[6, 2]]}, GUESS, "a window ends before it starts: [6.0, 2.0]"),
        ("tacos", TVSUM, SCORED, "relevant_windows: expected numbers of shape (-1, 2), got None"),
        ("tvsum", YOUTUBE, SCORED, "label: expected numbers of shape (-1, 20), got [[1], [0], [0]]"),
        ("youtube", TVSUM, SCORED, "label: expected numbers of shape (-1, 1), got [[5, 5"),
        ("tvsum", TRUTH, GUESS, "missing key 'label'"),
        ("youtube", YOUTUBE | {"label": []}, SCORED, "no clip is labelled"),
        ("youtube", YOUTUBE | {"domain": 3}, SCORED, "domain must be a string, got 3"),
        ("streaming", TRUTH | {"duration": 0}, TOLD, "duration: must be above 0"),
    ],
)
def test_bad_annotations_are_named_and_no_kind_takes_those_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, truth: Row, guess: Row, cause: str
) -> None:
    gt, pred = write(tmp_path / "t.jsonl", truth), write(tmp_path / "p.jsonl", guess)
    said = complaint(capsys, gt, pred, kind)
    assert said.startswith(f"{gt}:1: ") and cause in said


@pytest.mark.parametrize(
    ("told", "cause"),
    [
        (GUESS, "missing key 'opened'"),
        (TOLD | {"opened": [[3]]}, "opened: expected numbers of shape (-1, 2)"),
        (TOLD | {"opened": [[1e300, 3]]}, "opened: a time lies beyond 1e+06 s"),
        (TOLD | {"closed": [[8, 6, 2, 0.9]]}, "closed: a moment ends before it starts"),
    ],
)
def test_bad_events_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], told: Row, cause: str) -> None:
    gt, pred = write(tmp_path / "t.jsonl", TRUTH), write(tmp_path / "p.jsonl", told)
    said = complaint(capsys, gt, pred, "streaming")
    assert said.startswith(f"{pred}:1: ") and cause in said


def test_streaming_needs_something_that_comes_true(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gt, pred = write(tmp_path / "t.jsonl", TRUTH | {"relevant_windows": []}), write(tmp_path / "p.jsonl", TOLD)
    assert complaint(capsys, gt, pred, "streaming").startswith(f"{gt}: no query in it ever comes true")
