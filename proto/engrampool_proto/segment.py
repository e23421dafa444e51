"""What server and client must agree on about a segment, which is a file that holds rows of one table.

The rows lie from byte 0 on, and in the file's last 4096 bytes a trailer says what they are: xxh3-128 of the text that
follows, 32 hexadecimal digits; a line feed; the text, canonical JSON; zeros.
"""

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import xxhash

from engrampool_proto.spec import canonical_json

TRAILER_BYTES = 4096
_FORMAT = {"format": "engrampool-segment", "format_version": 2, "whole": True}


@dataclass(frozen=True)
class Identity:
    """What a segment holds: the rows [row_start, row_start + num_rows) of one table."""

    model: str
    version: str
    layer: int
    num_rows: int
    row_bytes: int
    row_start: int = 0

    @property
    def row_stop(self) -> int:
        """One past the last row."""
        return self.row_start + self.num_rows

    @property
    def nbytes(self) -> int:
        """Of all rows."""
        return self.num_rows * self.row_bytes


def write_trailer(identity: Identity) -> bytes:
    """The trailer of a segment that is whole."""
    raw = canonical_json({**_FORMAT, **asdict(identity)})
    return (xxhash.xxh3_128_hexdigest(raw).encode() + b"\n" + raw).ljust(TRAILER_BYTES, b"\0")


def read_trailer(trailer: bytes) -> Identity | None:
    """What a segment with this trailer is; None if these are the last bytes of anything else."""
    digest, _, rest = trailer.partition(b"\n")
    raw = rest.rstrip(b"\0")
    if xxhash.xxh3_128_hexdigest(raw).encode() != digest:
        return None
    try:
        fields = json.loads(raw)
        if {key: fields.pop(key) for key in _FORMAT} != _FORMAT:
            return None
        return Identity(**fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


@lru_cache(maxsize=1)
def boot_id() -> str:
    """Names the running kernel, the same in all of its containers; "" where the system does not say.

    Device and inode numbers name a file under one kernel only.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
