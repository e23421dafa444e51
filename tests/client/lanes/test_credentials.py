"""A client and a server that do not trust each other: one typed error for each reason, and what to do in its text."""

import asyncio
import socket
import threading
from pathlib import Path

import numpy as np
import pytest

from certificates import Authority, put, write_callers, yesterday
from engrampool_client import (
    AsyncClient,
    Client,
    ForbiddenError,
    TlsError,
    UnauthenticatedError,
    UnavailableError,
)
from engrampool_client.config import ClientConfig
from engrampool_client.lanes.credentials import Credentials
from engrampool_client.lanes.grpc import GrpcLane
from engrampool_client.pool.discovery import Servers
from engrampool_proto.security import reread
from engrampool_proto.security.pem import PemError
from server_fixtures import LIMIT_S, PATIENCE, eventually, expected, pack, running

TOKENS = (
    {"name": "reader", "token": "sesame"},
    {"name": "operator", "token": "root", "roles": ["admin"]},
    {"name": "by-certificate", "certificate": "worker.svc"},
)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("stranger"), "stranger")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def servers(packed, authority, tmp_path_factory):
    """Addresses, by what the servers want."""
    callers = write_callers(tmp_path_factory.mktemp("callers") / "callers.toml", *TOKENS)
    cert = authority.of_server()
    with (
        running(packed) as plain,
        running(packed, **cert) as tls,
        running(packed, **authority.of_server(valid=yesterday())) as expired,
        running(packed, **cert, tokens=callers, lane_tls="off") as tokens,
        running(packed, **cert, tls_client_ca=authority.ca) as mutual,
        running(packed, **cert, tls_client_ca=authority.ca, tokens=callers) as named,
        running(packed, tokens=callers) as clear,
    ):
        runs = {"plain": plain, "tls": tls, "expired": expired, "tokens": tokens, "mutual": mutual, "named": named}
        yield {name: run.address for name, run in {**runs, "clear": clear}.items()}


def connect(address, **settings) -> None:
    with Client(address, **PATIENCE, **settings) as pool:
        assert pool.lookup_rows({2: np.array([5])})[2].tobytes() == expected(2, [5])


def of(authority, common="worker", hosts=("worker.svc",), **other):
    cert, key = authority.sign(common, hosts, **other)
    return {"tls_cert": cert, "tls_key": key}


@pytest.mark.parametrize(
    ("server", "settings"),
    [
        ("tls", {}),
        ("tokens", {"token": "sesame"}),
        ("mutual", {"by": "authority"}),
        ("named", {"by": "authority"}),
        ("named", {"by": "authority", "common": "worker.svc", "hosts": ()}),
        ("named", {"by": "authority", "common": "nobody", "hosts": (), "token": "sesame"}),
    ],
)
def test_who_is_trusted_looks_rows_up(servers, authority, server, settings):
    given = {key: value for key, value in settings.items() if key == "token"}
    if "by" in settings:
        given |= of(authority, **{key: value for key, value in settings.items() if key in ("common", "hosts")})
    connect(servers[server], tls_ca=authority.ca, **given)


def test_a_token_is_shown_without_tls_too(servers):
    connect(servers["clear"], token="sesame")
    with pytest.raises(UnauthenticatedError):
        connect(servers["clear"])


@pytest.mark.parametrize(
    ("server", "settings", "error", "reason", "said"),
    [
        ("plain", {"tls": True}, TlsError, "no-tls", "does not speak TLS"),
        ("tls", {}, TlsError, "tls-wanted", "it speaks TLS, and this client does not: give the client tls_ca"),
        ("expired", {"tls": True}, TlsError, "certificate-expired", "has expired"),
        ("tls", {"tls": "stranger"}, TlsError, "unknown-authority", "of no authority in tls_ca"),
        ("tls", {"tls": True, "host": "localhost"}, TlsError, "wrong-host", "for another host"),
        ("mutual", {"tls": True}, TlsError, "certificate-wanted", "give the client tls_cert"),
        ("mutual", {"tls": True, "by": "stranger"}, TlsError, "certificate-refused", "does not take"),
        ("mutual", {"tls": True, "by": "yesterday"}, TlsError, "certificate-refused", "may have expired"),
        ("tokens", {"tls": True}, UnauthenticatedError, "no-credentials", "its setting token"),
        ("tokens", {"tls": True, "token": "simsim"}, UnauthenticatedError, "bad-token", "may have been revoked"),
        ("tokens", {"tls": True, "token": "root"}, ForbiddenError, "not-allowed", "needs the role read, and has admin"),
        ("named", {"tls": True, "by": "nobody"}, UnauthenticatedError, "unknown-certificate", "nobody"),
        # Whose authority looked at the names of hosts, and not at the other.
        ("named", {"tls": True, "by": "pretender"}, UnauthenticatedError, "unknown-certificate", "of elsewhere.svc,"),
    ],
)
def test_each_lack_of_trust_is_one_error_that_says_what_to_do(
    servers, authority, stranger, server, settings, error, reason, said
):
    given = {key: value for key, value in settings.items() if key == "token"}
    if "tls" in settings:
        given["tls_ca"] = (stranger if settings["tls"] == "stranger" else authority).ca
    by = settings.get("by")
    if by is not None:
        given |= of(
            stranger if by == "stranger" else authority,
            **({"valid": yesterday()} if by == "yesterday" else {}),
            **({"common": "nobody", "hosts": ()} if by == "nobody" else {}),
            **({"common": "worker.svc", "hosts": ("elsewhere.svc",)} if by == "pretender" else {}),
        )
    address = servers[server].replace("127.0.0.1", settings.get("host", "127.0.0.1"))
    with pytest.raises(error, match=said) as caught:
        connect(address, **given)
    assert (type(caught.value), caught.value.reason) == (error, reason)


