"""The trailer of a segment: what is written is read, and nothing else is."""

from pathlib import Path

import xxhash
from hypothesis import given
from hypothesis import strategies as st

from engrampool_proto.segment import TRAILER_BYTES, Identity, boot_id, read_trailer, write_trailer

IDENTITY = Identity("small", "0123456789abcdef" * 2, 14, 6500, 264)


@given(
    st.text(max_size=200),
    st.integers(0, 2**32 - 1),
    st.integers(1, 2**63),
    st.integers(1, 2**32 - 1),
    st.integers(0, 2**63),
)
def test_what_was_written_is_read(model, layer, num_rows, row_bytes, row_start):
    identity = Identity(model, IDENTITY.version, layer, num_rows, row_bytes, row_start)
    trailer = write_trailer(identity)
    assert len(trailer) == TRAILER_BYTES
    assert read_trailer(trailer) == identity
    assert identity.nbytes == num_rows * row_bytes
    assert identity.row_stop == row_start + num_rows


@given(st.integers(0, TRAILER_BYTES - 1), st.integers(1, 255))
def test_no_byte_of_it_may_be_another(at, change):
    trailer = bytearray(write_trailer(IDENTITY))
    trailer[at] ^= change
    assert read_trailer(bytes(trailer)) is None


@given(st.binary(max_size=TRAILER_BYTES))
def test_other_bytes_are_no_trailer(data):
    assert read_trailer(data) is None


def test_a_trailer_nested_too_deep_is_none():
    raw = b"[" * (TRAILER_BYTES - 33)
    assert read_trailer(xxhash.xxh3_128_hexdigest(raw).encode() + b"\n" + raw) is None


def test_the_layout_is_as_documented():
    trailer = write_trailer(IDENTITY)
    assert trailer[32:33] == b"\n"
    assert trailer[33:].rstrip(b"\0") == (
        b'{"format":"engrampool-segment","format_version":2,"layer":14,"model":"small","num_rows":6500,'
        b'"row_bytes":264,"row_start":0,"version":"0123456789abcdef0123456789abcdef","whole":true}'
    )


def test_the_kernel_has_a_name():
    assert boot_id() == Path("/proc/sys/kernel/random/boot_id").read_text().strip() != ""
