"""Several processes on one port: one copy of the tables, and no end of any process is an end of the service."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import grpc
import numpy as np
import pytest

from engrampool_client import Client
from engrampool_client.testing import ServerProcess, ServerStartError, serve_process
from engrampool_proto import frames
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec, TableSpec
from engrampool_proto.v1 import pool_pb2, pool_pb2_grpc
from engrampool_server.files.table_writer import write_tables
from prefork import PREFORK
from server_fixtures import (
    LIMIT_S,
    PATIENCE,
    SPEC,
    WIDE,
    HeldStream,
    RawPool,
    environment,
    eventually,
    expected,
    joined,
    lasting_address,
    pack,
    refusal,
    rows_of,
    scrape,
    version_of,
)

RESTARTS = 'engrampool_worker_restarts_total{{reason="{}"}}'
ROWS = 'engrampool_lookup_rows_total{layer="2",model="small"}'
# 65 MiB of rows: more than gRPC keeps on the way, so that the answer ends only when it is read.
BIG = np.tile(np.arange(6500), 40)
# A process that starts to serve the tables ends at once while the file is there.
CRASHING = """
import os
from engrampool_server.answer.grpc_server import GrpcServer
hold = GrpcServer.hold
def crash(self, models):
    if os.path.exists(os.environ["TEST_CRASH"]):
        os._exit(3)
    hold(self, models)
GrpcServer.hold = crash
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("workers") / "small")


# Whoever opens the tables waits for a disk that does not answer.
STUCK = """
import time
from engrampool_server.processes import children
from engrampool_server.telemetry import log
from engrampool_server.files.table_files import PackedModel
children.GIVE_UP_S /= 50
def open(directory):
    log.event("stuck")
    time.sleep(600)
PackedModel.open = staticmethod(open)
"""


# Nobody is cut off for not reading, however long a machine that is busy takes for what happens meanwhile.
PATIENT = "from engrampool_server.answer import pool_service; pool_service.PATIENCE_S = 600.0"


