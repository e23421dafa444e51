"""Real servers and clients while a real etcd loses its data, fills up, stays away, or is another one than before."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engrampool_client import Client
from engrampool_client.testing import ServerProcess, serve_process
from engrampool_proto.registry.etcd import Active, VersionError
from engrampool_server.commands.versions import overview, overview_text
from engrampool_server.files.patches.patch import write_patch
from engrampool_server.files.table_files import PackedModel
from etcd_process import EtcdProcess, running_etcd
from pooled import Asker, answers, described, member, published, serving, wait_active, wait_held
from server_fixtures import LIMIT_S, eventually, lasting_address, pack, scrape


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two versions, and a patch of the first."""
    where = tmp_path_factory.mktemp("models")
    pack(where / "first", block_bytes=100_000)
    pack(where / "second", change=True, block_bytes=100_000)
    with PackedModel.open(where / "first") as base:
        write_patch(base, {2: (np.arange(5, dtype=np.uint64), np.ones((5, 264), np.uint8))}, where / "patch")
    return where


@pytest.fixture
def etcd(tmp_path) -> Iterator[EtcdProcess]:
    """One that a test may do anything to."""
    with running_etcd(tmp_path) as etcd:
        yield etcd


@pytest.fixture
def rows(tmp_path) -> Path:
    """Where segments lie."""
    (tmp_path / "rows").mkdir()
    return tmp_path / "rows"


def lose(etcd: EtcdProcess) -> None:
    """Have another etcd come back in its place, empty, at a revision that others have raised beyond the last one."""
    etcd.wipe(token="another", beyond=etcd.registry().read().revision)


def health(server: ServerProcess, service: str = "") -> int:
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=LIMIT_S).status


def metric(server: ServerProcess, name: str) -> float | None:
    return scrape(server.metrics_address).get(name)


def wait_not_registered(server: ServerProcess, why: str) -> str:
    """What it says of that; where the machine is slow it may say first that the registry is silent."""

    def said() -> str | None:
        return next((line["error"] for line in server.said("not-registered") if why in line["error"]), None)

    return eventually(said, why)


def registrar_of(server: ServerProcess) -> int:
    """Its process: of a server without metrics the one child that is no worker, while nothing is loaded."""
    pids = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    (registrar,) = set(map(int, pids)) - set(server.worker_pids().values())
    return registrar


def test_a_registry_that_comes_back_empty_takes_no_table_and_fails_no_lookup(etcd, models, rows):
    registry = etcd.registry()
    first, second, patch = versions = [published(models / name) for name in ("first", "second", "patch")]
    for version in versions:
        registry.publish(version)
    with serving(registry, rows) as server:
        wait_held(registry, server, *versions)
        registry.activate("small", first.version)
        registry.activate("small", patch.version)
        wait_active(registry, server, patch)
        with Asker(registry.url) as asker:
            eventually(lambda: asker.answers or asker.error)
            lose(etcd)
            assert registry.read().published == ()
            wait_held(registry, server, *versions)
            said = server.wait_for("unpublished")["versions"]
            assert said == [
                f"small {one.version} from {one.location}" for one in sorted(versions, key=lambda one: one.version)
            ]
            eventually(lambda: metric(server, 'engrampool_versions{state="unpublished"}') == 3)
            assert "active as servers know it" in overview_text(overview(registry.read()))
            # A client that comes now has nothing from the registry but what servers know.
            with Client(registry.url) as late:
                assert late.version == patch.version
            # The recovery, in the worst order: what is not read first, and the patch's base before the patch.
            for version in (second, first, patch):
                registry.publish(version)
                answers(server, second, True)
            with pytest.raises(VersionError, match="is active"):
                registry.retire("small", patch.version)
            registry.activate("small", patch.version)
            eventually(lambda: metric(server, 'engrampool_versions{state="unpublished"}') == 0)
            assert server.said("version-withdrawn") == []
            before = asker.answers
            eventually(lambda: asker.answers > before or asker.error)
            # From here on all is as it was: what is retired goes.
            registry.retire("small", second.version)
            assert server.wait_for("version-withdrawn")["versions"] == [f"small {second.version}"]
            wait_held(registry, server, first, patch)
        assert described(server) == {first.version, patch.version}


def test_a_server_that_started_from_its_cache_keeps_it_all_when_the_registry_comes_back_empty(
    etcd, models, rows, tmp_path
):
    registry = etcd.registry()
    first, second = versions = [published(models / name) for name in ("first", "second")]
    for version in versions:
        registry.publish(version)
    cache = tmp_path / "published.json"
    settings: dict[str, Any] = {"registry_cache": cache, "listen": lasting_address()}
    with serving(registry, rows, **settings) as server:
        wait_held(registry, server, *versions)
        registry.activate("small", second.version)
        wait_active(registry, server, second)
        etcd.stop()
    os.utime(cache, (0, 0))
    # A wipe while it runs, after a start without the registry; then one before a start beside an empty registry.
    with serving(registry, rows, **settings) as server:
        assert set(server.said("registry-cache")[0]["versions"]) == {first.version, second.version}
        assert server.said("registry-cache")[0]["age_s"] > 1e9
        assert metric(server, "engrampool_registry_age_seconds") > 1e9
        assert health(server) == health_pb2.HealthCheckResponse.SERVING
        etcd.wipe()
        record = wait_held(registry, server, *versions)
        assert record.active == {"small": second.version}
        assert {row[1] for row in json.loads(cache.read_text())["published"]} == {first.version, second.version}
        assert server.said("version-withdrawn") == []
        eventually(lambda: metric(server, "engrampool_registry_age_seconds") < 1e9, "it heard of the registry")
    with serving(registry, rows, **settings) as server:
        wait_held(registry, server, *versions)
        answers(server, second, True)
        assert server.said("registry-cache") == []
        registry.publish(first)
        registry.publish(second)
        assert registry.activate("small", second.version) == Active("small", second.version)
        registry.retire("small", first.version)
        wait_held(registry, server, second)
        eventually(lambda: [row[1] for row in json.loads(cache.read_text())["published"]] == [second.version])


