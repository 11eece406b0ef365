"""Fixtures that many tests share."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from models.lite import ImageTower, QueryTower
from models.lite_packages import towers

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """The data beside the checkout. Tests that use it carry the mark `shared`."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: its data does not travel with the project")
    return SHARED


@pytest.fixture(scope="session")
def lite_towers() -> tuple[ImageTower, QueryTower]:
    """The towers of lite in torch, made once: it takes seconds."""
    return towers()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tensors so small that threads only wait for each other, for minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def quick_builds(lite_towers: tuple[ImageTower, QueryTower]) -> Iterator[None]:
    """Bundles on fewer texts, and as many frames as the gate must have at least; towers of lite that stand already."""
    from kernels.build import export_graph
    from kernels.parity import real_crops
    from kernels.recipe import Recipe
    from models.lite_packages import class_captions

    captions = [caption for caption in class_captions() if len(caption) < 30][:40]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.backbone.towers", lambda: lite_towers)
        for module in ("parity", "recipe"):
            patch.setattr(f"kernels.{module}.class_captions", lambda: captions)
        patch.setattr("kernels.parity.FRAMES", 32)
        decoded = cache(lambda resize, size: list(real_crops(resize, size)))  # once for all builds
        patch.setattr("kernels.parity.real_crops", decoded)
        patch.setattr("kernels.parity.KEPT", 8)
        patch.setattr("kernels.build._TIMED", 1)
        # A backbone is exported once, however many bundles are built of it: that takes longer than all the rest.
        for method in ("crop_graphs", "pixel_graphs"):
            patch.setattr(Recipe, method, once(getattr(Recipe, method)))
        patch.setattr("kernels.build.export_graph", once(export_graph))
        yield


def once(make: Callable[..., Any]) -> Callable[..., Any]:
    """Made once of the same things; a model is copied by whoever changes it."""
    made: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def remembered(*given: Any) -> Any:
        key = tuple(id(each) for each in given)
        if key not in made:
            made[key] = make(*given), given  # which stay alive, so that no other thing gets their id
        return made[key][0]

    return remembered
