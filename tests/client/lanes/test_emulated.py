"""Attached memory that is emulated: no sooner than the tier, never past it, and given up when it is."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from engrampool_client import Client, DeadlineError, SpecError, UnavailableError
from engrampool_client.lanes.attach import AttachLane
from engrampool_proto.tiers.link import EmulatedLink
from engrampool_proto.tiers.tier import Tier
from server_fixtures import LIMIT_S, Running, eventually, expected, pack, running

pytestmark = pytest.mark.usefixtures("patient")
IDS = {2: np.arange(500, dtype=np.uint32)}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return pack(tmp_path_factory.mktemp("emulated") / "small")


@pytest.fixture(scope="module")
def server(packed, tmp_path_factory) -> Iterator[Running]:
    with running(packed, memory=f"file:{tmp_path_factory.mktemp('segments')}") as run:
        yield run


@pytest.fixture
def tier(tmp_path):
    def write(**said: float) -> str:
        path = tmp_path / "tier.json"
        path.write_text(json.dumps({"latency_s": 0.0, "bandwidth_gb_per_s": 10} | said))
        return str(path)

    return write


def test_rows_come_no_sooner_than_from_the_tier(server, tier):
    with Client(server.address, emulate=tier(latency_s=0.15)) as pool:
        assert pool.attached
        assert pool.status()["lane"] == "attached"
        begin = time.monotonic()
        step = pool.prefetch_rows(IDS)
        assert step.rows(2).tobytes() == expected(2, IDS[2])
        assert time.monotonic() - begin >= 0.149
        assert step.times.gather_us >= 149_000
        assert pool.stats.bytes["attached"] == 500 * 264


def test_the_link_is_one_for_all_lookups_of_a_client(server, tier):
    with Client(server.address, emulate=tier(bandwidth_gb_per_s=0.01)) as pool, ThreadPoolExecutor(3) as threads:
        begin = time.monotonic()
        found = list(threads.map(lambda _: pool.lookup_rows(IDS)[2].tobytes(), range(3)))
        assert found == [expected(2, IDS[2])] * 3
        assert time.monotonic() - begin >= 3 * 500 * 264 / 1e7 * 0.99


def test_a_step_ends_by_its_deadline_and_so_does_who_waits_for_the_tier(server, tier):
    with Client(server.address, emulate=tier(latency_s=1, group_bytes=1), max_steps=1) as pool:
        step = pool.prefetch_rows(IDS, timeout_s=0.1)
        with pytest.raises(DeadlineError):
            step.rows(2)
        begin = time.monotonic()
        with pytest.raises(DeadlineError):  # the one place that there is for lookups was free again
            pool.lookup_rows(IDS, timeout_s=0.1)
        assert time.monotonic() - begin < LIMIT_S


def test_a_server_whose_tables_cannot_be_mapped_is_refused(packed, tier):
    with running(packed) as run:
        before = threading.active_count()
        with pytest.raises(SpecError, match=r"emulate needs memory that is attached.*no tables that a client can map"):
            Client(run.address, emulate=tier())
        eventually(lambda: threading.active_count() <= before, "nothing is left of the client")


def test_no_other_lane_is_taken_once_the_server_takes_its_memory_back(server, tier, monkeypatch):
    with Client(server.address, emulate=tier(), retry_s=0, breaker_failures=0) as pool:
        assert pool.lookup_rows(IDS)[2].tobytes() == expected(2, IDS[2])
        monkeypatch.setattr(AttachLane, "_current", lambda lane: None)
        with pytest.raises(UnavailableError, match="emulate: not attached now"):
            pool.lookup_rows(IDS)
        assert pool.stats.bytes["wire"] == 0


@pytest.mark.parametrize("settings", [{"attach": "off"}, {"hashing": "server"}])
def test_it_is_of_attached_memory_alone(settings):
    with pytest.raises(ValueError, match="emulate is of attached memory"):
        Client("127.0.0.1:1", emulate="cxl-direct", **settings)


def test_several_threads_read_as_many_groups_at_a_time():
    tier = Tier(name="any", latency_ns=10_000_000, group_bytes=100, bytes_per_s=10**12)
    for cores, least_s in ((1, 0.1), (4, 0.03)):
        begin = time.monotonic()
        EmulatedLink(tier).read(1000, begin + LIMIT_S).wait(1000, begin, cores)
        assert time.monotonic() - begin >= least_s
    assert tier.alone_s(1000, 4) == pytest.approx(0.03)
