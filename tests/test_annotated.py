"""Annotated features of every layout in use, written as their makers write them, read back as one thing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from kernels.errors import InputError
from trainer.annotated import load_annotated
from trainer.dataset import Dataset
from trainer.resample import resample

Array = NDArray[Any]


def numbers(*shape: int, seed: int = 0, dtype: type = np.float32) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def line(qid: int, vid: str, **more: Any) -> dict[str, Any]:
    common = {"query": f"query {qid}", "duration": 20, "relevant_windows": [[4, 8]]}
    return {"qid": qid, "vid": vid} | common | more


def annotate(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of files: name -> its arrays, or the one array of .npy."""

    def make(name: str, **files: Any) -> Path:
        made = tmp_path / name
        made.mkdir()
        for stem, arrays in files.items():
            if isinstance(arrays, dict):
                np.savez(made / f"{stem}.npz", **arrays)
            else:
                np.save(made / f"{stem}.npy", arrays)
        return made

    return make


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    return annotate(tmp_path / "train.jsonl", line(1, "a"))


def test_features_of_moment_detr_lie_side_by_side_at_unit_length(
    tmp_path: Path, folder: Callable[..., Path], truth: Path
) -> None:
    slow, clip = 9 * numbers(12, 24), numbers(10, 8, seed=1)
    slowfast = folder("slowfast", a={"features": slow}, b={"features": slow})
    vit = folder("clip", a={"features": clip}, b={"features": clip})
    tokens, pooled = numbers(5, 8), 3 * numbers(8, seed=2)
    texts = folder("text", **{f"qid{i}": {"last_hidden_state": tokens, "pooler_output": pooled} for i in (1, 2)})
    val = annotate(tmp_path / "val.jsonl", line(2, "b"))
    dataset = load_annotated({"train": truth, "val": val}, [slowfast, vit], texts, 2.0)
    video, text = dataset.video("a"), dataset.text("query 1")
    assert video.layers.shape == (10, 1, 1, 32) and video.layers.dtype == np.float16
    for part, given in ((video.layers[..., :24], slow[:10]), (video.layers[..., 24:], clip)):
        np.testing.assert_allclose(
            part[:, 0, 0], given / np.linalg.norm(given, axis=1, keepdims=True), atol=1e-3, rtol=1e-3
        )
    np.testing.assert_array_equal(video.embedding, clip.astype(np.float16))  # the folder that is as wide as a text
    np.testing.assert_array_equal(text.layers, tokens[None].astype(np.float16))
    np.testing.assert_allclose(text.embedding, [*pooled / np.linalg.norm(pooled), 0], rtol=1e-5)
    assert dataset.backbone == "slowfast+clip" and dataset.hop_s == 2.0
    assert [sample.vid for sample in dataset.samples["val"]] == ["b"]


def test_one_folder_stays_as_it_is(folder: Callable[..., Path], truth: Path) -> None:
    given = 7 * numbers(20, 8)
    dataset = load_annotated({"train": truth}, [folder("v", a=given)], folder("t", **{"1": numbers(5, 6)}), 1.0)
    np.testing.assert_array_equal(dataset.video("a").layers[:, 0, 0], given.astype(np.float16))
    assert dataset.video("a").embedding.shape == (20, 0)  # tokens alone do not say where a text lies
    assert dataset.text("query 1").embedding.tolist() == [0]


