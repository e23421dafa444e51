"""One look at a pool, over gRPC: what each server says of itself, and what they are together."""

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from engrampool_client.compute.served import BRIEF
from engrampool_client.config import ClientConfig
from engrampool_client.errors import PoolError, ProtocolError
from engrampool_client.lanes.credentials import Credentials
from engrampool_client.lanes.grpc import GrpcLane
from engrampool_client.pool.discovery import Servers
from engrampool_client.watch.samples import Samples
from engrampool_proto.registry.etcd import RegistryError
from engrampool_proto.v1 import pool_pb2

_AT_ONCE = 32
# A registry that was not heard of for so long, and bytes in flight above this share of their bound, are worth a look.
_REGISTRY_AGE_S, _FULL = 60.0, 0.9


@dataclass(frozen=True)
class ServerLook:
    """One server. error: why it did not answer, for people; then there is nothing else.

    round_trip_s: of a call that takes the server next to no time. held: what it serves, nothing while it loads.
    """

    address: str
    error: str | None = None
    round_trip_s: float | None = None
    server_version: str = ""
    held: Sequence[pool_pb2.Model] = ()
    samples: Samples = field(default_factory=Samples)

    @property
    def serving(self) -> bool:
        """Whether lookups are answered."""
        return bool(self.held)

    def shard(self, model: str, version: str) -> str:
        """The shard that it holds of a version, as its setting names it; "" where it does not say."""
        for labels in self.samples.labelled("engrampool_part_info"):
            if (labels.get("model"), labels.get("version")) == (model, version):
                return labels.get("shard", "")
        return ""


class Watch:
    """Looks at the servers of a pool, each time at those that the targets stand for then. Close it, or use `with`.

    targets: as of `Client`. timeout_s: of each call. Raises ValueError for what is no target.
    trouble: why the registry could not be read last, for people; the servers are then those that it named before.
    """

    def __init__(self, targets: Sequence[str], timeout_s: float, config: ClientConfig | None = None) -> None:
        """config: of a client, for what it trusts and shows. Raises PemError, and ValueError for a bad token file."""
        self._servers, self._timeout_s = Servers(targets), timeout_s
        self._credentials = Credentials(config or ClientConfig())
        self.trouble: str | None = None
        self._lanes: dict[str, GrpcLane] = {}
        self._threads = ThreadPoolExecutor(_AT_ONCE, "look")

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connections."""
        for lane in self._lanes.values():
            lane.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def look(self) -> list[ServerLook]:
        """Ask every server, all at once."""
        if self._servers.registered:
            try:
                self._servers.look()
                self.trouble = None
            except RegistryError as error:
                self.trouble = str(error)
        addresses, _ = self._servers.find(None, None)
        for gone in self._lanes.keys() - set(addresses):
            self._lanes.pop(gone).close()
        for address in addresses:
            self._lanes.setdefault(address, GrpcLane(address, self._credentials))
        return list(self._threads.map(self._look_at, addresses))

    def _look_at(self, address: str) -> ServerLook:
        lane = self._lanes[address]
        try:
            samples = Samples.of(lane.stats(self._timeout_s))
            if not samples.sum("engrampool_serving"):
                return ServerLook(address, samples=samples)
            begin = time.perf_counter()
            answer = lane.describe(self._timeout_s, BRIEF)
            round_trip_s = time.perf_counter() - begin
        except (PoolError, ProtocolError) as error:
            return ServerLook(address, str(lane.explained(error)))
        try:
            described = pool_pb2.DescribeResponse.FromString(answer)
        except Exception as error:  # the runtime's DecodeError has no stable home across protobuf versions
            return ServerLook(address, f"Describe was answered with something else: {error}")
        return ServerLook(address, None, round_trip_s, described.server_version, tuple(described.models), samples)


def versions(looks: Iterable[ServerLook]) -> list[dict[str, Any]]:
    """The versions that servers hold, as JSON types: by whom, and which rows nobody holds.

    missing: layer -> [first row, one past the last] of each gap.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    parts: dict[tuple[str, str], dict[int, list[tuple[int, int]]]] = {}
    for look in looks:
        for model in look.held:
            key = (model.name, model.version)
            one = found.setdefault(
                key, {"model": model.name, "version": model.version, "active": False, "servers": [], "missing": {}}
            )
            one["active"] |= model.active
            one["servers"].append({"address": look.address, "shard": look.shard(*key)})
            for table in model.tables:
                held = parts.setdefault(key, {}).setdefault(table.layer, [(table.num_rows, table.num_rows)])
                held.append((table.row_start, table.row_stop))
    for key, layers in parts.items():
        for layer, held in layers.items():
            if gaps := _gaps(held):
                found[key]["missing"][str(layer)] = gaps
    return [found[key] for key in sorted(found)]