@pytest.fixture
def crashing(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """Environment of a server whose new workers end at once while the file exists."""
    flag = tmp_path / "crash"
    return environment(tmp_path, CRASHING) | {"TEST_CRASH": str(flag)}, flag


def connections(server: ServerProcess, pid: int) -> int:
    """Connections to the server's port that this process has accepted."""
    port = int(server.address.split(":")[1])
    inodes = set()
    # gRPC listens on an IPv4 address through a socket of IPv6.
    table = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    for line in filter(re.compile(r" *\d+:").match, table.splitlines()):
        fields = line.split()
        if int(fields[1].split(":")[1], 16) == port and fields[3] == "01":  # established
            inodes.add(f"socket:[{fields[9]}]")
    found = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found += str(descriptor.readlink()) in inodes
        except FileNotFoundError:  # closed meanwhile
            continue
    return found


def ask(pool: RawPool, ids: Sequence[int] = (1, 2, 6499)) -> None:
    """One lookup, each byte of which must be right. A connection that a worker got as it stopped is made once more."""
    answer = pool.lookup(pool.by_ids((2, ids)), timeout=LIMIT_S, wait_for_ready=True)
    assert rows_of(answer) == {2: expected(2, ids)}


def wait_counted(server: ServerProcess, rows: float) -> None:
    """Until the metrics have these rows: a call is counted once its answer is on its way, and told some time later."""
    eventually(lambda: scrape(server.metrics_address).get(ROWS) == rows, f"{rows} rows are counted")


@contextmanager
def pool_of_each_worker(server: ServerProcess, packed: Path) -> Iterator[dict[int, RawPool]]:
    """By process id, a connection that this worker answers on. The system chooses, so it takes several tries."""
    pids = server.worker_pids().values()
    found: dict[int, RawPool] = {}
    with ExitStack() as stack:
        for number in range(1, 65):
            before = {pid: connections(server, pid) for pid in pids}
            pool = stack.enter_context(RawPool(server.address, version_of(packed)))
            ask(pool)
            (pid,) = (pid for pid in pids if connections(server, pid) > before[pid])
            found.setdefault(pid, pool)
            if found.keys() == set(pids):
                wait_counted(server, 3 * number)
                yield found
                return
    raise AssertionError("64 connections went to some of the workers only")


def count(server: ServerProcess, event: str, **fields: object) -> int:
    return sum(all(line.get(name) == value for name, value in fields.items()) for line in server.said(event))


def wait_replaced(server: ServerProcess, index: int, old: int) -> int:
    """The process of worker `index`, once it is another than `old` and ready."""
    server.wait_until(
        lambda lines: any(
            line["event"] == "worker-ready" and line["worker"] == index and line["pid"] != old for line in lines
        )
    )
    return server.worker_pids()[index]


def family(server: ServerProcess) -> list[int]:
    """The supervisor and every process that it started."""
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text()
    return [server.process.pid, *map(int, children.split())]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


# --- one server


def test_workers_share_a_port_an_endpoint_and_a_bound(packed, tmp_path):
    limits = {"max_answer_bytes": BIG.size * 264, "max_in_flight_bytes": BIG.size * 264}
    with serve_process(packed, environ=environment(tmp_path, PATIENT), workers=3, drain_s=0, **limits) as server:
        assert scrape(server.metrics_address)["engrampool_workers"] == 3
        with pool_of_each_worker(server, packed) as pools:
            assert len(pools) == 3
            asked = scrape(server.metrics_address)[ROWS]
            for number, pool in enumerate(pools.values(), 1):
                ask(pool, range(100))
                wait_counted(server, asked + 100 * number)
            first, second, _ = pools.values()
            call = first.stream(first.by_ids((2, BIG)))
            messages = [next(call)]
            # What is in flight in one worker the others know of, and whose it is.
            half = BIG[: BIG.size // 2 - 5000]  # with the request a little less than what one peer may have
            code, reason, text = refusal(lambda: second.lookup(second.by_ids((2, half))))
            assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "peer-share")
            said = re.search(rf"(\d+) bytes are in flight, of {BIG.size * 264}; \1 of them are for 127.0.0.1", text)
            assert said, text
            assert scrape(server.metrics_address)["engrampool_in_flight_limit_bytes"] == BIG.size * 264
            told = {"engrampool_in_flight_bytes": int(said[1]), 'engrampool_refused_total{reason="peer-share"}': 1}
            eventually(lambda: told.items() <= scrape(server.metrics_address).items(), "it is told")
            messages += call
            assert joined(messages) == {2: expected(2, BIG)}
            eventually(lambda: scrape(server.metrics_address)["engrampool_in_flight_bytes"] == 0)
            ask(second, half)

            # What a worker had in flight does not count once it is dead.
            call = first.stream(first.by_ids((2, BIG)))
            next(call)
            pid = next(iter(pools))
            index = next(index for index, of in server.worker_pids().items() if of == pid)
            os.kill(pid, signal.SIGKILL)
            wait_replaced(server, index, pid)
            with pytest.raises(grpc.RpcError):
                list(call)
            ask(second, half)
            eventually(lambda: scrape(server.metrics_address)["engrampool_in_flight_bytes"] == 0)


def pss_bytes(server: ServerProcess) -> int:
    """Proportional memory of all processes: what several share counts once."""
    rollups = (Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in family(server))
    return sum(int(re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)[1]) * 1024 for text in rollups)


# What a further process has for itself, beside the tables; preflight counts on less than WORKER_BYTES.
PROCESS_BYTES = 32 << 20


