"""Limits by caller at real servers: what one has had, over any lane and in any process, is none of another's."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from certificates import bearer, write_callers
from direct_callers import greeted
from engrampool_client import Client, OverloadedError, RejectedError
from engrampool_client.testing import ServerProcess, serve_process
from engrampool_proto import frames
from engrampool_proto.v1 import pool_pb2, pool_pb2_grpc
from server_fixtures import LIMIT_S, PATIENCE, eventually, expected, pack

IDS = np.arange(1000)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("models") / "small")


@contextmanager
def serving(packed, path: Path, *callers: dict[str, Any], **settings: Any) -> Iterator[ServerProcess]:
    write_callers(path, *callers)
    with serve_process(packed, **{"workers": 2, **settings}, tokens=path) as server:
        yield server


def rows(pool: Client, ids=IDS) -> bool:
    return pool.lookup_rows({2: ids})[2].tobytes() == expected(2, ids)


def refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except OverloadedError as error:
        if error.reason != "caller-rate":
            raise
        return True
    return False


@pytest.mark.parametrize("direct", ["auto", "off"])
def test_a_caller_that_had_its_rows_waits_and_no_other_does(packed, tmp_path, direct):
    # A thousand rows take a day of it.
    slow, other = {"name": "slow", "token": "slow", "max_rows_per_s": 1}, {"name": "other", "token": "other"}
    with (
        serving(packed, tmp_path / "callers", slow, other) as server,
        Client(server.address, token="slow", direct=direct, **PATIENCE) as first,
        Client(server.address, token="slow", direct="off", **PATIENCE) as second,
        Client(server.address, token="other", direct=direct, **PATIENCE) as free,
    ):
        assert rows(first)  # however many, if it is its turn
        assert first.status()["lane"] == ("direct" if direct == "auto" else "grpc")
        with pytest.raises(OverloadedError, match=r"slow asks for more than the 1 rows a second .* try again in"):
            rows(first, IDS[:1])
        assert refused(lambda: rows(second, IDS[:1]))
        assert all(rows(free) for _ in range(20))


def test_a_greedy_caller_takes_nothing_of_anothers(packed, tmp_path):
    greedy, other = {"name": "greedy", "token": "greedy", "max_rows_per_s": 1000}, {"name": "other", "token": "other"}
    over, answers, failed = threading.Event(), [], []

    def ask(pool: Client) -> None:
        while not over.is_set():
            answers.append(refused(lambda: rows(pool)))

    with serving(packed, tmp_path / "callers", greedy, other) as server, ExitStack() as stack:
        pools = [stack.enter_context(Client(server.address, token="greedy", **PATIENCE)) for _ in range(4)]
        threads = [threading.Thread(target=ask, args=(pool,)) for pool in pools]
        for thread in threads:
            thread.start()
        try:
            with Client(server.address, token="other", **PATIENCE) as pool:
                for _ in range(200):
                    try:
                        assert rows(pool)
                    except OverloadedError as error:
                        failed.append(error)
                eventually(lambda: True in answers)
        finally:
            over.set()
            for thread in threads:
                thread.join()
    assert failed == []


def test_limits_that_change_hold_for_connections_that_are_open(packed, tmp_path):
    path, unbound = tmp_path / "callers", {"name": "a", "token": "a"}
    with serving(packed, path, unbound) as server, Client(server.address, token="a", **PATIENCE) as pool:
        assert all(rows(pool) for _ in range(5))
        assert pool.status()["lane"] == "direct"
        write_callers(path, {**unbound, "max_rows_per_s": 1})
        eventually(lambda: refused(lambda: rows(pool)))
        # Its connection was kept.
        assert pool.status()["lane"] == "direct"
        write_callers(path, unbound)
        eventually(lambda: not refused(lambda: rows(pool)))


@pytest.mark.parametrize("direct", ["auto", "off"])
def test_bytes_in_flight_of_a_caller(packed, tmp_path, direct):
    few, other = {"name": "few", "token": "few", "max_in_flight_bytes": 1024}, {"name": "other", "token": "other"}
    with serving(packed, tmp_path / "callers", few, other) as server:
        with Client(server.address, token="few", direct=direct, **PATIENCE) as pool:
            assert rows(pool, IDS[:3])
            with pytest.raises(RejectedError, match="one caller may have 1024 at most"):
                rows(pool)
        with Client(server.address, token="other", direct=direct, **PATIENCE) as pool:
            assert rows(pool)


def ticket(channel: grpc.Channel, token: str) -> pool_pb2.OpenDirectResponse:
    stub = pool_pb2_grpc.PoolStub(channel)
    return stub.OpenDirect(pool_pb2.OpenDirectRequest(), timeout=LIMIT_S, metadata=bearer(token))


def connected(channel: grpc.Channel, token: str) -> socket.socket | None:
    """A connection of the direct lane, None if it was not let in."""
    way_in = ticket(channel, token)
    lane = socket.create_connection(("127.0.0.1", way_in.port), LIMIT_S)
    lane.sendall(frames.frame(frames.HELLO, way_in.ticket))
    if frames.HEADER.unpack(lane.recv(frames.HEADER.size, socket.MSG_WAITALL))[0] != frames.READY:
        lane.close()
        return None
    return lane


def test_what_a_caller_had_stays_its_own_when_its_token_becomes_anothers(packed, tmp_path):
    path, one = tmp_path / "callers", {"token": "t", "max_connections": 1}
    with (
        serving(packed, path, {"name": "first", **one}, workers=1) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        for name in ("second", "first"):
            with eventually(lambda: connected(channel, "t")) as lane:
                write_callers(path, {"name": name, **one})
                # It was counted for the caller of before, so it ends.
                assert lane.recv(1) == b""
        with eventually(lambda: connected(channel, "t")):
            assert greeted(ticket(channel, "t")) == frames.REFUSED


def test_connections_of_a_caller_are_bounded_in_all_workers(packed, tmp_path):
    few, other = {"name": "few", "token": "few", "max_connections": 2}, {"name": "other", "token": "other"}
    with (
        serving(packed, tmp_path / "callers", few, other) as server,
        grpc.insecure_channel(server.address) as channel,
        ExitStack() as stack,
    ):
        open_ones = [stack.enter_context(connected(channel, "few")) for _ in range(2)]
        assert greeted(ticket(channel, "few")) == frames.REFUSED
        assert greeted(ticket(channel, "other")) == frames.READY
        open_ones.pop().close()
        stack.enter_context(eventually(lambda: connected(channel, "few")))
        # A client of ours goes over gRPC then.
        with Client(server.address, token="few", **PATIENCE) as pool:
            assert (rows(pool), pool.status()["lane"]) == (True, "grpc")
