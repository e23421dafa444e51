"""Lookups over several servers: the same bytes, whoever holds which rows, and whoever is away."""

import socket
import threading
from collections import Counter
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrampool_client import Client, SpecError, UnavailableError
from engrampool_client.compute.served import ServedModel
from engrampool_client.lookup.exchange import Route
from engrampool_client.pool.discovery import Servers, resolve
from engrampool_client.pool.endpoint import Endpoint
from engrampool_client.pool.shards import Shards
from engrampool_client.testing import serve_process
from engrampool_proto.hashing import Identity, TokenBatch
from engrampool_proto.spec import ModelSpec, RowFormat, Segment, TableSpec
from engrampool_proto.synthetic import synthetic_rows
from engrampool_proto.v1 import pool_pb2
from exchanges import exchange_of
from server_fixtures import LIMIT_S, columns_of, eventually, lasting_address, serve_thread, unused, used

pytestmark = pytest.mark.usefixtures("patient")
TOKENS = np.arange(700, dtype=np.int32) % 300
ROWS = RowFormat((Segment("values", "uint8", 3),))
SPEC = ModelSpec("m", 60, tuple(TableSpec(layer, 60, ROWS, Identity(60)) for layer in (2, 9)))
SERVED = ServedModel(SPEC, "v", max_rows=10_000, max_answer_bytes=100_000, server_version="")


def wanted(client: Client, tokens=TOKENS) -> dict[int, np.ndarray]:
    heads = columns_of(client)
    ids = client.spec.hash(TokenBatch.of(tokens))
    return {n: synthetic_rows(client.spec.table(n), rows[:, heads]) for n, rows in ids.items()}


def assert_same(found, expected) -> None:
    assert list(found) == list(expected)
    for layer, rows in expected.items():
        assert np.array_equal(found[layer], rows)


# --- without a server


@st.composite
def routes(draw) -> Route:
    starts = [0, *sorted(draw(st.sets(st.integers(1, 59), max_size=5)))]
    shards = draw(st.permutations(range(len(starts))))
    return Route(np.array(starts, np.uint64), np.array(shards, np.int64))


@given(st.data(), st.booleans(), st.booleans())
def test_a_lookup_is_spread_and_comes_together_again(data, ascending, given_out):
    by_layer = {layer: data.draw(routes()) for layer in (2, 9)}
    ids = {}
    for layer in (2, 9):
        some = data.draw(st.lists(st.integers(0, 59), max_size=30))
        ids[layer] = np.array(sorted(some) if ascending else some, np.uint32)
    out = {9: np.zeros((len(ids[9]), 3), np.uint8)} if given_out else None
    exchange = exchange_of(SERVED, ids, out)
    exchange.landing.hand_over()
    parts = exchange.spread(by_layer)
    for shard, part in data.draw(st.permutations(list(parts.items()))):
        for layer, asked in part.asked_tables:
            if not len(asked):
                continue
            route = by_layer[layer]
            assert (route.shards[np.searchsorted(route.starts, asked, side="right") - 1] == shard).all()
            rows = np.repeat(asked.astype(np.uint8), 3) + layer
            part.landing.destination(layer, 0, rows.size)[:] = rows.data
            part.landing.received(layer, rows.size)
            part.landing.hand_over()
    complete = exchange.delivery.rows
    assert sorted(complete) == [2, 9]
    for layer, rows in complete.items():
        assert np.array_equal(rows, np.repeat(ids[layer].astype(np.uint8) + layer, 3).reshape(-1, 3))
    if given_out:
        assert complete[9] is out[9]
    assert sum(len(asked) for part in parts.values() for _, asked in part.asked_tables) == len(ids[2]) + len(ids[9])


def test_names_stand_for_all_their_addresses():
    assert [resolve(target) for target in ("a:1", "unix:/b")] == [["a:1"], ["unix:/b"]]
    assert "127.0.0.1:7" in resolve("dns:///localhost:7")
    assert [resolve(target) for target in ("dns:///no.such.name.invalid:7", "dns:///localhost")] == [None, None]


# --- with servers


@pytest.fixture(scope="module", params=["head", "row", "layer"])
def shards(request, packed):
    """Addresses of the servers of all rows: by head, by row (which cuts heads in two), by layer."""
    count = 2 if request.param == "layer" else 3
    with ExitStack() as stack:
        servers = [serve_thread(packed, shard=f"{at}/{count}", shard_by=request.param) for at in range(count)]
        yield [stack.enter_context(server) for server in servers]


