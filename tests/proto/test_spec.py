"""Specifications, shard maps and token maps: what they refuse, and that JSON gives back what it was given."""

import base64
import copy
import dataclasses
import json
from typing import Any

import golden_vectors
import hash_cases
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrampool_proto.errors import SpecError
from engrampool_proto.hashing import Identity, Polynomial, XorMix
from engrampool_proto.spec import MAX_ROW_BYTES, ModelSpec, RowFormat, Segment, Shard, ShardMap, TableSpec
from engrampool_proto.spec import canonical_json as canonical
from engrampool_proto.token_map import TokenMap

ROWS = RowFormat((Segment("values", "float8_e4m3fn", 64), Segment("scales", "float8_e8m0fnu", 2)))
MIX = XorMix((3, 5, 7), ((11, 13), (17, 19)), fill=1, stop=4)
POLYNOMIAL = Polynomial(((23,), (29,)), (((1, 2),), ((1, 3, 5),)), stop=2)
MAP = TokenMap(np.array([0, 1, 0, 2, 1], np.int32))


def small() -> ModelSpec:
    tables = (TableSpec(1, 64, ROWS, MIX), TableSpec(4, 52, ROWS, POLYNOMIAL, 0.25), TableSpec(9, 5, ROWS, Identity(5)))
    return ModelSpec("small", 5, tables, TokenMap(MAP.ids.copy()))


def through_json(spec: ModelSpec) -> ModelSpec:
    return ModelSpec.from_json(json.loads(json.dumps(spec.to_json())))


@pytest.mark.parametrize("family", hash_cases.FAMILIES)
def test_json_gives_the_model_back(family, tokenizer):
    spec = hash_cases.case(family, tokenizer).spec
    again = through_json(spec)
    assert again == spec
    assert again.digest == spec.digest
    assert again.differences(spec) == []
    assert canonical(again.to_json()) == canonical(spec.to_json())


def test_json_gives_every_kind_of_table_back():
    assert through_json(small()) == small()
    assert through_json(small()).table(4).scale == 0.25


def test_the_digest_is_of_the_content_alone():
    # A literal: a digest is written into table files, so it may not change from one release to the next.
    assert small().digest == through_json(small()).digest == "4ff6c1df243e5f4df52678076e826b0d"


CHANGES = {
    "name": {"name": "other"},
    "vocab_size": {"vocab_size": 6, "token_map": None},
    "token_map": {"token_map": TokenMap(np.array([0, 1, 0, 2, 2], np.int32))},
    "no token_map": {"token_map": None},
}
TABLE_CHANGES: dict[str, dict[str, Any]] = {
    "layer": {"layer": 2},
    "num_rows": {"num_rows": 65},
    "scale": {"scale": 0.5},
    "segment name": {"row_format": RowFormat((Segment("w", "float8_e4m3fn", 64), Segment("scales", "uint8", 2)))},
    "segment length": {"row_format": RowFormat((Segment("values", "float8_e4m3fn", 65), ROWS.segments[1]))},
    "segment order": {"row_format": RowFormat(ROWS.segments[::-1])},
    "multipliers": {"hash": dataclasses.replace(MIX, multipliers=(3, 5, 9))},
    "primes": {"hash": dataclasses.replace(MIX, primes=((11, 13), (17, 23)))},
    "fill": {"hash": dataclasses.replace(MIX, fill=0)},
    "stop": {"hash": dataclasses.replace(MIX, stop=None)},
    "family": {"hash": Identity(60)},
}
CHANGES |= {
    name: {"tables": (dataclasses.replace(small().tables[0], **change), *small().tables[1:])}
    for name, change in TABLE_CHANGES.items()
}


def test_every_change_changes_the_digest():
    digests = [dataclasses.replace(small(), **change).digest for change in CHANGES.values()]
    assert len({small().digest, *digests}) == len(CHANGES) + 1


@pytest.mark.parametrize(
    ("change", "fields"),
    [
        ("name", set()),
        ("scale", set()),  # the rows read are the same
        ("vocab_size", {"vocab_size", "token_map.size", "token_map.digest"}),
        ("token_map", {"token_map.digest"}),
        ("no token_map", {"token_map.size", "token_map.digest"}),
        ("num_rows", {"layer_1.num_rows"}),
        ("segment order", {"layer_1.row_format"}),
        ("multipliers", {"layer_1.hash.multipliers"}),
        ("primes", {"layer_1.hash.primes", "layer_1.head_sizes"}),
        ("fill", {"layer_1.hash.fill"}),
        ("stop", {"layer_1.hash.stop"}),
    ],
)
def test_differences_name_what_differs(change, fields):
    other = dataclasses.replace(small(), **CHANGES[change])
    for found in (small().differences(other), other.differences(small())):
        assert {line.split(":")[0] for line in found} == fields
        assert len(found) == len(fields)
    ours, theirs = small().fingerprint(), other.fingerprint()
    assert {name for name in ours | theirs if ours.get(name) != theirs.get(name)} == fields


