"""How two runs of the same graphs are held against each other, and the gate that engines pass on their first load."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.agreement import PARITY, confirm, load_samples, worst_cosine
from kernels.bundle import EMBEDDED, Manifest, load_manifest
from kernels.errors import BundleError

GPU = "a card, compute capability 8.6"

# -- agreement


def vectors() -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(5, 7, 16)).astype(np.float32)


def test_what_is_equal_agrees_and_so_does_what_was_rounded() -> None:
    want = vectors()
    want[0, 0] = 0
    assert worst_cosine(want, want) == 1.0
    assert worst_cosine(3 * want, want) == 1.0
    assert worst_cosine(want.astype(np.float16).astype(np.float32), want) > 0.99999
    assert worst_cosine(want[:, 0, 0], want[:, 0, 0]) == 1.0, "one number a sample: one vector"


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x.__setitem__((3, 2), -x[3, 2]),
        lambda x: x.__setitem__((3, 2), x[3, 2, ::-1].copy()),
        lambda x: x.__setitem__((3, 2), 0),
        lambda x: x.__setitem__((3, 2, 5), np.nan),
        lambda x: x.__setitem__((3, 2, 5), np.inf),
        lambda x: x.__setitem__((0, 0, 5), 1),
        lambda x: x.__setitem__((3, 2), x[3, 2] + 0.1 * np.abs(x[3, 2]).max()),
    ],
    ids=["turned round", "out of order", "nothing", "not a number", "infinite", "something", "shifted"],
)
def test_one_wrong_vector_among_many_is_found(fault: Callable[[NDArray[np.float32]], None]) -> None:
    want = vectors()
    want[0, 0] = 0
    given = want.copy()
    fault(given)
    assert worst_cosine(given, want) < PARITY


def test_padding_must_be_infinite_on_both_sides() -> None:
    want = vectors()
    want[:, 5:] = -np.inf
    assert worst_cosine(want, want) == 1.0
    for value in (0, np.inf, np.nan):
        given = want.copy()
        given[2, 6, 3] = value
        assert worst_cosine(given, want) == -1.0
    assert worst_cosine(want, np.where(want > 2, np.nan, want)) == -1.0, "what torch has no answer for"
    assert worst_cosine(want[:4], want) == -1.0 and worst_cosine(want[:1], want) == -1.0


def test_numbers_are_held_to_their_size_too() -> None:
    """Scores are divided by a spread: twice as large it would still point the same way."""
    want = np.abs(vectors()[:, 0, 0]) + 1
    assert worst_cosine(1.01 * want, want) > PARITY > worst_cosine(1.05 * want, want)
    assert worst_cosine(0 * want, 0 * want) == 1.0 and worst_cosine(want, 0 * want) < PARITY


# -- the first load


def double(name: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    return {"pooled": 2 * inputs["pixels"], "level": inputs["pixels"][:, 0]}


def save(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    np.savez(path, allow_pickle=False, **arrays)


@pytest.fixture
def pending(tmp_path: Path) -> tuple[Path, Manifest]:
    """A bundle that has met no GPU."""
    shutil.copytree(EMBEDDED, tmp_path / "bundle")
    manifest = replace(load_manifest(EMBEDDED), parity="pending", precision={"image": "fp16"})
    manifest.write(tmp_path / "bundle")
    pixels = np.random.default_rng(2).normal(size=(4, 9)).astype(np.float32)
    outputs = {f"image/out/{name}": each for name, each in double("image", {"pixels": pixels}).items()}
    save(tmp_path / "bundle" / "reference.npz", {"image/in/pixels": pixels, **outputs})
    return tmp_path / "bundle", manifest


def test_the_first_load_writes_down_that_the_engines_are_right(pending: tuple[Path, Manifest]) -> None:
    folder, manifest = pending
    checked = confirm(folder, manifest, GPU, double)
    assert checked.parity == {"image.pooled": 1.0, "image.level": 1.0}
    assert load_manifest(folder) == checked == replace(manifest, parity=checked.parity, parity_on=GPU)

    def never(name: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        raise AssertionError("it was checked before")

    assert confirm(folder, checked, GPU, never) is checked
    with pytest.raises(AssertionError):
        confirm(folder, checked, "another card", never)


def test_an_engine_without_samples_is_not_taken_for_right(pending: tuple[Path, Manifest]) -> None:
    folder, manifest = pending
    with pytest.raises(BundleError, match=r"reference\.npz holds nothing to check text against"):
        confirm(folder, replace(manifest, precision={"image": "fp16", "text": "fp16"}), GPU, double)


def test_the_first_load_refuses_engines_that_are_wrong(pending: tuple[Path, Manifest]) -> None:
    folder, manifest = pending

    def wrong(name: str, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        found = dict(double(name, inputs))
        found["pooled"][2] += 1
        return found

    with pytest.raises(BundleError, match=r"image\.pooled does not agree with torch, worst cosine -?0\.\d+") as caught:
        confirm(folder, manifest, GPU, wrong)
    assert "\n" not in str(caught.value)
    assert json.loads((folder / "manifest.json").read_text())["parity"] == "pending"


def test_a_folder_that_cannot_be_written_does_not_stop_the_first_load(pending: tuple[Path, Manifest]) -> None:
    folder, manifest = pending
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()  # which stops even root
    assert confirm(folder, manifest, GPU, double).parity == {"image.pooled": 1.0, "image.level": 1.0}


@pytest.mark.parametrize("damage", ["missing", "no archive", "other names", "empty"])
def test_a_damaged_reference_is_told_in_one_line(damage: str, pending: tuple[Path, Manifest]) -> None:
    folder, manifest = pending
    path = folder / "reference.npz"
    if damage == "missing":
        path.unlink()
    elif damage == "no archive":
        path.write_bytes(b"PK" + bytes(100))
    else:
        save(path, {"pixels": np.zeros(3)} if damage == "other names" else {})
    with pytest.raises(BundleError, match=r"reference\.npz .*build the bundle again$") as caught:
        confirm(folder, manifest, GPU, double)
    assert "\n" not in str(caught.value)


def test_samples_are_those_that_were_written(pending: tuple[Path, Manifest]) -> None:
    samples = load_samples(pending[0])
    assert list(samples) == ["image"]
    inputs, want = samples["image"]
    assert set(inputs) == {"pixels"} and set(want) == {"pooled", "level"}
    np.testing.assert_array_equal(want["pooled"], 2 * inputs["pixels"])