SETTINGS = {
    "grpc": {"direct": "off"},
    "direct": {},
    "cache": {"cache_bytes": 8 << 20},
    "tensor-parallel": {"heads": (5, 19)},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_shards_give_what_one_server_gives(shards, settings):
    with Client(shards[::-1], **settings) as client:
        expected = wanted(client)
        for _ in range(2):
            assert_same(client.lookup(TOKENS), expected)
        assert_same(client.lookup(TOKENS[:3]), wanted(client, TOKENS[:3]))
        assert_same(client.lookup([], layers=[14]), {14: np.empty((0, *expected[14].shape[1:]), np.uint8)})
        out = {layer: np.zeros(rows.shape, np.uint8) for layer, rows in expected.items()}
        step = client.prefetch(TOKENS, out=out)
        assert_same({layer: step.rows(layer) for layer in step.layers}, expected)
        step.wait()
        assert step.rows(1) is out[1]
        assert step.times is not None or client.cache is not None
        # Ids of no n-gram, in any order and shape.
        table = client.spec.table(14)
        ids = np.random.default_rng(0).integers(0, table.num_rows, (50, 3))
        assert_same(client.lookup_rows({14: ids}), {14: synthetic_rows(table, ids.astype(np.uint64))})
        out = {14: np.zeros((50, 3, 264), np.uint8)}
        assert_same(client.lookup_rows({14: ids}, out=out), {14: out[14]})
        assert np.array_equal(out[14], synthetic_rows(table, ids.astype(np.uint64)))


def test_requests_do_not_grow_with_shards(shards):
    with Client(shards) as client:
        ids = {n: rows.reshape(-1) for n, rows in client.spec.hash(TokenBatch.of(TOKENS)).items()}
        exchange = exchange_of(client.served, ids)
        whole = len(exchange.encode())
        parts = exchange.spread(client._shards._routes)
        assert len(parts) == len(shards)
        assert sum(len(part.encode()) for part in parts.values()) < whole + 200 * len(shards)


def test_missing_rows_are_named(shards):
    with pytest.raises(SpecError, match=r"layer_\d+: no server holds rows"), Client(shards[1:]):
        pass
    with pytest.raises(SpecError, match=r"layer_\d+: no server holds rows"), Client(shards[0]):
        pass
    with pytest.raises(ValueError, match="needs a server that holds all rows"), Client(shards, hashing="server"):
        pass


def test_shards_that_disagree_are_refused(packed, shards):
    with (
        serve_thread(packed, shard="0/2", shard_by="row") as other,
        pytest.raises(SpecError, match=r"overlap|no server holds"),
        Client([*shards[1:], other]),
    ):
        pass


@pytest.mark.usefixtures("all_are_there")
def test_two_versions_never_mix(packed, other_packed, shards):
    with serve_thread(other_packed) as other, Client([*shards, other], "deepseek-v4.1") as client:
        assert_same(client.lookup(TOKENS), wanted(client))
        assert list(unused(client)) == [other]
        assert "deepseek-v4.1" in unused(client)[other]


@pytest.mark.usefixtures("all_are_there")
def test_a_replica_stands_in_for_one_that_is_killed_or_silent(packed):
    with ExitStack() as stack:
        servers = [
            stack.enter_context(serve_process(packed, shard=f"{at}/2", workers=1)) for at in (0, 1) for _ in range(2)
        ]
        addresses = [server.address for server in servers]
        client = stack.enter_context(Client(addresses, attach="off", retry_s=0.1, timeout_s=60.0))
        expected = wanted(client)
        for _ in range(4):
            assert_same(client.lookup(TOKENS), expected)
        servers[0].process.kill()
        servers[0].process.wait()
        with servers[3].frozen():
            for _ in range(10):
                assert_same(client.lookup(TOKENS), expected)
        assert not client.breaker_open
        servers[1].process.kill()
        servers[1].process.wait()
        with pytest.raises(UnavailableError):
            client.lookup(TOKENS)


def test_a_server_that_comes_later_is_found(packed, looking_often):
    with ExitStack() as stack:
        listen = lasting_address()
        first = stack.enter_context(serve_process(packed, workers=1))
        client = stack.enter_context(Client([listen, first.address], attach="off", retry_s=0))
        assert list(unused(client)) == [listen]
        stack.enter_context(serve_thread(packed, listen=listen))
        wait_for(lambda: not unused(client))
        first.process.kill()
        first.process.wait()
        for _ in range(4):
            assert_same(client.lookup(TOKENS), wanted(client))


@pytest.fixture
def looking_often(monkeypatch) -> None:
    monkeypatch.setattr("engrampool_client.pool.shards._LOOK_S", 0.05)


def wait_for(condition) -> None:
    pause = threading.Event()
    while not condition():
        pause.wait(0.01)


@pytest.mark.usefixtures("all_are_there")
def test_a_server_that_holds_other_rows_by_now_is_left_aside(packed, other_packed, server, looking_often):
    listen = lasting_address()
    with ExitStack() as stack:
        second = ExitStack()
        second.enter_context(serve_thread(packed, listen=listen))
        client = stack.enter_context(Client([server, listen], attach="off"))
        expected = wanted(client)
        second.close()
        for model, settings in ((other_packed, {}), (packed, {"shard": "1/2"})):
            with serve_thread(model, listen=listen, **settings):
                # Its connections come back by themselves, to a server that is another one.
                while list(unused(client)) != [listen]:
                    assert_same(client.lookup(TOKENS), expected)
                assert_same(client.lookup(TOKENS), expected)
        with serve_thread(packed, listen=listen):
            wait_for(lambda: not unused(client))
            for _ in range(4):
                assert_same(client.lookup(TOKENS), expected)


@pytest.mark.usefixtures("all_are_there")
def test_addresses_that_a_name_has_no_more_are_forgotten(packed, server, looking_often, monkeypatch):
    describe, go_on = Endpoint.describe, threading.Event()
    with ExitStack() as stack:
        other = stack.enter_context(serve_process(packed, workers=1))
        known = [server, other.address]
        monkeypatch.setattr("engrampool_client.pool.discovery.resolve", lambda target: list(known) if known else None)
        client = stack.enter_context(Client("dns:///pool:1", attach="off", retry_s=0, breaker_failures=1))
        expected = wanted(client)
        gone = known.pop()

        def held(endpoint: Endpoint, *arguments) -> bytes:
            assert endpoint.target != gone or go_on.wait(LIMIT_S)  # that it is away is not found meanwhile
            return describe(endpoint, *arguments)

        monkeypatch.setattr(Endpoint, "describe", held)
        left, known[:] = list(known), []  # for now the name cannot be looked up at all
        other.process.kill()
        other.process.wait()
        for _ in range(4):
            assert_same(client.lookup(TOKENS), expected)
        assert gone in used(client)
        known[:] = left
        go_on.set()
        wait_for(lambda: gone not in used(client))
        assert_same(client.lookup(TOKENS), expected)


@pytest.mark.usefixtures("all_are_there")
def test_replicas_that_are_only_slow_are_waited_for(packed, server, monkeypatch):
    """Whatever a moment is: none of them answers within it, and one is away."""
    monkeypatch.setattr("engrampool_client.pool.replicas._PATIENCE_S", 1e-6)
    monkeypatch.setattr("engrampool_client.pool.replicas._PATIENCE_S_PER_BYTE", 0.0)
    with ExitStack() as stack:
        away = stack.enter_context(serve_process(packed, workers=1))
        addresses = [server, away.address, stack.enter_context(serve_thread(packed))]
        clients = [stack.enter_context(Client(addresses, direct=lane, attach="off")) for lane in ("off", "auto")]
        away.process.kill()
        away.process.wait()
        for client in clients * 6:
            assert_same(client.lookup(TOKENS), wanted(client))


# --- those that are away


def test_all_that_are_away_are_looked_at_at_once(server, monkeypatch):
    away = [f"127.0.0.1:{port}" for port in range(1, 65)]
    together, describe, looks = threading.Barrier(len(away)), Endpoint.describe, Counter()

    def silent(endpoint: Endpoint, timeout_s: float, *request: bytes) -> bytes:
        if endpoint.target not in away:
            return describe(endpoint, timeout_s, *request)
        together.wait(LIMIT_S)  # each is silent until all are asked
        looks[endpoint.target] += 1
        raise UnavailableError("it is away")

    monkeypatch.setattr(Endpoint, "describe", silent)
    monkeypatch.setattr("engrampool_client.pool.shards._LOOK_S", 0.01)
    with Client([server, *away], attach="off") as client:
        eventually(lambda: min(looks[address] for address in away) >= 3, "they are looked at again and again")
        assert set(unused(client).values()) == {"it is away"}
    together.abort()  # some of a look that the end came upon may wait for those that were never asked
    eventually(lambda: not lookers(), "their threads have ended")


@pytest.mark.parametrize("where", ["name", "describe", "open"])
def test_what_a_look_meets_is_logged_and_the_look_goes_on(packed, server, where, monkeypatch, caplog):
    monkeypatch.setattr("engrampool_client.pool.shards._LOOK_S", 0.01)
    monkeypatch.setattr("engrampool_client.pool.shards._LOOK_TIMEOUT_S", LIMIT_S)  # no look meets anything else
    known, faults = [server], []

    def fault(name: str) -> None:
        if name == where and len(known) > 1 and len(faults) < 3:
            faults.append(name)
            raise RuntimeError("what is this")

    def found(_: str) -> list[str]:
        fault("name")
        return list(known)

    def failing(name: str):
        call = getattr(Endpoint, name)

        def first(*arguments):
            fault(name)
            return call(*arguments)

        return first

    monkeypatch.setattr("engrampool_client.pool.discovery.resolve", found)
    for name in ("describe", "open"):
        monkeypatch.setattr(Endpoint, name, failing(name))
    with serve_thread(packed) as later, Client("dns:///pool:1", attach="off") as client:
        known.append(later)
        eventually(lambda: later in used(client), "it is found")
        assert faults == [where] * 3
        assert len([line for line in caplog.records if line.exc_info]) == 1
        for _ in range(2):
            assert_same(client.lookup(TOKENS), wanted(client))


def test_a_client_closes_at_once_while_it_looks_for_servers(server, monkeypatch):
    """Those that are away take connections, and say nothing."""
    monkeypatch.setattr("engrampool_client.pool.shards._LOOK_TIMEOUT_S", 3600.0)
    monkeypatch.setattr("engrampool_client.pool.shards._LOOK_S", 0.01)
    looked, describe = threading.Event(), Endpoint.describe

    def looking(endpoint: Endpoint, timeout_s: float, *request: bytes) -> bytes:
        if timeout_s == 3600:
            looked.set()
        return describe(endpoint, timeout_s, *request)

    monkeypatch.setattr(Endpoint, "describe", looking)
    with ExitStack() as stack:
        silent = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(8)]
        addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in silent]
        client = Client([server, *addresses], attach="off", connect_timeout_s=LIMIT_S)
        assert looked.wait(LIMIT_S)
        client.close()
    eventually(lambda: not lookers(), "their threads have ended")  # within far less than they were given