def test_of_several_servers_that_refuse_alike_that_is_the_error(servers, authority):
    port = servers["tokens"].rpartition(":")[2]
    with pytest.raises(UnauthenticatedError, match="none of"):
        connect([servers["clear"], f"localhost:{servers['clear'].rpartition(':')[2]}"], token="simsim")
    with pytest.raises(UnavailableError, match="none of") as caught:
        Client([servers["tokens"], f"127.0.0.2:{port}"], tls_ca=authority.ca, token="simsim", connect_timeout_s=0.5)
    assert type(caught.value) is UnavailableError


def test_a_certificate_may_be_of_another_name_than_the_address(servers, authority):
    address = servers["tls"].replace("127.0.0.1", "localhost")
    connect(address, tls_ca=authority.ca, tls_name="127.0.0.1")


def test_of_one_name_that_stands_for_addresses_the_certificates_have_that_name():
    config = ClientConfig(tls_ca="ca")
    assert Servers(["dns:///pool.svc:50051"]).named(config).tls_name == "pool.svc"
    for targets in (["a:1"], ["dns:///a:1", "dns:///b:1"], ["dns:///a:1", "b:1"], ["etcd://a:1", "dns:///a:1"]):
        assert Servers(targets).named(config).tls_name is None
    assert Servers(["dns:///a:1"]).named(ClientConfig(tls_ca="ca", tls_name="b")).tls_name == "b"
    assert Servers(["dns:///a:1"]).named(ClientConfig()).tls_name is None


