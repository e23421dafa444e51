"""One rank of a group, in a process of its own: `python -m rank_process RANK SIZE STORE SERVER POLICY TIMEOUT_S`.

For each line of standard input it runs a forward, all ranks the same one, and says what became of it in a line of JSON.
A line "fail" has the forward fail before it asks for anything.
"""

import json
import sys

import numpy as np
import torch
import torch.distributed as dist

from engrampool_client import Client
from engrampool_client.integrations.forwards import agreement
from engrampool_client.integrations.forwards.history import Histories
from engrampool_client.integrations.forwards.supply import Supply
from engrampool_client.integrations.forwards.torch_landing import TorchLanding


def main(rank: int, size: int, store: str, server: str, policy: str, timeout_s: float) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    width = 24 // size
    client = Client(
        server, heads=(rank * width, (rank + 1) * width), on_failure=policy, timeout_s=timeout_s, breaker_failures=0
    )
    rows = {layer: (width, client.spec.table(layer).row_bytes) for layer in client.spec.layers}
    landing = TorchLanding(client.spec.layers, rows, 8, torch.device("cpu"))
    supply = Supply(client, landing, Histories(1, 20, 3), timeout_s=timeout_s, agree=agreement.over(dist.group.WORLD))
    supply.add(0, [1, 2, 3, 4, 5], 0)
    numbers, starts, counts = (np.array([one]) for one in (0, 0, 5))
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        try:
            if line.strip() == "fail":
                supply.failed(5, RuntimeError("told to fail"))
            else:
                supply.start(numbers, starts, counts)
            valid = supply.wait()
            zeros = not any(supply.landed(layer)[:5].any() for layer in client.spec.layers)
            print(json.dumps({"valid": bool(valid.all()), "masked": not valid.any(), "zeros": zeros}), flush=True)
        except Exception as error:
            print(json.dumps({"error": type(error).__name__, "text": str(error)}), flush=True)
    supply.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6], float(sys.argv[6]))
