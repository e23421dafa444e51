"""One outcome for all ranks of a group: which tokens have their rows on every one of them, or an error on every one."""

from collections.abc import Callable
from typing import Any

import numpy as np

from engrampool_client.errors import PoolError
from engrampool_client.integrations.forwards.history import Flags

# Every rank calls it with flags, as many as the others, and is given those that are set on all of them.
Agree = Callable[[Flags], Flags]


def over(group: Any) -> Agree:
    """By a process group of PyTorch's, of processors rather than GPUs (gloo). Needs torch."""
    import torch

    def agree(flags: Flags) -> Flags:
        votes = torch.from_numpy(flags.view(np.uint8).copy())
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MIN, group=group)
        return votes.numpy().view(np.bool_)

    return agree


class Vote:
    """What one rank says of a forward, once: which tokens have their rows, and whether it has an error.

    Made before anything of it can fail: whatever does from then on, `lost` lets the others know. agree: None where
    there is but one rank.
    """

    def __init__(self, layers: int, tokens: int, agree: Agree | None) -> None:
        self._flags = np.zeros(layers * tokens + 1, np.bool_)
        self._shape, self._agree, self._said = (layers, tokens), agree, False

    def settle(self, find: Callable[[Flags], None]) -> Flags:
        """Which tokens have their rows: bool [layers, tokens]. find: sets those of this rank, within its deadline.

        Raises what it raised, which `lost` is to follow; PoolError where it did not, and did on another rank.
        """
        find(self._flags[:-1].reshape(self._shape))
        self._flags[-1] = True
        agreed = self._say()
        if not agreed[-1]:
            raise PoolError("another rank of this group did not get its rows, so this one does without its own")
        return agreed[:-1].reshape(self._shape)

    def lost(self) -> None:
        """Say that this rank has an error, unless it has had its say: nobody waits for it for long."""
        if not self._said:
            self._flags[-1] = False
            self._say()

    def _say(self) -> Flags:
        if self._agree is None:
            return self._flags
        self._said = True
        return self._agree(self._flags)


def settle(layers: int, tokens: int, find: Callable[[Flags], None], agree: Agree | None) -> Flags:
    """As `Vote.settle`, and whatever becomes of `find` here, the others are told."""
    vote = Vote(layers, tokens, agree)
    try:
        return vote.settle(find)
    except BaseException:
        vote.lost()
        raise
