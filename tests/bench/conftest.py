"""Where the bench's workload is kept: a second of making it is saved by all who come later."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A directory to run a bench in. Whoever damages the workload there mends it."""
    return tmp_path_factory.mktemp("bench-data")
