"""Checkpoints served as they are: the rows and the version that packing gives."""

import ctypes
import gc
import mmap
import threading
from pathlib import Path

import numpy as np
import pytest

from engrampool_client.testing import ServerStartError, serve_process
from engrampool_server.files.checkpoint import CheckpointError
from engrampool_server.files.pack import pack
from engrampool_server.files.raw_model import RawModel
from engrampool_server.files.table_files import PackedModel
from engrampool_server.machine import Machine, in_memory
from engrampool_server.memory.table_loader import load
from engrampool_server.memory.tables import LoadedModel
from server_fixtures import RawPool, rows_of
from server_fixtures import pack as pack_small


def load_all(model: RawModel | PackedModel, memory: str = "anon", threads: int = 2) -> LoadedModel:
    try:
        return load(model, memory, False, threads, threading.Event(), lambda _: None)
    finally:
        model.close()


def test_rows_and_version_are_those_of_the_packed_model(family, checkpoint, tmp_path):
    directory = checkpoint(family)
    packed = pack(directory, tmp_path / "packed")
    wanted = load_all(PackedModel.open(tmp_path / "packed"))
    raw = RawModel(directory)
    assert raw.version is None
    held = load_all(raw)
    assert held.version == raw.version == wanted.version == packed
    assert held.spec == wanted.spec
    for layer, table in held.tables.items():
        assert np.array_equal(table.rows, wanted.tables[layer].rows)
        assert not table.rows.flags.writeable


@pytest.mark.parametrize("block_bytes", [1, 5000])
def test_many_blocks_of_any_size(checkpoint, tmp_path, block_bytes):
    directory = checkpoint("deepseek-v4.1")
    version = pack(directory, tmp_path / "packed", block_bytes=block_bytes)
    wanted = load_all(PackedModel.open(tmp_path / "packed"))
    for threads in (1, 4):
        held = load_all(RawModel(directory, block_bytes), threads=threads)
        assert held.version == version
        for layer, table in held.tables.items():
            assert np.array_equal(table.rows, wanted.tables[layer].rows)


def test_memory_for_segments_is_used_without_a_name(checkpoint, tmp_path):
    (tmp_path / "segments").mkdir()
    held = load_all(RawModel(checkpoint("engram-demo")), f"file:{tmp_path / 'segments'}")
    assert all(table.place is None for table in held.tables.values())  # there is nothing to map them by
    assert list((tmp_path / "segments").iterdir()) == []
    assert str(tmp_path / "segments") in Path("/proc/self/maps").read_text()
    assert any(table.rows.any() for table in held.tables.values())
    del held
    gc.collect()
    assert str(tmp_path / "segments") not in Path("/proc/self/maps").read_text()


def test_a_server_answers_from_a_checkpoint(checkpoint, tmp_path):
    directory = checkpoint("longcat")
    version = pack(directory, tmp_path / "packed")
    held = load_all(PackedModel.open(tmp_path / "packed"))
    layer = held.spec.layers[0]
    ids = np.arange(held.spec.table(layer).num_rows)
    with serve_process(directory, workers=1) as server, RawPool(server.address, version) as pool:
        answer = pool.lookup(pool.by_ids((layer, ids), model=held.spec.name))
        assert rows_of(answer) == {layer: held.tables[layer].rows.tobytes()}
        assert server.wait_for("opened")["version"] is None
        assert server.wait_for("loaded")["version"] == version
    # Once packed and once not, it is the same model twice.
    twice = pytest.raises(ServerStartError, match=f"version {version}, is given twice")
    with twice, serve_process(directory, tmp_path / "packed", workers=1):
        pass


def test_a_file_that_becomes_shorter_ends_the_load(checkpoint):
    directory = checkpoint("deepseek-v4.1")
    model = RawModel(directory)
    for name in model.files:
        with (directory / name).open("r+b") as file:
            file.truncate(5000)
    with pytest.raises(CheckpointError, match="became shorter"):
        load_all(model)
    assert model.version is None
    with pytest.raises(CheckpointError, match="truncated"):
        RawModel(directory)


def test_a_manifest_beside_a_config_is_a_packed_model(tmp_path):
    assert not RawModel.lies_in(tmp_path)
    (tmp_path / "config.json").touch()
    assert RawModel.lies_in(tmp_path)
    (tmp_path / "manifest.json").touch()
    assert not RawModel.lies_in(tmp_path)


def cached_pages(path: Path) -> int:
    """Of a file, in the page cache."""
    libc = ctypes.CDLL(None)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        table = np.frombuffer(memory, np.uint8)
        pages = np.zeros(-(-len(table) // mmap.PAGESIZE), np.uint8)
        address, length = ctypes.c_void_p(table.ctypes.data), ctypes.c_size_t(len(table))
        assert libc.mincore(address, length, ctypes.c_void_p(pages.ctypes.data)) == 0
        del table
        return int((pages & 1).sum())


def test_the_page_cache_is_left_alone_where_both_fit_and_else_rid_of_what_was_read(tmp_path, monkeypatch):
    directory = pack_small(tmp_path / "small")
    if in_memory(directory):
        pytest.skip("the temporary directory is memory: pytest --basetemp on a disk")
    files = sorted(directory.glob("*.safetensors"))
    for path in files:
        path.read_bytes()
    load_all(PackedModel.open(directory))
    assert all(cached_pages(path) * mmap.PAGESIZE >= path.stat().st_size for path in files)
    monkeypatch.setattr(Machine, "available_bytes", 3_000_000)
    load_all(PackedModel.open(directory))
    # Pages that two blocks share may stay.
    assert sum(cached_pages(path) * mmap.PAGESIZE for path in files) < sum(path.stat().st_size for path in files) / 4
