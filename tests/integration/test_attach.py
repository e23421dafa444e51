"""Tables of real server processes, mapped by a client: every worker lets it, and a killed server is outlived."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import inf
from pathlib import Path

import numpy as np
import pytest

from engrampool_client.compute.served import choose
from engrampool_client.lanes import attach as attach_module
from engrampool_client.lanes.attach import AttachLane
from engrampool_client.lanes.grpc import GrpcLane
from engrampool_client.testing import serve_process
from engrampool_proto.v1 import pool_pb2
from exchanges import exchange_of
from server_fixtures import LIMIT_S, SPEC, eventually, expected, lasting_address, pack, version_of


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("attach") / "small")


class Clock:
    """The lane's clock, which a test may put ahead of the real one."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s

    perf_counter = staticmethod(time.perf_counter)


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(attach_module, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def _often_renewed(monkeypatch) -> None:
    monkeypatch.setattr(attach_module, "_RENEWALS", 4 * LIMIT_S)


@contextmanager
def attached(address: str) -> Iterator[AttachLane]:
    """A lane with longer leases than the server gives, and which waits longer for it: no test takes so long."""
    grpc_lane = GrpcLane(address)
    served = choose(grpc_lane.describe(LIMIT_S), None, None)

    def ask(_: float) -> pool_pb2.AttachResponse:
        answer = grpc_lane.attach(served.spec.name, served.version, LIMIT_S)
        answer.valid_ms = round(LIMIT_S * 1e3)
        return answer

    lane = AttachLane(ask, served)
    try:
        yield lane
    finally:
        lane.close()
        grpc_lane.close()


def right(lane: AttachLane) -> bool:
    """Whether it has every row, and each as it must be."""
    exchange = exchange_of(lane._served, {table.layer: np.arange(table.num_rows) for table in SPEC.tables})
    request = lane.ask(exchange, inf)
    if request is None or not request.receive():
        return False
    for table in SPEC.tables:
        assert exchange.delivery.rows[table.layer].tobytes() == expected(table.layer, np.arange(table.num_rows))
    return True


def test_every_worker_lets_a_client_attach(packed, tmp_path):
    with serve_process(packed, memory=f"file:{tmp_path}", workers=2) as server:

        def answers() -> list[pool_pb2.AttachResponse]:
            # The system picks the worker by the connection.
            lanes = [GrpcLane(server.address) for _ in range(12)]
            try:
                return [lane.attach("small", version_of(packed), LIMIT_S) for lane in lanes]
            finally:
                for lane in lanes:
                    lane.close()

        before = answers()
        assert all(answer == before[0] for answer in before)
        pids = server.worker_pids()
        os.kill(pids[0], signal.SIGKILL)  # one that is forked long after loading answers the same
        eventually(lambda: server.worker_pids()[0] != pids[0], "another worker")
        os.kill(pids[1], signal.SIGKILL)
        eventually(lambda: server.worker_pids()[1] != pids[1], "another worker")
        assert answers() == before
        with attached(server.address) as lane:
            assert right(lane)


def test_a_server_that_is_killed_is_outlived_for_as_long_as_the_lease(packed, tmp_path, clock):
    settings = {"memory": f"file:{tmp_path}", "workers": 1, "listen": lasting_address()}
    with serve_process(packed, **settings) as server, attached(server.address) as lane:
        assert right(lane)
        server.process.kill()
        server.process.wait(LIMIT_S)
        assert right(lane)
        for path in tmp_path.iterdir():
            path.unlink()  # as a start for other tables would
        assert right(lane)
        clock.ahead_s = LIMIT_S
        assert not lane.attached
        assert not right(lane)
        with serve_process(packed, **settings):
            eventually(lambda: right(lane), "attached to the next server's tables")


def test_a_server_of_another_version_has_nothing_for_this_client(packed, tmp_path):
    other = pack(tmp_path / "other", change=True)
    segments = tmp_path / "segments"
    segments.mkdir()
    settings = {"memory": f"file:{segments}", "workers": 1, "listen": lasting_address()}
    with serve_process(packed, **settings) as server, attached(server.address) as lane:
        assert right(lane)
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(LIMIT_S)
        with serve_process(other, **settings):
            eventually(lambda: "is not here" in lane.reason, "refused")
            assert not right(lane)


def test_shm(tmp_path):
    """In the real /dev/shm, with tables that nobody else has."""
    packed = pack(tmp_path / "own", replace(SPEC, name=f"test-{os.getpid()}-{time.time_ns()}"))
    try:
        with serve_process(packed, memory="shm", workers=1) as server, attached(server.address) as lane:
            assert right(lane)
    finally:
        for path in Path("/dev/shm").glob(f"engrampool-{os.geteuid()}-{version_of(packed)[:16]}-*"):
            path.unlink()
