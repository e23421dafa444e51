"""Row ids against the scalar reference, against engramdb, and against themselves in other batches."""

import engramdb
import golden_vectors
import hash_cases
import hash_reference
import numpy as np
import pytest
from hash_cases import FAMILIES, Case, as_lists, batch_of, reference_rows
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engrampool_proto.builders import blueprint
from engrampool_proto.errors import BatchError, SpecError
from engrampool_proto.hashing import Identity, Polynomial, TokenBatch, XorMix
from engrampool_proto.spec import ModelSpec, RowFormat, Segment, TableSpec

BYTES = RowFormat((Segment("values", "uint8", 4),))
INT64 = st.integers(-(2**63), 2**63 - 1)
# Of what each family does alike, and is asked of all five.
FEWER = settings(max_examples=min(20, settings.default.max_examples))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tokenizer) -> Case:
    return hash_cases.case(request.param, tokenizer)


def requests_of(case: Case) -> st.SearchStrategy[list[hash_reference.Request]]:
    return hash_cases.requests(case.spec.vocab_size, case.eos, case.spec.lookback)


@given(data=st.data())
def test_rows_equal_the_reference(case, data):
    parts = data.draw(requests_of(case))
    assert as_lists(case.spec.hash(batch_of(parts))) == reference_rows(case.tables, parts)


@FEWER
@given(data=st.data())
def test_a_batch_hashes_as_its_requests_alone(case, data):
    parts = data.draw(requests_of(case))
    together = case.spec.hash(batch_of(parts))
    alone = [case.spec.hash(batch_of([part])) for part in parts]
    for layer, rows in together.items():
        assert np.array_equal(rows, np.concatenate([one[layer] for one in alone]))


@FEWER
@given(data=st.data())
def test_chunks_hash_as_the_whole(case, data):
    whole = data.draw(requests_of(case))[0]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole.tokens)), max_size=4)))
    pieces = hash_cases.chunked(whole, cuts, case.spec.lookback)
    expected = as_lists(case.spec.hash(batch_of([whole])))
    # As steps of one request each, and as one batch, which is what concurrent requests of equal prefix look like.
    assert as_lists(case.spec.hash(batch_of(pieces))) == expected
    steps = [case.spec.hash(batch_of([piece])) for piece in pieces]
    assert {layer: np.concatenate([s[layer] for s in steps]).tolist() for layer in expected} == expected


def test_ids_of_dead_tokens_do_not_matter(case):
    tokens, dead = np.array([5, -7, 9, 2**31 - 1], np.int32), np.array([False, True, False, True])
    lookback, before_dead = np.full((1, case.spec.lookback), -9, np.int32), np.ones((1, case.spec.lookback), bool)
    placeholders = TokenBatch.of(tokens, None, lookback, dead, before_dead)
    zeros = TokenBatch.of(np.where(dead, 0, tokens).astype(np.int32), None, np.zeros_like(lookback), dead, before_dead)
    assert as_lists(case.spec.hash(placeholders)) == as_lists(case.spec.hash(zeros))


def test_rows_are_contiguous_and_in_range(case):
    batch = TokenBatch.of(np.arange(100, dtype=np.int32))
    layers = case.spec.layers[::-1]
    rows = case.spec.hash(batch, layers)
    assert tuple(rows) == layers
    for layer, ids in rows.items():
        table = case.spec.table(layer)
        stops = [*table.head_offsets[1:].tolist(), sum(table.hash.head_rows())]
        assert ids.dtype == np.uint32
        assert ids.shape == (100, table.heads)
        assert ids.flags.c_contiguous
        assert (ids >= table.head_offsets).all()
        assert (ids < np.array(stops)).all()


def test_no_tokens_give_no_rows(case):
    for bounds in ([0], [0, 0, 0]):
        rows = case.spec.hash(TokenBatch.of(np.empty(0, np.int32), np.array(bounds, np.int32)))
        assert {layer: ids.shape for layer, ids in rows.items()} == {
            table.layer: (0, table.heads) for table in case.spec.tables
        }


@pytest.mark.parametrize(
    ("tokens", "lookback", "message"),
    [
        ([3, -1], [], r"tokens\[1\] is -1"),
        ([3, 2**31 - 1], [], r"tokens\[1\] is 2147483647"),
        ([3], [-2], r"lookback\[0, 0\] is -2"),
        ([3], [2**31 - 1], r"lookback\[0, 0\] is 2147483647"),
        ([3], [1] * 9, "9 columns"),
    ],
)
def test_bad_ids_are_refused_and_named(case, tokens, lookback, message):
    if lookback and case.spec.lookback == 0:
        message = "columns"
    batch = TokenBatch.of(np.array(tokens, np.int32), None, np.array([lookback], np.int32).reshape(1, len(lookback)))
    with pytest.raises(BatchError, match=message):
        case.spec.hash(batch)


def test_an_unknown_layer_is_refused(case):
    with pytest.raises(SpecError, match="no layer 77"):
        case.spec.hash(TokenBatch.of(np.zeros(1, np.int32)), [77])


# Families with constants that no builder gives


