"""Forwards that ask nobody: those that warm up, profile or capture, or are for other ranks' sake."""

from collections.abc import Iterator
from contextlib import contextmanager


class Quietable:
    """Has forwards, of which those within `quiet` are to ask nobody, and to have no rows."""

    _quiet = 0

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Forwards within this ask nobody."""
        self._quiet += 1
        try:
            yield
        finally:
            self._quiet -= 1

    @property
    def is_quiet(self) -> bool:
        """Whether forwards are to ask nobody now."""
        return self._quiet > 0
