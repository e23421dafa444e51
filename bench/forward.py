"""What a model's forward waits for at its Engram layers: `python bench/forward.py`.

A stand-in for V4.1-Flash: 40 layers, the Engram layers 1 and 14, each layer a stretch of time (a GPU's, so it is slept
through), real text (bench/corpus.py), one server process and one client process on this machine. Layer L begins L
layers after the forward does, and later by what earlier layers waited. Nothing of the tables is in the client.

- prefill: chunks of 8192 tokens, 200 ms a forward. "ahead": a prompt's next chunk is asked for when the forward of the
  one before begins; "at start": each chunk when its own does.
- decode: 64 sequences, and 4, 12 ms a forward, tokens known when the forward begins. Without a cache; with one that has
  seen --cached tokens of other documents; and with hints: the --candidates most frequent tokens after the last two, as
  those documents have them, or "draft": the right token with the probability --accepted, else another.

Prints a Markdown table: waits at each layer, and for hints how many came true and what became of their bytes.
"""

import argparse
import ctypes
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from corpus import Corpus
from engrampool_client import Client
from engrampool_client.testing import serve_process
from workload import Workload

LAYERS, PREFILL_MS, DECODE_MS = 40, 200.0, 12.0
CHUNK, LOOKBACK = 8192, 3
_PR_SET_TIMERSLACK = 29

Tokens = npt.NDArray[np.int32]


class Forward:
    """Plays one forward after the other against the clock.

    waits_ms: layer -> one entry a forward. prefetch_ms: what `prefetch` took, in which the forward does not begin.
    """

    def __init__(self, forward_ms: float) -> None:
        self._layer_s = forward_ms / 1e3 / LAYERS
        self.waits_ms: dict[int, list[float]] = defaultdict(list)
        self.prefetch_ms: list[float] = []
        # The system may wake a sleeper late by this, to save power.
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000, 0, 0, 0)

    def prefetch(self, client: Client, *batch: Any, **how: Any) -> Any:
        """`Client.prefetch`, timed."""
        begin = time.perf_counter()
        step = client.prefetch(*batch, **how)
        self.prefetch_ms.append((time.perf_counter() - begin) * 1e3)
        return step

    def run(self, step: Any) -> None:
        """One forward, from now on, that reads the rows of `step`."""
        begin, stalled_s = time.perf_counter(), 0.0
        for layer in step.layers:
            sleep_until(begin + layer * self._layer_s + stalled_s)
            asked = time.perf_counter()
            step.rows(layer)
            waited_s = time.perf_counter() - asked
            stalled_s += waited_s
            self.waits_ms[layer].append(waited_s * 1e3)
        sleep_until(begin + LAYERS * self._layer_s + stalled_s)


def sleep_until(when: float) -> None:
    """By time.perf_counter."""
    remaining = when - time.perf_counter()
    if remaining > 0:
        time.sleep(remaining)


def chunks(corpus: Corpus) -> Iterator[tuple[Tokens, Tokens, Tokens]]:
    """(tokens, query_start_loc, lookback) of prefill chunks: document after document, cut where a chunk is full."""
    total = len(corpus.tokens) // CHUNK * CHUNK
    for start in range(0, total, CHUNK):
        inside = corpus.bounds[(corpus.bounds > start) & (corpus.bounds < start + CHUNK)]
        bounds = np.concatenate(([0], inside - start, [CHUNK])).astype(np.int32)
        lookback = np.full((len(bounds) - 1, LOOKBACK), -1, np.int32)
        document = corpus.bounds[np.searchsorted(corpus.bounds, start, side="right") - 1]
        before = corpus.tokens[max(document, start - LOOKBACK) : start][::-1]
        lookback[0, : len(before)] = before
        yield corpus.tokens[start : start + CHUNK], bounds, lookback


def streams(corpus: Corpus, count: int, steps: int) -> Tokens:
    """Sequences as they are decoded: int32 [count, LOOKBACK + steps + 1], each from a document of its own."""
    length = LOOKBACK + steps + 1
    lengths = np.diff(corpus.bounds)
    starts = corpus.bounds[:-1][lengths >= length][:count]
    if len(starts) < count:
        raise SystemExit(f"the text has {len(starts)} documents of {length} tokens; take fewer --steps")
    return corpus.tokens[starts[:, None] + np.arange(length)]


