"""`livemoments extract`: annotated videos into features, the very windows that a live detector would compute.

Every video is decoded once; the frames looked at, and the windows they make, are chosen by the code of the live path.
The command may be killed and run again: files that are there are not made again.
"""

import argparse
import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kernels.errors import InputError, SourceError
from models.backbone import Backbone, load_backbone
from models.errors import ModelError
from stream.types import tidy
from stream.window import hop_from_seconds
from trainer.annotated import check_length, read_annotations
from trainer.features import Manifest, text_file, video_file, write
from trainer.windows import encode, watch

_ENDINGS = frozenset({".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".flv", ".ts", ".mpg", ".mpeg", ".wmv", ".3gp"})
_TEXTS = 64  # in a batch
_NAMED = 20  # failed videos, in the summary

Places = Mapping[str, str]
"""Of a text or video -> the "file:line" that names it first."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--videos", type=Path, required=True, metavar="DIR", help="holds <vid>.mp4, .mkv, .webm, .. of every vid"
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        required=True,
        nargs="+",
        metavar="FILE",
        help="jsonl with qid, query, vid, duration, relevant_windows; of all splits at once, or one after the other",
    )
    parser.add_argument(
        "--backbone",
        default="lite",
        metavar="NAME",
        help="lite (default), a CLIP's name on the hub such as openai/clip-vit-base-patch32, or a folder with one",
    )
    parser.add_argument("--depth", type=int, default=4, metavar="K", help="layers of the backbone to keep (default 4)")
    parser.add_argument("--hop", type=float, default=1.0, metavar="S", help="seconds between windows (default 1)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="frames encoded at once (default 32)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ..; auto (default) takes a GPU if it can")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the features; what is there is kept")


def run(args: argparse.Namespace) -> int:
    """Exit code 2 if a video failed; the others have their features."""
    hop_ns = hop_from_seconds(args.hop)
    if args.batch < 1:
        raise InputError(f"--batch must be at least 1, got {args.batch}")
    texts: dict[str, str] = {}
    videos: dict[str, str] = {}
    durations: dict[str, float] = {}
    for path in args.annotations:
        for place, line in read_annotations(path).items():
            texts.setdefault(line.truth.query, place)
            videos.setdefault(line.truth.vid, place)
            durations.setdefault(line.truth.vid, line.truth.duration)
    files = _files(args.videos)
    console = Console(stderr=True, highlight=False)
    with _folder(args.out):
        device = _device(args.device)
        made = _check_manifest(args.out, args.backbone, args.depth, args.hop)  # loading a backbone takes a while
        backbone = _backbone(args.backbone, args.depth, device)
        manifest = Manifest(
            backbone.name,
            backbone.depth,
            args.hop,
            backbone.patches,
            backbone.video_width,
            backbone.text_width,
            backbone.embedding,
            backbone.floor,
        )
        if made not in (None, manifest):
            raise InputError(f"{args.out} was made by another version of {backbone.name}: name another folder")
        manifest.write(args.out)
        _encode_texts(args.out, texts, backbone, device)
        failed = _encode_videos(args, console, backbone, device, hop_ns, files, videos, durations)
    console.print(
        f"{args.out}: {len(videos) - len(failed)} of {len(videos)} videos, {len(texts)} texts", soft_wrap=True
    )
    if failed:
        more = f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
        console.print(f"failed: {', '.join(failed[:_NAMED])}{more}", soft_wrap=True, markup=False)
    return 2 if failed else 0


def _files(folder: Path) -> dict[str, list[Path]]:
    """vid -> the files of that name."""
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read as a folder of videos: {error.strerror}") from None
    files: dict[str, list[Path]] = {}
    for path in paths:
        files.setdefault(path.stem, []).append(path)
    return files


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    """The folder, for this process alone: two would write the same scratch files."""
    try:
        for folder in (out / "video", out / "text"):
            folder.mkdir(parents=True, exist_ok=True)
        with (out / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{out}: another `livemoments extract` is at work there") from None
            yield
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None


def _device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _backbone(name: str, depth: int, device: torch.device) -> Backbone:
    try:
        backbone = load_backbone(name, depth)
    except ModelError as error:
        raise InputError(str(error)) from None
    for tower in (backbone.image, backbone.text):
        tower.to(device)
    return backbone


def _check_manifest(out: Path, name: str, depth: int, hop_s: float) -> Manifest | None:
    """What is there already. Raises InputError if it is not what was asked for."""
    made = Manifest.read(out)
    name = str(Path(name).resolve()) if Path(name).is_dir() else name  # as load_backbone names it
    if made and (made.backbone, made.depth, made.hop_s) != (name, depth, hop_s):
        raise InputError(
            f"{out} holds backbone {made.backbone}, depth {made.depth}, hop {made.hop_s:g} s, not {name}, depth "
            f"{depth}, hop {hop_s:g} s: name another folder"
        )
    return made


@torch.inference_mode()
def _encode_texts(out: Path, texts: Places, backbone: Backbone, device: torch.device) -> None:
    """One file a text, without the padding. Raises InputError for a text too long."""
    missing = [text for text in texts if not text_file(out, text).is_file()]
    for text in missing:
        try:
            backbone.tokenize([tidy(text)])
        except ModelError as error:
            raise InputError(f"{texts[text]}: {error}") from None
    for start in range(0, len(missing), _TEXTS):
        group = missing[start : start + _TEXTS]
        ids, mask = backbone.tokenize([tidy(text) for text in group])  # as stream.detector.make_query reads it
        layers, embedding = backbone.text(ids.to(device), mask.to(device))
        for text, count, tokens, vector in zip(group, mask.sum(1).tolist(), layers.cpu(), embedding.cpu(), strict=True):
            arrays = {"layers": tokens[:, :count].half().contiguous().numpy(), "embedding": vector.float().numpy()}
            write(text_file(out, text), arrays, {"text": text})


def _encode_videos(
    args: argparse.Namespace,
    console: Console,
    backbone: Backbone,
    device: torch.device,
    hop_ns: int,
    files: Mapping[str, list[Path]],
    videos: Places,
    durations: Mapping[str, float],
) -> list[str]:
    """One file a video; the vids that failed, each told in a line."""
    missing = [vid for vid in videos if not video_file(args.out, vid).is_file()]
    failed = []
    with _progress(console) as progress:
        # Seconds, not files: videos of one data set differ by a lot.
        task = progress.add_task("videos", total=sum(durations[vid] for vid in missing))
        for vid in missing:
            progress.update(task, description=vid)
            try:
                path = _one(args.videos, vid, files, videos)
                windows = watch(path, hop_ns, resize=backbone.resize, size=backbone.size)
                layers, embedding, counted = encode(windows, backbone, device, hop_ns, args.batch)
                check_length(len(counted), args.hop, durations[vid])
            except (SourceError, InputError) as error:
                failed.append(vid)
                progress.console.print(f"{vid}: {error}", soft_wrap=True, markup=False)
            else:  # a disk that is full ends it all
                arrays = {"layers": layers, "embedding": embedding, "counted": counted}
                write(video_file(args.out, vid), arrays)
            progress.advance(task, durations[vid])
    return failed


def _one(folder: Path, vid: str, files: Mapping[str, list[Path]], videos: Places) -> Path:
    found = files.get(vid, [])
    if not found:
        raise InputError(f"{folder} has no video of that name ({videos[vid]} asks for it)")
    if len(found) > 1:
        raise InputError(f"several videos of that name: {', '.join(path.name for path in found)}")
    return found[0]


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
