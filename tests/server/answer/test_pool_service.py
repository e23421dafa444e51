"""The calls of a real server, asked in raw bytes: answers, streams, refusals, hostile messages."""

import gc
import json
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engrampool_proto import wire
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec
from engrampool_proto.v1 import pool_pb2
from engrampool_server.answer import pool_service
from engrampool_server.files.table_files import PackedModel
from engrampool_server.memory.table_loader import load
from server_fixtures import (
    SPEC,
    VOCAB,
    RawPool,
    Running,
    eventually,
    expected,
    joined,
    pack,
    refusal,
    rows_of,
    running,
    version_of,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("service") / "small")


@pytest.fixture(scope="module", params=[0, 2])
def server(request: pytest.FixtureRequest, packed: Path) -> Iterator[Running]:
    limits = {"max_rows_per_request": 20_000, "max_answer_bytes": 4 * MIB, "stream_chunk_bytes": 64 * KIB}
    limits["gather_threads"] = request.param
    with running(packed, **limits) as run:
        yield run


@pytest.fixture(scope="module")
def pool(server: Running, packed: Path) -> Iterator[RawPool]:
    with RawPool(server.address, version_of(packed)) as client:
        yield client


@pytest.fixture
def untouched(server: Running, pool: RawPool) -> Iterator[None]:
    """Whatever the test did: afterwards every row is still what it was, and no bytes are in flight."""
    yield
    ids = {table.layer: np.arange(table.num_rows) for table in SPEC.tables}
    answer = rows_of(pool.lookup(pool.by_ids(*ids.items())))
    assert answer == {layer: expected(layer, rows) for layer, rows in ids.items()}
    eventually(lambda: server.scrape()["engrampool_in_flight_bytes"] == 0, "nothing in flight")


def batch(tokens, bounds=None, lookback=None, dead=None, lookback_dead=None) -> TokenBatch:
    def array(values, dtype):
        return None if values is None else np.array(values, dtype)

    return TokenBatch.of(
        array(tokens, np.int32),
        array(bounds, np.int32),
        array(lookback, np.int32),
        array(dead, np.bool_),
        array(lookback_dead, np.bool_),
    )


