"""The compiled hash families against the numpy ones, which are their specification, and against golden vectors."""

import json

import golden_vectors
import hash_cases
import numpy as np
import pytest
from hash_cases import FAMILIES, Case, as_lists, batch_of, reference_rows
from hash_reference import Request
from hypothesis import example, given
from hypothesis import strategies as st

from engrampool_proto import frames, hashing
from engrampool_proto.builders import blueprint
from engrampool_proto.errors import BatchError, SpecError
from engrampool_proto.hashing import Identity, Polynomial, TokenBatch, XorMix
from engrampool_proto.kernels.ask import Ids
from engrampool_proto.kernels.hasher import Hasher
from engrampool_proto.spec import ModelSpec, RowFormat, Segment, TableSpec
from engrampool_proto.token_map import TokenMap

BYTES = RowFormat((Segment("values", "uint8", 4),))
INT64 = st.integers(-(2**63), 2**63 - 1)
EDGES = st.sampled_from([1, 2, 3, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61 - 1, 2**62 + 1, 2**63 - 1])


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tokenizer) -> Case:
    return hash_cases.case(request.param, tokenizer)


@pytest.fixture(scope="module")
def hasher(case) -> Hasher:
    return Hasher(case.spec)


def assert_same(spec: ModelSpec, batch: TokenBatch, hasher: Hasher | None = None) -> None:
    ours, wanted = (hasher or Hasher(spec)).rows(batch), spec.hash(batch)
    assert list(ours) == list(wanted)
    for layer, ids in wanted.items():
        assert ours[layer].dtype == ids.dtype
        assert ours[layer].flags.c_contiguous
        np.testing.assert_array_equal(ours[layer], ids)
    assert_same_keys(spec, batch, hasher or Hasher(spec), wanted)
    assert_same_in_frames(spec, batch, hasher or Hasher(spec), wanted)


def assert_same_in_frames(spec: ModelSpec, batch: TokenBatch, hasher: Hasher, rows: dict[int, np.ndarray]) -> None:
    """Ids as a frame has them, of all columns and of some: between guards, and with zeros where nothing belongs."""
    flags = [
        np.empty((0,) * ndim, np.bool_) if one is None else one
        for one, ndim in zip((batch.dead, batch.lookback_dead), (1, 2), strict=True)
    ]
    given = batch.tokens, batch.query_start_loc, batch.lookback, *flags
    least = min(table.heads for table in spec.tables)
    for heads in (None, slice(least - 1, least)):
        wanted = b""
        for ids in rows.values():
            of_layer = (ids if heads is None else ids[:, heads]).tobytes()
            wanted += of_layer.ljust(frames.padded(len(of_layer)), b"\0")
        memory = np.full(len(wanted) + 64, 0xA5, np.uint8)
        memory[32:-32] = 0
        assert Ids(hasher, spec.layers, heads).put(given, memory[32:-32])
        assert memory.tobytes() == b"\xa5" * 32 + wanted + b"\xa5" * 32


def assert_same_keys(spec: ModelSpec, batch: TokenBatch, hasher: Hasher, rows: dict[int, np.ndarray]) -> None:
    """Keys, and the rows that are made of them."""
    windows = batch.windows(spec.lookback, None if spec.token_map is None else spec.token_map.ids)
    ours = hasher.keys(batch)
    assert list(ours) == list(rows)
    for layer, keys in ours.items():
        table = spec.table(layer)
        np.testing.assert_array_equal(keys, table.hash.keys(windows))
        assert (keys.dtype, keys.flags.c_contiguous) == (np.int64, True)
        for columns, of_group in zip(table.hash.groups(), keys, strict=True):
            for some in (columns, slice(columns.stop - 1, columns.stop)):
                out = np.empty((batch.num_tokens, some.stop - some.start), table.id_dtype)
                hasher.rows_of(table, some, of_group, out)
                np.testing.assert_array_equal(out, rows[layer][:, some])


@given(data=st.data())
def test_rows_equal_the_reference_and_the_numpy_form(case, hasher, data):
    parts = data.draw(hash_cases.requests(case.spec.vocab_size, case.eos, case.spec.lookback))
    assert as_lists(hasher.rows(batch_of(parts))) == reference_rows(case.tables, parts)
    assert_same(case.spec, batch_of(parts), hasher)


@pytest.mark.parametrize("name", golden_vectors.CONFIGS)
def test_the_golden_vectors(name, tokenizer):
    golden = json.loads((golden_vectors.GOLDEN / f"{name}.json").read_text())
    hasher = Hasher(blueprint(golden["config"], tokenizer).spec)
    for request in golden["requests"]:
        rows = {int(layer): ids for layer, ids in request.pop("rows").items()}
        assert as_lists(hasher.rows(batch_of([Request(**request)]))) == rows


def moduli(bound: int) -> st.SearchStrategy[list[int]]:
    """Of one order. One below the bound, powers of two and primes beside them are the hard ones for a reciprocal."""
    near = EDGES.map(lambda m: min(m, bound - 1))
    return st.lists(st.one_of(near, st.integers(1, 2000), st.integers(1, bound - 1)), min_size=1, max_size=4)


@st.composite
def xor_mixes(draw: st.DrawFn) -> XorMix:
    orders = draw(st.integers(1, 4))
    multipliers = draw(st.lists(INT64, min_size=orders + 1, max_size=orders + 1))
    primes = draw(st.lists(moduli(2**60), min_size=orders, max_size=orders))
    stop = draw(st.sampled_from([None, 0, 7, 999]))
    return XorMix(tuple(multipliers), tuple(map(tuple, primes)), draw(st.sampled_from([0, 5, 2**31 - 1])), stop)