def lookers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("engrampool-look")]


# --- names


@pytest.mark.parametrize("at_first", [None, []], ids=["unknown", "empty"])
def test_a_name_that_has_no_address_yet_is_waited_for(server, at_first, monkeypatch):
    answers = iter([at_first] * 3)
    monkeypatch.setattr("engrampool_client.pool.discovery.resolve", lambda _: next(answers, [server]))
    with Client("dns:///pool:1", attach="off") as client:
        assert_same(client.lookup(TOKENS), wanted(client))


@pytest.mark.parametrize(
    ("found", "why"),
    [(None, "the name cannot be looked up"), ([], "it stands for no server")],
    ids=["unknown", "empty"],
)
def test_a_name_without_an_address_is_said_to_have_none_in_the_end(found, why, monkeypatch):
    monkeypatch.setattr("engrampool_client.pool.discovery.resolve", lambda _: found)
    with pytest.raises(UnavailableError, match=rf"dns:///pool:1 had no address within 0\.3 s: {why}"):
        Client("dns:///pool:1", connect_timeout_s=0.3)


def test_waiting_for_an_address_ends_with_the_client(monkeypatch):
    asked = threading.Event()
    monkeypatch.setattr("engrampool_client.pool.discovery.resolve", lambda _: asked.set())
    closing, ways = threading.Event(), SimpleNamespace(connections=1, max_steps=1)
    shards, raised = Shards(Servers(["dns:///pool:1"]), ways, closing), []

    def connect() -> None:
        with pytest.raises(UnavailableError, match="given up") as told:
            shards.connect(None, None, 3600.0)
        raised.append(told.value)

    thread = threading.Thread(target=connect)
    thread.start()
    assert asked.wait(LIMIT_S)
    closing.set()
    thread.join(LIMIT_S)
    shards.close()
    assert raised


