"""What a prompt's batch costs SGLang's scheduler: `python bench/sglang_stage.py MODEL`, where `make test-engines` runs.

Row ids of a batch of one prompt, as SGLang's stager makes them on the CPU, and as the plugin's does, which takes its
place. They take turns. Then the plugin's whole `stage`, which begins the lookup of both layers' rows, over the direct
lane. Prints medians in milliseconds: by the clock, and of the calling thread's CPU time.
"""

import argparse
import importlib.machinery
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np

from engrampool_client import Client
from engrampool_client.testing import serve_process

# Imported by the engine, and not used here.
VISION = ("", ".io", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional")


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds, and of this thread's CPU time."""
    begin, begin_cpu = time.perf_counter_ns(), time.thread_time_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1e6, (time.thread_time_ns() - begin_cpu) / 1e6


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a packed model of V4.1's layout")
    parser.add_argument("--times", type=int, default=20)
    chosen = parser.parse_args()
    for name in (f"torchvision{name}" for name in VISION):
        sys.modules[name] = MagicMock(__version__="0", __path__=[], __spec__=importlib.machinery.ModuleSpec(name, None))
    import torch
    from sglang.srt.layers import engram
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from engrampool_client.integrations import sglang_engram as ours

    with serve_process(chosen.model) as server, Client(server.address) as client:
        spec = client.spec
        stock = engram.EngramHasher.__new__(engram.EngramHasher)
        torch.nn.Module.__init__(stock)
        stock.max_ngram_size, stock.image_token_id = spec.lookback + 1, None
        stock.pad_id = spec.tables[0].hash.fill
        stock.token_map = torch.from_numpy(spec.token_map.ids.astype(np.int64))
        stock.multipliers = torch.tensor([list(table.hash.multipliers) for table in spec.tables])
        stock.primes = torch.tensor([table.hash.primes for table in spec.tables])
        stock._cpu_hash_params = None
        stock.offsets = torch.from_numpy(np.array([table.head_offsets for table in spec.tables]).astype(np.int64))
        stager = ours.Stager(stock, client, torch.device("cpu"))
        worker = ours._worker
        worker.client, ours.get_parallel = client, lambda: SimpleNamespace(attn_tp_size=1)
        worker.ready(list(spec.layers), slice(0, spec.tables[0].heads), torch.device("cpu"))
        start = worker.start
        random = np.random.default_rng(0)
        print("| tokens | SGLang's row ids | CPU | the plugin's | CPU | its `stage` | CPU |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for tokens in (64, 1024, 8192):
            found: list[tuple[float, ...]] = []
            for _ in range(chosen.times + 2):
                given = random.integers(0, spec.vocab_size, tokens).tolist()
                batch = SimpleNamespace(
                    forward_mode=ForwardMode.EXTEND,
                    encoder_swa_reset=None,
                    prefix_lens=[0],
                    extend_lens=[tokens],
                    reqs=[SimpleNamespace(full_untruncated_fill_ids=given)],
                )
                theirs = timed(lambda batch=batch: stock.hash_windows(*stager._windows(batch)))
                made: list[torch.Tensor] = []
                worker.start = made.extend
                own = timed(lambda batch=batch: stager.stage(batch))
                right, _ = stock.hash_windows(*stager._windows(batch))
                assert all(torch.equal(right[:, at].int(), one) for at, one in enumerate(made))
                worker.start = start
                whole = timed(lambda batch=batch: stager.stage(batch))
                for layer in spec.layers:
                    worker.rows(layer)
                found.append((*theirs, *own, *whole))
            cells = [f"{statistics.median(column):.2f}" for column in zip(*found[2:], strict=True)]
            print(f"| {tokens} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
