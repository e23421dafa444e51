"""Arguments that cannot be meant are refused by an error that names them, before anything begins."""

import os
import stat
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from engrampool_client import AsyncClient, BatchError, Client, DeadlineError, ProtocolError, RecordError
from engrampool_client.compute.served import choose
from engrampool_proto.v1 import pool_pb2
from server_fixtures import GatherGate, eventually, pack, running

ROW = (24, 264)


@pytest.fixture(scope="module")
def client(server):
    with Client(server, attach="off", cache_bytes=1 << 20) as made:
        yield made
        assert made.status()["steps"]["in_flight"] == 0


def out(tokens=2) -> np.ndarray:
    return np.zeros((tokens, *ROW), np.uint8)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda c: c.lookup(np.int32(7)), r"tokens must be int32 \[\*\]; it is int32 \[\]"),
        (lambda c: c.prefetch(7), r"tokens must be int32 \[\*\]"),
        (lambda c: c.lookup([7], np.int32(1)), r"query_start_loc must be int32 \[\*\]"),
        (lambda c: c.lookup([7], lookback=7), "lookback must be int32"),
        (lambda c: c.lookup([7], dead=True), "dead must be bool"),
        (lambda c: c.lookup_rows(None), "rows must be a dict of arrays by layer; it is NoneType"),
        (lambda c: c.lookup_rows([1]), "rows must be a dict of arrays by layer; it is list"),
        (lambda c: c.prefetch_rows(np.arange(3)), "rows must be a dict of arrays by layer; it is ndarray"),
        (lambda c: c.lookup_rows({}), "at least one layer"),
        (lambda c: c.lookup_rows({1: [[1], [1, 2]]}), "row ids of layer 1 must be an integer array; they are list"),
        (lambda c: c.lookup_rows({1: None}), "row ids of layer 1 must be an integer array"),
        (lambda c: c.lookup([7], out=[1]), "out must be a dict of arrays by layer; it is list"),
        (lambda c: c.lookup([7], out=out(1)), "out must be a dict of arrays by layer; it is ndarray"),
        (lambda c: c.lookup_rows({1: np.arange(3)}, out=[1]), "out must be a dict of arrays by layer; it is list"),
        (lambda c: c.dummy(3, out=[1]), "out must be a dict of arrays by layer"),
        (lambda c: c.lookup([7], layers=1), "layers must be a sequence of layers; it is 1"),
        (lambda c: c.lookup([7], layers="1"), "layers must be a sequence of layers; it is '1'"),
    ],
)
def test_arrays_that_are_none(client, call, text):
    with pytest.raises(BatchError, match=text):
        call(client)