def test_a_name_that_is_looked_up_for_ever_holds_up_nobody(packed, server, monkeypatch):
    monkeypatch.setattr("engrampool_client.pool.discovery._PATIENCE_S", 0.01)
    monkeypatch.setattr("engrampool_client.pool.shards._LOOK_S", 0.01)
    answered, asked, listen = threading.Event(), [], lasting_address()

    def slow(target: str) -> list[str]:
        if not target.startswith("dns:"):
            return [target]
        asked.append(target)
        assert answered.wait(LIMIT_S)
        return [server]

    monkeypatch.setattr("engrampool_client.pool.discovery.resolve", slow)
    with pytest.raises(UnavailableError, match=r"had no address within 0\.2 s: the name cannot be looked up"):
        Client("dns:///pool:1", connect_timeout_s=0.2)
    with serve_thread(packed) as first, Client([first, listen, "dns:///pool:1"], attach="off") as client:
        with serve_thread(packed, listen=listen):
            eventually(lambda: listen in used(client), "who comes back is found")
        eventually(lambda: len(asked) >= 2, "the name is looked up, too")
        assert len(asked) == 2  # once by each client
        answered.set()
        eventually(lambda: server in used(client), "and the name's, once it is looked up")


def test_a_name_without_a_port_is_refused():
    with pytest.raises(ValueError, match=r"'dns:///pool' has no port, .*; it is dns:///NAME:PORT"):
        Client("dns:///pool")