def int32s(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


# --- answers


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
@pytest.mark.parametrize("count", [0, 1, 7, 5000])
def test_rows_come_back_in_the_order_of_entries_and_ids(pool, dtype, count):
    rng = np.random.default_rng(count)
    wide, narrow = rng.integers(0, 6500, count), rng.integers(0, 4100, count)
    for tables in [((9, narrow), (2, wide)), ((2, wide), (9, narrow)), ((9, narrow),)]:
        answer = rows_of(pool.lookup(pool.by_ids(*tables, dtype=dtype)))
        assert list(answer.items()) == [(layer, expected(layer, ids)) for layer, ids in tables]


def test_first_and_last_row_and_repeats(pool):
    ids = [6499, 0, 0, 6499, 6499]
    assert rows_of(pool.lookup(pool.by_ids((2, ids)))) == {2: expected(2, ids)}


def test_an_answer_says_where_the_time_went(pool):
    begin = time.perf_counter()
    answer = wire.parse_response(pool.lookup(pool.by_ids((2, np.arange(6500)))))
    total_us = (time.perf_counter() - begin) * 1e6
    times = answer.times
    assert 0 < times.gather_us <= times.total_us < total_us
    assert times.queue_us + times.gather_us <= times.total_us + 2  # each is rounded by itself


token_ids = st.integers(0, VOCAB - 1)


@st.composite
def batches(draw: st.DrawFn) -> TokenBatch:
    """Requests of 0 to 6 tokens with 0 to 3 columns of look-back, gaps, and placeholders where tokens are dead."""
    lengths = draw(st.lists(st.integers(0, 6), max_size=5))
    width, total = draw(st.integers(0, 3)), sum(lengths)
    tokens = draw(st.lists(token_ids, min_size=total, max_size=total))
    before = draw(st.lists(st.integers(-1, VOCAB - 1), min_size=len(lengths) * width, max_size=len(lengths) * width))
    dead = draw(st.none() | st.lists(st.booleans(), min_size=total, max_size=total))
    gaps = draw(st.none() | st.lists(st.booleans(), min_size=len(before), max_size=len(before)))
    if dead is not None:
        tokens = [-5 if gone else token for token, gone in zip(tokens, dead, strict=True)]
    if gaps is not None:
        before = [2**31 - 1 if gone else token for token, gone in zip(before, gaps, strict=True)]
    shape = (len(lengths), width)
    return TokenBatch(
        np.array(tokens, np.int32),
        np.array([0, *np.cumsum(lengths)], np.int32),
        np.array(before, np.int32).reshape(shape),
        None if dead is None else np.array(dead, np.bool_),
        None if gaps is None else np.array(gaps, np.bool_).reshape(shape),
    )


@given(tokens=batches(), layers=st.sampled_from([(), (2,), (9,), (2, 9)]))
def test_the_server_hashes_as_the_specification_does(pool, tokens, layers):
    hashed = SPEC.hash(tokens, layers or (2, 9))
    answer = {layer: expected(layer, ids) for layer, ids in hashed.items()}
    message = pool.by_tokens(tokens, *layers)
    assert list(rows_of(pool.lookup(message)).items()) == list(answer.items())
    assert list(joined(pool.stream(message)).items()) == list(answer.items())


def test_a_token_batch_without_requests_has_no_rows(pool):
    message = pool.by_tokens(batch([], [0]))
    assert rows_of(pool.lookup(message)) == {2: b"", 9: b""}


# --- streams


def test_a_stream_sends_earlier_layers_first_in_runs_of_about_a_chunk(pool):
    narrow, wide = np.arange(4100)[::-1], np.arange(6500)[::-1]
    messages = list(pool.stream(pool.by_ids((9, narrow), (2, wide))))
    assert list(joined(messages).items()) == [(2, expected(2, wide)), (9, expected(9, narrow))]
    runs = [run for message in messages for run in wire.parse_response(message).tables]
    for layer in (2, 9):
        row_bytes = SPEC.table(layer).row_bytes
        sizes = [len(run.rows) for run in runs if run.layer == layer]
        full = 64 * KIB // row_bytes * row_bytes
        assert set(sizes[:-1]) == {full}
        assert 0 < sizes[-1] <= full


def test_a_table_without_ids_gets_one_empty_entry(pool):
    messages = list(pool.stream(pool.by_ids((9, []), (2, []))))
    runs = [(run.layer, run.first, len(run.rows)) for m in messages for run in wire.parse_response(m).tables]
    assert runs == [(2, 0, 0), (9, 0, 0)]
    mixed = joined(pool.stream(pool.by_ids((9, [5]), (2, []))))
    assert list(mixed.items()) == [(2, b""), (9, expected(9, [5]))]


def test_a_stream_cancelled_in_the_middle_frees_its_bytes_and_is_counted(packed, monkeypatch):
    monkeypatch.setattr(pool_service, "PATIENCE_S", 600.0)  # nobody is given up by a machine that is busy
    with running(packed) as run, RawPool(run.address, version_of(packed)) as pool:
        request = pool.by_ids((2, np.tile(np.arange(6500), 40)))
        call = pool.stream(request)  # 65 MiB, more than any window
        next(call)
        assert run.scrape()["engrampool_in_flight_bytes"] == 4 * MIB + len(request)  # a few messages of it
        call.cancel()
        eventually(lambda: run.scrape()["engrampool_in_flight_bytes"] == 0, "nothing in flight")
        ended = 'grpc_method="LookupStream",grpc_service="engrampool.v1.Pool",grpc_type="server_stream"'
        key = f'grpc_server_handled_total{{grpc_code="CANCELLED",{ended}}}'
        eventually(lambda: run.scrape().get(key) == 1, "counted as cancelled")
        assert 'engrampool_lookup_rows_total{layer="2",model="small"}' not in run.scrape()
        assert rows_of(pool.lookup(pool.by_ids((2, [3])))) == {2: expected(2, [3])}


# --- refusals


def bad_requests() -> list[tuple[str, dict, str, str]]:
    """(id, fields of LookupRequest but model and version, reason, what the text must say)."""

    def tokens(**fields):
        return {"tokens": pool_pb2.TokenBatch(**fields)}

    def ids(layer, *rows, kind="u32"):
        return pool_pb2.TableIds(layer=layer, **{kind: np.array(rows, "<u4" if kind == "u32" else "<u8").tobytes()})

    two, good = int32s(5, 6), int32s(0, 2)
    return [
        ("no rows", {}, "bad-batch", "neither"),
        ("both", {"tables": [ids(2, 1)], **tokens(tokens=two, query_start_loc=good)}, "bad-batch", "both"),
        ("id", {"tables": [ids(9, 1, 4100, 5000)]}, "bad-batch", "row id 4100 at position 1 of layer 9"),
        ("u64 id", {"tables": [ids(2, 3, 2**63, 6500, kind="u64")]}, "bad-batch", f"row id {2**63} at position 1"),
        ("largest id", {"tables": [ids(2, 2**64 - 1, kind="u64")]}, "bad-batch", f"row id {2**64 - 1} at position 0"),
        ("second table", {"tables": [ids(2, 1), ids(9, 4100)]}, "bad-batch", "of layer 9"),
        ("layer", {"tables": [ids(3, 1)]}, "unknown-layer", "no layer 3; it has 2, 9"),
        ("layer of tokens", tokens(tokens=two, query_start_loc=good) | {"layers": [2, 4]}, "unknown-layer", "layer 4"),
        ("layer twice", {"tables": [ids(2, 1), ids(2, 2)]}, "bad-batch", "twice: 2, 2"),
        ("layers fall", tokens(tokens=two, query_start_loc=good) | {"layers": [9, 2]}, "bad-batch", "9, 2"),
        ("layers repeat", tokens(tokens=two, query_start_loc=good) | {"layers": [2, 2]}, "bad-batch", "2, 2"),
        ("layers of ids", {"tables": [ids(2, 1)], "layers": [2]}, "bad-batch", "'layers' goes with 'tokens'"),
        ("odd ids", {"tables": [pool_pb2.TableIds(layer=2, u32=b"12345")]}, "malformed-message", "5 bytes"),
        (
            "look-back",
            tokens(tokens=two, query_start_loc=good, lookback=int32s(1, 2, 3, 4), lookback_width=4),
            "bad-batch",
            "4 columns; this model reads 3",
        ),
        ("look-back of none", tokens(query_start_loc=int32s(0), lookback_width=2**32 - 1), "bad-batch", "4294967295"),
        (
            "look-back size",
            tokens(tokens=two, query_start_loc=good, lookback=int32s(1, 2, 3), lookback_width=2),
            "malformed-message",
            "lookback has 3 entries",
        ),
        ("falling", tokens(tokens=two, query_start_loc=int32s(0, 2, 1, 2)), "bad-batch", "entry 2 is 1, after 2"),
        ("short bounds", tokens(tokens=two, query_start_loc=int32s(0, 1)), "bad-batch", "[0, ..., 1]"),
        ("late bounds", tokens(tokens=two, query_start_loc=int32s(1, 2)), "bad-batch", "[1, ..., 2]"),
        ("no bounds", tokens(tokens=two), "bad-batch", "empty"),
        ("empty tokens", tokens(), "bad-batch", "query_start_loc"),
        ("token", tokens(tokens=int32s(5, 1000), query_start_loc=good), "bad-batch", "tokens[1] is 1000"),
        ("negative", tokens(tokens=int32s(-1, 5), query_start_loc=good), "bad-batch", "tokens[0] is -1"),
        (
            "token before",
            tokens(tokens=two, query_start_loc=int32s(0, 1, 2), lookback=int32s(1, -1, 3, -2), lookback_width=2),
            "bad-batch",
            "lookback[1, 1] is -2",
        ),
        ("dead", tokens(tokens=two, query_start_loc=good, dead=b"\1"), "bad-batch", "dead must be bool [2]"),
        ("rows", {"tables": [ids(9, *[0] * 10_001), ids(2, *[0] * 10_000)]}, "too-many-rows", "20001 rows"),
        ("token rows", tokens(tokens=bytes(12_000), query_start_loc=int32s(0, 3000)), "too-many-rows", "24000 rows"),
        ("bytes", {"tables": [ids(2, *[0] * 16_000)]}, "too-many-rows", "4224000 bytes, at most 4194304"),
    ]


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("fields", "reason", "text"), [bad[1:] for bad in bad_requests()], ids=[bad[0] for bad in bad_requests()]
)
def test_bad_requests_are_refused_with_reason_and_culprit(pool, fields, reason, text):
    message = pool_pb2.LookupRequest(model="small", version=pool.version, **fields).SerializeToString()
    for call in (pool.lookup, pool.stream):
        code, found, details = refusal(lambda call=call: call(message))
        assert (code, found) == (INVALID, reason)
        assert text in details


