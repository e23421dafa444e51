"""What a prompt's batch costs SGLang's scheduler: `python bench/sglang_stage.py MODEL`, where `make test-engines` runs.

Row ids of a batch of one prompt, as SGLang's stager makes them on the CPU. The plugin's whole `stage`, which begins the
lookup of both layers' rows, over the direct lane; and the same where the rows were asked for while the request waited,
and are there. They take turns. Prints medians in milliseconds: by the clock, and of the calling thread's CPU time.
"""

import argparse
import importlib.machinery
import os
import statistics
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np

from engrampool_client import Client
from engrampool_client.testing import serve_process

# Imported by the engine, and not used here.
VISION = ("", ".io", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional")


TOKENS = (64, 1024, 8192)


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
    from engrampool_client.integrations import sglang_prompts as prompts

    with serve_process(chosen.model) as server, Client(server.address) as client:
        spec = client.spec
        os.environ["ENGRAMPOOL_CLIENT_TARGET"] = server.address  # as where the plugin is used
        stock = engram.EngramHasher.__new__(engram.EngramHasher)
        torch.nn.Module.__init__(stock)
        stock.max_ngram_size, stock.image_token_id = spec.lookback + 1, None
        stock.pad_id = spec.tables[0].hash.fill
        stock.token_map = torch.from_numpy(spec.token_map.ids.astype(np.int64))
        stock.multipliers = torch.tensor([list(table.hash.multipliers) for table in spec.tables])
        stock.primes = torch.tensor([table.hash.primes for table in spec.tables])
        stock._cpu_hash_params = None
        stock.offsets = torch.from_numpy(np.array([table.head_offsets for table in spec.tables]).astype(np.int64))
        stager = ours.Stager(stock)
        worker = ours._worker
        worker.client, ours.get_parallel = client, lambda: SimpleNamespace(attn_tp_size=1)
        prompts.get_schedule = lambda: SimpleNamespace(chunked_prefill_size=max(TOKENS))
        worker.ready(list(spec.layers), slice(0, spec.tables[0].heads), torch.device("cpu"))
        pool = SimpleNamespace(req_to_token=np.zeros((64, 2 * max(TOKENS))))

        def batch_of(request: SimpleNamespace) -> SimpleNamespace:
            return SimpleNamespace(
                forward_mode=ForwardMode.EXTEND,
                req_to_token_pool=pool,
                encoder_swa_reset=None,
                prefix_lens=[0],
                extend_lens=[len(request.full_untruncated_fill_ids)],
                reqs=[request],
            )

        def request_of(given: array) -> SimpleNamespace:
            return SimpleNamespace(
                full_untruncated_fill_ids=given,
                origin_input_ids=given,
                output_ids=array("q"),
                last_node=None,
                num_matched_prefix_tokens=0,
            )

        def run(batch: SimpleNamespace) -> tuple[float, float]:
            spent = timed(lambda: stager.stage(batch))
            for layer in spec.layers:
                worker.rows(layer)
            return spent

        random = np.random.default_rng(0)
        print("| tokens | SGLang's row ids | CPU | the plugin's `stage` | CPU | its rows there | CPU |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for tokens in TOKENS:
            found: list[tuple[float, ...]] = []
            for _ in range(chosen.times + 2):
                given = array("q", random.integers(0, spec.vocab_size, tokens).tolist())
                batch = batch_of(request_of(given))
                theirs = timed(lambda batch=batch: stock.hash_windows(*stager._windows(batch)))
                own = run(batch)
                waiting = request_of(array("q", random.integers(0, spec.vocab_size, tokens).tolist()))
                worker.prompts.look_ahead(None, [waiting], True)
                early = worker.counts.early["served"]
                while client.stats.in_flight:
                    time.sleep(0.01)
                found.append((*theirs, *own, *run(batch_of(waiting))))
                worker.prompts.look_ahead(None, [], True)
                assert worker.counts.early["served"] - early == tokens
            cells = [f"{statistics.median(column):.2f}" for column in zip(*found[2:], strict=True)]
            print(f"| {tokens} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
