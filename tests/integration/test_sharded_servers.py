"""Servers in real processes that hold a part of a model each: together they are the model."""

import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engrampool_client.testing import ServerProcess, ServerStartError, serve_process
from engrampool_proto.sharding import Part, cut, part_nbytes
from engrampool_server.files.synth_checkpoint import synth_checkpoint
from engrampool_server.files.table_files import PackedModel
from server_fixtures import SPEC, RawPool, eventually, expected, pack, rows_of, scrape, version_of
from small_model import TOKENIZER

PARTS = cut(SPEC, 4)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("sharded") / "small", block_bytes=20_000)


def answer(server: ServerProcess, packed: Path, part: Part, model: str = "small") -> dict[int, bytes]:
    """All rows of a part, from the server of it."""
    with RawPool(server.address, version_of(packed)) as pool:
        return {
            layer: rows_of(pool.lookup(pool.by_ids((layer, rows), model=model)))[layer] for layer, rows in part.items()
        }


def test_the_union_of_all_servers_is_the_model(tmp_path):
    """In the real /dev/shm with tables that nobody else has."""
    spec = replace(SPEC, name=f"test-{os.getpid()}-{time.time_ns()}")
    packed = pack(tmp_path / "own", spec, block_bytes=20_000)
    where = Path("/dev/shm")
    union: dict[int, bytes] = {2: b"", 9: b""}
    try:
        for at, part in enumerate(cut(spec, 4)):
            with serve_process(packed, memory="shm", shard=f"{at}/4", workers=1 + at % 2) as server:
                for layer, rows in answer(server, packed, part, spec.name).items():
                    union[layer] += rows
                held = scrape(server.metrics_address)
                nbytes = part_nbytes(spec, part)
                assert held["engrampool_to_load_bytes"] == held["engrampool_loaded_bytes_total"] == nbytes
                assert sum(held[f'engrampool_table_bytes{{layer="{n}",model="{spec.name}"}}'] for n in part) == nbytes
                assert server.wait_for("opened")["table_bytes"] == nbytes
        paths = list(where.glob(f"engrampool-{os.geteuid()}-{version_of(packed)[:16]}-*"))
        assert len(paths) == sum(map(len, cut(spec, 4)))
    finally:
        for path in where.glob(f"engrampool-{os.geteuid()}-{version_of(packed)[:16]}-*"):
            path.unlink()
    assert union == {layer: expected(layer, np.arange(SPEC.table(layer).num_rows)) for layer in (2, 9)}


def test_a_shard_outlives_restarts_workers_and_a_change_of_shards(packed, tmp_path):
    memory = f"file:{tmp_path}"
    with serve_process(packed, memory=memory, shard="1/4", workers=2) as server:
        before = server.worker_pids()
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("rolled")
        eventually(lambda: not set(before.values()) & set(server.worker_pids().values()), "all replaced")
        assert answer(server, packed, PARTS[1]) == {n: expected(n, rows) for n, rows in PARTS[1].items()}
    # Another part: the first stays, in case its server comes again.
    with serve_process(packed, memory=memory, environ={"ENGRAMPOOL_SHARD": "2/4"}, workers=1) as server:
        assert server.said("adopted") == server.said("freed") == []
        assert answer(server, packed, PARTS[2]) == {n: expected(n, rows) for n, rows in PARTS[2].items()}
        with serve_process(packed, memory=memory, shard="1/4", workers=1) as other:
            assert [line["layer"] for line in other.said("adopted")] == list(PARTS[1])
            assert answer(other, packed, PARTS[1]) == {n: expected(n, rows) for n, rows in PARTS[1].items()}


def test_a_server_of_one_shard_reads_no_file_of_others(packed, tmp_path):
    """Of a table in many files, those without rows of the part may be as damaged as they like."""
    many = tmp_path / "many"
    shutil.copytree(packed, many)
    part = {layer: (rows.start, rows.stop) for layer, rows in PARTS[0].items()}
    with PackedModel.open(packed) as model:
        for layer in SPEC.layers:
            start, stop = part.get(layer, (0, 0))
            for block in model.blocks(layer):
                if block.stop <= start or block.start >= stop:
                    with (many / block.file).open("r+b") as file:
                        file.seek(block.offset)
                        file.write(bytes(100))
    with serve_process(many, shard="0/4", workers=1) as server:
        assert answer(server, packed, PARTS[0]) == {n: expected(n, rows) for n, rows in PARTS[0].items()}
    with pytest.raises(ServerStartError, match="checksum"), serve_process(many, shard="1/4", workers=1):
        pass


def test_a_placement_says_who_holds_what(packed, tmp_path):
    file = tmp_path / "placement.json"
    file.write_text('{"small": {"east": {"2": [0, 5000]}, "west": {"2": [5000, 6500], "9": [0, 4100]}}}')
    for name, part in (("east", {2: range(5000)}), ("west", {2: range(5000, 6500), 9: range(4100)})):
        with serve_process(packed, shard=name, placement=file, workers=1) as server:
            assert answer(server, packed, part) == {n: expected(n, rows) for n, rows in part.items()}
    unknown = pytest.raises(ServerStartError, match="has no shard north of small")
    with unknown, serve_process(packed, shard="north", placement=file, workers=1):
        pass


def test_a_checkpoint_can_be_sharded(tmp_path):
    synth_checkpoint("longcat", 60, tmp_path / "checkpoint", TOKENIZER)
    versions, parts = set(), []
    for at in (0, 1):
        with serve_process(tmp_path / "checkpoint", shard=f"{at}/2", workers=1) as server:
            versions.add(server.wait_for("loaded")["version"])
            parts.append(server.wait_for("opened")["table_bytes"])
            assert "all is read at every start" in server.wait_for("preflight")["warning"]
    assert len(versions) == 1
    with serve_process(tmp_path / "checkpoint", workers=1) as server:
        assert {server.wait_for("loaded")["version"]} == versions
        assert server.wait_for("opened")["table_bytes"] == sum(parts)
