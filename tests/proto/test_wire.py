"""wire.py and the generated protobuf classes: what one writes the other reads, and both refuse the same bytes."""

import contextlib
from typing import Any

import hash_cases
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engrampool_proto import wire
from engrampool_proto.errors import BatchError, WireError
from engrampool_proto.protobuf import MAX_FIELDS
from engrampool_proto.v1 import pool_pb2 as pb
from engrampool_proto.wire import LookupRequest, ResponseWriter, ServerTimes, parse_request, parse_response

U32 = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 127, 128, 2**31, 2**32 - 1]))
U64 = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 127, 128, 2**32, 2**63, 2**64 - 1]))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)


@st.composite
def ids(draw: st.DrawFn) -> np.ndarray:
    wide = draw(st.booleans())
    return np.array(draw(st.lists(U64 if wide else U32, max_size=40)), np.uint64 if wide else np.uint32)


BATCHES = hash_cases.requests(2**31 - 1, 2, 3).map(hash_cases.batch_of)
REQUESTS = st.builds(
    LookupRequest,
    TEXT,
    TEXT,
    st.lists(st.tuples(U32, ids()), max_size=4).map(tuple),
    st.one_of(st.none(), BATCHES),
    st.lists(U32, max_size=4).map(tuple),
    st.sampled_from([0, 1, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1),
)


def generated(request: LookupRequest) -> pb.LookupRequest:
    message = pb.LookupRequest(
        model=request.model, version=request.version, layers=request.layers, number=request.number
    )
    for layer, rows in request.tables:
        table = message.tables.add(layer=layer)
        setattr(table, "u32" if rows.dtype == np.uint32 else "u64", rows.tobytes())
    batch = request.tokens
    if batch is not None:
        message.tokens.SetInParent()
        message.tokens.tokens = batch.tokens.tobytes()
        message.tokens.query_start_loc = batch.query_start_loc.tobytes()
        message.tokens.lookback = batch.lookback.tobytes()
        message.tokens.lookback_width = batch.lookback.shape[1]
        for name in ("dead", "lookback_dead"):
            flags = getattr(batch, name)
            if flags is not None:
                setattr(message.tokens, name, bytes(map(int, flags.reshape(-1))))
    return message


def flags(raw: bytes) -> list[bool] | None:
    """No flags and no dead token are the same to a reader."""
    return [byte != 0 for byte in raw] if any(raw) else None


def content_of(message: pb.LookupRequest) -> tuple[Any, ...]:
    """What a request says, as plain values."""
    tables = [
        (t.layer, np.frombuffer(t.u64, "<u8").tolist())
        if t.WhichOneof("ids") == "u64"
        else (t.layer, np.frombuffer(t.u32, "<u4").tolist())
        for t in message.tables
    ]
    tokens = None
    if message.HasField("tokens"):
        t = message.tokens
        ints = [np.frombuffer(raw, "<i4").tolist() for raw in (t.tokens, t.query_start_loc, t.lookback)]
        tokens = (*ints, t.lookback_width, flags(t.dead), flags(t.lookback_dead))
    return message.model, message.version, tables, tokens, list(message.layers), message.number


def content(request: LookupRequest) -> tuple[Any, ...]:
    tokens = None
    batch = request.tokens
    if batch is not None:
        both = [None if f is None else flags(f.tobytes()) for f in (batch.dead, batch.lookback_dead)]
        arrays = [a.reshape(-1).tolist() for a in (batch.tokens, batch.query_start_loc, batch.lookback)]
        tokens = (*arrays, batch.lookback.shape[1], *both)
    tables = [(layer, rows.tolist()) for layer, rows in request.tables]
    return request.model, request.version, tables, tokens, list(request.layers), request.number


@given(request=REQUESTS)
def test_requests_are_written_as_protobuf_writes_them(request):
    assert wire.encode_request(request) == generated(request).SerializeToString(deterministic=True)


@given(request=REQUESTS)
def test_requests_are_read_as_protobuf_reads_them(request):
    parsed = parse_request(generated(request).SerializeToString())
    assert content(parsed) == content(request) == content_of(generated(request))
    assert [rows.dtype for _, rows in parsed.tables] == [rows.dtype for _, rows in request.tables]


def test_ids_of_any_layout_are_written_in_c_order():
    rows = np.arange(12, dtype=np.uint32).reshape(3, 4)
    for layout in (rows, np.asfortranarray(rows), np.repeat(rows, 2, axis=1)[:, ::2]):
        (table,) = pb.LookupRequest.FromString(wire.encode_request(LookupRequest("m", "v", ((1, layout),)))).tables
        assert table.u32 == rows.tobytes()


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16, np.float32])
def test_ids_of_another_dtype_are_refused(dtype):
    with pytest.raises(WireError, match=f"layer 3 must be uint32 or uint64; they are {np.dtype(dtype)}"):
        wire.encode_request(LookupRequest("m", "v", ((3, np.zeros(1, dtype)),)))


