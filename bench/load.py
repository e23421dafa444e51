"""How fast packed tables come into memory, beside what bounds that: `python bench/load.py`.

For memory of the kinds anon and shm, and 1 and 2 threads, each in a fresh process, several rounds in turn:

- `memcpy`: one block, which stays in the cache, copied over and over into fresh memory of the same kind (fresh: pages
  that the kernel has yet to give and to zero, as a table's are);
- `read`: the same files, read into fresh memory, without a checksum;
- `load`: what the server does: read, and check every block;
- `load, cold` and `read, cold`: likewise, with the files dropped from the page cache before;
- `attach`: tables that the run before left in /dev/shm, adopted.

Prints a Markdown table: median and best of the rounds; GB/s, and the share of the ceilings that `load` reaches, of the
best; CPU seconds; and the process's peak memory beyond the tables' bytes. Tables are in V4.1's layout.
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_server.files.synth import synth
from engrampool_server.files.table_files import Block, PackedModel
from engrampool_server.memory.memory import allocate, populate
from engrampool_server.memory.segments import find_backing, sweep, take
from engrampool_server.memory.table_loader import identities, load

Rows = npt.NDArray[np.uint8]
# V4.1: 24 heads of 264 bytes a row in two layers.
_BYTES_PER_VOCABULARY = 2 * 24 * 264


def fresh(packed: PackedModel, memory: str) -> dict[int, Rows]:
    """Memory for every table, as `load` makes it."""
    backing, tables = find_backing(memory), {}
    for identity in identities(packed):
        if backing is None:
            tables[identity.layer] = allocate(identity.nbytes, memory).reshape(identity.num_rows, identity.row_bytes)
        else:
            segment = take(backing, identity, lambda rows: False, lambda: None)
            tables[identity.layer] = segment.rows
            segment.abandon()
    return tables


def each_block(packed: PackedModel, threads: int, work: Callable[[Block], None]) -> None:
    """Do `work` with every block, shared out among threads."""
    blocks = iter([block for layer in packed.spec.layers for block in packed.blocks(layer)])

    def run() -> None:
        for block in blocks:
            work(block)

    pool = [threading.Thread(target=run) for _ in range(threads)]
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()


def case(pipe: multiprocessing.connection.Connection, model: Path, what: str, memory: str, threads: int) -> None:
    """One measurement; sends seconds, CPU seconds, and peak resident bytes."""
    with PackedModel.open(model) as packed:
        if what == "memcpy":
            row_bytes = packed.spec.tables[0].row_bytes
            source = np.ones((max(b.stop - b.start for b in packed.blocks(packed.spec.layers[0])), row_bytes), np.uint8)
        descriptors = {name.name: os.open(model / name.name, os.O_RDONLY) for name in packed.files}
        for descriptor in descriptors.values():
            if "cold" in what:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            elif what in ("read", "load"):
                while os.read(descriptor, 4 << 20):  # it is in the page cache from here on
                    pass
        # A virtual machine may have to ask its host for memory; then this pays for it, and not what is measured.
        used = allocate(packed.spec.nbytes, "anon")
        used[:] = 1
        del used
        begin, cpu_s = time.perf_counter(), time.process_time()
        if what.startswith(("load", "attach")):
            backing = find_backing(memory)
            if backing is not None:
                sweep(backing, identities(packed))
            held = load(packed, memory, False, threads, threading.Event(), lambda _: None)
            seconds = time.perf_counter() - begin
            assert held.version == packed.version
        else:
            tables = fresh(packed, memory)

            def work(block: Block) -> None:
                out = tables[block.layer][block.start : block.stop]
                populate(out)
                if what == "memcpy":
                    out[:] = source[: len(out)]
                else:
                    assert os.preadv(descriptors[block.file], [out.data.cast("B")], block.offset) == out.nbytes

            each_block(packed, threads, work)
            seconds = time.perf_counter() - begin
        pipe.send((seconds, time.process_time() - cpu_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def measure(model: Path, what: str, memory: str, threads: int) -> tuple[float, float, int]:
    """`case` in a process of its own."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=case, args=(theirs, model, what, memory, threads))
    process.start()
    theirs.close()
    found: tuple[float, float, int] = ours.recv()
    process.join()
    return found


