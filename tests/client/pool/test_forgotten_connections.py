"""Connections that were forgotten on the way without a word are noticed within seconds, and replaced."""

import asyncio
import sys
import time
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from engrampool_client import AsyncClient, Client, DeadlineError, PoolError, UnavailableError
from engrampool_client.testing import serve_process
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.synthetic import synthetic_rows
from engrampool_proto.v1 import pool_pb2, pool_pb2_grpc
from forgetful_proxy import Proxy, proxy
from server_fixtures import LIMIT_S, eventually, serve_thread

TOKENS = np.arange(20, dtype=np.int32)
LANES = ["off", "auto"]
# Far more than it takes: whoever never recovers is told apart from a machine that is busy.
RECOVERED_S = 60


@pytest.fixture(scope="module")
def ports(packed) -> Iterator[list[tuple[int, int]]]:
    """Those of each of two servers."""
    with serve_process(packed, workers=1) as one, serve_process(packed, workers=1) as other:
        yield [ports_of(server.address) for server in (one, other)]


def ports_of(address: str) -> tuple[int, int]:
    """Of gRPC and of the direct lane."""
    with grpc.insecure_channel(address) as channel:
        way_in = pool_pb2_grpc.PoolStub(channel).OpenDirect(pool_pb2.OpenDirectRequest(), timeout=LIMIT_S)
    return int(address.rpartition(":")[2]), way_in.port


@pytest.fixture
def way(ports) -> Iterator[Proxy]:
    with proxy(*ports[0]) as made:
        yield made


def check(client: Client | AsyncClient, rows: dict[int, np.ndarray], tokens: np.ndarray = TOKENS) -> None:
    for layer, ids in client.spec.hash(TokenBatch.of(tokens)).items():
        assert np.array_equal(rows[layer], synthetic_rows(client.spec.table(layer), ids))


def until_answered(client: Client, tokens: np.ndarray = TOKENS, timeout_s: float | None = None) -> int:
    """Look up until that is answered; gives how many lookups were not."""
    until, failed = time.monotonic() + RECOVERED_S, 0
    while True:
        try:
            rows = client.lookup(tokens, timeout_s=timeout_s)
            break
        except (DeadlineError, UnavailableError):
            failed += 1
            time.sleep(0.005)
            assert time.monotonic() < until, "it never recovers"
    check(client, rows, tokens)
    return failed


@pytest.mark.parametrize("direct", LANES)
@pytest.mark.parametrize("breaker_failures", [0, 3, 1000])
def test_steps_with_little_time_are_answered_again(way, direct, breaker_failures):
    settings = {"direct": direct, "breaker_failures": breaker_failures, "attach": "off", "timeout_s": 0.2}
    with Client(way.address, **settings) as client:
        until_answered(client)
        way.forget()
        until_answered(client)
        assert way.asked > 1
        until = time.monotonic() + RECOVERED_S
        while client.direct != (direct == "auto") or client.servers_in_trouble:
            until_answered(client)
            time.sleep(0.005)
            assert time.monotonic() < until


@pytest.mark.parametrize("direct", LANES)
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_a_step_with_much_time_has_its_rows_long_before_its_deadline(way, direct, large):
    tokens = np.arange(2000 if large else 20, dtype=np.int32)  # 25 MB, in pieces and over both connections
    with Client(way.address, direct=direct, attach="off", connections=2, timeout_s=3600.0) as client:
        check(client, client.lookup(tokens), tokens)
        way.forget()
        step = client.prefetch(tokens)
        step.wait(RECOVERED_S)
        check(client, {layer: step.rows(layer) for layer in step.layers}, tokens)


def test_connections_that_are_idle_are_not_trusted_either_once_one_was_lost(way):
    with Client(way.address, direct="auto", attach="off", timeout_s=3600.0) as client:
        lane = client._shards._sets[0].replicas[0]._native
        eventually(lambda: lane._connect() or len(lane._open) == 3, "three are open")
        lost = set(lane._open)
        way.forget()
        step = client.prefetch(TOKENS)
        step.wait(RECOVERED_S)
        assert not lost & set(lane._open)


@pytest.mark.parametrize("direct", LANES)
def test_asyncio_clients_too(way, direct):
    async def recovers() -> None:
        client = await AsyncClient.connect(way.address, direct=direct, attach="off", timeout_s=0.2)
        async with client:
            await client.lookup(TOKENS, timeout_s=LIMIT_S)
            way.forget()
            until = time.monotonic() + RECOVERED_S
            while True:
                try:
                    rows = await client.lookup(TOKENS)
                    break
                except PoolError:
                    assert time.monotonic() < until, "it never recovers"
            check(client, rows)

    asyncio.run(recovers())


def test_a_client_that_is_made_meanwhile_connects(way):
    """Its first connection is made, and forgotten at once."""
    way.cut_next = 1
    with Client(way.address, attach="off", connect_timeout_s=RECOVERED_S) as client:
        check(client, client.lookup(TOKENS))


def test_attached_memory_stays_attached(packed, monkeypatch):
    lease_s = 2.0
    monkeypatch.setattr("engrampool_server.answer.pool_service._ATTACH_VALID_S", lease_s)
    monkeypatch.setattr("engrampool_client.lanes.attach._ASK_TIMEOUT_S", 0.4)
    with (
        serve_thread(packed, memory="shm") as address,
        proxy(*ports_of(address)) as way,
        Client(way.address, timeout_s=LIMIT_S) as client,
    ):
        lane = client._shards._sets[0].replicas[0]._attach
        before = eventually(lane._current, "it is attached").until
        way.forget()
        asked = way.asked
        until = time.monotonic() + RECOVERED_S
        while (lease := lane._current()) is None or lease.until < before + 2 * lease_s:
            assert time.monotonic() < until, "its control path is lost"
            check(client, client.lookup(TOKENS))
            time.sleep(0.005)
        assert way.asked > asked


@pytest.mark.parametrize("direct", LANES)
def test_a_replica_that_is_gone_for_good_is_counted_and_used_again_once_it_is_back(ports, direct):
    with (
        proxy(*ports[0]) as gone,
        proxy(*ports[1]) as kept,
        Client([gone.address, kept.address], direct=direct, attach="off") as client,
    ):

        def look_up_until(in_trouble: set[str]) -> None:
            until = time.monotonic() + RECOVERED_S
            while set(client.servers_in_trouble) != in_trouble:
                check(client, client.lookup(TOKENS))  # none fails meanwhile
                assert time.monotonic() < until, client.servers_in_trouble

        look_up_until(set())
        for _ in range(200):  # until it is known when an answer is late
            client.lookup(TOKENS)
        gone.cut_next = sys.maxsize
        gone.forget()
        look_up_until({gone.address})
        assert all(client.servers_in_trouble.values())
        gone.cut_next = 0
        look_up_until(set())


def test_small_lookups_alone_open_the_lane_of_a_replica_again(ports):
    with Client([f"127.0.0.1:{grpc_port}" for grpc_port, _ in ports], attach="off") as client:
        lane = client._shards._sets[0].replicas[0]._native
        check(client, client.lookup(TOKENS))
        lane._not_before = time.monotonic() + 0.05  # as after a server that was not there
        for connection in list(lane._open):
            lane.drop(connection)
        lane._idle.clear()
        until = time.monotonic() + RECOVERED_S
        while not lane.open:
            check(client, client.lookup(TOKENS))
            assert time.monotonic() < until, "the lane stays closed"
