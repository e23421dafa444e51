"""The header of a safetensors file: 8 bytes of length, then JSON that says where each tensor's bytes lie.

Reading takes any file that the `safetensors` library takes and refuses what it refuses, before a byte of data is read.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from engrampool_proto.lfs import ADVICE, is_pointer

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
# What we write starts its data on a page, so that it can be mapped or read past the page cache.
DATA_ALIGNMENT = 4096
_LENGTH_BYTES = 8
_METADATA = "__metadata__"
# Bytes an element. Tensors of other dtypes may stand in a file; their size cannot be checked, nor are they ever read.
_DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


class HeaderError(ValueError):
    """The header cannot be what it claims to be, or the file is not as long as it says."""


@dataclass(frozen=True)
class Tensor:
    """One entry of a header. `offset` counts bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: int) -> dict[str, Tensor]:
    """The tensors of the file open as descriptor `file`, by name, in order of offset.

    Raises HeaderError unless the header is well formed and its tensors cover the rest of the file without gap or
    overlap; OSError if the file cannot be read.
    """
    return header_of(os.fstat(file).st_size, lambda nbytes: os.pread(file, nbytes, 0))


def header_of(size: int, read: Callable[[int], bytes]) -> dict[str, Tensor]:
    """The tensors of a file of `size` bytes, as `read_header`. read: its first so many bytes; may raise."""
    head = read(min(size, DATA_ALIGNMENT))  # as a rule this is all of it, in one request
    if is_pointer(head):
        raise HeaderError(ADVICE)
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    if size < _LENGTH_BYTES:
        raise HeaderError(f"is {size} bytes long, too short for a safetensors file")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"claims a header of {length} bytes; the limit is {MAX_HEADER_BYTES}")
    data_start = _LENGTH_BYTES + length
    if data_start > size:
        raise HeaderError(f"is {size} bytes long, its header alone ends at byte {data_start}: it is truncated")
    raw = (head if data_start <= len(head) else read(data_start))[_LENGTH_BYTES:data_start]
    try:
        document = json.loads(raw.decode(), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"has a header that is no JSON: {error}") from error
    if not isinstance(document, dict) or not raw.startswith(b"{"):
        raise HeaderError("has a header that is no JSON object")
    entries = [_tensor(name, entry, data_start) for name, entry in document.items() if name != _METADATA]
    entries.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    position = data_start
    for tensor in entries:
        if tensor.offset != position:
            relation = "overlaps the one before it" if tensor.offset < position else "leaves a gap before it"
            raise HeaderError(f"has a tensor {tensor.name!r} at byte {tensor.offset} that {relation}")
        position += tensor.nbytes
    if position != size:
        problem = "it is truncated" if position > size else "something was appended to it"
        raise HeaderError(f"is {size} bytes long, its tensors end at byte {position}: {problem}")
    return {tensor.name: tensor for tensor in entries}


def encode_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, list[Tensor]]:
    """A header for tensors (name, dtype, shape) laid one after the other, padded with spaces to DATA_ALIGNMENT.

    Returns the bytes that precede the data, and the tensors with their place in the file.
    """
    entries: dict[str, Any] = {}
    position = 0
    for name, dtype, shape in tensors:
        nbytes = prod(shape) * _DTYPE_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    raw = json.dumps(entries, separators=(",", ":")).encode()
    data_start = -(-(_LENGTH_BYTES + len(raw)) // DATA_ALIGNMENT) * DATA_ALIGNMENT
    length = data_start - _LENGTH_BYTES
    placed = [_tensor(name, entry, data_start) for name, entry in entries.items()]
    return length.to_bytes(_LENGTH_BYTES, "little") + raw.ljust(length), placed


def _tensor(name: str, entry: Any, data_start: int) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise HeaderError(f"describes tensor {name!r} without dtype, shape and two data_offsets") from error
    if not isinstance(dtype, str) or not isinstance(shape, list) or not all(map(_is_size, (*shape, begin, end))):
        raise HeaderError(f"describes tensor {name!r} with a dtype, shape or data_offsets of the wrong type")
    if begin > end or (dtype in _DTYPE_BYTES and prod(shape) * _DTYPE_BYTES[dtype] != end - begin):
        raise HeaderError(f"gives tensor {name!r}, {dtype} {shape}, the bytes {begin} .. {end}, which do not fit it")
    return Tensor(name, dtype, tuple(shape), data_start + begin, end - begin)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return document


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
