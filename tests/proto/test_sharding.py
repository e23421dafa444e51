"""Which rows each of several servers holds: every row once, in order, of about equal bytes, the same everywhere."""

import subprocess
import sys
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrampool_proto.errors import SpecError
from engrampool_proto.hashing import Identity, Polynomial, XorMix
from engrampool_proto.sharding import (
    MAX_SHARDS,
    Part,
    cut,
    is_shard_name,
    parse_shard,
    part_nbytes,
    placed,
    placement_json,
    whole,
)
from engrampool_proto.spec import ModelSpec, RowFormat, Segment, TableSpec

sizes = st.lists(st.lists(st.integers(1, 2000), min_size=1, max_size=6).map(tuple), min_size=1, max_size=3).map(tuple)


def xor_mix(primes: tuple[tuple[int, ...], ...]) -> XorMix:
    return XorMix(tuple(range(1, len(primes) + 2)), primes, 0)


def polynomial(moduli: tuple[tuple[int, ...], ...]) -> Polynomial:
    weights = tuple(tuple((1,) * (len(moduli) + 1) for _ in heads) for heads in moduli)
    return Polynomial(moduli, weights)


hashes = sizes.map(xor_mix) | sizes.map(polynomial) | st.integers(1, 5000).map(Identity)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    tables = []
    for number in range(draw(st.integers(1, 4))):
        family = draw(hashes)
        rows = sum(family.head_rows()) + draw(st.integers(0, 300))
        row_format = RowFormat((Segment("values", "uint8", draw(st.integers(1, 300))),))
        tables.append(TableSpec(3 * number + 1, rows, row_format, family))
    return ModelSpec("m", 100, tuple(tables))


def heads_of(spec: ModelSpec) -> list[int]:
    """Bytes of each head, in order."""
    found = []
    for table in spec.tables:
        rows = [*table.hash.head_rows()]
        rows[-1] += table.num_rows - sum(rows)
        found += [count * table.row_bytes for count in rows]
    return found


def assert_a_partition(spec: ModelSpec, parts: tuple[Part, ...]) -> None:
    assert all(part and all(part.values()) for part in parts)
    assert sum(part_nbytes(spec, part) for part in parts) == spec.nbytes
    # In the order of parts, rows go on where they stopped.
    for table in spec.tables:
        ranges = [part[table.layer] for part in parts if table.layer in part]
        assert ranges[0].start == 0
        assert ranges[-1].stop == table.num_rows
        assert all(a.stop == b.start for a, b in pairwise(ranges))
    layers = [layer for part in parts for layer in part]
    assert layers == sorted(layers)


@given(specs(), st.integers(1, 40), st.sampled_from(["head", "row", "layer"]))
def test_parts_cover_every_row_once_in_order_or_are_refused(spec, count, by):
    limit = {"head": len(heads_of(spec)), "layer": len(spec.tables), "row": sum(t.num_rows for t in spec.tables)}[by]
    if by == "row" and spec.nbytes <= 2 * count * max(table.row_bytes for table in spec.tables):
        return
    if count > limit:
        with pytest.raises(SpecError, match=f"too few for {count} shards by {by}; make fewer, or cut by"):
            cut(spec, count, by)
        return
    parts = cut(spec, count, by)
    assert len(parts) == count
    assert_a_partition(spec, parts)
    assert parts == cut(ModelSpec.from_json(spec.to_json()), count, by)


@given(specs(), st.integers(1, 40))
def test_parts_by_row_are_equal_up_to_a_row(spec, count):
    widest = max(table.row_bytes for table in spec.tables)
    if spec.nbytes > 2 * count * widest:
        share = spec.nbytes / count
        assert all(abs(part_nbytes(spec, part) - share) <= widest + 1 for part in cut(spec, count, "row"))


@given(specs(), st.integers(1, 40))
def test_parts_by_head_are_equal_up_to_a_head_and_cut_no_head(spec, count):
    heads = heads_of(spec)
    if count > len(heads):
        return
    parts = cut(spec, count)
    share = spec.nbytes / count
    if share > max(heads):
        bound = max(max(heads), share / 10) + 1
        assert all(abs(part_nbytes(spec, part) - share) <= bound for part in parts)
    ends = set(accumulate(part_nbytes(spec, part) for part in parts))
    assert ends <= set(accumulate(heads))


def test_what_one_key_decides_stays_together_where_that_costs_little():
    table = TableSpec(1, 2400, RowFormat((Segment("v", "uint8", 8),)), xor_mix(((100,) * 8,) * 3))
    # 24 heads in groups of 8. In thirds, the groups; in halves, the middle of one.
    spec = ModelSpec("m", 100, (table,))
    assert [part[1] for part in cut(spec, 3)] == [range(800), range(800, 1600), range(1600, 2400)]
    assert [part[1] for part in cut(spec, 2)] == [range(1200), range(1200, 2400)]
    # An equal share would end with the 22nd of many small heads; a group ends with the 21st, 4.5 % of a share earlier.
    primes = ((10,) * 21, (10,) * 23)
    spec = ModelSpec("m", 100, (TableSpec(1, 440, RowFormat((Segment("v", "uint8", 8),)), xor_mix(primes)),))
    assert cut(spec, 2) == ({1: range(210)}, {1: range(210, 440)})
    # 9 % is too much.
    primes = ((10,) * 20, (10,) * 24)
    spec = ModelSpec("m", 100, (TableSpec(1, 440, RowFormat((Segment("v", "uint8", 8),)), xor_mix(primes)),))
    assert cut(spec, 2) == ({1: range(220)}, {1: range(220, 440)})


