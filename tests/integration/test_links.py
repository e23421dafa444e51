"""A model on hosts of a network, each shard on two, while links are cut, slow and lossy.

No process ends, no connection is refused or reset: packets do not come. `pytest -s` shows what a cut costs, and for how
long after it is mended.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain

import pytest

from cluster_load import Load, loads
from engrampool_client.testing import serve_process
from network import Host, NotPermittedError, network
from server_fixtures import lacking
from small_model import small_spec, write_model

pytestmark = pytest.mark.timeout(400)

SHARDS = 2
TIMEOUT_S = 10.0  # of lookups: the machine may stand still for some of it
LIMIT_S = 150


class Pool:
    """servers: the hosts of each shard's replicas. clients: on one host, under load; see `loads`."""

    def __init__(self, servers: list[list[Host]], clients: list[Load]) -> None:
        self.servers, self.clients = servers, clients

    def answered(self, lookups: int) -> None:
        """Wait until every client has had so many more answers."""
        for client in self.clients:
            client.answered(lookups)

    def used(self, *hosts: Host) -> None:
        """Wait until each of these servers has sent some rows more."""
        for host in hosts:
            until, limit = host.sent_bytes + 500_000, time.monotonic() + LIMIT_S
            while host.sent_bytes < until:
                self.answered(1)
                assert time.monotonic() < limit, f"{host.address} is not used again"

    def failed(self) -> list["Counter[str]"]:
        """Of each client so far: what lookups failed with, and how often."""
        return [Counter(client.said["failed"]) for client in self.clients]


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> Iterator[Pool]:
    packed = write_model(tmp_path_factory.mktemp("models") / "small", small_spec())
    with ExitStack() as stack:
        try:
            here, *hosts = stack.enter_context(network(1 + 2 * SHARDS))
        except NotPermittedError as error:
            lacking(f"no network of namespaces: {error}")
        servers = []
        for number, host in enumerate(hosts):
            settings = {"listen": f"{host.address}:50051", "shard": f"{number % SHARDS}/{SHARDS}", "workers": 1}
            serving = serve_process(packed, ready=False, prefix=host.prefix, metrics="off", **settings)
            servers.append(stack.enter_context(serving))
        addresses = [server.wait_for("serving")["listen"] for server in servers]
        clients = stack.enter_context(loads(addresses, here.prefix, TIMEOUT_S))
        yield Pool([hosts[shard::SHARDS] for shard in range(SHARDS)], clients)
        for client in clients:
            assert client.end()["wrong"] == 0


@pytest.fixture
def pool(started) -> Iterator[Pool]:
    """With links that are well, before and after."""
    for client in started.clients:
        client.go_on()
        client.slowest_s = 0.0
    yield started
    for host in chain(*started.servers):
        host.cut, host.delay_s, host.loss = False, 0.0, 0.0


def test_a_replica_behind_a_cut_link_fails_no_step_and_is_used_again(pool):
    host, before = pool.servers[0][0], pool.failed()
    host.cut = True
    pool.answered(20)
    slowest = [client.slowest_s for client in pool.clients]
    host.cut = False
    begin = time.monotonic()
    pool.used(host)
    print(f"cut: slowest lookups {slowest} s; used again after {time.monotonic() - begin:.2f} s")
    assert pool.failed() == before


def test_a_replica_whose_connections_were_forgotten_is_used_again(pool):
    host, before = pool.servers[0][1], pool.failed()
    host.forget()
    begin = time.monotonic()
    pool.used(host)
    print(f"forgotten: used again after {time.monotonic() - begin:.2f} s")
    assert pool.failed() == before


def test_a_shard_whose_connections_were_all_forgotten_answers_again(pool):
    hosts, before = pool.servers[1], pool.failed()
    for host in hosts:
        host.forget()
    begin = time.monotonic()
    pool.used(*hosts)
    print(f"all forgotten: all used again after {time.monotonic() - begin:.2f} s")
    for now, then in zip(pool.failed(), before, strict=True):
        assert all(text.startswith(("DeadlineError", "UnavailableError")) for text in now - then)


@pytest.mark.parametrize(("delay_s", "loss"), [(0.015, 0.0), (0.0, 0.2)], ids=["delay", "loss"])
def test_a_replica_behind_a_poor_link_fails_no_step(pool, delay_s, loss):
    host, before = pool.servers[1][1], pool.failed()
    host.delay_s, host.loss = delay_s, loss
    pool.answered(20)
    print(f"delay {delay_s} s, loss {loss}: slowest lookups {[client.slowest_s for client in pool.clients]} s")
    assert pool.failed() == before


def test_without_any_replica_steps_fail_by_their_deadline_and_the_client_recovers(pool):
    hosts, before = pool.servers[0], pool.failed()
    for host in hosts:
        host.cut = True
    for client, then in zip(pool.clients, before, strict=True):
        client.wait_for(lambda said, then=then: Counter(said["failed"]) > then)
    assert max(client.slowest_s for client in pool.clients) < 2 * TIMEOUT_S
    for host in hosts:
        host.cut = False
    begin = time.monotonic()
    pool.answered(1)
    print(f"cut from all: answered again after {time.monotonic() - begin:.2f} s", end=", ")
    pool.used(*hosts)
    print(f"all used again after {time.monotonic() - begin:.2f} s")
    for now, then in zip(pool.failed(), before, strict=True):
        assert all(text.startswith(("DeadlineError", "UnavailableError")) for text in now - then)
