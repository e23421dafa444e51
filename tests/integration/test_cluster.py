"""A model on several servers, each shard twice, under constant load, while all fails that can and versions change.

Four hosts, each with two servers of different shards; where the machine permits, hosts of a network, whose links can be
cut. `pytest -s` shows how long everything took to be well again.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster_load import Load, loads
from cluster_rows import FIRST, PATCHED, SECOND, write_versions
from engrampool_client.testing import ServerProcess, serve_process
from etcd_process import EtcdProcess, running_etcd
from network import Host, NotPermittedError, network
from prefork import PREFORK
from server_fixtures import IS_CI, lacking, lasting_address
from small_model import small_spec

SHARDS = HOSTS = 4
MODEL = "deepseek-v4.1"
_ENGRAMPOOL = (sys.executable, "-m", "engrampool_proto")


class Cluster:
    """Servers by number: 2 * host and 2 * host + 1. clients: under load, see `loads`."""

    def __init__(self, where: Path, hosts: Sequence[Host | None], etcd: EtcdProcess, stack: ExitStack) -> None:
        self.where, self.hosts, self.etcd, self._stack = where, hosts, etcd, stack
        self._client_prefix = hosts[0].prefix if hosts[0] else ()
        self.servers: list[ServerProcess] = []
        self._commands: list[Callable[[], Any]] = []
        self._begun_s = 0.0
        for number in range(2 * HOSTS):
            self._commands.append(self._command(number))
            self.servers.append(self._start(number))
        self.clients: list[Load] = []

    def _command(self, number: int) -> Callable[[], Any]:
        name, host = number // 2, self.hosts[1 + number // 2]
        port = lasting_address().rpartition(":")[2]
        memory = self.where / f"host{name}"
        memory.mkdir(exist_ok=True)
        settings = {
            "listen": f"{host.address if host else '127.0.0.1'}:{port}",
            # Replicas of a shard are on neighbouring hosts.
            "shard": f"{(name + number % 2) % SHARDS}/{SHARDS}",
            "registry": self.etcd.url(),
            "registry_cache": str(self.where / f"server{number}.json"),
            "memory": f"file:{memory}",
            "workers": 1,
            "metrics": "off",
        }
        return lambda: serve_process(ready=False, prefix=host.prefix if host else (), **settings)

    def _start(self, number: int) -> ServerProcess:
        server: ServerProcess = self._stack.enter_context(self._commands[number]())
        return server

    def start(self, *numbers: int) -> None:
        """Start servers that ended, at once, and wait until they serve."""
        for number in numbers:
            self.servers[number] = self._start(number)
        for number in numbers:
            self.servers[number].wait_for("serving")

    def end(self, signal_number: int, *numbers: int) -> None:
        for number in numbers:
            self.servers[number].process.send_signal(signal_number)
        for number in numbers:
            self.servers[number].process.wait()

    def run(self, *words: str) -> None:
        """An `engrampool` command, on the clients' host."""
        command = [*self._client_prefix, *_ENGRAMPOOL, *words, "--registry", self.etcd.url()]
        done = PREFORK.run(command, timeout=150)
        assert done.returncode == 0, done.stderr

    @contextmanager
    def phase(self, what: str) -> Iterator[None]:
        """Something that happens to the cluster, and ends when all is well again: shows what that took."""
        for client in self.clients:
            client.slowest_s = 0.0
        self._begun_s = time.monotonic()
        yield
        slowest = ", ".join(f"{client.slowest_s:.2f}" for client in self.clients)
        print(f"{what}: well again after {time.monotonic() - self._begun_s:.1f} s; slowest lookups {slowest} s")

    def mended(self) -> None:
        """From now on it can become well again."""
        self._begun_s = time.monotonic()

    def answered(self, lookups: int = 15) -> None:
        for client in self.clients:
            client.answered(lookups)

    def well(self, version: str) -> None:
        """Wait until all servers are used, and answers are of this version."""
        for client in self.clients:
            client.wait_for(lambda said: len(said["open"]) == 2 * HOSTS and said["version"] == version)
        self.answered(5)


def rolls(lines: Sequence[dict[str, Any]]) -> int:
    """How often it has replaced its workers, which it also does for another version."""
    return sum(line["event"] == "rolled" for line in lines)


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        try:
            hosts: Sequence[Host | None] = stack.enter_context(network(1 + HOSTS))
            here = hosts[0]
            etcd = stack.enter_context(running_etcd(tmp_path, here.address, here.prefix))
        except NotPermittedError as error:
            if IS_CI:
                lacking(f"no links to cut: {error}")
            print(f"no links to cut: {error}")
            hosts = [None] * (1 + HOSTS)
            etcd = stack.enter_context(running_etcd(tmp_path))
        yield Cluster(tmp_path, hosts, etcd, stack)


@pytest.mark.timeout(600)
def test_no_step_fails_and_no_byte_is_wrong_while_one_replica_of_each_shard_is_up(cluster):
    digests = write_versions(cluster.where, small_spec())
    cluster.run("publish", str(cluster.where / FIRST), "--activate")
    with loads([cluster.etcd.url()], cluster._client_prefix) as cluster.clients:
        cluster.well(FIRST)
        with cluster.phase("kill -9 of servers of two shards, and their restart"):
            cluster.end(signal.SIGKILL, 0, 4)
            cluster.answered()
            cluster.mended()
            cluster.start(0, 4)
            cluster.well(FIRST)
        with cluster.phase("etcd stopped, a server killed and restarted meanwhile"):
            cluster.etcd.stop()
            cluster.answered()
            cluster.end(signal.SIGKILL, 1)
            cluster.answered()
            cluster.mended()
            cluster.start(1)
            cluster.well(FIRST)
            cluster.etcd.start()
            cluster.answered()
        if cluster.hosts[0] is not None:
            with cluster.phase("the link of a host cut, and healed"):
                cluster.hosts[1].cut = True
                cluster.answered()
                cluster.mended()
                cluster.hosts[1].cut = False
                cluster.well(FIRST)
        with cluster.phase("publish, load and activate another version"):
            cluster.run("publish", str(cluster.where / SECOND), "--activate")
            cluster.well(SECOND)
        with cluster.phase("roll back"):
            cluster.run("rollback", MODEL)
            cluster.well(FIRST)
        with cluster.phase("publish and activate a patch of 1 % of the rows"):
            cluster.run("publish", str(cluster.where / PATCHED), "--activate")
            cluster.well(PATCHED)
        with cluster.phase("retire the other version"):
            cluster.run("retire", MODEL, digests[SECOND])
            for server in cluster.servers:
                server.wait_for("version-withdrawn")
            cluster.well(PATCHED)
        with cluster.phase("replace the workers of every server, one server after the other"):
            for server in cluster.servers:
                before = rolls(server.said())
                server.process.send_signal(signal.SIGHUP)
                server.wait_until(lambda lines, before=before: rolls(lines) > before)
            cluster.well(PATCHED)
        with cluster.phase("stop the servers of a host, and start them"):
            cluster.end(signal.SIGTERM, 0, 1)
            cluster.answered()
            cluster.mended()
            cluster.start(0, 1)
            cluster.well(PATCHED)
        for client in cluster.clients:
            said = client.end()
            assert said["failed"] == {}
            assert (said["wrong"], said["mixed"]) == (0, 0)
            assert said["lookups"] > 100