def test_layers_of_any_sizes_can_be_parts():
    rows = RowFormat((Segment("v", "uint8", 8),))
    spec = ModelSpec(
        "m", 100, tuple(TableSpec(at, size, rows, Identity(size)) for at, size in enumerate((1000, 10, 10)))
    )
    assert cut(spec, 3, "layer") == ({0: range(1000)}, {1: range(10)}, {2: range(10)})
    assert cut(spec, 2, "layer") == ({0: range(1000)}, {1: range(10), 2: range(10)})
    assert cut(spec, 1, "layer") == (whole(spec),)
    for count in (0, MAX_SHARDS + 1):
        with pytest.raises(SpecError, match=f"cut into 1 to 65536 shards, not {count}"):
            cut(spec, count)
    with pytest.raises(SpecError, match="too few rows for 1021 shards"):
        cut(spec, 1021, "row")


def test_another_process_cuts_alike():
    """Whatever seeds its hash tables."""
    code = (
        "from engrampool_proto.sharding import cut\n"
        "from test_sharding import EXAMPLE\n"
        "print([cut(EXAMPLE, 5, by) for by in ('head', 'row')])"
    )
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parent)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert said == {str([cut(EXAMPLE, 5, by) for by in ("head", "row")])}


EXAMPLE = ModelSpec(
    "m",
    100,
    (
        TableSpec(1, 700, RowFormat((Segment("v", "uint8", 33),)), xor_mix(((101, 103), (107, 109, 113)))),
        TableSpec(5, 400, RowFormat((Segment("v", "uint8", 7),)), Identity(400)),
    ),
)


@pytest.mark.parametrize(("text", "means"), [("0/1", (0, 1)), ("2/4", (2, 4)), ("65535/65536", (65535, 65536))])
def test_a_shard_is_one_of_so_many(text, means):
    assert parse_shard(text) == means
    assert not is_shard_name(text)


@pytest.mark.parametrize("text", ["", "1", "4/4", "-1/4", "01/4", "1/04", "0/65537", "1/4\n", "a/4", "1/4/4"])
def test_other_texts_are_no_shard(text):
    with pytest.raises(ValueError, match="not I/N with 0 <= I < N"):
        parse_shard(text)


# --- placements

HALVES = {"m": {"a": {"1": [0, 300], "5": [0, 400]}, "b": {"1": [300, 700]}, "b-again": {"1": [300, 700]}}}


def test_a_placement_names_parts():
    parts = placed(HALVES, EXAMPLE)
    assert parts == {
        "a": {1: range(300), 5: range(400)},
        "b": {1: range(300, 700)},
        "b-again": {1: range(300, 700)},
    }
    assert placement_json(EXAMPLE, parts) == HALVES


@given(specs(), st.integers(1, 8))
def test_what_was_cut_can_be_placed(spec, count):
    if count <= len(heads_of(spec)):
        parts = {f"s{at}": part for at, part in enumerate(cut(spec, count))}
        assert placed(placement_json(spec, parts), spec) == parts


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({}, "says nothing of model m"),
        ([], "not a placement"),
        ({"m": []}, "not a placement"),
        ({"m": {"a": []}}, "not a placement"),
        ({"m": {"a": {"1": [0]}}}, "not a placement"),
        ({"m": {"a": {"1": ["0", 700]}}}, "not a placement"),
        ({"m": {"a": {"1": [0.0, 700]}}}, "not a placement"),
        ({"m": {"a": {"x": [0, 700]}}}, "not a placement"),
        ({"m": {"a": {"01": [0, 700], "5": [0, 400]}}}, "not a placement"),
        ({"m": {"all": {"1": [0, 700], "5": [0, 400]}}}, "'all' is none"),
        ({"m": {"0/2": {"1": [0, 700], "5": [0, 400]}}}, "'0/2' is none"),
        ({"m": {"a": {"1": [0, 700], "5": [0, 400]}, "b": {}}}, "'b' is none"),
        ({"m": {"a": {"1": [0, 700], "2": [0, 4], "5": [0, 400]}}}, "has no layer 2"),
        ({"m": {"a": {"1": [0, 700]}}}, "layer_5: no server holds rows 0 .. 399"),
        ({"m": {"a": {"1": [0, 700], "5": [0, 401]}}}, "layer_5: shards reach row 400"),
        ({"m": {"a": {"1": [0, 700], "5": [0, 400]}, "b": {"1": [5, 8]}}}, "layer_1: shards overlap at row 5"),
        ({"m": {"a": {"1": [8, 5], "5": [0, 400]}}}, "start < stop"),
    ],
)
def test_a_wrong_placement_says_what_is_wrong(document, text):
    with pytest.raises(SpecError, match=text):
        placed(document, EXAMPLE)