@pytest.mark.parametrize("flat", [False, True])
def test_layers_of_r2_tuning_are_read_as_they_lie_or_flattened(
    folder: Callable[..., Path], truth: Path, flat: bool
) -> None:
    video, text = numbers(10, 3, 50, 768, dtype=np.float16), numbers(6, 3, 512, dtype=np.float16)
    videos = folder("v", a=video.reshape(10, -1) if flat else video)
    texts = folder("t", **{"1": text.reshape(6, -1) if flat else text})
    dataset = load_annotated(
        {"train": truth}, [videos], texts, 2.0, backbone="openai/clip-vit-base-patch32", depth=3 if flat else None
    )
    np.testing.assert_array_equal(dataset.video("a").layers, video)
    np.testing.assert_array_equal(dataset.text("query 1").layers, text.swapaxes(0, 1))
    assert dataset.video("a").embedding.shape == (10, 0)
    base = dataset.video("a").layers
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)  # a data set bigger than the memory stays on the disk
    with pytest.raises(InputError, match="3 layers, not 4"):
        load_annotated({"train": truth}, [videos], texts, 2.0, backbone="openai/clip-vit-base-patch32", depth=4)
    if flat:
        with pytest.raises(InputError, match="flattened layers: name the backbone, one of openai"):
            load_annotated({"train": truth}, [videos], texts, 2.0)


def test_irregular_frames_come_onto_the_grid_and_windows_before_them_do_not_count(
    folder: Callable[..., Path], truth: Path
) -> None:
    pts, given = np.array([3.5, 6.8, 10.1, 19.9]), numbers(4, 8)
    videos = folder("v", a={"pts": pts, "features": given})
    dataset = load_annotated({"train": truth}, [videos], folder("t", qid1=numbers(8)), 1.0)
    expected, newest = resample(pts, given, 1.0)
    video, sample = dataset.video("a"), dataset.samples["train"][0]
    np.testing.assert_array_equal(video.layers[:, 0, 0], expected.astype(np.float16))
    np.testing.assert_array_equal(video.embedding, expected.astype(np.float16))
    np.testing.assert_array_equal(sample.counted, newest >= 0)
    assert not sample.counted[:2].any() and dataset.text("query 1").layers.shape == (1, 1, 8)


def test_safetensors_are_read_and_texts_of_one_query_are_one(tmp_path: Path, folder: Callable[..., Path]) -> None:
    videos, texts = folder("v"), folder("t")
    for vid in ("x.0_20.0", "y"):
        save_file({"features": numbers(20, 8), "embedding": numbers(20, 4)}, videos / f"{vid}.safetensors")
    save_file({"last_hidden_state": numbers(5, 8), "pooler_output": numbers(4)}, texts / "qid1.safetensors")
    truth = annotate(tmp_path / "t.jsonl", line(1, "x.0_20.0"), line(2, "y", query="query 1"))
    dataset = load_annotated({"train": truth}, [videos], texts, 1.0, cache_bytes=0)
    assert dataset.video("x.0_20.0").embedding.shape == (20, 4) and dataset.text("query 1").embedding.shape == (5,)
    assert [sample.query for sample in dataset.samples["train"]] == ["query 1", "query 1"]


def sample_of(dataset: Dataset) -> Any:
    return dataset.samples["train"][0]