def test_differences_name_a_layer_that_one_side_lacks():
    fewer = dataclasses.replace(small(), tables=small().tables[:2])
    names = {line.split(":")[0] for line in small().differences(fewer)}
    assert "layers" in names
    assert {name for name in names if name != "layers"} == {
        "layer_9.num_rows",
        "layer_9.row_format",
        "layer_9.head_sizes",
        "layer_9.hash.family",
        "layer_9.hash.num_rows",
    }


def test_a_difference_is_a_readable_line(token_map):
    shifted = TokenMap(np.roll(token_map.ids, 1))
    spec = hash_cases.case("deepseek-v4.1", golden_vectors.reference.deepseek_tokenizer()).spec
    (line,) = spec.differences(dataclasses.replace(spec, token_map=shifted))
    assert line == f'token_map.digest: "{token_map.digest}" here, "{shifted.digest}" there'
    primes = dataclasses.replace(spec.tables[0].hash, primes=((2,) * 99, (3,), (5,)))
    lines = spec.differences(
        dataclasses.replace(spec, tables=(dataclasses.replace(spec.tables[0], hash=primes), spec.tables[1]))
    )
    assert all(len(line) < 200 for line in lines)


@pytest.mark.parametrize("thing", [small(), small().tables[0], ROWS, ROWS.segments[0], MIX, POLYNOMIAL, MAP])
def test_everything_is_frozen(thing):
    for field in dataclasses.fields(thing):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field.name, None)


def test_a_token_map_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        MAP.ids[0] = 1


REFUSED = {
    "empty name": ({"name": ""}, "name"),
    "name with a slash": ({"name": "a/b"}, "name"),
    "name that starts with a dot": ({"name": ".a"}, "name"),
    "name with a line end": ({"name": "a\n"}, "name"),
    "long name": ({"name": "a" * 129}, "name"),
    "no vocabulary": ({"vocab_size": 0, "token_map": None}, "vocab_size"),
    "large vocabulary": ({"vocab_size": 2**31, "token_map": None}, "vocab_size"),
    "token map of another vocabulary": ({"vocab_size": 6}, "token map is for 5"),
    "no tables": ({"tables": ()}, "tables"),
    "layers out of order": ({"tables": small().tables[::-1]}, "ascending"),
    "layer twice": ({"tables": small().tables[:1] * 2}, "ascending"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_is_refused(name):
    change, message = REFUSED[name]
    with pytest.raises(SpecError, match=message):
        dataclasses.replace(small(), **change)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TableSpec(-1, 64, ROWS, MIX), "layer"),
        (lambda: TableSpec(2**31, 64, ROWS, MIX), "layer"),
        (lambda: TableSpec(0, 59, ROWS, MIX), "need 60 rows, the table has 59"),
        (lambda: TableSpec(0, 2**63, ROWS, MIX), "rows"),
        (lambda: TableSpec(0, 64, ROWS, MIX, float("nan")), "scale"),
        (lambda: TableSpec(0, 64, ROWS, MIX, float("inf")), "scale"),
        (lambda: Segment("", "uint8", 1), "name"),
        (lambda: Segment("a", "int4", 1), "int4"),
        (lambda: Segment("a", "uint8", 0), "length"),
        (lambda: RowFormat(()), "segments"),
        (lambda: RowFormat((Segment("a", "uint8", 1),) * 2), "different names"),
        (lambda: RowFormat((Segment("a", "float32", MAX_ROW_BYTES // 4 + 1),)), "limit"),
        (lambda: ROWS.slice_of("bias"), "values, scales"),
        (lambda: small().table(2), "1, 4, 9"),
        (lambda: TokenMap(np.array([0, 2], np.int32)), "skips"),
        (lambda: TokenMap(np.array([0, -1], np.int32)), "skips"),
        (lambda: TokenMap(np.array([0, 2**31 - 1], np.int32)), "skips"),
        (lambda: TokenMap(np.array([], np.int32)), "int32"),
        (lambda: TokenMap(np.array([0], np.int64)), "int32"),
        (lambda: TokenMap(np.array([[0]], np.int32)), "int32"),
        (lambda: Shard("a:1", 0, 5, 5), "start < stop"),
        (lambda: Shard("a:1", 0, -1, 5), "start < stop"),
    ],
)
def test_impossible_parts_are_refused(make, message):
    with pytest.raises(SpecError, match=message):
        make()


def test_what_a_table_says_of_itself():
    table = small().tables[0]
    assert (table.name, table.heads, table.row_bytes, table.nbytes) == ("layer_1", 4, 66, 64 * 66)
    assert table.head_offsets.tolist() == [0, 11, 24, 41]
    assert ROWS.slice_of("scales") == slice(64, 66)
    assert (small().layers, small().lookback, small().nbytes) == ((1, 4, 9), 2, (64 + 52 + 5) * 66)


def test_an_integral_scale_is_the_same_scale():
    one, same = TableSpec(0, 64, ROWS, MIX, 1), TableSpec(0, 64, ROWS, MIX, 1.0)
    assert ModelSpec("m", 5, (one,)).digest == ModelSpec("m", 5, (same,)).digest
    assert through_json(ModelSpec("m", 5, (one,))).table(0) == same


# JSON that is not what `to_json` wrote

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, 1.0, 2.5, float("nan"), float("inf"), -0.0]),
    st.text(max_size=3),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if isinstance(document, dict):
        return [p for key, item in document.items() for p in ((*path, key), *places(item, (*path, key)))]
    if isinstance(document, list):
        return [p for i, item in enumerate(document) for p in ((*path, i), *places(item, (*path, i)))]
    return []


def mangled(data: st.DataObject, document: Any) -> Any:
    document = copy.deepcopy(document)
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from(places(document)))
        holder = document
        for key in path:
            holder = holder[key]
        action = data.draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "remove":
            del holder[last]
        elif action == "add" and isinstance(holder, dict):
            holder["new"] = data.draw(JUNK)
        else:
            holder[last] = data.draw(JUNK)
        if not places(document):
            break
    return document


