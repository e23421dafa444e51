"""Which rows of a model each of several servers holds: equal on every server, from the specification alone.

A part is what one server holds of a model. The parts of a model cover every row once. `cut` makes them by a rule: the
tables, one after the other in order of layers, are one long row of bytes, which is cut into as many stretches as there
are parts; so a part has one range of rows in each table that it touches, and the earlier the part, the earlier its
rows. `placed` reads parts that somebody chose by hand.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal

from engrampool_proto.errors import SpecError

if TYPE_CHECKING:
    # Which brings numpy: whoever only reads what a shard is called needs none.
    from engrampool_proto.spec import ModelSpec, TableSpec

# The rows held of each layer; a layer of which nothing is held is not there.
Part = Mapping[int, range]
ShardBy = Literal["head", "row", "layer"]

MAX_SHARDS = 65_536
_SHARD = re.compile(r"(0|[1-9][0-9]{0,4})/([1-9][0-9]{0,4})")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# How far from an equal share a cut may be, as a divisor of that share, to be where keys of the hash end (below).
_TOLERANCE = 20


def whole(spec: "ModelSpec") -> Part:
    """All rows of all tables."""
    return {table.layer: range(table.num_rows) for table in spec.tables}


def part_nbytes(spec: "ModelSpec", part: Part) -> int:
    """Bytes of the rows of a part."""
    return sum(len(rows) * spec.table(layer).row_bytes for layer, rows in part.items())


def parse_shard(text: str) -> tuple[int, int]:
    """(I, N) of "I/N": the I-th, from 0, of N parts. Raises ValueError for anything else."""
    match = _SHARD.fullmatch(text)
    if not match or not int(match[1]) < int(match[2]) <= MAX_SHARDS:
        raise ValueError(f"not I/N with 0 <= I < N <= {MAX_SHARDS}: {text!r}")
    return int(match[1]), int(match[2])


def is_shard_name(text: str) -> bool:
    """Whether a part of a placement may be called so. "all" is no name: it says that nothing is sharded."""
    return _NAME.fullmatch(text) is not None and text != "all"


def cut(spec: "ModelSpec", count: int, by: ShardBy = "head") -> tuple[Part, ...]:
    """The model in `count` parts of about equal bytes, none of them empty.

    by: where a cut may be. S is an equal share, the bytes of the model over `count`.
        "row": before any row, the one nearest to an equal share. A part differs from S by one row and a byte at most.
        "head": before any head, and so that the heads that one key of the hash decides stay together (`groups`) if a
            cut within 5 % of S of where it should be can do that; else the one nearest. Where S is more than the
            largest head, H (the padding at a table's end belongs to its last head), a part differs from S by the
            larger of H and S / 10, and a byte, at most.
        "layer": before any table, the one nearest. Parts are as unequal as the layers are.

    Raises SpecError if there are fewer heads, layers or rows than parts.
    """
    if not 1 <= count <= MAX_SHARDS:
        raise SpecError(f"a model is cut into 1 to {MAX_SHARDS} shards, not {count}")
    if by == "row":
        cuts = [0, *(_row_near(spec, number * spec.nbytes // count) for number in range(1, count)), spec.nbytes]
    else:
        ends = [0, *accumulate(table.nbytes for table in spec.tables)]
        places, preferred = ends, ends
        if by == "head":
            places, preferred = [0], [0]
            for start, table in zip(ends, spec.tables, strict=False):
                heads = _head_ends(table)
                places += [start + row * table.row_bytes for row in heads]
                preferred += [start + heads[group.stop - 1] * table.row_bytes for group in table.hash.groups()]
        if len(places) <= count:
            what = f"{len(places) - 1} {by}s, too few for {count} shards by {by}"
            raise SpecError(f"{spec.name} has {what}; make fewer, or cut by {'row' if by == 'head' else 'head or row'}")
        cuts = _near_equal(places, set(preferred), count)
    parts = tuple(_between(spec, start, stop) for start, stop in pairwise(cuts))
    if not all(parts):
        raise SpecError(f"{spec.name} has too few rows for {count} shards; make fewer")
    return parts


def placed(document: Any, spec: "ModelSpec") -> dict[str, Part]:
    """The parts of a model by name, as a placement has them: {model: {part: {layer: [first row, one past the last]}}}.

    document: JSON types; layers are texts, as JSON's keys are. Of other models it is not looked at.
    Raises SpecError for anything else, for a model that is not in it, and unless every row of every table is held and
    ranges are equal or apart.
    """
    from engrampool_proto.spec import Shard, ShardMap, canonical_json

    try:
        given = document[spec.name]
        parts = {
            str(name): {int(layer): range(start, stop) for layer, (start, stop) in tables.items()}
            for name, tables in given.items()
        }
        same = canonical_json(given) == canonical_json(_parts_json(parts))
    except KeyError as error:
        raise SpecError(f"the placement says nothing of model {spec.name}") from error
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SpecError(f"not a placement of {spec.name}: {error!r}") from error
    wrong = [name for name, part in parts.items() if not is_shard_name(name) or not part]
    if wrong or not same:
        raise SpecError(
            f"not a placement of {spec.name}: a shard has a name of 1 to 64 of A-Z a-z 0-9 . _ - that is not 'all', and"
            f" [start, stop] for one layer or more" + (f"; {wrong[0]!r} is none" if wrong else "")
        )
    shards = [
        Shard(name, spec.table(layer).layer, rows.start, rows.stop)
        for name, part in parts.items()
        for layer, rows in part.items()
    ]
    ShardMap(spec.name, "", tuple(shards)).check(spec)
    return {name: dict(sorted(part.items())) for name, part in parts.items()}


def placement_json(spec: "ModelSpec", parts: Mapping[str, Part]) -> dict[str, Any]:
    """A placement, as `placed` reads it, that names these parts of one model."""
    return {spec.name: _parts_json(parts)}


def _parts_json(parts: Mapping[str, Part]) -> dict[str, Any]:
    return {name: {str(layer): [rows.start, rows.stop] for layer, rows in part.items()} for name, part in parts.items()}


def _head_ends(table: "TableSpec") -> list[int]:
    """One past the last row of each head; padding belongs to the last."""
    return [*list(accumulate(table.hash.head_rows()))[:-1], table.num_rows]


def _row_near(spec: "ModelSpec", at: int) -> int:
    """Where the row begins that is nearest to byte `at`."""
    start = 0
    for table in spec.tables:
        if at < start + table.nbytes:
            row = (at - start + table.row_bytes // 2) // table.row_bytes
            return start + row * table.row_bytes
        start += table.nbytes
    return start


def _near_equal(places: Sequence[int], preferred: set[int], count: int) -> list[int]:
    """Choose count + 1 of `places`, ascending, the first and the last among them, as near to equal shares as may be."""
    total, chosen = places[-1], [0]  # positions in `places`
    for number in range(1, count):
        ideal = number * total // count

        def away(at: int, ideal: int = ideal) -> int:
            return abs(places[at] - ideal)

        # One place at least for each of the cuts that follow.
        possible = range(chosen[-1] + 1, len(places) - (count - number))
        good = [at for at in possible if places[at] in preferred and away(at) * count * _TOLERANCE <= total]
        chosen.append(min(good or possible, key=away))
    return [*(places[at] for at in chosen), total]


def _between(spec: "ModelSpec", start: int, stop: int) -> Part:
    """The rows in bytes [start, stop), which begins and ends with rows."""
    part = {}
    for table in spec.tables:
        rows = range(*(min(max(at, 0), table.nbytes) // table.row_bytes for at in (start, stop)))
        if rows:
            part[table.layer] = rows
        start, stop = start - table.nbytes, stop - table.nbytes
    return part
