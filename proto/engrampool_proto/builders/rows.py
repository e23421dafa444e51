"""What the rows of a table are made of: read from the tensors that hold them, or guessed from the config.

A config.json often does not say how a table is stored, or says it of other layers; the tensors are what is there.
"""

from collections.abc import Sequence
from math import prod

from engrampool_proto.builders.blueprint import Part
from engrampool_proto.builders.stored import Stored, StoredTensor
from engrampool_proto.errors import SpecError
from engrampool_proto.spec import RowFormat, Segment

_NVFP4_BLOCK = 16
_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
# Numbers that mean nothing without a scale.
_QUANTISED = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8"}


def rows_of(
    stored: Stored, weights: Sequence[tuple[StoredTensor, int]], values: int, table: str | None = None
) -> tuple[RowFormat, tuple[Part, ...], tuple[str, ...]]:
    """What the rows of a table are, from the tensors that hold them.

    weights: each tensor `X.weight`, and how many of its rows are the table's. values: numbers in a row.
    table: where `weights` are parts of one tensor, its name without `.weight`; its scale may lie there.

    Returns the format, the parts, and the names of the tensors that each hold the table's one scale: none where rows
    carry their own (`X.weight_scale` with a number a row) or are plain floats.
    Raises SpecError for tensors that cannot be read as rows. Whether all shapes fit is for whoever opens the files.
    """
    first = weights[0][0]
    dtype, width = first.dtype, first.shape[1:]

    def beside(leaf: str) -> list[StoredTensor]:
        """The tensors of this leaf: one for each of `weights`, one for all of them, or none."""
        own = [stored.find(weight.name.removesuffix("weight") + leaf) for weight, _ in weights]
        found = [tensor for tensor in own if tensor is not None]
        if 0 < len(found) < len(own):
            raise SpecError(
                f"the checkpoint has {found[0].name}, but no {leaf} beside {weights[own.index(None)][0].name}"
            )
        common = stored.find(f"{table}.{leaf}") if table and not found else None
        return [common] if common is not None else found

    def needed(leaf: str, tensors: list[StoredTensor]) -> tuple[str, ...]:
        if not tensors:
            raise SpecError(
                f"the checkpoint has {first.name} as {dtype}, and no {leaf} beside it, without which it means nothing"
            )
        return tuple(tensor.name for tensor in tensors)

    scales = beside("weight_scale")
    of_table: tuple[str, ...] = ()
    if dtype in _FLOATS:
        if scales:
            raise SpecError(
                f"the checkpoint has {first.name} as {dtype} and beside it {scales[0].name}; it is not known whether "
                "they are to be multiplied"
            )
        segments = [Segment("values", _FLOATS[dtype], values)]
    elif dtype in _QUANTISED:
        segments = [Segment("values", _QUANTISED[dtype], values)]
        of_table = needed("weight_scale", scales)
        if _one_a_row(scales, [weight for weight, _ in weights]):
            segments.append(Segment("scales", _FLOATS[scales[0].dtype], 1))
            of_table = ()
    elif dtype == "U8" and values % _NVFP4_BLOCK == 0 and width == (values // 2,):
        segments = nvfp4_segments(values)
        if len(needed("weight_scale", scales)) != len(weights):
            raise SpecError(
                f"the checkpoint has {scales[0].name} for {len(weights)} parts of a table; each needs its own"
            )
        of_table = needed("weight_scale_2", beside("weight_scale_2"))
    else:
        hint = "; MLX's own quantisation is not served, take a conversion without it" if dtype == "U32" else ""
        raise SpecError(
            f"the checkpoint has {first.name} as {dtype} {list(first.shape)}; rows of {values} values may be "
            f"{', '.join((*_FLOATS, *_QUANTISED))}, or U8 for nvfp4{hint}"
        )
    names = [{"values": weight.name} for weight, _ in weights]
    if len(segments) > 1:
        names = [{**tensors, "scales": scale.name} for tensors, scale in zip(names, scales, strict=True)]
    parts = tuple(Part(rows, tensors) for (_, rows), tensors in zip(weights, names, strict=True))
    return RowFormat(tuple(segments)), parts, of_table


def nvfp4_segments(values: int) -> list[Segment]:
    """Two values a byte, then a scale for every _NVFP4_BLOCK values. Raises SpecError where they do not divide."""
    if values % _NVFP4_BLOCK:
        raise SpecError(f"config.json: nvfp4 rows need a multiple of {_NVFP4_BLOCK} values; they have {values}")
    packed = Segment("values", "float4_e2m1fn_x2", values // 2)
    return [packed, Segment("scales", "float8_e4m3fn", values // _NVFP4_BLOCK)]


def _one_a_row(scales: Sequence[StoredTensor], weights: Sequence[StoredTensor]) -> bool:
    """Whether each row of `weights` has its scale, [n] or [n, 1]; a part of one row has either."""
    rows = [weight.shape[:1] for weight in weights]
    return (
        len(scales) == len(weights)
        and all(scale.dtype in _FLOATS and prod(scale.shape) == prod(n) for scale, n in zip(scales, rows, strict=True))
        and any(prod(n) > 1 for n in rows)
    )