LARGE = ModelSpec("large", SPEC.vocab_size, (TableSpec(2, 1_200_000, WIDE, SPEC.table(2).hash),), SPEC.token_map)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def fill(table, start, out):
        out[:] = np.arange(start, start + len(out), dtype=np.uint32).view(np.uint8).reshape(-1, 4)[:, :1]

    directory = tmp_path_factory.mktemp("workers") / "large"
    write_tables(directory, LARGE, {}, fill)
    return directory


@pytest.mark.executed  # a fork's memory is in part another process's
@pytest.mark.parametrize("shared", [False, True], ids=["anon", "segments"])
def test_tables_are_in_memory_once_however_many_workers(large, shared):
    nbytes = LARGE.nbytes
    used = {}
    for workers in (1, 2):
        with ExitStack() as stack:
            memory = "anon"
            if shared:  # each time in a directory of its own, so that none is adopted
                directory = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
                memory = f"file:{directory}"
            server = stack.enter_context(serve_process(large, workers=workers, memory=memory))
            version = version_of(large)
            # Every page, by small lookups: what a worker keeps of large answers is not what this is about.
            for number, ids in enumerate(np.split(np.arange(0, 1_200_000, 15), 40)):
                if number % 5 == 0:
                    pool = stack.enter_context(RawPool(server.address, version))
                answer = rows_of(pool.lookup(pool.by_ids((2, ids), model="large")))[2]
                assert answer == np.repeat(ids.astype(np.uint8), 264).tobytes()
            used[workers] = pss_bytes(server)
            assert used[workers] > nbytes
            stated = scrape(server.metrics_address)["process_resident_memory_bytes"]
            assert nbytes < stated < nbytes * 1.05 + 10 * PROCESS_BYTES
    assert nbytes > 300e6
    assert used[2] < 1.05 * used[1] + PROCESS_BYTES, {n: size >> 20 for n, size in used.items()}


# --- workers that end


# A connection may come long after its ticket, and say hello long after that.
LATE = """
from engrampool_server.answer.lane import connection, direct
connection.HELLO_S = direct._TICKET_VALID_S = 600.0
"""


def test_any_worker_takes_a_connection_of_the_direct_lane_whoever_gave_the_ticket(packed, tmp_path):
    path, environ = tmp_path / "lane", environment(tmp_path, LATE)
    with (
        # Whoever is stopped is left in peace.
        serve_process(packed, environ=environ, workers=3, direct=f"unix:{path}", worker_timeout_s=600) as server,
        grpc.insecure_channel(server.address) as channel,
        ExitStack() as stack,
    ):
        pids = server.worker_pids()
        os.kill(pids[0], signal.SIGSTOP)
        try:
            # Whoever issues them, one of the workers that are not at a standstill takes every connection.
            stub = pool_pb2_grpc.PoolStub(channel)
            for _ in range(64):
                try:
                    way_in = stub.OpenDirect(pool_pb2.OpenDirectRequest(), timeout=0.2)
                except grpc.RpcError:  # the channel's worker is the one that stands still
                    channel = stack.enter_context(
                        grpc.insecure_channel(server.address, [("grpc.use_local_subchannel_pool", 1)])
                    )
                    stub = pool_pb2_grpc.PoolStub(channel)
                    continue
                lane = stack.enter_context(socket.socket(socket.AF_UNIX))
                lane.settimeout(LIMIT_S)
                lane.connect(way_in.unix_path)
                lane.sendall(frames.frame(frames.HELLO, way_in.ticket))
                ready = frames.frame(frames.READY)
                assert lane.recv(len(ready), socket.MSG_WAITALL) == ready
        finally:
            os.kill(pids[0], signal.SIGCONT)
        with Client(server.address, **PATIENCE) as client:
            ids = np.arange(6500)
            for _ in range(3):
                assert client.lookup_rows({2: ids})[2].tobytes() == expected(2, ids)
            server.process.send_signal(signal.SIGHUP)
            server.wait_until(lambda lines: any(line["event"] == "rolled" for line in lines))
            assert client.lookup_rows({2: ids})[2].tobytes() == expected(2, ids)

            def on_the_lane_again() -> bool:
                client.lookup_rows({2: ids})
                return scrape(server.metrics_address)["engrampool_direct_connections"] == 1

            eventually(on_the_lane_again)
    assert not path.exists()


