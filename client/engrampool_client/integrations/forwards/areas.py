"""The memory that an engine's rows lie in: the host's, cut into areas that are written and read in turns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engrampool_client.integrations.forwards.agreement import Vote
from engrampool_client.integrations.forwards.history import Numbers
from engrampool_client.lookup.step import Step

# Where the rows of a forward lie that has not looked for any.
NOWHERE: Numbers = np.empty(0, np.int64)


class Copied(Protocol):
    """A mark in the order of a device's work, as an event of CUDA's is; one that was never recorded has come."""

    def record(self) -> None:
        """Set it after what was issued until now."""

    def query(self) -> bool:
        """Whether the device has come to it."""
        ...

    def synchronize(self) -> None:
        """Wait until it has."""


class Landing(Protocol):
    """Where rows go to: memory of fixed addresses that layers read, and copies to it. torch_landing.py: for PyTorch.

    layers: those that have rows. max_tokens: of a forward at most. row_shape: layer -> (columns, bytes of a row).
    """

    layers: tuple[int, ...]
    max_tokens: int
    row_shape: Mapping[int, tuple[int, int]]

    def memory(self, tokens: int) -> dict[int, npt.NDArray[np.uint8]]:
        """Memory of the host for rows of so many tokens, by layer: uint8 [tokens, columns, row_bytes]. Called once."""
        ...

    def event(self) -> Copied:
        """A mark that copies are waited for by."""
        ...

    def copy(self, layer: int, source: int, target: int, tokens: int) -> None:
        """Have rows copied from the host's memory, at token `source`, to those that a layer reads, at `target`."""
        ...

    def clear(self, layer: int, tokens: npt.NDArray[np.integer[Any]] | slice) -> None:
        """Have the rows of these tokens of a forward be zeros. tokens: their places in it."""
        ...

    def landed(self, layer: int) -> Any:
        """What the layer reads: uint8 [max_tokens, columns, row_bytes] on the device, always the same memory."""
        ...


@dataclass(eq=False)
class Area:
    """Tokens base .. base + size of the host's memory. copied: after the last copy from there that was issued."""

    base: int
    size: int
    copied: Copied


@dataclass(eq=False)
class Fetch:
    """Rows that were asked for: of `tokens` tokens, into the memory from `base` on.

    served: how many a forward took. at: of sampled tokens, where each one's rows are to be.
    """

    step: Step
    area: Area
    base: int
    tokens: int
    served: int = 0
    at: Numbers = field(default_factory=lambda: NOWHERE)


@dataclass(eq=False)
class Piece:
    """Positions start .. stop of one request's prompt, fetched early."""

    fetch: Fetch
    start: int
    stop: int


@dataclass(eq=False)
class Forward:
    """One forward's tokens.

    at: where in the host's memory each token's rows are to be; -1 for those that nobody asked for yet.
    area: for what it asks for itself, `used` tokens of it. vote: whether all ranks have their rows.
    spent: pieces of prompts that no later forward needs.
    """

    numbers: Numbers
    starts: Numbers
    counts: Numbers
    deadline: float
    area: Area
    at: Numbers
    vote: Vote
    own: list[Fetch] = field(default_factory=list)
    early: list[Fetch] = field(default_factory=list)
    spent: list[Piece] = field(default_factory=list)
    used: int = 0
    error: BaseException | None = None
    over: bool = False
    runs: list[tuple[int, int, int]] | None = None  # as `find_runs` has them

    def __len__(self) -> int:
        return len(self.at)

    def find_runs(self) -> list[tuple[int, int, int]]:
        """In how few pieces rows lie in the host's memory: where there, of which of the tokens on, how many."""
        if self.runs is None:
            begins = [0, *(np.flatnonzero(self.at[1:] - self.at[:-1] != 1) + 1).tolist()]
            stops = [*begins[1:], len(self.at)]
            places = self.at[begins].tolist()
            self.runs = [(place, begin, stop - begin) for place, begin, stop in zip(places, begins, stops, strict=True)]
        return self.runs