def test_a_server_that_ends_connections_for_another_reason_is_not_taken_for_one_of_tls(authority):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def end() -> None:
            while True:
                try:
                    listener.accept()[0].close()
                except OSError:
                    return

        thread = threading.Thread(target=end)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        for settings in ({}, {"tls_ca": authority.ca}):
            assert Credentials(ClientConfig(**settings)).diagnose(address) is None
        with pytest.raises(UnavailableError) as caught:
            Client(address, connect_timeout_s=0.5)
        assert type(caught.value) is UnavailableError
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(LIMIT_S)
    assert Credentials(ClientConfig()).diagnose("unix:/nowhere") is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tls_cert": "c"}, "go together"),
        ({"tls_key": "k"}, "go together"),
        ({"tls_cert": "c", "tls_key": "k"}, "tls_cert needs tls_ca"),
        ({"tls_name": "n"}, "tls_name needs tls_ca"),
        ({"token": ""}, "token must be printable ASCII"),
        ({"token": "a b"}, "token must be printable ASCII"),
        ({"token": "\u00e9"}, "token must be printable ASCII"),
        ({"token": b"a"}, "token must be printable ASCII"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_read(settings, said):
    with pytest.raises(ValueError, match=said):
        Client("127.0.0.1:1", **settings)


def test_files_that_cannot_be_are_named(tmp_path, authority):
    for settings in ({"tls_ca": tmp_path / "nowhere"}, {"token": f"file:{tmp_path / 'nowhere'}"}):
        with pytest.raises(PemError, match="nowhere cannot be read"):
            Client("127.0.0.1:1", **settings)
    (tmp_path / "two").write_text("a\nb\n")
    with pytest.raises(PemError, match="must hold one token"):
        Client("127.0.0.1:1", token=f"file:{tmp_path / 'two'}")


def test_a_token_is_in_no_text_about_the_client(servers):
    with Client(servers["clear"], **PATIENCE, token="sesame") as pool:
        assert "sesame" not in f"{pool!r} {pool.status()} {pool._config!r}"


async def _lookup(address, **settings):
    async with AsyncClient(address, **PATIENCE, **settings) as pool:
        return await pool.lookup_rows({2: np.array([5])})


def test_asyncio_takes_the_same(servers, authority):
    rows = asyncio.run(_lookup(servers["tokens"], tls_ca=authority.ca, token="sesame"))
    assert rows[2].tobytes() == expected(2, [5])
    with pytest.raises(UnauthenticatedError):
        asyncio.run(_lookup(servers["tokens"], tls_ca=authority.ca))


def test_a_token_in_a_file_is_read_again_when_it_changes(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("engrampool_client.lanes.credentials._LOOK_S", 0.0)
    callers = write_callers(tmp_path / "callers", {"name": "a", "tokens": ["first", "second"]})
    token = put(tmp_path / "token", b"first\n")
    with running(packed, tokens=callers) as run, Client(run.address, **PATIENCE, token=f"file:{token}") as pool:
        pool.lookup([1])
        put(token, b"second\n")
        pool._shards.sets[0].replicas[0]._lanes[0].describe(LIMIT_S)  # which looks at the file
        write_callers(callers, {"name": "a", "token": "second"})
        eventually(lambda: not _answered(run.address, "first"), "the first token is revoked")
        connect(run.address, token="second")
        eventually(lambda: pool.lookup_rows({2: np.array([7])})[2].tobytes() == expected(2, [7]))


def _hang(go_on: threading.Event) -> tuple[None, ...]:
    assert go_on.wait(LIMIT_S)
    return ()


def test_a_disk_with_credentials_that_hangs_holds_up_no_lookup(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("engrampool_client.lanes.credentials._LOOK_S", 0.0)
    callers = write_callers(tmp_path / "callers", {"name": "a", "tokens": ["first", "second"]})
    token, go_on = put(tmp_path / "token", b"first"), threading.Event()
    mark = reread._mark
    with (
        running(packed, tokens=callers) as run,
        Client(run.address, **PATIENCE, token=f"file:{token}", direct="off", attach="off") as pool,
    ):
        monkeypatch.setattr(reread, "_mark", lambda paths: _hang(go_on) if token in paths else mark(paths))
        put(token, b"second")
        try:
            for row in range(5):
                assert pool.lookup_rows({2: np.array([row])})[2].tobytes() == expected(2, [row])
        finally:
            go_on.set()
            monkeypatch.setattr(reread, "_mark", mark)
        lane = pool._shards.sets[0].replicas[0]._lanes[0]
        eventually(lambda: lane.describe(LIMIT_S) and "second" in str(lane._connection.metadata))
        write_callers(callers, {"name": "a", "token": "second"})
        eventually(lambda: not _answered(run.address, "first"), "the first token is revoked")
        assert pool.lookup_rows({2: np.array([7])})[2].tobytes() == expected(2, [7])


def test_a_client_that_masks_says_that_it_is_not_trusted_any_more(packed, tmp_path, caplog):
    callers = write_callers(tmp_path / "callers", {"name": "a", "token": "sesame"})
    with (
        running(packed, tokens=callers) as run,
        Client(run.address, **PATIENCE, token="sesame", on_failure="mask") as pool,
    ):
        assert pool.prefetch(np.array([1])).valid(2).all()
        write_callers(callers, {"name": "b", "token": "other"})
        eventually(lambda: not pool.prefetch(np.array([1])).valid(2).any())
        eventually(lambda: "until this client's credentials are mended" in caplog.text)  # once the step has ended
        assert "the token is not one that this server knows" in caplog.text
        assert "sesame" not in caplog.text


def test_a_token_that_is_replaced_is_shown_by_every_lane_of_the_client(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("engrampool_client.lanes.credentials._LOOK_S", 0.0)
    callers = write_callers(tmp_path / "callers", {"name": "a", "tokens": ["first", "second"]})
    token = put(tmp_path / "token", b"first")
    with running(packed, tokens=callers) as run:
        credentials = Credentials(ClientConfig(token=f"file:{token}"))
        lanes = [GrpcLane(run.address, credentials) for _ in range(3)]
        try:
            for lane in lanes:
                lane.describe(LIMIT_S)
            put(token, b"second")
            lanes[0].describe(LIMIT_S)  # which looks at the file
            write_callers(callers, {"name": "a", "token": "second"})
            eventually(lambda: not _answered(run.address, "first"), "the first token is revoked")
            for lane in lanes:
                lane.describe(LIMIT_S)
        finally:
            for lane in lanes:
                lane.close()


def _answered(address, token) -> bool:
    try:
        connect(address, token=token)
    except UnauthenticatedError:
        return False
    return True


def test_a_client_whose_certificate_is_replaced_goes_on_with_the_new_one(packed, authority, tmp_path, monkeypatch):
    monkeypatch.setattr("engrampool_client.lanes.credentials._LOOK_S", 0.0)
    cert, key = authority.sign("old")
    callers = write_callers(
        tmp_path / "callers", {"name": "a", "certificate": ["old"]}, {"name": "b", "certificate": ["new"]}
    )
    files = {**authority.of_server(), "tls_client_ca": authority.ca, "tokens": callers}
    mine = {"tls_ca": authority.ca, "tls_cert": cert, "tls_key": key}
    with running(packed, **files) as run, Client(run.address, **PATIENCE, **mine) as pool:
        pool.lookup([1])
        put(key, b"junk")  # half of the change is there
        pool.lookup([2])
        new_cert, new_key = authority.sign("new")
        put(cert, new_cert.read_bytes())
        put(key, new_key.read_bytes())
        pool.lookup([3])
        write_callers(callers, {"name": "b", "certificate": ["new"]})
        eventually(lambda: len(run.server.shared.access.callers.value.names) == 1)
        pool.lookup([4])
