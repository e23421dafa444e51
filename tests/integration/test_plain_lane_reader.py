"""The direct lane from outside: a reader made of docs/PROTOCOL.md alone gets the bytes that our client gets."""

import socket
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import grpc
import numpy as np
import pytest

from engrampool_client.testing import serve_process
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.v1 import pool_pb2, pool_pb2_grpc
from server_fixtures import LIMIT_S, SPEC, expected, pack, version_of

# --- the reader: sockets, struct, and messages generated from pool.proto

HEADER = struct.Struct("<IIQQQ")  # kind; handle or layer; number; microseconds or first row; bytes of the body
HELLO, REGISTER, LOOKUP, REQUEST, READY, ROWS, END, REFUSED = 1, 2, 3, 4, 16, 17, 18, 19


class RefusedError(Exception):
    """Arguments: the frame's number, the reason."""


class Reader:
    def __init__(self, address: str) -> None:
        with grpc.insecure_channel(address) as channel:
            way_in = pool_pb2_grpc.PoolStub(channel).OpenDirect(pool_pb2.OpenDirectRequest(), timeout=LIMIT_S)
        self.socket = socket.create_connection((way_in.host or address.rpartition(":")[0], way_in.port), LIMIT_S)
        self.send(HELLO, 0, 0, 0, way_in.ticket)
        assert self.receive() == (READY, 0, 0, 0, b"")

    def send(self, kind: int, which: int, number: int, first: int, body: bytes) -> None:
        self.socket.sendall(HEADER.pack(kind, which, number, first, len(body)) + body)

    def receive(self) -> tuple[int, int, int, int, bytes]:
        kind, which, number, first, nbytes = HEADER.unpack(self.exactly(HEADER.size))
        return kind, which, number, first, self.exactly(nbytes)

    def exactly(self, nbytes: int) -> bytes:
        data = bytearray()
        while len(data) < nbytes:
            got = self.socket.recv(nbytes - len(data))
            assert got, "the server closed the connection"
            data += got
        return bytes(data)

    def register(self, handle: int, model: str, version: str, layers: Sequence[int]) -> None:
        named = pool_pb2.LookupRequest(model=model, version=version, layers=layers)
        self.send(REGISTER, handle, 0, 0, named.SerializeToString())

    def lookup(self, handle: int, number: int, ids: Sequence[np.ndarray]) -> None:
        body = struct.pack(f"<{len(ids)}Q", *map(len, ids))
        for of_layer in ids:
            raw = of_layer.astype("<u4").tobytes()
            body += raw + bytes(-len(raw) % 8)
        self.send(LOOKUP, handle, number, 0, body)

    def answer(self, number: int) -> dict[int, bytes]:
        rows: dict[int, bytes] = {}
        while True:
            kind, layer, of, first, body = self.receive()
            if kind == REFUSED:
                raise RefusedError(of, pool_pb2.Refusal.FromString(body).reason)
            assert of == number
            if kind == END:
                queue_us, gather_us, total_us = struct.unpack("<QQQ", body)
                assert queue_us + gather_us <= total_us + 2  # each is rounded
                return rows
            assert kind == ROWS
            assert layer >= max(rows, default=0)
            assert first * SPEC.table(layer).row_bytes == len(rows.get(layer, b""))
            rows[layer] = rows.get(layer, b"") + body


# --- and what it gets


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("plain-lane") / "small")


@pytest.fixture(scope="module")
def reader(packed: Path) -> Iterator[Reader]:
    with serve_process(packed) as server:
        made = Reader(server.address)
        with made.socket:
            yield made


@pytest.mark.parametrize("count", [0, 1, 7, 3000])
def test_lookups_by_a_handle_give_the_synthetic_rows(reader, packed, count):
    rng = np.random.default_rng(count)
    ids = {2: rng.integers(0, 6500, count), 9: rng.integers(0, 4100, 2 * count)}
    reader.register(63, "small", version_of(packed), (2, 9))
    reader.register(0, "small", version_of(packed), (9,))
    reader.lookup(63, 5, list(ids.values()))
    assert reader.answer(5) == {layer: expected(layer, of_layer) for layer, of_layer in ids.items()}
    reader.lookup(0, 2**64 - 1, [ids[9]])
    assert reader.answer(2**64 - 1) == {9: expected(9, ids[9])}


def test_requests_may_be_under_way_at_once_and_are_answered_in_order(reader, packed):
    reader.register(1, "small", version_of(packed), (2,))
    for number in range(1, 20):
        reader.lookup(1, number, [np.array([number, 7])])
    for number in range(1, 20):
        assert reader.answer(number) == {2: expected(2, [number, 7])}


def test_tokens_are_asked_for_as_over_grpc(reader, packed):
    tokens, bounds, lookback = np.array([5, 7, 999], "<i4"), np.array([0, 3], "<i4"), np.full((1, 2), -1, "<i4")
    batch = pool_pb2.TokenBatch(
        tokens=tokens.tobytes(), query_start_loc=bounds.tobytes(), lookback=lookback.tobytes(), lookback_width=2
    )
    asked = pool_pb2.LookupRequest(model="small", version=version_of(packed), tokens=batch)
    reader.send(REQUEST, 0, 11, 0, asked.SerializeToString())
    hashed = SPEC.hash(TokenBatch(tokens, bounds, lookback))
    assert reader.answer(11) == {layer: expected(layer, ids.reshape(-1)) for layer, ids in hashed.items()}


def test_a_handle_that_cannot_be_served_is_refused_with_each_lookup(reader, packed):
    reader.register(2, "small", "another", (2,))
    for number in (21, 22):
        reader.lookup(2, number, [np.array([1])])
        with pytest.raises(RefusedError, match="unknown-version") as refused:
            reader.answer(number)
        assert refused.value.args[0] == number
    reader.register(2, "small", version_of(packed), (2,))
    reader.lookup(2, 23, [np.array([1])])
    assert reader.answer(23) == {2: expected(2, [1])}
