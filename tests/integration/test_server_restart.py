"""Servers in real processes whose tables outlive them: killed while they load or serve, and started again."""

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engrampool_client.testing import ServerProcess, serve_process
from engrampool_server.memory.segments import find_backing, survey
from server_fixtures import LIMIT_S, SPEC, RawPool, eventually, expected, lacking, pack, rows_of, version_of


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("restart") / "small", block_bytes=20_000)


def answers_right(server: ServerProcess, packed: Path) -> None:
    with RawPool(server.address, version_of(packed)) as pool:
        for table in SPEC.tables:
            ids = np.arange(table.num_rows)
            assert rows_of(pool.lookup(pool.by_ids((table.layer, ids)))) == {table.layer: expected(table.layer, ids)}


def inodes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in directory.iterdir()}


def mapped(pid: int) -> set[int]:
    return {int(line.split()[4]) for line in Path(f"/proc/{pid}/maps").read_text().splitlines()}


def unused(directory: Path) -> bool:
    backing = find_backing(f"file:{directory}")
    assert backing is not None
    return not any(found.in_use for found in survey(backing))


def test_a_restart_adopts_the_tables_of_the_server_before(packed, tmp_path):
    """Of one that was killed; `test_segments_in_shm` has one that was told to end."""
    with serve_process(packed, memory=f"file:{tmp_path}", workers=1) as server:
        answers_right(server, packed)
        assert server.said("adopted") == []
        before = inodes(tmp_path)
        server.process.kill()
        server.process.wait(LIMIT_S)
    # Workers of a supervisor that was killed end a moment later.
    eventually(lambda: unused(tmp_path), "all processes let go")
    with serve_process(packed, memory=f"file:{tmp_path}", workers=2) as server:
        answers_right(server, packed)
        assert [line["layer"] for line in server.said("adopted")] == [2, 9]
        assert inodes(tmp_path) == before
        for pid in [server.process.pid, *server.worker_pids().values()]:
            assert mapped(pid) >= set(before.values())
        # Another server of the same tables: still one copy.
        with serve_process(packed, memory=f"file:{tmp_path}", workers=1) as second:
            server.process.kill()
            server.process.wait(LIMIT_S)
            answers_right(second, packed)
            assert len(second.said("adopted")) == 2
            assert inodes(tmp_path) == before


def test_segments_in_shm(tmp_path):
    """The kind itself, in the real /dev/shm, with tables that nobody else has."""
    spec = replace(SPEC, name=f"test-{os.getpid()}-{time.time_ns()}")
    packed = pack(tmp_path / "own", spec)
    names = [
        f"engrampool-{os.geteuid()}-{version_of(packed)[:16]}-{table.layer}-0-{table.num_rows}" for table in spec.tables
    ]
    paths = [Path("/dev/shm") / name for name in names]
    try:
        for adopted in (0, 2):
            with serve_process(packed, memory="shm", workers=1) as server:
                assert len(server.said("adopted")) == adopted
                maps = Path(f"/proc/{server.worker_pids()[0]}/maps").read_text().splitlines()
                modes = {line.split()[-1]: line.split()[1] for line in maps}
                assert [modes[str(path)] for path in paths] == ["r--s", "r--s"]
            assert all(path.exists() for path in paths)
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def test_a_server_that_is_killed_while_it_loads_is_in_nobodys_way(packed, tmp_path):
    moments = random.Random(20)
    for _ in range(4):
        with serve_process(packed, memory=f"file:{tmp_path}", ready=False, load_threads=1, workers=1) as server:
            server.wait_for("opened")
            # From the first look at what lies there until it serves.
            time.sleep(moments.uniform(0, 0.4))
            server.process.kill()
            server.process.wait(LIMIT_S)
    with serve_process(packed, memory=f"file:{tmp_path}", workers=1) as server:
        answers_right(server, packed)
    backing = find_backing(f"file:{tmp_path}")
    assert backing is not None
    assert [found.identity.layer for found in survey(backing) if found.identity] == [2, 9]
    assert len(list(tmp_path.iterdir())) == 2


ROOM = """
import subprocess, sys
from pathlib import Path
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", sys.argv[1]], check=True)
import threading
from engrampool_proto.errors import EngrampoolError
from engrampool_server.telemetry import log
from engrampool_server.config import ServerConfig
from engrampool_server.memory.load import ModelLoader
from engrampool_server.telemetry.metrics import Metrics
log.configure("info")
def start(*models):
    loader = ModelLoader(ServerConfig(models=models, memory=f"file:{sys.argv[1]}"), Metrics())
    try:
        loader.open()
        list(loader.load(threading.Event()))
        print("loaded")
    except EngrampoolError as error:
        print(error)
    finally:
        loader.close()
one, other, big = map(Path, sys.argv[2:])
start(one)
start(big)
start(one)
start(other)
"""


OWN_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.fixture
def _may_mount() -> None:
    if subprocess.run([*OWN_MOUNTS, "true"], capture_output=True).returncode:
        lacking("this process may not mount a file system of its own; root may")


@pytest.mark.usefixtures("_may_mount")
def test_unused_tables_of_other_models_go_where_that_makes_room_and_only_there(packed, tmp_path):
    """3 MiB of room: for one or the other, never for the third."""
    other = pack(tmp_path / "other", replace(SPEC, name="other"))
    tables = tuple(replace(table, num_rows=20_000) for table in SPEC.tables)
    big = pack(tmp_path / "big", replace(SPEC, name="big", tables=tables))
    (tmp_path / "room").mkdir()
    command = [*OWN_MOUNTS, sys.executable, "-c", ROOM]
    done = subprocess.run(
        [*command, *map(str, (tmp_path / "room", packed, other, big))], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    first, too_big, again, second = done.stdout.splitlines()
    assert (first, again, second) == ("loaded",) * 3
    assert "table directory: 5.9 MiB needed" in too_big
    events = [json.loads(line) for line in done.stderr.splitlines()]
    events = [(line["event"], line["model"], line["layer"]) for line in events if line["event"] in ("adopted", "freed")]
    assert events == [("adopted", "small", 2), ("adopted", "small", 9), ("freed", "small", 2)]