@given(data=st.data())
def test_mangled_json_is_refused_or_read_as_written(data):
    document = mangled(data, small().to_json())
    try:
        spec = ModelSpec.from_json(document)
    except SpecError:
        return
    assert canonical(spec.to_json()) == canonical(document)


@given(data=st.data())
def test_a_mangled_shard_map_is_refused_or_read_as_written(data):
    whole = ShardMap("small", "0" * 32, (Shard("a:1", 1, 0, 40), Shard("b:1", 1, 40, 64)))
    document = mangled(data, whole.to_json())
    try:
        shard_map = ShardMap.from_json(document)
    except SpecError:
        return
    assert canonical(shard_map.to_json()) == canonical(document)


@pytest.mark.parametrize("document", [None, 3, "x", [], {}, [1], {"tables": 1}])
def test_something_else_altogether_is_refused(document):
    for read in (ModelSpec.from_json, ShardMap.from_json, TokenMap.from_json):
        with pytest.raises(SpecError):
            read(document)


@given(data=st.data())
def test_a_damaged_token_map_is_refused(data):
    document = MAP.to_json()
    raw = bytearray(base64.b64decode(document["ids"]))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, 3))
    document["ids"] = base64.b64encode(raw[: len(raw) - cut]).decode()
    with pytest.raises(SpecError):
        TokenMap.from_json(document)


@pytest.mark.parametrize("change", [{"size": 4}, {"vocab_size": 6}, {"digest": "0" * 32}, {"ids": "?"}, {"ids": "ä"}])
def test_a_token_map_that_contradicts_itself_is_refused(change):
    with pytest.raises(SpecError, match="token map"):
        TokenMap.from_json(MAP.to_json() | change)


# Shard maps


def shards(*ranges: tuple[int, int, int]) -> ShardMap:
    return ShardMap("small", "0" * 32, tuple(Shard(f"host{i}:1", *r) for i, r in enumerate(ranges)))


REST = ((4, 0, 52), (9, 0, 5))


@pytest.mark.parametrize("layer_1", [[(0, 64)], [(0, 40), (40, 64)], [(40, 64), (0, 40), (0, 40)], [(0, 64), (0, 64)]])
def test_full_coverage_is_accepted(layer_1):
    shard_map = shards(*((1, *r) for r in layer_1), *REST)
    shard_map.check(small())
    assert ShardMap.from_json(json.loads(json.dumps(shard_map.to_json()))) == shard_map


@pytest.mark.parametrize(
    ("layer_1", "message"),
    [
        ([], r"layer_1: no server holds rows 0 \.\. 63"),
        ([(1, 64)], r"layer_1: no server holds rows 0 \.\. 0"),
        ([(0, 63)], r"layer_1: no server holds rows 63 \.\. 63"),
        ([(0, 10), (20, 64)], r"layer_1: no server holds rows 10 \.\. 19"),
        ([(0, 40), (39, 64)], "layer_1: shards overlap at row 39"),
        ([(0, 64), (0, 32)], "layer_1: shards overlap at row 0"),
        ([(0, 65)], "layer_1: shards reach row 64, the table ends at 63"),
    ],
)
def test_gaps_and_overlaps_are_refused(layer_1, message):
    with pytest.raises(SpecError, match=message):
        shards(*((1, *r) for r in layer_1), *REST).check(small())


def test_canonical_json_is_one_byte_string():
    assert canonical({"b": [1, 2.5, None], "a": "é\n"}) == b'{"a":"\\u00e9\\n","b":[1,2.5,null]}'
    assert canonical({"a": 1, "b": 2}) == canonical({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical(float("nan"))