class Guesses:
    """The most frequent tokens after each pair of tokens in a text, and after each single one where that is too few."""

    def __init__(self, corpus: Corpus, count: int) -> None:
        self._count = count
        seen: dict[Any, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        tokens = corpus.tokens.tolist()
        for a, b, c in zip(tokens, tokens[1:], tokens[2:], strict=False):
            seen[a, b][c] += 1
            seen[b][c] += 1
        self._best = {key: sorted(after, key=after.__getitem__, reverse=True)[:count] for key, after in seen.items()}

    def after(self, last: Tokens) -> Tokens:
        """int32 [R, count] for the last two tokens [R, 2], the newest second; -1 where there is none."""
        guessed = np.full((len(last), self._count), -1, np.int32)
        for row, (a, b) in enumerate(last.tolist()):
            found = dict.fromkeys([*self._best.get((a, b), ()), *self._best.get(b, ())])
            some = list(found)[: self._count]
            guessed[row, : len(some)] = some
        return guessed


def prefill(address: str, corpus: Corpus, count: int, ahead: bool, options: dict[str, Any]) -> tuple[Forward, Client]:
    """Forwards of `count` chunks."""
    forward = Forward(PREFILL_MS)
    out = [{layer: np.zeros((CHUNK, 24, 264), np.uint8) for layer in (1, 14)} for _ in range(2)]
    with Client(address, keep_memory=True, **options) as client:
        some = [chunk for chunk, _ in zip(chunks(corpus), range(count + 1), strict=False)]
        for _ in range(3):
            client.prefetch(*some[0], out=out[0]).wait()  # connections and memory are there from here on
        client.stats.bytes.clear()
        coming = client.prefetch(*some[0], out=out[0])
        coming.wait()
        for number in range(1, count + 1):
            step = forward.prefetch(client, *some[number], out=out[number % 2], ahead=ahead)
            if ahead:
                step, coming = coming, step
            forward.run(step)
    return forward, client


def decode(
    address: str, sequences: Tokens, options: dict[str, Any], seen: Corpus | None, guess: Any
) -> tuple[Forward, Client, float]:
    """Forwards of one token a sequence. guess: (step number, last two tokens) -> candidates, or None for no hints.

    Gives the share of tokens that a hint had named, too.
    """
    forward, named, tokens, count = Forward(DECODE_MS), 0, 0, len(sequences)
    bounds = np.arange(count + 1, dtype=np.int32)
    with Client(address, keep_memory=True, **options) as client:
        for chunk in () if seen is None else chunks(seen):
            client.lookup(*chunk)
        out = {layer: np.zeros((count, 24, 264), np.uint8) for layer in (1, 14)}
        client.stats.bytes.clear()
        for number in range(LOOKBACK, sequences.shape[1] - 1):
            current, lookback = sequences[:, number], sequences[:, number - LOOKBACK : number][:, ::-1].copy()
            step = forward.prefetch(client, current, bounds, lookback, out=out)
            if guess is not None:
                candidates = guess(number, sequences[:, number - 1 : number + 1])
                step.hint(candidates)
                named += int((candidates == sequences[:, number + 1, None]).any(axis=1).sum())
                tokens += count
            forward.run(step)
    return forward, client, named / max(1, tokens)


def row(name: str, forward: Forward, client: Client, forwards: int, note: str = "") -> str:
    """One line of the table."""
    cells = [name, f"{np.median(forward.prefetch_ms):.3f}"]
    for layer in sorted(forward.waits_ms):
        waits = np.array(forward.waits_ms[layer])
        p50, p99 = np.percentile(waits, (50, 99))
        cells.append(f"{waits.mean():.3f} / {p50:.3f} / {p99:.3f}")
    cells.append(f"{client.stats.bytes['wire'] / 1e6 / forwards:.2f}")
    return "| " + " | ".join([*cells, note]) + " |"


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("bench-data"))
    parser.add_argument("--vocab-size", type=int, default=80_000, help="of each head: 48 times as many rows")
    parser.add_argument("--chunks", type=int, default=60, help="forwards of prefill")
    parser.add_argument("--steps", type=int, default=400, help="forwards of decode")
    parser.add_argument("--cached", type=int, default=1_000_000, help="tokens that a cache has seen before")
    parser.add_argument("--cache-bytes", type=int, default=2 << 30)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--accepted", type=float, default=0.7, help="probability that a draft token is right")
    chosen = parser.parse_args()
    corpus = Corpus.load(chosen.data)
    middle = corpus.at(len(corpus.tokens) // 2)
    before, after = corpus.part(0, middle), corpus.part(middle, len(corpus))
    seen = before.part(0, before.at(chosen.cached))
    guesses = Guesses(before, chosen.candidates)
    workload = Workload.make(chosen.data, chosen.vocab_size)
    with serve_process(workload.packed, workers=1) as server:
        print("| | prefetch, ms | wait at layer 1: mean / p50 / p99 | at layer 14 | MB a forward | |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name, ahead, options in (
            ("prefill, at start, every row", False, {"dedupe": False}),
            ("prefill, at start", False, {}),
            ("prefill, ahead", True, {}),
            ("prefill, ahead, cache", True, {"cache_bytes": chosen.cache_bytes}),
        ):
            forward, client = prefill(server.address, after, chosen.chunks, ahead, options)
            print(row(name, forward, client, chosen.chunks + 1), flush=True)
        for count in (64, 4):
            decodes(server.address, streams(after, count, chosen.steps), seen, guesses, chosen)


def decodes(address: str, sequences: Tokens, seen: Corpus, guesses: Guesses, chosen: argparse.Namespace) -> None:
    """The lines of one number of sequences."""
    random = np.random.default_rng(0)
    right = random.random(sequences.shape) < chosen.accepted
    others = random.permutation(sequences.reshape(-1)).reshape(sequences.shape)

    def draft(number: int, _: Tokens) -> Tokens:
        following = np.where(right[:, number], sequences[:, number + 1], others[:, number])
        return following[:, None].astype(np.int32)

    cache = {"cache_bytes": chosen.cache_bytes, "hint_bytes": 32 << 20}
    for name, options, warm, guess in (
        ("every row", {}, None, None),
        ("cache", cache, seen, None),
        (f"cache, {chosen.candidates} likely tokens", cache, seen, lambda _, last: guesses.after(last)),
        (f"cache, draft, {chosen.accepted:.0%} right", cache, seen, draft),
        ("cache, draft, all right", cache, seen, lambda n, _: sequences[:, n + 1, None]),
    ):
        forward, client, named = decode(address, sequences, options, warm, guess)
        note = ""
        if guess is not None:
            used, wasted = client.cache.hinted_used_bytes, client.cache.hinted_wasted_bytes
            asked = client.stats.hint_bytes["asked"]
            note = (
                f"named {named:.0%} of the tokens; hints asked for {asked / 1e6 / chosen.steps:.2f} MB a forward, "
                f"{used / max(1, asked):.0%} of it used, {wasted / max(1, asked):.0%} gone unused"
            )
        print(row(f"decode of {len(sequences)}, {name}", forward, client, chosen.steps, note), flush=True)


if __name__ == "__main__":
    main()
