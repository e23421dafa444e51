"""A small model with unequal tables, servers in this process, raw calls, and what must come back."""

import asyncio
import logging
import os
import random
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import grpc
import numpy as np
import pytest
import uvloop
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from engrampool_proto import wire
from engrampool_proto.hashing import TokenBatch, XorMix
from engrampool_proto.spec import ModelSpec, RowFormat, Segment, TableSpec
from engrampool_proto.synthetic import synthetic_rows
from engrampool_proto.token_map import TokenMap
from engrampool_server.access.access import Access
from engrampool_server.answer.emulation import Emulation
from engrampool_server.answer.grpc_server import GrpcServer
from engrampool_server.answer.in_flight import InFlight
from engrampool_server.answer.lane.admission import Admission
from engrampool_server.answer.lane.handles import Handles
from engrampool_server.answer.lookups import Lookups
from engrampool_server.answer.shared_state import SharedState
from engrampool_server.config import ServerConfig
from engrampool_server.files.table_files import PackedModel
from engrampool_server.files.table_writer import write_tables
from engrampool_server.memory.load import ModelLoader
from engrampool_server.memory.tables import LoadedModel, LoadedTable
from engrampool_server.ports import listen_on, reserve
from engrampool_server.setting_kinds import split_address
from engrampool_server.telemetry.exporter import Http
from engrampool_server.telemetry.metrics import Metrics

VOCAB = 1000
# Layer 2 has six heads over 4-grams and rows as DeepSeek-V4.1's; layer 9 two heads over 3-grams and rows of another
# size, so that mixing the two up cannot go unseen.
WIDE = RowFormat((Segment("values", "float8_e4m3fn", 256), Segment("scales", "float8_e8m0fnu", 8)))
NARROW = RowFormat((Segment("values", "bfloat16", 21),))
SPEC = ModelSpec(
    "small",
    VOCAB,
    (
        TableSpec(
            2, 6500, WIDE, XorMix((7919, 104729, 1299709, 15485863), ((1009, 1013), (1019, 1021), (1031, 1033)), 2)
        ),
        TableSpec(9, 4100, NARROW, XorMix((611953, 2750159, 350377), ((2003,), (2011,)), 2, stop=7)),
    ),
    TokenMap((np.arange(VOCAB) % 700).astype(np.int32)),
)
# After so long something hangs. Whatever has to be over before is held to that by other means.
LIMIT_S = 60.0
# Of a client: whether lookups are answered is not a matter of how soon this machine goes on, or starts a process.
PATIENCE = {"timeout_s": LIMIT_S, "retry_s": LIMIT_S, "connect_timeout_s": LIMIT_S}
IS_CI = os.environ.get("CI") == "true"


def lacking(what: str) -> NoReturn:
    """Skip a test for what this machine lacks, or fail it where CI is set: there nothing may be left out."""
    if IS_CI:
        pytest.fail(what)
    pytest.skip(what)


def pack(directory: Path, spec: ModelSpec = SPEC, *, change: bool = False, block_bytes: int = 200_000) -> Path:
    """Pack synthetic rows of `spec`. change: every row's last byte is another, which makes another version."""

    def fill(table, start, out):
        out[:] = synthetic_rows(table, np.arange(start, start + len(out), dtype=np.uint64))
        if change:
            out[:, -1] ^= 1

    write_tables(directory, spec, {"change": change}, fill, block_bytes=block_bytes)
    return directory


def version_of(directory: Path) -> str:
    with PackedModel.open(directory) as packed:
        return packed.version


def expected(layer: int, ids: Any) -> bytes:
    """The bytes of the rows `ids`, by the formula and not by the table."""
    return synthetic_rows(SPEC.table(layer), np.asarray(ids, np.uint64)).tobytes()


