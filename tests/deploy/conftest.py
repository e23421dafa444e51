"""A small packed model, a real server that holds it, and lookups of every kind that the dashboard shows."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest

from container import Container, Containers, NotPermittedError, containers
from engrampool_client import Client
from engrampool_client.testing import ServerProcess, serve_process
from engrampool_proto.builders import blueprint
from engrampool_proto.synthetic import synthetic_rows
from engrampool_proto.v1 import pool_pb2, pool_pb2_grpc
from engrampool_server.files.table_writer import write_tables
from etcd_process import running_etcd
from prefork import PREFORK
from server_fixtures import LIMIT_S, PATIENCE, expected, lacking, pack, version_of

# Qwen's family needs no tokenizer. Two layers, so that a sum by layer has something to tell apart.
CONFIG = {
    "ple_layer_ids": [3, 7],
    "ngram_vocab_size_base": 500,
    "ple_embed_dim": 640,
    "vocab_size": 1000,
    "eos_token_id": 7,
}


@pytest.fixture(scope="session")
def packed(tmp_path_factory) -> Path:
    spec = blueprint(CONFIG).spec
    out = tmp_path_factory.mktemp("models") / "small"

    def fill(table, start, rows):
        rows[:] = synthetic_rows(table, np.arange(start, start + len(rows), dtype=np.uint64))

    write_tables(out, spec, {"synthetic": spec.digest}, fill)
    return out


@pytest.fixture(scope="session")
def server(packed) -> Iterator[ServerProcess]:
    with serve_process(packed) as running:
        yield running


@pytest.fixture(scope="session")
def round_of_lookups(server) -> Iterator[Callable[[], None]]:
    """Each call answers a small lookup and a streamed one, and one over the direct lane, and has one refused."""
    few, many = np.arange(4, dtype=np.int32), np.arange(2000, dtype=np.int32) % 1000
    with (
        Client(server.address, direct="off", **PATIENCE) as client,
        Client(server.address, **PATIENCE) as direct,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = pool_pb2_grpc.PoolStub(channel)

        def lookups() -> None:
            client.lookup(few)
            client.lookup(many)
            direct.lookup(few)
            with pytest.raises(grpc.RpcError, match="nobody-packed-this"):
                stub.Lookup(pool_pb2.LookupRequest(model="nobody-packed-this"), timeout=60)

        yield lookups


@dataclass
class ClientProcess:
    """A process that looks rows up, as a model's does. metrics_address: where it shows its metrics."""

    process: "subprocess.Popen[str]"
    metrics_address: str

    def lookups(self) -> None:
        """Have it do some: new n-grams and known ones, and hints that come true."""
        print(file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"


@dataclass
class Cluster:
    """Servers of one pool, and what a client takes for its target."""

    servers: list[ServerProcess]
    target: str


@pytest.fixture(scope="session")
def cluster(packed, tmp_path_factory) -> Iterator[Cluster]:
    """Two servers with half of the rows each, in a registry that has the model as active."""
    directory = tmp_path_factory.mktemp("registry")
    with running_etcd(directory) as etcd, ExitStack() as stack:
        command = [sys.executable, "-m", "engrampool_proto", "publish", str(packed), "--activate", "--registry"]
        servers = [
            stack.enter_context(
                serve_process(
                    ready=False,
                    shard=f"{shard}/2",
                    registry=etcd.url(),
                    memory=f"file:{directory}",
                    registry_cache="off",
                    workers=1,
                )
            )
            for shard in range(2)
        ]
        done = PREFORK.run([*command, etcd.url()], timeout=LIMIT_S)
        assert done.returncode == 0, done.stderr
        for one in servers:
            one.wait_for("serving")
        yield Cluster(servers, etcd.url())


@pytest.fixture(scope="session")
def client_process(cluster) -> Iterator[ClientProcess]:
    command = [sys.executable, str(Path(__file__).with_name("client_process.py")), cluster.target]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ) as process:
        port = process.stdout.readline().strip()
        assert port, "the client's process ended"
        yield ClientProcess(process, f"127.0.0.1:{port}")
        process.stdin.close()  # it ends with its input
        assert process.wait(60) == 0


# A server may hold a part of the rows only, which is none for a client.
LOOK = """
import sys
import grpc
import numpy as np
from engrampool_proto import wire
request = wire.LookupRequest("small", sys.argv[2], ((2, np.array([0], np.uint32)),))
with grpc.insecure_channel(sys.argv[1]) as channel:
    answer = channel.unary_unary("/engrampool.v1.Pool/Lookup")(wire.encode_request(request), timeout=60)
print(bytes(wire.parse_response(answer).tables[0].rows).hex())
"""
HEALTH = Path(__file__).parents[2] / "deploy/healthcheck.py"


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Iterator[Containers]:
    """Where containers can be started."""
    base = tmp_path_factory.getbasetemp()
    # Processes that share the tests have folders of their own in one of the run.
    packages = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "packages"
    try:
        with containers(tmp_path_factory.mktemp("containers"), packages) as made:
            yield made
    except NotPermittedError as error:
        lacking(f"no containers of namespaces: {error}")


@pytest.fixture(scope="session")
def to_mount(tmp_path_factory) -> Path:
    """A packed model that has as many heads as there are shards, and more."""
    return pack(tmp_path_factory.mktemp("models") / "to-mount")


@pytest.fixture(scope="session")
def serves(place, to_mount) -> Callable[[Container], None]:
    """Starts the server in a container: it must read its kernels, be well by the image's check, and answer.

    What differs in nothing that matters is started once.
    """
    done = []

    def check(container: Container) -> None:
        if container in done:
            return
        with place.serving(container) as server:
            # Else they were compiled, as it starts where nothing can be kept.
            server.wait_until(lambda lines: all(line["event"] != "kernels-not-kept" for line in lines))
            listen = container.environment["ENGRAMPOOL_LISTEN"]
            health = place.run(str(HEALTH), ENGRAMPOOL_LISTEN=listen)
            assert (health.returncode, health.stderr) == (0, "")
            address = listen.replace("0.0.0.0", "127.0.0.1")
            looked = place.run("-c", LOOK, address, version_of(to_mount))
            assert (looked.stdout.strip(), looked.stderr) == (expected(2, [0]).hex(), "")
        done.append(container)

    return check
