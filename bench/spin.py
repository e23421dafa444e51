"""What it brings, and costs, that a server looks for requests without sleeping: python bench/spin.py PACKED_MODEL.

A server for each value of `direct_spin_s`, and a client of each, which makes steps over the direct lane in turn: back
to back, and with the pauses of decoding between them. Printed are medians over slices, of the time until the first
layer's rows were there and of its ratio to that without spinning, and the server's processor time over the time that it
took.
"""

import argparse
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import processes
from engrampool_client import Client
from engrampool_client.testing import serve_process

SPINS_S = (0.0, 50e-6, 0.02)
PAUSES_S = (0.0, 0.008)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a packed model")
    parser.add_argument("--tokens", default="1,8,64")
    parser.add_argument("--rounds", type=int, default=15, help="slices of each case")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each slice")
    options = parser.parse_args()
    with ExitStack() as stack:
        served = {}
        for spin_s in SPINS_S:
            server = stack.enter_context(serve_process(options.model, workers=1, direct_spin_s=spin_s))
            client = stack.enter_context(Client(server.address, attach="off", timeout_s=60))
            served[spin_s] = client, server.process.pid
        print("| tokens | pause ms | `direct_spin_s` | layer 1 ms | to none | cores of the server |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: |")
        for tokens in map(int, options.tokens.split(",")):
            for pause_s in PAUSES_S:
                found: dict[float, list[tuple[float, float]]] = {spin_s: [] for spin_s in SPINS_S}
                for number in range(options.rounds):
                    for spin_s in SPINS_S if number % 2 else SPINS_S[::-1]:
                        found[spin_s].append(_slice(*served[spin_s], tokens, pause_s, options.seconds))
                none = [took for took, _ in found[0.0]]
                for spin_s, slices in found.items():
                    ratio = statistics.median(took / of for (took, _), of in zip(slices, none, strict=True))
                    took, cores = (statistics.median(column) for column in zip(*slices, strict=True))
                    print(
                        f"| {tokens} | {pause_s * 1e3:g} | {spin_s:g} | {took * 1e3:.3f} | {ratio:.2f} | {cores:.2f} |",
                        flush=True,
                    )


def _slice(client: Client, pid: int, tokens: int, pause_s: float, seconds: float) -> tuple[float, float]:
    random, took = np.random.default_rng(), []
    begin, cpu = time.perf_counter(), processes.cpu_s(pid)
    while time.perf_counter() < begin + seconds:
        batch = random.integers(0, client.spec.vocab_size, tokens).astype(np.int32)
        if pause_s:
            time.sleep(pause_s)
        start = time.perf_counter()
        step = client.prefetch(batch)
        step.rows(client.spec.layers[0])
        took.append(time.perf_counter() - start)
        step.wait()
    return statistics.median(took), (processes.cpu_s(pid) - cpu) / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