def test_a_registrar_that_ended_while_the_registry_lost_its_data_forgets_nothing(etcd, models, rows):
    registry = etcd.registry()
    first, second = (published(models / name) for name in ("first", "second"))
    registry.publish(first)
    with serving(registry, rows, metrics="off") as server:
        wait_held(registry, server, first)
        revision = registry.read().revision
        etcd.stop()
        os.kill(registrar_of(server), signal.SIGKILL)
        server.wait_for("worker-died")
        etcd.wipe(beyond=revision)  # of the same cluster
        registry.publish(second)
        wait_held(registry, server, first, second)
        assert server.said("version-withdrawn") == []
        answers(server, first)


def test_health_and_metrics_say_where_nothing_is_held(etcd, models, rows):
    registry, first = etcd.registry(), published(models / "first")
    registry.publish(first)
    with serving(registry, rows) as server:
        wait_held(registry, server, first)
        assert metric(server, "engrampool_serving") == 1
        registry.retire("small", first.version)
        server.wait_for("version-withdrawn")
        server.wait_for("nothing-held")
        for service in ("", "engrampool.v1.Pool"):
            assert health(server, service) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert metric(server, "engrampool_serving") == 0
        registry.publish(first)
        wait_held(registry, server, first)
        assert health(server) == health_pb2.HealthCheckResponse.SERVING
        assert metric(server, "engrampool_serving") == 1
        answers(server, first)


def test_a_full_registry_is_said_by_the_server_that_it_does_not_register(tmp_path, models, rows):
    with running_etcd(tmp_path, flags=["--quota-backend-bytes=200000"]) as etcd:
        etcd.fill()
        registry = etcd.registry()
        with serving(registry, rows, models / "first") as server:
            said = wait_not_registered(server, "database space exceeded; compact and defragment it")
            eventually(lambda: metric(server, "engrampool_unregistered") == 1)
            answers(server, published(models / "first"))
            etcd.make_room()
            server.wait_for("registered")
            assert eventually(lambda: member(registry, server), "it is registered").of("small")
            eventually(lambda: metric(server, "engrampool_unregistered") == 0)
            assert [line["error"] for line in server.said("not-registered")].count(said) == 1


def test_a_server_that_clashes_with_the_pool_does_not_join_it(etcd, models, rows, tmp_path):
    registry, first = etcd.registry(), published(models / "first")
    registry.publish(first)
    with ExitStack() as stack:
        halves = [
            stack.enter_context(serving(registry, rows, models / "first", shard=shard, metrics="off"))
            for shard in ("0/2", "1/2")
        ]
        for half in halves:
            wait_held(registry, half, first)
        registry.activate("small", first.version)
        with serving(registry, rows, models / "first", shard="1/3") as third, Client(registry.url) as client:
            why = f"{third.address} does not join the pool {registry.url}: {third.address} holds rows"
            assert "same number of shards" in wait_not_registered(third, why)
            eventually(lambda: metric(third, "engrampool_unregistered") == 1)
            assert set(registry.read().members) == {half.address for half in halves}
            client.lookup(np.arange(300, dtype=np.int32))
            # Once the others are gone it joins.
            for half in halves:
                half.process.terminate()
                half.process.wait(LIMIT_S)
            third.wait_for("registered")
            wait_held(registry, third, first)


def test_a_client_that_starts_without_the_registry_goes_by_what_servers_know_as_active(etcd, models, rows, tmp_path):
    registry = etcd.registry()
    first, second = versions = [published(models / name) for name in ("first", "second")]
    for version in versions:
        registry.publish(version)
    settings = {"registry_cache": tmp_path / "published.json"}
    with serving(registry, rows, **settings) as server:
        wait_held(registry, server, *versions)
        for active in (second, first):
            registry.activate("small", active.version)
            wait_active(registry, server, active)
            etcd.stop()
            with Client([registry.url, server.address]) as client:
                assert client.version == active.version
            etcd.start()
        etcd.stop()
    with serving(registry, rows, **settings) as server, Client([registry.url, server.address]) as client:
        assert client.version == first.version
        etcd.start()
        registry.activate("small", second.version)
        eventually(lambda: client.version == second.version, "it follows")


def test_a_server_in_a_shell_with_a_registry_joins_nothing_unasked(etcd, models, rows):
    registry = etcd.registry()
    environ = {"ENGRAMPOOL_REGISTRY": registry.url}
    settings = {"memory": f"file:{rows}", "workers": 1, "environ": environ}
    with serve_process(models / "first", **settings) as server:
        answers(server, published(models / "first"))
        assert registry.read().members == {}
    environ["ENGRAMPOOL_JOIN"] = "true"
    with serve_process(models / "first", **settings) as server:
        eventually(lambda: member(registry, server))
