"""Recordings: what was asked for comes back, whatever the mix; nothing else is written; no lookup suffers."""

import json
import os
import stat
import struct
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from engrampool_client import BatchError, Client, RecordError, private_files
from engrampool_client.doctor.record import Recorder, Recording
from engrampool_proto.hashing import TokenBatch
from server_fixtures import eventually

VOCAB = 129280
HEADS = 24
SHAPES = st.sampled_from([(5,), (0,), (3, HEADS), (2, 3, HEADS), (4, 7), (0, HEADS)])
BY_TOKENS = st.tuples(
    st.lists(st.integers(0, VOCAB - 1), max_size=12), st.sampled_from([(1,), (14,), (1, 14)]), st.booleans()
)
BY_ROWS = st.tuples(st.lists(SHAPES, min_size=2, max_size=2), st.sampled_from([(1,), (14,), (1, 14)]))


def batch_of(tokens, cut) -> TokenBatch:
    """cut: two requests instead of one."""
    ids = np.array(tokens, np.int32)
    bounds = [0, len(ids) // 2, len(ids)] if cut else [0, len(ids)]
    return TokenBatch.of(ids, np.array(bounds, np.int32))


def write(path, spec, *lookups) -> Recorder:
    recorder = Recorder(path, spec, "some-version")
    for kind, what, layers in lookups:
        if kind == "tokens":
            recorder.tokens(what, layers)
        else:
            recorder.rows(what)
    recorder.close()
    return recorder


def written(recorder: Recorder) -> None:
    """Wait until nothing waits to be written."""
    eventually(lambda: not recorder.waiting_bytes, "all is written")


def lookup_of(layers: bytes, count: int, at_s: float = 0.0) -> bytes:
    """A record of these layers."""
    start = struct.pack("<dIQQ", at_s, count, len(layers), xxhash.xxh3_64_intdigest(layers))
    return start + struct.pack("<Q", xxhash.xxh3_64_intdigest(start)) + layers


def shaped(ids: np.ndarray) -> np.ndarray:
    """As a recording gives it: all axes but the last are one."""
    return ids.reshape(-1, ids.shape[-1]) if ids.ndim > 1 else ids


@given(st.lists(st.one_of(BY_TOKENS, BY_ROWS), max_size=8), st.sampled_from([np.int64, np.uint32, np.int32]))
def test_any_mix_of_lookups_comes_back_as_the_rows_asked_for(spec, tmp_path_factory, drawn, dtype):
    rng = np.random.default_rng(7)
    lookups, wanted = [], []
    for one in drawn:
        if len(one) == 3:
            batch = batch_of(one[0], one[2])
            lookups.append(("tokens", batch, one[1]))
            wanted.append(spec.hash(batch, one[1]))
        else:
            rows = {
                layer: rng.integers(0, spec.table(layer).num_rows, shape).astype(dtype)
                for layer, shape in zip(one[1], one[0], strict=False)
            }
            lookups.append(("rows", rows, ()))
            wanted.append(rows)
    path = tmp_path_factory.mktemp("record") / "stream"
    assert write(path, spec, *lookups).dropped == 0

    recording = Recording(path)
    assert (recording.model, recording.version, recording.spec_digest) == (spec.name, "some-version", spec.digest)
    found = list(recording)
    assert [sorted(each.ids) for each in found] == [sorted(each) for each in wanted]
    times = [each.at_s for each in found]
    assert times == sorted(times)
    assert all(time >= 0 for time in times)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.num_tokens == max(len(shaped(ids)) for ids in theirs.values())
        for layer, ids in theirs.items():
            assert ours.ids[layer].dtype == spec.table(layer).id_dtype
            assert ours.ids[layer].shape == shaped(ids).shape
            assert np.array_equal(ours.ids[layer], shaped(ids))


def test_every_byte_is_accounted_for_and_none_is_of_a_token(spec, tmp_path):
    batch = batch_of(range(1000, 1040), True)
    write(tmp_path / "stream", spec, ("tokens", batch, (1, 14)))
    line, _, body = (tmp_path / "stream").read_bytes().partition(b"\n")
    assert json.loads(line) == {
        "format": "engrampool-record",
        "format_version": 2,
        "model": spec.name,
        "version": "some-version",
        "spec_digest": spec.digest,
        "ids": {"1": "uint32", "14": "uint32"},
    }
    parts = []
    for layer, ids in spec.hash(batch).items():
        parts += [struct.pack("<III", layer, HEADS, 40 * HEADS), ids.tobytes()]
    # All that depends on the tokens are the ids that the server is sent as well.
    assert body == lookup_of(b"".join(parts), 2, *struct.unpack("<d", body[:8]))
    assert 0 <= struct.unpack("<d", body[:8])[0] < 60


class SlowDisk:
    """Files that `private_files.create` makes, which take nothing before `go`."""

    def __init__(self, monkeypatch):
        self.go, self._create = threading.Event(), private_files.create
        monkeypatch.setattr(private_files, "create", self._open)

    def _open(self, path, buffering):
        self._file = self._create(path, buffering)
        return self

    def write(self, data):
        assert self.go.wait(30)
        return self._file.write(data)

    def close(self):
        self._file.close()


def test_arrays_may_be_overwritten_at_once(spec, tmp_path, monkeypatch):
    disk = SlowDisk(monkeypatch)
    recorder = Recorder(tmp_path / "stream", spec, "v")
    ids = np.full((2, HEADS), 5)
    recorder.rows({1: ids})
    ids[:] = 6
    disk.go.set()
    recorder.close()
    (found,) = Recording(tmp_path / "stream")
    assert (found.ids[1] == 5).all()


def test_what_a_lookup_is_refused_for_is_not_recorded(spec, tmp_path):
    good = {14: np.array([3])}
    recorder = write(
        tmp_path / "stream",
        spec,
        ("tokens", batch_of([VOCAB], False), (1,)),
        ("rows", {1: np.array([-1])}, ()),
        ("rows", {1: np.array([spec.table(1).num_rows])}, ()),
        ("rows", {1: np.array([0.5])}, ()),
        ("rows", {1: np.array(4)}, ()),
        ("rows", {1: [4], 14: np.array([4])}, ()),
        ("rows", good, ()),
    )
    assert recorder.dropped == 0
    assert [dict(each.ids) for each in Recording(tmp_path / "stream")] == [good]


def test_nothing_is_waited_for_and_what_there_is_no_room_for_is_counted(spec, tmp_path, monkeypatch, caplog):
    disk = SlowDisk(monkeypatch)
    recorder = Recorder(tmp_path / "stream", spec, "v", max_waiting_bytes=1000)
    recorder.rows({1: np.full(500, 1)})  # alone it may be larger than all that may wait
    recorder.rows({1: np.full(1, 2)})
    assert recorder.dropped == 1
    disk.go.set()
    recorder.close()
    recorder.rows({1: np.full(1, 3)})  # closed: neither written nor counted
    recorder.close()
    assert recorder.dropped == 1
    assert [each.ids[1][0] for each in Recording(tmp_path / "stream")] == [1]
    assert "lacks 1 lookups (the disk was too slow)" in caplog.text


def test_room_is_given_back_once_written(spec, tmp_path):
    recorder = Recorder(tmp_path / "stream", spec, "v", max_waiting_bytes=1000)
    for value in range(5):
        recorder.rows({1: np.full(100, value)})
        written(recorder)
    recorder.close()
    assert recorder.dropped == 0
    assert [each.ids[1][0] for each in Recording(tmp_path / "stream")] == list(range(5))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_costs_no_lookup(server, caplog):
    tokens = np.arange(3000, dtype=np.int32)
    with Client(server, record="/dev/full") as full, Client(server) as plain:
        for _ in range(3):
            found, wanted = full.lookup(tokens), plain.lookup(tokens)
            assert all(np.array_equal(found[layer], wanted[layer]) for layer in wanted)
    assert "/dev/full lacks" in caplog.text
    assert "No space left on device" in caplog.text


def test_nothing_is_written_behind_a_gap(spec, tmp_path, monkeypatch):
    """A disk that has room again later: the file ends where it was full."""
    taken, error = [], OSError(28, "No space left on device")

    class Disk:
        def __init__(self):
            self.full = False

        def write(self, data):
            if self.full:
                self.full = False
                raise error
            taken.append(bytes(data))
            return len(data)

        def close(self):
            raise error

    disk = Disk()
    monkeypatch.setattr(private_files, "create", lambda _, buffering: disk)
    recorder = Recorder(tmp_path / "stream", spec, "v")
    recorder.rows({1: np.array([1])})
    written(recorder)
    before = len(taken)
    disk.full = True
    recorder.rows({1: np.array([2])})
    written(recorder)
    recorder.rows({1: np.array([3])})
    recorder.close()
    assert (len(taken), recorder.dropped, recorder.error) == (before, 2, error)


def test_a_client_records_lookups_of_every_kind(server, spec, tmp_path):
    tokens = np.arange(40, dtype=np.int32)
    rows = {14: np.arange(2 * HEADS).reshape(2, HEADS)}
    with Client(server, record=tmp_path / "stream") as client:
        client.lookup(tokens)
        client.prefetch(tokens[:7], layers=[14]).wait()
        client.lookup_rows(rows)
        client.prefetch_rows(rows).wait()
        with pytest.raises(BatchError):
            client.lookup([VOCAB])
    recording = Recording(tmp_path / "stream")
    assert recording.version == client.version
    wanted = [spec.hash(TokenBatch.of(tokens)), spec.hash(TokenBatch.of(tokens[:7]), [14]), rows, rows]
    found = [each.ids for each in recording.of(spec)]
    assert [sorted(each) for each in found] == [[1, 14], [14], [14], [14]]
    for ours, theirs in zip(found, wanted, strict=True):
        assert all(np.array_equal(ours[layer], theirs[layer]) for layer in theirs)


@pytest.fixture(scope="module")
def whole(spec, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "stream"
    write(path, spec, *[("tokens", batch_of(range(start, start + 4), False), (1, 14)) for start in range(5)])
    return path.read_bytes()


@given(st.data())
def test_of_a_file_cut_anywhere_the_whole_lookups_are_read(whole, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("cut") / "stream"
    header = whole.index(b"\n") + 1
    path.write_bytes(whole)
    wanted = list(Recording(path))
    size = (len(whole) - header) // 5
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    if cut < header:
        with pytest.raises(RecordError, match="is no recording of row ids"):
            Recording(path)
        return
    found = list(Recording(path))
    assert len(found) == (cut - header) // size
    for ours, theirs in zip(found, wanted, strict=False):
        assert all(np.array_equal(ours.ids[layer], theirs.ids[layer]) for layer in (1, 14))


@given(st.data())
def test_of_a_damaged_file_nothing_is_read_but_what_was_written_before_the_damage(whole, tmp_path_factory, data):
    path = tmp_path_factory.mktemp("garbage") / "stream"
    path.write_bytes(whole)
    wanted = list(Recording(path))
    header = whole.index(b"\n") + 1
    at = data.draw(st.one_of(st.integers(0, len(whole) - 1), st.integers(header, len(whole) - 1)))
    garbage = data.draw(st.one_of(st.binary(min_size=1, max_size=40), st.just(bytes([whole[at] ^ 1]))))
    damaged = whole[:at] + garbage + whole[at + len(garbage) :]
    path.write_bytes(damaged)
    found = []
    with suppress(RecordError):
        for each in Recording(path):
            found.append(each)
    for ours, theirs in zip(found, wanted, strict=False):
        assert all(np.array_equal(ours.ids[layer], theirs.ids[layer]) for layer in (1, 14))
    if at >= header and damaged[: len(whole)] != whole:
        assert len(found) == (at - header) // ((len(whole) - header) // 5)
        with pytest.raises(RecordError, match=f"damaged: lookup {len(found)} is not what was written"):
            list(Recording(path))


def test_that_a_file_was_cut_short_is_said(whole, tmp_path, caplog):
    path = tmp_path / "stream"
    path.write_bytes(whole)
    assert len(list(Recording(path))) == 5
    assert caplog.messages == []
    path.write_bytes(whole[:-1])
    assert len(list(Recording(path))) == 4
    assert "stream ends within a lookup" in caplog.text


@pytest.mark.parametrize("bad", [0, 7])
def test_ids_that_the_tables_have_not_are_said(spec, whole, tmp_path, bad):
    ids = np.zeros(8, "<u4")
    ids[bad] = spec.table(1).num_rows
    path = tmp_path / "stream"
    path.write_bytes(whole + lookup_of(struct.pack("<III", 1, 0, 8) + ids.tobytes(), 1))
    assert len(list(Recording(path))) == 6
    with pytest.raises(RecordError, match=rf"damaged: row id {ids[bad]} at position {bad} of layer 1 is not in 0"):
        list(Recording(path).of(spec))


@pytest.mark.parametrize("before", [None, 0o644])
def test_only_its_owner_may_read_it_from_the_first_byte_on(spec, tmp_path, before):
    path = tmp_path / "stream"
    if before is not None:
        path.touch()
        path.chmod(before)
    umask = os.umask(0)
    try:
        recorder = Recorder(path, spec, "v")
        mode = path.stat().st_mode
        recorder.close()
    finally:
        os.umask(umask)
    assert stat.S_IMODE(mode) == stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "begin",
    [
        b"",
        b"\n",
        b"null\n",
        b"[" * 100_000 + b"\n",
        b'{"format": "engrampool-record", "format_version": 3}\n',
        b'{"format": "engrampool-record", "format_version": 2}\n',
        b'{"format": "engrampool-record", "format_version": 2, "model": "m", "version": "v", "spec_digest": "d", '
        b'"ids": {"1": "object"}}\n',
        b'{"format": "engrampool-record", "format_version": 2, "model": "m", "version": "v", "spec_digest": "d", '
        b'"ids": {"one": "uint32"}}\n',
        b'{"format": "engrampool-record", "format_version": 2, "model": "m", "version": "v", "spec_digest": "d", '
        b'"ids": 4}\n',
        b"\x93NUMPY\x01\x00",
    ],
)
def test_what_is_no_recording_is_refused(tmp_path, begin):
    path = tmp_path / "stream"
    path.write_bytes(begin)
    with pytest.raises(RecordError, match=r"stream is no recording of row ids .*make one with Client\(record=\.\.\.\)"):
        Recording(path)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (lookup_of(b"", 3), "3 layers in 0 bytes"),
        (lookup_of(bytes(13), 0), "0 layers in 13 bytes"),
        (lookup_of(struct.pack("<III", 5, 0, 0), 1), "a record has layer 5, the model has not"),
        (lookup_of(struct.pack("<IIIIII", 1, 0, 0, 1, 0, 0), 2), "a record has layer 1, twice"),
        (lookup_of(struct.pack("<IIIII", 1, 3, 2, 0, 0), 1), "2 ids in rows of 3, in 8 bytes"),
        (lookup_of(struct.pack("<III", 1, 0, 2**32 - 1) + bytes(100), 1), "4294967295 ids in rows of 0, in 100 bytes"),
    ],
)
def test_what_no_recorder_writes_is_said(whole, tmp_path, body, text):
    path = tmp_path / "stream"
    path.write_bytes(whole + body)
    found = iter(Recording(path))
    for _ in range(5):
        next(found)
    with pytest.raises(RecordError, match=text):
        next(found)


def test_a_length_beyond_the_file_takes_no_memory(whole, tmp_path):
    path = tmp_path / "stream"
    start = struct.pack("<dIQQ", 0, 1, 2**62, 0)
    path.write_bytes(whole + start + struct.pack("<Q", xxhash.xxh3_64_intdigest(start)) + bytes(100))
    assert len(list(Recording(path))) == 5


def test_files_that_cannot_be_opened(spec, server, tmp_path):
    with pytest.raises(RecordError, match="absent cannot be read: No such file"):
        Recording(tmp_path / "absent")
    with pytest.raises(RecordError, match="cannot be written to: No such file"):
        Recorder(tmp_path / "no" / "stream", spec, "v")
    with pytest.raises(RecordError, match="cannot be written to: Is a directory"):
        Client(server, record=tmp_path)


def test_another_models_recording_names_both(spec, whole, tmp_path):
    path = tmp_path / "stream"
    path.write_bytes(whole.replace(spec.digest.encode(), b"0" * len(spec.digest)))
    with pytest.raises(RecordError, match=rf"specification {'0' * len(spec.digest)}; .* specification {spec.digest}"):
        list(Recording(path).of(spec))