@given(
    ids=st.lists(st.integers(0, 2**31 - 2), min_size=3, max_size=3),
    multipliers=st.lists(INT64, min_size=3, max_size=3),
    sizes=st.lists(st.lists(st.integers(1, 2**60), min_size=1, max_size=3), min_size=2, max_size=2),
)
@example([2**31 - 2] * 3, [2**63 - 1, -(2**63), -1], [[2**60], [2**31]])
def test_xor_mix_wraps_as_int64_does(ids, multipliers, sizes):
    mix = XorMix(tuple(multipliers), tuple(map(tuple, sizes)), fill=0)
    table = TableSpec(0, sum(map(sum, sizes)), BYTES, mix)
    spec = ModelSpec("m", 2**31 - 1, (table,))
    batch = TokenBatch.of(np.array(ids[:1], np.int32), None, np.array([ids[1:]], np.int32))
    rows = spec.hash(batch)[0]
    assert rows.tolist() == [hash_reference.xor_mix(ids, multipliers, sizes)]
    assert rows.dtype == (np.uint64 if table.num_rows > 2**32 else np.uint32)


@given(
    ids=st.lists(st.integers(0, 2**31 - 2), min_size=3, max_size=3),
    moduli=st.lists(st.integers(1, 2**32 - 1), min_size=2, max_size=2),
    weights=st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3),
)
@example([2**31 - 2] * 3, [2**32 - 1] * 2, [2**32 - 1] * 3)
def test_polynomial_does_not_overflow(ids, moduli, weights):
    family = Polynomial(tuple((m,) for m in moduli), ((tuple(weights),), (tuple(weights),)))
    spec = ModelSpec("m", 2**31 - 1, (TableSpec(0, sum(moduli), BYTES, family),))
    batch = TokenBatch.of(np.array(ids[:1], np.int32), None, np.array([ids[1:]], np.int32))
    first = sum(i * w for i, w in zip(ids[:2], weights[:2], strict=True)) % moduli[0]
    second = sum(i * w for i, w in zip(ids, weights, strict=True)) % moduli[1]
    assert spec.hash(batch)[0].tolist() == [[first, moduli[0] + second]]


@pytest.mark.parametrize(("num_rows", "dtype"), [(2**32, np.uint32), (2**32 + 1, np.uint64)])
def test_ids_are_uint64_only_beyond_what_uint32_holds(num_rows, dtype):
    mix = XorMix((0, 0), ((num_rows - 1, 1),), fill=0)
    spec = ModelSpec("m", 10, (TableSpec(3, num_rows, BYTES, mix),))
    rows = spec.hash(TokenBatch.of(np.zeros(1, np.int32)))[3]
    assert rows.dtype == dtype
    assert rows.tolist() == [[0, num_rows - 1]]


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        (XorMix, {"multipliers": (1,), "primes": (), "fill": 0}),
        (XorMix, {"multipliers": (1, 3, 5), "primes": ((7,),), "fill": 0}),
        (XorMix, {"multipliers": (1, 2**63), "primes": ((7,),), "fill": 0}),
        (XorMix, {"multipliers": (1, 3), "primes": ((),), "fill": 0}),
        (XorMix, {"multipliers": (1, 3), "primes": ((0,),), "fill": 0}),
        (XorMix, {"multipliers": (1, 3), "primes": ((2**63,),), "fill": 0}),
        (XorMix, {"multipliers": (1, 3), "primes": ((7,),), "fill": -1}),
        (XorMix, {"multipliers": (1, 3), "primes": ((7,),), "fill": 1.5}),
        (XorMix, {"multipliers": (1, 3), "primes": ((7,),), "fill": 0, "stop": "2"}),
        (Polynomial, {"moduli": (), "weights": ()}),
        (Polynomial, {"moduli": ((7,),), "weights": ()}),
        (Polynomial, {"moduli": ((7,),), "weights": (((1,),),)}),
        (Polynomial, {"moduli": ((2**32,),), "weights": (((1, 1),),)}),
        (Polynomial, {"moduli": ((7,),), "weights": (((1, 2**32),),)}),
        (Polynomial, {"moduli": ((7,),), "weights": (((1, 3),),), "stop": 2.5}),
        (Identity, {"num_rows": 0}),
        (Identity, {"num_rows": 2**31}),
        (Identity, {"num_rows": 7.5}),
    ],
)
def test_impossible_constants_are_refused(family, arguments):
    with pytest.raises(SpecError):
        family(**arguments)