# Whoever is not started again at once is not within any test's time.
NO_DELAY = "from engrampool_server.processes import children; children._FIRST_DELAY_S = children.MAX_DELAY_S = 600.0"


def test_a_killed_worker_is_replaced_while_others_answer(packed, tmp_path):
    environ = environment(tmp_path, NO_DELAY)
    with serve_process(packed, environ=environ, workers=2) as server, pool_of_each_worker(server, packed) as pools:
        old = server.worker_pids()
        before = scrape(server.metrics_address)
        victim, other = old[0], old[1]
        os.kill(victim, signal.SIGKILL)
        ask(pools[other])
        died = server.wait_for("worker-died")
        assert (died["worker"], died["pid"], died["status"]) == (0, victim, "SIGKILL")
        new = wait_replaced(server, 0, victim)
        for _ in range(8):
            ask(pools[other])
            with RawPool(server.address, version_of(packed)) as pool:
                ask(pool)
        assert server.worker_pids() == {0: new, 1: other}
        assert count(server, "loaded") == 1
        # No counter went back, and none lost what the dead one had counted.
        wait_counted(server, before[ROWS] + (1 + 16) * 3)
        eventually(lambda: scrape(server.metrics_address)["engrampool_workers"] == 2, "both are counted")
        after = scrape(server.metrics_address)
        assert after[RESTARTS.format("died")] == 1
        assert after[RESTARTS.format("hung")] == 0
        assert after["engrampool_workers"] == 2
        counts = [key for key in before if re.search(r"_(total|count|sum|bucket)(\{|$)", key)]
        assert [key for key in counts if after[key] < before[key]] == []


def test_a_worker_that_gives_no_sign_of_life_is_replaced(packed):
    # So long that others, which have a processor now and then, are not taken to hang.
    with serve_process(packed, workers=2, worker_timeout_s=8) as server:
        old = server.worker_pids()
        os.kill(old[1], signal.SIGSTOP)
        hung = server.wait_for("worker-hung")
        assert (hung["worker"], hung["pid"]) == (1, old[1])
        assert hung["silent_s"] >= 8
        wait_replaced(server, 1, old[1])
        assert not alive(old[1])
        seen = scrape(server.metrics_address)
        assert seen[RESTARTS.format("hung")] == 1
        assert seen[RESTARTS.format("died")] == 0
        assert server.worker_pids()[0] == old[0]
        for _ in range(8):
            with RawPool(server.address, version_of(packed)) as pool:
                ask(pool)


# The clock by which children are judged is ahead by the time that a file was changed at.
AHEAD = """
import os, time
from types import SimpleNamespace
from engrampool_server.processes import children
ahead_s = lambda: os.stat(os.environ["TEST_AHEAD"]).st_mtime
children.time = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead_s(), clock_gettime=time.clock_gettime)
"""


def test_a_server_that_stood_still_as_a_whole_replaces_nobody(packed, tmp_path):
    """As when a container is paused: all were silent, the one that judges them too.

    Where it is that one alone, as in a debugger, nobody else notices.
    """
    ahead = tmp_path / "ahead"
    ahead.touch()
    os.utime(ahead, (0, 0))
    environ = environment(tmp_path, AHEAD) | {"TEST_AHEAD": str(ahead)}
    with serve_process(packed, environ=environ, workers=2, worker_timeout_s=60) as server:
        old, processes = server.worker_pids(), family(server)
        os.kill(server.process.pid, signal.SIGSTOP)
        for _ in range(5):
            with RawPool(server.address, version_of(packed)) as pool:
                ask(pool)
            assert scrape(server.metrics_address)["engrampool_workers"] == 2
        os.utime(ahead, (100, 100))
        os.kill(server.process.pid, signal.SIGCONT)
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        os.utime(ahead, (200, 200))
        for pid in processes:  # the supervisor first, before the others can say anything
            os.kill(pid, signal.SIGCONT)
        with RawPool(server.address, version_of(packed)) as pool:
            for _ in range(10):
                ask(pool)
                time.sleep(0.05)
        assert server.worker_pids() == old
        assert count(server, "worker-hung") == 0


