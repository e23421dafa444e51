"""Clients that go by a registry: the version that is active, wherever it is held, and never two in one answer."""

import asyncio
import math
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from engrampool_client import AsyncClient, Client, UnavailableError, UnknownModelError, UnknownVersionError
from engrampool_client.metrics import register
from engrampool_proto import __version__
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.registry.etcd import Held, Member, Published, Registry
from engrampool_proto.spec import ModelSpec
from engrampool_proto.synthetic import synthetic_rows
from etcd_process import EtcdProcess, running_etcd
from server_fixtures import (
    LIMIT_S,
    SPEC,
    VOCAB,
    GatherGate,
    eventually,
    lasting_address,
    pack,
    serve_thread,
    version_of,
)

pytestmark = pytest.mark.usefixtures("patient", "time_to_connect")
TOKENS = np.arange(300, dtype=np.int32) % 250
ROWS = {table.layer: table.num_rows for table in SPEC.tables}
NUMBERS = count()


class Pool:
    """A pool of its own in the registry, where the test does what servers and operators do."""

    def __init__(self, etcd: EtcdProcess) -> None:
        self.url = etcd.url(f"pool{next(NUMBERS)}")
        self.registry = Registry(self.url, timeout_s=LIMIT_S)

    def hold(self, address: str, *versions: str, model: str = "small") -> Registry:
        """Register a server that says it holds all rows of these versions."""
        member = Registry(self.url, timeout_s=LIMIT_S)
        parts = {layer: (0, rows) for layer, rows in ROWS.items()}
        member.join(Member(address, tuple(Held(model, version, parts) for version in versions)), ttl_s=600)
        for version in versions:
            self.registry.publish(Published(model, version, "/", None, SPEC.digest, ROWS))
        return member

    def activate(self, version: str, model: str = "small", **how: bool) -> None:
        self.registry.activate(model, version, **how)


