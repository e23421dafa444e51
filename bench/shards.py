"""What it costs to ask several servers instead of one: `python bench/shards.py`.

One server with all rows, and servers with a shard each, all with one worker, on this machine: the same total work,
spread over more processes. Lookups of both layers by row ids (uniform), one call at a time, the systems in turn. Prints
a Markdown table: medians, ratios of each round's medians, and the bytes of requests.
"""

import argparse
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from engrampool_client import Client
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.exchange import Exchange
from engrampool_client.lookup.landing import Landing
from engrampool_client.testing import serve_process
from workload import ROW_BYTES, Workload


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--vocab-size", type=int, default=80_000, help="of each head: 48 times as many rows")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--tokens", default="64,1024,4096")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each system in each round")
    chosen = parser.parse_args()
    workload = Workload.make(chosen.data, chosen.vocab_size)
    with ExitStack() as stack:
        settings = {"workers": 1}
        one = stack.enter_context(serve_process(workload.packed, **settings))
        several = [
            stack.enter_context(serve_process(workload.packed, shard=f"{at}/{chosen.shards}", **settings))
            for at in range(chosen.shards)
        ]
        addresses = [server.address for server in several]
        clients = {
            (where, lane): stack.enter_context(Client(to, direct=lane, attach="off", timeout_s=60, keep_memory=True))
            for lane in ("off", "auto")
            for where, to in (("1 server", one.address), (f"{chosen.shards} shards", addresses))
        }
        print("| tokens | lane | 1 server ms | shards ms | shards / 1 server | request bytes, 1 server | shards |")
        print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
        for tokens in map(int, chosen.tokens.split(",")):
            out = {n: np.zeros((tokens, len(heads), ROW_BYTES), np.uint8) for n, heads in workload.heads.items()}
            batches = workload.batches("uniform", tokens)
            rounds: dict[tuple[str, str], list[float]] = {key: [] for key in clients}
            for _ in range(chosen.rounds):
                for key, client in clients.items():
                    times = []
                    end = time.perf_counter() + chosen.seconds
                    while time.perf_counter() < end:
                        batch = next(batches)
                        begin = time.perf_counter()
                        client.lookup_rows(batch.ids, out=out)
                        times.append(time.perf_counter() - begin)
                    rounds[key].append(statistics.median(times) * 1e3)
            for lane, name in (("off", "gRPC"), ("auto", "direct")):
                (single, many) = (times for (_, way), times in rounds.items() if way == lane)
                client = next(client for (where, way), client in clients.items() if way == lane and where != "1 server")
                flat = {layer: ids.reshape(-1) for layer, ids in next(batches).ids.items()}
                shapes = {n: (len(ids), client.spec.table(n).row_bytes) for n, ids in flat.items()}
                exchange = Exchange.of_ids(client.served, flat, Landing(Delivery(list(flat)), shapes))
                nbytes = len(exchange.encode())
                parts = exchange.spread(client._shards._routes)
                ratios = [b / a for a, b in zip(single, many, strict=True)]
                print(
                    f"| {tokens} | {name} | {statistics.median(single):.3f} | {statistics.median(many):.3f} | "
                    f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}) | {nbytes} | "
                    f"{sum(len(part.encode()) for part in parts.values())} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
