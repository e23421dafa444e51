"""docs/FORMAT.md is true: its example is what we write, and its reader reads what we write."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from engrampool_proto.hashing import TokenBatch, XorMix
from engrampool_proto.spec import ModelSpec, RowFormat, Segment, TableSpec
from engrampool_proto.token_map import TokenMap
from engrampool_server.files.patches.patch import write_patch
from engrampool_server.files.synth import fill_rows
from engrampool_server.files.table_files import PackedModel
from engrampool_server.files.table_writer import write_tables

PAGE = (Path(__file__).parents[3] / "docs" / "FORMAT.md").read_text()
ROW_FORMAT = RowFormat((Segment("values", "float8_e4m3fn", 8), Segment("scales", "float8_e8m0fnu", 1)))
TABLE = TableSpec(1, 12, ROW_FORMAT, XorMix((5, 9), ((5, 7),), fill=2))
EXAMPLE = ModelSpec("example", 8, (TABLE,), TokenMap(np.array([0, 1, 2, 1, 3, 4, 5, 5], np.int32)))


@pytest.fixture
def example(tmp_path: Path) -> Path:
    write_tables(tmp_path / "example", EXAMPLE, {}, fill_rows, file_bytes=1, block_bytes=45)
    return tmp_path / "example"


def block(language: str) -> str:
    """The page's one code block of a language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return str(found)


def test_the_example_is_what_is_written(example: Path) -> None:
    assert json.loads((example / "manifest.json").read_text()) == json.loads(block("json"))
    raw = (example / "layer_1-00003-of-00003.safetensors").read_bytes()
    length, header = re.search(r"padding: `(\w+)`, then\n`(.*?)`", PAGE).groups()  # type: ignore[union-attr]
    assert raw[:4096] == (bytes.fromhex(length) + header.encode()).ljust(4096)
    rows = [raw[4096:4105], raw[4105:]]
    assert "```\n" + "\n".join(row.hex() for row in rows) + "\n```" in PAGE


def test_the_patch_is_what_is_written(example: Path, tmp_path: Path) -> None:
    with PackedModel.open(example) as base:
        rows = np.full((2, 9), [[1], [2]], np.uint8)
        write_patch(base, {1: (np.array([3, 10], np.uint64), rows)}, tmp_path / "patch")
    document = json.loads((tmp_path / "patch" / "manifest.json").read_text())
    assert document.pop("spec") == EXAMPLE.to_json()
    assert document == json.loads(block("jsonc"))
    data = (tmp_path / "patch" / "layer_1-changed.safetensors").read_bytes()[4096:]
    assert data == bytes([3, *bytes(7), 10, *bytes(7), *rows.reshape(-1)])
    (checksum,) = document["tables"][0]["checksums"]
    assert checksum == xxhash.xxh3_64_hexdigest(data)


def test_the_example_hashes_as_said() -> None:
    rows = EXAMPLE.hash(TokenBatch.of(np.array([3, 7, 0], np.int32)))[1].tolist()
    assert "{}, {} and {}".format(*(tuple(row) for row in rows)) in PAGE


def test_the_reader_of_the_page_reads_every_family(
    family: str,
    packed_model: Callable[[str], Path],
    expected_rows: Callable[[Path], dict[int, npt.NDArray[np.uint8]]],
) -> None:
    names: dict[str, Any] = {}
    exec(block("python"), names)
    found, expected = names["read_model"](packed_model(family)), expected_rows(packed_model(family))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[layer], expected[layer]) for layer in expected)