# The batch itself


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": np.zeros(2, np.int64)}, "tokens must be int32"),
        ({"tokens": [1, 2]}, "tokens must be a numpy array"),
        ({"tokens": np.zeros(2, ">i4")}, r"tokens must be int32 \[\*\]; it is int32 in the other byte order \[2\]"),
        ({"tokens": np.zeros((1, 2), np.int32)}, "tokens must be int32"),
        ({"query_start_loc": np.array([0, 3], np.int32)}, "from 0 to the number of tokens"),
        ({"query_start_loc": np.array([1, 2], np.int32)}, "from 0 to the number of tokens"),
        ({"query_start_loc": np.array([], np.int32)}, "empty"),
        ({"query_start_loc": np.array([0, 2, 1, 2], np.int32)}, "entry 2 is 1, after 2 at entry 1"),
        ({"query_start_loc": np.array([0, 2], np.int64)}, "query_start_loc must be int32"),
        ({"lookback": np.zeros((2, 1), np.int32)}, "lookback must be int32"),
        ({"lookback": np.zeros(1, np.int32)}, "lookback must be int32"),
        ({"dead": np.zeros(3, bool)}, "dead must be bool"),
        ({"dead": np.zeros(2, np.uint8)}, "dead must be bool"),
        ({"lookback_dead": np.zeros((1, 1), bool)}, "lookback_dead must be bool"),
    ],
)
def test_a_batch_that_does_not_fit_together_is_refused(arguments, message):
    with pytest.raises(BatchError, match=message):
        TokenBatch.of(**{"tokens": np.zeros(2, np.int32), **arguments})


# Somebody else's code

QWEN_EOS = golden_vectors.CONFIGS["qwen-ple"]["eos_token_id"]
QWEN_TOKENS = st.lists(st.one_of(st.just(QWEN_EOS), st.integers(0, 248319)), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def qwen() -> ModelSpec:
    # engramdb has built in what Qwen's first PLE layer has: this vocabulary, seed and head sizes.
    return blueprint(golden_vectors.CONFIGS["qwen-ple"]).spec


@given(tokens=QWEN_TOKENS)
def test_qwen_rows_equal_engramdb(qwen, tokens):
    rows = qwen.hash(TokenBatch.of(np.array(tokens, np.int32)), [1])[1]
    assert rows.tolist() == engramdb.rowids_for_seq(tokens)


@given(history=st.lists(QWEN_TOKENS.map(lambda tokens: tokens[0]), min_size=2, max_size=2), tokens=QWEN_TOKENS)
def test_qwen_rows_after_history_equal_engramdb(qwen, history, tokens):
    lookback = np.array([history[::-1]], np.int32)
    rows = qwen.hash(TokenBatch.of(np.array(tokens, np.int32), None, lookback), [1])[1]
    assert rows.tolist() == engramdb.rowids_for_seq_with_history(history, tokens)


@FEWER
@given(data=st.data())
def test_keys_decide_rows_and_rows_give_keys_back(case, data):
    batch = batch_of(data.draw(requests_of(case)))
    token_map = case.spec.token_map
    windows = batch.windows(case.spec.lookback, None if token_map is None else token_map.ids)
    for table in case.spec.tables:
        rows, columns_seen = case.spec.hash(batch, [table.layer])[table.layer], 0
        for columns, keys in zip(table.hash.groups(), table.hash.keys(windows), strict=True):
            assert columns.start == columns_seen
            columns_seen = columns.stop
            # One n-gram's rows are found by its key alone, whatever else is in the batch.
            unique, at = np.unique(keys, return_inverse=True)
            out = np.empty((len(unique), columns.stop - columns.start), table.id_dtype)
            table.hash.rows_of(columns, unique, table.head_offsets, out)
            assert np.array_equal(out[at], rows[:, columns])
            # From any of its columns on, there is a key that gives these rows.
            first = data.draw(st.integers(columns.start, columns.stop - 1))
            part = slice(first, columns.stop)
            found = table.hash.keys_of(part, rows[:, part], table.head_offsets)
            assert found is not None
            again = np.empty((len(found), part.stop - part.start), table.id_dtype)
            table.hash.rows_of(part, found, table.head_offsets, again)
            assert np.array_equal(again, rows[:, part])
        assert columns_seen == table.heads


@given(st.lists(INT64, min_size=1, max_size=20), st.sampled_from([(16000057, 16000063, 16000073), (4294967311,) * 2]))
def test_enough_columns_give_the_very_key(mixes, primes):
    """Where the primes exceed 2**64 together, the key is the hash itself, the least and the largest one too."""
    family = XorMix((3, 5), (primes,), 0)
    keys = np.array([*mixes, -(2**63), 2**63 - 1, 0, -1], np.int64)
    offsets = np.cumsum([0, *primes[:-1]]).astype(np.uint64)
    rows = np.empty((len(keys), len(primes)), np.uint64)
    family.rows_of(slice(0, len(primes)), keys, offsets, rows)
    found = family.keys_of(slice(0, len(primes)), rows, offsets)
    if len(set(primes)) == len(primes):
        assert np.array_equal(found, keys)
    else:  # larger than what the arithmetic holds: told, not guessed
        assert found is None


def test_rows_that_no_ngram_has_give_no_keys():
    family = XorMix((3, 5), ((16000057, 16000063, 16000073, 16000087),), 0)
    rows, offsets = np.empty((1, 4), np.uint64), np.zeros(4, np.uint64)
    family.rows_of(slice(0, 4), np.array([12345678901234567]), offsets, rows)
    assert family.keys_of(slice(0, 4), rows, offsets) is not None
    rows[0, 3] ^= np.uint64(1)
    assert family.keys_of(slice(0, 4), rows, offsets) is None
