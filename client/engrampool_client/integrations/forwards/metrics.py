"""An engine's worker for Prometheus, on a port of its own. Needs the extra `metrics`."""

from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from engrampool_client.client import Client
from engrampool_client.integrations.forwards.counts import EngineCounts
from engrampool_client.metrics import register
from engrampool_client.stats import WAIT_BOUNDS_S

_PREFIX = "engrampool_engine_"
_LE = [*map(floatToGoString, WAIT_BOUNDS_S), "+Inf"]


class EngineCollector(Collector):
    """What `EngineCounts` say at each scrape. model: the label `model` of the client's metrics."""

    def __init__(self, model: str, counts: EngineCounts) -> None:
        self._model, self._counts = model, counts

    def describe(self) -> Iterable[Metric]:
        """Of every metric that there may be."""
        return self.collect()

    def collect(self) -> Iterator[Metric]:
        """The values as they are now."""
        counts = self._counts
        for name, value, text in (
            ("steps", counts.steps, "Forwards that had their rows, or went without some of them."),
            ("failed_steps", counts.failed, "Forwards that ended by an error."),
            ("dummy_steps", counts.dummies, "Forwards that asked nobody."),
            ("tokens", counts.tokens, "Tokens of forwards."),
            ("verified_tokens", counts.verified, "Tokens that were compared with the engine's own."),
            ("verify_differences", counts.differences, "Those of them that differed."),
        ):
            family = CounterMetricFamily(_PREFIX + name, text, labels=["model"])
            family.add_metric([self._model], value)
            yield family
        text = "Tokens asked for before their forward, by what became of it."
        early = CounterMetricFamily(_PREFIX + "early_tokens", text, labels=["model", "fate"])
        for fate, tokens in counts.early.items():
            early.add_metric([self._model, fate], tokens)
        yield early
        masked = CounterMetricFamily(_PREFIX + "masked_tokens", "Tokens without rows.", labels=["model", "layer"])
        waits = HistogramMetricFamily(
            _PREFIX + "wait_seconds", "What the engine waited for rows.", labels=["model", "layer"]
        )
        for layer, wait in counts.waits.items():
            masked.add_metric([self._model, str(layer)], counts.masked[layer])
            sums = list(zip(_LE, accumulate(wait.counts), strict=True))
            waits.add_metric([self._model, str(layer)], sums, wait.sum_s)
        yield masked
        yield waits


def serve(port: int, client: Client, counts: EngineCounts) -> Any:
    """Answer Prometheus on `port`, on every address, as vLLM does: the client's metrics and the engine's.

    Gives what ends it: `shutdown`, then `server_close`. Raises OSError if the port is taken.
    """
    registry = CollectorRegistry()
    register(client, registry=registry)
    registry.register(EngineCollector(client.spec.name, counts))
    server, _ = start_http_server(port, registry=registry)
    return server
