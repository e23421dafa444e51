"""Packed files: what is written opens elsewhere, and what is damaged never gives a row."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors
import safetensors.numpy
from hypothesis import assume, given
from hypothesis import strategies as st

from engrampool_proto.errors import SpecError
from engrampool_proto.spec import ModelSpec, digest
from engrampool_proto.token_map import TokenMap
from engrampool_server.files.manifest import Manifest
from engrampool_server.files.synth import fill_rows, synthetic_model
from engrampool_server.files.table_files import PackedModel, TableFileError
from engrampool_server.files.table_writer import write_tables

Rows = dict[int, npt.NDArray[np.uint8]]
ReadAll = Callable[[Path], Rows]


def tiny_spec(name: str = "tiny") -> ModelSpec:
    """Two tables of 276 rows of 512 bytes, and a small token map, so that a manifest is read quickly."""
    spec = synthetic_model("longcat", 10, name=name).spec
    tables = tuple(replace(spec.tables[0], layer=layer) for layer in (1, 15))
    return replace(spec, vocab_size=64, token_map=TokenMap(np.arange(64, dtype=np.int32) // 2), tables=tables)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tables, each of two files of two or three blocks. Tests that damage it put it right again."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    write_tables(directory, tiny_spec(), {}, fill_rows, file_bytes=100_000, block_bytes=40_000)
    return directory


@pytest.fixture(scope="module")
def tiny_rows(tiny: Path, expected_rows: ReadAll) -> Rows:
    return expected_rows(tiny)


@pytest.fixture(scope="module")
def tiny_files(tiny: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(tiny.glob("*.safetensors"))}


def test_the_safetensors_library_reads_table_files(tiny: Path, tiny_rows: Rows) -> None:
    with PackedModel.open(tiny) as model:
        layer = model.spec.tables[0].layer
        files = [file for file in model.files if file.name.startswith(f"layer_{layer}-")]
    assert len(files) > 1
    for file in files:
        with safetensors.safe_open(tiny / file.name, "numpy") as opened:
            assert list(opened.keys()) == ["rows"]
            assert np.array_equal(opened.get_tensor("rows"), tiny_rows[layer][file.start : file.stop])


# Reading.


def test_blocks_cover_each_table_whatever_the_files(tiny: Path, tiny_rows: Rows, read_all: ReadAll) -> None:
    with PackedModel.open(tiny) as model:
        for table in model.spec.tables:
            blocks = model.blocks(table.layer)
            assert [b.index for b in blocks] == list(range(len(blocks)))
            assert [b.start for b in blocks] == [0, *(b.stop for b in blocks[:-1])]
            assert blocks[-1].stop == table.num_rows
            assert len({b.file for b in blocks}) > 1
            assert {b.stop - b.start for b in blocks[:-1]} == {40_000 // table.row_bytes}
        with pytest.raises(SpecError, match="no layer 7"):
            model.blocks(7)
    found = read_all(tiny)
    assert all(np.array_equal(found[layer], rows) for layer, rows in tiny_rows.items())


def test_a_table_file_is_no_larger_than_asked(tiny: Path) -> None:
    assert all(path.stat().st_size <= 100_000 for path in tiny.glob("*.safetensors"))


def test_the_version_depends_on_contents_not_on_files(tiny: Path, tmp_path: Path) -> None:
    spec = tiny_spec()
    versions = {
        "one file": write_tables(tmp_path / "1", spec, {}, fill_rows, block_bytes=40_000),
        "a block a file": write_tables(tmp_path / "2", spec, {}, fill_rows, file_bytes=1, block_bytes=40_000),
        "other blocks": write_tables(tmp_path / "3", spec, {}, fill_rows, block_bytes=50_000),
        "other name": write_tables(tmp_path / "4", tiny_spec("other"), {}, fill_rows, block_bytes=40_000),
        "other rows": write_tables(tmp_path / "5", spec, {}, lambda t, s, out: out.fill(1), block_bytes=40_000),
    }
    with PackedModel.open(tiny) as model:
        same = [name for name, version in versions.items() if version == model.version]
    assert same == ["one file", "a block a file"]
    assert len(set(versions.values())) == 4
    document = json.loads((tiny / "manifest.json").read_text())
    tables = [{key: table[key] for key in ("layer", "block_rows", "checksums")} for table in document["tables"]]
    assert document["version"] == digest({"spec": document["spec"], "tables": tables}) == versions["one file"]


def test_threads_may_read_the_same_model(tiny: Path, tiny_rows: Rows) -> None:
    with PackedModel.open(tiny) as model, ThreadPoolExecutor(8) as pool:
        blocks = [b for layer in model.spec.layers for b in model.blocks(layer)] * 20

        def read(block: Any) -> bool:
            expected = tiny_rows[block.layer][block.start : block.stop]
            out = np.empty_like(expected)
            model.read_block(block, out)
            return np.array_equal(out, expected)

        assert all(pool.map(read, blocks))


def test_a_wrong_buffer_and_a_closed_model_are_refused(tiny: Path) -> None:
    with PackedModel.open(tiny) as model:
        block = model.blocks(1)[0]
        rows = block.stop - block.start
        width = model.spec.table(1).row_bytes
        for out in (
            np.empty((rows + 1, width), np.uint8),
            np.empty((rows, width), np.int8),
            np.empty((rows, width * 2), np.uint8)[:, ::2],
        ):
            with pytest.raises(ValueError, match="C-contiguous"):
                model.read_block(block, out)
    model.close()
    with pytest.raises(TableFileError, match="closed"):
        model.read_block(block, np.empty((rows, width), np.uint8))


# Damage.


@pytest.fixture
def restored(tiny_files: dict[Path, bytes], tiny: Path) -> Iterator[None]:
    manifest = (tiny / "manifest.json").read_bytes()
    yield
    for path, data in {**tiny_files, tiny / "manifest.json": manifest}.items():
        path.write_bytes(data)


@pytest.mark.usefixtures("restored")
def test_any_flipped_bit_of_a_table_file_is_found(tiny: Path, tiny_files: dict[Path, bytes], read_all: ReadAll) -> None:
    paths = list(tiny_files)

    # Where in the file: anywhere, and often in the few bytes of header that are no padding.
    @given(st.sampled_from(paths), st.one_of(st.floats(0, 1, exclude_max=True), st.integers(0, 90)), st.integers(0, 7))
    def check(path: Path, where: float | int, bit: int) -> None:
        data = bytearray(tiny_files[path])
        at = where if isinstance(where, int) else int(where * len(data))
        data[at] ^= 1 << bit
        path.write_bytes(data)
        with pytest.raises(TableFileError, match=path.name):
            read_all(tiny)
        path.write_bytes(tiny_files[path])

    check()


@pytest.mark.usefixtures("restored")
def test_a_table_file_of_any_other_length_is_found(
    tiny: Path, tiny_files: dict[Path, bytes], read_all: ReadAll
) -> None:
    @given(st.sampled_from(list(tiny_files)), st.floats(0, 1, exclude_max=True), st.binary(max_size=3))
    def check(path: Path, kept: float, appended: bytes) -> None:
        whole = tiny_files[path]
        changed = whole + appended if appended else whole[: int(kept * len(whole))]
        path.write_bytes(changed)
        with pytest.raises(TableFileError, match=path.name):
            read_all(tiny)
        path.write_bytes(whole)

    check()


@pytest.mark.usefixtures("restored")
def test_any_flipped_bit_or_cut_of_the_manifest_is_found(tiny: Path, read_all: ReadAll) -> None:
    path = tiny / "manifest.json"
    whole = path.read_bytes()

    @given(st.integers(0, len(whole) - 2), st.integers(0, 7), st.booleans())
    def check(at: int, bit: int, cut: bool) -> None:
        data = bytearray(whole)
        data[at] ^= 1 << bit
        path.write_bytes(whole[:at] if cut else data)
        with pytest.raises(TableFileError):
            read_all(tiny)

    check()


def _places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    children = document.items() if isinstance(document, dict) else enumerate(document[:3])
    for key, value in children:
        if isinstance(value, dict | list):
            yield from _places(value, (*path, key))
        else:
            yield (*path, key)


@pytest.mark.usefixtures("restored")
def test_a_forged_manifest_never_gives_a_wrong_row(tiny: Path, tiny_rows: Rows, read_all: ReadAll) -> None:
    """Values replaced or left out, the version made to fit: an error, or the rows that were packed."""
    path = tiny / "manifest.json"
    whole = json.loads(path.read_text())
    values = st.one_of(
        st.sampled_from([None, True, -1, 0, 1, 2, 10.0, 2**31, 2**63, 1e400, "", "rows", "../x.safetensors", [], {}]),
        st.integers(),
        st.text(max_size=5),
        st.lists(st.integers(0, 100), max_size=3),
    )

    @given(st.sampled_from(list(_places(whole))), values, st.booleans())
    def check(place: tuple[Any, ...], value: Any, remove: bool) -> None:
        document = json.loads(json.dumps(whole))
        parent = document
        for key in place[:-1]:
            parent = parent[key]
        assume(remove or parent[place[-1]] != value)
        if remove:
            del parent[place[-1]]
        else:
            parent[place[-1]] = value
        try:
            keys = ("layer", "block_rows", "checksums")
            tables = [{key: table[key] for key in keys} for table in document["tables"]]
            document["version"] = digest({"spec": document["spec"], "tables": tables})
        except (KeyError, TypeError, ValueError):
            pass  # too broken to have a version
        path.write_text(json.dumps(document))
        try:
            found = read_all(tiny)
        except TableFileError:
            return
        assert all(np.array_equal(found[layer], rows) for layer, rows in tiny_rows.items() if layer in found)

    check()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not the manifest"),
        (b'{"format": "other"}', "not the manifest"),
        (b'{"format": "engrampool-tables", "format_version": 2}', "format version 2; this program reads version 1"),
        (b'{"format": "engrampool-tables", "format_version": 1}', "must have"),
    ],
)
def test_other_files_are_no_manifest(raw: bytes, message: str) -> None:
    with pytest.raises(TableFileError, match=message):
        Manifest.decode(raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "too short"),
        (b"\xff" * 8 + b"{}", "limit"),
        ((4).to_bytes(8, "little") + b"nope", "no JSON"),
        (
            (62).to_bytes(8, "little") + b'{"rows":{"dtype":"U8","shape":[1,512],"data_offsets":[0,512]}}' + bytes(512),
            "the manifest says",
        ),
    ],
)
def test_a_file_with_a_bad_header_is_named(tiny: Path, tmp_path: Path, raw: bytes, message: str) -> None:
    shutil.copytree(tiny, tmp_path / "copy")
    victim = min((tmp_path / "copy").glob("*.safetensors"))
    victim.write_bytes(raw)
    with pytest.raises(TableFileError, match=f"{victim.name} .*{message}"):
        PackedModel.open(tmp_path / "copy")


def test_what_is_no_packed_model_is_said(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(TableFileError, match=r"no packed model: there is no manifest\.json"):
        PackedModel.open(tmp_path / "absent")
    shutil.copytree(tiny, tmp_path / "copy")
    victim = min((tmp_path / "copy").glob("*.safetensors"))
    victim.unlink()
    with pytest.raises(TableFileError, match=f"{victim.name}, with layer_1, cannot be opened: No such file"):
        PackedModel.open(tmp_path / "copy")
    os.mkfifo(victim)
    with pytest.raises(TableFileError, match=f"{victim.name}, with layer_1, cannot be opened: not a regular file"):
        PackedModel.open(tmp_path / "copy")


def test_a_damaged_block_is_named(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "copy")
    with PackedModel.open(tmp_path / "copy") as model:
        block = model.blocks(15)[2]
        with (model.directory / block.file).open("r+b") as file:
            file.seek(block.offset)
            file.write(b"not what it was")
        out = np.empty((block.stop - block.start, model.spec.table(15).row_bytes), np.uint8)
        name = rf"{block.file}: layer 15 block 2 \(rows {block.start} .. {block.stop - 1}\)"
        with pytest.raises(TableFileError, match=f"{name} has checksum .* pack the model again"):
            model.read_block(block, out)
        os.truncate(model.directory / block.file, block.offset + 10)
        with pytest.raises(TableFileError, match=f"{name} ends {out.nbytes - 10} bytes too early"):
            model.read_block(block, out)