@pytest.mark.parametrize(("hop_s", "count"), [(2.0, 10), (1.0, 19), (0.5, 37)])
def test_votes_are_graded_by_the_clip_in_which_a_window_has_its_middle(
    tmp_path: Path, folder: Callable[..., Path], hop_s: float, count: int
) -> None:
    votes = {2: [4, 4, 4], 3: [1, 2, 3], 9: [0, 0, 1]}
    rated = line(1, "a", relevant_clip_ids=list(votes), saliency_scores=list(votes.values()))
    truth = annotate(tmp_path / "t.jsonl", rated)
    videos, texts = folder("v", a=numbers(count, 8)), folder("t", qid1=numbers(8))
    sample = sample_of(load_annotated({"train": truth}, [videos], texts, hop_s))
    for t in range(count):
        clip = int((t * hop_s + 1) // 2)
        assert sample.saliency[t] == pytest.approx(sum(votes.get(clip, [0])) / 12)
        assert sample.inside[t] == (4 <= t * hop_s + 1 < 8)
    assert sample.windows.tolist() == [[4, 8]] and sample.duration_s == 20


def test_ignored_time_does_not_count_and_unrated_saliency_is_yes_or_no(
    tmp_path: Path, folder: Callable[..., Path]
) -> None:
    truth = annotate(tmp_path / "t.jsonl", line(1, "a", ignored_windows=[[0, 3], [15, 40]]))
    sample = sample_of(
        load_annotated({"train": truth}, [folder("v", a=numbers(19, 8))], folder("t", qid1=numbers(8)), 1.0)
    )
    assert np.flatnonzero(~sample.counted).tolist() == [0, 1, 14, 15, 16, 17, 18]
    np.testing.assert_array_equal(sample.saliency, sample.inside.astype(np.float32))


def test_a_moment_between_two_middles_is_still_a_target(tmp_path: Path, folder: Callable[..., Path]) -> None:
    truth = annotate(tmp_path / "t.jsonl", line(1, "a", relevant_windows=[[7.1, 7.6]]))
    sample = sample_of(
        load_annotated({"train": truth}, [folder("v", a=numbers(10, 8))], folder("t", qid1=numbers(8)), 2.0)
    )
    assert np.flatnonzero(sample.inside).tolist() == [3] and sample.windows.tolist() == [[7.1, 7.6]]
    assert (sample.distances[3] >= 0).all()


GOOD = {"features": np.ones((20, 8), np.float32)}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    # name: line, files of the video and of the text, arguments, what is said
    "no video": (
        {},
        {"b": GOOD},
        {},
        r"train.jsonl:1: .*v has no features of video a: no a with .safetensors, .npy or",
    ),
    "no text": ({"qid": 7}, {"a": GOOD}, {}, r"train.jsonl:1: .*t has no features of qid 7: no 7 or qid7 with"),
    "hop": ({}, {"a": GOOD}, {"hop_s": 0.5}, r"train.jsonl:1: 20 windows every 0.5 s are not 20 s of video"),
    "no hop": ({}, {"a": GOOD}, {"hop_s": None}, r"v does not say how far .* name the hop"),
    "odd hop": ({}, {"a": GOOD}, {"hop_s": 0.7}, r"does not divide"),
    "axes": ({}, {"a": np.ones((20, 2, 8))}, {}, r"train.jsonl:1: .*a.npy: expected features .* got \(20, 2, 8\)"),
    "none": ({}, {"a": np.ones((0, 8))}, {}, r"train.jsonl:1: .*a.npy: expected features .* got \(0, 1, 1, 8\)"),
    "whole": ({}, {"a": np.ones((20, 8), int)}, {}, r"a.npy: expected floating point numbers, got int64"),
    "name": ({}, {"a": {"x": np.ones(3), "y": np.ones(3)}}, {}, r"a.npz holds x, y: expected an array called features"),
    "pts": ({}, {"a": GOOD | {"pts": np.arange(20.0)[::-1]}}, {}, r"train.jsonl:1: .*a.npz: pts: expected 20 times"),
    "text pts": ({}, {"a": GOOD | {"pts": np.array(["x"] * 20)}}, {}, r"a.npz: pts: could not convert"),
    "embedding": (
        {},
        {"a": GOOD | {"embedding": np.ones((3, 4))}},
        {},
        r"expected an embedding \(20, D\), got \(3, 4\)",
    ),
    "objects": ({}, {"a": {"features": np.array([{}])}}, {}, r"a.npz cannot be read as features: Object arrays"),
    "path": ({"vid": "../a"}, {"a": GOOD}, {}, r"train.jsonl:1: vid must be the name of a file"),
    "empty": ({"query": " \u200b"}, {"a": GOOD}, {}, r"train.jsonl:1: query: the text is empty"),
    "surrogate": ({"query": "a \ud800"}, {"a": GOOD}, {}, r"train.jsonl:1: cannot be read"),
    "votes": (
        {"relevant_clip_ids": [2], "saliency_scores": [[5, 0, 0]]},
        {"a": GOOD},
        {},
        r"train.jsonl:1: saliency_scores: votes are 0 to 4",
    ),
    "half rated": ({"relevant_clip_ids": [2]}, {"a": GOOD}, {}, r"train.jsonl:1: missing key 'saliency_scores'"),
    "ignored": (
        {"ignored_windows": [[3, 1]]},
        {"a": GOOD},
        {},
        r"train.jsonl:1: ignored_windows: a window ends before",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, folder: Callable[..., Path], case: str) -> None:
    more, files, arguments, message = REFUSED[case]
    truth = annotate(tmp_path / "train.jsonl", line(1, "a") | more)
    videos, texts = folder("v", **files), folder("t", qid1=numbers(5, 8))
    with pytest.raises(InputError, match=message) as caught:
        given: dict[str, Any] = {"video": [videos], "text": texts, "hop_s": 1.0} | arguments
        load_annotated({"train": truth}, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"features": np.full((20, 8), np.nan)}, "b.npz: a number is not finite"),
        ({"features": np.full((20, 8), 1e6)}, "b.npz: a number is not finite, or beyond the 65504 of fp16"),
        ({"features": np.ones((20, 9))}, r"b.npz: windows are \(1, 1, 9\) \(K, 1\+P, C\), those of others \(1, 1, 8\)"),
    ],
)
def test_a_video_unlike_the_first_is_refused_when_it_is_read(
    tmp_path: Path, folder: Callable[..., Path], given: dict[str, Array], message: str
) -> None:
    truth = annotate(tmp_path / "train.jsonl", line(1, "a"), line(2, "b", query="query 1"))
    dataset = load_annotated({"train": truth}, [folder("v", a=GOOD, b=given)], folder("t", qid1=numbers(5, 8)), 1.0)
    assert dataset.video("a").layers.shape == (20, 1, 1, 8)
    with pytest.raises(InputError, match=message):
        dataset.video("b")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (numbers(5, 9), "qid2.npy: tokens are 9 wide, those of others 8"),
        (numbers(7), "qid2.npy: tokens are 7 wide"),
        (numbers(5, 2, 8), r"expected tokens \(L, K, C\) of 1 layers"),
        (np.full(8, np.inf), "qid2.npy: a number is not finite"),
        (numbers(5, 8), "qid2.npy: the embedding is 0 wide, those of others 8"),
    ],
)
def test_a_text_unlike_the_first_is_refused_when_it_is_read(
    tmp_path: Path, folder: Callable[..., Path], given: Array, message: str
) -> None:
    truth = annotate(tmp_path / "train.jsonl", line(1, "a"), line(2, "a"))
    dataset = load_annotated({"train": truth}, [folder("v", a=GOOD)], folder("t", qid1=numbers(8), qid2=given), 1.0)
    with pytest.raises(InputError, match=message):
        dataset.text("query 2")


