"""What a forward on a GPU loses by where its rows come from, against pinned memory: `python bench/gpu_forward.py`.

A stand-in for V4.1-Flash: 40 layers as three CUDA graphs, split before the Engram layers 1 and 14, which multiply their
embeddings into the stream. Decode samples each next token from the step before, so that its rows can be asked for when
a step begins and not earlier; a prefill of 8192 tokens asks at its start, or a step ahead.

- none: nothing is read. pinned: a Triton kernel gathers the rows from pinned memory of this machine on a side stream.
- direct, grpc, attached: `EngramPool` with a client of each way to one server, which has half of the cores.
- direct, on arrival: rows of every step are copied when they come, those of small ones, too. direct, landing: to the
  same memory of the GPU each time. direct, GPU waits: and not the thread that launches the graphs.

First every way's embeddings are compared with the rows that must come, bit for bit, while the GPU works; where rows
land in the same memory, those that a CUDA graph makes of it. Sources take turns within a round; medians are over all
steps, ratios of a round's medians. Needs PyTorch with CUDA, Triton, and memory for the tables twice. Prints Markdown
that begins with the machine; `--json FILE` writes the records as well.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import report
from engrampool_client import Client
from engrampool_client.testing import serve_process
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec
from engrampool_proto.synthetic import synthetic_rows
from workload import Workload

try:
    import torch
    import triton
    from triton import language as tl
except ModuleNotFoundError as error:
    WHY_NOT = f"{error.name} is not installed here"
else:
    from engrampool_client.integrations.torch import EngramPool, PooledStep, dequantize

    WHY_NOT = "" if torch.cuda.is_available() else "PyTorch finds no GPU here"

    @triton.jit
    def gather_pinned(table, ids, out, row_bytes: tl.constexpr, block: tl.constexpr):
        """Row ids[i] of memory of the host into row i of `out`."""
        at = tl.program_id(0)
        row = tl.load(ids + at).to(tl.int64)
        byte = tl.arange(0, block)
        inside = byte < row_bytes
        got = tl.load(table + row * row_bytes + byte, mask=inside, other=0)
        tl.store(out + at.to(tl.int64) * row_bytes + byte, got, mask=inside)


HIDDEN, LAYERS, VOCABULARY = 4096, (1, 14), 50_000
LAST_LAYERS = 26  # those from the second Engram layer on
DECODE_TOKENS = 512  # and more are a prefill
PINNED_ROWS = 4_000_000
WARM_UP = 20  # steps of a round, at most
MOST_TOKENS = 8192
# Settings of the client, and of the pool.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "direct": ({"attach": "off"}, {}),
    "direct, on arrival": ({"attach": "off"}, {"copy_on_arrival": True}),
    "direct, landing": ({"attach": "off"}, {"max_tokens": MOST_TOKENS}),
    "direct, GPU waits": ({"attach": "off"}, {"device_waits": True}),
    "grpc": ({"attach": "off", "direct": "off"}, {}),
    "attached": ({}, {}),
}


@dataclass(frozen=True)
class Case:
    """Forwards of so many tokens, a layer of which takes about so long; ahead: asked for a step before."""

    name: str
    tokens: int
    layer_ms: float
    ahead: bool = False


CASES = (
    Case("decode of 8", 8, 0.2),
    Case("decode of 64", 64, 0.3),
    Case("decode of 256", 256, 0.3),
    Case("prefill of 8192, at its start", MOST_TOKENS, 5.0),
    Case("prefill of 8192, a step ahead", MOST_TOKENS, 5.0, ahead=True),
)


class Model:
    """The stand-in. embeddings: layer -> what the graphs read; ids: what they write, int64 [tokens]."""

    def __init__(self, case: Case, spec: ModelSpec) -> None:
        tokens, seconds = case.tokens, case.layer_ms / 1e3
        # Decode is bound by memory, of about 4 TB/s; prefill by arithmetic, of about 650 TFLOP/s.
        width = seconds * 4e12 / 2 / 2 / HIDDEN if tokens <= DECODE_TOKENS else seconds * 650e12 / (4 * tokens * HIDDEN)
        inner = max(256, int(width) // 256 * 256)
        heads, dim = spec.table(LAYERS[0]).heads, 256
        random = torch.Generator("cuda").manual_seed(0)

        def weights(*shape: int) -> "torch.Tensor":
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=random)

        self._into, self._from = weights(HIDDEN, inner) * 0.01, weights(inner, HIDDEN) * 0.01
        self._embedded, self._out = weights(heads * dim, HIDDEN) * 0.01, weights(HIDDEN, VOCABULARY)
        self._input = weights(tokens, HIDDEN)
        self.embeddings = {n: torch.zeros(tokens, heads, dim, device="cuda", dtype=torch.bfloat16) for n in LAYERS}
        self.ids = torch.zeros(tokens, device="cuda", dtype=torch.int64)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):  # before a capture, so that libraries are set up
                self._first()
                self._middle()
                self._last()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graphs = []
        for part in (self._first, self._middle, self._last):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                part()
            self.graphs.append(graph)

    def _layer(self, x: "torch.Tensor") -> "torch.Tensor":
        return torch.nn.functional.rms_norm(x + (x @ self._into) @ self._from, (HIDDEN,))

    def _engram(self, x: "torch.Tensor", layer: int) -> "torch.Tensor":
        values = self.embeddings[layer].flatten(-2) @ self._embedded
        return x + torch.sigmoid((x * values).sum(-1, keepdim=True) * 0.01) * values

    def _first(self) -> None:
        self._x = self._layer(self._input)

    def _middle(self) -> None:
        x = self._engram(self._x, LAYERS[0])
        for _ in range(LAYERS[1] - LAYERS[0]):
            x = self._layer(x)
        self._y = x

    def _last(self) -> None:
        x = self._engram(self._y, LAYERS[1])
        for _ in range(LAST_LAYERS):
            x = self._layer(x)
        logits = x[-DECODE_TOKENS:] @ self._out
        if len(self.ids) <= DECODE_TOKENS:
            self.ids.copy_(logits.argmax(-1))


class Pinned:
    """Rows in pinned memory of the host, gathered by the GPU itself. Which rows they are makes no difference."""

    def __init__(self, spec: ModelSpec, most_tokens: int) -> None:
        self._spec, self._stream = spec, torch.cuda.Stream()
        self._tables, self._ids, self._rows = {}, {}, {}
        for layer in LAYERS:
            table = spec.table(layer)
            rows, wanted = min(table.num_rows, PINNED_ROWS), most_tokens * table.heads
            self._tables[layer] = torch.ones(rows, table.row_bytes, dtype=torch.uint8).pin_memory()
            self._ids[layer] = torch.randint(0, rows, (wanted + 8000,), device="cuda", dtype=torch.int32)
            self._rows[layer] = torch.zeros(wanted, table.row_bytes, device="cuda", dtype=torch.uint8)

    def start(self, number: int, tokens: int) -> dict[int, Any]:
        """Layer -> embeddings, and the event after which they are there."""
        self._stream.wait_stream(torch.cuda.current_stream())
        found = {}
        with torch.cuda.stream(self._stream):
            for layer in LAYERS:
                table = self._spec.table(layer)
                count, begin = tokens * table.heads, number % 8 * 1000
                rows = self._rows[layer][:count]
                ids = self._ids[layer][begin : begin + count]
                gather_pinned[(count,)](self._tables[layer], ids, rows, row_bytes=table.row_bytes, block=512)
                shaped = rows.view(tokens, table.heads, table.row_bytes)
                values = dequantize(shaped, table.row_format, table.scale, torch.bfloat16)
                found[layer] = values, self._stream.record_event()
        return found


@dataclass
class Found:
    """Milliseconds: of each round's steps, and of what layers waited for."""

    rounds: list[list[float]] = field(default_factory=list)
    waits: dict[int, list[float]] = field(default_factory=lambda: {layer: [] for layer in LAYERS})


