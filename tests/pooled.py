"""Servers in real processes that follow a real registry, and what they hold and answer."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np

from engrampool_client import Client
from engrampool_client.testing import ServerProcess, serve_process
from engrampool_proto.registry.etcd import Member, Published, Registry
from engrampool_proto.v1 import pool_pb2, pool_pb2_grpc
from engrampool_server.files.patches.patch_files import PatchFiles, open_any
from server_fixtures import LIMIT_S, PATIENCE, SPEC, RawPool, eventually, expected, rows_of

IDS = np.arange(6500)


def published(location: Path | str, at: Path | str | None = None) -> Published:
    """The record of what lies at `location`. at: where servers are told that it lies."""
    with open_any(location) as files:
        rows = {table.layer: table.num_rows for table in files.spec.tables}
        base = files.base_version if isinstance(files, PatchFiles) else None
        return Published(files.spec.name, files.version, str(at or location), base, files.spec.digest, rows)


@contextmanager
def serving(registry: Registry, memory: Path, *models: Path, **settings) -> Iterator[ServerProcess]:
    defaults = {"registry": registry.url, "memory": f"file:{memory}", "workers": 1}
    with serve_process(*models, **{**defaults, **settings}) as server:
        yield server


def member(registry: Registry, server: ServerProcess) -> Member | None:
    return registry.read().members.get(server.address)


def wait_active(registry: Registry, server: ServerProcess, version: Published) -> None:
    """Until the member's record says that this version of its model, and nothing else, is active."""

    def knows() -> bool:
        record = member(registry, server)
        return record is not None and record.active == {version.model: version.version}

    eventually(knows, "it knows what is active")


def wait_held(registry: Registry, server: ServerProcess, *versions: Published) -> Member:
    """The member's record, once it has exactly these versions."""
    wanted = {(one.model, one.version) for one in versions}

    def found() -> Member | None:
        record = member(registry, server)
        return record if record and {(one.model, one.version) for one in record.held} == wanted else None

    return eventually(found, f"{len(versions)} versions are held")


def answers(server: ServerProcess, version: Published, changed=False) -> None:
    """Every row of layer 2 must be right. changed: bool, or one for each row: whether its last byte is another."""
    with RawPool(server.address, version.version) as pool:
        rows = rows_of(pool.lookup(pool.by_ids((2, IDS)), timeout=LIMIT_S))[2]
    found, wanted = (np.frombuffer(raw, np.uint8).reshape(len(IDS), -1) for raw in (rows, expected(2, IDS)))
    assert np.array_equal(found[:, :-1], wanted[:, :-1])
    assert np.array_equal(found[:, -1] ^ changed, wanted[:, -1])


def described(server: ServerProcess) -> set[str]:
    with grpc.insecure_channel(server.address) as channel:
        answer = pool_pb2_grpc.PoolStub(channel).Describe(pool_pb2.DescribeRequest(), timeout=LIMIT_S)
    return {model.version for model in answer.models}


class Asker:
    """Looks the same tokens up again and again; every answer must be the first one again."""

    def __init__(self, address: str) -> None:
        self.answers = 0
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, args=(address,))

    def _ask(self, address: str) -> None:
        tokens = np.arange(300, dtype=np.int32)
        try:
            with Client(address, cache_bytes=0, attach="off", **PATIENCE) as client:
                first = client.lookup(tokens)
                while not self._stop.is_set():
                    again = client.lookup(tokens)
                    assert all(np.array_equal(again[layer], first[layer]) for layer in SPEC.layers)
                    self.answers += 1
                    self._stop.wait(0.02)  # others need the processor, too
        except BaseException as error:
            self.error = error

    def __enter__(self) -> "Asker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self.error is not None:
            raise self.error