def test_damaged_files_are_named(tmp_path: Path, folder: Callable[..., Path], truth: Path) -> None:
    texts = folder("t", qid1=numbers(8))
    for ending in (".npy", ".npz", ".safetensors"):
        videos = folder(f"v{ending}")
        for content in (b"", b"not what it says", b"\x93NUMPY\x01\x00\x76\x00{'descr'", b"PK\x03\x04 and no more"):
            (videos / f"a{ending}").write_bytes(content)
            with pytest.raises(InputError, match=rf"train.jsonl:1: .*a{ending} cannot be read as features: .+"):
                load_annotated({"train": truth}, [videos], texts, 1.0)


def test_what_is_trained_on_is_not_scored(tmp_path: Path, folder: Callable[..., Path], truth: Path) -> None:
    videos, texts = folder("v", a=GOOD), folder("t", qid1=numbers(8), qid2=numbers(8))
    for where in ("val", "test"):
        other = annotate(tmp_path / f"{where}.jsonl", line(2, "a"))
        with pytest.raises(InputError, match=rf"{where}.jsonl:1: video a is trained on too \(.*train.jsonl:1\)"):
            load_annotated({"train": truth, where: other}, [videos], texts, 1.0)


def test_a_qid_that_stands_for_two_texts_is_refused(tmp_path: Path, folder: Callable[..., Path], truth: Path) -> None:
    val = annotate(tmp_path / "val.jsonl", line(1, "b", query="another"))
    with pytest.raises(InputError, match=r"val.jsonl:1: qid 1 stands for 'query 1' elsewhere"):
        load_annotated({"train": truth, "val": val}, [folder("v", a=GOOD, b=GOOD)], folder("t", qid1=numbers(8)), 1.0)