def test_a_worker_that_ends_again_and_again_is_started_less_and_less_often(packed, crashing):
    environ, flag = crashing
    with serve_process(packed, environ=environ, workers=2) as server, pool_of_each_worker(server, packed) as pools:
        old = server.worker_pids()
        flag.touch()
        os.kill(old[0], signal.SIGKILL)
        server.wait_until(lambda lines: sum(line["event"] == "worker-died" for line in lines) >= 5)
        ask(pools[old[1]])
        flag.unlink()
        wait_replaced(server, 0, old[0])
        died = [datetime.fromisoformat(line["time"]) for line in server.said("worker-died")]
        gaps_s = [(after - before).total_seconds() for before, after in pairwise(died[:5])]
        assert all(gap_s > least_s for gap_s, least_s in zip(gaps_s, (0, 0.1, 0.2, 0.4), strict=True)), gaps_s
        last = server.said("worker-died")[1]
        assert last["status"] == "exit code 3"
        assert server.worker_pids()[1] == old[1]


def test_a_start_whose_workers_end_fails_with_one_line(packed, crashing):
    environ, flag = crashing
    flag.touch()
    command = [sys.executable, "-m", "engrampool_proto", "serve", f"--model={packed}", "--listen=127.0.0.1:0"]
    done = PREFORK.run([*command, "--metrics=127.0.0.1:0"], environ={**os.environ, **environ})
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"engrampool: worker \d+ ended before it was ready: exit code 3", last)


def test_the_endpoint_of_metrics_comes_back_too(packed):
    with serve_process(packed, workers=1) as server:
        before = scrape(server.metrics_address)
        (exporter,) = set(family(server)) - {server.process.pid, *server.worker_pids().values()}
        os.kill(exporter, signal.SIGKILL)
        died = server.wait_for("worker-died")
        assert (died["worker"], died["pid"]) == ("exporter", exporter)

        def answered():
            try:
                return scrape(server.metrics_address)
            except (urllib.error.URLError, ConnectionError):
                return None

        after = eventually(answered)
        assert after["engrampool_workers"] == 1
        assert after["process_cpu_seconds_total"] >= before["process_cpu_seconds_total"]
        assert after[RESTARTS.format("died")] == 0  # it is no worker


# --- rolling restart


def test_a_rolling_restart_under_load_fails_no_lookup_of_a_client(packed):
    stop = threading.Event()
    problems: list[Exception] = []
    answered = [0, 0]

    def load(at: int, client: Client) -> None:
        tokens = np.arange(50, dtype=np.int32)
        ids = SPEC.hash(TokenBatch.of(tokens))
        wanted = {layer: expected(layer, rows.reshape(-1)) for layer, rows in ids.items()}
        while not stop.is_set():
            try:
                rows = client.lookup(tokens)
                assert {layer: rows[layer].tobytes() for layer in ids} == wanted
                answered[at] += 1
                stop.wait(0.002)  # for those that start anew to have a processor
            except Exception as error:
                problems.append(error)
                return

    with serve_process(packed, workers=2, drain_s=600) as server, ExitStack() as stack:
        old = server.worker_pids()
        threads = [
            threading.Thread(target=load, args=(at, stack.enter_context(Client(server.address, **PATIENCE))))
            for at in range(2)
        ]
        for thread in threads:
            thread.start()
        eventually(lambda: min(answered) > 20 or problems)
        for number in range(1, 6):
            server.process.send_signal(signal.SIGHUP)
            server.wait_until(lambda lines, n=number: sum(line["event"] == "rolled" for line in lines) == n)
        sofar = list(answered)
        eventually(lambda: min(now - then for now, then in zip(answered, sofar, strict=True)) > 20 or problems)
        stop.set()
        for thread in threads:
            thread.join()
        assert problems == []
        # A call that came in the moment of a stop is not waited for until the drain is over.
        assert max(line["seconds"] for line in server.said("rolled")) < LIMIT_S
        new = server.worker_pids()
        assert new.keys() == old.keys()
        assert not set(new.values()) & set(old.values())
        assert not any(map(alive, old.values()))
        assert count(server, "loaded") == 1
        seen = scrape(server.metrics_address)
        assert seen["engrampool_workers"] == 2
        assert seen[RESTARTS.format("died")] == seen[RESTARTS.format("hung")] == 0