RUNS = st.lists(st.tuples(U32, U64, st.binary(max_size=200)), max_size=4)
TIMES = st.one_of(st.none(), st.builds(ServerTimes, U32, U32, U32))


def generated_response(runs: list[tuple[int, int, bytes]], times: ServerTimes | None) -> pb.LookupResponse:
    message = pb.LookupResponse(tables=[pb.TableRows(layer=a, first=b, rows=c) for a, b, c in runs])
    if times is not None:
        message.times.CopyFrom(pb.ServerTimes(**vars(times)))
    return message


@given(runs=RUNS, times=TIMES)
def test_responses_are_written_as_protobuf_writes_them(runs, times):
    writer = ResponseWriter([(layer, first, len(rows)) for layer, first, rows in runs], times is not None)
    for target, (_, _, rows) in zip(writer.rows, runs, strict=True):
        target[:] = np.frombuffer(rows, np.uint8)
    if times is not None:
        writer.set_times(times)
    assert type(writer.message) is bytes
    assert writer.message == generated_response(runs, times).SerializeToString(deterministic=True)


@given(runs=RUNS, times=TIMES)
def test_responses_are_read_as_protobuf_reads_them(runs, times):
    data = generated_response(runs, times).SerializeToString()
    parsed = parse_response(data)
    assert [(t.layer, t.first, bytes(t.rows)) for t in parsed.tables] == runs
    assert parsed.times == times


def test_times_are_clamped_to_what_their_fields_hold():
    writer = ResponseWriter([], True)
    assert parse_response(writer.message).times == ServerTimes(0, 0, 0)
    writer.set_times(ServerTimes(-1, 2**32, 2**32 - 1))
    assert parse_response(writer.message).times == ServerTimes(0, 2**32 - 1, 2**32 - 1)


# Views


def test_a_request_is_viewed_where_it_lies():
    batch = hash_cases.batch_of([hash_cases.Request([5, 6, 7], [3, 4])])
    tables = ((1, np.arange(9, dtype=np.uint32)), (2, np.arange(9, dtype=np.uint64)))
    data = wire.encode_request(LookupRequest("m", "v", tables, batch))
    parsed = parse_request(data)
    whole = np.frombuffer(data, np.uint8)
    views = [rows for _, rows in parsed.tables]
    views += [parsed.tokens.tokens, parsed.tokens.query_start_loc, parsed.tokens.lookback]
    for view in views:
        assert view.size
        assert np.shares_memory(view, whole)
        assert not view.flags.writeable


def test_a_response_is_gathered_and_viewed_where_it_lies():
    writer = ResponseWriter([(1, 0, 64), (2, 7, 0), (3, 8, 5)], True)
    whole = np.frombuffer(writer.message, np.uint8)
    assert [rows.size for rows in writer.rows] == [64, 0, 5]
    assert all(np.shares_memory(rows, whole) for rows in writer.rows if rows.size)
    parsed = parse_response(writer.message)
    for table in parsed.tables:
        assert table.rows.readonly
        view = np.frombuffer(table.rows, np.uint8)
        assert np.shares_memory(view, whole) or not view.size


# What protobuf allows beyond what either writes


def varint(value: int) -> bytes:
    out = b""
    while value >= 128:
        out, value = out + bytes([value % 128 + 128]), value >> 7
    return out + bytes([value])


def blob(number: int, payload: bytes) -> bytes:
    return varint(number * 8 + 2) + varint(len(payload)) + payload