def forwards(
    case: Case, model: Model, source: "EngramPool | Pinned | None", spec: ModelSpec, steps: int, found: Found
) -> None:
    """One round of one source."""
    warm_up = min(WARM_UP, steps)
    random, decode = np.random.default_rng(len(found.rounds)), case.tokens <= DECODE_TOKENS
    requests = case.tokens if decode else 1
    bounds = np.linspace(0, case.tokens, requests + 1).astype(np.int32)
    lookback = random.integers(0, spec.vocab_size, (requests, spec.lookback)).astype(np.int32)
    stream = random.integers(0, spec.vocab_size, (steps + warm_up + 1, case.tokens)).astype(np.int32)
    tokens, coming, times = stream[0], None, []
    for number in range(steps + warm_up):
        begin = time.perf_counter()
        if source is None:
            for graph in model.graphs:
                graph.replay()
        elif isinstance(source, Pinned):
            rows = source.start(number, case.tokens)
            model.graphs[0].replay()
            for layer, graph in zip(LAYERS, model.graphs[1:], strict=True):
                values, there = rows[layer]
                torch.cuda.current_stream().wait_event(there)
                model.embeddings[layer].copy_(values)
                graph.replay()
        else:
            step = coming if coming is not None else source.start(tokens, bounds, lookback)
            coming = source.start(stream[number + 1], bounds, lookback) if case.ahead else None
            with step:
                model.graphs[0].replay()
                for layer, graph in zip(LAYERS, model.graphs[1:], strict=True):
                    step.embeddings(layer, out=model.embeddings[layer])
                    graph.replay()
            if number >= warm_up:
                for layer in LAYERS:
                    found.waits[layer].append(1e3 * step.step.wait_s[layer])
        sampled = model.ids.cpu().numpy()
        if decode:
            lookback = np.concatenate([tokens[:, None], lookback[:, :-1]], axis=1)
            tokens = ((sampled * 7 + stream[number + 1]) % spec.vocab_size).astype(np.int32)
        else:
            tokens = stream[number + 1]
        if number >= warm_up:
            times.append(1e3 * (time.perf_counter() - begin))
    if coming is not None:
        coming.close()
    found.rounds.append(times)


