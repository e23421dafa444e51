"""One rank, in a process of its own: `python -m rank_process WAY RANK SIZE TOGETHER STORE SERVER POLICY TIMEOUT_S`.

For each line of standard input it runs a forward, all ranks the same one, and says what became of it in a line of JSON.
A line "fail" has the forward fail before it asks for anything, "dummy" is a forward for others' sake, "die" ends the
process there. WAY: rows come "before" a forward, or "in" it. TOGETHER: so many ranks that follow each other are a group
that computes the same tokens; the others are data-parallel to it.
"""

import json
import os
import sys

import numpy as np
import torch
import torch.distributed as dist

from engrampool_client import Client
from engrampool_client.integrations.forwards import agreement
from engrampool_client.integrations.forwards.history import Histories
from engrampool_client.integrations.forwards.supply import Supply
from engrampool_client.integrations.forwards.torch_landing import TorchLanding
from engrampool_client.integrations.staging import Staging


def main(way: str, rank: int, size: int, together: int, store: str, server: str, policy: str, timeout_s: float) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    groups = [dist.new_group(range(first, first + together)) for first in range(0, size, together)]
    width, at = 24 // together, rank % together
    client = Client(
        server, heads=(at * width, (at + 1) * width), on_failure=policy, timeout_s=timeout_s, breaker_failures=0
    )
    agree = agreement.over(groups[rank // together])
    run, dummy, close = (_before if way == "before" else _in)(client, width, timeout_s, agree)
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        if line.strip() == "die":
            os._exit(0)
        if line.strip() == "dummy":
            dummy()
            print(json.dumps("dummy"), flush=True)
            continue
        try:
            valid, rows = run(line.strip() == "fail")
            zeros = not any(one.any() for one in rows)
            print(json.dumps({"valid": all(valid), "masked": not any(valid), "zeros": zeros}), flush=True)
        except Exception as error:
            print(json.dumps({"error": type(error).__name__, "text": str(error)}), flush=True)
    close()
    dist.destroy_process_group()


def _before(client, width, timeout_s, agree):
    """A forward of `Supply`: which tokens are valid, and each layer's rows; a dummy one; and what closes it."""
    layers = client.spec.layers
    shape = {layer: (width, client.spec.table(layer).row_bytes) for layer in layers}
    landing = TorchLanding(layers, shape, 8, torch.device("cpu"))
    supply = Supply(client, landing, Histories(1, 20, 3), timeout_s=timeout_s, agree=agree)
    supply.add(0, [1, 2, 3, 4, 5], 0)
    numbers, starts, counts = (np.array([one]) for one in (0, 0, 5))

    def run(fail):
        if fail:
            supply.failed(5, RuntimeError("told to fail"))
        else:
            supply.start(numbers, starts, counts)
        valid = supply.wait()
        return valid.reshape(-1).tolist(), [supply.landed(layer)[:5] for layer in layers]

    return run, lambda: supply.dummy(8), supply.close


def _in(client, width, timeout_s, agree):
    """The same of `Staging`, whose layers come to an outcome each."""
    staging = Staging(client, client.spec.layers, width, 8, torch.device("cpu"), agree=agree)
    ids = torch.arange(5 * width).view(5, width)

    def run(fail):
        before = sum(staging.counts.masked.values())
        for layer in staging.layers:
            staging.start(layer, ids + (1 << 30) * fail)
        rows, error = [], None
        for layer in staging.layers:
            try:
                rows.append(staging.rows(layer))
            except Exception as raised:
                error = raised
        if error is not None:
            raise error
        masked = sum(staging.counts.masked.values()) - before
        return [at >= masked for at in range(5 * len(rows))], rows

    def dummy():
        with staging.quiet():
            for layer in staging.layers:
                staging.start(layer, ids)
            assert [staging.rows(layer) for layer in staging.layers] == [None] * len(staging.layers)

    return run, dummy, staging.close


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]), *sys.argv[5:8], float(sys.argv[8]))
