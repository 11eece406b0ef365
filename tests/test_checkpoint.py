"""Checkpoints: one file from which the model is rebuilt, refused in words when it does not fit; and the import."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from livemoments import main
from models.checkpoint import Provenance, load_checkpoint, save_checkpoint
from models.errors import ModelError
from models.published import from_published, to_causal
from models.r2 import R2
from models.r2_types import R2Config
from tests.test_reference import published

CONFIG = R2Config("causal", 12, 10, embedding=6, depth=2, width=16, heads=2, strides=(1, 2, 4), window=5)
PROVENANCE = Provenance(
    "a test", "lite", 1.0, {"loss": 0.5, "data": ["x.jsonl"]}, calibration={"centre": 0.4, "slope": 9.0}
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, R2(CONFIG), PROVENANCE)
    return path


def rewrite(path: Path, *, drop: str | None = None, shape: str | None = None, **head: Any) -> None:
    """Save the file again with a tensor less, a tensor of another shape, or other words in its head."""
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["livemoments"]) | head
        weights = {name: file.get_tensor(name) for name in file.keys() if name != drop}  # noqa: SIM118
    if shape is not None:
        weights[shape] = weights[shape][..., :-1].contiguous()
    save_file(weights, path, metadata={"livemoments": json.dumps(content)})


def test_a_model_comes_back_as_it_was(saved: Path) -> None:
    model, provenance = load_checkpoint(saved, mode="causal")
    assert provenance == PROVENANCE
    assert model.config == CONFIG
    assert not model.training
    torch.manual_seed(0)
    again = R2(CONFIG)
    save_checkpoint(saved, again, PROVENANCE)
    for name, value in load_checkpoint(saved)[0].state_dict().items():
        torch.testing.assert_close(value, again.state_dict()[name], rtol=0, atol=0)


def test_a_file_from_before_calibration_has_none(saved: Path) -> None:
    rewrite(saved, provenance={"source": "old", "backbone": "lite", "hop_s": 1.0, "notes": {}})
    assert load_checkpoint(saved)[1] == Provenance("old", "lite", 1.0, calibration={})


def test_a_file_that_does_not_fit_is_refused_in_words(saved: Path, tmp_path: Path) -> None:
    whole = saved.read_bytes()

    def refused(says: str, *, mode: str | None = None) -> None:
        with pytest.raises(ModelError, match=says) as caught:
            load_checkpoint(saved, mode=mode)
        assert "\n" not in str(caught.value)
        saved.write_bytes(whole)

    refused('is of mode "causal", this needs "clip"', mode="clip")
    rewrite(saved, drop="gate")
    refused("lacks 1 tensors, gate for one")
    rewrite(saved, shape="layer.expand.weight")
    refused(r"layer.expand.weight is \(64, 15\), this model has \(64, 16\)")
    rewrite(saved, format=2, provenance={"new": 1})
    refused("has format 2 .* this program reads 1: update it")
    rewrite(saved, config={"mode": "causal"})
    refused("its config does not fit this version")
    rewrite(saved, config=None)
    refused("its head is damaged")
    rewrite(saved, provenance={"source": "x"})
    refused("its head is damaged")
    saved.write_bytes(whole[:200])
    refused("cannot be read as a checkpoint")
    save_file({"x": torch.zeros(1)}, saved)
    refused("is no checkpoint of livemoments")
    with pytest.raises(ModelError, match="no such file"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_a_checkpoint_is_written_whole_or_not_at_all(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("models.checkpoint.save_file", full)
    with pytest.raises(ModelError, match="cannot be written: No space left on device"):
        save_checkpoint(saved, R2(CONFIG), PROVENANCE)
    assert saved.read_bytes() == whole
    assert list(saved.parent.iterdir()) == [saved]
    with pytest.raises(ModelError, match="cannot be written"):
        save_checkpoint(saved / "not a folder" / "x", R2(CONFIG), PROVENANCE)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mode": "online"}, 'mode must be "clip" or "causal"'),
        ({"depth": 0}, "depth must be positive"),
        ({"width": 20, "heads": 4}, "multiple of twice the 4 heads"),
        ({"strides": (1, 3)}, "powers of two"),
        ({"strides": ()}, "powers of two"),
        ({"strides": (2, 1)}, "each larger than the one before"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"embedding": -1}, "embedding must be"),
    ],
)
def test_a_config_is_checked(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        replace(CONFIG, **change)


def weights() -> dict[str, torch.Tensor]:
    """A small state dict under the published names; the same at every call."""
    torch.manual_seed(1)
    model = R2(R2Config("clip", 768, 512, depth=3, width=16, heads=8, strides=(1, 2)))
    for value in model.parameters():
        value.data.normal_()
    return published(model)


def test_published_weights_become_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r2.safetensors"
    prefixed = {f"module.{key}": value for key, value in weights().items()}
    torch.save({"state_dict": prefixed, "meta": {}}, tmp_path / "p.pth")
    assert main(["import-weights", str(tmp_path / "p.pth"), "--out", str(out)]) == 0
    assert "mode clip" in capsys.readouterr().out
    model, provenance = load_checkpoint(out, mode="clip")
    assert provenance.source == "imported from p.pth" and provenance.hop_s == 2.0
    for name, value in from_published(weights(), "p").state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)
    with pytest.raises(ModelError, match="a clip model sees whole recordings"):
        load_checkpoint(out, mode="causal")


def test_a_causal_model_begins_with_all_but_the_end_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(weights(), tmp_path / "p.pth")
    arguments = ["import-weights", str(tmp_path / "p.pth"), "--out", str(tmp_path / "c"), "--causal", "--window", "9"]
    assert main(arguments) == 0
    assert "do not transfer to causal as they are" in capsys.readouterr().out
    causal, _ = load_checkpoint(tmp_path / "c", mode="causal")
    clip = from_published(weights(), "p")
    assert causal.config == replace(clip.config, mode="causal", window=9, embedding=512)
    begun, given = causal.state_dict(), clip.state_dict()
    assert torch.equal(begun["map_video.2.weight"], given["map_video.2.weight"][:, :768])
    kept = {name for name, value in given.items() if torch.equal(value, begun[name])}
    assert set(given) - kept == {"map_video.0.weight", "map_video.0.bias", "map_video.2.weight"}
    assert to_causal(clip).config.window == 32
    assert main(["import-weights", str(tmp_path / "p.pth"), "--out", str(tmp_path / "d"), "--window", "9"]) == 2
    assert "--window belongs to --causal" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "p.pth: no such file"),
        (b"not a checkpoint", "p.pth"),
        ({"state_dict": {"adapter.gate": torch.zeros(3)}}, "is not of an R2-Tuning model: it has no 'heads.scales'"),
        ([1, 2], "holds no state dict"),
        ({key: value for key, value in weights().items() if "coord_head" not in key}, "is a highlight model"),
        (published(R2(R2Config("clip", 24, 20, width=16, heads=8, strides=(1, 2)))), "those of CLIP ViT-B/32 are"),
    ],
)
def test_what_is_not_published_is_refused(
    content: Any, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert main(["import-weights", str(path), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert says in told and told.count("\n") == 1
    assert not (tmp_path / "out").exists()
