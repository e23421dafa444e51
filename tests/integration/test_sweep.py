"""A few seeds of the sweep: every way to give a lookup up, over every lane, while servers and processes misbehave."""

import pytest

from sweep import Sweep, served


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with served(tmp_path_factory.mktemp("sweep")) as world:
        yield world


@pytest.mark.parametrize("seed", range(3))
def test_every_lookup_ends_with_the_right_rows_or_none(world, seed):
    Sweep(*world, seed).run(rounds=60)