def test_lookups_in_flight_finish_and_a_second_request_waits_its_turn(packed, tmp_path):
    """And are counted, although the last thing that their worker does is to end."""
    held = HeldStream(tmp_path)
    with (
        serve_process(packed, environ=held.environ, workers=1, drain_s=600, **held.settings) as server,
        RawPool(server.address, version_of(packed)) as pool,
    ):
        old = server.worker_pids()[0]
        held.begin(pool)
        server.process.send_signal(signal.SIGHUP)
        wait_replaced(server, 0, old)
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("roll-queued")
        assert count(server, "rolled") == 0
        with RawPool(server.address, version_of(packed)) as other:
            ask(other)
        assert held.rest_is_right()
        server.wait_until(lambda lines: sum(line["event"] == "rolled" for line in lines) == 2)
        assert count(server, "rolling", workers=1) == 2
        assert len({line["pid"] for line in server.said("worker-ready")}) == 3
        # Nobody waits: a worker that is gone can add nothing.
        assert scrape(server.metrics_address)[ROWS] == held.rows + 3


def test_a_successor_that_does_not_start_changes_nothing(packed, crashing):
    environ, flag = crashing
    with serve_process(packed, environ=environ, workers=2) as server:
        old = server.worker_pids()
        flag.touch()
        server.process.send_signal(signal.SIGHUP)
        assert server.wait_for("roll-failed")["worker"] == 0
        assert server.worker_pids() == old
        assert all(map(alive, old.values()))
        for _ in range(8):
            with RawPool(server.address, version_of(packed)) as pool:
                ask(pool)
        flag.unlink()
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("rolled")
        assert not set(server.worker_pids().values()) & set(old.values())


# --- the end