# --- specifications


@pytest.fixture
def told(monkeypatch) -> SimpleNamespace:
    """specs: how often one was read in this process. full, brief: answers to Describe with one, and without."""
    counts = SimpleNamespace(specs=0, full=0, brief=0)
    read, describe = ModelSpec.from_json, Endpoint.describe

    def from_json(document) -> ModelSpec:
        counts.specs += 1
        return read(document)

    def described(*arguments) -> bytes:
        answer = describe(*arguments)
        if any(held.spec_json for held in pool_pb2.DescribeResponse.FromString(answer).models):
            counts.full += 1
        else:
            counts.brief += 1
        return answer

    monkeypatch.setattr(ModelSpec, "from_json", from_json)
    monkeypatch.setattr(Endpoint, "describe", described)
    return counts


@pytest.mark.usefixtures("all_are_there")
def test_a_specification_is_sent_and_read_once_however_many_servers_have_it(packed, server, told, monkeypatch):
    monkeypatch.setattr("engrampool_client.pool.shards._LOOK_S", 0.01)
    known = [server]
    monkeypatch.setattr("engrampool_client.pool.discovery.resolve", lambda _: list(known))
    with ExitStack() as stack:
        servers = [stack.enter_context(serve_thread(packed)) for _ in range(3)]
        known += servers[:2]
        told.specs = 0
        client = stack.enter_context(Client("dns:///pool:1", attach="off"))
        assert (told.specs, told.full) == (1, 1)
        known.append(servers[2])
        eventually(lambda: servers[2] in used(client), "it is found")
        assert (told.specs, told.full) == (1, 1)
        assert told.brief >= 4
        assert all(one.served.spec is client.spec for one in client._shards._open.values())


def test_a_server_whose_specification_is_another_is_not_used(packed, server, monkeypatch):
    monkeypatch.setattr("engrampool_client.pool.shards._LOOK_S", 0.01)
    known, describe = [server], Endpoint.describe
    monkeypatch.setattr("engrampool_client.pool.discovery.resolve", lambda _: list(known))

    def lying(endpoint: Endpoint, *arguments) -> bytes:
        answer = pool_pb2.DescribeResponse.FromString(describe(endpoint, *arguments))
        if endpoint.target != server:
            answer.models[0].spec_digest = "0" * 32
        return answer.SerializeToString()

    monkeypatch.setattr(Endpoint, "describe", lying)
    with serve_thread(packed) as other:
        with Client("dns:///pool:1", attach="off") as client:
            known.append(other)
            eventually(lambda: f"digest {'0' * 32}" in unused(client).get(other, ""), "it is looked at")
            assert used(client) == [server]
        with Client([server, other], attach="off") as client:
            assert used(client) == [server]
