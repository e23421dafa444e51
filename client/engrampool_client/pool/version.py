"""One version of a model, as a client has it: its servers, and what is planned and cached by it."""

from pathlib import Path

from engrampool_client.compute.cache import HotRows
from engrampool_client.compute.forms import Form
from engrampool_client.compute.layout import Layout
from engrampool_client.compute.served import ServedModel
from engrampool_client.config import ClientConfig, columns
from engrampool_client.event import Event
from engrampool_client.lookup.plan import Planner
from engrampool_client.pool.discovery import Servers
from engrampool_client.pool.shards import Shards
from engrampool_client.stats import Stats
from engrampool_proto.spec import ModelSpec


class Version:
    """What belongs to one version and must never meet another's. To be used in this order: `connect`, `open`, `close`.

    served: what its servers hold. layout, cache, planner: once open; None for no cache. uses: lookups under way by it;
    whoever counts them holds a lock.
    """

    def __init__(self, servers: Servers, config: ClientConfig) -> None:
        self._servers, self._config = servers, config
        self._closing = Event()
        self.shards = Shards(servers, config, self._closing)
        self.uses = 0

    def connect(
        self, model: str | None, version: str | None, timeout_s: float, known: ModelSpec | None = None
    ) -> ServedModel:
        """Find out what is served. known: a specification that it may have. Raises PoolError, SpecError."""
        self.served = self.shards.connect(model, version, timeout_s, known)
        return self.served

    def open(self, stats: Stats, form: Form, warm: Path | None = None) -> None:
        """Be ready for lookups, which `form` computes.

        Raises ValueError for settings that do not fit what is served, CacheFileError.
        """
        config, served = self._config, self.served
        heads = columns(config.heads, min(table.heads for table in served.spec.tables))
        self.shards.open(stats)
        if config.hashing == "server" and self.shards.sharded:
            raise ValueError("hashing='server' needs a server that holds all rows; these are shards")
        self.layout = Layout(served.spec, None if heads is None else slice(*heads), self.shards.cuts())
        self.cache = HotRows(config.cache_bytes, self.layout.entry_bytes, form) if config.cache_bytes else None
        opened = None if warm is None else HotRows.open(warm, served.version, self.layout.to_json(), form)
        dedupe = config.dedupe or self.shards.sharded
        self.planner = Planner(served, self.layout, config.hashing, dedupe, self.cache, opened, config.max_steps, form)

    def stop(self) -> None:
        """Have `connect` and `open` end, and nobody wait to ask again."""
        self._closing.set()
        self._servers.wake()
        self.shards.stop()

    def close(self) -> None:
        """End the connections, and every lookup on one."""
        self.stop()
        self.shards.close()
