"""What a client says of itself: plain values, of what it knows now. docs/CLIENT.md says what each key means.

No server is asked, and no lock is taken: what is read at once may be a moment apart.
"""

from math import isfinite
from typing import TypedDict

from engrampool_client.compute.cache import HotRows
from engrampool_client.compute.forms import Form
from engrampool_client.config import ClientConfig, Hashing, OnFailure
from engrampool_client.lookup.workers import Workers
from engrampool_client.pool.endpoint import Endpoint, Lane
from engrampool_client.pool.follower import VersionFollower
from engrampool_client.pool.version import Version
from engrampool_client.stats import Stats

_NO_ANSWER = "it has not answered so far"


class BreakerStatus(TypedDict):
    """Whether lookups fail at once. failures: lookups in a row that found the server away or silent."""

    open: bool
    why_open: str | None
    failures: int
    probing: bool


class RowsStatus(TypedDict):
    """The rows `start` .. `stop` - 1 of a layer's table."""

    layer: int
    start: int
    stop: int


class ServerStatus(TypedDict):
    """One server. Of one that is not used, whatever only the others have is None."""

    address: str
    used: bool
    why_unused: str | None
    trouble: str | None
    shard: int | None
    rows: list[RowsStatus]
    max_rows: int | None
    max_answer_bytes: int | None
    lane: Lane | None
    why_not_attached: str | None
    why_not_direct: str | None
    direct_connections: int
    direct_opened: int
    breaker: BreakerStatus | None
    emulates: str | None
    server_version: str | None


class RegistryStatus(TypedDict):
    """What comes of a registry. age_s: None before it ever answered."""

    age_s: float | None
    pinned: bool
    why_behind: str | None
    changes: dict[str, int]
    ending: list[str]


class StepsStatus(TypedDict):
    """Steps that have not ended. new: not planned yet; waiting: for a place, from which the others are asking."""

    in_flight: int
    pending_bytes: int
    new: int
    waiting: int
    asking: int


class CacheStatus(TypedDict):
    """The cache of rows. Numbers of n-grams, and bytes."""

    bytes: int
    capacity_bytes: int
    hits: int
    misses: int
    evicted: int


class ClientStatus(TypedDict):
    """All that there is to say; see docs/CLIENT.md."""

    target: str
    model: str
    version: str
    spec_digest: str
    why_unusable: str | None
    hashing: Hashing
    heads: list[int] | None
    on_failure: OnFailure
    compiled: bool
    why_not_compiled: str | None
    lane: Lane
    breaker_open: bool
    servers_in_trouble: int
    servers: list[ServerStatus]
    registry: RegistryStatus | None
    steps: StepsStatus
    cache: CacheStatus | None


def client_status(
    follower: VersionFollower,
    stats: Stats,
    workers: Workers,
    config: ClientConfig,
    form: Form,
    why_unusable: str | None,
) -> ClientStatus:
    """Of a client that is made of these."""
    now = follower.current
    servers, cache, spec, heads = servers_status(now), now.cache, now.served.spec, now.layout.heads
    return {
        "target": follower.servers.text,
        "model": spec.name,
        "version": now.served.version,
        "spec_digest": spec.digest,
        "why_unusable": why_unusable,
        "hashing": config.hashing,
        "heads": None if heads is None else [heads.start, heads.stop],
        "on_failure": config.on_failure,
        "compiled": form.compiled,
        "why_not_compiled": None if form.compiled else form.why,
        "lane": "attached" if now.shards.attached and config.hashing == "local" else _wire(now),
        "breaker_open": now.shards.breaker_open,
        "servers_in_trouble": sum(one["trouble"] is not None for one in servers),
        "servers": servers,
        "registry": _registry(follower),
        "steps": {
            "in_flight": stats.in_flight,
            "pending_bytes": stats.pending_bytes,
            "new": workers.new,
            "waiting": workers.waiting,
            "asking": workers.asking,
        },
        "cache": None if cache is None else _cache(cache),
    }


def servers_status(now: Version) -> list[ServerStatus]:
    """Those that are used, by shard, and then those that are not."""
    # Twice what is used: one that changes over meanwhile, from one or to the other, is seen once at least.
    before = _in_use(now)
    away = dict(now.shards.away)
    troubles = dict(now.shards.troubles)
    used = {**before, **_in_use(now)}
    found = [_used(endpoint, shard) for shard, endpoint in used.values()]
    addresses = {one["address"] for one in found}
    return found + [_unused(address, troubles.get(address)) for address in away if address not in addresses]


