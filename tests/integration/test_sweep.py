"""A few seeds of the sweep: every way to give a lookup up, over every lane, while servers and processes misbehave."""

import sys

import pytest

import sweep
from prefork import PREFORK


@pytest.mark.timeout(600)
def test_every_lookup_ends_with_the_right_rows_or_none():
    """In a process of its own, as it forks: see forks.py."""
    done = PREFORK.run([sys.executable, sweep.__file__, "--seeds=3", "--rounds=60"], timeout=570)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 seeds, 180 lookups: ")