@st.composite
def polynomials(draw: st.DrawFn) -> Polynomial:
    by_order = draw(st.lists(moduli(2**32), min_size=1, max_size=4))
    weight = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2**32 - 1]))
    weights = tuple(
        tuple(tuple(draw(st.lists(weight, min_size=order, max_size=len(by_order) + 2))) for _ in heads)
        for order, heads in enumerate(by_order, start=2)
    )
    return Polynomial(tuple(map(tuple, by_order)), weights, draw(st.sampled_from([None, 0, 7, 999])))


@given(
    families=st.lists(
        st.one_of(xor_mixes(), polynomials(), st.builds(Identity, st.integers(1, 1200))), min_size=1, max_size=3
    ),
    mapped=st.booleans(),
    spare=st.sampled_from([0, 2**33]),
    data=st.data(),
)
def test_any_constants_give_the_rows_of_the_numpy_form(families, mapped, spare, data):
    # `spare` rows after the last head make the ids uint64.
    tables = tuple(
        TableSpec(layer, sum(family.head_rows()) + spare, BYTES, family) for layer, family in enumerate(families)
    )
    token_map = TokenMap((np.arange(1000) * 7 % 600).astype(np.int32)) if mapped else None
    spec = ModelSpec("any", 1000, tables, token_map)
    parts = data.draw(hash_cases.requests(1000, 7, spec.lookback))
    assert_same(spec, batch_of(parts))


@example(token=0)
@given(token=st.integers(0, 2**31 - 2))
def test_products_that_wrap_and_the_largest_moduli(token):
    families = [
        XorMix((-(2**63), 2**63 - 1), ((modulus,),), 2**31 - 1) for modulus in (1, 2, 2**62 + 1, 2**63 - 25, 2**63 - 1)
    ]
    tables = tuple(TableSpec(at, family.primes[0][0], BYTES, family) for at, family in enumerate(families))
    assert_same(ModelSpec("top", 2**31 - 1, tables), TokenBatch.of(np.array([token, 1, token, token], np.int32)))


def test_every_family_has_a_kernel():
    known = {value for value in vars(hashing).values() if isinstance(value, type) and hasattr(value, "FAMILY")}
    examples = {
        XorMix: XorMix((1, 2), ((3,),), 0),
        Polynomial: Polynomial(((3,),), (((1, 2),),)),
        Identity: Identity(3),
    }
    assert known - {hashing.HashFamily} == set(examples)
    for family in examples.values():
        assert_same(ModelSpec("any", 4, (TableSpec(0, 3, BYTES, family),)), TokenBatch.of(np.array([3, 1], np.int32)))


SMALL = ModelSpec("small", 1000, (TableSpec(3, 30, BYTES, XorMix((3, 5, 7), ((11,), (13,)), 2)),))


@pytest.mark.parametrize(
    "arguments",
    [
        {"tokens": [0, 1000]},
        {"tokens": [-1]},
        {"tokens": [2, -(2**31)], "dead": [True, False]},
        {"lookback": [[3, 1000], [4, 5]]},
        {"lookback": [[3, 4], [-2, 5]]},
        {"lookback": [[3, 4, 5], [3, 4, 5]]},
    ],
)
def test_token_ids_out_of_range_are_refused_in_the_same_words(arguments):
    arrays = {name: np.array(v, bool if "dead" in name else np.int32) for name, v in arguments.items()}
    tokens = arrays.pop("tokens", np.array([1, 2], np.int32))
    # Two requests, the second of them empty: its look-back is read too.
    batch = TokenBatch.of(tokens, np.array([0, len(tokens), len(tokens)], np.int32), **arrays)
    with pytest.raises(BatchError) as wanted:
        SMALL.hash(batch)
    for hashed in (Hasher(SMALL).rows, Hasher(SMALL).keys):
        with pytest.raises(BatchError) as found:
            hashed(batch)
        assert str(found.value) == str(wanted.value)


def test_ids_of_dead_tokens_are_not_looked_at():
    batch = TokenBatch.of(
        np.array([-5, 3, 10**9], np.int32),
        lookback=np.array([[-9, 4]], np.int32),
        dead=np.array([True, False, True]),
        lookback_dead=np.array([[True, False]]),
    )
    assert_same(SMALL, batch)


def test_layers_come_in_the_order_asked_for_and_unknown_ones_are_refused():
    spec = ModelSpec("two", 9, tuple(TableSpec(layer, 9, BYTES, Identity(9)) for layer in (1, 4)))
    batch = TokenBatch.of(np.array([8, 0], np.int32))
    for hashed in (Hasher(spec).rows, Hasher(spec).keys):
        assert list(hashed(batch, [4, 1])) == [4, 1]
        assert list(hashed(batch, [])) == []
        with pytest.raises(SpecError, match="no layer 2"):
            hashed(batch, [2])


def test_arrays_may_be_views_with_gaps_and_read_only():
    every_other = np.arange(20, dtype=np.int32)[::2]
    lookback = np.arange(8, dtype=np.int32).reshape(2, 4)[:, ::2]
    dead = np.zeros(20, bool)[::2]
    every_other.flags.writeable = dead.flags.writeable = False
    assert_same(SMALL, TokenBatch.of(every_other, np.array([0, 5, 10], np.int32), lookback, dead, lookback == 4))
