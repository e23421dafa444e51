"""A client with a cache and metrics: looks something up at each line of its input, and ends with it."""

import sys

import numpy as np
from prometheus_client import CollectorRegistry, start_http_server

from engrampool_client import Client
from engrampool_client.metrics import register


def main() -> None:
    with Client(sys.argv[1], cache_bytes=4 << 20, on_failure="mask", attach="off") as client:
        registry = CollectorRegistry()
        register(client, registry=registry)
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
            print("done", flush=True)
        metrics.shutdown()
        metrics.server_close()
        thread.join()


if __name__ == "__main__":
    main()