def test_the_largest_allowed_request_is_answered(pool):
    ids = np.zeros(4 * MIB // 264, np.int64)
    for messages in ([pool.lookup(pool.by_ids((2, ids)))], pool.stream(pool.by_ids((2, ids)))):
        assert joined(messages) == {2: expected(2, ids)}
    rows = np.zeros(20_000, np.int64)
    assert rows_of(pool.lookup(pool.by_ids((9, rows)))) == {9: expected(9, rows)}


@pytest.mark.usefixtures("untouched")
def test_unknown_models_and_versions_are_told_what_there_is(pool):
    for call in (pool.lookup, pool.stream):
        code, reason, text = refusal(lambda call=call: call(pool.by_ids((2, [0]), model="smäll\n" * 1000)))
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "unknown-model")
        assert "smäll" in text
        assert text.endswith("held: small")
        assert len(text) < 400
        code, reason, text = refusal(lambda call=call: call(pool.by_ids((2, [0]), version="0" * 32)))
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "unknown-version")
        assert "0" * 32 in text
        assert pool.version in text
    describe = pool.channel.unary_unary(
        "/engrampool.v1.Pool/Describe",
        pool_pb2.DescribeRequest.SerializeToString,
        pool_pb2.DescribeResponse.FromString,
    )
    code, reason, text = refusal(lambda: describe(pool_pb2.DescribeRequest(model="other")).SerializeToString())
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "unknown-model")
    assert "'other'" in text


