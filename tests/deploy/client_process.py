"""A client with a cache and metrics, and an engine's forwards: looks something up at each line of its input."""

import sys

import numpy as np
from prometheus_client import CollectorRegistry, start_http_server

from engrampool_client import Client
from engrampool_client.integrations.forwards.history import Histories
from engrampool_client.integrations.forwards.metrics import EngineCollector
from engrampool_client.integrations.forwards.supply import Supply
from engrampool_client.metrics import register
from landings import HostLanding


def main() -> None:
    with Client(sys.argv[1], cache_bytes=4 << 20, on_failure="mask", attach="off") as client:
        registry = CollectorRegistry()
        register(client, registry=registry)
        shapes = {layer: client.dummy(1).rows(layer).shape[1:] for layer in client.spec.layers}
        supply = Supply(client, HostLanding(shapes, 8), Histories(1, 8, client.spec.lookback), timeout_s=60)
        registry.register(EngineCollector(client.spec.name, supply.counts))
        metrics, thread = start_http_server(0, "127.0.0.1", registry=registry)
        print(metrics.server_port, flush=True)
        for number, _ in enumerate(sys.stdin):
            tokens = np.random.default_rng(number).integers(10, 1000, 300).astype(np.int32)
            client.lookup(tokens)
            client.lookup(tokens)
            step = client.prefetch(tokens[:5])
            step.hint([[1]])
            while client.stats.pending_hint_bytes:
                client.prefetch([2]).wait()
            client.prefetch([1], None, [tokens[4:2:-1].tolist()]).wait()
            supply.add(0, tokens[:5].tolist(), 0)
            supply.start(np.array([0]), np.array([0]), np.array([5]))
            supply.wait()
            print("done", flush=True)
        supply.release()
        metrics.shutdown()
        metrics.server_close()
        thread.join()


if __name__ == "__main__":
    main()
