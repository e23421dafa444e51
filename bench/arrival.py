"""Copies of rows when they come, or when a layer asks for them: `python bench/arrival.py`. Needs PyTorch, and no GPU.

`EngramPool(staging=True)` copies rows out of its buffers on the CPU, as it copies them to a GPU where there is one. One
pool does so when they come (`copy_on_arrival=True`), the other when a layer asks. After a pause of 10 ms a step is
started, and its layers are taken one after the other: at once, as the first of a decode step are, or later, when the
rows have long come. Shown are milliseconds from the start until a layer was taken (at once), or of taking it (later);
ratios are of a round's medians.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

import report
from engrampool_client import Client
from engrampool_client.integrations.torch import EngramPool
from engrampool_client.testing import serve_process
from workload import Workload

PAUSE_S = 0.01
DECODE_TOKENS = 512  # and more are a prefill, of one sequence
WAYS = {"asked for": False, "come": True}


def taken(pool: EngramPool, ids: np.ndarray, before_s: float) -> list[float]:
    """Milliseconds of each layer."""
    bounds = np.arange(len(ids) + 1, dtype=np.int32) if len(ids) <= DECODE_TOKENS else None
    time.sleep(PAUSE_S)
    times, begin = [], time.perf_counter()
    with pool.start(ids, bounds) as step:
        if before_s:
            time.sleep(before_s)
        for layer in step.step.layers:
            if before_s:
                begin = time.perf_counter()
            step.rows(layer)
            times.append(1e3 * (time.perf_counter() - begin))
    return times


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--vocab-size", type=int, default=80_000, help="of each head: 48 times as many rows")
    parser.add_argument("--model", type=Path, help="a packed model of V4.1's layout, in their place")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16, help="of each way, in a round")
    chosen = parser.parse_args()
    packed = chosen.model or Workload.make(chosen.data, chosen.vocab_size).packed
    random = np.random.default_rng(0)
    torch.set_num_threads(1)
    print(f"{report.machine()}, torch {torch.__version__}\n")
    print("| tokens | taken | layer | copied when asked for, ms | when they come, ms | ratio (quarters) |")
    print("| ---: | --- | ---: | ---: | ---: | --- |")
    with serve_process(packed, workers=1) as server, Client(server.address, attach="off", timeout_s=60) as client:
        pools = {name: EngramPool(client, staging=True, copy_on_arrival=way) for name, way in WAYS.items()}
        layers = client.spec.layers
        for tokens, before_s in ((1, 0), (8, 0), (64, 0), (256, 0), (2048, 0), (8, 0.02), (256, 0.06), (2048, 0.12)):
            medians: dict[str, list[list[float]]] = {name: [] for name in pools}
            for turn in range(chosen.rounds):
                for name in [*pools][:: 1 if turn % 2 else -1]:
                    batches = random.integers(0, client.spec.vocab_size, (chosen.steps, tokens)).astype(np.int32)
                    times = [taken(pools[name], ids, before_s) for ids in batches]
                    medians[name].append([statistics.median(of_layer) for of_layer in zip(*times, strict=True)])
            for at, layer in enumerate(layers):
                asked, come = ([of_round[at] for of_round in medians[name]] for name in WAYS)
                ratios = [b / a for a, b in zip(asked, come, strict=True)]
                low, _, high = statistics.quantiles(ratios, n=4)
                cells = [tokens, "later" if before_s else "at once", layer, f"{statistics.median(asked):.2f}"]
                cells += [f"{statistics.median(come):.2f}", f"{statistics.median(ratios):.2f} ({low:.2f} - {high:.2f})"]
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