def test_a_description_is_made_once_for_all_who_ask(packed, tmp_path, monkeypatch):
    """With the specification it takes milliseconds to make: whoever asks again and again must not stop the others."""
    made = []
    to_json = ModelSpec.to_json
    monkeypatch.setattr(ModelSpec, "to_json", lambda spec: made.append(spec.name) or to_json(spec))
    with running(packed) as run, RawPool(run.address) as pool:
        describe = pool.channel.unary_unary("/engrampool.v1.Pool/Describe")

        def ask(model: str = "", include_spec: bool = True) -> pool_pb2.DescribeResponse:
            request = pool_pb2.DescribeRequest(model=model, include_spec=include_spec)
            return pool_pb2.DescribeResponse.FromString(describe(request.SerializeToString()))

        made.clear()
        answers = [ask() for _ in range(20)]
        assert made == ["small"]
        assert all(answer == answers[0] for answer in answers)
        (model,) = answers[0].models
        assert ModelSpec.from_json(json.loads(model.spec_json)) == SPEC
        assert (ask("small"), ask("small")) == (answers[0], answers[0])
        bare = ask("", False)
        assert bare.models[0].spec_json == b""
        assert bare.models[0].spec_digest == SPEC.digest
        # Of names that callers invent nothing is kept.
        tracemalloc.start()
        try:
            for number in range(30):
                invented = f"other{number}" + 100_000 * "x"
                assert refusal(lambda name=invented: ask(name).SerializeToString())[1] == "unknown-model"
            gc.collect()
            assert tracemalloc.get_traced_memory()[0] < 1_000_000
        finally:
            tracemalloc.stop()

        # What is held is another thing now.
        with PackedModel.open(pack(tmp_path / "changed", change=True)) as other:
            held = load(other, "anon", False, 1, threading.Event(), lambda _: None)
        run.hold([held])
        versions = {model.version for model in answers[0].models} | {held.version}
        assert {model.version for model in ask().models} == versions
        assert {model.version for model in ask("small", False).models} == versions


