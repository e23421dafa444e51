"""The call Stats: what Prometheus is told, over gRPC; read seldom, however many ask."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from prometheus_client import CollectorRegistry, Counter

from engrampool_client.lanes.grpc import GrpcLane
from engrampool_client.testing import ServerProcess, serve_process
from engrampool_proto.v1 import pool_pb2, pool_pb2_grpc
from engrampool_server.answer import statistics
from engrampool_server.answer.statistics import Statistics
from server_fixtures import LIMIT_S, SPEC, RawPool, eventually, pack, running, scrape, version_of


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("statistics") / "small")


@pytest.fixture(scope="module")
def server(packed: Path) -> Iterator[ServerProcess]:
    with serve_process(packed, workers=2) as server:
        yield server


def stats(address: str) -> dict[str, float]:
    """As `scrape`, over gRPC."""
    with grpc.insecure_channel(address) as channel:
        answer = pool_pb2_grpc.PoolStub(channel).Stats(pool_pb2.StatsRequest(), timeout=LIMIT_S)
    found = {}
    for sample in answer.samples:
        labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
        found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    assert len(found) == len(answer.samples)
    return found


def test_it_has_what_prometheus_has_of_all_processes(server, packed):
    with RawPool(server.address, version_of(packed)) as pool:
        for _ in range(5):
            pool.lookup(pool.by_ids((2, [1, 2])))
    rows = 'engrampool_lookup_rows_total{layer="2",model="small"}'
    eventually(lambda: scrape(server.metrics_address).get(rows) == 10, "they are counted")
    eventually(lambda: stats(server.address).get(rows) == 10, "whichever worker is asked")
    told, asked = scrape(server.metrics_address), stats(server.address)
    # Calls of Stats are counted as they end.
    assert {name for name in told if '"Stats"' not in name} == {name for name in asked if '"Stats"' not in name}
    assert asked["engrampool_workers"] == 2
    assert asked["process_resident_memory_bytes"] > 0
    same = {name for name in told if name.startswith(("engrampool_table", "engrampool_lookup", "engrampool_part"))}
    assert {name: told[name] for name in same} == {name: asked[name] for name in same}


def test_a_server_that_still_loads_answers(packed):
    with running(packed, load=False) as run:
        lane = GrpcLane(run.address)
        found = {sample.name: sample.value for sample in lane.stats(LIMIT_S).samples}
        assert found["engrampool_in_flight_bytes"] == 0
        run.load()
        found = eventually(
            lambda: {
                dict(sample.labels)["layer"]: sample.value
                for sample in lane.stats(LIMIT_S).samples
                if sample.name == "engrampool_table_rows"
            },
            "it has tables",
        )
        assert found == {str(table.layer): table.num_rows for table in SPEC.tables}
        lane.close()


class Reading:
    """Counts its readings, and holds them up. fails: how many of the next raise."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._count, self.fails = Counter("readings", "", registry=self.registry), 0
        self.begun, self.go_on = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self):
        self.begun.release()
        self.go_on.acquire()
        self._count.inc()
        if self.fails:
            self.fails -= 1
            raise OSError("no memory")
        return self.registry.collect()

    @staticmethod
    def of(answer: bytes) -> float:
        return next(
            one.value for one in pool_pb2.StatsResponse.FromString(answer).samples if one.name == "readings_total"
        )


def test_many_that_ask_at_once_and_soon_after_have_one_reading(monkeypatch):
    reading = Reading()

    async def ask() -> None:
        with ThreadPoolExecutor(1) as threads:
            statistics_ = Statistics(reading, threads)
            asking = [asyncio.create_task(statistics_.answer()) for _ in range(20)]
            await asyncio.to_thread(reading.begun.acquire)
            asking[0].cancel()  # whoever began it is gone: the others have it all the same
            reading.go_on.release()
            answers = await asyncio.gather(*asking, return_exceptions=True)
            assert isinstance(answers[0], asyncio.CancelledError)
            assert {reading.of(answer) for answer in answers[1:]} == {1}
            assert reading.of(await statistics_.answer()) == 1  # within EVERY_S, which no machine stands still for
            monkeypatch.setattr(statistics, "EVERY_S", 0.0)
            reading.go_on.release()
            assert reading.of(await statistics_.answer()) == 2

    monkeypatch.setattr(statistics, "EVERY_S", 2 * LIMIT_S)
    asyncio.run(ask())


def test_a_reading_that_fails_is_tried_again(monkeypatch):
    reading = Reading()
    reading.fails = 1

    async def ask() -> None:
        with ThreadPoolExecutor(1) as threads:
            statistics_ = Statistics(reading, threads)
            reading.go_on.release(2)
            with pytest.raises(OSError, match="no memory"):
                await statistics_.answer()
            assert reading.of(await statistics_.answer()) == 2

    monkeypatch.setattr(statistics, "EVERY_S", 0.0)
    asyncio.run(ask())
