"""Memory that is emulated: rows come no sooner than from it over every lane, and nobody else waits meanwhile.

Times are looked at from below only: however slow this machine is, rows come no sooner.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from direct_callers import Caller, caller
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.tiers.tier import TierError
from engrampool_proto.v1 import pool_pb2
from engrampool_server.answer.emulation import Alarms
from server_fixtures import (
    LIMIT_S,
    RawPool,
    Running,
    eventually,
    expected,
    joined,
    pack,
    refusal,
    rows_of,
    running,
    version_of,
)

IDS = np.arange(1000) * 5 % 6500
NBYTES = 264 * len(IDS)
# By any lane: one latency; a trip for each of three groups; a link that takes so long for these bytes.
SLOW = {
    "latency": ({"latency_s": 0.15, "bandwidth_gb_per_s": 10}, 0.15),
    "groups": ({"latency_s": 0.05, "bandwidth_gb_per_s": 10, "group_bytes": NBYTES // 3 + 1}, 0.15),
    "bandwidth": ({"latency_s": 0, "bandwidth_gb_per_s": 0.01}, NBYTES / 1e7),
}
NEVER = {"latency_s": 1, "bandwidth_gb_per_s": 10, "group_bytes": 1}  # minutes for a row


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("emulation") / "small")


@contextmanager
def emulating(packed: Path, directory: Path, tier: dict, **settings: object) -> Iterator[Running]:
    file = directory / "tier.json"
    file.write_text(json.dumps(tier))
    with running(packed, emulate=str(file), **settings) as run:
        yield run
        eventually(lambda: run.scrape()["engrampool_in_flight_bytes"] == 0, "nothing in flight")


@pytest.mark.parametrize("settings", [{}, {"gather_threads": 2, "event_loop": "asyncio"}], ids=["inline", "threads"])
@pytest.mark.parametrize("tier", SLOW)
def test_rows_come_no_sooner_than_from_the_tier_over_every_lane(packed, tmp_path, tier, settings, monkeypatch):
    said, least_s = SLOW[tier]
    settings = settings | {"stream_chunk_bytes": 64 << 10}
    with (
        emulating(packed, tmp_path, said, **settings) as run,
        RawPool(run.address, version_of(packed)) as pool,
        caller(run) as lane,
    ):
        asked = pool.by_ids((2, IDS))

        def over_the_lane() -> dict[int, bytes]:
            lane.ask(asked)
            return joined(lane.answer())

        def by_handle() -> dict[int, bytes]:
            with monkeypatch.context() as patch:
                patch.setattr(Caller, "by_handle", True)
                return over_the_lane()

        ways = {
            "message": lambda: rows_of(pool.lookup(asked)),
            "stream": lambda: joined(pool.stream(asked)),
            "direct": over_the_lane,
            "handle": by_handle,
        }
        for name, way in ways.items():
            begin = time.monotonic()
            assert way() == {2: expected(2, IDS)}, name
            assert time.monotonic() - begin >= least_s * 0.99, name


def test_tokens_wait_as_row_ids_do(packed, tmp_path):
    with (
        emulating(packed, tmp_path, SLOW["latency"][0]) as run,
        RawPool(run.address, version_of(packed)) as pool,
        caller(run) as lane,
    ):
        begin = time.monotonic()
        lane.ask(pool.by_tokens(TokenBatch.of(np.arange(50, dtype=np.int32))))
        assert set(joined(lane.answer())) == {2, 9}
        assert time.monotonic() - begin >= 0.15


def test_the_link_is_shared_by_all_who_ask(packed, tmp_path):
    with emulating(packed, tmp_path, SLOW["bandwidth"][0]) as run, RawPool(run.address, version_of(packed)) as pool:
        asked = pool.by_ids((2, IDS))
        with ThreadPoolExecutor(4) as threads, caller(run) as lane:
            begin = time.monotonic()
            lane.ask(asked)
            others: list[Future[bytes]] = [threads.submit(pool.lookup, asked) for _ in range(3)]
            assert joined(lane.answer()) == {2: expected(2, IDS)}
            for other in others:
                assert rows_of(other.result(LIMIT_S)) == {2: expected(2, IDS)}
            assert time.monotonic() - begin >= 4 * NBYTES / 1e7 * 0.99


def test_nobody_else_waits_and_no_core_is_busy_while_rows_are_on_their_way(packed, tmp_path):
    with (
        emulating(packed, tmp_path, NEVER) as run,
        RawPool(run.address, version_of(packed)) as pool,
        caller(run) as lane,
        caller(run) as other,
        ThreadPoolExecutor(1) as threads,
    ):
        lane.ask(pool.by_ids((2, [1])))
        waiting = threads.submit(refusal, lambda: pool.lookup(pool.by_ids((2, [1])), timeout=1.5))
        eventually(lambda: run.scrape()["engrampool_in_flight_bytes"] == 2 * 264, "both are being answered")
        busy, begin = time.process_time(), time.monotonic()
        # Without rows there is nothing to wait for: whoever asks meanwhile is answered, over either lane.
        for _ in range(3):
            assert rows_of(pool.lookup(pool.by_ids((2, [])))) == {2: b""}
            other.ask(pool.by_ids((2, [])))
            assert joined(other.answer()) == {2: b""}
        assert waiting.result(LIMIT_S)[0] == grpc.StatusCode.DEADLINE_EXCEEDED
        if (took_s := time.monotonic() - begin) > 0.5:  # one that waits by looking has all of it
            assert time.process_time() - busy < 0.7 * took_s


def test_whoever_leaves_is_waited_for_no_more_and_a_server_that_stops_does_not_wait(packed, tmp_path):
    with emulating(packed, tmp_path, NEVER, drain_s=0.1) as run, RawPool(run.address, version_of(packed)) as pool:
        asked = pool.by_ids((2, [1]))
        with caller(run) as lane:
            lane.ask(asked, timeout_us=50_000)  # its time is over before the row is there
            with pytest.raises(EOFError):
                lane.receive()
        call = pool.lookup.future(asked)
        with caller(run) as lane:
            lane.ask(asked)  # of this one nobody says when it is too late
            eventually(lambda: run.scrape()["engrampool_in_flight_bytes"] == 2 * 264, "both are being answered")
        call.cancel()
        eventually(lambda: run.scrape()["engrampool_in_flight_bytes"] == 0, "nothing of them is left")
        with caller(run) as lane:
            lane.ask(asked)
            eventually(lambda: run.scrape()["engrampool_in_flight_bytes"] == 264, "it is being answered")
            run.call(run.server.stop)


def test_an_answer_under_way_is_sent_by_a_server_that_stops(packed, tmp_path):
    with (
        emulating(packed, tmp_path, {"latency_s": 1, "bandwidth_gb_per_s": 10}, drain_s=LIMIT_S) as run,
        RawPool(run.address, version_of(packed)) as pool,
        caller(run) as lane,
    ):
        lane.ask(pool.by_ids((2, [1])))
        eventually(lambda: run.scrape()["engrampool_in_flight_bytes"] == 264, "it is being answered")
        run.call(run.server.stop)
        assert joined(lane.answer()) == {2: expected(2, [1])}


def test_tables_cannot_be_mapped_past_the_tier(packed, tmp_path):
    directory = tmp_path / "segments"
    directory.mkdir()
    with (
        emulating(packed, tmp_path, SLOW["latency"][0], memory=f"file:{directory}") as run,
        RawPool(run.address) as pool,
    ):
        call = pool.channel.unary_unary(
            "/engrampool.v1.Pool/Attach", request_serializer=pool_pb2.AttachRequest.SerializeToString
        )
        asked = pool_pb2.AttachRequest(model="small", version=version_of(packed))
        code, reason, text = refusal(lambda: call(asked, timeout=LIMIT_S))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "no-attach")
        assert "emulate" in text


def test_a_file_that_says_no_tier_ends_the_start(packed, tmp_path):
    with pytest.raises(TierError, match="bandwidth"), emulating(packed, tmp_path, {"latency_s": 1}):
        pass


def test_alarms_ring_in_the_order_that_they_are_due_and_not_for_who_left():
    async def life() -> list[int]:
        rang: list[int] = []
        alarms, now = Alarms(), time.monotonic_ns()

        async def sleeper(number: int) -> None:
            await alarms.until(now + number * 10_000_000)
            assert time.monotonic_ns() >= now + number * 10_000_000
            rang.append(number)

        tasks = [asyncio.create_task(sleeper(number)) for number in (5, 1, 3, 2, 4)]
        late = asyncio.create_task(sleeper(10**6))
        await asyncio.sleep(0)
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        alarms.close()
        with pytest.raises(asyncio.CancelledError):
            await late
        return rang

    assert asyncio.run(life()) == [1, 2, 4, 5]