def main() -> None:
    """Run the cases in turn."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gb", type=float, default=2.0, help="bytes of all tables, in 10**9")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--model", type=Path, help="packed model to load; one is made by default")
    options.add_argument("--json", type=Path, help="write the records here")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        model = given.model or Path(directory) / "model"
        if given.model is None:
            synth("deepseek-v4.1", int(given.gb * 1e9 / _BYTES_PER_VOCABULARY), model, quiet=True)
        with PackedModel.open(model) as packed:
            nbytes = packed.spec.nbytes
        kinds = {"anon": "anon", "shm": f"file:{shm}"}
        names = ["memcpy", "read", "load", "read, cold", "load, cold"]
        cases = [(what, kind, threads) for kind in kinds for threads in (1, 2) for what in names]
        seen: dict[tuple[str, str, int], list[tuple[float, float, int]]] = {one: [] for one in cases}
        seen[attach := ("attach", "shm", 1)] = []
        for number in range(given.rounds):
            random.Random(number).shuffle(cases)
            for one in cases:
                what, kind, threads = one
                seen[one].append(measure(model, what, kinds[kind], threads))
                if one == ("load", "shm", 1):
                    seen[attach].append(measure(model, what, kinds[kind], threads))
                for path in Path(shm).iterdir():
                    path.unlink()
    report(seen, nbytes, given.json)


def report(seen: dict[tuple[str, str, int], list[tuple[float, float, int]]], nbytes: int, file: Path | None) -> None:
    """Print the table, and write the records."""
    records: list[dict[str, Any]] = []
    print(f"tables of {nbytes / 1e9:.2f} GB, {len(next(iter(seen.values())))} rounds\n")
    columns = (
        "memory",
        "threads",
        "what",
        "median s",
        "best s",
        "GB/s",
        "of memcpy",
        "of read",
        "CPU s",
        "peak beyond, MiB",
    )
    print(f"| {' | '.join(columns)} | each round, s |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for (what, kind, threads), runs in seen.items():
        seconds = statistics.median(run[0] for run in runs)
        # A virtual machine whose host gives it memory slowly at times only ever adds to what a case takes.
        best = min(run[0] for run in runs)
        ratios = {}
        for ceiling in ("memcpy", "read, cold" if "cold" in what else "read"):
            beside = seen.get((ceiling, kind, threads))
            if what.startswith("load") and beside:
                ratios[ceiling.removesuffix(", cold")] = min(run[0] for run in beside) / best
        record = {
            "what": what,
            "memory": kind,
            "threads": threads,
            "bytes": nbytes,
            "seconds": seconds,
            "best_s": best,
            "gb_per_s": nbytes / best / 1e9,
            "of_memcpy": ratios.get("memcpy"),
            "of_read": ratios.get("read"),
            "cpu_s": statistics.median(run[1] for run in runs),
            "peak_beyond_tables_bytes": max(run[2] for run in runs) - nbytes,
            "rounds_s": [run[0] for run in runs],
        }
        records.append(record)
        shown = ["" if ratios.get(name) is None else f"{ratios[name]:.2f}" for name in ("memcpy", "read")]
        speed = "" if what == "attach" else f"{record['gb_per_s']:.2f}"
        beyond = "" if what == "attach" else f"{record['peak_beyond_tables_bytes'] / 2**20:.0f}"
        rounds = ", ".join(f"{run[0]:.3f}" for run in runs)
        cells = [kind, threads, what, f"{seconds:.3f}", f"{best:.3f}", speed, *shown, f"{record['cpu_s']:.2f}", beyond]
        print(f"| {' | '.join(map(str, cells))} | {rounds} |")
    if file is not None:
        file.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
