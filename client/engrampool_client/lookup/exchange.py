"""One request without its transport: what is asked for, its bytes, and its parts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from engrampool_client.compute.served import ServedModel
from engrampool_client.errors import ProtocolError, RejectedError
from engrampool_client.lookup.landing import Landing, PartLanding
from engrampool_proto import wire
from engrampool_proto.errors import WireError


class Exchange:
    """A request, and where its answer's rows go. One thread at a time.

    asked: what is asked for, as far as it is missing. landing: where its rows go. delivery: of the lookup.
    answer_bytes: rows that will come back, in bytes. times: the server's, once the whole answer is there.
    number: that a server was asked by last, for logs.
    Raises RejectedError for more than the server's limits.
    """

    def __init__(self, served: ServedModel, asked: wire.LookupRequest, landing: Landing) -> None:
        self._served, self.asked = served, asked
        self.landing, self.delivery = landing, landing.delivery
        self.times: wire.ServerTimes | None = None
        self.number = 0
        self.answer_bytes = sum(landing.sizes.values())
        num_rows = 0
        for layer, size in landing.sizes.items():
            num_rows += size // (landing.shapes[layer][-1] or 1)
        if num_rows > served.max_rows or self.answer_bytes > served.max_answer_bytes:
            raise _over_limits(served, num_rows, self.answer_bytes)

    @classmethod
    def of_ids(cls, served: ServedModel, ids: Mapping[int, wire.Ids], landing: Landing) -> "Exchange":
        """Ask for rows by id. ids: by layer, ascending, each of the table's dtype and within its rows."""
        tables = []
        for layer, rows in ids.items():
            tables.append((layer, rows.reshape(-1)))
        return cls(served, wire.LookupRequest(served.spec.name, served.version, tuple(tables)), landing)

    def encode(self) -> bytes:
        """The LookupRequest's bytes, for what is missing."""
        return wire.encode_request(self.asked, self.number)

    @property
    def asked_tables(self) -> tuple[tuple[int, wire.Ids], ...] | None:
        """(layer, row ids [N]) that are asked for; None if tokens are."""
        return self.asked.tables if self.asked.tokens is None else None

    def split(self, count: int, between_runs: bool = False) -> "list[Exchange]":
        """Cut into at most `count` requests, each for a run of every layer's rows, all writing into this one's arrays.

        between_runs: rows that belong side by side (`Places`) stay so, which is quicker; parts are then less even.
        A lookup by tokens stays whole: where its rows could be cut, only the server knows. Of no use once rows came.
        """
        most = max((len(ids) for _, ids in self.asked.tables), default=0)
        if count == 1 or self.asked.tokens is not None or most < count:
            return [self]  # most < count covers a lookup of nothing
        cuts: list[dict[int, slice | npt.NDArray[np.int64]]] = [{} for _ in range(count)]
        for layer, ids in self.asked.tables:
            places = self.landing.places(layer)
            run = places.run if between_runs and places is not None else 1
            for part, cut in enumerate(cuts):
                start, stop = (len(ids) // run * at // count * run for at in (part, part + 1))
                cut[layer] = slice(start, stop)
        return self._parts(cuts)

    def spread(self, routes: Mapping[int, "Route"]) -> "dict[int, Exchange]":
        """Cut into one request a shard, by the rows that each holds, all writing into this one's arrays.

        routes: by layer. Returns requests by the shard's number. Of no use once rows came.
        """
        where: dict[int, dict[int, slice | npt.NDArray[np.int64]]] = {}
        for layer, ids in self.asked.tables:
            for shard, at in routes[layer].of(ids):
                where.setdefault(shard, {})[layer] = at
        # A shard is asked for nothing of a layer that it may hold no rows of.
        if len(where) <= 1 and all(len(ids) for _, ids in self.asked.tables):
            return dict.fromkeys(where, self)
        return dict(zip(where, self._parts(list(where.values())), strict=True))

    def _parts(self, cuts: "Sequence[Mapping[int, slice | npt.NDArray[np.int64]]]") -> "list[Exchange]":
        """cuts: of each part, layer -> where its ids stand among this one's."""
        parts = []
        for where in cuts:
            tables = tuple((layer, ids[where[layer]]) for layer, ids in self.asked.tables if layer in where)
            asked = wire.LookupRequest(self.asked.model, self.asked.version, tables)
            parts.append(Exchange(self._served, asked, PartLanding(self.landing, where)))
        self.landing.expect_parts([part.landing for part in parts])
        return parts

    def add(self, message: bytes) -> None:
        """Take in one LookupResponse. Raises ProtocolError."""
        try:
            response = wire.parse_response(message)
        except WireError as error:
            raise ProtocolError(f"the answer cannot be read: {error}") from error
        for piece in response.tables:
            self.landing.copy_in(piece.layer, piece.first, piece.rows)
        self.times = response.times or self.times

    def restart(self) -> None:
        """Ask again, for the layers that are not complete: those that are may be in use already."""
        self.landing.hand_over()  # of an answer that broke off
        missing = self.landing.forget_incomplete()
        self.asked = replace(
            self.asked,
            tables=tuple(table for table in self.asked.tables if table[0] in missing),
            layers=tuple(layer for layer in self.asked.layers if layer in missing),
        )
        self.answer_bytes = sum(self.landing.sizes[layer] for layer in missing)


@dataclass(frozen=True, eq=False)
class Route:
    """Which shard holds which rows of a table. starts: uint64 [ranges], ascending from 0. shards: int64 [ranges]."""

    starts: npt.NDArray[np.uint64]
    shards: npt.NDArray[np.int64]

    def of(self, ids: wire.Ids) -> "list[tuple[int, slice | npt.NDArray[np.int64]]]":
        """Where the ids of each shard stand among `ids` [N]: a slice if they stand together, else their positions."""
        if not len(ids):
            return []
        if len(self.starts) == 1:
            return [(int(self.shards[0]), slice(0, len(ids)))]
        shards = self.shards[np.searchsorted(self.starts, ids, side="right") - 1]
        cuts = [0, *(np.flatnonzero(shards[1:] != shards[:-1]) + 1).tolist(), len(ids)]
        runs = [(int(shards[start]), slice(start, stop)) for start, stop in pairwise(cuts)]
        if len({shard for shard, _ in runs}) == len(runs):
            return list(runs)
        return [(int(shard), np.flatnonzero(shards == shard)) for shard in np.unique(shards)]


def slowest(parts: Iterable[wire.ServerTimes | None]) -> wire.ServerTimes | None:
    """The servers' times of a lookup in parts that ran side by side."""
    times = [part for part in parts if part is not None]
    if not times:
        return None
    names = ("queue_us", "gather_us", "total_us")
    return wire.ServerTimes(*(max(getattr(one, name) for one in times) for name in names))


def _over_limits(served: ServedModel, num_rows: int, nbytes: int) -> RejectedError:
    return RejectedError(
        f"{num_rows} rows, {nbytes} bytes, are over the server's limits of {served.max_rows} rows and "
        f"{served.max_answer_bytes} bytes a request; split the batch",
        "too-many-rows",
    )
