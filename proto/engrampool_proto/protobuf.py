"""The encoding of protobuf: numbers, and the fields of a message, written and read.

Only what the messages of wire.py need, and only views of what is read: the runtime copies each `bytes` field.
"""

from collections.abc import Iterator
from itertools import chain
from typing import Any

from engrampool_proto.errors import WireError

# Wire types.
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
U32, U64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
# Fields in one message, those of the messages within it counted too. Ours have a handful a table; a message of millions
# of empty fields, which takes seconds to read, is an attack or a mistake.
MAX_FIELDS = 10_000


def varint(value: int) -> bytes:
    """A number that is not negative, as protobuf writes it."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def put_varint(parts: list[bytes | memoryview], number: int, value: int) -> None:
    """Append a field of a number; 0 is what a missing one is read as."""
    if value:
        parts.append(varint(number << 3 | VARINT) + varint(value))


def put_bytes(parts: list[bytes | memoryview], number: int, value: bytes | memoryview) -> None:
    """Append a field of bytes; none are what a missing one is read as."""
    if len(value):
        parts.append(varint(number << 3 | BYTES) + varint(len(value)))
        parts.append(value)


def put_message(parts: list[bytes | memoryview], number: int, inner: list[bytes | memoryview]) -> None:
    """Append a field of a message, whose own fields are `inner`."""
    parts.append(varint(number << 3 | BYTES) + varint(sum(map(len, inner))))
    parts.extend(inner)


def read_varint(data: memoryview, position: int, longest: int = 10) -> tuple[int, int]:
    """The number at `position` and where it ends. Tags and lengths have 5 bytes at most, as protobuf has.

    Raises WireError for a longer one, and for one without an end.
    """
    if position < len(data) and data[position] < 0x80:
        return data[position], position + 1
    value = shift = 0
    while True:
        if position >= len(data):
            raise WireError("message ends inside a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & U64, position
        shift += 7
        if shift >= 7 * longest:
            raise WireError(f"a number before byte {position} is longer than {longest} bytes")


class Budget:
    """Fields that a message may still have."""

    def __init__(self) -> None:
        self._left = MAX_FIELDS

    def spend(self, fields: int = 1) -> None:
        """Count fields. Raises WireError when there are too many."""
        self._left -= fields
        if self._left < 0:
            raise WireError(f"the message has more than {MAX_FIELDS} fields")


def fields(data: memoryview, budget: Budget) -> list[tuple[int, int, Any]]:
    """Fields of a message in order: (number, wire type, int or memoryview). Unknown ones are the caller's to skip.

    Raises WireError for malformed bytes, and for more than MAX_FIELDS.
    """
    position, size = 0, len(data)
    found: list[tuple[int, int, Any]] = []
    while position < size:
        if len(found) > MAX_FIELDS:
            break
        tag = data[position]
        if tag < 0x80:  # as all of ours are
            position += 1
        else:
            tag, position = read_varint(data, position, longest=5)
        number, kind = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise WireError(f"field number {number} before byte {position} cannot be")
        if kind == VARINT:
            value, position = read_varint(data, position)
            found.append((number, kind, value))
            continue
        if kind == BYTES:
            length, position = read_varint(data, position, longest=5)
        elif kind in (FIXED32, FIXED64):
            length = 4 if kind == FIXED32 else 8
        else:
            raise WireError(f"field {number} before byte {position} has wire type {kind}, which this contract has not")
        if length > size - position:
            raise WireError(
                f"field {number} wants {length} bytes at byte {position}, the message has {size - position}"
            )
        piece = data[position : position + length]
        position += length
        found.append((number, kind, piece if kind == BYTES else int.from_bytes(piece, "little")))
    budget.spend(len(found))
    return found


def merged_fields(messages: list[memoryview], budget: Budget) -> Iterator[tuple[int, int, Any]]:
    """Fields of a message that was given more than once, which means all merged. Each must end where it ends."""
    return chain.from_iterable(fields(message, budget) for message in messages)
