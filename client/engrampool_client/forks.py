"""The child of a fork is told that clients are its parent's; and neither is hurt by garbage of gRPC's meanwhile."""

import gc
import os
import weakref
from typing import Protocol


class Forked(Protocol):
    """What a child must not use."""

    def leave_to_parent(self) -> None:
        """In the child of a fork: connections, threads and locks are the parent's. Nothing is said on any of them."""


def watch(forked: Forked) -> None:
    """Have it told in each child that this process forks from now on, as long as anybody refers to it."""
    _open.add(forked)


# Steps refer to what is here, and so it is here as long as any step is.
_open: "weakref.WeakSet[Forked]" = weakref.WeakSet()
# Forks under way, and whether garbage was collected before the first of them.
_forking, _collects = 0, False


def _before_fork() -> None:
    """Collect no garbage until the child is told apart: gRPC's objects, if freed there, can end it, or have it hang."""
    global _forking, _collects
    if not _forking:
        _collects = gc.isenabled()
    _forking += 1
    if _open:
        gc.disable()


def _after_fork_in_parent() -> None:
    global _forking
    _forking -= 1
    if not _forking and _collects:
        gc.enable()


def _after_fork_in_child() -> None:
    global _forking
    _forking = 0
    for forked in list(_open):
        forked.leave_to_parent()
    if _open:
        gc.freeze()  # the parent's garbage is not the child's to collect
    if _collects:
        gc.enable()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
