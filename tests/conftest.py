"""Fixtures that many tests share."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """The data beside the checkout. Tests that use it carry the mark `shared`."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is absent: its data does not travel with the project")
    return SHARED
