"""A client of a cluster under constant load, which checks every byte: started by test_cluster.py.

Arguments: a seed, and the servers' addresses. Says how it goes in lines of JSON, until its standard input ends.
"""

import json
import sys
import threading
import time

import numpy as np

from engrampool_client import Client, PoolError
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.synthetic import synthetic_rows


def main() -> None:
    seed, addresses = int(sys.argv[1]), sys.argv[2:]
    random = np.random.default_rng(seed)
    ending = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ending.set()), daemon=True).start()
    said = {"lookups": 0, "wrong": 0, "failed": [], "slowest_s": 0.0}
    told = time.monotonic()
    with Client(addresses, attach="off", direct="auto" if seed % 2 else "off", cache_bytes=1 << 20) as client:
        spec = client.spec
        while not ending.is_set():
            tokens = random.integers(0, 2000, int(random.integers(1, 300))).astype(np.int32)
            begin = time.monotonic()
            try:
                rows = client.lookup(tokens)
            except PoolError as error:
                said["failed"].append(repr(error))
                continue
            finally:
                said["slowest_s"] = max(said["slowest_s"], time.monotonic() - begin)
            ids = spec.hash(TokenBatch.of(tokens))
            said["wrong"] += sum(not np.array_equal(rows[n], synthetic_rows(spec.table(n), ids[n])) for n in ids)
            said["lookups"] += 1
            if time.monotonic() - told > 0.1:
                told = time.monotonic()
                print(json.dumps({**said, "away": list(client._shards._away)}), flush=True)
                said["slowest_s"] = 0.0


if __name__ == "__main__":
    main()
