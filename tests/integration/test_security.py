"""Who can do what at real servers, as docs/SECURITY.md says: one test for each of its lines."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from certificates import Authority, bearer, put, write_callers
from direct_callers import greeted
from engrampool_client import Client, RejectedError, TlsError, UnauthenticatedError
from engrampool_client.config import ClientConfig
from engrampool_client.lanes.credentials import Credentials
from engrampool_client.lanes.grpc import GrpcLane
from engrampool_client.testing import ServerProcess, ServerStartError, serve_process
from engrampool_proto import frames
from engrampool_proto.segment import boot_id
from engrampool_proto.v1 import pool_pb2, pool_pb2_grpc
from engrampool_server.access.access import LOOK_S
from server_fixtures import LIMIT_S, PATIENCE, eventually, expected, pack, scrape, version_of

READER = {"name": "reader", "token": "of-the-reader"}
OPERATOR = {"name": "operator", "token": "of-the-operator", "roles": ["admin"]}
PROMETHEUS = {"name": "prometheus", "token": "of-prometheus", "roles": ["metrics"]}


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def callers(tmp_path) -> Path:
    return write_callers(tmp_path / "callers.toml", READER, OPERATOR, PROMETHEUS)


@pytest.fixture(scope="module")
def server(packed, authority, tmp_path_factory) -> Iterator[ServerProcess]:
    """One with all of it, for tests that change nothing."""
    directory = tmp_path_factory.mktemp("server")
    callers = write_callers(directory / "callers.toml", READER, OPERATOR, PROMETHEUS)
    settings = {**authority.of_server(), "tokens": callers, "lane_tls": "off", "memory": f"file:{directory}"}
    with serve_process(packed, workers=2, **settings) as process:
        yield process


def channel(authority, address) -> grpc.Channel:
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority.ca.read_bytes()))


def calls(open_channel: grpc.Channel, packed, token: str | None) -> dict[str, grpc.StatusCode]:
    """How each call ends that there is, and one that there is not, by name."""
    pool = pool_pb2_grpc.PoolStub(open_channel)
    request = pool_pb2.LookupRequest(
        model="small",
        version=version_of(packed),
        tables=[pool_pb2.TableIds(layer=2, u32=np.arange(3, dtype=np.uint32).tobytes())],
    )
    attach = pool_pb2.AttachRequest(model="small", version=version_of(packed), boot_id=boot_id())
    listing = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
    given = {"timeout": LIMIT_S, "metadata": bearer(token)}
    made = {
        "Describe": lambda: pool.Describe(pool_pb2.DescribeRequest(), **given),
        "Lookup": lambda: pool.Lookup(request, **given),
        "LookupStream": lambda: list(pool.LookupStream(request, **given)),
        "OpenDirect": lambda: pool.OpenDirect(pool_pb2.OpenDirectRequest(), **given),
        "Attach": lambda: pool.Attach(attach, **given),
        "reflection": lambda: list(
            reflection_pb2_grpc.ServerReflectionStub(open_channel).ServerReflectionInfo(listing, **given)
        ),
        "Stats": lambda: pool.Stats(pool_pb2.StatsRequest(), **given),
        "administration": lambda: open_channel.unary_unary("/engrampool.v1.Admin/Anything")(b"", **given),
    }
    ended = {}
    for name, call in made.items():
        try:
            call()
            ended[name] = grpc.StatusCode.OK
        except grpc.RpcError as error:
            ended[name] = error.code()
    return ended


READS = ("Describe", "Lookup", "LookupStream", "OpenDirect", "Attach", "reflection")


@pytest.mark.parametrize("token", [None, "", "wrong"])
def test_without_credentials_nothing_is_answered_but_health(server, packed, authority, token):
    with channel(authority, server.address) as opened:
        assert set(calls(opened, packed, token).values()) == {grpc.StatusCode.UNAUTHENTICATED}
        health = health_pb2_grpc.HealthStub(opened)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        assert next(health.Watch(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING


def test_a_reader_reads_and_administers_nothing(server, packed, authority):
    with channel(authority, server.address) as opened:
        ended = calls(opened, packed, READER["token"])
    assert {ended.pop(name) for name in READS} == {grpc.StatusCode.OK}
    assert ended == dict.fromkeys(("Stats", "administration"), grpc.StatusCode.PERMISSION_DENIED)


def test_an_administrator_reads_nothing_unless_it_has_that_role_too(server, packed, authority):
    with channel(authority, server.address) as opened:
        ended = calls(opened, packed, OPERATOR["token"])
    assert {ended.pop(name) for name in READS} == {grpc.StatusCode.PERMISSION_DENIED}
    # There is no such call, yet.
    assert ended == {"Stats": grpc.StatusCode.OK, "administration": grpc.StatusCode.UNIMPLEMENTED}


def test_who_scrapes_does_neither(server, packed, authority):
    with channel(authority, server.address) as opened:
        ended = calls(opened, packed, PROMETHEUS["token"])
    assert ended.pop("Stats") is grpc.StatusCode.OK
    assert set(ended.values()) == {grpc.StatusCode.PERMISSION_DENIED}


def get(server, authority, path: str, token: str | None = None) -> int:
    """The status of an answer of the metrics port."""
    request = urllib.request.Request(f"https://{server.metrics_address}{path}")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    context = ssl.create_default_context(cafile=str(authority.ca))
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S, context=context) as response:
            assert path != "/metrics" or b"engrampool_serving" in response.read()
            return response.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_the_metrics_port_tells_everybody_that_it_lives_and_metrics_to_who_may(server, authority):
    assert [get(server, authority, path) for path in ("/healthz", "/readyz", "/metrics")] == [200, 200, 401]
    tokens = [READER["token"], PROMETHEUS["token"], OPERATOR["token"], "wrong"]
    assert [get(server, authority, "/metrics", token) for token in tokens] == [401, 200, 200, 401]


def test_a_connection_to_the_metrics_port_that_speaks_no_tls_holds_up_nobody(server, authority):
    host, _, port = server.metrics_address.partition(":")
    with (
        closing(socket.create_connection((host, int(port)), LIMIT_S)) as silent,
        closing(socket.create_connection((host, int(port)), LIMIT_S)) as plain,
    ):
        plain.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert get(server, authority, "/readyz") == 200
        with suppress(ConnectionResetError):
            assert plain.recv(4096) == b""
        assert silent.fileno() >= 0


def test_the_metrics_port_may_stay_plain(packed, authority):
    with serve_process(
        packed, workers=1, environ={"ENGRAMPOOL_TLS_METRICS": "false"}, **authority.of_server()
    ) as server:
        assert scrape(server.metrics_address)["engrampool_serving"] == 1


# --- the direct lane


def client(server, authority, token=READER["token"], **settings) -> Client:
    return Client(server.address, tls_ca=authority.ca, token=token, **PATIENCE, **settings)


def right(pool: Client) -> bool:
    return pool.lookup_rows({2: np.array([5])})[2].tobytes() == expected(2, [5])


def ticket(server, authority, token=READER["token"]) -> pool_pb2.OpenDirectResponse:
    with channel(authority, server.address) as opened:
        stub = pool_pb2_grpc.PoolStub(opened)
        return stub.OpenDirect(pool_pb2.OpenDirectRequest(), timeout=LIMIT_S, metadata=bearer(token))


def test_beside_tls_there_is_no_lane_in_the_clear_unless_it_is_asked_for(packed, authority, server):
    for lane, tls in (("direct", {}), ("direct", {"lane_tls": "on"}), ("grpc", {"lane_tls": "none"})):
        with serve_process(packed, workers=1, **authority.of_server(), **tls) as careful:
            assert bool(careful.said("no-direct-lane")) == (lane == "grpc")
            assert not careful.said("in-the-clear")
            with Client(careful.address, tls_ca=authority.ca, attach="off", **PATIENCE) as pool:
                assert (right(pool), pool.status()["lane"]) == (True, lane)
    assert "not encrypted" in server.said("in-the-clear")[0]["what"]
    with client(server, authority, attach="off") as pool:
        assert (right(pool), pool.status()["lane"]) == (True, "direct")


def test_tokens_without_tls_are_said_in_the_log(packed, callers):
    with serve_process(packed, workers=1, tokens=callers) as server:
        assert "whoever sees the network sees them" in server.said("in-the-clear")[0]["what"]


def test_the_lane_lets_in_who_has_a_ticket_of_a_reader_and_once(server, authority):
    way_in = ticket(server, authority)
    forged = pool_pb2.OpenDirectResponse(port=way_in.port, ticket=b"\0" * len(way_in.ticket))
    assert [greeted(forged), greeted(way_in), greeted(way_in)] == [frames.REFUSED, frames.READY, frames.REFUSED]
    with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
        ticket(server, authority, None)


def test_a_ticket_dies_with_the_token_that_it_was_given_for(packed, authority, tmp_path):
    path = write_callers(tmp_path / "callers", {"name": "a", "tokens": ["old", "new"]})
    settings = {**authority.of_server(), "tokens": path, "lane_tls": "off"}
    with serve_process(packed, workers=1, **settings) as server:
        old, new = ticket(server, authority, "old"), ticket(server, authority, "new")
        write_callers(path, {"name": "a", "token": "new"})
        server.wait_until(lambda said: any(one["event"] == "callers-replaced" and "worker" in one for one in said))
        assert [greeted(old), greeted(new)] == [frames.REFUSED, frames.READY]


@pytest.mark.parametrize("lane_tls", ["off", "on"])
@pytest.mark.parametrize("left", [{"name": "other", "token": "x"}, {**READER, "roles": ["metrics"]}])
def test_a_token_that_is_revoked_is_out_on_every_way(packed, authority, callers, tmp_path, left, lane_tls):
    settings = {**authority.of_server(), "tokens": callers, "lane_tls": lane_tls, "memory": f"file:{tmp_path}"}
    with (
        serve_process(packed, workers=2, **settings) as server,
        client(server, authority, attach="off") as direct,
        client(server, authority, attach="off", direct="off") as over_grpc,
        client(server, authority) as attached,
    ):
        assert right(direct)
        assert right(over_grpc)
        assert right(attached)
        assert [one.status()["lane"] for one in (direct, over_grpc, attached)] == ["direct", "grpc", "attached"]
        write_callers(callers, left)
        for pool in (direct, over_grpc, attached):
            error = eventually(lambda pool=pool: _error(pool))
            assert error.reason in ("bad-token", "not-allowed")
        assert not attached.attached
    assert 2 * LOOK_S <= 2.0  # which is what we promise


def _error(pool: Client) -> Exception | None:
    try:
        right(pool)
    except Exception as error:
        return error
    return None


def test_tables_are_given_to_callers_on_the_same_machine_only(server, packed, authority):
    lane = GrpcLane(server.address, Credentials(ClientConfig(tls_ca=authority.ca, token=READER["token"])))
    try:
        assert lane.attach("small", version_of(packed), LIMIT_S).boot_id == boot_id()
    finally:
        lane.close()
    with channel(authority, server.address) as opened:
        for elsewhere in ("", "a0000000-0000-4000-8000-000000000000"):
            request = pool_pb2.AttachRequest(model="small", version=version_of(packed), boot_id=elsewhere)
            with pytest.raises(grpc.RpcError) as caught:
                pool_pb2_grpc.PoolStub(opened).Attach(request, timeout=LIMIT_S, metadata=bearer(READER["token"]))
            assert ("engrampool-reason", "other-machine") in caught.value.trailing_metadata()
    assert RejectedError  # what it becomes at a client of ours, which then looks rows up


# --- files that change


def shown(server: ServerProcess) -> str:
    """The certificate that the server shows to who comes now, as PEM."""
    host, _, port = server.address.partition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=LIMIT_S)


def test_certificates_are_replaced_without_a_restart_and_without_a_failed_lookup(packed, authority, tmp_path):
    other = Authority(tmp_path, "other")
    both = put(tmp_path / "both.pem", authority.ca.read_bytes() + other.ca.read_bytes())
    files = authority.of_server()
    over, failed, answered = threading.Event(), [], []

    def load(address: str) -> None:
        while not over.is_set():
            try:
                with Client(address, tls_ca=both, **PATIENCE) as pool:
                    answered.append(right(pool))
            except Exception as error:
                failed.append(error)

    with serve_process(packed, workers=2, **files) as server:
        thread = threading.Thread(target=load, args=(server.address,))
        thread.start()
        try:
            with Client(server.address, tls_ca=both, **PATIENCE) as lasting:
                for signer in (other, authority, other):
                    made = signer.of_server()
                    put(files["tls_key"], made["tls_key"].read_bytes())  # one after the other, as a copy does
                    put(files["tls_cert"], made["tls_cert"].read_bytes())
                    wanted = made["tls_cert"].read_text().strip()
                    # Of both workers, whichever the system picks.
                    eventually(lambda wanted=wanted: {shown(server).strip() for _ in range(8)} == {wanted})
                    before = len(answered)
                    eventually(lambda before=before: len(answered) > before + 1)
                    assert right(lasting)
        finally:
            over.set()
            thread.join()
    assert failed == []
    assert all(answered)


def test_of_damaged_files_the_last_good_ones_stay_and_that_is_logged_and_counted(packed, authority, callers):
    files = authority.of_server()
    with serve_process(packed, workers=1, **files, tokens=callers) as server:
        put(files["tls_cert"], b"junk")
        put(callers, b"junk")
        server.wait_until(
            lambda said: (
                {one["file"] for one in said if one["event"] == "credentials-damaged" and "worker" in one}
                == {"tls", "tokens"}
            )
        )
        # A worker that is started now has them, too.
        pid = server.worker_pids()[0]
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: server.worker_pids()[0] != pid)
        with client(server, authority) as pool:
            assert right(pool)
        context = ssl.create_default_context(cafile=str(authority.ca))
        request = urllib.request.Request(
            f"https://{server.metrics_address}/metrics", headers={"Authorization": f"Bearer {PROMETHEUS['token']}"}
        )
        with urllib.request.urlopen(request, timeout=LIMIT_S, context=context) as response:
            text = response.read().decode()
        counted = [line for line in text.splitlines() if line.startswith("engrampool_credentials_damaged_total{")]
        assert len(counted) == 2
        for file in ("tls", "tokens"):
            assert f'engrampool_credentials_stale{{file="{file}"}} 1.0' in text
        assert all(float(line.split()[-1]) >= 1 for line in counted)


def test_authorities_of_clients_are_replaced_too(packed, authority, tmp_path):
    other = Authority(tmp_path, "other")
    trusted = put(tmp_path / "trusted.pem", authority.ca.read_bytes())
    mine = dict(zip(("tls_cert", "tls_key"), other.sign("worker"), strict=True))
    with serve_process(packed, workers=1, **authority.of_server(), tls_client_ca=trusted) as server:
        with pytest.raises(TlsError) as caught:
            Client(server.address, tls_ca=authority.ca, **mine, **PATIENCE)
        assert caught.value.reason == "certificate-refused"
        put(trusted, authority.ca.read_bytes() + other.ca.read_bytes())
        server.wait_until(lambda said: any(one["event"] == "certificates-replaced" and "worker" in one for one in said))
        with Client(server.address, tls_ca=authority.ca, **mine, **PATIENCE) as pool:
            assert right(pool)


def test_a_token_that_was_revoked_stays_so_where_the_file_is_damaged_and_a_worker_is_replaced(
    packed, authority, callers
):
    with serve_process(packed, workers=1, **authority.of_server(), tokens=callers) as server:
        write_callers(callers, {"name": "other", "token": "x"})
        # By the supervisor, of which the next worker has them.
        server.wait_until(lambda said: any(one["event"] == "callers-replaced" and "worker" not in one for one in said))
        put(callers, b"junk")
        pid = server.worker_pids()[0]
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: server.worker_pids()[0] != pid)
        with client(server, authority, token="x") as pool:
            assert right(pool)
        with pytest.raises(UnauthenticatedError):
            client(server, authority)


# Looking at files waits for a disk, while a flag is there, until somebody opens the other end of a pipe.
HANGING_DISK = """
import os
from engrampool_proto.security import reread
mark = reread._mark
def hang(paths):
    if os.path.exists(os.environ["TEST_FLAG"]):
        os.close(os.open(os.environ["TEST_GATE"], os.O_RDONLY))
    return mark(paths)
