"""One version of a model, as a client has it: its servers, and what is planned and cached by it."""

import threading
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

from engrampool_client.lookup.cache import HotRows
from engrampool_client.lookup.exchange import Hashing
from engrampool_client.lookup.plan import Layout, Planner
from engrampool_client.lookup.served import ServedModel
from engrampool_client.pool.discovery import Servers
from engrampool_client.pool.endpoint import Ways
from engrampool_client.pool.shards import Shards
from engrampool_client.stats import Stats
from engrampool_proto.spec import ModelSpec

# Without a cache, smaller batches are asked for as they are: finding their few duplicates costs more than it saves.
_DEDUPE_TOKENS = 128


@dataclass(frozen=True)
class How:
    """How every version is asked for; see `Client`."""

    ways: Ways
    hashing: Hashing
    heads: tuple[int, int] | None
    dedupe: bool
    cache_bytes: int


class Generation:
    """What belongs to one version and must never meet another's. To be used in this order: `connect`, `open`, `close`.

    served: what its servers hold. layout, cache, planner: once open; None for no cache, and for lookups that are asked
    for as they are. uses: lookups under way by it; whoever counts them holds a lock.
    """

    def __init__(self, servers: Servers, how: How) -> None:
        self._servers, self._how = servers, how
        self._closing = threading.Event()
        self.shards = Shards(servers, how.ways, self._closing)
        self.uses = 0

    def connect(
        self, model: str | None, version: str | None, timeout_s: float, known: ModelSpec | None = None
    ) -> ServedModel:
        """Find out what is served. known: a specification that it may have. Raises PoolError, SpecError."""
        self.served = self.shards.connect(model, version, timeout_s, known)
        return self.served

    def open(self, stats: Stats, warm: Path | None = None) -> None:
        """Be ready for lookups. Raises ValueError for settings that do not fit what is served, CacheFileError."""
        how, served = self._how, self.served
        plain, heads = how.hashing == "server", columns(how.heads, min(table.heads for table in served.spec.tables))
        self.shards.open(stats)
        sharded = self.shards.sharded
        if plain and sharded:
            raise ValueError("hashing='server' needs a server that holds all rows; these are shards")
        self.layout = Layout(served.spec, None if heads is None else slice(*heads), self.shards.cuts())
        self.cache = HotRows(how.cache_bytes, self.layout.entry_bytes) if how.cache_bytes else None
        opened = None if warm is None else HotRows.open(warm, served.version, self.layout.to_json())
        self.planner = None
        if not plain and (how.dedupe or self.cache or opened or sharded):
            self.planner = Planner(served, self.layout, self.cache, opened, how.ways.max_steps)

    def planner_for(self, num_tokens: int) -> Planner | None:
        """What plans a lookup of that size; None for one that is asked for as it is."""
        planner = self.planner
        if planner is None or self.shards.attached:
            return None
        return planner if planner.has_cache or num_tokens >= _DEDUPE_TOKENS else None

    def stop(self) -> None:
        """Have `connect` and `open` end, and nobody wait to ask again."""
        self._closing.set()
        self._servers.wake()
        self.shards.stop()

    def close(self) -> None:
        """End the connections, and every lookup on one."""
        self.stop()
        self.shards.close()


def columns(heads: Any, most: int | None = None) -> tuple[int, int] | None:
    """Heads as (start, stop), None for all. Raises ValueError unless they are two integers, start < stop <= most."""
    if heads is None:
        return None
    try:
        start, stop = map(index, heads)
    except (TypeError, ValueError):
        start = stop = -1
    if not 0 <= start < stop or (most is not None and stop > most):
        within = "" if most is None else f" within 0 .. {most}"
        raise ValueError(f"heads must be two integers (start, stop){within}, not empty; it is {heads!r}")
    return start, stop