class Running:
    """A server on a thread of this process, as a worker has it in a process of its own.

    server: for what no client can see. address, metrics_address: as clients and Prometheus reach it; "" for none.
    """

    def __init__(self, server: GrpcServer, loader: ModelLoader, loop: asyncio.AbstractEventLoop, address: str) -> None:
        self.server, self._loader, self._loop, self.address = server, loader, loop, address
        self.metrics_address = ""

    def call(self, make: Callable[[], Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(make(), self._loop).result(LIMIT_S)

    def load(self) -> None:
        self.hold(list(self._loader.load(threading.Event())))

    def hold(self, models: list[LoadedModel]) -> None:
        async def hold() -> None:
            self.server.hold(models)

        self.call(hold)

    @contextmanager
    def metrics(self, listen: str) -> Iterator[None]:
        """Prometheus may ask meanwhile."""
        listener = listen_on(listen, "metrics")
        self.metrics_address = f"{split_address(listen)[0]}:{listener.getsockname()[1]}"
        with Http(listener, self.server.shared.metrics.registry, lambda: self.server.lookups.ready) as http:
            thread = threading.Thread(target=http.serve_forever)
            thread.start()
            try:
                yield
            finally:
                http.shutdown()
                thread.join()

    def scrape(self) -> Mapping[str, float]:
        """Over HTTP where it listens for that; without, a server stops half a second sooner."""
        if self.metrics_address:
            return scrape(self.metrics_address)
        return _samples(self.server.shared.metrics.registry.collect())


@contextmanager
def _event_loop(kind: str) -> Iterator[asyncio.AbstractEventLoop]:
    loop = uvloop.new_event_loop() if kind == "uvloop" else asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def running(*models: Path, load: bool = True, **settings: Any) -> Iterator[Running]:
    """A started server; load: and a serving one. settings: fields of ServerConfig."""
    config = ServerConfig(models=models, **{"listen": "127.0.0.1:0", "metrics": "off", **settings})
    metrics, emulation = Metrics(), Emulation.of(config.emulate)
    in_flight = InFlight(config.max_in_flight_bytes)
    shared = SharedState(metrics, in_flight, access=Access.of(config, metrics), emulation=emulation)
    with ExitStack() as stack:
        loader = stack.enter_context(closing(ModelLoader(config, shared.metrics)))
        loader.open()
        if config.listen.endswith(":0"):
            address, reserved = reserve(config.listen)
            for one in reserved:
                stack.enter_context(one)
            config = replace(config, listen=address)
        shared.admission = Admission.open(config.lane, config.listen)
        if shared.admission is not None:
            stack.enter_context(closing(shared.admission))
        loop = stack.enter_context(_event_loop(config.event_loop))
        run = Running(GrpcServer(config, shared), loader, loop, config.listen)
        if config.metrics != "off":
            stack.enter_context(run.metrics(config.metrics))
        stack.callback(run.call, run.server.stop)
        run.call(run.server.start)
        if load:
            run.load()
        yield run


@contextmanager
def serve_thread(*models: Path, **settings: Any) -> Iterator[str]:
    """The address of a serving one, for tests that ask for no more of it."""
    with running(*models, **settings) as run:
        yield run.address


class RawPool:
    """The two hot calls as bytes, on a connection of its own."""

    def __init__(self, address: str, version: str = "") -> None:
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
        ]
        self.version = version
        self.channel = grpc.insecure_channel(address, options)
        self.lookup = self.channel.unary_unary("/engrampool.v1.Pool/Lookup")
        self.stream = self.channel.unary_stream("/engrampool.v1.Pool/LookupStream")

    def __enter__(self) -> "RawPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def by_ids(self, *tables: tuple[int, Any], dtype: Any = np.uint32, **other: Any) -> bytes:
        """A request for rows by id."""
        ids = tuple((layer, np.asarray(rows, dtype)) for layer, rows in tables)
        return wire.encode_request(
            wire.LookupRequest(**{"model": "small", "version": self.version, "tables": ids} | other)
        )

    def by_tokens(self, batch: TokenBatch, *layers: int) -> bytes:
        """A request for the rows of tokens."""
        return wire.encode_request(wire.LookupRequest("small", self.version, (), batch, layers))


def environment(tmp_path: Path, code: str) -> dict[str, str]:
    """Of a server whose processes run `code` first."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))}


_HOLDING = """
import asyncio, os
from engrampool_server.answer import pool_service
from engrampool_server.processes import supervisor
emulate = pool_service.PoolService._emulate
async def held(self, reading, nbytes, gathered_s):
    while nbytes == {nbytes} and os.path.exists(os.environ["TEST_HELD"]):
        await asyncio.sleep(0.01)
    return await emulate(self, reading, nbytes, gathered_s)
pool_service.PoolService._emulate = held
pool_service.PATIENCE_S = supervisor._STOP_MARGIN_S = 600.0
"""


class HeldStream:
    """A stream whose last message, a small one, a server with `environ` and `settings` holds back until it is wanted.

    The others were read before. For gRPC breaks a stream off whose caller, as it reads, tells a server how much it has
    read that closed the connection by then: what is tested is the server's end, and not that.
    """

    settings: ClassVar[dict[str, Any]] = {"stream_chunk_bytes": 64 << 10}  # 248 rows
    _ids = np.arange(2 * 248 + 12)
    rows = len(_ids)

    def __init__(self, tmp_path: Path) -> None:
        self._flag = tmp_path / "held"
        self._flag.touch()
        self.environ = environment(tmp_path, _HOLDING.format(nbytes=12 * 264)) | {"TEST_HELD": str(self._flag)}

    def begin(self, pool: "RawPool") -> None:
        """Read all but the last message."""
        self._call = pool.stream(pool.by_ids((2, self._ids)))
        self._messages = [next(self._call), next(self._call)]

    def rest_is_right(self) -> bool:
        """Read the last message, and compare every byte."""
        self._flag.unlink()
        return joined([*self._messages, *self._call]) == {2: expected(2, self._ids)}


def rows_of(message: bytes) -> dict[int, bytes]:
    """{layer: rows} of one answer, in its order."""
    answer = wire.parse_response(message)
    assert all(run.first == 0 for run in answer.tables)
    return {run.layer: bytes(run.rows) for run in answer.tables}


def joined(messages: Any) -> dict[int, bytes]:
    """{layer: rows} of a stream; fails unless runs follow on one another and only the last message has times."""
    found: dict[int, list[bytes]] = {}
    answers = [wire.parse_response(message) for message in messages]
    assert [answer.times is not None for answer in answers] == [False] * (len(answers) - 1) + [True]
    for answer in answers:
        for run in answer.tables:
            pieces = found.setdefault(run.layer, [])
            assert run.first * SPEC.table(run.layer).row_bytes == sum(map(len, pieces))
            pieces.append(bytes(run.rows))
    return {layer: b"".join(pieces) for layer, pieces in found.items()}


def refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str | None, str]:
    """Status, reason and text of a refused call (a stream is read to its end)."""
    try:
        answer = call()
        if not isinstance(answer, bytes):
            list(answer)
    except grpc.RpcError as error:
        reasons = [value for key, value in error.trailing_metadata() or () if key == "engrampool-reason"]
        assert len(reasons) <= 1
        return error.code(), reasons[0] if reasons else None, error.details()
    raise AssertionError("the call was answered")


def scrape(address: str) -> Mapping[str, float]:
    """Every sample of a metrics port, as `name{label="value",...}`, labels sorted."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=LIMIT_S) as response:
        text = response.read().decode()
    return _samples(text_string_to_metric_families(text))


def _samples(families: Iterable[Metric]) -> Mapping[str, float]:
    samples = (sample for family in families for sample in family.samples)
    return {_key(sample.name, sample.labels): sample.value for sample in samples}


def _key(name: str, labels: Mapping[str, str]) -> str:
    inside = ",".join(f'{key}="{labels[key]}"' for key in sorted(labels))
    return f"{name}{{{inside}}}" if inside else name


def eventually(condition: Callable[[], Any], what: str = "") -> Any:
    """The first true value of `condition`, asked again and again: less often with time, as many a question is dear."""
    end, pause_s = time.monotonic() + LIMIT_S, 0.004
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end, f"never so: {what or condition}"
        time.sleep(pause_s)
        pause_s = min(1.2 * pause_s, 0.03)


def used(client: Any) -> list[str]:
    """Addresses of the servers that a client uses."""
    return [one["address"] for one in client.status()["servers"] if one["used"]]


def unused(client: Any) -> dict[str, str]:
    """Address -> why, of the servers that a client knows and does not use."""
    return {one["address"]: one["why_unused"] for one in client.status()["servers"] if not one["used"]}


def columns_of(client: Any) -> slice:
    """The heads that a client has, of all."""
    heads = client.status()["heads"]
    return slice(None) if heads is None else slice(*heads)


def at_work(client: Any) -> tuple[int, int, int]:
    """Lookups that a client is to plan, that wait for a place, and that have one."""
    steps = client.status()["steps"]
    return steps["new"], steps["waiting"], steps["asking"]


def breaker_of(client: Any) -> dict[str, Any]:
    """What a client says of the breaker of its only server."""
    (server,) = client.status()["servers"]
    return dict(server["breaker"])


def direct_of(client: Any) -> tuple[int, int]:
    """Connections of the direct lane to a client's only server: now, and opened so far."""
    (server,) = client.status()["servers"]
    return server["direct_connections"], server["direct_opened"]


class Events(logging.Handler):
    """What was logged, as (event, fields)."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, dict]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.getMessage(), record.fields))

    def of(self, name: str) -> list[dict]:
        return [fields for event, fields in self.lines if event == name]


def change_byte(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        file.write(bytes([byte ^ 1]))


class GatherGate:
    """Holds back every gather of at least `rows` rows until `open` is set. begun: how many came to it."""

    def __init__(self, monkeypatch: Any, rows: int = 1000) -> None:
        self.open = threading.Event()
        self.begun = 0
        self._lock = threading.Lock()
        gather = LoadedTable.gather

        def gated(table: LoadedTable, ids: Any, out: Any) -> None:
            if len(ids) >= rows:
                with self._lock:
                    self.begun += 1
                assert self.open.wait(LIMIT_S)
            gather(table, ids, out)

        monkeypatch.setattr(LoadedTable, "gather", gated)
        # Nor is a loop without Python to answer, which passes by here.
        monkeypatch.setattr(Handles, "_resolve", lambda *_: None)
        # What is held back must be a gather thread, never the event loop, which answers only small requests itself.
        monkeypatch.setattr(Lookups, "inline_bytes", 4096)

    def wait_begun(self, count: int) -> None:
        eventually(lambda: self.begun >= count, f"{count} gathers begun")


def lasting_address() -> str:
    """An address of this machine for a server that others may take the place of, free now.

    Not a port that the system gives to who connects: a client that asks again and again while nobody listens would be
    given the very port that it asks.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    for port in random.sample(range(10_000, lowest), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return f"127.0.0.1:{port}"
    raise AssertionError("no port is free")
