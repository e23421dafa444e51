"""Where a server's tables can be mapped: what Attach answers and refuses, and who may read the memory."""

import gc
import os
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from engrampool_proto.segment import TRAILER_BYTES, Identity, boot_id
from engrampool_proto.v1 import pool_pb2
from engrampool_server.files.table_files import PackedModel
from engrampool_server.memory.segments import find_backing, take
from engrampool_server.memory.table_loader import load
from server_fixtures import SPEC, RawPool, Running, eventually, expected, pack, refusal, running, version_of

MODES = {"off": 0o600, "user": 0o600, "group": 0o640, "all": 0o644}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("attach") / "small")


@pytest.fixture
def shm_packed(tmp_path: Path) -> Iterator[Path]:
    """A model that nobody else has, as /dev/shm is everybody's."""
    packed = pack(tmp_path / "own", replace(SPEC, name=f"test-{os.getpid()}-{time.time_ns()}"))
    yield packed
    for path in Path("/dev/shm").glob(f"engrampool-{os.geteuid()}-{version_of(packed)[:16]}-*"):
        path.unlink()


def attach(run: Running, model: str, version: str) -> pool_pb2.AttachResponse:
    with RawPool(run.address) as pool:
        call = pool.channel.unary_unary(
            "/engrampool.v1.Pool/Attach",
            request_serializer=pool_pb2.AttachRequest.SerializeToString,
            response_deserializer=pool_pb2.AttachResponse.FromString,
        )
        return call(pool_pb2.AttachRequest(model=model, version=version), timeout=60)


def refused(run: Running, model: str, version: str) -> tuple[grpc.StatusCode, str | None]:
    return refusal(lambda: attach(run, model, version))[:2]


def describe(run: Running) -> pool_pb2.DescribeResponse:
    with RawPool(run.address) as pool:
        call = pool.channel.unary_unary("/engrampool.v1.Pool/Describe")
        return pool_pb2.DescribeResponse.FromString(call(b"", timeout=60))


def check_answer(answer: pool_pb2.AttachResponse, directory: Path, in_memory: bool) -> None:
    assert answer.boot_id == boot_id()
    assert 1000 <= answer.valid_ms <= 60_000
    assert [table.layer for table in answer.tables] == [2, 9]
    for table in answer.tables:
        spec, path = SPEC.table(table.layer), Path(table.path)
        status = path.stat()
        assert path.parent == directory
        assert (table.device, table.inode, table.size) == (status.st_dev, status.st_ino, status.st_size)
        assert (table.row_start, table.row_stop) == (0, spec.num_rows)
        assert table.in_memory == in_memory
        assert table.size >= spec.nbytes + TRAILER_BYTES
        assert path.read_bytes()[: spec.nbytes] == expected(table.layer, np.arange(spec.num_rows))


def test_tables_in_files_can_be_mapped(packed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "segments").mkdir()
    for _ in ("made", "adopted"):
        with running(packed, memory="file:segments") as run:
            answer = attach(run, "small", version_of(packed))
            backing = find_backing("file:segments")
            assert backing is not None
            check_answer(answer, tmp_path / "segments", not backing.reserve)
            assert describe(run).attach


def test_tables_in_shm_can_be_mapped(shm_packed):
    with running(shm_packed, memory="shm") as run:
        model = describe(run).models[0]
        check_answer(attach(run, model.name, model.version), Path("/dev/shm"), True)


@pytest.mark.parametrize("how", ["memory", "attach", "one table"])
def test_what_cannot_be_mapped_is_refused_and_described_so(packed, tmp_path, how):
    settings = {"memory": "anon"} if how == "memory" else {"memory": f"file:{tmp_path}"}
    with running(packed, load=False, **settings, attach="off" if how == "attach" else "all") as run:
        with PackedModel.open(packed) as model:
            held = load(model, settings["memory"], False, 1, threading.Event(), lambda _: None)
        if how == "one table":
            object.__setattr__(held.tables[9], "place", None)
        run.hold([held])
        assert refused(run, "small", version_of(packed)) == (grpc.StatusCode.FAILED_PRECONDITION, "no-attach")
        assert not describe(run).attach
        assert run.scrape()['engrampool_refused_total{reason="no-attach"}'] == 1


def test_model_and_version_must_be_held(packed, tmp_path):
    with running(packed, memory=f"file:{tmp_path}", load=False) as run:
        version = version_of(packed)
        assert refused(run, "small", version) == (grpc.StatusCode.UNAVAILABLE, "loading")
        run.load()
        assert attach(run, "small", version).tables
        assert refused(run, "large", version) == (grpc.StatusCode.NOT_FOUND, "unknown-model")
        for other in ("", "0" * 32, version[:-1]):
            assert refused(run, "small", other) == (grpc.StatusCode.FAILED_PRECONDITION, "unknown-version")
        calls = 'grpc_code="OK",grpc_method="Attach",grpc_service="engrampool.v1.Pool",grpc_type="unary"'
        eventually(lambda: run.scrape().get(f"grpc_server_handled_total{{{calls}}}") == 1, "the call is counted")


@pytest.mark.parametrize("before", MODES)
@pytest.mark.parametrize("now", MODES)
def test_the_last_start_says_who_may_read(packed, tmp_path, before, now):
    umask = os.umask(0o077)  # which says nothing here
    try:
        for attach in (before, now):
            with PackedModel.open(packed) as model:
                load(model, f"file:{tmp_path}", False, 1, threading.Event(), lambda _: None, attach)
            gc.collect()
            assert [stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()] == [MODES[attach]] * 2
    finally:
        os.umask(umask)


def test_only_its_owner_reads_a_segment_that_is_not_whole(tmp_path):
    backing = find_backing(f"file:{tmp_path}", attach="all")
    assert backing is not None
    segment = take(backing, Identity("m", "0" * 32, 1, 10, 10), lambda rows: True, lambda: None)
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    segment.finish()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
