"""Fixtures that many tests share."""

from pathlib import Path

import pytest

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