def _in_use(now: Version) -> dict[str, tuple[int, Endpoint]]:
    """Address -> its shard's number, and the server."""
    return {one.target: (shard, one) for shard, same in enumerate(now.shards.sets) for one in same.replicas}


def lines(status: ClientStatus) -> list[str]:
    """For people: a line a server, and one for whatever else is not as it should be."""
    several = any(server["shard"] for server in status["servers"])
    found = [_line(server, several) for server in status["servers"]]
    registry = status["registry"]
    if registry is not None and registry["why_behind"] is not None:
        found.append(registry["why_behind"])
    if status["why_unusable"] is not None:
        found.append(status["why_unusable"])
    return found


def brief(status: ClientStatus) -> str:
    """For `repr`."""
    used = sum(server["used"] for server in status["servers"])
    parts = [
        f"{status['model']} {status['version']} on {status['target']}",
        f"{used} server{'' if used == 1 else 's'}",
        f"lane {status['lane']}",
    ]
    if status["servers_in_trouble"]:
        parts.append(f"{status['servers_in_trouble']} in trouble")
    if status["breaker_open"]:
        parts.append("breaker open")
    if status["why_unusable"] is not None:
        parts.append(status["why_unusable"])
    return ", ".join(parts)


def _line(server: ServerStatus, several: bool) -> str:
    if not server["used"]:
        return f"{server['address']}: not used: {server['why_unused']}"
    shard = f" (shard {server['shard']})" if several else ""
    parts = [f"{server['address']}{shard}: lane {server['lane']}"]
    if server["why_not_attached"] is not None:
        parts.append(f"not attached: {server['why_not_attached']}")
    if server["lane"] == "grpc" and server["why_not_direct"] is not None:
        parts.append(f"no direct lane: {server['why_not_direct']}")
    if server["trouble"] is not None:
        parts.append(f"in trouble: {server['trouble']}")
    return "; ".join(parts)


def _used(endpoint: Endpoint, shard: int) -> ServerStatus:
    breaker, served = endpoint.breaker, endpoint.served
    return {
        "address": endpoint.target,
        "used": True,
        "why_unused": None,
        "trouble": endpoint.in_trouble,
        "shard": shard,
        "rows": [{"layer": layer, "start": rows[0], "stop": rows[1]} for layer, rows in sorted(served.parts.items())],
        "max_rows": served.max_rows,
        "max_answer_bytes": served.max_answer_bytes,
        "lane": endpoint.lane,
        "why_not_attached": endpoint.why_not_attached,
        "why_not_direct": endpoint.why_not_direct,
        "direct_connections": endpoint.direct_connections,
        "direct_opened": endpoint.direct_opened,
        "breaker": {
            "open": breaker.is_open,
            "why_open": breaker.why_open,
            "failures": breaker.failures,
            "probing": breaker.probing,
        },
        "emulates": served.emulates or None,
        "server_version": served.server_version,
    }


def _unused(address: str, why: str | None) -> ServerStatus:
    return {
        "address": address,
        "used": False,
        "why_unused": why or _NO_ANSWER,
        "trouble": why,
        "shard": None,
        "rows": [],
        "max_rows": None,
        "max_answer_bytes": None,
        "lane": None,
        "why_not_attached": None,
        "why_not_direct": None,
        "direct_connections": 0,
        "direct_opened": 0,
        "breaker": None,
        "emulates": None,
        "server_version": None,
    }


def _wire(now: Version) -> Lane:
    return "direct" if now.shards.direct else "grpc"


def _registry(follower: VersionFollower) -> RegistryStatus | None:
    age_s = follower.servers.age_s
    if age_s is None:
        return None
    return {
        "age_s": age_s if isfinite(age_s) else None,  # JSON knows no infinity
        "pinned": follower.pinned,
        "why_behind": follower.trouble,
        "changes": dict(follower.changes),
        "ending": follower.ending,
    }


def _cache(cache: HotRows) -> CacheStatus:
    return {
        "bytes": cache.nbytes,
        "capacity_bytes": cache.nbytes + (len(cache.rows) - cache.filled) * cache.entry_bytes,
        "hits": cache.hits,
        "misses": cache.misses,
        "evicted": cache.evicted,
    }
