"""What TLS, tokens and limits cost, and what limits bring: python bench/security.py PACKED_MODEL.

A server for each way to let callers in, and a client of each over gRPC or the direct lane, which looks rows up in turn,
with a pause before each, as decode has: printed are medians over slices, of a lookup's time and of its ratio to that
over gRPC, without any of it and with TLS. Then a caller with a limit that
asks for ten times what it may have, beside one that asks for what it may: printed is what the second got, of what it
asked for, alone and beside the first, which has a limit or none. `openssl` makes the certificate.
"""

import argparse
import hashlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from engrampool_client import Client, OverloadedError, PoolError
from engrampool_client.testing import serve_process

# Of the caller that keeps to its share: a step, and how often.
STEP_TOKENS, STEP_S = 256, 0.02
GREED = 10


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a packed model")
    parser.add_argument("--tokens", default="1,8,64,1024")
    parser.add_argument("--rounds", type=int, default=15, help="slices of each case")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each slice")
    parser.add_argument("--pause-ms", type=float, default=0.0, help="before each lookup")
    parser.add_argument(
        "--only", help="of the ways, those named so, with / between them, beside plain and TLS; and nothing else"
    )
    parser.add_argument("--greedy", metavar="ADDRESS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.greedy:
        _be_greedy(options.greedy)
        return
    with tempfile.TemporaryDirectory() as directory:
        _ways(options, Path(directory))
        if options.only:
            return
        _shares(options, Path(directory))


# --- what it costs


def _ways(options: argparse.Namespace, directory: Path) -> None:
    cert, key = _certificate(directory)
    tls = {"tls_cert": cert, "tls_key": key}
    mutual, both = {**tls, "tls_client_ca": cert}, {"tls_cert": cert, "tls_key": key, "tls_ca": cert}
    tokens = _callers(directory / "one.toml", {"name": "one", "token": "one", "certificate": "bench"})
    limited = _callers(directory / "limited.toml", {"name": "one", "token": "one", "max_rows_per_s": 1 << 40})
    direct = {"direct": "auto"}
    ways: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "plain": ({}, {}),
        "token": ({"tokens": tokens}, {"token": "one"}),
        "token, limits": ({"tokens": limited}, {"token": "one"}),
        "TLS": (tls, {"tls_ca": cert}),
        "TLS, token": ({**tls, "tokens": tokens}, {"tls_ca": cert, "token": "one"}),
        "TLS, certificate": ({**mutual, "tokens": tokens}, both),
        "lane": ({}, direct),
        "lane, TLS": (tls, {"tls_ca": cert, **direct}),
        "lane, TLS, no kernels": (tls, {"tls_ca": cert, "compiled": "off", **direct}),
    }
    if options.only:
        ways = {way: ways[way] for way in ("plain", "TLS", *options.only.split("/"))}
    with ExitStack() as stack:
        clients = {}
        for way, (settings, mine) in ways.items():
            server = stack.enter_context(serve_process(options.model, workers=1, **settings))
            client = Client(server.address, **{"attach": "off", "direct": "off", "timeout_s": 60, **mine})
            clients[way] = stack.enter_context(client)
        print("| tokens | by | ms | to plain (quarters) | to TLS (quarters) |\n| ---: | --- | ---: | --- | --- |")
        for tokens_asked in map(int, options.tokens.split(",")):
            found: dict[str, list[float]] = {way: [] for way in ways}
            for number in range(options.rounds):
                for way in list(ways) if number % 2 else list(ways)[::-1]:
                    found[way].append(_slice(clients[way], tokens_asked, options.seconds, options.pause_ms / 1e3))
            for way, took in found.items():
                ms = statistics.median(took) * 1e3
                ratios = [_ratio(took, found[other]) for other in ("plain", "TLS")]
                print(f"| {tokens_asked} | {way} | {ms:.3f} | {' | '.join(ratios)} |", flush=True)


def _ratio(took: list[float], of: list[float]) -> str:
    low, middle, high = statistics.quantiles([one / other for one, other in zip(took, of, strict=True)], n=4)
    return f"{middle:.2f} ({low:.2f} - {high:.2f})"


def _slice(client: Client, tokens: int, seconds: float, pause_s: float) -> float:
    random, took, end = np.random.default_rng(), [], time.perf_counter() + seconds
    while not took or time.perf_counter() < end:
        batch = random.integers(0, client.spec.vocab_size, tokens).astype(np.int32)
        time.sleep(pause_s)
        begin = time.perf_counter()
        client.lookup(batch)
        took.append(time.perf_counter() - begin)
    return statistics.median(took)


