"""Whether what is fetched is what the engine would have read itself: row ids against its own, rows against a table."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_client.errors import FingerprintError
from engrampool_client.integrations.forwards.counts import EngineCounts
from engrampool_client.integrations.forwards.history import Batch, Histories, Numbers
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec

# layer, row ids -> their rows, uint8 [ids, row_bytes].
Table = Callable[[int, npt.NDArray[np.int64]], npt.NDArray[np.uint8]]


class RowCheck:
    """Compares rows of `sample` tokens of a forward, other ones each time, with those of a table."""

    def __init__(self, table: Table, counts: EngineCounts, sample: int = 4) -> None:
        self._table, self._counts, self._sample = table, counts, sample
        self._random = np.random.default_rng(0)

    def compare(
        self,
        layer: int,
        tokens: Numbers,
        find: Callable[[Numbers], tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.uint8]]],
        name: Callable[[int], str],
    ) -> None:
        """Compare a layer's rows of some of these tokens of a forward.

        find: gives the row ids [tokens, columns] of those it is given, and their rows [tokens, columns, row_bytes].
        name: what a token is called. Raises FingerprintError that names the first that differs.
        """
        if not len(tokens):
            return
        chosen = np.sort(self._random.choice(tokens, min(self._sample, len(tokens)), replace=False))
        ids, rows = find(chosen)
        self._counts.verified += len(ids)
        right = self._table(layer, ids.reshape(-1).astype(np.int64)).reshape(rows.shape)
        wrong, found = (rows != right).any(axis=2), []
        if wrong.any():
            one, column = (int(index) for index in np.argwhere(wrong)[0])
            found.append(
                f"layer {layer}: row {ids[one, column]} of {name(int(chosen[one]))} is not that of the local table"
            )
        _say(self._counts, wrong.any(axis=1), found)


class Verifier:
    """Compares a forward with the engine's own: for tests of an installation, as it takes its time.

    columns: of the row ids, those that are fetched. table: rows of the same checkpoint, if there are any here; those of
    `sample` tokens of a forward are compared, other ones each time.
    """

    def __init__(
        self,
        spec: ModelSpec,
        columns: slice,
        histories: Histories,
        counts: EngineCounts,
        table: Table | None = None,
        sample: int = 4,
    ) -> None:
        self._spec, self._columns, self._histories, self._counts = spec, columns, histories, counts
        self._check = None if table is None else RowCheck(table, counts, sample)

    def ids(self, numbers: Numbers, starts: Numbers, counts: Numbers, engines: Mapping[int, npt.NDArray[Any]]) -> None:
        """Compare row ids. engines: layer -> the engine's own of these chunks, [tokens, all columns].

        Raises FingerprintError that names the first token that differs in each layer.
        """
        batch: Batch = self._histories.batch(numbers, starts, counts)
        ours = self._spec.hash(TokenBatch.of(*batch), list(engines))
        compare_ids(ours, engines, self._counts, lambda at: self._name(at, numbers, starts, counts))

    def rows(
        self,
        layer: int,
        chunks: tuple[Numbers, Numbers, Numbers],
        valid: npt.NDArray[np.bool_],
        memory: npt.NDArray[np.uint8],
        at: Numbers,
    ) -> None:
        """Compare rows of some tokens with the table's. valid: which have theirs. at: where in `memory` each one's lie.

        Raises FingerprintError that names the first that differs.
        """
        if self._check is None:
            return

        def find(chosen: Numbers) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8]]:
            ids = self._spec.hash(TokenBatch.of(*self._histories.batch(*chunks)), [layer])[layer]
            return ids[chosen, self._columns], memory[at[chosen]]

        self._check.compare(layer, np.flatnonzero(valid), find, lambda token: self._name(token, *chunks))

    @staticmethod
    def _name(at: int, numbers: Numbers, starts: Numbers, counts: Numbers) -> str:
        bounds = counts.cumsum()
        owner = int(bounds.searchsorted(at, "right"))
        return f"token {at} (request {numbers[owner]}, position {starts[owner] + at - (bounds[owner] - counts[owner])})"


def compare_ids(
    ours: Mapping[int, npt.NDArray[Any]],
    engines: Mapping[int, npt.NDArray[Any]],
    counts: EngineCounts,
    name: Callable[[int], str],
) -> None:
    """Compare row ids of some tokens, [tokens, columns] of each layer. name: what a token is called.

    Raises FingerprintError that names the first token that differs in each layer.
    """
    differing, found = np.zeros(len(next(iter(ours.values()))), np.bool_), []
    counts.verified += len(differing)
    for layer, own in ours.items():
        wrong = (own != engines[layer]).any(axis=1)
        differing |= wrong
        if wrong.any():
            at = int(wrong.argmax())
            head = int((own[at] != engines[layer][at]).argmax())
            found.append(
                f"layer {layer}: {int(wrong.sum())} of {len(wrong)} tokens, the first {name(at)}, head {head}: "
                f"row {own[at, head]} here, {engines[layer][at, head]} by the engine"
            )
    _say(counts, differing, found)


def _say(counts: EngineCounts, differing: npt.NDArray[np.bool_], found: list[str]) -> None:
    counts.differences += int(differing.sum())
    if found:
        raise FingerprintError(found)
