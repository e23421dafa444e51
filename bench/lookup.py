"""Lookups side by side with what bounds them, in one run: `make bench`.

For T tokens of both layers of a DeepSeek-V4.1 layout (24 rows of 264 bytes a layer), one caller, over loopback:

- gather     np.take into a ready buffer in this process: the work that a lookup is for
- socket     the same bytes, ready-made, over a plain TCP connection with recv_into: the ceiling for any transport
- uvloop, asyncio   the server on either event loop, through `Client.lookup_rows` (ids hashed beforehand)

Every case is repeated in turn, so that a change of the machine's speed meets all of them; medians are compared, as
ratios. Prints a Markdown table; `--json FILE` also writes the records.
"""

import argparse
import json
import multiprocessing
import socket
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from engrampool_client import Client
from engrampool_client.testing import serve_process
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec
from engrampool_server.synth import synth
from engrampool_server.table_files import PackedModel

TOKENS = (1, 16, 64, 256, 1024, 4096)
VOCAB_SIZE = 80_000  # 1 GB of tables: far beyond the caches
LAYER_BYTES = 24 * 264


def send_ready_bytes(listener: socket.socket) -> None:
    """The ceiling's server: answers a length with that many bytes, which lie ready."""
    ready = memoryview(bytearray(2 * max(TOKENS) * LAYER_BYTES))
    connection, _ = listener.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while len(request := connection.recv(8, socket.MSG_WAITALL)) == 8:
            connection.sendall(ready[: struct.unpack("<q", request)[0]])


@contextmanager
def raw_socket() -> Iterator[Callable[[int], None]]:
    """Gives a function that fetches T tokens' bytes, from a process of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = multiprocessing.get_context("spawn").Process(target=send_ready_bytes, args=(listener,))
        process.start()
        with socket.create_connection(listener.getsockname()) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            buffer = memoryview(bytearray(2 * max(TOKENS) * LAYER_BYTES))

            def fetch(num_tokens: int) -> None:
                size = 2 * num_tokens * LAYER_BYTES
                connection.sendall(struct.pack("<q", size))
                done = 0
                while done < size:
                    done += connection.recv_into(buffer[done:size])

            yield fetch
        process.join()


def main() -> None:
    """Run every case and print the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--seconds", type=float, default=2.0, help="time for each case of each size")
    options = arguments.parse_args()
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        model = Path(directory) / "model"
        synth("deepseek-v4.1", VOCAB_SIZE, model, quiet=True)
        tables, spec = load_here(model)
        pools = {}
        for loop in ("uvloop", "asyncio"):
            server = stack.enter_context(serve_process(model, event_loop=loop))
            pools[loop] = stack.enter_context(Client(server.address))
        fetch = stack.enter_context(raw_socket())
        records = []
        for num_tokens in TOKENS:
            tokens = random.integers(0, spec.vocab_size, num_tokens).astype(np.int32)
            ids = spec.hash(TokenBatch.of(tokens))
            out = {layer: np.empty((array.size, 264), np.uint8) for layer, array in ids.items()}

            def gather(ids=ids, out=out) -> None:
                for layer, array in ids.items():
                    np.take(tables[layer], array.reshape(-1), axis=0, out=out[layer], mode="clip")

            cases = {
                "gather": gather,
                "socket": lambda n=num_tokens: fetch(n),
                **{loop: lambda pool=pool, ids=ids: pool.lookup_rows(ids) for loop, pool in pools.items()},
            }
            for name, seconds in measure(cases, options.seconds).items():
                nbytes = 2 * num_tokens * LAYER_BYTES
                records.append(
                    {
                        "system": name,
                        "tokens": num_tokens,
                        "layers": 2,
                        "rows": 48 * num_tokens,
                        "p50_ms": 1e3 * statistics.median(seconds),
                        "p99_ms": 1e3 * float(np.percentile(seconds, 99)),
                        "gb_per_s": nbytes / statistics.median(seconds) / 1e9,
                        "repeats": len(seconds),
                    }
                )
    print_table(records)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))


def load_here(model: Path) -> tuple[dict[int, np.ndarray], ModelSpec]:
    """The tables in this process, as the server holds them."""
    from engrampool_server.memory import allocate

    tables = {}
    with PackedModel.open(model) as packed:
        for table in packed.spec.tables:
            rows = allocate(table.nbytes, "anon").reshape(table.num_rows, table.row_bytes)
            for block in packed.blocks(table.layer):
                packed.read_block(block, rows[block.start : block.stop])
            tables[table.layer] = rows
        return tables, packed.spec


def measure(cases: dict[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    """Call the cases in turn until each had its time; seconds of every call, after a few warm-up turns."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    turn = 0
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds * len(cases) or turn < 13:
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if turn >= 3:
                times[name].append(time.perf_counter() - start)
        turn += 1
    return times


def print_table(records: list[dict]) -> None:
    """Markdown: medians, and ratios to the ceiling of the same run."""
    print("| tokens | system | p50 ms | p99 ms | GB/s | p50 / socket's | calls |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    ceiling = {r["tokens"]: r["p50_ms"] for r in records if r["system"] == "socket"}
    for r in records:
        ratio = r["p50_ms"] / ceiling[r["tokens"]]
        figures = f"{r['p50_ms']:.3f} | {r['p99_ms']:.3f} | {r['gb_per_s']:.2f} | {ratio:.2f} | {r['repeats']}"
        print(f"| {r['tokens']} | {r['system']} | {figures} |")


if __name__ == "__main__":
    main()
