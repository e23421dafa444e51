"""A server whose `listen` is a Unix socket: all that it does on a port, at one path that outlives its workers."""

import os
import re
import select
import shutil
import signal
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

from engrampool_client import Client
from engrampool_client.testing import ServerStartError, serve_process
from engrampool_server.config import ConfigError, ServerConfig
from server_fixtures import (
    LIMIT_S,
    PATIENCE,
    RawPool,
    eventually,
    expected,
    pack,
    rows_of,
    running,
    scrape,
    version_of,
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("unix") / "small")


def ask(address: str, packed: Path) -> None:
    with RawPool(address, version_of(packed)) as pool:
        answer = pool.lookup(pool.by_ids((2, [5, 6])), timeout=LIMIT_S, wait_for_ready=True)
        assert rows_of(answer) == {2: expected(2, [5, 6])}


@pytest.mark.parametrize("direct", ["auto", "off", "127.0.0.1:0"])
def test_clients_reach_a_server_by_a_unix_socket(packed, tmp_path, direct):
    path = tmp_path / "pool.sock"
    with serve_process(packed, listen=f"unix:{path}", direct=direct, workers=2) as server:
        assert server.address == f"unix:{path}"
        with Client(server.address, "small", **PATIENCE) as client:

            def counted() -> float | None:
                rows = client.lookup(np.array([1, 2, 3, 4], np.int32))
                assert set(rows) == {2, 9}
                return scrape(server.metrics_address).get('engrampool_direct_lookups_total{code="OK"}')

            if direct == "off":
                counted()
            else:  # by and by: over gRPC where a connection took its time, until it is tried again
                eventually(counted, "the direct lane answered")
        ask(server.address, packed)
    assert server.process.returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.executed
def test_the_path_leads_to_whoever_answers(packed, tmp_path):
    path = tmp_path / "pool.sock"
    with serve_process(packed, listen=f"unix:{path}", workers=2) as server:
        for worker in (0, 1):
            before = server.worker_pids()
            os.kill(before[worker], signal.SIGKILL)
            server.wait_until(lambda _, before=before: server.worker_pids() != before)
            ask(server.address, packed)
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("rolled")
        ask(server.address, packed)


def test_a_path_in_use_is_refused_and_one_that_was_left_is_taken(packed, tmp_path):
    path = tmp_path / "pool.sock"
    with serve_process(packed, listen=f"unix:{path}", workers=1) as server:
        with (
            pytest.raises(ServerStartError, match=f"cannot listen on unix:{path}: in use"),
            serve_process(packed, listen=f"unix:{path}", workers=1),
        ):
            raise AssertionError("two servers at one path")
        ask(server.address, packed)
        workers = [os.pidfd_open(pid) for pid in server.worker_pids().values()]
        server.process.kill()
        server.process.wait()
        for worker in workers:  # they end with it, each when it has a processor
            with os.fdopen(worker):
                assert select.select([worker], [], [], LIMIT_S)[0]
    assert path.is_symlink()
    with serve_process(packed, listen=f"unix:{path}", workers=1) as server:
        ask(server.address, packed)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_socket_of_ours_stays(packed, tmp_path):
    file, other = tmp_path / "file", tmp_path / "other.sock"
    file.write_text("mine")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(other))
        listener.listen()
        for path, why in (
            (file, "something else than a socket"),
            (other, "in use"),
            (tmp_path / ("x" * 120), "longer"),
        ):
            with (
                pytest.raises(ServerStartError, match=f"cannot listen on unix:{path}: .*{why}"),
                serve_process(packed, listen=f"unix:{path}", workers=1),
            ):
                raise AssertionError("it serves")
    assert file.read_text() == "mine"


def test_a_server_in_this_process_listens_on_a_unix_socket(packed, tmp_path):
    with running(packed, listen=f"unix:{tmp_path / 'pool.sock'}") as run:
        ask(run.address, packed)


def test_nobody_is_told_a_path_by_a_registry():
    given = {"registry": "etcd://127.0.0.1:2379", "memory": "shm", "listen": "unix:/run/pool.sock"}
    with pytest.raises(ConfigError, match="set --advertise"):
        ServerConfig(**given)
    assert ServerConfig(**given, advertise="host:1").listen == "unix:/run/pool.sock"


