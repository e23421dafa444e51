"""What a load asks of servers before there are any: bytes, processors, waits, and whether a pool pays.

docs/SCALING.md has the formulas, and where the defaults were measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

from engrampool_proto.spec import ModelSpec
from engrampool_proto.tiers.tier import Tier

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """One phase of the engines' load: prefill or decode.

    tokens_per_s: of all engines together. batch: tokens of one lookup. asked: share of their rows that deduplication
    and a cache leave to be asked for. forward_s: what a forward of `batch` takes, None if nobody said.
    """

    tokens_per_s: float
    batch: int
    asked: float
    forward_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What things take. call_s, s_per_gb: of a server's processor time. Prices are in any one unit."""

    call_s: float
    s_per_gb: float
    gib_price: float
    server_price: float


@dataclass(frozen=True, kw_only=True)
class LoadPlan:
    """A load on a model's servers.

    traffic: by phase. link: of each server. layers: of the model. memory_bytes: of all servers, as `ShardPlan` has it.
    hosts: of engines, each of which would hold a copy otherwise.
    """

    spec: ModelSpec
    shards: int
    replicas: int
    memory_bytes: int
    traffic: Mapping[str, Traffic]
    link: Tier
    layers: int | None
    hosts: int
    costs: Costs

    @property
    def gb_per_s(self) -> float:
        """Of rows, from all servers."""
        return sum(one.tokens_per_s * one.asked for one in self.traffic.values()) * self._token_bytes() / 1e9

    @property
    def servers(self) -> int:
        """As many as there are."""
        return self.shards * self.replicas

    @property
    def servers_by_link(self) -> int:
        """As many as their links want."""
        return max(1, ceil(self.gb_per_s * 1e9 / self.link.bytes_per_s))

    @property
    def cores(self) -> float:
        """Of all servers together."""
        calls = sum(one.tokens_per_s / one.batch for one in self.traffic.values()) * self.shards
        return calls * self.costs.call_s + self.gb_per_s * self.costs.s_per_gb

    def there_s(self, phase: str, layer: int) -> float:
        """Seconds from the ask until a layer's rows are there, behind those of earlier layers; nobody else asks."""
        one = self.traffic[phase]
        nbytes = self._token_bytes(layer) * one.batch * one.asked / self.shards
        return self.costs.call_s + nbytes / 1e9 * self.costs.s_per_gb + self.link.alone_s(ceil(nbytes))

    def waits(self) -> dict[str, dict[int, float]]:
        """Phase -> layer -> seconds that it waits, 0 for none, where the times of forwards and the layers were said."""
        found: dict[str, dict[int, float]] = {}
        for phase, one in self.traffic.items():
            if one.forward_s is not None and self.layers is not None:
                due = {layer: one.forward_s * layer / self.layers for layer in self.spec.layers}
                found[phase] = {layer: max(0.0, self.there_s(phase, layer) - at) for layer, at in due.items()}
        return found

    @property
    def pool_price(self) -> float:
        """Of the servers, their memory with them."""
        return self.memory_bytes / _GIB * self.costs.gib_price + self.servers * self.costs.server_price

    @property
    def copies_price(self) -> float:
        """Of the memory that a copy on each host takes."""
        return self.hosts * self.spec.nbytes / _GIB * self.costs.gib_price

    def _token_bytes(self, layer: int | None = None) -> int:
        """Of a token's rows, of layers up to that one."""
        tables = [table for table in self.spec.tables if layer is None or table.layer <= layer]
        return sum(table.heads * table.row_bytes for table in tables)

    def to_json(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "gb_per_s": self.gb_per_s,
            "link": self.link.to_json(),
            "servers_by_link": self.servers_by_link,
            "cores": self.cores,
            "there_s": {
                name: {layer: self.there_s(name, layer) for layer in self.spec.layers} for name in self.traffic
            },
            "waits_s": self.waits(),
            "pool_price": self.pool_price,
            "copies_price": self.copies_price,
        }

    def __str__(self) -> str:
        """For people."""
        short = " (more than there are: add replicas)" if self.servers_by_link > self.servers else ""
        lines = [
            "calculated, not measured:",
            f"rows: {self.gb_per_s:.2f} GB/s; links of {self.link.bytes_per_s / 1e9:g} GB/s ({self.link.name}): "
            f"{self.servers_by_link} of {self.servers} servers{short}",
            f"processors: {self.cores:.1f} cores of servers in all",
        ]
        waits = self.waits()
        for phase, one in self.traffic.items():
            for layer in self.spec.layers:
                wait = waits.get(phase, {}).get(layer)
                verdict = "" if wait is None else f", waits {wait * 1e3:.2f} ms" if wait else ", hidden"
                there_ms = self.there_s(phase, layer) * 1e3
                lines.append(
                    f"{phase} of {one.batch} tokens: layer {layer} has its rows after {there_ms:.2f} ms{verdict}"
                )
        better = "the pool" if self.pool_price < self.copies_price else "copies"
        lines.append(
            f"price: the pool {self.pool_price:.0f}, a copy on each of {self.hosts} hosts {self.copies_price:.0f}: "
            f"{better} for less"
        )
        return "\n".join(lines)