class Captured:
    """Embeddings that CUDA graphs make of the memory where a pool's rows always land."""

    def __init__(self, pool: "EngramPool") -> None:
        self._graphs, self._numbers = {}, {}
        for layer in pool.client.spec.layers:
            table, rows = pool.client.spec.table(layer), pool.landing(layer)
            numbers = dequantize(rows, table.row_format, table.scale, pool.dtype).clone()  # and libraries are set up
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                dequantize(rows, table.row_format, table.scale, out=numbers)
            self._graphs[layer], self._numbers[layer] = graph, numbers

    def embeddings(self, step: "PooledStep", layer: int) -> "torch.Tensor":
        """Of the step's tokens; those of the layer's rows beyond them must be zeros."""
        tokens = len(step.rows(layer))
        self._graphs[layer].replay()
        if self._numbers[layer][tokens:].any():
            sys.exit(f"rows of layer {layer} beyond those of the step are not zeros")
        return self._numbers[layer][:tokens].clone()


def compared(pool: "EngramPool", batches: int) -> int:
    """Compare embeddings with those of the rows that must come, bit for bit; gives how many. A difference ends all."""
    spec, random, checked = pool.client.spec, np.random.default_rng(9), 0
    captured = Captured(pool) if pool.max_tokens is not None else None
    busy = torch.randn(HIDDEN, HIDDEN, device="cuda", dtype=torch.bfloat16)
    for number in range(batches):
        tokens = int(random.choice([1, 7, 64, 300, 2048]))
        bounds = np.unique([0, tokens, *random.integers(0, tokens + 1, 8)]).astype(np.int32)
        ids = random.integers(0, spec.vocab_size, tokens).astype(np.int32)
        lookback = random.integers(0, spec.vocab_size, (len(bounds) - 1, spec.lookback)).astype(np.int32)
        with pool.start(ids, bounds, lookback) as step:
            busy @ busy  # so that copies and arithmetic are under way at once
            got = {
                layer: step.embeddings(layer) if captured is None else captured.embeddings(step, layer)
                for layer in spec.layers
            }
        for layer, rows in spec.hash(TokenBatch(ids, bounds, lookback)).items():
            table = spec.table(layer)
            expected = torch.from_numpy(synthetic_rows(table, rows)).cuda()
            right = dequantize(expected, table.row_format, table.scale, torch.bfloat16)
            # NaN is unequal to itself, and may have any bits.
            if not torch.equal(*(one.nan_to_num(0).view(torch.int16) for one in (got[layer], right))):
                sys.exit(f"wrong embeddings in layer {layer} of batch {number}")
            checked += right.numel()
    return checked