@pytest.mark.usefixtures("untouched")
def test_every_truncation_is_refused_or_read_as_protobuf_reads_it(pool):
    whole = pool.by_ids((2, [1, 2, 3]), (9, [4, 5]))
    codes = {answered(pool, whole[:length], stream=False) for length in range(len(whole))}
    assert {INVALID, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION} <= codes
    tokens = pool.by_tokens(batch([1, 2, 3], [0, 1, 3], [[1], [2]], [0, 1, 0], [[0], [1]]), 2)
    codes = {answered(pool, tokens[:length], stream=True) for length in range(len(tokens))}
    assert INVALID in codes


def answered(pool: RawPool, message: bytes, stream: bool) -> grpc.StatusCode:
    """The status that `message` got; only those of bad requests are allowed, and an answer must be the right one."""
    refused = None
    try:
        answer = joined(pool.stream(message)) if stream else rows_of(pool.lookup(message))
    except grpc.RpcError as error:
        refused = error
    if refused is None:
        assert answer == oracle(message)
        return grpc.StatusCode.OK
    assert refused.code() in (INVALID, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.FAILED_PRECONDITION), refused
    assert [key for key, _ in refused.trailing_metadata()] == ["engrampool-reason"]
    return refused.code()


def oracle(message: bytes) -> dict[int, bytes]:
    """What a good request is answered with, read by protobuf's own runtime."""
    request = pool_pb2.LookupRequest.FromString(message)
    if not request.HasField("tokens"):
        return {
            table.layer: expected(table.layer, np.frombuffer(table.u32 or table.u64, "<u4" if table.u32 else "<u8"))
            for table in request.tables
        }
    sent = request.tokens
    bounds = np.frombuffer(sent.query_start_loc, "<i4")
    shape = (len(bounds) - 1, sent.lookback_width)
    tokens = TokenBatch(
        np.frombuffer(sent.tokens, "<i4"),
        bounds,
        np.frombuffer(sent.lookback, "<i4").reshape(shape),
        np.frombuffer(sent.dead, np.uint8) != 0 if sent.dead else None,
        (np.frombuffer(sent.lookback_dead, np.uint8) != 0).reshape(shape) if sent.lookback_dead else None,
    )
    return {layer: expected(layer, ids) for layer, ids in SPEC.hash(tokens, request.layers or None).items()}


@pytest.mark.usefixtures("untouched")
@settings(max_examples=2 * settings.default.max_examples)
@given(message=st.binary(max_size=80), stream=st.booleans())
def test_random_bytes_are_refused(pool, message, stream):
    assert answered(pool, message, stream) != grpc.StatusCode.OK


