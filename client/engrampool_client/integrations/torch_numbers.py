"""The numbers that rows stand for, made with PyTorch on the device that the rows lie on.

torch.py is what users import.
"""

import torch

from engrampool_client.errors import BatchError, SpecError
from engrampool_proto.spec import RowFormat

# Of embeddings.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FLOATS = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def dequantize(
    rows: torch.Tensor,
    row_format: RowFormat,
    scale: float | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The numbers that rows stand for: uint8 [..., row_bytes] -> `dtype` [..., dim], on the device of `rows`.

    row_format, scale: of the `TableSpec`. A segment `values` of floats may be followed by `scales`, float8_e8m0fnu,
    each for an equal run of values; or every value is multiplied by `scale`, which is rounded to bfloat16 first, as the
    engines do. The result is the exact product rounded once to `dtype`, except that a product with `scale` is float32
    first. May be a view of `rows` where nothing is to be done.

    out: [..., dim] of any of these dtypes, on the same device, of any strides: the numbers are written there, of its
    dtype, and it is what is given. `dtype` is not looked at then. It may not share memory with `rows`.

    Raises BatchError unless `rows` are of this format and `out` fits, SpecError for a format whose meaning the
    specification does not tell (nvfp4: the order of the two values of a byte, and of its roundings), ValueError for
    another dtype than bfloat16, float16 or float32.
    """
    dtype = dtype if out is None else out.dtype
    check_dtype(dtype)
    if rows.dtype != torch.uint8 or rows.shape[-1:] != (row_format.row_bytes,):
        raise BatchError(f"rows must be uint8 [..., {row_format.row_bytes}]; they are {rows.dtype} {list(rows.shape)}")
    dim, scales = check_format(row_format, scale)
    if out is not None and (out.shape != (*rows.shape[:-1], dim) or out.device != rows.device):
        wanted = f"{[*rows.shape[:-1], dim]} on {rows.device}"
        raise BatchError(f"out must be {wanted}; it is {list(out.shape)} on {out.device}")
    stored = _FLOATS[row_format.segments[0].dtype]
    values = _aligned(rows[..., row_format.slice_of("values")], stored.itemsize).view(stored)
    # In bfloat16 both factors of such a product are exact, and it is rounded once: no need for tensors twice as large.
    small = scales and stored.itemsize == 1 and dtype == torch.bfloat16
    exact = torch.bfloat16 if small else torch.float32
    if not scales and scale is None:
        numbers = values.to(dtype) if out is None else values
    else:
        numbers = values.to(exact, copy=True) if out is None or dtype != exact else out.copy_(values)
        if scales:
            factors = rows[..., row_format.slice_of("scales")].view(torch.float8_e8m0fnu).to(exact)
            numbers.unflatten(-1, (scales, dim // scales)).mul_(factors.unsqueeze(-1))
        else:
            numbers.mul_(torch.tensor(scale, dtype=torch.float32).to(torch.bfloat16).item())
    if out is None:
        return numbers.to(dtype)
    return out if numbers is out else out.copy_(numbers)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError for what embeddings cannot be."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}; it is {dtype}")


def check_format(row_format: RowFormat, scale: float | None) -> tuple[int, int]:
    """Values and scales in a row. Raises SpecError for what `dequantize` does not know the meaning of."""
    values, *others = row_format.segments
    known = values.name == "values" and values.dtype in _FLOATS
    if known and not others:
        return values.length, 0
    if known and len(others) == 1 and scale is None:
        scales = others[0]
        if (scales.name, scales.dtype) == ("scales", "float8_e8m0fnu") and values.length % scales.length == 0:
            return values.length, scales.length
    found = ", ".join(f"{s.name} {s.dtype} x {s.length}" for s in row_format.segments)
    raise SpecError(
        f"rows of {found}{'' if scale is None else ' with one scale for the table'} are not known to be numbers; "
        "take the bytes with `PooledStep.rows`"
    )


def _aligned(segment: torch.Tensor, itemsize: int) -> torch.Tensor:
    """The same bytes where a view of elements of `itemsize` bytes is possible; themselves if they are already."""
    if itemsize == 1:
        return segment
    if not segment.numel():
        return segment.new_empty(segment.shape)  # numpy's strides of what is empty are zeros
    segment = segment.contiguous()
    return segment.clone() if segment.storage_offset() % itemsize else segment