# --- what one caller leaves to another


def _shares(options: argparse.Namespace, directory: Path) -> None:
    with serve_process(options.model, workers=1) as server, Client(server.address) as client:
        rows = STEP_TOKENS * sum(table.heads for table in client.spec.tables)
    share = round(rows / STEP_S)
    greedy, fair = {"name": "greedy", "token": "greedy"}, {"name": "fair", "token": "fair", "max_rows_per_s": 2 * share}
    print("\n| beside it | steps answered in time, of those alone | ms p50 | ms p99 |\n| --- | ---: | ---: | ---: |")
    alone = 0.0
    for name, limits in (
        ("nobody", None),
        (f"{GREED} times as much asked for, limit {share} rows/s", {"max_rows_per_s": share}),
        (f"{GREED} times as much asked for, no limit", {}),
    ):
        tokens = _callers(directory / "shares.toml", {**greedy, **(limits or {})}, fair)
        with serve_process(options.model, workers=1, tokens=tokens) as server:
            counts, took = [], []
            for _ in range(options.rounds):
                with _greed(server.address if limits is not None else None, options.model):
                    count, times = _fair(server.address, max(1.0, 4 * options.seconds))
                counts.append(count)
                took += times
            in_time = statistics.median(counts)
            alone = alone or in_time
            ms = np.percentile(took, [50, 99]) * 1e3
            print(f"| {name} | {in_time / alone:.2f} | {ms[0]:.2f} | {ms[1]:.2f} |", flush=True)


def _fair(address: str, seconds: float) -> tuple[int, list[float]]:
    """Steps at their times, each to be answered before the next one: how many were, and the times that they took."""
    took, in_time = [], 0
    with Client(address, token="fair", attach="off", timeout_s=STEP_S) as client:
        random, due = np.random.default_rng(1), time.perf_counter()
        end = due + seconds
        while due < end:
            due += STEP_S
            time.sleep(max(0.0, due - time.perf_counter()))
            batch = random.integers(0, client.spec.vocab_size, STEP_TOKENS).astype(np.int32)
            begin = time.perf_counter()
            try:
                client.lookup(batch)
                in_time += 1
            except PoolError:
                pass
            took.append(time.perf_counter() - begin)
    return in_time, took


@contextmanager
def _greed(address: str | None, model: Path) -> Iterator[None]:
    if address is None:
        yield
        return
    command = [sys.executable, __file__, str(model), "--greedy", address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as greedy:
        try:
            assert greedy.stdout is not None
            greedy.stdout.readline()
            yield
        finally:
            greedy.terminate()


def _be_greedy(address: str) -> None:
    """In a process of its own, until it is ended: ten callers of one name, each with the other's pace."""

    def ask(client: Client, number: int) -> None:
        random, due = np.random.default_rng(number), time.perf_counter() + number * STEP_S / GREED
        while True:
            due = max(due + STEP_S, time.perf_counter())
            time.sleep(max(0.0, due - time.perf_counter()))
            with suppress(OverloadedError):
                client.lookup(random.integers(0, client.spec.vocab_size, STEP_TOKENS).astype(np.int32))

    with Client(address, token="greedy", attach="off", max_steps=GREED) as client:
        for number in range(GREED):
            threading.Thread(target=ask, args=(client, number), daemon=True).start()
        print("begun", flush=True)
        threading.Event().wait()


def _certificate(directory: Path) -> tuple[Path, Path]:
    """One of its own authority, and its key."""
    cert, key = directory / "cert.pem", directory / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=bench", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


def _callers(path: Path, *callers: dict[str, Any]) -> Path:
    lines = []
    for caller in callers:
        lines += ["[[caller]]", f'name = "{caller["name"]}"', 'roles = ["read"]']
        lines.append(f'token_sha256 = "{hashlib.sha256(caller["token"].encode()).hexdigest()}"')
        lines += [f'certificate = "{caller["certificate"]}"'] if "certificate" in caller else []
        lines += [f"max_rows_per_s = {caller['max_rows_per_s']}"] if "max_rows_per_s" in caller else []
    path.write_text("\n".join(lines))
    return path


if __name__ == "__main__":
    main()
