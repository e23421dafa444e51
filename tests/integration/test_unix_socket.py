"""A server whose `listen` is a Unix socket: all that it does on a port, at one path that outlives its workers."""

import os
import signal
import socket
from pathlib import Path

import numpy as np
import pytest

from engrampool_client import Client
from engrampool_client.testing import ServerStartError, serve_process
from engrampool_server.config import ConfigError, ServerConfig
from server_fixtures import LIMIT_S, RawPool, eventually, expected, pack, rows_of, running, scrape, version_of


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
        with Client(server.address, "small") as client:
            rows = client.lookup(np.array([1, 2, 3, 4], np.int32))
            assert set(rows) == {2, 9}
        counted = 'engrampool_direct_lookups_total{code="OK"}'
        if direct != "off":
            eventually(lambda: scrape(server.metrics_address).get(counted), "the direct lane answered")
        ask(server.address, packed)
    assert server.process.returncode == 0
    assert list(tmp_path.iterdir()) == []


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
        server.process.kill()
        server.process.wait()
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