def measure(case: Case, sources: Mapping[str, Any], spec: ModelSpec, rounds: int, steps: int) -> list[dict[str, Any]]:
    """The records of one case."""
    model = Model(case, spec)
    found = {name: Found() for name in sources}
    for turn in range(rounds):
        # Every round begins with another source, so that none always follows the same one.
        for name in [*sources][turn % len(sources) :] + [*sources][: turn % len(sources)]:
            forwards(case, model, sources[name], spec, steps, found[name])
    medians = {name: [statistics.median(times) for times in one.rounds] for name, one in found.items()}
    records = []
    for name, one in found.items():
        times = [ms for several in one.rounds for ms in several]
        record = {"study": "gpu-forward", "case": case.name, "tokens": case.tokens, "system": name, "steps": len(times)}
        record |= {"p50_ms": statistics.median(times), "p99_ms": float(np.percentile(times, 99))}
        for other in ("none", "pinned"):
            ratios = [a / b for a, b in zip(medians[name], medians[other], strict=True)]
            record[f"to_{other}"] = statistics.median(ratios)
        record["waits_p50_ms"] = {layer: statistics.median(waits) for layer, waits in one.waits.items() if waits}
        records.append(record)
    return records


def main() -> None:
    """Measure, and print."""
    options = parse()
    if WHY_NOT:
        sys.exit(f"this is measured on a GPU: {WHY_NOT}")
    print(f"{report.machine()}, {torch.cuda.get_device_name()}, torch {torch.__version__}\n", flush=True)
    packed = options.model or Workload.make(options.data, options.vocab_size).packed
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    prefix = ("taskset", "-c", ",".join(map(str, cores[:half]))) if len(cores) > 3 else ()
    found: list[dict[str, Any]] = []
    with ExitStack() as stack:
        memory = tempfile.mkdtemp(prefix="engrampool-bench-", dir="/dev/shm")
        stack.callback(shutil.rmtree, memory)
        settings = {"workers": min(4, half), "memory": f"file:{memory}"}
        server = stack.enter_context(serve_process(packed, prefix=prefix, **settings))
        if prefix:
            os.sched_setaffinity(0, cores[half:])
        sources: dict[str, Any] = {"none": None, "pinned": None}
        for name, (how, of_pool) in ((name, WAYS[name]) for name in options.ways.split(";")):
            client = stack.enter_context(Client(server.address, timeout_s=60, **how))
            assert (client.direct, client.attached) == (name != "grpc", name == "attached"), f"not {name}"
            sources[name] = EngramPool(client, device="cuda", buffers=3, **of_pool)
            print(f"{name}: {compared(sources[name], options.compared)} values are equal, bit for bit", flush=True)
        spec = client.spec
        sources["pinned"] = Pinned(spec, max(case.tokens for case in CASES))
        print("\n| case | rows from | step ms p50 | p99 | / none | / pinned | waits at layers, ms p50 | steps |")
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for case in CASES:
            steps = options.steps if case.tokens <= DECODE_TOKENS else max(3, options.steps // 12)
            for record in measure(case, sources, spec, options.rounds, steps):
                waits = " / ".join(f"{ms:.3f}" for ms in record["waits_p50_ms"].values()) or "-"
                cells = [record["case"], record["system"], f"{record['p50_ms']:.3f}", f"{record['p99_ms']:.3f}"]
                cells += [f"{record['to_none']:.3f}", f"{record['to_pinned']:.3f}", waits, str(record["steps"])]
                print(f"| {' | '.join(cells)} |", flush=True)
                found.append(record)
            torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--data", type=Path, default=Path("bench-data"), help="where tables are kept between runs")
    parser.add_argument("--vocab-size", type=int, default=80_000, help="of each head: 48 times as many rows")
    parser.add_argument("--model", type=Path, help="a packed synthetic model of V4.1's layout, in their place")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="of decode, of each source and round; of prefill fewer")
    parser.add_argument("--ways", default=";".join(WAYS), help="of these, separated by semicolons: %(default)s")
    parser.add_argument("--compared", type=int, default=60, help="batches whose embeddings are compared")
    return parser.parse_args()


if __name__ == "__main__":
    main()
