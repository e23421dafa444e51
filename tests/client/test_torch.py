"""Rows as tensors: every bit against an independent evaluation, and a model's layers against a real server."""

import copy
import importlib
import math
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from engrampool_client import BatchError, Client, PoolError, SpecError, Step, UnavailableError
from engrampool_client.lookup.delivery import Delivery
from engrampool_proto.builders import blueprint
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import RowFormat, Segment
from engrampool_proto.synthetic import synthetic_rows
from engrampool_server.files.checkpoint import with_scales
from server_fixtures import serve_thread
from small_model import write_model

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-torch` installs it")
pooled = importlib.import_module("engrampool_client.integrations.torch")

V41 = RowFormat((Segment("values", "float8_e4m3fn", 256), Segment("scales", "float8_e8m0fnu", 8)))
NVFP4 = RowFormat((Segment("values", "float4_e2m1fn_x2", 16), Segment("scales", "float8_e4m3fn", 2)))
DTYPES = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}
EVERY_BYTE = np.arange(256, dtype=np.uint8)


def rounded(exact, dtype):
    """What `dtype` makes of float64 numbers, as a numpy array."""
    with np.errstate(over="ignore", invalid="ignore"):
        return exact.astype(np.float32).astype(DTYPES[dtype])


def assert_same_bits(tensor, expected):
    """Equal bit for bit; a NaN is as good as another."""
    found = tensor.view(torch.uint8).numpy().view(expected.dtype).reshape(tensor.shape)
    assert found.shape == expected.shape
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), nan)
    width = f"u{expected.itemsize}"
    np.testing.assert_array_equal(found.view(width)[~nan], expected.view(width)[~nan])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_value_with_every_scale(dtype):
    values = np.repeat(EVERY_BYTE, 256).reshape(-1, 256)  # row v, column s
    row_format = RowFormat((Segment("values", "float8_e4m3fn", 256), Segment("scales", "float8_e8m0fnu", 256)))
    rows = np.concatenate([values, np.tile(EVERY_BYTE, (256, 1))], axis=1)
    number = EVERY_BYTE.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    # The scale's byte is an exponent of two; 255 is the one NaN.
    factor = np.where(EVERY_BYTE == 255, np.nan, np.exp2(EVERY_BYTE.astype(np.float64) - 127))
    assert_same_bits(
        pooled.dequantize(torch.from_numpy(rows), row_format, dtype=dtype), rounded(np.outer(number, factor), dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_scale_is_for_its_run_of_32(dtype):
    rows = np.random.default_rng(1).integers(0, 256, (3, 5, 264), dtype=np.uint8)
    numbers = rows[..., :256].view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    factors = rows[..., 256:].view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    with np.errstate(invalid="ignore"):
        expected = rounded(numbers * np.repeat(factors, 32, axis=-1), dtype)
    assert_same_bits(pooled.dequantize(torch.from_numpy(rows), V41, dtype=dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.015625, 0.3], ids=str)
@pytest.mark.parametrize("stored", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float32"])
def test_values_alone_with_and_without_a_scale_for_the_table(stored, scale, dtype):
    kind = np.dtype(getattr(ml_dtypes, stored, None) or stored)
    # Every bit pattern there is, or many of them.
    raw = np.arange(65536, dtype=np.uint16).view(np.uint8)
    if kind.itemsize == 4:
        raw = np.random.default_rng(2).integers(0, 256, 1 << 18, dtype=np.uint8)
    rows = raw.reshape(-1, 16 * kind.itemsize)
    numbers = rows.view(kind).astype(np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        factor = None if scale is None else np.float32(ml_dtypes.bfloat16(scale))
        expected = (numbers if factor is None else numbers * factor).astype(DTYPES[dtype])
    row_format = RowFormat((Segment("values", stored, 16),))
    assert_same_bits(pooled.dequantize(torch.from_numpy(rows), row_format, scale, dtype), expected)


@pytest.mark.parametrize("scale", [0.3, 1 / 3, 0.0123, 1.0039062])
def test_a_scale_of_the_table_is_rounded_as_the_engines_round_it(scale):
    rows = torch.from_numpy(np.tile(EVERY_BYTE, (2, 1)))
    row_format = RowFormat((Segment("values", "float8_e4m3fn", 256),))
    # vLLM and SGLang: rows.to(bfloat16) * weight_scale, which is a bfloat16 parameter.
    engine = rows.view(torch.float8_e4m3fn).to(torch.bfloat16) * torch.tensor(scale).to(torch.bfloat16)
    found = pooled.dequantize(rows, row_format, scale)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.nan_to_num(-1e30), engine.nan_to_num(-1e30))
    unrounded = (rows.view(torch.float8_e4m3fn).to(torch.float32) * scale).to(torch.bfloat16)
    assert not torch.equal(found.nan_to_num(-1e30), unrounded.nan_to_num(-1e30))


FORMATS = {
    "scales": (V41, None),
    "scales of bfloat16": (
        RowFormat((Segment("values", "bfloat16", 32), Segment("scales", "float8_e8m0fnu", 4))),
        None,
    ),
    "scales of float32": (RowFormat((Segment("values", "float32", 32), Segment("scales", "float8_e8m0fnu", 4))), None),
    "a scale": (RowFormat((Segment("values", "float8_e4m3fn", 64),)), 0.3),
    "a scale of float32": (RowFormat((Segment("values", "float32", 64),)), 0.3),
    "values": (RowFormat((Segment("values", "float8_e5m2", 64),)), None),
    "values of float32": (RowFormat((Segment("values", "float32", 64),)), None),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(40, 3), (1,), (0, 3)], ids=str)
def test_numbers_are_written_where_the_caller_has_them(form, dtype, shape):
    row_format, scale = FORMATS[form]
    raw = np.random.default_rng(4).integers(0, 256, (*shape, row_format.row_bytes), dtype=np.uint8)
    rows = torch.from_numpy(raw.copy())
    wanted = pooled.dequantize(rows, row_format, scale, dtype)
    dim = row_format.segments[0].length
    strided = torch.ones(*shape, dim, 2, dtype=dtype)[..., 0]  # every second number of memory
    for out in (torch.ones(*shape, dim, dtype=dtype), strided):
        # The dtype of `out` counts.
        assert pooled.dequantize(rows, row_format, scale, torch.float16, out=out) is out
        np.testing.assert_array_equal(out.float().numpy(), wanted.float().numpy())
    assert np.array_equal(rows.numpy(), raw)  # which are only read


def test_numbers_are_written_into_what_fits_only():
    rows = torch.zeros(2, 264, dtype=torch.uint8)
    for shape in ((2, 264), (1, 256), (256,), (2, 1, 256)):
        with pytest.raises(BatchError, match=r"out must be \[2, 256\] on cpu; it is \["):
            pooled.dequantize(rows, V41, out=torch.zeros(shape))
    with pytest.raises(BatchError, match=r"it is .* on meta"):
        pooled.dequantize(rows, V41, out=torch.zeros(2, 256, device="meta"))
    with pytest.raises(ValueError, match=r"it is torch\.float64"):
        pooled.dequantize(rows, V41, out=torch.zeros(2, 256, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_memory_is_taken_for_numbers_that_the_caller_has_memory_for(dtype):
    rows, out = torch.zeros(64, 24, 264, dtype=torch.uint8), torch.empty(64, 24, 256, dtype=dtype)
    pooled.dequantize(rows, V41, out=out)
    with torch.profiler.profile(profile_memory=True) as profile:
        pooled.dequantize(rows, V41, out=out)
    taken = sum(max(0, event.self_cpu_memory_usage) for event in profile.key_averages())
    assert taken <= 64 * 24 * 8 * (dtype.itemsize + 4)  # the scales, as numbers


def test_rows_that_begin_anywhere_in_memory_are_read():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    memory = torch.zeros(3, 20, dtype=torch.uint8)
    memory[:, 3:19] = torch.from_numpy(values.view(np.uint8))
    found = pooled.dequantize(memory[:, 3:19], RowFormat((Segment("values", "float32", 4),)), dtype=torch.float32)
    assert np.array_equal(found.numpy(), values)
    single = memory.view(-1)[3:19]
    assert pooled.dequantize(single, RowFormat((Segment("values", "float32", 4),)), dtype=torch.float32).tolist() == [
        0,
        1,
        2,
        3,
    ]


@pytest.mark.parametrize(
    ("row_format", "scale"),
    [
        (NVFP4, None),
        (NVFP4, 0.5),
        (V41, 0.5),
        (RowFormat((Segment("values", "float8_e4m3fn", 32), Segment("scales", "float32", 1))), None),
        (RowFormat((Segment("values", "int8", 8),)), None),
        (RowFormat((Segment("rows", "float32", 8),)), None),
        (RowFormat((Segment("scales", "float8_e8m0fnu", 8), Segment("values", "float8_e4m3fn", 256))), None),
        (RowFormat((Segment("values", "float8_e4m3fn", 100), Segment("scales", "float8_e8m0fnu", 3))), None),
    ],
    ids=lambda value: getattr(value, "row_bytes", value),
)
def test_a_format_whose_meaning_is_not_given_is_refused(row_format, scale):
    rows = torch.zeros(2, row_format.row_bytes, dtype=torch.uint8)
    with pytest.raises(SpecError, match=rf"rows of {row_format.segments[0].name} .* are not known to be numbers"):
        pooled.dequantize(rows, row_format, scale)


def test_other_rows_than_the_format_says_are_refused():
    with pytest.raises(BatchError, match=r"rows must be uint8 \[..., 264\]; they are torch.uint8 \[2, 263\]"):
        pooled.dequantize(torch.zeros(2, 263, dtype=torch.uint8), V41)
    with pytest.raises(BatchError, match=r"they are torch.int8 \[264\]"):
        pooled.dequantize(torch.zeros(264, dtype=torch.int8), V41)
    with pytest.raises(BatchError, match=r"they are torch.uint8 \[\]"):
        pooled.dequantize(torch.tensor(1, dtype=torch.uint8), V41)
    with pytest.raises(ValueError, match=r"dtype must be one of .*; it is torch.int32"):
        pooled.dequantize(torch.zeros(264, dtype=torch.uint8), V41, dtype=torch.int32)


def test_look_back_is_the_newest_first_and_minus_one_before_the_start():
    assert pooled.lookback_of(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]), 3).tolist() == [[4, 3, 2], [8, 7, 6]]
    assert pooled.lookback_of([[1], [2]], 3).tolist() == [[1, -1, -1], [2, -1, -1]]
    assert pooled.lookback_of(np.empty((2, 0), np.int64), 2).tolist() == [[-1, -1], [-1, -1]]
    with pytest.raises(BatchError, match=r"history must be \[requests, tokens\]; it is \[2\]"):
        pooled.lookback_of([1, 2], 3)


@pytest.fixture(scope="module")
def client(server):
    with Client(server) as client:
        yield client


WAYS = {
    "plain": {},
    "staged": {"staging": True},
    "copied on arrival": {"staging": True, "copy_on_arrival": True},
    "copied when asked for": {"staging": True, "copy_on_arrival": False},
    "landing": {"max_tokens": 4096},
    "staged, landing": {"staging": True, "copy_on_arrival": True, "max_tokens": 4096},
}


@pytest.fixture(params=WAYS)
def pool(request, client):
    return pooled.EngramPool(client, **WAYS[request.param])


def expected_rows(spec, layer, *batch):
    ids = spec.hash(TokenBatch.of(*batch), [layer])[layer]
    return synthetic_rows(spec.table(layer), ids)


def tokens(seed, *shape):
    return np.random.default_rng(seed).integers(0, 129280, shape, dtype=np.int32)


def test_a_layer_gets_the_numbers_of_its_rows(pool, spec):
    layers = [pooled.PooledEmbedding(pool, layer) for layer in spec.layers]
    ids = tokens(1, 50)
    with pool.start(torch.from_numpy(ids).long()) as step:
        for embedding in layers:
            raw = expected_rows(spec, embedding.layer, ids)
            assert np.array_equal(step.rows(embedding.layer).numpy(), raw)
            found = embedding()
            assert (found.shape, found.dtype) == ((50, 24, 256), torch.bfloat16)
            numbers = raw[..., :256].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
            factors = raw[..., 256:].view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
            assert_same_bits(found, (numbers * np.repeat(factors, 32, axis=-1)).astype(ml_dtypes.bfloat16))


def test_a_batch_of_sequences_keeps_its_shape_and_its_boundaries(pool, spec):
    ids, history = tokens(2, 3, 7), tokens(3, 3, 9)
    dead = np.zeros((3, 7), bool)
    dead[1, :4] = True
    before = pooled.lookback_of(history, spec.lookback)
    bounds = np.array([0, 7, 14, 21], np.int32)
    with pool.start(torch.from_numpy(ids), lookback=before, dead=torch.from_numpy(dead)) as step:
        for layer in spec.layers:
            raw = expected_rows(spec, layer, ids.reshape(-1), bounds, before, dead.reshape(-1))
            assert np.array_equal(step.rows(layer).numpy(), raw.reshape(3, 7, 24, 264))
            assert step.embeddings(layer).shape == (3, 7, 24, 256)
            assert step.valid(layer).tolist() == [[True] * 7] * 3


def test_a_flattened_batch_has_boundaries_and_dead_look_back(pool, spec):
    ids, before = tokens(4, 10), tokens(5, 2, 3)
    bounds, lookback_dead = np.array([0, 4, 10], np.int32), np.array([[False, True, False], [False] * 3])
    with pool.start(ids, torch.from_numpy(bounds), before, lookback_dead=lookback_dead) as step:
        raw = expected_rows(spec, 1, ids, bounds, before, None, lookback_dead)
        assert np.array_equal(step.rows(1).numpy(), raw)


def test_only_the_layers_asked_for_come(pool, spec):
    ids = tokens(6, 5)
    with pool.start(ids, layers=[14]) as step:
        assert np.array_equal(step.rows(14).numpy(), expected_rows(spec, 14, ids))
        with pytest.raises(BatchError, match="layer 1 was not asked for"):
            pooled.PooledEmbedding(pool, 1)()


@pytest.mark.parametrize(
    "kind", [np.array, torch.from_numpy, lambda ids: ids.tolist()], ids=["array", "tensor", "list"]
)
@pytest.mark.parametrize("shape", [(50,), (2, 3)], ids=str)
def test_a_model_that_hashes_itself_asks_by_row_ids(pool, spec, kind, shape):
    ids = {layer: found.reshape(*shape, 24) for layer, found in hashed(spec, tokens(20, math.prod(shape))).items()}
    with pool.start(rows={layer: kind(found.astype(np.int64)) for layer, found in ids.items()}) as step:
        assert step.shape == shape
        for layer in spec.layers:
            raw = synthetic_rows(spec.table(layer), ids[layer])
            assert np.array_equal(step.rows(layer).numpy(), raw)
            assert pooled.PooledEmbedding(pool, layer)(torch.zeros(*shape, 24)).shape == (*shape, 24, 256)
            assert step.valid(layer).tolist() == np.ones(shape, bool).tolist()
    with pool.start(rows={14: torch.from_numpy(ids[14].astype(np.int64))}) as step:
        assert np.array_equal(step.rows(14).numpy(), synthetic_rows(spec.table(14), ids[14]))
        with pytest.raises(BatchError, match="layer 1 was not asked for"):
            step.rows(1)


def hashed(spec, ids):
    return spec.hash(TokenBatch.of(ids))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "input_ids or rows must be given"),
        ({"rows": {1: [[0] * 24]}, "input_ids": [1]}, "tokens, or layers, cannot be given beside them"),
        ({"rows": {1: [[0] * 24]}, "layers": [1]}, "tokens, or layers, cannot be given beside them"),
        ({"rows": [[0] * 24]}, "rows must be a dict of arrays by layer; it is list"),
        ({"rows": {}}, "at least one layer"),
        ({"rows": {1: [0] * 24}}, r"rows of layer 1 must be \[\*shape, 24\], as of every layer; they are \[24\]"),
        ({"rows": {1: [[0] * 23]}}, r"they are \[1, 23\]"),
        ({"rows": {1: [[0] * 24], 14: [[0] * 24] * 2}}, r"rows of layer 14 must be .* they are \[2, 24\]"),
        ({"rows": {1: [[0.5] * 24]}}, "rows of layer 1 must be integers; they are float64"),
        ({"rows": {1: [[0] * 24, [0]]}}, "rows of layer 1 cannot be made an array"),
        ({"rows": {1: torch.zeros(1, 24, dtype=torch.bfloat16)}}, "rows of layer 1 cannot be made an array"),
    ],
    ids=str,
)
def test_row_ids_that_do_not_fit_are_refused_and_hold_no_buffer(client, arguments, text):
    pool = pooled.EngramPool(client, staging=True, buffers=1)
    with pytest.raises(BatchError, match=text):
        pool.start(**arguments)
    pool.start([1]).close()


def test_row_ids_of_no_token_and_of_no_row(pool):
    with pool.start(rows={1: np.empty((0, 24), np.int32), 14: np.empty((0, 24))}) as step:
        assert step.rows(14).shape == (0, 24, 264)
    with pytest.raises(SpecError, match="no layer 2"):
        pool.start(rows={2: [[0] * 24]})
    with pytest.raises(BatchError, match="row id -1"), pool.start(rows={1: [[-1] * 24]}) as step:
        step.rows(1)


def test_a_client_of_some_heads_takes_row_ids_of_those(server, spec):
    ids = {layer: found[:, 8:12] for layer, found in hashed(spec, tokens(21, 9)).items()}
    with Client(server, heads=(8, 12)) as client:
        pool = pooled.EngramPool(client, staging=True)
        with pool.start(rows=ids) as step:
            assert np.array_equal(step.rows(14).numpy(), synthetic_rows(spec.table(14), ids[14]))


def test_a_batch_of_no_tokens(pool):
    with pool.start(np.empty(0, np.int32)):
        assert pooled.PooledEmbedding(pool, 1)().shape == (0, 24, 256)


def test_dummy_steps_are_zeros_that_no_server_was_asked_for(packed):
    with serve_thread(packed) as address:
        client = Client(address, timeout_s=1.0)
    with client:  # the server is gone
        pool = pooled.EngramPool(client)
        embedding = pooled.PooledEmbedding(pool, 1)
        with pool.dummy(2, 3):
            assert embedding().shape == (2, 3, 24, 256)
            assert not embedding().any()
            assert embedding.valid.shape == (2, 3)


def test_memory_is_taken_in_turns_and_what_was_taken_stays(client, spec):
    pool = pooled.EngramPool(client, staging=True, buffers=2)
    first_ids, second_ids, third_ids = tokens(7, 20), tokens(8, 30), tokens(9, 20)
    first, second = pool.start(first_ids), pool.start(second_ids)
    with pytest.raises(PoolError, match="all buffers are in use"):
        pool.start(third_ids)
    with first:
        taken = first.rows(1)
    third = pool.start(third_ids)
    with second:
        assert np.array_equal(second.rows(1).numpy(), expected_rows(spec, 1, second_ids))
    with third:
        assert np.array_equal(third.rows(1).numpy(), expected_rows(spec, 1, third_ids))
    assert np.array_equal(taken.numpy(), expected_rows(spec, 1, first_ids))


def test_a_buffer_waits_for_the_copies_out_of_it_and_grows():
    waited = []

    class Copied:
        def synchronize(self):
            waited.append(self)

    staging = pooled.Staging(pinned=False)
    small = staging.arrays({1: (4, 2, 8)})[1]
    copied = Copied()
    staging.copies.append(copied)
    again = staging.arrays({1: (3, 2, 8)})[1]
    assert waited == [copied]
    assert again.data_ptr() == small.data_ptr()
    assert again.shape == (3, 2, 8)
    assert again.is_contiguous()
    large = staging.arrays({1: (5, 2, 8), 2: (1, 1, 3)})
    assert [array.shape for array in large.values()] == [(5, 2, 8), (1, 1, 3)]
    assert waited == [copied]


def test_no_layer_runs_outside_of_a_step(pool):
    embedding = pooled.PooledEmbedding(pool, 1)
    with pytest.raises(PoolError, match="no step is running"):
        embedding()


def test_another_forward_cannot_begin_inside_one(pool):
    with pool.start(tokens(10, 4)):
        other = pool.start(tokens(11, 4))
        with pytest.raises(PoolError, match="another step of this pool is running"), other:
            pytest.fail("it ran")
        other.close()
        with pytest.raises(PoolError, match="the step has ended"):
            other.rows(1)
        other.close()  # a second time is nothing


@pytest.mark.parametrize("came", [[1, 14], [1]], ids=["all", "some"])
def test_a_forward_that_has_all_its_rows_cancels_nothing(client, came):
    """The client learns of an answer's end a moment after its last row; the forward may be over by then."""
    step = Step(Delivery([1, 14]))
    step.delivery.arrived({layer: np.zeros((2, 24, 264), np.uint8) for layer in came})
    pooled.PooledStep(pooled.EngramPool(client), step, (2,), {}, None).close()
    assert (step.error is not None) == (came == [1])


def test_a_step_that_nobody_closed_gives_its_buffers_back(client, spec):
    pool = pooled.EngramPool(client, staging=True, buffers=1)
    for _ in range(3):
        assert pool.start(torch.arange(5)).rows(1).shape == (5, 24, 264)


def test_a_forward_that_fails_leaves_the_pool_usable(client, spec):
    pool = pooled.EngramPool(client, staging=True, buffers=1)
    with pytest.raises(ZeroDivisionError), pool.start(tokens(12, 2000)):
        raise ZeroDivisionError
    ids = tokens(13, 5)
    with pool.start(ids) as step:
        assert np.array_equal(step.rows(14).numpy(), expected_rows(spec, 14, ids))


def test_the_client_itself_takes_tensors_that_fit(spec, server):
    tokens, dead = torch.arange(30), torch.zeros(30, dtype=torch.uint8)
    with Client(server) as client:
        rows = client.lookup(tokens, torch.tensor([0, 30]), torch.tensor([[5, -1, -1]]), dead)
        wanted = client.lookup(tokens.tolist(), None, [[5, -1, -1]])
        assert all(np.array_equal(rows[layer], wanted[layer]) for layer in spec.layers)
        with pytest.raises(BatchError, match=r"tokens\[29\] is 4294967325"):
            client.lookup(torch.where(tokens == 29, tokens + 2**32, tokens))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"input_ids": [[[1]]]}, r"input_ids must be \[T\], or \[B, S\] without query_start_loc; they are \[1, 1, 1\]"),
        ({"input_ids": [[1]], "query_start_loc": [0, 1]}, r"without query_start_loc"),
        ({"input_ids": [1, 2**31]}, r"input_ids cannot be made int32: input_ids\[1\] is 2147483648"),
        ({"input_ids": [1.5]}, "input_ids cannot be made int32: they are float64"),
        ({"input_ids": [1, 2], "dead": [True]}, r"dead must have the shape of input_ids, \[2\]; it has \[1\]"),
        ({"input_ids": [1], "lookback": [1, 2]}, "lookback must be int32"),
    ],
    ids=str,
)
def test_arrays_that_do_not_fit_are_refused_and_hold_no_buffer(client, arguments, text):
    pool = pooled.EngramPool(client, staging=True, buffers=1)
    with pytest.raises(BatchError, match=text):
        pool.start(**arguments)
    pool.start([1]).close()


def test_what_a_lookup_failed_with_is_raised_at_the_layer(pool):
    with pytest.raises(BatchError, match=r"tokens\[1\] is 129280"), pool.start([1, 129280]):
        pooled.PooledEmbedding(pool, 1)()


def test_a_server_that_is_gone_is_an_error_at_the_layer_or_a_shut_gate(packed):
    with serve_thread(packed) as address:
        clients = {policy: Client(address, retry_s=0, on_failure=policy) for policy in ("raise", "mask")}
    with clients["raise"] as client:
        pool = pooled.EngramPool(client)
        with pytest.raises(UnavailableError), pool.start([1, 2]):
            pooled.PooledEmbedding(pool, 1)()
    with clients["mask"] as client:
        pool = pooled.EngramPool(client, staging=True, buffers=1)
        embedding = pooled.PooledEmbedding(pool, 1)
        with pool.dummy(2) as step:  # what was in the buffer before must not come back
            step._host[1].fill_(7)
        with pool.start([1, 2]):
            assert not embedding().any()
            assert embedding.valid.tolist() == [False, False]


def test_a_client_of_some_heads_gives_those(server, spec):
    ids = tokens(14, 6)
    with Client(server, heads=(8, 12)) as client:
        pool = pooled.EngramPool(client)
        with pool.start(ids) as step:
            assert np.array_equal(step.rows(1).numpy(), expected_rows(spec, 1, ids)[:, 8:12])
            assert pooled.PooledEmbedding(pool, 1)().shape == (6, 4, 256)


def test_a_layer_of_some_heads_gives_those_of_the_clients(server, spec):
    ids = tokens(16, 6)
    with Client(server, heads=(8, 12)) as client:
        pool = pooled.EngramPool(client)
        every, some = pooled.PooledEmbedding(pool, 1), pooled.PooledEmbedding(pool, 1, heads=(1, 3))
        assert (every.heads, every.num_heads, some.heads, some.num_heads) == (None, 4, (1, 3), 2)
        assert "heads=(1, 3)" in repr(some)
        with pool.start(ids):
            assert torch.equal(some(), every()[:, 1:3])
            assert some().shape == (6, 2, some.embedding_dim)
        for heads in ((0, 5), (2, 2), (-1, 2), (1,), (0.0, 1.0), 3):
            with pytest.raises(ValueError, match=r"heads must be two integers .* within 0 \.\. 4"):
                pooled.PooledEmbedding(pool, 1, heads=heads)


def test_a_copy_of_a_model_shares_the_pool_and_a_saved_one_is_loaded_without(pool, tmp_path):
    model = torch.nn.ModuleDict({"embedding": pooled.PooledEmbedding(pool, 1), "projection": torch.nn.Linear(2, 2)})
    ids = tokens(17, 5)
    copied = copy.deepcopy(model)
    assert copied["embedding"].pool is pool
    assert copied["projection"] is not model["projection"]
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert "target=None" in repr(loaded)
    for use in (loaded["embedding"], lambda: loaded["embedding"].valid):
        with pytest.raises(PoolError, match="saved without its pool"):
            use()
    loaded["embedding"].pool = pool
    with pool.start(ids):
        wanted = model["embedding"]()
        assert torch.equal(copied["embedding"](), wanted)
        assert torch.equal(loaded["embedding"](), wanted)
    assert torch.equal(loaded["projection"].weight, model["projection"].weight)
    with pytest.raises(TypeError, match="cannot be copied or saved: make another"):
        copy.deepcopy(pool.client)


def test_rows_with_one_scale_for_the_table(tmp_path):
    config = {
        "ple_layer_ids": [3],
        "ngram_vocab_size_base": 500,
        "ple_embed_dim": 640,
        "ple_embedding_dtype": "float8_e4m3fn",
        "vocab_size": 1000,
        "eos_token_id": 7,
    }
    spec = with_scales(blueprint(config).spec, {3: 0.3})
    packed, ids = write_model(tmp_path / "qwen", spec), np.arange(30, dtype=np.int32)
    with serve_thread(packed) as address, Client(address) as client:
        pool = pooled.EngramPool(client, dtype=torch.float32)
        with pool.start(ids):
            numbers = expected_rows(spec, 3, ids).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
            assert_same_bits(pooled.PooledEmbedding(pool, 3)(), numbers * np.float32(ml_dtypes.bfloat16(0.3)))


def test_the_module_has_no_parameters_and_leaves_the_table_in_the_checkpoint(pool):
    model = torch.nn.ModuleDict(
        {"embedding": pooled.PooledEmbedding(pool, 1), "projection": torch.nn.Linear(2, 2, bias=False)}
    )
    assert list(model.state_dict()) == ["projection.weight"]
    assert repr(model["embedding"]) == f"PooledEmbedding(layer=1, embedding_dim=256, target={pool.client.target!r})"
    state = {
        "embedding.weight": torch.zeros(5, 256),
        "embedding.scale": torch.zeros(5, 8),
        "projection.weight": torch.ones(2, 2),
    }
    model.load_state_dict(state, strict=True)
    assert model["projection"].weight.tolist() == [[1, 1], [1, 1]]
    with pytest.raises(SpecError, match="no layer 2"):
        pooled.PooledEmbedding(pool, 2)


def test_ids_of_another_step_are_noticed(pool):
    embedding = pooled.PooledEmbedding(pool, 1)
    with pool.start(tokens(15, 2, 3)):
        assert embedding(torch.zeros(2, 3, 24, dtype=torch.long)).shape == (2, 3, 24, 256)
        with pytest.raises(BatchError, match=r"ids are for \[6\] tokens, the running step for \[2, 3\]"):
            embedding(torch.zeros(6, 24, dtype=torch.long))


def test_the_example_of_the_page_runs_as_written(packed):
    page = (Path(__file__).parents[2] / "docs" / "INTEGRATION_TORCH.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    with serve_thread(packed) as address:
        here = example.replace("127.0.0.1:50051", address)
        assert here != example
        done = subprocess.run([sys.executable, "-c", here], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "torch.Size([1, 4, 24, 256])",
        "torch.Size([1, 2, 24, 256]) tensor([[True, True]])",
    ]


def test_settings_that_cannot_be_are_refused(client):
    with pytest.raises(ValueError, match="buffers must be at least 1"):
        pooled.EngramPool(client, buffers=0)
    with pytest.raises(ValueError, match="dtype must be one of"):
        pooled.EngramPool(client, dtype=torch.int8)
