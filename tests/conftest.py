"""Fixtures that many tests share."""

from collections.abc import Iterator
from pathlib import Path

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
