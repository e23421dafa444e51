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


def settle(layers: int, tokens: int, find: Callable[[Flags], None], agree: Agree | None) -> Flags:
    """Which tokens have their rows: bool [layers, tokens]. find: sets those of this rank, within its deadline.

    Whatever becomes of `find` here, the others are told, so that none waits for long. Raises what it raised; PoolError
    where it did not, and did on another rank. agree: None where there is but one rank.
    """
    flags = np.zeros(layers * tokens + 1, np.bool_)
    try:
        find(flags[:-1].reshape(layers, tokens))
        flags[-1] = True
    finally:
        agreed = flags if agree is None else agree(flags)
    if not agreed[-1]:
        raise PoolError("another rank of this group did not get its rows, so this one does without its own")
    return agreed[:-1].reshape(layers, tokens)