def test_folders_that_do_not_belong_together_are_refused(
    tmp_path: Path, folder: Callable[..., Path], truth: Path
) -> None:
    texts, one = folder("t", qid1=numbers(8)), folder("v", a=GOOD)
    longer, deeper = folder("longer", a=numbers(26, 8)), folder("deeper", a=numbers(20, 2, 1, 8))
    with pytest.raises(InputError, match=r"hold \[20, 26\] windows: were they extracted at one hop"):
        load_annotated({"train": truth}, [one, longer], texts, 1.0)
    with pytest.raises(InputError, match="disagree on layers and tokens"):
        load_annotated({"train": truth}, [one, deeper], texts, 1.0)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        load_annotated({"train": truth}, [one, tmp_path / "nowhere"], texts, 1.0)
    with pytest.raises(InputError, match="features of the texts are missing"):
        load_annotated({"train": truth}, [one], None, 1.0)
    with pytest.raises(InputError, match="features of the videos are missing"):
        load_annotated({"train": truth}, [], texts, 1.0)


OURS = {
    "format": 1,
    "backbone": "lite",
    "depth": 2,
    "hop_s": 1.0,
    "patches": 3,
    "video_width": 6,
    "text_width": 8,
    "embedding": 4,
    "floor": 0.5,
}


def test_a_folder_of_ours_says_what_it_was_made_with(tmp_path: Path, folder: Callable[..., Path], truth: Path) -> None:
    ours, other = folder("ours"), folder("other", a=GOOD)
    manifest = ours / "features.json"
    manifest.write_text(json.dumps(OURS))
    for arguments, message in (
        ({"hop_s": 2.0}, "ours was extracted with hop_s 1.0, not 2.0"),
        ({"backbone": "x"}, "ours was extracted with backbone lite, not x"),
        ({"depth": 4}, "ours was extracted with depth 2, not 4"),
        ({"video": [ours, other]}, "ours holds videos and texts of one backbone: it goes with no other folder"),
        ({"text": other}, "ours holds videos and texts of one backbone"),
        ({}, "train.jsonl:1: .*ours has no features of 'query 1': extract with these annotations too"),
    ):
        given: dict[str, Any] = {"video": [ours]} | arguments
        with pytest.raises(InputError, match=message):
            load_annotated({"train": truth}, **given)
    for damaged in ("{", "[]", '{"format": 1}', json.dumps(OURS | {"format": 2}), json.dumps(OURS | {"more": 1})):
        manifest.write_text(damaged)
        with pytest.raises(InputError, match=r"features.json .*: extract the features anew"):
            load_annotated({"train": truth}, [ours])


@pytest.mark.shared
def test_the_annotations_of_qvhighlights_are_read(shared_data: Path, folder: Callable[..., Path]) -> None:
    given = shared_data / "qvhighlights" / "highlight_val_release.jsonl"
    lines = [json.loads(text) for text in given.read_text().splitlines()]
    features = np.ones((75, 4), np.float16)
    videos = folder("v", **{each["vid"]: features[: int(each["duration"] // 2)] for each in lines})
    texts = folder("t", **{f"qid{each['qid']}": features[0] for each in lines})
    samples = load_annotated({"train": given}, [videos], texts, 2.0).samples["train"]
    assert len(samples) == len(lines) == 1550
    for sample, each in zip(samples, lines, strict=True):
        graded = np.zeros(len(sample.saliency))
        graded[each["relevant_clip_ids"]] = np.sum(each["saliency_scores"], 1) / 12
        np.testing.assert_allclose(sample.saliency, graded, rtol=1e-6)
        assert sample.inside.sum() == len(each["relevant_clip_ids"])