def test_arrays_that_share_memory_are_refused(client):
    same, both = out(), np.zeros((3, *ROW), np.uint8)
    values = np.zeros((2, 24, 256), np.uint8)
    for given, text in (
        ({1: same, 14: same}, "out of layer 1 and out of layer 14 share memory"),
        ({1: both[:2], 14: both[1:]}, "out of layer 1 and out of layer 14 share memory"),
        ({1: both[1:], 14: both[:2]}, "out of layer 14 and out of layer 1 share memory"),
        ({1: {"values": values}, 14: {"values": values}}, "values of layer 1 and out of values of layer 14"),
        ({1: {"values": values, "scales": values.reshape(-1)[:384].reshape(2, 24, 8)}}, "share memory"),
    ):
        for call in (client.lookup, client.prefetch):
            with pytest.raises(BatchError, match=text):
                call([7, 8], out=given)
    side_by_side = np.zeros((4, *ROW), np.uint8)
    rows = client.lookup([7, 8], out={1: side_by_side[:2], 14: side_by_side[2:]})
    assert np.array_equal(np.concatenate([rows[1], rows[14]]), side_by_side)
    nothing = out(0)
    client.lookup([], out={1: nothing, 14: nothing})


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"heads": (1,)}, r"heads must be two integers \(start, stop\), not empty; it is \(1,\)"),
        ({"heads": (0.0, 2.0)}, "heads must be two integers"),
        ({"heads": 3}, "heads must be two integers"),
        ({"heads": (2, 2)}, "heads must be two integers"),
        ({"max_steps": 1.5}, "max_steps must be an integer; it is 1.5"),
        ({"max_steps": "4"}, "max_steps must be an integer; it is '4'"),
        ({"max_steps": 0}, "max_steps must be positive"),
        ({"connections": 2.0}, "connections must be an integer"),
        ({"cache_bytes": 1e6}, "cache_bytes must be an integer"),
        ({"breaker_failures": 2.5}, "breaker_failures must be an integer"),
        ({"timeout_s": "5"}, "timeout_s must be a number; it is '5'"),
        ({"timeout_s": None}, "timeout_s must be a number; it is None"),
        ({"timeout_s": float("nan")}, "timeout_s must be positive; it is nan"),
        ({"retry_s": -1}, "retry_s must be 0 or more; it is -1"),
        ({"target": ""}, "target must be HOST:PORT or a URL, or a list of such; '' is neither"),
        ({"target": " "}, "target must be HOST:PORT"),
        ({"target": None}, "target must be HOST:PORT or a URL, or a list of such; None is neither"),
        ({"target": ["a:1", None]}, "None is neither"),
        ({"target": []}, "target must name a server at least"),
        ({"target": 50051}, "50051 is neither"),
        ({"target": b"a:1"}, "is neither"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_before_anybody_is_asked(settings, text):
    """Nobody listens there: a client that asked would say that."""
    for kind in (Client, AsyncClient):
        with pytest.raises((ValueError, TypeError), match=text):
            kind(**{"target": "127.0.0.1:1", "connect_timeout_s": 3600.0, **settings})


def test_any_number_is_a_time_to_wait(client, server):
    step = client.prefetch([7, 8])
    step.wait()
    for limit in (2**2000, float("inf"), Decimal(60), Fraction(60), np.float32(60), True):
        assert step.rows(1, timeout_s=limit).shape == (2, *ROW)
        if limit is not True:  # which is a second, and may be too short
            assert client.prefetch([7, 8], timeout_s=limit).rows(14).shape == (2, *ROW)
        step.wait(limit)
    begin = time.monotonic()
    brief = client.prefetch([7, 8], timeout_s=True)
    assert 1 <= brief.deadline - begin <= 1 + time.monotonic() - begin
    eventually(brief.done, "it came, or was late")
    for limit in (-(2**2000), float("-inf"), 0):
        assert step.rows(1, timeout_s=limit).shape == (2, *ROW)  # it is there
    with Client(server, timeout_s=2**2000, connect_timeout_s=2**2000, retry_s=2**2000, attach="off") as other:
        assert other.lookup([7])[1].shape == (1, *ROW)
    for wrong in (float("nan"), "1", np.zeros(2)):
        with pytest.raises((ValueError, TypeError), match=r"timeout_s must be (a number|positive)"):
            client.lookup([7], timeout_s=wrong)


def test_a_wait_that_is_over_at_once_or_no_time_says_so(monkeypatch, tmp_path):
    gate = GatherGate(monkeypatch)
    with (
        running(pack(tmp_path / "small"), gather_threads=2) as run,
        Client(run.address, attach="off", dedupe=False, timeout_s=60.0) as held,
    ):
        step = held.prefetch_rows({2: np.arange(2000)})
        for limit in (-(2**2000), 0, Decimal(0)):
            with pytest.raises(DeadlineError, match="not there within"):
                step.rows(2, timeout_s=limit)
        for wrong in (float("nan"), np.float32("nan"), Decimal("nan"), "1", np.zeros(2)):
            with pytest.raises((ValueError, TypeError), match="timeout_s must be a number"):
                step.rows(2, timeout_s=wrong)
            with pytest.raises((ValueError, TypeError), match="timeout_s must be a number"):
                step.wait(wrong)
        gate.open.set()
        step.wait()


@pytest.mark.parametrize("kind", ["device", "pipe", "link"])
def test_only_a_regular_file_is_replaced_by_a_saved_cache(client, tmp_path, kind):
    path = tmp_path / "there"
    if kind == "device":
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    before = path.lstat()
    with pytest.raises(OSError, match="no regular file; name another"):
        client.save_cache(path)
    assert path.lstat() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_recording_to_a_pipe_that_nobody_reads_holds_nobody_up(server, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecordError, match="no regular file; name another"):
        Client(server, record=tmp_path / "pipe")


def test_a_specification_nested_too_deep_is_a_servers_mistake():
    held = pool_pb2.Model(name="m", version="v", spec_json=b"[" * 100_000)
    with pytest.raises(ProtocolError, match="specification of m is unreadable"):
        choose(pool_pb2.DescribeResponse(models=[held]).SerializeToString(), None, None)