reread._mark = hang
"""


def test_a_disk_with_credentials_that_hangs_holds_up_no_restart(packed, callers, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(HANGING_DISK)
    search = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    flag, gate = tmp_path / "flag", tmp_path / "gate"
    os.mkfifo(gate)
    environ = {"PYTHONPATH": search, "TEST_FLAG": str(flag), "TEST_GATE": str(gate)}
    with serve_process(packed, workers=1, tokens=callers, environ=environ) as server:
        flag.touch()
        for _ in range(3):  # the supervisor has looked between two of them
            pid = server.worker_pids()[0]
            os.kill(pid, signal.SIGKILL)
            eventually(lambda pid=pid: server.worker_pids()[0] != pid)
        with Client(server.address, token=READER["token"], **PATIENCE) as pool:
            assert right(pool)
        write_callers(callers, {"name": "other", "token": "x"})
        flag.unlink()
        through = os.open(gate, os.O_RDWR)  # opened for both, so that opening waits for nobody
        for worker in (True, False):
            server.wait_until(
                lambda said, worker=worker: any(
                    one["event"] == "callers-replaced" and ("worker" in one) == worker for one in said
                )
            )
        os.close(through)


@pytest.mark.parametrize("name", ["tls_cert", "tls_key", "tls_client_ca", "tokens"])
def test_a_server_does_not_start_with_files_that_are_damaged(packed, authority, callers, tmp_path, name):
    settings = {**authority.of_server(), "tls_client_ca": authority.ca, "tokens": callers}
    settings[name] = put(tmp_path / "junk", b"junk")
    with pytest.raises(ServerStartError, match=rf"engrampool: .*{settings[name]}"), serve_process(packed, **settings):
        pass


# --- programs


@pytest.mark.parametrize("by", ["flags", "variables"])
def test_a_command_that_asks_a_server_takes_credentials(server, authority, tmp_path, by):
    np.save(tmp_path / "tokens.npy", np.array([1, 2, 3], np.int32))
    put(tmp_path / "token", b"of-the-reader")
    given = {"tls_ca": authority.ca, "token": f"file:{tmp_path / 'token'}"}
    words = ["lookup", "--server", server.address, "--tokens", tmp_path / "tokens.npy", "--out", tmp_path / "rows.npz"]
    environ = dict(os.environ)
    if by == "flags":
        words += [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    else:
        environ |= {f"ENGRAMPOOL_CLIENT_{key.upper()}": str(value) for key, value in given.items()}
    command = [sys.executable, "-m", "engrampool_proto", *map(str, words)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "rows.npz")["layer_2"].shape == (3, 6, 264)
