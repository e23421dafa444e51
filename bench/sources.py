"""How fast packed tables come from object stores, beside a directory in the page cache: `python bench/sources.py`.

The same model (V4.1's layout) is loaded, by what the server loads with, from

- `directory`: this machine's, cached;
- `http`: a small static server with sendfile, in a process of its own, on loopback;
- `http, N ms`: the same, each answer of which begins N ms late, as that of a store elsewhere does;
- `s3`: a real S3 endpoint (moto), in a process of its own, on loopback;

with 2 threads, each with 1, 2, 4 ... blocks asked for at a time. Every block is checked. Each case runs in a fresh
process, several rounds in turn. Servers share the cores with what is measured. moto is Python, and copies all of an
object for each range of it, so files are small here; what it reaches is its own speed. Prints a Markdown table: best
and median, GB/s, the share of what the directory reaches, CPU seconds of the loading process alone, and its peak
memory beyond the tables' bytes.
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
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from engrampool_server.files.sources import STORE_READS_PER_THREAD, parse_location
from engrampool_server.files.synth import synth
from engrampool_server.files.table_files import PackedModel
from engrampool_server.memory.table_loader import load

Pipe = multiprocessing.connection.Connection
Run = tuple[float, float, int]
_SPAWN = multiprocessing.get_context("spawn")
# V4.1: 24 heads of 264 bytes a row in two layers.
_BYTES_PER_VOCABULARY = 2 * 24 * 264
_THREADS = 2
_FILE_BYTES = 32 << 20
_ENVIRON = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_REGION": "us-east-1"}


def serve_http(pipe: Pipe, directory: Path, latency_s: float) -> None:
    """Serve files with ranges until the process is ended; sends the port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            with (directory / self.path.rsplit("/", 1)[-1]).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                first, _, last = self.headers.get("Range", f"bytes=0-{size - 1}").removeprefix("bytes=").partition("-")
                start, stop = int(first), min(int(last) + 1, size)
                time.sleep(latency_s)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
                self.send_header("Content-Length", str(stop - start))
                self.send_header("Last-Modified", "Tue, 24 Nov 2026 16:00:00 GMT")
                self.end_headers()
                self.wfile.flush()
                while start < stop:
                    start += os.sendfile(self.connection.fileno(), file.fileno(), start, stop - start)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    pipe.send(server.server_port)
    server.serve_forever()


def serve_s3(pipe: Pipe) -> None:
    """Be an S3 endpoint until the process is ended; sends the port."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    pipe.send(server.get_host_and_port()[1])
    threading.Event().wait()


@contextmanager
def served(target: Any, *arguments: Any) -> Iterator[int]:
    """The port of a server in a process of its own."""
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def upload(model: Path, endpoint: str) -> None:
    """Put the model at s3://tables/model."""
    import urllib.request

    import obstore
    from obstore.store import S3Store

    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/tables", method="PUT")).read()
    store = S3Store("tables", prefix="model", client_options={"allow_http": True})
    for path in model.iterdir():
        obstore.put(store, path.name, path)


def case(pipe: Pipe, where: str, reads: int) -> None:
    """One measurement; sends seconds, CPU seconds, and peak resident bytes."""
    begin, cpu_s = time.perf_counter(), time.process_time()
    with PackedModel.open(parse_location(where)) as model:
        model.reads_per_thread = reads
        held = load(model, "anon", False, _THREADS, threading.Event(), lambda _: None)
        seconds = time.perf_counter() - begin
        assert held.version == model.version
    pipe.send((seconds, time.process_time() - cpu_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def measure(where: str, reads: int) -> Run:
    """`case` in a process of its own."""
    ours, theirs = _SPAWN.Pipe()
    process = _SPAWN.Process(target=case, args=(theirs, where, reads))
    process.start()
    theirs.close()
    found: Run = ours.recv()
    process.join()
    return found


def main() -> None:
    """Run the cases in turn."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--gb", type=float, default=1.0, help="bytes of all tables, in 10**9")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--latency-ms", type=float, default=30.0)
    options.add_argument("--reads", default="1,2,4,8,16", help="blocks asked for at a time, a thread")
    options.add_argument("--json", type=Path, help="write the records here")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        synth("deepseek-v4.1", int(given.gb * 1e9 / _BYTES_PER_VOCABULARY), model, file_bytes=_FILE_BYTES, quiet=True)
        with PackedModel.open(model) as packed:
            nbytes = packed.spec.nbytes
        late = f"http, {given.latency_ms:g} ms"
        with (
            served(serve_http, model, 0.0) as port,
            served(serve_http, model, given.latency_ms / 1e3) as late_port,
            served(serve_s3) as s3_port,
        ):
            os.environ.update(_ENVIRON, AWS_ENDPOINT_URL=f"http://127.0.0.1:{s3_port}")
            upload(model, os.environ["AWS_ENDPOINT_URL"])
            places = {"http": f"http://127.0.0.1:{port}/m", late: f"http://127.0.0.1:{late_port}/m"}
            places |= {"s3": "s3://tables/model", "directory": str(model)}
            reads = [int(one) for one in given.reads.split(",")]
            cases = [("directory", 1), *((name, n) for name in ("http", late) for n in reads)]
            cases += [("s3", 1), ("s3", STORE_READS_PER_THREAD)]  # each takes long
            seen: dict[tuple[str, int], list[Run]] = {one: [] for one in cases}
            measure(str(model), 1)  # cached from here on
            for number in range(given.rounds):
                random.Random(number).shuffle(cases)
                for one in cases:
                    seen[one].append(measure(places[one[0]], one[1]))
    report(seen, nbytes, given.json)


def report(seen: dict[tuple[str, int], list[Run]], nbytes: int, file: Path | None) -> None:
    """Print the table, and write the records."""
    records: list[dict[str, Any]] = []
    ceiling = min(run[0] for run in seen["directory", 1])
    print(f"tables of {nbytes / 1e9:.2f} GB, {_THREADS} threads, {len(seen['directory', 1])} rounds\n")
    print("| from | blocks a thread | median s | best s | GB/s | of directory | CPU s | peak beyond, MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for (name, reads), runs in seen.items():
        best = min(run[0] for run in runs)
        record = {
            "from": name,
            "reads_per_thread": reads,
            "bytes": nbytes,
            "seconds": statistics.median(run[0] for run in runs),
            "best_s": best,
            "gb_per_s": nbytes / best / 1e9,
            "of_directory": ceiling / best,
            "cpu_s": statistics.median(run[1] for run in runs),
            "peak_beyond_tables_bytes": max(run[2] for run in runs) - nbytes,
        }
        records.append(record)
        print(
            f"| {name} | {reads} | {record['seconds']:.2f} | {best:.2f} | {record['gb_per_s']:.2f} "
            f"| {record['of_directory']:.2f} | {record['cpu_s']:.2f} "
            f"| {record['peak_beyond_tables_bytes'] / 2**20:.0f} |"
        )
    if file is not None:
        file.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