UNKNOWN = {
    "number": varint(99 * 8) + varint(2**64 - 1),
    "fixed64": varint(99 * 8 + 1) + bytes(8),
    "bytes": blob(2**29 - 1, b"whatever"),
    "fixed32": varint(99 * 8 + 5) + bytes(4),
    "model as a number": b"\x08\x05",
    "tables as a number": b"\x18\x05",
    "tokens as fixed32": b"\x25abcd",
    "layers as fixed64": b"\x29abcdefgh",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_fields_are_skipped(name):
    extra = UNKNOWN[name]
    known = blob(1, b"m") + blob(3, b"\x08\x07" + blob(2, bytes(8))) + blob(4, BATCH)
    assert content(parse_request(extra + known + extra)) == content(parse_request(known))
    for nested in (blob(3, extra + blob(2, bytes(8)) + extra), blob(4, extra + BATCH)):
        # What is unknown above may be known here, as a layer say.
        assert content(parse_request(nested)) == content_of(pb.LookupRequest.FromString(nested))


BATCH = blob(1, bytes(8)) + blob(2, np.array([0, 2], "<i4").tobytes())
SPLIT = {
    "the last of two names": blob(1, b"first") + blob(1, b"last"),
    "tokens in two messages": blob(4, BATCH) + blob(4, blob(3, bytes(4)) + b"\x20\x01"),
    "tokens overridden": blob(4, BATCH) + blob(4, blob(1, b"\x05\0\0\0\x06\0\0\0")),
    "an empty message": blob(4, BATCH) + blob(4, b""),
    "u32, then u64": blob(3, blob(2, bytes(4)) + blob(3, bytes(8))),
    "u64, then u32": blob(3, blob(3, bytes(8)) + blob(2, bytes(4))),
    "layers one by one": b"\x28\x01\x28\x80\x01",
    "layers in both ways": b"\x28\x01\x2a\x02\x02\x03\x28\x04\x2a\x00",
    "a layer of 64 bits": b"\x28" + varint(2**64 - 1) + b"\x2a" + b"\x0a" + varint(2**63 + 5),
    "a number longer than need be": b"\x28\x81\x80\x80\x80\x80\x80\x80\x80\x80\x00",
    "a tag of five bytes": b"\x8a\x80\x80\x80\x00\x01m",
    "a length of five bytes": b"\x0a\x81\x80\x80\x80\x00m",
    "nothing": b"",
}


@pytest.mark.parametrize("name", SPLIT)
def test_what_protobuf_merges_is_merged(name):
    assert content(parse_request(SPLIT[name])) == content_of(pb.LookupRequest.FromString(SPLIT[name]))


def test_unknown_fields_of_an_answer_are_skipped():
    data = b"\x08\x05" + blob(1, blob(3, b"rows") + blob(9, b"?")) + varint(77 * 8) + b"\x01" + blob(2, b"\x08\x05")
    parsed = parse_response(data)
    assert [bytes(t.rows) for t in parsed.tables] == [b"rows"]
    assert parsed.times == ServerTimes(0, 0, 0)  # queue_us came as a varint, which is not its type


def test_concatenated_answers_merge():
    times = varint(18) + varint(5) + b"\x0d\x05\0\0\0" + varint(18) + varint(5) + b"\x15\x06\0\0\0"
    data = blob(1, blob(3, b"a")) + times + blob(1, blob(3, b"b"))
    parsed = parse_response(data)
    assert [bytes(t.rows) for t in parsed.tables] == [b"a", b"b"]
    assert parsed.times == ServerTimes(5, 6, 0)


REFUSED = {
    "field 0": b"\x02\x00",
    "a field beyond 2**29": b"\x8a\x80\x80\x80\x10\x01m",
    "a tag of six bytes": b"\x8a\x80\x80\x80\x80\x00\x01m",
    "a length of six bytes": b"\x0a\x81\x80\x80\x80\x80\x00m",
    "a number of eleven bytes": b"\x28" + b"\xff" * 10 + b"\x01",
    "a length beyond the end": b"\x0a\x02m",
    "an end of group": b"\x54",
    "wire type 6": b"\x0e\x00",
    "wire type 7": b"\x0f\x00",
    "a broken nested message": blob(3, b"\x08"),
    "a broken list of layers": blob(5, b"\x80"),
    "two batches, torn apart within a field": blob(4, BATCH + b"\x0a") + blob(4, b"\x00"),
    "not UTF-8": blob(1, b"\xff"),
    "a surrogate": blob(2, b"\xed\xa0\x80"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_protobuf_refuses_is_refused(name):
    with pytest.raises(WireError):
        parse_request(REFUSED[name])
    with pytest.raises(DecodeError):
        pb.LookupRequest.FromString(REFUSED[name])


def test_times_torn_apart_within_a_field_are_refused():
    data = blob(2, b"\x0d\x01\0") + blob(2, b"\0\0")
    with pytest.raises(WireError):
        parse_response(data)
    with pytest.raises(DecodeError):
        pb.LookupResponse.FromString(data)


def test_groups_are_refused_although_protobuf_skips_them():
    # Nothing in this contract has groups; skipping them needs recursion over bytes that anybody may send.
    pb.LookupRequest.FromString(b"\x53\x54")
    with pytest.raises(WireError, match="wire type 3"):
        parse_request(b"\x53\x54")


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (blob(3, b"\x08\x07" + blob(2, bytes(5))), "row ids of layer 7 are 5 bytes, no multiple of 4"),
        (blob(3, blob(3, bytes(12))), "no multiple of 8"),
        (blob(4, BATCH + blob(1, bytes(3))), "tokens is 3 bytes"),
        (blob(4, BATCH + blob(2, bytes(3))), "query_start_loc is 3 bytes"),
        (blob(4, BATCH + blob(3, bytes(3))), "lookback is 3 bytes"),
        (blob(4, BATCH + blob(3, bytes(4))), "1 requests of width 0 need 0"),
        (blob(4, BATCH + b"\x20" + varint(2**32 - 1)), "need 4294967295"),
        (blob(4, BATCH + b"\x20\x01" + blob(3, bytes(4)) + blob(6, bytes(2))), "lookback_dead has 2 entries"),
    ],
)
def test_fields_of_impossible_sizes_are_refused(message, error):
    with pytest.raises(WireError, match=error):
        parse_request(message)


@pytest.mark.parametrize("message", [b"", BATCH + blob(5, bytes(3)), BATCH + blob(2, bytes(8))])
def test_a_batch_that_does_not_fit_together_is_refused(message):
    with pytest.raises(BatchError):
        parse_request(blob(4, message))


# Damage


def check_request(data: bytes) -> bool:
    """Whether wire.py accepts `data`; if so, protobuf must too, and find the same."""
    try:
        parsed = parse_request(data)
    except (WireError, BatchError):
        return False
    assert content(parsed) == content_of(pb.LookupRequest.FromString(data))
    return True


def check_response(data: bytes) -> bool:
    try:
        parsed = parse_response(data)
    except WireError:
        return False
    message = pb.LookupResponse.FromString(data)
    assert [(t.layer, t.first, bytes(t.rows)) for t in parsed.tables] == [
        (t.layer, t.first, t.rows) for t in message.tables
    ]
    found = parsed.times and tuple(vars(parsed.times).values())
    t = message.times
    assert found == ((t.queue_us, t.gather_us, t.total_us) if message.HasField("times") else None)
    return True


def whole_request() -> bytes:
    parts = [hash_cases.Request([5, 300, 7], [3, 4], [False, True, False], [True, False])]
    tables = ((1, np.arange(3, dtype=np.uint32)), (300, np.arange(2, dtype=np.uint64)))
    return wire.encode_request(LookupRequest("model", "v" * 32, tables, hash_cases.batch_of(parts), (1, 300)))


def whole_response() -> bytes:
    return generated_response([(1, 0, bytes(9)), (300, 5, b"row")], ServerTimes(1, 2, 3)).SerializeToString()


@pytest.mark.parametrize(("data", "check"), [(whole_request(), check_request), (whole_response(), check_response)])
def test_truncation_at_every_byte(data, check):
    accepted = [cut for cut in range(len(data) + 1) if check(data[:cut])]
    # Between fields a prefix is a message of its own; nowhere else.
    assert 2 < len(accepted) < 20
    assert accepted[-1] == len(data)


@settings(max_examples=10 * settings.default.max_examples)
@given(data=st.data(), kind=st.booleans())
def test_mutations(data, kind):
    raw = bytearray(whole_request() if kind else whole_response())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        action = data.draw(st.sampled_from(["set", "insert", "delete", "double"]))
        if action == "set":
            raw[at] = data.draw(st.integers(0, 255))
        elif action == "insert":
            raw[at:at] = data.draw(st.binary(min_size=1, max_size=6))
        elif action == "delete":
            del raw[at]
        else:
            raw[at:at] = raw[data.draw(st.integers(0, at)) : at]
    (check_request if kind else check_response)(bytes(raw))


@settings(max_examples=5 * settings.default.max_examples)
@given(raw=st.binary(max_size=60))
@example(b"\x22\x02\x20\x01")
def test_noise(raw):
    check_request(raw)
    check_response(raw)


def test_every_single_byte_change():
    for whole, check in ((whole_request(), check_request), (whole_response(), check_response)):
        for at in range(len(whole)):
            for value in {0, 1, 127, 128, 255, whole[at] ^ 1, whole[at] ^ 0x80, (whole[at] + 1) % 256}:
                check(whole[:at] + bytes([value]) + whole[at + 1 :])


@pytest.mark.parametrize("field", [b"\x1a\x00", b"\x22\x00", b"\x28\x01", b"\x50\x01"])
def test_a_flood_of_fields_is_refused(field):
    """Empty tables, empty tokens, single layers, unknown fields: cheap to send, and slow to read one by one."""
    with contextlib.suppress(BatchError):  # empty tokens are no batch, but they are read
        wire.parse_request(field * MAX_FIELDS)
    with pytest.raises(WireError, match="more than 10000 fields"):
        wire.parse_request(field * (MAX_FIELDS + 1))


def test_a_flood_within_other_fields_is_refused():
    layers = pb.LookupRequest(layers=range(MAX_FIELDS)).SerializeToString()
    with pytest.raises(WireError, match="more than 10000 fields"):
        wire.parse_request(layers)
    table = b"\x1a\x04" + b"\x50\x01" * 2
    with pytest.raises(WireError, match="more than 10000 fields"):
        wire.parse_request(table * (MAX_FIELDS // 3 + 1))
    with pytest.raises(WireError, match="more than 10000 fields"):
        wire.parse_response(b"\x0a\x00" * (MAX_FIELDS + 1))