def _gaps(held: list[tuple[int, int]]) -> list[list[int]]:
    """What lies between ranges; one at the end is empty, and says where the table ends."""
    gaps, at = [], 0
    for start, stop in sorted(held):
        if start > at:
            gaps.append([at, start])
        at = max(at, stop)
    return gaps


def server_json(look: ServerLook) -> dict[str, Any]:
    """A server as JSON types; docs/OPERATIONS.md lists the keys."""
    samples = look.samples

    def total(name: str) -> float | None:
        value = samples.sum(name)
        return None if value is None else int(value) if value.is_integer() else value

    started = samples.sum("process_start_time_seconds")
    return {
        "address": look.address,
        "error": look.error,
        "serving": look.serving,
        "server_version": look.server_version or None,
        "round_trip_s": look.round_trip_s,
        "uptime_s": None if started is None else round(samples.unix_s - started, 3),
        "workers": total("engrampool_workers"),
        "worker_restarts": total("engrampool_worker_restarts_total"),
        "loaded_bytes": total("engrampool_loaded_bytes_total"),
        "to_load_bytes": total("engrampool_to_load_bytes"),
        "table_bytes": total("engrampool_table_bytes"),
        "resident_bytes": total("process_resident_memory_bytes"),
        "in_flight_bytes": total("engrampool_in_flight_bytes"),
        "in_flight_limit_bytes": total("engrampool_in_flight_limit_bytes"),
        "direct_connections": total("engrampool_direct_connections"),
        "rows": total("engrampool_lookup_rows_total"),
        "bytes": total("engrampool_lookup_bytes_total"),
        "refused": {reason: int(count) for reason, count in samples.by("engrampool_refused_total", "reason").items()},
        "models": [
            {
                "model": model.name,
                "version": model.version,
                "active": model.active,
                "shard": look.shard(model.name, model.version),
                "tables": [
                    {
                        "layer": table.layer,
                        "row_start": table.row_start,
                        "row_stop": table.row_stop,
                        "num_rows": table.num_rows,
                        "row_bytes": table.row_bytes,
                    }
                    for table in model.tables
                ],
            }
            for model in look.held
        ],
    }


def alarms(looks: Sequence[ServerLook], trouble: str | None = None) -> list[str]:
    """What somebody should look at now, for people; none of a pool that is well. trouble: as of `Watch`."""
    found = [] if trouble is None else [trouble]
    if not looks:
        found.append("no server is known")
    for look in looks:
        if look.error is not None:
            found.append(f"{look.address} does not answer: {look.error}")
            continue
        samples = look.samples
        if not look.serving:
            loaded, of = (samples.sum(f"engrampool_{name}") for name in ("loaded_bytes_total", "to_load_bytes"))
            found.append(f"{look.address} does not serve: {loaded or 0:.0f} of {of or 0:.0f} bytes are loaded")
        if (samples.sum("engrampool_registry_age_seconds") or 0) > _REGISTRY_AGE_S:
            found.append(f"{look.address} has heard nothing of its registry for more than {_REGISTRY_AGE_S:.0f} s")
        if samples.sum("engrampool_unregistered"):
            found.append(f"{look.address} is not in its registry")
        states = samples.by("engrampool_versions", "state")
        for state, what in (("failed", "could not be loaded"), ("unpublished", "are unknown to its registry")):
            if states.get(state):
                found.append(f"{look.address}: {states[state]:.0f} versions {what}")
        limit = samples.sum("engrampool_in_flight_limit_bytes")
        if limit and (samples.sum("engrampool_in_flight_bytes") or 0) > _FULL * limit:
            found.append(f"{look.address}: more than {_FULL:.0%} of max_in_flight_bytes is in use")
    together = versions(looks)
    for one in together:
        for layer, gaps in one["missing"].items():
            rows = ", ".join(f"{start} .. {stop - 1}" for start, stop in gaps)
            found.append(f"{one['model']} {one['version']}: no server holds rows {rows} of layer {layer}")
    for model in sorted({one["model"] for one in together}):
        held = [one["version"] for one in together if one["model"] == model]
        if len(held) > 1 and not any(one["active"] for one in together if one["model"] == model):
            found.append(f"servers hold {len(held)} versions of {model}, and none is known as active")
    return found
