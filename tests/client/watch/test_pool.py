"""Looks at pools over gRPC: whole, with a gap, silent, of another kind; and what is said of them."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrampool_client.testing import serve_process
from engrampool_client.watch.pool import ServerLook, Watch, alarms, server_json, versions
from engrampool_client.watch.samples import Samples
from engrampool_proto.v1 import pool_pb2
from server_fixtures import LIMIT_S, SPEC, RawPool, eventually, pack, running, serve_thread, version_of


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("watch") / "small")


@pytest.fixture(scope="module")
def server(packed: Path) -> Iterator[str]:
    with serve_process(packed, workers=1, metrics="off") as running:
        yield running.address


def looks_at(*addresses: str, timeout_s: float = LIMIT_S) -> list[ServerLook]:
    with Watch(addresses, timeout_s) as watch:
        return watch.look()


def test_a_server_that_holds_all_is_well(server, packed):
    with RawPool(server, version_of(packed)) as raw:
        raw.lookup(raw.by_ids((2, [1, 2])))
    (look,) = looks = eventually(
        lambda: [one for one in looks_at(server) if one.samples.sum("engrampool_lookup_rows_total")], "it is counted"
    )
    assert look.serving
    assert look.round_trip_s > 0
    assert alarms(looks) == []
    (version,) = versions(looks)
    assert version == {
        "model": "small",
        "version": version_of(packed),
        "active": False,
        "servers": [{"address": server, "shard": "all"}],
        "missing": {},
    }
    told = server_json(look)
    assert told["rows"] >= 2
    assert told["table_bytes"] == SPEC.nbytes
    assert [table["layer"] for table in told["models"][0]["tables"]] == [2, 9]
    assert told["error"] is None


def test_rows_that_nobody_holds_and_servers_that_are_away_are_said(packed):
    with serve_process(packed, shard="0/3", workers=1) as first, serve_process(packed, shard="2/3", workers=1) as last:
        looks = looks_at(first.address, last.address, "127.0.0.1:1")
    assert [bool(look.error) for look in looks] == [False, False, True]
    (version,) = versions(looks)
    assert [one["shard"] for one in version["servers"]] == ["0/3", "2/3"]
    assert version["missing"]
    said = alarms(looks)
    assert [text for text in said if text.startswith("127.0.0.1:1 does not answer")]
    assert [text for text in said if "no server holds rows" in text]
    assert server_json(looks[2])["serving"] is False


def test_a_server_that_loads_is_said(packed):
    with running(packed, load=False) as run:
        looks = looks_at(run.address)
        assert [look.serving for look in looks] == [False]
        (said,) = alarms(looks)
        assert said.startswith(f"{run.address} does not serve: 0 of ")


def test_a_server_of_another_kind_is_an_error_and_no_end(server):
    with ThreadPoolExecutor(1) as threads:
        other = grpc.server(threads)
        port = other.add_insecure_port("127.0.0.1:0")
        other.start()
        try:
            look, well = looks_at(f"127.0.0.1:{port}", server)
        finally:
            other.stop(None).wait()
    assert "is no engrampool server" in look.error
    assert well.error is None


def test_connections_follow_the_addresses(server, packed, monkeypatch):
    found = [server]
    with serve_thread(packed) as second, closing(Watch(["dns:///pool:1"], LIMIT_S)) as watch:
        monkeypatch.setattr("engrampool_client.pool.discovery.resolve", lambda target: list(found))
        assert [look.address for look in watch.look()] == [server]
        found[:] = [second]
        assert [(look.address, look.error) for look in watch.look()] == [(second, None)]


def test_a_registry_that_is_away_is_said_and_servers_that_are_named_are_looked_at(server):
    with Watch([server, "etcd://127.0.0.1:1"], LIMIT_S) as watch:
        looks = watch.look()
        assert [(look.address, look.error) for look in looks] == [(server, None)]
        assert alarms(looks, watch.trouble) == [watch.trouble]
        assert "127.0.0.1:1" in watch.trouble


def test_no_server_at_all_is_an_alarm():
    assert alarms([]) == ["no server is known"]


def look(address: str = "a:1", held: tuple[tuple[str, str, bool, int, int], ...] = (), **values: float) -> ServerLook:
    """held: model, version, active, first row and one past the last of a table of 100."""
    models = tuple(
        pool_pb2.Model(
            name=name,
            version=version,
            active=active,
            tables=[pool_pb2.Table(layer=1, num_rows=100, row_start=start, row_stop=stop)],
        )
        for name, version, active, start, stop in held
    )
    samples = Samples.read(0.0, [(f"engrampool_{name}", {}, value) for name, value in values.items()])
    return ServerLook(address, None, 0.001, "1", models, samples)


WHOLE = (("m", "v1", True, 0, 100),)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"registry_age_seconds": 61.0}, "nothing of its registry"),
        ({"unregistered": 1.0}, "not in its registry"),
        ({"in_flight_bytes": 95.0, "in_flight_limit_bytes": 100.0}, "max_in_flight_bytes"),
    ],
)
def test_each_trouble_of_a_server_is_said(values, said):
    (text,) = alarms([look(held=WHOLE, **values)])
    assert said in text
    assert alarms(
        [look(held=WHOLE, **{name: value / 100 for name, value in values.items() if "limit" not in name})]
    ) == ([text] if "unregistered" in values else [])


def test_versions_by_what_became_of_them_are_said():
    states = [("engrampool_versions", {"state": state}, 2.0) for state in ("held", "failed", "unpublished")]
    one = ServerLook("a:1", held=look(held=WHOLE).held, samples=Samples.read(0.0, states))
    assert [text.partition(": ")[2] for text in alarms([one])] == [
        "2 versions could not be loaded",
        "2 versions are unknown to its registry",
    ]


def test_two_versions_are_well_where_one_is_active():
    two = (*WHOLE, ("m", "v2", False, 0, 100))
    assert alarms([look(held=two)]) == []
    unknown = tuple((name, version, False, start, stop) for name, version, _, start, stop in two)
    assert alarms([look(held=unknown)]) == ["servers hold 2 versions of m, and none is known as active"]


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), max_size=6))
def test_gaps_are_the_rows_that_no_range_has(ranges):
    looks = [look(f"a:{at}", (("m", "v1", True, min(ends), max(ends)),)) for at, ends in enumerate([(0, 0), *ranges])]
    (version,) = versions(looks)
    covered = {row for ends in ranges for row in range(min(ends), max(ends))}
    missing = [row for start, stop in version["missing"].get("1", []) for row in range(start, stop)]
    assert missing == sorted(set(range(100)) - covered)
    assert all(start < stop for start, stop in version["missing"].get("1", []))


def test_a_look_ends_in_time_where_a_server_says_nothing(server):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"  # which never says a word
        look, well = looks_at(address, server, timeout_s=1.0)
    assert look.error is not None
    assert alarms([look])
    assert well.address == server
