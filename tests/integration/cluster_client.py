"""A client of a cluster under constant load, which checks every byte: started by cluster_load.py.

Arguments: a seed, odd for the direct lane; a lookup's deadline in seconds; the client's targets. Says how it goes in
lines of JSON, until its standard input ends.
"""

import json
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping

import numpy as np

from cluster_rows import VERSIONS, versions_of
from engrampool_client import Client, PoolError
from engrampool_proto.hashing import TokenBatch

# Between two lookups: so long a model computes, and so long others have the processor.
PAUSE_S = 0.03
# Of a machine that is busy: how long servers may take to start, and a process to go on that stood still.
SLOW = {"connect_timeout_s": 120.0, "retry_s": 10.0}


def judge(found: Mapping[int, Mapping[str, np.ndarray]]) -> tuple[bool, set[str]]:
    """Whether every row is of some version, and the versions that the whole answer may be of: none if it is mixed."""
    right = all(np.logical_or.reduce(list(layer.values())).all() for layer in found.values())
    return right, {version for version in VERSIONS if all(layer[version].all() for layer in found.values())}


def main() -> None:
    seed, timeout_s, targets = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    random = np.random.default_rng(seed)
    ending = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ending.set()), daemon=True).start()
    lookups = wrong = mixed = 0
    slowest_s, version = 0.0, ""
    failed: Counter[str] = Counter()
    told = time.monotonic()
    direct = "auto" if seed % 2 else "off"
    with Client(targets, attach="off", direct=direct, cache_bytes=1 << 20, timeout_s=timeout_s, **SLOW) as client:
        spec = client.spec
        while not ending.is_set():
            ending.wait(PAUSE_S)
            tokens = random.integers(0, 2000, int(random.integers(1, 150))).astype(np.int32)
            begin = time.monotonic()
            try:
                rows = client.lookup(tokens)
            except PoolError as error:
                rows = {}
                failed[repr(error)] += 1
            except Exception:  # nothing else may be raised
                rows = {}
                failed[traceback.format_exc()] += 1
            slowest_s = max(slowest_s, time.monotonic() - begin)
            if rows:
                ids = spec.hash(TokenBatch.of(tokens))
                right, versions = judge({n: versions_of(spec.table(n), ids[n], rows[n]) for n in ids})
                lookups += 1
                wrong += not right
                mixed += right and not versions
                if len(versions) == 1:  # a few rows may be the same in two
                    (version,) = versions
            if time.monotonic() - told > 0.1:
                told = time.monotonic()
                said = {"lookups": lookups, "wrong": wrong, "mixed": mixed, "failed": failed, "slowest_s": slowest_s}
                known = client.status()["servers"]
                servers = {
                    "open": sorted(one["address"] for one in known if one["used"]),
                    "away": sorted(one["address"] for one in known if not one["used"]),
                }
                print(json.dumps({**said, **servers, "version": version}), flush=True)
                slowest_s = 0.0


if __name__ == "__main__":
    main()
