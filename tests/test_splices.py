"""Plans and videos of splices, from clips and photos made on the spot."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from kernels.errors import InputError
from trainer.library import SPLITS, Item, Library, load, part
from trainer.metrics import Truth, inside, read_jsonl
from trainer.render import IDLE, Kind, Segment, render
from trainer.splices import Splice, main, plan, truths, with_fillers, write

SMALL = (64, 36)


def make_clip(path: Path, levels: list[int], fps: int = 10, size: tuple[int, int] = SMALL) -> None:
    """One frame per grey level."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "crf": "1"})
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for level in levels:
            pixels = np.full((size[1], size[0], 3), level, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def greys(path: Path) -> list[float]:
    """The mean of every frame."""
    with av.open(str(path)) as container:
        return [float(frame.to_ndarray(format="gray").mean()) for frame in container.decode(video=0)]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three clips (one of them excluded by default), 40 photos of 2 captions, 10 class names; clips are white."""
    clips, photos = tmp_path / "clips", tmp_path / "photos"
    for folder in (clips, photos / "flickr", photos / "imagenet"):
        folder.mkdir(parents=True)
    names = ("one", "two", "car-detection")
    rows = [f'{name},"a thing, {name}",somewhere,MIT' for name in names]
    (clips / "captions.csv").write_text("\n".join(["clip,caption,source,licence", *rows, ""]))
    for name in names:
        make_clip(clips / f"{name}.mp4", [255] * 5)
    lines = ["image,caption"]
    for number in range(40):
        Image.new("RGB", (32, 24), (0, 0, 2 * number)).save(photos / "flickr" / f"{number}.jpg")
        lines += [f"{number}.jpg,Photo {number} .", f"{number}.jpg,{number} again ."]
    (photos / "flickr" / "captions.csv").write_text("\n".join(lines))
    for number in range(10):
        name = ("ant", "big_bird")[number % 2]
        Image.new("RGB", (24, 32)).save(photos / "imagenet" / f"n{number}_{name}.jpg")
    return clips, photos


@pytest.fixture
def library(folders: tuple[Path, Path]) -> Library:
    return load(*folders)


def test_the_library_leaves_out_what_is_scored_by_itself(folders: tuple[Path, Path]) -> None:
    library = load(*folders)
    assert [item.texts for item in library.clips] == [("a thing, one",), ("a thing, two",)]
    assert library.captioned[3].texts == ("Photo 3", "3 again")
    assert {item.texts for item in library.named} == {("an ant",), ("a big bird",)}
    assert len(load(*folders, exclude=()).clips) == 3


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("streams", "seconds"), [(1, 60), (2, 330), (1, 700)])
def test_every_plan_keeps_its_promises(library: Library, seed: int, streams: int, seconds: int) -> None:
    fps = 12
    splices = plan(library, streams=streams, seconds=seconds, seed=seed, fps=fps)
    assert len(splices) == streams
    queried = [asked.item.path for splice in splices for asked in splice.asked if asked.item.kind is Kind.PHOTO]
    assert len(queried) == len(set(queried)), "a photo is asked for once"
    for splice in splices:
        assert splice.frames == seconds * fps
        assert len(splice.asked) == len({asked.item.path for asked in splice.asked}) == seconds // 30
        assert any(asked.item.kind is Kind.CLIP for asked in splice.asked)
        assert all(asked.query in asked.item.texts for asked in splice.asked)

        starts = np.cumsum([0, *(segment.frames for segment in splice.segments)]).tolist()
        shown = list(zip(splice.segments, pairwise(starts), strict=True))
        for asked in splice.asked:
            on_screen = [times for segment, times in shown if segment.path == asked.item.path]
            assert on_screen == list(asked.windows) and len(on_screen) == 2
            assert all(8 * fps <= end - start <= 20 * fps for start, end in on_screen)
        others = [s for s in splice.segments if s.path not in {asked.item.path for asked in splice.asked}]
        assert others and all(3 * fps <= segment.frames <= 10 * fps for segment in others)
        assert not {segment.path for segment in others} & set(queried)
        order = [segment.path for segment in splice.segments if segment not in others]
        assert all(a != b for a, b in pairwise(order)), "nothing follows itself, not even after a filler"
        assert order[: len(order) // 2] != order[len(order) // 2 :] or len(order) == 4
    starts = [start for splice in splices for asked in splice.asked for start, _ in asked.windows]
    assert any(start % fps for start in starts), "boundaries fall between whole seconds too"


def test_the_same_seed_gives_the_same_plan_and_another_another(library: Library) -> None:
    assert plan(library, streams=2, seed=3) == plan(library, streams=2, seed=3)
    assert plan(library, streams=2, seed=3) != plan(library, streams=2, seed=4)


def digest(splices: Sequence[Splice]) -> str:
    """Of all that is shown, asked and true."""
    shown = [
        [
            (segment.kind, segment.frames, segment.path and segment.path.name, segment.seed)
            for segment in splice.segments
        ]
        for splice in splices
    ]
    return hashlib.sha256(json.dumps([shown, truths(splices)]).encode()).hexdigest()[:16]


def test_the_plan_of_a_seed_never_changes(library: Library) -> None:
    """Published figures rest on it: who changes this changes them."""
    assert digest(plan(library, streams=2, seed=3)) == "d6d3362715a4460b"


@pytest.mark.shared
def test_the_plan_behind_the_published_figures_never_changes(shared_data: Path) -> None:
    assert digest(plan(load(shared_data / "clips", shared_data / "photos"))) == "a4e3f675cf1b213b"


@pytest.fixture
def plenty(tmp_path: Path) -> Library:
    """13 clips, 200 captioned photos and 100 class names, whose files exist but are empty."""
    clips, photos = tmp_path / "clips", tmp_path / "photos"
    for folder in (clips, photos / "flickr", photos / "imagenet"):
        folder.mkdir(parents=True)
    for folder, column, suffix, count in ((clips, "clip", ".mp4", 13), (photos / "flickr", "image", "", 200)):
        for number in range(count):
            (folder / f"item{number}{suffix}").touch()
        rows = [f"item{number},{how} {number}" for number in range(count) for how in ("first", "second", "third")]
        (folder / "captions.csv").write_text("\n".join([f"{column},caption", *rows]))
    for number in range(100):
        (photos / "imagenet" / f"n{number}_ant.jpg").touch()
    return load(clips, photos)


def test_the_splits_share_nothing_and_are_together_everything(plenty: Library) -> None:
    parts = [part(plenty, split) for split in SPLITS]
    assert [len(dealt.clips) for dealt in parts] == [7, 2, 4]
    for whole, dealt in (
        (plenty.clips, [dealt.clips for dealt in parts]),
        (plenty.captioned, [dealt.captioned for dealt in parts]),
        (plenty.named, [dealt.named for dealt in parts]),
    ):
        assert sorted(item.path for items in dealt for item in items) == sorted(item.path for item in whole)
        assert len(set().union(*dealt)) == len(whole)
    for items, share in zip([dealt.captioned for dealt in parts], (0.60, 0.15, 0.25), strict=True):
        assert len(items) / 200 == pytest.approx(share, abs=0.08)


def test_other_files_move_no_photo_to_another_split(plenty: Library) -> None:
    def places(library: Library) -> dict[Path, str]:
        return {
            item.path: split
            for split in SPLITS
            for item in (*part(library, split).captioned, *part(library, split).named)
        }

    before = places(plenty)
    renamed = Item(Kind.PHOTO, Path("another name.jpg"), ("a thing",))
    new = tuple(Item(Kind.PHOTO, Path(f"new{number}.jpg"), ("a thing",)) for number in range(50))
    after = places(Library(plenty.clips, (*new, *plenty.captioned[::-1]), (renamed, *plenty.named[1:])))
    del before[plenty.named[0].path]
    assert before.items() <= after.items()


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_shows_its_own_items_only(plenty: Library, split: str) -> None:
    own = part(plenty, split)
    paths = {item.path for item in own.clips + own.captioned + own.named}
    splices = plan(own, streams=2, name=split)
    assert {s.path for splice in splices for s in splice.segments} - paths == {None}
    assert [splice.vid for splice in splices] == [f"{split}_00", f"{split}_01"]


def test_an_item_is_asked_for_by_several_captions(plenty: Library) -> None:
    for splice in plan(plenty, streams=2, captions=2):
        texts: dict[Path, list[str]] = {}
        for asked in splice.asked:
            texts.setdefault(asked.item.path, []).append(asked.query)
            assert asked.query in asked.item.texts
            shown = [segment for segment in splice.segments if segment.path == asked.item.path]
            assert [segment.frames for segment in shown] == [end - start for start, end in asked.windows]
        assert len(texts) == 11
        assert all(len(set(own)) == len(own) == (1 if "imagenet" in str(path) else 2) for path, own in texts.items())


def test_fillers_are_asked_for_where_they_are_shown_and_nothing_else_changes(plenty: Library) -> None:
    before = plan(plenty, streams=3, seconds=120)
    after = with_fillers(before, plenty, captions=2)
    found = 0
    texts = {item.path: item.texts[:2] for item in (*plenty.captioned, *plenty.named)}
    for old, new in zip(before, after, strict=True):
        assert new.segments == old.segments and new.asked[: len(old.asked)] == old.asked
        edges = np.cumsum([0, *(segment.frames for segment in new.segments)]).tolist()
        for asked in new.asked[len(old.asked) :]:
            shown = [
                (start, end)
                for segment, (start, end) in zip(new.segments, pairwise(edges), strict=True)
                if segment.path == asked.item.path or (segment.path and asked.query in texts.get(segment.path, ()))
            ]
            assert list(asked.windows) == shown and asked.query in asked.item.texts
            found += 1
        photos = {segment.path for segment in new.segments if segment.path and segment.path.parent.name == "flickr"}
        assert photos <= {asked.item.path for asked in new.asked}, "every captioned photo is asked for"
        more = [asked.query for asked in new.asked[len(old.asked) :]]
        assert len(set(more)) == len(more) and not set(more) & {asked.query for asked in old.asked}
    assert found


def test_a_caption_that_two_people_wrote_is_asked_once(library: Library) -> None:
    twice = replace(library, captioned=tuple(replace(item, texts=item.texts[:1] * 5) for item in library.captioned))
    (splice,) = plan(twice, streams=1, captions=3)
    assert len(splice.asked) == 11


@pytest.mark.shared
def test_the_default_plan_is_what_the_accuracy_target_asks_for(shared_data: Path) -> None:
    """50 queries or more, 40 of them captions, in streams of five minutes with moving clips; a prior up to 0.1."""
    splices = plan(load(shared_data / "clips", shared_data / "photos"))
    lines = truths(splices)
    assert len(lines) >= 50 and sum(not line["source"].startswith("imagenet/") for line in lines) >= 40
    assert all(line["duration"] >= 300 for line in lines)
    assert {line["vid"] for line in lines if line["source"].startswith("clips/")} == {s.vid for s in splices}
    assert np.mean([sum(e - s for s, e in line["relevant_windows"]) / line["duration"] for line in lines]) <= 0.1
    assert not [line for line in lines if "car-detection" in line["source"] or "one-by-one" in line["source"]]


def test_the_lines_are_the_evaluators(library: Library, tmp_path: Path) -> None:
    lines = truths(plan(library, streams=2))
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for truth, line in zip(read_jsonl(path, Truth), lines, strict=True):
        fine = inside(np.arange(0, truth.duration, 0.01) + 0.005, truth.windows)
        half = fine.reshape(-1, 200).mean(axis=1)  # of each 2 s clip
        clear = abs(half - 0.5) > 0.005
        assert ((truth.saliency[:, 0] == 4) == (half >= 0.5))[clear].all()
        assert len(line["relevant_clip_ids"]) == len(line["saliency_scores"])


def test_the_video_shows_what_the_lines_say(library: Library, tmp_path: Path) -> None:
    """Only clips are white, so a bright frame lies in the windows of a clip's query and nowhere else."""
    (splice,) = plan(library, streams=1, seconds=90, fps=4)
    path = tmp_path / "s.mp4"
    render(splice.segments, path, SMALL, splice.fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", *SMALL)
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx((np.arange(90 * 4) / 4).tolist())
    windows = [w for line in truths([splice]) if line["source"].startswith("clips/") for w in line["relevant_windows"]]
    assert windows
    bright = np.array(greys(path)) > 225  # rooms end at 215
    assert bright.tolist() == inside(np.array(times) + 0.01, windows).tolist()


def test_a_clip_plays_at_its_own_speed_and_over_again(tmp_path: Path) -> None:
    """10 frames a second, sampled at 5: every other level, then from the beginning."""
    make_clip(tmp_path / "ramp.mp4", list(range(20, 220, 20)))
    render([Segment(Kind.CLIP, 12, tmp_path / "ramp.mp4")], tmp_path / "out.mp4", SMALL, 5)
    levels = greys(tmp_path / "out.mp4")
    assert levels == pytest.approx([20, 60, 100, 140, 180, 20, 60, 100, 140, 180, 20, 60], abs=8)


@pytest.mark.parametrize(("size", "bars"), [((300, 200), ""), ((320, 240), "sides"), ((200, 300), "sides")])
def test_a_photo_fills_the_frame_unless_that_hides_much_of_it(tmp_path: Path, size: tuple[int, int], bars: str) -> None:
    Image.new("RGB", size, (200, 200, 200)).save(tmp_path / "p.png")
    render([Segment(Kind.PHOTO, 3, tmp_path / "p.png", seed=1)], tmp_path / "out.mp4", (128, 72), 5)
    with av.open(str(tmp_path / "out.mp4")) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="gray")
    assert frame[36, 64] > 180
    assert (frame[36, 2] < 30) == (bars == "sides")
    assert frame[2, 64] > 180


def test_a_photo_moves_a_little_with_every_frame(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(240, dtype=np.uint8), (135, 1))
    Image.fromarray(ramp).save(tmp_path / "p.png")
    render([Segment(Kind.PHOTO, 20, tmp_path / "p.png", seed=2)], tmp_path / "out.mp4", (240, 136), 5)
    with av.open(str(tmp_path / "out.mp4")) as container:
        frames = [frame.to_ndarray(format="gray").astype(int) for frame in container.decode(video=0)]
    steps = [float(abs(b - a).mean()) for a, b in pairwise(frames)]
    assert np.mean(steps) > 0.01 and max(steps) < 3
    assert abs(frames[-1] - frames[0]).mean() > 2


@pytest.mark.parametrize("kind", IDLE)
def test_idle_stretches_depend_on_the_seed_alone(tmp_path: Path, kind: Kind) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        render([Segment(kind, 3, seed=seed)], tmp_path / f"{name}.mp4", SMALL, 5)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert (tmp_path / "a.mp4").read_bytes() != (tmp_path / "c.mp4").read_bytes()


def test_segments_are_checked() -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        Segment(Kind.GREY, 0)
    with pytest.raises(ValueError, match="have a path"):
        Segment(Kind.PHOTO, 3)


def test_the_command_writes_videos_and_lines(folders: tuple[Path, Path], tmp_path: Path) -> None:
    clips, photos = map(str, folders)
    out = tmp_path / "out"
    assert main(["--clips", clips, "--photos", photos, "--out", str(out), "--streams", "1", "--seconds", "60"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["splice_00.mp4", "splices.jsonl"]
    assert [truth.vid for truth in read_jsonl(out / "splices.jsonl", Truth)] == ["splice_00"] * 2


def test_the_command_takes_every_flag(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips, photos = map(str, folders)
    out = tmp_path / "out"
    rest = ["--streams", "1", "--seconds", "60", "--seed", "5", "--exclude"]
    flags = ["--split", "train", "--captions", "2", "--things", "--assume-absent"]
    assert main(["--clips", clips, "--photos", photos, "--out", str(out), *flags, *rest]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["splices.jsonl", "train_00.mp4"]
    lines = read_jsonl(out / "splices.jsonl", Truth)
    assert f"1 streams, {len(lines)} queries (" in capsys.readouterr().out
    assert {truth.vid for truth in lines} == {"train_00"}


def test_a_failed_run_leaves_no_lines_and_no_half_video(library: Library, tmp_path: Path) -> None:
    out = tmp_path / "out"
    splices = plan(library, streams=1, seconds=60, fps=1)
    write(splices, out)
    for item in library.captioned + library.clips:
        item.path.write_bytes(b"not a picture")
    with pytest.raises(InputError, match="cannot be read"):
        write(splices, out)
    assert [path.name for path in out.iterdir()] == ["splice_00.mp4"]


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("a,b\n1,2\n", "must name the columns clip and caption"),
        ("clip,caption\none\n", "captions.csv:2: expected clip,caption"),
        ("clip,caption\none,a,b\n", "captions.csv:2: expected clip,caption"),
        ('clip,caption\none,"a\n', "captions.csv: not a table"),
        ("clip,caption\nthree,a\n", "captions.csv:2: three.mp4 is not in the folder"),
        ("clip,caption\n", "no clips to splice"),
        (None, "captions.csv: No such file"),
        ("no flickr", "flickr: no such folder"),
        ("no names", "not enough photos"),
    ],
)
def test_bad_folders_get_one_clear_line(
    folders: tuple[Path, Path], table: str | None, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if table is None:
        (folders[0] / "captions.csv").unlink()
    elif table == "no flickr":
        (folders[1] / "flickr").rename(folders[1] / "elsewhere")
    elif table == "no names":
        for path in (folders[1] / "imagenet").iterdir():
            path.unlink()
    else:
        (folders[0] / "captions.csv").write_text(table)
    clips, photos = map(str, folders)
    assert main(["--clips", clips, "--photos", photos, "--out", str(tmp_path / "out"), "--streams", "1"]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option", [["--streams", "0"], ["--seconds", "59"], ["--streams", "9"], ["--captions", "0"], ["--split", "val"]]
)
def test_bad_numbers_get_one_clear_line(
    folders: tuple[Path, Path], option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips, photos = map(str, folders)
    assert main(["--clips", clips, "--photos", photos, "--out", str(tmp_path / "out"), *option]) == 2
    assert capsys.readouterr().err.count("\n") == 1
