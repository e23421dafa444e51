"""`Client.status()` and `repr`: what a client knows of its servers, in plain values, whatever else is going on."""

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from engrampool_client import AsyncClient, Client, DeadlineError, PoolError, UnavailableError
from engrampool_client.pool.shards import Shards
from engrampool_client.status import (
    BreakerStatus,
    CacheStatus,
    ClientStatus,
    RegistryStatus,
    RowsStatus,
    ServerStatus,
    StepsStatus,
    lines,
)
from engrampool_client.testing import serve_process
from server_fixtures import GatherGate, eventually, lasting_address, pack, running, serve_thread, unused, used

pytestmark = pytest.mark.usefixtures("patient")
TOKENS = np.arange(40, dtype=np.int32)


def only_server(client: Client) -> ServerStatus:
    (server,) = client.status()["servers"]
    return server


def test_every_value_is_plain_and_every_key_is_there(server, spec):
    with Client(server, cache_bytes=1 << 20, heads=(2, 5)) as client:
        client.lookup(TOKENS)
        status = client.status()
        assert json.loads(json.dumps(status)) == status
        for kind, part in (
            (ClientStatus, status),
            (ServerStatus, status["servers"][0]),
            (BreakerStatus, status["servers"][0]["breaker"]),
            (StepsStatus, status["steps"]),
            (CacheStatus, status["cache"]),
        ):
            assert list(part) == list(kind.__annotations__)
        assert (status["target"], status["model"], status["version"]) == (server, spec.name, client.version)
        assert status["spec_digest"] == spec.digest
        assert (status["hashing"], status["heads"], status["on_failure"]) == ("local", [2, 5], "raise")
        assert status["lane"] == "direct"
        assert status["steps"] == {"in_flight": 0, "pending_bytes": 0, "new": 0, "waiting": 0, "asking": 0}
        assert status["cache"]["misses"] == client.cache.misses > 0
        one = only_server(client)
        assert (one["used"], one["why_unused"], one["trouble"], one["shard"]) == (True, None, None, 0)
        assert one["rows"] == [
            {"layer": layer, "start": 0, "stop": spec.table(layer).num_rows} for layer in spec.layers
        ]
        assert one["breaker"] == {"open": False, "why_open": None, "failures": 0, "probing": False}
        assert status["registry"] is None
        assert client.status() == status


def test_the_page_names_every_key():
    page = (Path(__file__).parents[2] / "docs" / "CLIENT.md").read_text()
    kinds = (ClientStatus, ServerStatus, BreakerStatus, RegistryStatus, RowsStatus, StepsStatus, CacheStatus)
    assert [key for kind in kinds for key in kind.__annotations__ if f"`{key}`" not in page] == []


@pytest.mark.parametrize(
    ("settings", "lane", "why_not_attached", "why_not_direct"),
    [
        ({}, "attached", None, None),
        ({"attach": "off"}, "direct", 'attach="off"', None),
        ({"attach": "off", "direct": "off"}, "grpc", 'attach="off"', 'direct="off"'),
        ({"hashing": "server"}, "direct", None, None),  # a lookup of tokens is the server's to do
    ],
)
def test_it_says_which_lane_and_why_not_a_better_one(tmp_path, settings, lane, why_not_attached, why_not_direct):
    packed, memory = pack(tmp_path / "small"), f"file:{tmp_path / 'segments'}"
    (tmp_path / "segments").mkdir()
    with serve_thread(packed, memory=memory) as server, Client(server, **settings) as client:
        assert client.status()["lane"] == lane
        for said, part in (("why_not_attached", why_not_attached), ("why_not_direct", why_not_direct)):
            why = only_server(client)[said]
            assert why is None if part is None else part in why
        client.lookup(TOKENS)
        assert client.stats.bytes["attached" if lane == "attached" else "wire"] > 0


def test_it_says_of_a_server_that_it_offers_neither_memory_nor_a_lane(packed, tmp_path):
    with serve_thread(packed, direct="off") as server, Client(server) as client:
        assert only_server(client)["why_not_attached"] == "the server has no tables that a client can map"
        assert only_server(client)["why_not_direct"] == "the server has no direct lane"


def test_it_says_why_memory_that_is_offered_cannot_be_mapped(tmp_path):
    segments = tmp_path / "segments"
    segments.mkdir()
    with serve_thread(pack(tmp_path / "small"), memory=f"file:{segments}") as server:
        for path in segments.rglob("*"):  # this machine has other files there than the server
            if path.is_file():
                path.rename(path.with_name(f"{path.name}.moved"))
        with Client(server) as client:
            assert not client.attached
            assert "cannot be mapped" in only_server(client)["why_not_attached"]
            assert lines(client.status())[0].startswith(f"{server}: lane direct; not attached: ")


def test_it_says_why_a_server_is_not_used(packed, other_packed):
    with ExitStack() as stack:
        first = stack.enter_context(serve_thread(packed))
        other = stack.enter_context(serve_thread(other_packed))
        listen = lasting_address()
        client = stack.enter_context(Client([first, listen, other], "deepseek-v4.1", attach="off"))
        assert used(client) == [first]
        assert list(unused(client)) == [listen, other]
        # Whoever does not answer while the client is made is looked at soon.
        eventually(lambda: "holds no model 'deepseek-v4.1'" in (unused(client)[other] or ""), "it is looked at")
        eventually(lambda: f"no server at {listen} was ready" in unused(client)[listen], "it is looked for")
        eventually(lambda: client.status()["servers_in_trouble"] == len(client.servers_in_trouble) == 2)
        stack.enter_context(serve_thread(packed, listen=listen))
        eventually(lambda: sorted(used(client)) == sorted([first, listen]), "it is used")
        assert client.status()["servers_in_trouble"] == 1