def test_a_server_whose_log_nobody_takes_goes_on_and_says_all_of_it_later(packed):
    command = [sys.executable, "-m", "engrampool_proto", "serve", f"--model={packed}", "--workers=2"]
    command += ["--listen=127.0.0.1:0", "--metrics=off"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        server = ServerProcess(process)
        try:
            said = b""
            while b'"serving"' not in said:
                said = process.stderr.readline()
            server.address = json.loads(said)["listen"]
            own = os.open(f"/proc/self/fd/{process.stderr.fileno()}", os.O_WRONLY | os.O_NONBLOCK)
            with suppress(BlockingIOError):
                while os.write(own, b"\n" * 4096):
                    pass
            old = family(server)
            for victim in old[-2:]:
                os.kill(victim, signal.SIGKILL)
            eventually(lambda: not set(old[-2:]) & set(family(server)) and len(family(server)) == 3, "two others came")
            with RawPool(server.address, version_of(packed)) as pool:
                pool.lookup(pool.by_ids((2, [1])), timeout=LIMIT_S, wait_for_ready=True)
            # Somebody takes lines again.
            os.close(own)
            process.terminate()
            said = [json.loads(line) for line in process.stderr if line.startswith(b"{")]
            assert process.wait(LIMIT_S) == 0
        finally:
            process.kill()
        told = [line["event"] for line in said]
        assert (told.count("worker-died"), told[-1]) == (2, "stopped")
        assert "stopping" in told


def test_a_killed_supervisor_leaves_no_process_no_port_and_no_file(packed):
    listen, metrics = lasting_address(), lasting_address()
    with serve_process(packed, workers=2, listen=listen, metrics=metrics) as server:
        processes = family(server)
        assert len(processes) == 4
        # What they map and could leave lying.
        mapped = {line for pid in processes for line in Path(f"/proc/{pid}/maps").read_text().splitlines()}
        assert not [line for line in mapped if " /dev/shm/" in line]
        server.process.kill()
        server.process.wait()
        eventually(lambda: not any(map(alive, processes)), "all processes are gone")
    with serve_process(packed, workers=2, listen=listen, metrics=metrics) as server:
        with RawPool(listen, version_of(packed)) as pool:
            ask(pool)
        wait_counted(server, 3)
        server.process.terminate()
        assert server.process.wait(LIMIT_S) == 0


def test_a_server_killed_again_and_again_starts_again_each_time(packed, tmp_path):
    """On one port, without a pause: what dies of the last one is waited for."""
    environ = environment(tmp_path, f"from engrampool_server import ports; ports.PATIENCE_S = {LIMIT_S}")
    listen = lasting_address()
    for _ in range(3):
        with serve_process(packed, environ=environ, workers=2, listen=listen) as server:
            with RawPool(listen, version_of(packed)) as pool:
                ask(pool)
            server.process.kill()
            server.process.wait()


def test_a_second_signal_ends_the_drain(packed):
    with serve_process(packed, workers=2, drain_s=600) as server, RawPool(server.address, version_of(packed)) as pool:
        processes = family(server)
        call = pool.stream(pool.by_ids((2, BIG)))
        next(call)
        server.process.terminate()
        server.wait_for("stopping")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(LIMIT_S) == 0
        assert not any(map(alive, processes))
        with pytest.raises(grpc.RpcError):
            list(call)


def test_a_signal_of_a_terminal_reaches_all_processes_and_drains_them(packed, tmp_path):
    """Ctrl-C goes to the whole group of processes, as does the end of a terminal."""
    command = [sys.executable, "-m", "engrampool_proto", "serve", f"--model={packed}", "--workers=2"]
    command += ["--listen=127.0.0.1:0", "--metrics=off", "--drain-s=600", "--stream-chunk-bytes=64KiB"]
    held = HeldStream(tmp_path)
    environ = {**os.environ, **held.environ}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environ)
    server = ServerProcess(process)
    reader = threading.Thread(target=server._read)
    reader.start()
    try:
        server.address = server.wait_for("serving")["listen"]
        with RawPool(server.address, version_of(packed)) as pool:
            held.begin(pool)
            os.killpg(process.pid, signal.SIGINT)
            server.wait_for("stopping")
            assert held.rest_is_right()
        assert process.wait(LIMIT_S) == 0
    finally:
        process.kill()
        reader.join()
        process.stderr.close()
    assert count(server, "worker-died") == 0


def test_another_server_does_not_get_onto_the_port(packed):
    with (
        serve_process(packed, workers=2) as server,
        pytest.raises(ServerStartError, match=f"cannot listen on {server.address}: in use"),
        serve_process(packed, workers=2, listen=server.address),
    ):
        raise AssertionError("two servers on one port")


def test_a_start_that_waits_for_a_disk_that_does_not_answer_can_be_stopped(packed, tmp_path):
    with serve_process(packed, environ=environment(tmp_path, STUCK), ready=False) as server:
        server.wait_for("stuck")
        server.process.terminate()
        assert server.process.wait(LIMIT_S) == 0
        server.wait_for("stopped")
