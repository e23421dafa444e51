"""The kernels beside the numpy forms that they must equal: `python bench/gather.py`.

- gather   rows of uniform random ids, from a table in huge pages into a warm buffer; `np.take` is the reference
- overlay  the same with a row in a hundred changed; the kernel without changes is the reference
- hashing  token batches of DeepSeek-V4.1's layout, both layers; `ModelSpec.hash` is the reference

Cases take turns within a repeat, so that a change of the machine's speed meets all of them. Medians, in the processor
time of the one thread that works, so that who else uses the machine counts only by the caches it takes. What must be
equal is compared before it is timed. Prints Markdown; `--json FILE` writes the records as well.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from engrampool_proto.hashing import TokenBatch, XorMix
from engrampool_proto.kernels.gather import gather
from engrampool_proto.kernels.hasher import Hasher
from engrampool_proto.spec import ModelSpec, RowFormat, Segment, TableSpec
from engrampool_proto.token_map import TokenMap
from engrampool_server.memory.memory import allocate
from engrampool_server.memory.overlay import Overlay

SIZES_GB = (1, 2, 4, 8, 12)
# 264 is V4.1's; the others are odd, tiny and large.
WIDTHS = (264, 1, 42, 100, 512, 1000, 8191)
GATHER_BYTES = 26_000_000  # one repeat: 98304 rows of 264 bytes, about
MARGIN_BYTES = 1 << 30
CHANGED = 100  # one row in so many
VOCAB, MAPPED = 129280, 99092
PRIMES_FROM = 16_000_000


def main() -> None:
    """Measure everything and print the tables."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--repeats", type=int, default=15)
    arguments.add_argument("--sizes", type=float, nargs="+", default=SIZES_GB, help="GB of the table of 264-byte rows")
    options = arguments.parse_args()
    records = []
    print("| table GB | row bytes | kernel ns/row | np.take ns/row | np.take / kernel | kernel / its smallest table |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    smallest = None
    plan = [(size, 264, 1) for size in options.sizes] + [(1, width, 1) for width in WIDTHS[1:]]
    # One row in twelve of 12 GB is 1 GB of rows, on as many pages as 12 GB have: are pages what a large table costs?
    stride = round(max(options.sizes) / min(options.sizes))
    plan.insert(len(options.sizes), (max(options.sizes), 264, stride))
    for size, width, stride in plan:
        nbytes = int(size * 1e9) // width * width
        room = available_bytes()
        if nbytes + MARGIN_BYTES > room:
            print(f"| {size:g} | {width} | does not fit: {room / 1e9:.1f} GB of memory are available | | | |")
            continue
        found = measure_gather(nbytes, width, stride, options.repeats)
        smallest = smallest or found["kernel"]
        growth = f"{found['kernel'] / smallest:.2f}" if width == 264 else ""
        ratio = found["np.take"] / found["kernel"]
        which = f"{size:g}" if stride == 1 else f"{size:g}, one row in {stride}"
        print(f"| {which} | {width} | {found['kernel']:.1f} | {found['np.take']:.1f} | {ratio:.2f} | {growth} |")
        records.append({"case": "gather", "table_gb": size, "row_bytes": width, "stride": stride, "ns_per_row": found})
    print()
    print("| table GB | plain ns/row | overlaid ns/row | overlaid / plain |")
    print("| ---: | ---: | ---: | ---: |")
    for size in options.sizes:
        nbytes = int(size * 1e9) // 264 * 264
        if nbytes + MARGIN_BYTES > available_bytes():
            continue
        found = measure_overlay(nbytes, options.repeats)
        ratio = found["overlaid"] / found["plain"]
        print(f"| {size:g} | {found['plain']:.1f} | {found['overlaid']:.1f} | {ratio:.2f} |")
        records.append({"case": "overlay", "table_gb": size, "ns_per_row": found})
    print()
    print("| tokens | kernel us | numpy us | numpy / kernel |")
    print("| ---: | ---: | ---: | ---: |")
    for tokens in (1, 64, 8192):
        found = measure_hashing(tokens, options.repeats)
        print(f"| {tokens} | {found['kernel']:.1f} | {found['numpy']:.1f} | {found['numpy'] / found['kernel']:.2f} |")
        records.append({"case": "hash", "tokens": tokens, "us": found})
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n")


def measure_gather(nbytes: int, width: int, stride: int, repeats: int) -> dict[str, float]:
    """Ns a row of either way, medians; the ids are multiples of `stride`."""
    rows = filled_table(nbytes, width)
    batches = drawn_batches(rows, stride, repeats)
    count = len(batches[0])
    taken, out = np.zeros((count, width), np.uint8), np.zeros(count * width, np.uint8)
    cases: dict[str, Callable[[np.ndarray], object]] = {
        "kernel": lambda ids: gather(rows, ids, 0, out),
        "np.take": lambda ids: np.take(rows, ids, axis=0, out=taken, mode="clip"),
    }
    for case in cases.values():
        case(batches[0])
    assert np.array_equal(out, taken.reshape(-1))
    medians = in_turn(cases, batches)
    return {name: 1e9 * seconds / count for name, seconds in medians.items()}


def measure_overlay(nbytes: int, repeats: int) -> dict[str, float]:
    """Ns a row of 264 bytes with a row in CHANGED changed and with none, medians."""
    rows = filled_table(nbytes, 264)
    batches = drawn_batches(rows, 1, repeats)
    out = np.zeros(len(batches[0]) * 264, np.uint8)
    changed = np.sort(np.random.default_rng(0).choice(len(rows), len(rows) // CHANGED, replace=False).astype(np.uint64))
    over = Overlay.of(changed, filled_table(len(changed) * 264, 264), range(len(rows)))
    cases: dict[str, Callable[[np.ndarray], object]] = {
        "plain": lambda ids: gather(rows, ids, 0, out),
        "overlaid": lambda ids: (gather(rows, ids, 0, out), over.copy(ids, 0, out)),
    }
    cases["overlaid"](batches[0])
    among = np.searchsorted(changed, batches[0]).clip(max=len(changed) - 1)
    is_changed = changed[among] == batches[0]
    expected = np.where(is_changed[:, None], over.rows[among], rows[batches[0]])
    assert is_changed.any()
    assert np.array_equal(out, expected.reshape(-1))
    medians = in_turn(cases, batches)
    return {name: 1e9 * seconds / len(batches[0]) for name, seconds in medians.items()}


def filled_table(nbytes: int, width: int) -> np.ndarray:
    """Rows of random bytes, in huge pages."""
    table = allocate(nbytes, "anon")
    pattern = np.random.default_rng(width).integers(0, 256, (1 << 24) + 3, np.uint8)
    for start in range(0, nbytes, len(pattern)):
        part = table[start : start + len(pattern)]
        part[:] = pattern[: len(part)]
    return table.reshape(-1, width)


def drawn_batches(rows: np.ndarray, stride: int, repeats: int) -> list[np.ndarray]:
    """Random ids, multiples of `stride`, of GATHER_BYTES of rows."""
    count = min(GATHER_BYTES // rows.shape[1], 1 << 20)
    drawn = (np.random.default_rng(at).integers(0, len(rows) // stride, count) for at in range(repeats))
    return [(ids * stride).astype(np.uint32 if len(rows) < 2**32 else np.uint64) for ids in drawn]


def measure_hashing(tokens: int, repeats: int) -> dict[str, float]:
    """Microseconds a batch of either way, medians."""
    spec = v41_layout()
    hasher = Hasher(spec)
    random = np.random.default_rng(tokens)
    batches = [TokenBatch.of(random.integers(0, VOCAB, tokens).astype(np.int32)) for _ in range(repeats)]
    cases: dict[str, Callable[[TokenBatch], object]] = {"kernel": hasher.rows, "numpy": spec.hash}
    for layer, ids in spec.hash(batches[0]).items():
        assert np.array_equal(hasher.rows(batches[0])[layer], ids)
    times = max(1, 2000 // tokens)

    def many(case: Callable[[TokenBatch], object]) -> Callable[[TokenBatch], object]:
        return lambda batch: [case(batch) for _ in range(times)]

    medians = in_turn({name: many(case) for name, case in cases.items()}, batches)
    return {name: 1e6 * seconds / times for name, seconds in medians.items()}


def in_turn(cases: dict[str, Callable], batches: list) -> dict[str, float]:
    """Median seconds of processor time of each case; every one on every batch, one after the other."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for batch in batches:
        for name, case in cases.items():
            begin = time.thread_time()
            case(batch)
            times[name].append(time.thread_time() - begin)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def v41_layout() -> ModelSpec:
    """24 heads over 2- to 4-grams in two layers. Constants like V4.1's; they need no tokenizer and no table here."""
    random = np.random.default_rng(0)
    moduli = primes_above(PRIMES_FROM)
    row = RowFormat((Segment("values", "float8_e4m3fn", 256), Segment("scales", "float8_e8m0fnu", 8)))
    tables = []
    for layer in (1, 14):
        multipliers = tuple(int(m) * 2 + 1 for m in random.integers(0, 2**63 // MAPPED // 2, 4))
        family = XorMix(multipliers, tuple(tuple(next(moduli) for _ in range(8)) for _ in range(3)), 2)
        tables.append(TableSpec(layer, sum(family.head_rows()), row, family))
    return ModelSpec("v41-layout", VOCAB, tuple(tables), TokenMap((np.arange(VOCAB) % MAPPED).astype(np.int32)))


def primes_above(number: int) -> Iterator[int]:
    """By trial division: 48 of them are needed."""
    while True:
        number += 1
        if all(number % divisor for divisor in range(2, int(number**0.5) + 1)):
            yield number


def available_bytes() -> int:
    """MemAvailable."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/meminfo has no MemAvailable")


if __name__ == "__main__":
    main()