def refused(packed: Path, path: Path, why: str) -> None:
    with (
        pytest.raises(ServerStartError, match=re.escape(f"cannot listen on unix:{path}: {why}")),
        serve_process(packed, listen=f"unix:{path}", workers=1),
    ):
        raise AssertionError("it serves")


def test_a_server_whose_directory_goes_lives_on_and_comes_back_with_it(packed, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    with serve_process(packed, listen=f"unix:{directory / 'pool.sock'}", workers=2) as server:
        shutil.rmtree(directory)
        for pid in server.worker_pids().values():
            os.kill(pid, signal.SIGKILL)
        server.wait_for("not-reachable")
        server.wait_until(lambda lines: [line["event"] for line in lines].count("worker-died") >= 3)
        directory.mkdir()
        server.wait_until(lambda lines: [line["event"] for line in lines].count("worker-ready") == 4)
        ask(server.address, packed)
        assert len(server.said("not-reachable")) == 1
        refused(packed, directory / "pool.sock", "in use")
    assert server.process.returncode == 0
    assert list(directory.iterdir()) == []


def test_who_lost_its_link_and_its_lock_has_them_again(packed, tmp_path):
    path, lock = tmp_path / "pool.sock", tmp_path / "pool.sock.lock"
    with serve_process(packed, listen=f"unix:{path}", workers=1) as server:
        path.unlink()
        lock.unlink()
        eventually(lambda: path.is_symlink() and lock.exists(), "they are back")
        ask(server.address, packed)
        refused(packed, path, "in use")
    assert list(tmp_path.iterdir()) == []


def test_who_lives_without_its_lock_is_not_replaced(packed, tmp_path):
    path = tmp_path / "pool.sock"
    with serve_process(packed, listen=f"unix:{path}", workers=1) as server:
        with server.frozen():  # and so does not put it back
            (tmp_path / "pool.sock.lock").unlink()
            refused(packed, path, "in use")
            path.unlink()
            refused(packed, path, "in use")
        eventually(path.is_symlink, "it is back")
        ask(server.address, packed)
    assert list(tmp_path.iterdir()) == []


def test_a_link_of_others_is_no_path_for_a_server(packed, tmp_path):
    path = tmp_path / "pool.sock"
    path.symlink_to("theirs.sock")
    refused(packed, path, "a link to theirs.sock lies there")
    assert path.is_symlink()


def test_servers_of_similar_names_leave_each_other_alone(packed, tmp_path):
    theirs = tmp_path / "pool.sock.99"
    with serve_process(packed, listen=f"unix:{theirs}", workers=1) as first:
        for name in ("pool.sock", "pool.s[o]ck"):
            with serve_process(packed, listen=f"unix:{tmp_path / name}", workers=1) as second:
                ask(second.address, packed)
        ask(first.address, packed)
        with Client(first.address, "small", **PATIENCE) as client:
            assert set(client.lookup(np.array([1, 2, 3, 4], np.int32))) == {2, 9}
        assert (tmp_path / "pool.sock.99.direct").is_socket()
    assert list(tmp_path.iterdir()) == []


def test_what_lies_where_a_worker_is_to_listen_is_refused_and_stays(packed, tmp_path):
    (tmp_path / "pool.sock.1").write_text("mine")
    refused(packed, tmp_path / "pool.sock", f"something else than a socket lies at {tmp_path / 'pool.sock.1'}")
    assert (tmp_path / "pool.sock.1").read_text() == "mine"


@pytest.mark.parametrize("suffix", ["", ".direct"])
def test_a_socket_that_has_no_room_for_more_callers_is_in_use(packed, tmp_path, suffix):
    path = tmp_path / "pool.sock"
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(f"{path}{suffix}")
        listener.listen(0)
        with suppress(BlockingIOError):
            while True:
                caller = stack.enter_context(socket.socket(socket.AF_UNIX))
                caller.setblocking(False)
                caller.connect(f"{path}{suffix}")
        what = " for the direct lane: in use" if suffix else ": in use"
        with (
            pytest.raises(ServerStartError, match=re.escape(f"cannot listen on unix:{path}{suffix}{what}")),
            serve_process(packed, listen=f"unix:{path}", workers=1),
        ):
            raise AssertionError("it serves")
