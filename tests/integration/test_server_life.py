"""A server's life in real processes: start, load, serve, drain, end, and every way that it does not come to serve."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engrampool_client.testing import ServerProcess, ServerStartError, serve_process
from engrampool_proto.v1 import pool_pb2
from engrampool_server.files.table_files import PackedModel
from engrampool_server.memory.memory import huge_page_bytes
from prefork import PREFORK
from server_fixtures import (
    LIMIT_S,
    SPEC,
    HeldStream,
    RawPool,
    environment,
    eventually,
    expected,
    pack,
    refusal,
    rows_of,
    version_of,
)

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
SERVE = [sys.executable, "-m", "engrampool_proto", "serve", "--listen=127.0.0.1:0", "--metrics=127.0.0.1:0"]
# 65 MiB of rows: more than gRPC keeps on the way, so that the answer ends only when it is read.
BIG = np.tile(np.arange(6500), 40)

# Every read of a block opens a pipe first, and so waits until somebody opened its other end: a disk that hangs. The
# process that answers meanwhile may take its time to leave.
SLOW_DISK = """
import os
from engrampool_server.processes import supervisor
supervisor.LOBBY_DRAIN_S = 600.0
from engrampool_server.files.table_files import PackedModel
read_block = PackedModel.read_block
def slow(self, block, out):
    os.close(os.open(os.environ["TEST_GATE"], os.O_RDONLY))
    return read_block(self, block, out)
PackedModel.read_block = slow
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("life") / "small")


# Nobody is cut off for not reading, and no process is killed for not ending: nothing but `drain_s` ends a drain.
PATIENT = """
from engrampool_server.answer import pool_service
from engrampool_server.processes import supervisor
pool_service.PATIENCE_S = supervisor._STOP_MARGIN_S = 600.0
"""


