"""`engrampool status` and `engrampool top`, as they are typed, beside a pool under lookups."""

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, start_http_server

from engrampool_client import Client
from engrampool_client.metrics import register
from engrampool_client.testing import serve_process
from engrampool_client.watch.screen import Screen
from prefork import PREFORK
from server_fixtures import LIMIT_S, PATIENCE, eventually
from small_model import small_spec, write_model

PROGRAM = [sys.executable, "-m", "engrampool_proto"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    packed = write_model(tmp_path_factory.mktemp("top") / "small", small_spec())
    with (
        serve_process(packed, shard="0/2", workers=1, metrics="off") as first,
        serve_process(packed, shard="1/2", workers=1, metrics="off") as second,
    ):
        yield [first.address, second.address]


@pytest.fixture(scope="module")
def client(shards) -> Iterator[str]:
    """Where a client shows its metrics that looks rows up all the time."""
    over = threading.Event()

    def look_up(client: Client) -> None:
        rng = np.random.default_rng(1)
        while not over.is_set():
            step = client.prefetch(rng.integers(0, 1000, 32).astype(np.int32))
            for layer in (1, 14):
                step.rows(layer)

    with Client(shards, attach="off", cache_bytes=1 << 20, **PATIENCE) as client:
        registry = CollectorRegistry()
        register(client, registry=registry)
        server, serving = start_http_server(0, "127.0.0.1", registry=registry)
        looking = threading.Thread(target=look_up, args=[client])
        looking.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            over.set()
            looking.join()
            server.shutdown()
            server.server_close()
            serving.join()


def run(*words: str) -> "subprocess.CompletedProcess[str]":
    return PREFORK.run([*PROGRAM, *words])


def named(addresses: list[str]) -> list[str]:
    return [word for address in addresses for word in ("--server", address)]


def test_status_says_who_holds_what_and_ends_well(shards):
    done = run("status", *named(shards), "--timeout-s", "60", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert told["alarms"] == []
    assert [server["address"] for server in told["servers"]] == shards
    assert [server["models"][0]["shard"] for server in told["servers"]] == ["0/2", "1/2"]
    (version,) = told["versions"]
    assert version["missing"] == {}
    lines = run("status", *named(shards), "--timeout-s", "60").stdout.splitlines()
    assert [line.partition(": ")[0] for line in lines] == shards
    assert all("shard" in line and "1 workers" in line for line in lines)


def test_status_of_a_pool_with_a_gap_ends_by_3(shards):
    done = run("status", *named([*shards[:1], "127.0.0.1:1"]), "--timeout-s", "60")
    assert done.returncode == 3
    assert "127.0.0.1:1: no answer" in done.stdout
    assert "no server holds rows" in done.stdout


def test_a_target_that_is_none_is_refused_before_anything_is_asked():
    for command in ("status", "top"):
        done = run(command, "--server", "nobody")
        assert done.returncode == 2
        assert "has no port" in done.stderr


def test_top_shows_rates_of_what_runs(shards, client):
    words = ("--client", client, "--client", "127.0.0.1:1", "--count", "2", "--interval-s", "1", "--timeout-s", "60")
    # By server: shard, workers, rows/s, GB/s, lookups/s, p50, p99. By layer: rows/s. By client and layer: p50, p99 and
    # the share of time waited. By client: steps/s, failed/s, five hops, bytes from the wire, hits.
    wanted = [
        rf"^{shards[0]} +0/2 +1 +[1-9]\S* +\S+ +\S+ +[\d.]+ +[\d.]+ ",
        rf"^{shards[1]} +1/2 +1 +[1-9]\S* +\S+ +\S+ +[\d.]+ +[\d.]+ ",
        *(rf"^{layer} +[1-9]\S* " for layer in (1, 14)),
        *(rf"^{client} +{layer} +[\d.]+ +[\d.]+ +[\d.]+% " for layer in (1, 14)),
        rf"^{client} +\S+ +0.0( +[\d.]+){{5}} +\d+% +\d+% *$",
    ]

    def shown() -> bool:
        """Of a machine that did not stand still between two frames."""
        done = run("top", *named(shards), *words)
        assert (done.returncode, done.stderr) == (0, "")
        first, last = done.stdout.split("engrampool  ")[1:]
        assert "2 of 2 servers serve  - rows/s" in first  # nothing is known of a time between
        assert "! client 127.0.0.1:1 shows nothing" in last
        return all(re.search(one, last, re.MULTILINE) for one in wanted)

    eventually(shown, "rates of all that runs")


def test_top_on_a_terminal_ends_by_ctrl_c_and_leaves_it_as_it_was(shards):
    ours, theirs = pty.openpty()
    words = [*PROGRAM, "top", *named(shards), "--interval-s", "0.5"]
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "200", "LINES": "50"}
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environ)
    os.close(theirs)
    shown = b""
    while b"no alarms" not in shown:
        shown += os.read(ours, 65536)
    process.send_signal(signal.SIGINT)
    while True:
        try:
            more = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        shown += more
    assert process.wait(LIMIT_S) == 0
    assert process.stderr.read() == b""
    process.stderr.close()
    os.close(ours)
    # The screen of its own, entered and left.
    assert shown.count(b"\x1b[?1049h") == shown.count(b"\x1b[?1049l") == 1


def test_without_rich_it_says_what_to_install(shards):
    code = (
        "import sys; sys.modules['rich'] = None; sys.argv[:1] = ['engrampool'];"
        "from engrampool_proto.cli import main; main()"
    )
    words = [sys.executable, "-c", code, "top", "--server", shards[0]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 1
    assert "top needs the package 'rich'" in done.stderr
    assert "[top]" in done.stderr


def test_a_screen_says_what_is_refused_between_two_looks():
    from rich.console import Console

    from engrampool_client.watch.pool import ServerLook
    from engrampool_client.watch.samples import Samples

    console, screen = Console(width=200, record=True, file=io.StringIO()), Screen()
    for unix_s, refused in ((1.0, 5.0), (3.0, 9.0), (3.0, 9.0)):  # the last is the same reading once more
        samples = Samples.read(unix_s, [("engrampool_refused_total", {"reason": "overloaded"}, refused)])
        console.print(screen.frame([ServerLook("a:1", samples=samples)], {}))
    assert console.export_text().count("a:1 refuses 2.0 lookups/s: overloaded") == 2


def test_a_server_that_emulates_memory_says_so_wherever_it_is_looked_at(tmp_path):
    packed = write_model(tmp_path / "small", small_spec())
    with serve_process(packed, workers=1, emulate="cxl-switch") as server:
        told = run("status", "--server", server.address)
        assert "; emulates cxl-switch, its times are not this machine's" in told.stdout
        (one,) = json.loads(run("status", "--json", "--server", server.address).stdout)["servers"]
        assert one["emulates"] == "cxl-switch"
        assert "EMULATED: cxl-switch" in run("top", "--count", "1", "--server", server.address).stdout
        with Client(server.address, **PATIENCE) as client:
            assert client.served.emulates == "cxl-switch"
            assert [one["emulates"] for one in client.status()["servers"]] == ["cxl-switch"]


def test_a_server_that_emulates_nothing_says_nothing_of_it(shards):
    told = run("status", "--server", shards[0])
    assert "emulates" not in told.stdout
    servers = json.loads(run("status", "--json", "--server", shards[0]).stdout)["servers"]
    assert [one["emulates"] for one in servers] == [None]
    assert "EMULATED" not in run("top", "--count", "1", "--server", shards[0]).stdout