def threads() -> list[str]:
    """Of clients, and not of servers."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("engrampool-")]


@pytest.fixture
def time_to_connect(monkeypatch) -> None:
    """A version whose servers are slow is followed, and not tried again."""
    monkeypatch.setattr("engrampool_client.pool.follower._CONNECT_S", LIMIT_S)


class Versions:
    """Two versions of one specification, of which every row differs: first and second, by name."""

    def __init__(self, directory) -> None:
        self.paths = [pack(directory / "first"), pack(directory / "second", change=True)]
        self.names = self.first, self.second = [version_of(path) for path in self.paths]

    def rows(self, tokens=TOKENS, layers=(2, 9)) -> dict[str, dict[int, np.ndarray]]:
        """{version: {layer: rows}}, by the formula."""
        found = {}
        for number, version in enumerate(self.names):
            found[version] = {}
            for layer, ids in SPEC.hash(TokenBatch.of(tokens), layers).items():
                rows = found[version][layer] = synthetic_rows(SPEC.table(layer), ids)
                rows[..., -1] ^= number
        return found

    def of(self, answer: dict[int, np.ndarray], wanted: dict[str, dict[int, np.ndarray]]) -> str:
        """The one version that the whole answer is of."""
        for version, expected in wanted.items():
            if all(np.array_equal(answer[layer], rows) for layer, rows in expected.items()):
                return version
        raise AssertionError("rows of two versions, or of none")


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> Versions:
    return Versions(tmp_path_factory.mktemp("versions"))


@pytest.fixture(scope="module")
def server(versions) -> Iterator[str]:
    with serve_thread(*versions.paths, gather_threads=2) as address:
        yield address


@pytest.fixture(scope="module")
def etcd(tmp_path_factory) -> Iterator[EtcdProcess]:
    with running_etcd(tmp_path_factory.mktemp("etcd")) as etcd:
        yield etcd


@pytest.fixture
def pool(etcd, server, versions) -> Pool:
    """Both versions are held, the first is active."""
    pool = Pool(etcd)
    pool.hold(server, *versions.names)
    pool.activate(versions.first)
    return pool


def test_every_answer_is_of_one_version_while_they_change(pool, versions):
    wanted = versions.rows()
    few = versions.rows(TOKENS[:5])
    seen: Counter[str] = Counter()
    over = threading.Event()
    errors = []

    def steps(client: Client) -> None:
        try:
            while not over.is_set():
                step = client.prefetch(TOKENS[:5], lookback=np.full((1, 3), -1, np.int32))
                step.hint([[7, 8]])
                seen[versions.of({layer: step.rows(layer) for layer in step.layers}, few)] += 1
                step = client.amend(client.prefetch(TOKENS[::-1]), TOKENS)
                seen[versions.of({layer: step.rows(layer) for layer in step.layers}, wanted)] += 1
        except BaseException as error:
            errors.append(error)

    def lookups(client: Client) -> None:
        try:
            while not over.is_set():
                seen[versions.of(client.lookup(TOKENS), wanted)] += 1
        except BaseException as error:
            errors.append(error)

    with Client(pool.url, cache_bytes=1 << 20, timeout_s=60.0) as client:
        readers = [threading.Thread(target=read, args=(client,)) for read in (steps, lookups)]
        for reader in readers:
            reader.start()
        try:
            for number in range(8):
                version = versions.names[(number + 1) % 2]
                pool.activate(version)
                eventually(lambda version=version: client.version == version or errors, "it follows")
                before = seen[version]
                eventually(lambda version=version, before=before: seen[version] > before + 4 or errors, "it is read")
        finally:
            over.set()
            for reader in readers:
                reader.join()
        assert not errors
        assert client.version_changes == {"followed": 8, "failed": 0, "refused": 0}
        # What belonged to old generations is given back.
        eventually(lambda: not client.status()["registry"]["ending"])
        eventually(lambda: threads().count("engrampool-shards") == 1, "its threads, too")
        assert client.stats.steps["failed"] == 0
    eventually(lambda: not threads(), "its threads have ended")  # others' may end a little later


def test_lookups_under_way_end_by_the_version_they_began_with(pool, versions, monkeypatch):
    gate = GatherGate(monkeypatch)
    with Client(pool.url, cache_bytes=1 << 20, timeout_s=60.0) as client:
        old_cache = client.cache
        step = client.prefetch(TOKENS)
        gate.wait_begun(1)
        few = versions.rows(TOKENS[:5])
        for version in (versions.second, versions.first, versions.second):
            pool.activate(version)
            eventually(lambda version=version: client.version == version)
            assert versions.of(client.lookup(TOKENS[:5]), few) == version
        # A step may be amended whose version is not that of now.
        amended = client.amend(step, TOKENS[:5])
        eventually(lambda: client.status()["registry"]["ending"] == [versions.first], "others have ended")
        gate.open.set()
        assert versions.of({layer: step.rows(layer) for layer in step.layers}, versions.rows()) == versions.first
        assert versions.of({layer: amended.rows(layer) for layer in step.layers}, few) == versions.second
        eventually(lambda: not client.status()["registry"]["ending"])
        assert old_cache.filled
        assert client.cache is not old_cache
    eventually(lambda: not threads(), "its threads have ended")  # others' may end a little later


def test_lookups_go_on_without_the_registry_and_follow_once_it_is_back(pool, versions, etcd):
    registry = CollectorRegistry()
    with serve_thread(versions.paths[0]) as alone, Client(pool.url) as client, Client([alone]) as unregistered:
        register(client, registry=registry)
        name = "engrampool_client_registry_age_seconds"
        assert registry.get_sample_value(name, {"model": "small"}) < LIMIT_S
        etcd.stop()
        try:
            age_s = client.registry_age_s
            # With the registry away, a client begins by servers that it is told of.
            late = Client([pool.url, alone])
            with pytest.raises(UnavailableError, match="no registry was there"):
                Client(pool.url, connect_timeout_s=0.1)
            for one in (client, late):
                assert versions.of(one.lookup(TOKENS), versions.rows()) == versions.first
            assert client.registry_age_s > age_s
            assert late.registry_age_s == math.inf
        finally:
            etcd.start()
        with late:
            pool.activate(versions.second)
            for one in (client, late):
                eventually(lambda one=one: one.version == versions.second)
                assert versions.of(one.lookup(TOKENS), versions.rows()) == versions.second
        info = {"model": "small", "version": versions.second, "spec_digest": SPEC.digest, "client_version": __version__}
        assert registry.get_sample_value("engrampool_client_info", info) == 1
        assert registry.get_sample_value(name, {"model": "small"}) < LIMIT_S
        followed = {"model": "small", "outcome": "followed"}
        name_of_changes = "engrampool_client_version_changes_total"
        eventually(lambda: registry.get_sample_value(name_of_changes, followed) == 1, "it is counted")
        assert unregistered.registry_age_s is None


def test_a_client_stays_by_its_version_where_it_cannot_or_must_not_follow(pool, versions, server, tmp_path, caplog):
    other = pack(tmp_path / "other", replace(SPEC, vocab_size=VOCAB, token_map=None))
    with Client(pool.url) as client, Client(pool.url, version=versions.first) as pinned, serve_thread(other) as away:
        changes = client.version_changes
        # A server that does not hold what it says, and one that holds what cannot be followed.
        pool.hold(server, *versions.names, "missing")
        pool.activate("missing")
        eventually(lambda: changes["failed"] > 1, "it tries again")
        assert "missing is active and cannot be followed" in client.trouble
        pool.hold(away, version_of(other))
        pool.activate(version_of(other), partial=True)
        eventually(lambda: changes["refused"])
        assert "token_map" in client.trouble
        assert versions.of(client.lookup(TOKENS), versions.rows()) == client.version == versions.first
        pool.activate(versions.second, partial=True)
        eventually(lambda: client.version == versions.second)
        assert versions.of(client.lookup(TOKENS), versions.rows()) == versions.second
        assert client.trouble is None
        assert changes["refused"] == 1
        assert [line.getMessage().count("missing is active") for line in caplog.records].count(1) == 1
        assert versions.of(pinned.lookup(TOKENS), versions.rows()) == pinned.version == versions.first


def test_a_version_that_is_gone_before_the_client_heard_is_asked_for_by_the_next(etcd, versions, monkeypatch):
    monkeypatch.setattr(Registry, "follow", lambda registry, changed, stop: stop.wait())  # it hears nothing
    pool, listen = Pool(etcd), lasting_address()
    with ExitStack() as stack:
        with serve_thread(versions.paths[0], listen=listen):
            member = pool.hold(listen, versions.first)
            pool.activate(versions.first)
            client = stack.enter_context(Client(pool.url, cache_bytes=8 << 20, timeout_s=LIMIT_S))
            masking = stack.enter_context(Client(pool.url, on_failure="mask", timeout_s=LIMIT_S))
            client.lookup(TOKENS, layers=[2])
        stack.enter_context(serve_thread(versions.paths[1], listen=listen))
        # As far as the registry knows, that is no change of versions.
        with pytest.raises(UnknownVersionError):
            client.lookup(TOKENS, layers=[9])
        pool.hold(listen, versions.second)
        member.leave()
        pool.activate(versions.second)
        # A layer that the cache had was handed over; rows of another version must not follow.
        step = client.prefetch(TOKENS)
        with pytest.raises(UnknownVersionError):
            step.rows(9)
        assert np.array_equal(step.rows(2), versions.rows()[versions.first][2])
        for one in (client, masking):
            step = one.prefetch(TOKENS[:100], layers=[9])
            assert np.array_equal(step.rows(9), versions.rows(TOKENS[:100])[versions.second][9])
            assert step.valid(9).all()
            assert one.version == versions.second


def test_a_specification_that_stays_the_same_is_not_read_again(pool, versions, monkeypatch):
    with Client(pool.url) as client:
        read, spec = [], client.spec
        monkeypatch.setattr(ModelSpec, "from_json", read.append)
        pool.activate(versions.second)
        eventually(lambda: client.version == versions.second)
        assert not read
        assert client.served.spec is spec


@pytest.mark.parametrize("where", ["active", "look"])
def test_following_goes_on_after_what_nobody_thought_of(pool, versions, where, monkeypatch, caplog):
    monkeypatch.setattr("engrampool_client.pool.follower._AGAIN_S", 0.01)
    with Client(pool.url) as client:
        faults, servers = [], client._versions.servers
        call = getattr(servers, where)

        def failing(*arguments):
            if len(faults) < 3:
                faults.append(where)
                raise RuntimeError("what is this")
            return call(*arguments)

        monkeypatch.setattr(servers, where, failing)
        if where == "look":  # as a lookup would that finds its version gone
            client._versions._doubts += 1
        pool.activate(versions.second)
        eventually(lambda: len(faults) == 3 or servers.wake(), "it failed")
        eventually(lambda: client.version == versions.second)
        assert [line.getMessage() for line in caplog.records if line.exc_info] == [
            "following the active version failed, and is tried again"
        ]
    eventually(lambda: not threads(), "its threads have ended")  # others' may end a little later


def test_the_registry_is_followed_on_after_what_nobody_thought_of(pool, versions, monkeypatch, caplog):
    monkeypatch.setattr("engrampool_client.pool.discovery._AGAIN_S", 0.01)
    follow, faults = Registry.follow, []

    def failing(registry, changed, stop) -> None:
        if len(faults) < 3:
            faults.append(registry)
            raise RuntimeError("what is this")
        follow(registry, changed, stop)

    monkeypatch.setattr(Registry, "follow", failing)
    with Client(pool.url) as client:
        pool.activate(versions.second)
        eventually(lambda: client.version == versions.second)
        assert len(faults) == 3
        assert [line.getMessage() for line in caplog.records if line.exc_info] == [
            "following the registry failed, and is tried again"
        ]


def test_asyncio_follows(pool, versions):
    async def read() -> None:
        async with await AsyncClient.connect(pool.url) as client:
            assert versions.of(await client.lookup(TOKENS), versions.rows()) == client.version == versions.first
            await asyncio.to_thread(pool.activate, versions.second)
            while client.version != versions.second:
                assert versions.of(await client.lookup(TOKENS), versions.rows())
            assert versions.of(await client.lookup(TOKENS), versions.rows()) == versions.second

    asyncio.run(read())


def test_what_cannot_be_connected_is_named(etcd, server, versions, monkeypatch):
    monkeypatch.setattr(Registry.__init__, "__defaults__", (LIMIT_S,))  # a registry that is slow is none that is away
    pool = Pool(etcd)
    soon = {"connect_timeout_s": 0.1}
    with pytest.raises(UnknownVersionError, match="no active version of any model; published there: none"):
        Client(pool.url, **soon)
    pool.hold(server, *versions.names)
    with pytest.raises(UnknownVersionError, match=f"published there: small .*{versions.second}.*engrampool activate"):
        Client(pool.url, "small", **soon)
    with pytest.raises(UnavailableError, match="holds another"):
        Client(pool.url, version="another", **soon)
    pool.activate(versions.first)
    pool.hold(lasting_address(), "other-version", model="other")
    pool.activate("other-version", model="other")
    with pytest.raises(UnknownModelError, match="active versions of other, small"):
        Client(pool.url, **soon)
    for targets in ("etcd://", "http://127.0.0.1:1", [pool.url, pool.url], []):
        with pytest.raises(ValueError, match=r"etcd://|a server at least"):
            Client(targets, **soon)
    eventually(lambda: not threads(), "its threads have ended")  # others' may end a little later