@pytest.fixture
def slow_disk(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """Environment of a server whose reads wait, and the pipe to open for them to go on."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    return environment(tmp_path, SLOW_DISK) | {"TEST_GATE": str(gate)}, gate


@contextmanager
def let_through(gate: Path) -> Iterator[None]:
    # Opened for both, so that opening waits for nobody.
    descriptor = os.open(gate, os.O_RDWR)
    try:
        yield
    finally:
        os.close(descriptor)


def health_of(address: str, service: str = "") -> int:
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=LIMIT_S).status


def events(server: ServerProcess) -> list[str]:
    """Names of the events logged; to be asked once the server has ended.

    Except for those of single workers, and of how far loading came, as it says where that takes its time.
    """
    server.wait_ended(LIMIT_S)
    return [line["event"] for line in server.said() if line["event"] not in ("worker-ready", "loading", "refused")]


def all_lines_are_json(server: ServerProcess) -> bool:
    return all(json.loads(line)["level"] for line in server._tail)


def fails(*arguments: str, launcher: str | None = None) -> str:
    """The last line on standard error of a server that must end by itself with code 1; no traceback before it."""
    command = [*SERVE, *arguments]
    if launcher is not None:
        command = [sys.executable, "-c", f"{launcher}\nimport os, sys; os.execv(sys.argv[1], sys.argv[1:])", *command]
    done = PREFORK.run(command)
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    *logged, last = done.stderr.splitlines()
    ours = [line for line in logged if line.startswith("engrampool")]
    assert ours == []
    assert last.startswith("engrampool: ")
    return last


# --- loading


def test_health_and_lookups_while_loading_and_after(packed, slow_disk):
    environ, gate = slow_disk
    with serve_process(packed, environ=environ, ready=False) as server:
        address = server.wait_for("listening")["listen"]
        with RawPool(address, version_of(packed)) as pool:
            message = pool.by_ids((2, [1]))
            with grpc.insecure_channel(address) as channel:
                stub = health_pb2_grpc.HealthStub(channel)
                watch = stub.Watch(health_pb2.HealthCheckRequest())
                assert next(watch).status == NOT_SERVING
                for service in ("", "engrampool.v1.Pool"):
                    assert health_of(address, service) == NOT_SERVING
                describe = pool.channel.unary_unary("/engrampool.v1.Pool/Describe")
                for call in (pool.lookup, pool.stream, describe):
                    code, reason, text = refusal(lambda call=call: call(message if call is not describe else b""))
                    assert (code, reason) == (UNAVAILABLE, "loading")
                    assert "loading" in text
                with let_through(gate):
                    # The process that answered so far leaves, and whoever watches asks again, as the protocol has it.
                    assert list(watch) == []
                    server.wait_for("serving")
                watch = stub.Watch(health_pb2.HealthCheckRequest())
                assert next(watch).status == SERVING
                watch.cancel()
            for service in ("", "engrampool.v1.Pool"):
                assert health_of(address, service) == SERVING
            assert rows_of(pool.lookup(message)) == {2: expected(2, [1])}
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(LIMIT_S) == 0
    assert events(server) == ["starting", "opened", "listening", "loaded", "serving", "stopping", "stopped"]
    assert all_lines_are_json(server)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_loading_ends_cleanly(packed, slow_disk, number):
    environ, gate = slow_disk
    with serve_process(packed, environ=environ, ready=False, load_threads=2) as server:
        server.wait_for("listening")
        server.process.send_signal(signal.SIGHUP)
        assert server.wait_for("roll-ignored")["reason"] == "not serving yet"
        server.process.send_signal(number)
        assert server.wait_for("stopping")["reason"] == number.name
        with let_through(gate):
            assert server.process.wait(LIMIT_S) == 0
    assert events(server) == ["starting", "opened", "listening", "roll-ignored", "stopping", "stopped"]
    assert all_lines_are_json(server)


def test_each_event_is_one_json_line_with_its_facts(packed):
    with serve_process(packed, drain_s=600) as server:
        server.process.terminate()
        assert server.process.wait(LIMIT_S) == 0
    names = events(server)
    assert names == ["starting", "opened", "listening", "loaded", "serving", "stopping", "stopped"]
    assert all_lines_are_json(server)
    by_name = {line["event"]: line for line in server.said()}
    assert by_name["opened"]["model"] == by_name["loaded"]["model"] == "small"
    assert by_name["opened"]["version"] == by_name["loaded"]["version"] == version_of(packed)
    assert by_name["opened"]["table_bytes"] == SPEC.nbytes
    assert by_name["listening"]["listen"] == by_name["serving"]["listen"] == server.address
    assert by_name["stopping"]["reason"] == "SIGTERM"
    assert by_name["stopped"]["drained_s"] < LIMIT_S  # it does not wait for nothing
    for line in server.said():
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])


# --- draining


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_lookups_in_flight_finish_and_new_ones_are_refused(packed, tmp_path, number):
    held = HeldStream(tmp_path)
    with (
        serve_process(packed, environ=held.environ, drain_s=600, **held.settings) as server,
        RawPool(server.address, version_of(packed)) as pool,
    ):
        held.begin(pool)
        server.process.send_signal(number)
        server.wait_for("stopping")

        codes: list[grpc.StatusCode] = []

        def refused() -> bool:
            with RawPool(server.address, pool.version) as other:
                try:
                    other.lookup(other.by_ids((2, [1])), timeout=LIMIT_S)
                except grpc.RpcError as error:
                    codes.append(error.code())
            return bool(codes)

        eventually(refused, "new lookups are refused")
        # gRPC itself cancels a call that arrives in the moment in which the server closes.
        assert codes[0] in (UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert server.process.poll() is None
        assert held.rest_is_right()
        assert server.process.wait(LIMIT_S) == 0
    assert events(server)[-2:] == ["stopping", "stopped"]


def test_draining_ends_at_its_bound(packed, tmp_path):
    environ = environment(tmp_path, PATIENT)
    with (
        serve_process(packed, environ=environ, drain_s=0.5) as server,
        RawPool(server.address, version_of(packed)) as pool,
    ):
        call = pool.stream(pool.by_ids((2, BIG)))
        next(call)
        begin = time.monotonic()
        server.process.terminate()
        assert server.process.wait(LIMIT_S) == 0  # nobody reads on
        took_s = time.monotonic() - begin
        assert took_s >= 0.5
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() in (UNAVAILABLE, grpc.StatusCode.CANCELLED)
    events(server)
    assert 0.5 <= server.wait_for("stopped")["drained_s"] < LIMIT_S


def test_whoever_watches_health_is_told_and_does_not_hold_up_the_end(packed):
    with serve_process(packed, drain_s=600) as server, grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(service=name)) for name in ("", "engrampool.v1.Pool", "x")]
        first = [next(watch).status for watch in watches]
        assert first == [SERVING, SERVING, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN]
        server.process.terminate()
        assert [[status.status for status in watch] for watch in watches] == [[NOT_SERVING], [NOT_SERVING], []]
        assert server.process.wait(LIMIT_S) == 0
    events(server)
    assert server.wait_for("stopped")["drained_s"] < LIMIT_S


# --- starts that fail


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_a_port_in_use_is_one_clear_line(packed):
    with taken_port() as port:
        line = fails(f"--model={packed}", f"--listen=127.0.0.1:{port}")
        assert f"cannot listen on 127.0.0.1:{port}" in line
        assert "in use" in line
        line = fails(f"--model={packed}", f"--metrics=127.0.0.1:{port}")
        assert f"cannot listen on 127.0.0.1:{port} for metrics" in line
        assert "in use" in line


def test_a_damaged_table_file_is_named_and_nothing_goes_on_running(packed, tmp_path):
    directory = tmp_path / "damaged"
    directory.mkdir()
    for path in packed.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    with PackedModel.open(packed) as model:
        block = model.blocks(2)[3]
    with (directory / block.file).open("r+b") as file:
        file.seek(block.offset)
        file.write(bytes(8))
    # The whole session, so that a child left behind would be seen.
    command = [*SERVE, f"--model={directory}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    line = process.communicate(timeout=LIMIT_S)[1].splitlines()[-1]
    assert process.returncode == 1
    assert line.startswith("engrampool: ")
    assert str(directory / block.file) in line
    assert f"layer 2 block 3 (rows {block.start} .. {block.stop - 1})" in line
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_what_is_no_model_is_named_and_told_by_serve_process(tmp_path):
    with pytest.raises(ServerStartError, match=f"engrampool: {tmp_path} is no packed model"), serve_process(tmp_path):
        raise AssertionError("it serves nothing")


def free_huge_pages() -> int:
    found = re.search(r"^HugePages_Free: +(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


@pytest.mark.skipif(
    free_huge_pages() > 0 or huge_page_bytes() != 2 << 20, reason="huge pages are reserved, or not of 2 MiB"
)
def test_too_few_huge_pages_are_told_before_anything_is_read(packed):
    line = fails(f"--model={packed}", "--memory=hugetlb")
    needed = f"{-(-SPEC.nbytes // (2 << 20)) * 2 + 2}.0 MiB"  # either table may end in a page barely used
    assert f"reserved huge pages: {needed} needed, 0.0 MiB available, short by {needed}" in line
    assert "sysctl vm.nr_hugepages=" in line


def test_a_limit_on_locked_memory_is_told_before_anything_is_read(packed):
    without_capability = (
        "import ctypes, resource; ctypes.CDLL(None).prctl(24, 14, 0, 0, 0)\n"  # PR_CAPBSET_DROP, CAP_IPC_LOCK
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))"
    )
    line = fails(f"--model={packed}", "--lock-memory", launcher=without_capability)
    short = -(-(SPEC.nbytes - (1 << 20)) * 10 // (1 << 20)) / 10
    assert f"1.0 MiB available, short by {short} MiB: ulimit -l unlimited" in line


# --- several models


def test_one_model_given_twice_is_refused(packed, tmp_path):
    assert "different directories" in fails(f"--model={packed}", f"--model={packed}")
    copy = tmp_path / "copy"
    copy.symlink_to(packed, target_is_directory=True)
    line = fails(f"--model={packed}", f"--model={copy}")
    assert f"model small, version {version_of(packed)}, is given twice: {packed} and {copy}" in line


def test_two_versions_of_one_model_are_kept_apart(packed, tmp_path):
    changed = pack(tmp_path / "changed", change=True)
    old, new = version_of(packed), version_of(changed)
    assert old != new
    with serve_process(packed, changed) as server:
        ids = np.arange(6500)
        with RawPool(server.address, old) as one, RawPool(server.address, new) as other:
            rows = rows_of(one.lookup(one.by_ids((2, ids))))
            assert rows == {2: expected(2, ids)}
            flipped = np.frombuffer(rows[2], np.uint8).reshape(-1, 264).copy()
            flipped[:, -1] ^= 1
            assert rows_of(other.lookup(other.by_ids((2, ids)))) == {2: flipped.tobytes()}
            answer = one.channel.unary_unary("/engrampool.v1.Pool/Describe")(b"")
            described = pool_pb2.DescribeResponse.FromString(answer)
            assert [(model.name, model.version) for model in described.models] == [("small", old), ("small", new)]
            _, reason, text = refusal(lambda: one.lookup(one.by_ids((2, [0]), version="f" * 32)))
            assert reason == "unknown-version"
            assert old in text
            assert new in text


# --- memory and clients


CLIENTS = """
import multiprocessing
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from server_fixtures import RawPool, expected, joined, rows_of

def look_up(seed):
    rng = np.random.default_rng(seed)
    with RawPool(sys.argv[2], sys.argv[3]) as pool:
        for count in [1, 100, 4000] * 8:
            ids = [(2, rng.integers(0, 6500, count)), (9, rng.integers(0, 4100, count))]
            wanted = {layer: expected(layer, rows) for layer, rows in ids}
            assert rows_of(pool.lookup(pool.by_ids(*ids))) == wanted
            assert joined(pool.stream(pool.by_ids(*ids))) == wanted
    print("every byte was right", flush=True)

# Forks, as most of what a program of each would cost is its imports.
clients = [multiprocessing.get_context("fork").Process(target=look_up, args=(seed,)) for seed in range(3)]
for one in clients:
    one.start()
for one in clients:
    one.join()
"""


def test_several_client_processes_at_once(packed):
    tests = str(Path(__file__).parent.parent)
    with serve_process(packed, gather_threads=2, stream_chunk_bytes="64KiB") as server:
        command = [sys.executable, "-c", CLIENTS, tests, server.address, version_of(packed)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
    assert done.stdout.split() == 3 * ["every", "byte", "was", "right"]  # their lines may come between each other
