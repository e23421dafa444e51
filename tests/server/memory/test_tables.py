"""Loading packed models and gathering rows."""

import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrampool_proto.errors import BatchError
from engrampool_server.files.table_files import PackedModel, TableFileError
from engrampool_server.memory.memory import OutOfMemoryError
from engrampool_server.memory.table_loader import LoadCancelledError, load
from engrampool_server.memory.tables import LoadedTable
from server_fixtures import SPEC, expected, pack

TABLE = SPEC.table(9)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("tables") / "small", block_bytes=100_000)


def load_all(directory: Path, threads: int = 2, memory: str = "anon", stop=None, progress=lambda _: None):
    with PackedModel.open(directory) as model:
        return load(model, memory, False, threads, stop or threading.Event(), progress)


def held(rows: int, start: int = 0) -> LoadedTable:
    return LoadedTable(TABLE, np.random.default_rng(rows).integers(0, 256, (rows, 42), np.uint8), start)


@pytest.mark.parametrize("memory", ["anon", "file"])
@pytest.mark.parametrize("threads", [1, 4])
def test_what_was_packed_is_held(packed, tmp_path, memory, threads):
    read = []
    memory = f"file:{tmp_path}" if memory == "file" else memory
    model = load_all(packed, threads, memory, progress=read.append)
    assert list(model.tables) == [2, 9]
    for layer, table in model.tables.items():
        assert (table.row_start, table.row_stop) == (0, SPEC.table(layer).num_rows)
        assert table.rows.tobytes() == expected(layer, np.arange(table.row_stop))
    assert sum(read) == SPEC.nbytes
    with PackedModel.open(packed) as opened:
        assert len(read) == sum(len(opened.blocks(layer)) for layer in (2, 9)) > 10
        assert (model.version, model.spec) == (opened.version, SPEC)


def test_held_tables_cannot_be_written(packed):
    for table in load_all(packed).tables.values():
        with pytest.raises(ValueError, match="read-only"):
            table.rows[0] = 0
        with pytest.raises(ValueError, match="read-only"):
            table.rows.reshape(-1).view(np.uint8)[0] = 0


@given(
    rows=st.integers(1, 300),
    start=st.sampled_from([0, 1, 1000, 2**32 - 150, 2**40]),
    dtype=st.sampled_from([np.uint32, np.uint64]),
    data=st.data(),
)
def test_gather_is_indexing(rows, start, dtype, data):
    table = held(rows, start)
    places = data.draw(st.lists(st.integers(0, rows - 1), max_size=20))
    places = [p for p in places if start + p <= np.iinfo(dtype).max]
    ids = np.array([start + p for p in places], dtype)
    ids.flags.writeable = False  # as a view of a message is
    out = np.full(len(ids) * 42 + 2, 0xAA, np.uint8)
    table.check(ids)
    table.gather(ids, out[1:-1])
    assert out[1:-1].tobytes() == table.rows[places].tobytes()
    assert out[0] == out[-1] == 0xAA


@given(
    rows=st.integers(1, 50),
    start=st.sampled_from([0, 7, 2**32 - 25, 2**40]),
    dtype=st.sampled_from([np.uint32, np.uint64]),
    data=st.data(),
)
def test_the_first_id_that_is_not_held_is_named(rows, start, dtype, data):
    table, top = held(rows, start), int(np.iinfo(dtype).max)
    near = [value for value in (0, start - 1, start, start + rows - 1, start + rows, top) if 0 <= value <= top]
    ids = data.draw(st.lists(st.sampled_from(near), max_size=12))
    bad = [at for at, value in enumerate(ids) if not start <= value < start + rows]
    if not bad:
        table.check(np.array(ids, dtype))
        return
    text = rf"row id {ids[bad[0]]} at position {bad[0]} of layer 9 .* rows {start} \.\. {start + rows - 1}$"
    with pytest.raises(BatchError, match=text):
        table.check(np.array(ids, dtype))


def test_a_stop_before_the_first_block_reads_nothing(packed, monkeypatch):
    def refuse(*_):
        raise AssertionError("memory was asked for")

    monkeypatch.setattr("engrampool_server.memory.table_loader.allocate", refuse)
    stop = threading.Event()
    stop.set()
    with pytest.raises(LoadCancelledError):
        load_all(packed, stop=stop)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_stop_ends_loading_after_the_blocks_being_read(packed, threads):
    stop, read = threading.Event(), []

    def progress(nbytes: int) -> None:
        read.append(nbytes)
        stop.set()

    with pytest.raises(LoadCancelledError):
        load_all(packed, threads, stop=stop, progress=progress)
    assert 1 <= len(read) <= threads


def damage(source: Path, target: Path, layer: int, block: int) -> str:
    """A copy of `source` with one byte of a block changed; gives the file's name."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    with PackedModel.open(source) as model:
        where = model.blocks(layer)[block]
    with (target / where.file).open("r+b") as file:
        file.seek(where.offset + 11)
        byte = file.read(1)[0]
        file.seek(where.offset + 11)
        file.write(bytes([byte ^ 1]))
    return where.file


@pytest.mark.parametrize(("layer", "block"), [(2, 0), (2, 4), (9, 1)])
def test_a_damaged_block_stops_the_load_and_is_named(packed, tmp_path, layer, block):
    name = damage(packed, tmp_path / "damaged", layer, block)
    for threads in (1, 4):
        read = []
        with pytest.raises(TableFileError, match=f"{name}: layer {layer} block {block} .* checksum"):
            load_all(tmp_path / "damaged", threads, progress=read.append)
        with PackedModel.open(packed) as model:
            before = (len(model.blocks(2)) if layer == 9 else 0) + block
        if threads == 1:
            assert len(read) == before  # and not one after it
        assert sum(read) < SPEC.nbytes


def test_memory_that_is_not_there_is_an_error_of_the_load(packed, monkeypatch):
    def refuse(nbytes, kind):
        raise OutOfMemoryError(f"{nbytes} of {kind}")

    monkeypatch.setattr("engrampool_server.memory.table_loader.allocate", refuse)
    with pytest.raises(OutOfMemoryError, match=f"{SPEC.table(2).nbytes} of anon"):
        load_all(packed)
