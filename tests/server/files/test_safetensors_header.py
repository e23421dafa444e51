"""Headers of safetensors files: read as the library reads them, and refused where it refuses them."""

from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from engrampool_server.files.safetensors_header import DATA_ALIGNMENT, HeaderError, encode_header, read_header


def test_headers_that_the_safetensors_library_wrote_are_read(tmp_path: Path) -> None:
    arrays = {
        "model.a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.arange(5, dtype=np.uint8),
        "scalar": np.array(2.5, np.float16),
        "none": np.empty((0, 7), np.int64),
    }
    path = tmp_path / "theirs.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})
    with path.open("rb") as file:
        found = read_header(file.fileno())
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        "model.a": ("F32", (3, 4)),
        "b": ("U8", (5,)),
        "scalar": ("F16", ()),
        "none": ("I64", (0, 7)),
    }
    data = path.read_bytes()
    for name, tensor in found.items():
        assert data[tensor.offset : tensor.offset + tensor.nbytes] == arrays[name].tobytes()


def test_header_bytes_are_golden() -> None:
    raw, (tensor,) = encode_header([("rows", "U8", (3, 264))])
    text = b'{"rows":{"dtype":"U8","shape":[3,264],"data_offsets":[0,792]}}'
    assert raw == (4088).to_bytes(8, "little") + text + b" " * (4088 - len(text))
    assert (tensor.offset, tensor.nbytes) == (DATA_ALIGNMENT, 792)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "too short"),
        (b"\x01\0\0", "too short"),
        (b"\xff" * 8 + b"{}", "limit"),
        ((50_000_000).to_bytes(8, "little") + b"{}", "truncated"),
        ((2).to_bytes(8, "little") + b"[]", "no JSON object"),
        ((3).to_bytes(8, "little") + b" {}", "no JSON object"),
        ((4).to_bytes(8, "little") + b"{\xff\xfe}", "no JSON"),
        ((4).to_bytes(8, "little") + b"nope", "no JSON"),
        ((200_000).to_bytes(8, "little") + b'{"a":' + b"[" * 199_995, "no JSON"),
    ],
)
def test_hostile_header_bytes_are_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(raw)
    with path.open("rb") as file, pytest.raises(HeaderError, match=message):
        read_header(file.fileno())


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a":1}', "without dtype"),
        ('{"a":{"dtype":"U8","shape":[4]}}', "without dtype"),
        ('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0]}}', "without dtype"),
        ('{"a":{"dtype":8,"shape":[4],"data_offsets":[0,4]}}', "wrong type"),
        ('{"a":{"dtype":"U8","shape":[4.0],"data_offsets":[0,4]}}', "wrong type"),
        ('{"a":{"dtype":"U8","shape":[-4],"data_offsets":[0,4]}}', "wrong type"),
        ('{"a":{"dtype":"U8","shape":[true,4],"data_offsets":[0,4]}}', "wrong type"),
        ('{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,0]}}', "do not fit"),
        ('{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,5]}}', "do not fit"),
        ('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}', "do not fit"),
        ('{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}', "truncated"),
        ('{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', "appended"),
        ('{"a":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}', "gap"),
        (
            '{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[3],"data_offsets":[1,4]}}',
            "overlaps",
        ),
        (
            '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
            "twice",
        ),
        ('{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', "no JSON"),
    ],
)
def test_impossible_tensors_are_refused(tmp_path: Path, header: str, message: str) -> None:
    raw = len(header).to_bytes(8, "little") + header.encode() + b"data"
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(raw)
    with path.open("rb") as file, pytest.raises(HeaderError, match=message):
        read_header(file.fileno())
    if message != "twice":  # which the format forbids, and the library does not notice
        with pytest.raises(safetensors.SafetensorError):
            safetensors.safe_open(path, "numpy")
