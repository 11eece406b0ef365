"""Data sets of the tvstream form: their truth by the letter of the definition, and every way to get one wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kernels.errors import InputError
from tests.tv import CLASSES, make_tvstream
from trainer.scoring import mean_ap, zero_shot
from trainer.tvstream import load_tvstream


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tvstream(tmp_path / "tv")


@pytest.mark.parametrize("hop_s", [1.0, 2.0])
def test_truth_and_moments_are_those_of_the_keyframes(folder: Path, hop_s: float) -> None:
    dataset = load_tvstream(folder, hop_s)
    arrays = load_file(folder / "v5.safetensors")
    pts = arrays["pts"].astype(float)
    assert dataset.samples["test"]
    for sample in dataset.samples["test"]:
        place = int(sample.query.split()[1])
        on = sorted(arrays["label_frame"][arrays["label_class"] == place].tolist())
        moments: list[list[float]] = []
        for frame in on:
            start = pts[0] if frame == 0 else (pts[frame - 1] + pts[frame]) / 2
            end = pts[-1] if frame == len(pts) - 1 else (pts[frame] + pts[frame + 1]) / 2
            if moments and moments[-1][2] == frame - 1:
                moments[-1][1:] = [end, frame]
            else:
                moments.append([start, end, frame])
        np.testing.assert_allclose(sample.windows, [moment[:2] for moment in moments], atol=1e-4)
        index, labels = sample.scored()
        assert labels.tolist() == [frame in on for frame in range(len(pts))]
        for frame, window in enumerate(index.tolist()):
            holders = [w for w in range(len(sample.inside)) if w * hop_s <= pts[frame] < w * hop_s + 2]
            assert window == holders[0]
        for window in np.flatnonzero(sample.inside):
            before, after = sample.distances[window] * hop_s
            at = window * hop_s + 1
            lengths = [end - start for start, end, _ in moments]
            assert min(abs(before + after - length) for length in lengths) < 1e-3
            assert any(abs(at - before - start) <= 2 for start, _, _ in moments)


def test_a_class_in_every_eighth_place_is_never_trained_on(folder: Path) -> None:
    dataset = load_tvstream(folder, 2.0)
    assert dataset.unseen == {"thing 0", "thing 8"}
    assert not dataset.unseen & {sample.query for sample in dataset.samples["train"]}
    assert dataset.unseen & {sample.query for sample in [*dataset.samples["val"], *dataset.samples["test"]]}


def test_a_seen_class_of_the_same_name_as_an_unseen_one_is_not_trained_on_either(folder: Path) -> None:
    index = json.loads((folder / "index.json").read_text())
    index["classes"][3] = index["classes"][8] = "bench"
    (folder / "index.json").write_text(json.dumps(index))
    dataset = load_tvstream(folder, 2.0)
    assert dataset.unseen == {"thing 0", "bench (8)"}
    assert not {"bench (3)", "bench (8)"} & {sample.query for sample in dataset.samples["train"]}
    assert "bench (3)" in {s.query for split in ("val", "test") for s in dataset.samples[split]}


def test_a_class_on_too_many_or_too_few_keyframes_is_no_query(folder: Path) -> None:
    arrays = load_file(folder / "v5.safetensors")
    frames = len(arrays["pts"])
    label = np.repeat([1, 2, 3, 4], [2, 3, frames // 5, frames // 5 + 1])
    frame = np.concatenate([np.arange(n) for n in (2, 3, frames // 5, frames // 5 + 1)])
    arrays |= {"label_class": label.astype(np.int16), "label_frame": frame.astype(np.int32)}
    save_file(arrays, folder / "v5.safetensors")
    assert [s.query for s in load_tvstream(folder, 2.0).samples["test"]] == ["thing 2", "thing 3"]


def test_features_of_a_window_do_not_change_with_the_future(folder: Path) -> None:
    before = load_tvstream(folder, 2.0).video("v0")
    arrays = load_file(folder / "v0.safetensors")
    late = arrays["pts"] > 60
    arrays["features"][late] = -arrays["features"][late]
    save_file(arrays, folder / "v0.safetensors")
    after = load_tvstream(folder, 2.0).video("v0")
    assert np.array_equal(before.layers[:29], after.layers[:29])
    assert not np.array_equal(before.layers[31:], after.layers[31:])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "index.json").unlink(), "index.json: No such file"),
        (lambda f: (f / "index.json").write_text("{"), "index.json is malformed"),
        (lambda f: (f / "index.json").write_text('{"classes": [1], "splits": {}}'), "classes must be names"),
        (lambda f: (f / "v2.safetensors").unlink(), "v2.safetensors: no such file"),
        (lambda f: (f / "v2.safetensors").write_bytes(b"no"), "v2.safetensors cannot be read"),
        (lambda f: save_file({"text": np.zeros((3, 32), np.float32)}, f / "text.safetensors"), "3 texts"),
        (lambda f: _alter(f, pts=lambda x: x[::-1].copy()), "ascending"),
        (lambda f: _alter(f, features=lambda x: x[:, :5].copy()), "features"),
        (lambda f: _alter(f, features=lambda x: np.full_like(x, np.nan)), "not a number"),
        (lambda f: _alter(f, label_class=lambda x: x + CLASSES), "label_class"),
        (lambda f: _alter(f, label_frame=lambda x: x[1:].copy()), "label_frame"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_one_line(folder: Path, break_it: object, message: str) -> None:
    assert callable(break_it)
    break_it(folder)
    with pytest.raises(InputError, match=message) as told:
        load_tvstream(folder, 2.0)
    assert "\n" not in str(told.value)


def _alter(folder: Path, **changes: object) -> None:
    arrays = load_file(folder / "v2.safetensors")
    for name, change in changes.items():
        assert callable(change)
        arrays[name] = change(arrays[name])
    save_file(arrays, folder / "v2.safetensors")


@pytest.mark.shared
def test_zero_shot_on_real_windows_is_that_of_their_keyframes(shared_data: Path) -> None:
    """Without windows it is 0.297 on val; on windows of 2 s that do not overlap, hardly less."""
    dataset = load_tvstream(shared_data / "tvstream", 2.0, ("val",))
    samples = dataset.samples["val"]
    assert mean_ap(samples, zero_shot(dataset, samples)) == pytest.approx(0.297, abs=0.005)
