"""A client's counters for Prometheus. Needs the extra `metrics`; docs/METRICS.md is made of this.

collector = register(client)    # beside the process's other metrics, wherever those are exposed
...
REGISTRY.unregister(collector)  # before client.close(), or the last values are shown for ever

`prometheus_client`'s multiprocess mode, which vLLM and SGLang turn on, collects no custom collectors: there give the
client a registry and a port of its own, `register(client, registry=own); start_http_server(port, registry=own)`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TypeVar

from prometheus_client import REGISTRY, CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from engrampool_client.client import Client
from engrampool_client.stats import WAIT_BOUNDS_S, Waits
from engrampool_client.status import ServerStatus
from engrampool_proto import __version__

_PREFIX = "engrampool_client_"
_Family = TypeVar("_Family", bound=Metric)
# Upper bounds as Prometheus writes them.
_LE = [*map(floatToGoString, WAIT_BOUNDS_S), "+Inf"]


class ClientCollector(Collector):
    """What `Client.stats`, the cache and the breaker of clients say at each scrape; costs nothing between two.

    clients: of different models; the label `model` tells them apart. Raises ValueError for two of one model.
    """

    def __init__(self, *clients: Client) -> None:
        names = [client.spec.name for client in clients]
        if len(set(names)) != len(names):
            raise ValueError(f"clients of one collector must be of different models; these are of {', '.join(names)}")
        self._clients = clients

    def describe(self) -> Iterable[Metric]:
        """Of every metric that there may be: names must not be taken twice in a registry."""
        return _Families().all.values()

    def collect(self) -> Iterator[Metric]:
        """The metrics that have samples, with the values as they are now."""
        families = _Families()
        for client in self._clients:
            families.add(client)
        return (family for family in families.all.values() if family.samples)


def register(*clients: Client, registry: CollectorRegistry = REGISTRY) -> ClientCollector:
    """Have `registry` show these clients; gives what `registry.unregister` takes.

    Raises ValueError for two of one model, or if the registry shows clients already: give those to one collector.
    """
    collector = ClientCollector(*clients)
    registry.register(collector)
    return collector


class _Families:
    """One scrape's metrics, by name."""

    def __init__(self) -> None:
        self.all: dict[str, Metric] = {}
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        histogram, summary = HistogramMetricFamily, SummaryMetricFamily
        self._info = self._new(
            gauge, "info", "What the client is connected to; always 1.", "version", "spec_digest", "client_version"
        )
        self._waits = self._new(
            histogram,
            "wait_seconds",
            "What each call of Step.rows waited; the bucket 0.0 has those that found their rows there.",
            "layer",
        )
        self._hops = self._new(
            histogram,
            "hop_seconds",
            "Where lookups' time went: in the client until servers were asked (client); to a server and back, until "
            "the first of the answer came, where somebody waited for it (network); and, as servers say: until they "
            "began (queue), copying rows (gather), sending them (send).",
            "hop",
        )
        self._servers = self._new(
            summary,
            "server_seconds",
            "As engrampool_client_hop_seconds, of each server; its shard is I/N, the I-th of N by its rows, or all.",
            "shard",
            "server",
            "hop",
        )
        self._slow = self._new(
            counter,
            "slow_lookups",
            "Answers, or waits in the client, that took longer than the setting slow_lookup_s, by the hop that took "
            "most of it.",
            "hop",
        )
        self._steps = self._new(counter, "steps", "Steps that ended: ok, masked, cancelled, failed.", "outcome")
        self._in_flight = self._new(gauge, "in_flight_steps", "Steps that have not ended.")
        self._waiting = self._new(
            gauge,
            "waiting_steps",
            "Steps that wait in the client: to be planned by a thread, or for a place of max_steps.",
        )
        self._pending = self._new(
            gauge, "pending_bytes", "Rows of steps that have not ended; their bound is max_pending_bytes."
        )
        self._rows = self._new(
            counter,
            "rows_bytes",
            "Rows by where they came from: over the network (wire), from the cache, the warm file, attached memory, or "
            "from another token of the step (duplicate).",
            "source",
        )
        self._masked = self._new(
            counter, "masked_tokens", 'Tokens that a layer went without (on_failure="mask").', "layer"
        )
        self._retries = self._new(counter, "retries", "Lookups asked again, as their connection broke.")
        self._hedges = self._new(
            counter, "hedges", "Lookups that a second replica was asked for, as the first was late."
        )
        self._hedges_won = self._new(
            counter, "hedges_won", "Lookups asked of a second replica that this one answered first."
        )
        self._open = self._new(gauge, "breaker_open", "1 while lookups fail at once, as the server is away, else 0.")
        self._opened = self._new(counter, "breaker_opened", "How often lookups began to fail at once.")
        self._trouble = self._new(
            gauge, "servers_in_trouble", "Servers that do not answer, or hold something else than they should."
        )
        self._attached = self._new(gauge, "attached", "1 while rows are read from the server's memory, else 0.")
        self._age = self._new(
            gauge, "registry_age_seconds", "Since the registry was last known to answer; +Inf if it never did."
        )
        self._changes = self._new(
            counter,
            "version_changes",
            "Versions made active that were followed; attempts that failed, to be made again; versions that were "
            "refused, of another specification.",
            "outcome",
        )
        self._hits = self._new(counter, "cache_hits", "N-grams that the cache had, each token's counted.")
        self._misses = self._new(counter, "cache_misses", "N-grams that the cache had not.")
        self._evicted = self._new(counter, "cache_evicted", "N-grams that made room for others.")
        self._cache = self._new(gauge, "cache_bytes", "Memory that the cache has filled, index included.")
        self._capacity = self._new(gauge, "cache_capacity_bytes", "Memory that the cache may fill.")
        self._hints = self._new(
            counter,
            "hint_bytes",
            "Rows of hints: asked for, dropped for want of room among hint_bytes, failed; used by a later step, wasted "
            "as they went before.",
            "fate",
        )
        self._hinting = self._new(gauge, "pending_hint_bytes", "Rows of hints that have not ended.")

    def _new(self, kind: Callable[..., _Family], name: str, text: str, *labels: str) -> _Family:
        family = kind(_PREFIX + name, text, labels=["model", *labels])
        self.all[name] = family
        return family

    def add(self, client: Client) -> None:
        """Add a client's samples."""
        model, stats, cache = client.spec.name, client.stats, client.cache
        self._put(self._info, 1, model, client.version, client.spec.digest, __version__)
        for layer, waits in stats.waits.items():
            self._put_waits(self._waits, waits, model, str(layer))
            self._put(self._masked, stats.masked_tokens[layer], model, str(layer))
        for hop, waits in stats.hops.items():
            self._put_waits(self._hops, waits, model, hop)
            self._put(self._slow, stats.slow[hop], model, hop)
        status = client.status()
        for address, shard in _shards(status["servers"]).items():
            if (hops := stats.servers.get(address)) is not None:
                for hop, count in hops.counts.items():
                    self._servers.add_metric([model, shard, address, hop], count, hops.sums_s[hop])
        self._put(self._waiting, status["steps"]["new"] + status["steps"]["waiting"], model)
        for outcome, count in stats.steps.items():
            self._put(self._steps, count, model, outcome)
        for source, nbytes in stats.bytes.items():
            self._put(self._rows, nbytes, model, source)
        self._put(self._in_flight, stats.in_flight, model)
        self._put(self._pending, stats.pending_bytes, model)
        self._put(self._retries, stats.retries, model)
        self._put(self._hedges, stats.hedges, model)
        self._put(self._hedges_won, stats.hedges_won, model)
        self._put(self._open, client.breaker_open, model)
        self._put(self._opened, stats.breaker_opened, model)
        self._put(self._trouble, len(client.servers_in_trouble), model)
        self._put(self._attached, client.attached, model)
        if client.registry_age_s is not None:
            self._put(self._age, client.registry_age_s, model)
            for outcome, count in client.version_changes.items():
                self._put(self._changes, count, model, outcome)
        if cache is None:
            return
        self._put(self._hits, cache.hits, model)
        self._put(self._misses, cache.misses, model)
        self._put(self._evicted, cache.evicted, model)
        self._put(self._cache, cache.nbytes, model)
        self._put(self._capacity, cache.nbytes + (len(cache.rows) - cache.filled) * cache.entry_bytes, model)
        self._put(self._hinting, stats.pending_hint_bytes, model)
        fates = {**stats.hint_bytes, "used": cache.hinted_used_bytes, "wasted": cache.hinted_wasted_bytes}
        for fate, nbytes in fates.items():
            self._put(self._hints, nbytes, model, fate)

    @staticmethod
    def _put(family: GaugeMetricFamily | CounterMetricFamily, value: float, *labels: str) -> None:
        family.add_metric(labels, value)

    @staticmethod
    def _put_waits(family: HistogramMetricFamily, waits: Waits, *labels: str) -> None:
        family.add_metric(labels, list(zip(_LE, accumulate(waits.counts), strict=True)), waits.sum_s)


def _shards(servers: Sequence[ServerStatus]) -> dict[str, str]:
    """Address -> shard, of the servers that are used. Named by its rows, so that clients and servers call it alike."""
    parts = {
        server["address"]: [(rows["layer"], rows["start"]) for rows in server["rows"]]
        for server in servers
        if server["used"]
    }
    known = sorted(part for at, part in enumerate(parts.values()) if part not in list(parts.values())[:at])
    names = ["all"] if len(known) == 1 else [f"{at}/{len(known)}" for at in range(len(known))]
    return {address: names[known.index(part)] for address, part in parts.items()}