@pytest.mark.usefixtures("all_are_there")
def test_shards_are_numbered_and_say_which_rows_they_hold(packed, spec):
    with ExitStack() as stack:
        servers = [stack.enter_context(serve_thread(packed, shard=f"{at}/2", shard_by="layer")) for at in (0, 1)]
        servers.append(stack.enter_context(serve_thread(packed, shard="1/2", shard_by="layer")))
        client = stack.enter_context(Client(servers, attach="off"))
        status = client.status()
        held = {one["address"]: (one["shard"], [rows["layer"] for rows in one["rows"]]) for one in status["servers"]}
        assert held[servers[1]] == held[servers[2]] != held[servers[0]]
        assert sorted(layer for _, layers in (held[servers[0]], held[servers[1]]) for layer in layers) == [1, 14]
        assert f"{servers[0]} (shard" in " ".join(lines(status)) or held[servers[0]][0] == 0


def test_a_server_that_failed_lookups_is_in_trouble_until_it_answers(packed, monkeypatch):
    monkeypatch.setattr("engrampool_client.pool.endpoint._PROBE_TIMEOUT_S", 1.0)
    with ExitStack() as stack:
        server = stack.enter_context(serve_process(packed, workers=1))
        client = stack.enter_context(Client(server.address, attach="off", retry_s=0, breaker_failures=2))
        client.lookup(TOKENS)
        with server.frozen():
            for failures in (1, 2):
                while only_server(client)["breaker"]["failures"] < failures:  # unless nothing was sent in time
                    with pytest.raises((DeadlineError, UnavailableError)):
                        client.lookup(TOKENS, timeout_s=0.1)
                assert only_server(client)["breaker"]["failures"] == failures
            assert only_server(client)["breaker"]["probing"]
            eventually(lambda: only_server(client)["breaker"]["open"], "it does not answer the probe either")
            status = client.status()
            assert status["breaker_open"]
            assert status["servers_in_trouble"] == 1
            assert "failed 2 lookups in a row" in status["servers"][0]["breaker"]["why_open"]
            # What a lookup failed with is all that is known, if that was before the first probe, until the next one.
            eventually(lambda: "Deadline Exceeded" in only_server(client)["trouble"], "a probe was not answered")
            assert "1 in trouble, breaker open" in repr(client)
        eventually(lambda: not only_server(client)["breaker"]["probing"], "a probe is answered")
        assert (client.status()["servers_in_trouble"], client.status()["breaker_open"]) == (0, False)


def test_it_tells_while_every_place_is_taken_and_the_servers_hold_back(tmp_path, monkeypatch):
    gate = GatherGate(monkeypatch)
    with running(pack(tmp_path / "small"), gather_threads=4) as run:
        with Client(run.address, attach="off", max_steps=2, dedupe=False, timeout_s=60.0) as client:
            ids = {2: np.arange(2000)}
            told = []
            steps = [client.prefetch_rows(ids) for _ in range(5)]
            steps[0].add_callback(lambda *_: told.append(client.status()))  # with whatever the thread holds then
            gate.wait_begun(2)
            eventually(lambda: client.status()["steps"]["waiting"] == 3, "the others wait for a place")
            held = client.status()["steps"]
            assert held == {"in_flight": 5, "pending_bytes": 5 * 2000 * 264, "new": 0, "waiting": 3, "asking": 2}
            gate.open.set()
            for step in steps:
                step.wait()
        assert told[0]["model"] == "small"


def test_a_client_that_cannot_be_used_says_why_and_never_fails(server):
    client = Client(server)
    assert repr(client).startswith(f"<Client deepseek-v4.1 {client.version} on {server}, 1 server, lane direct")
    assert client.status()["why_unusable"] is None
    client.close()
    assert client.status()["why_unusable"] == "the client is closed"
    assert repr(client).endswith("the client is closed>")
    with pytest.raises(PoolError):
        client.lookup(TOKENS)


def test_the_client_of_asyncio_says_the_same(server):
    with Client(server) as client:
        assert AsyncClient(client).status() == client.status()
        assert repr(AsyncClient(client)) == repr(client).replace("<Client", "<AsyncClient")


@pytest.mark.usefixtures("all_are_there")
def test_a_server_that_is_let_go_of_at_that_moment_is_there_all_the_same(packed, monkeypatch):
    stopped = ExitStack()
    first = stopped.enter_context(serve_thread(packed))
    with stopped, serve_thread(packed) as second, Client([first, second]) as client:
        away = Shards.away.fget

        def let_go_before(shards):
            known = dict(away(shards))
            if not known:
                stopped.close()
                eventually(lambda: client.lookup(TOKENS) and away(shards), "it is away")
            return known

        monkeypatch.setattr(Shards, "away", property(let_go_before))
        assert sorted(one["address"] for one in client.status()["servers"]) == sorted([first, second])