int32_bytes = st.lists(st.integers(-2, VOCAB + 1), max_size=6).map(lambda values: int32s(*values))
loose_bytes = int32_bytes | st.binary(max_size=24)
layer_numbers = st.sampled_from([0, 2, 3, 9, 2**32 - 1])


@st.composite
def loose_requests(draw: st.DrawFn, version: str = "@") -> pool_pb2.LookupRequest:
    """LookupRequests whose every part may be wrong, and often is not."""
    request = pool_pb2.LookupRequest(model="small", version=version)
    for _ in range(draw(st.integers(0, 3))):
        ids = draw(st.lists(st.integers(0, 4200), max_size=5))
        kind = draw(st.sampled_from(["u32", "u64"]))
        raw = draw(st.just(np.array(ids, "<u4" if kind == "u32" else "<u8").tobytes()) | st.binary(max_size=17))
        request.tables.add(layer=draw(layer_numbers), **{kind: raw})
    if draw(st.booleans()):
        request.tokens.CopyFrom(
            pool_pb2.TokenBatch(
                tokens=draw(loose_bytes),
                query_start_loc=draw(st.sampled_from([b"", int32s(0), int32s(0, 1), int32s(0, 0, 2), int32s(0, 6)])),
                lookback=draw(loose_bytes),
                lookback_width=draw(st.sampled_from([0, 0, 1, 2, 3, 4, 2**31, 2**32 - 1])),
                dead=draw(st.binary(max_size=6)),
                lookback_dead=draw(st.binary(max_size=6)),
            )
        )
        request.layers.extend(draw(st.lists(layer_numbers, max_size=2)))
    return request


@pytest.mark.usefixtures("untouched")
@settings(max_examples=3 * settings.default.max_examples)
@given(request=loose_requests(), stream=st.booleans())
def test_loose_requests_are_refused_or_answered_right(pool, request, stream):
    request.version = pool.version
    answered(pool, request.SerializeToString(), stream)


@pytest.mark.usefixtures("untouched")
@settings(max_examples=3 * settings.default.max_examples)
@given(
    tokens=batches(),
    by_tokens=st.booleans(),
    ids=st.lists(st.integers(0, 4099), max_size=4),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3)), min_size=1, max_size=3),
    stream=st.booleans(),
)
def test_mutated_requests_are_refused_or_answered_right(pool, tokens, by_tokens, ids, changes, stream):
    message = bytearray(pool.by_tokens(tokens, 2) if by_tokens else pool.by_ids((2, ids), (9, ids)))
    for where, put in changes:
        at = int(where * len(message))
        message[at : at + max(1, len(put))] = put
    answered(pool, bytes(message), stream)


@pytest.mark.usefixtures("untouched")
def test_a_message_over_the_receive_limit_is_refused_by_grpc_and_the_server_goes_on(pool):
    code, reason, text = refusal(lambda: pool.lookup(bytes(20_000 * 8 + MIB + 1)))
    assert (code, reason) == (EXHAUSTED, None)
    assert "larger than max" in text


def test_the_largest_row_limit_is_one_grpc_can_hold(packed):
    with running(packed, max_rows_per_request=2**31) as run, RawPool(run.address, version_of(packed)) as pool:
        assert rows_of(pool.lookup(pool.by_ids((2, [1])))) == {2: expected(2, [1])}


def test_an_answer_of_more_than_one_message_holds_is_to_be_streamed(packed):
    limits = {"max_rows_per_request": 9_000_000, "max_answer_bytes": 3 << 30, "max_in_flight_bytes": 3 << 30}
    with running(packed, **limits) as run, RawPool(run.address, version_of(packed)) as pool:
        code, reason, text = refusal(lambda: pool.lookup(pool.by_ids((2, np.zeros(8_200_000, np.uint32)))))
        assert (code, reason) == (INVALID, "too-many-rows")
        assert "LookupStream" in text
        eventually(lambda: run.scrape()["engrampool_in_flight_bytes"] == 0, "nothing in flight")
