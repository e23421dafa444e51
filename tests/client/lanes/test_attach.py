"""The client's side of attached tables: against a real server's memory, and against answers that no server gives."""

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrampool_client import Client
from engrampool_client.compute.forms import form_of
from engrampool_client.compute.layout import Layout
from engrampool_client.compute.served import ServedModel, choose
from engrampool_client.errors import (
    DeadlineError,
    OverloadedError,
    PoolError,
    ProtocolError,
    StepCancelledError,
    UnavailableError,
    UnknownModelError,
    UnknownVersionError,
)
from engrampool_client.lanes import attach as lane_module
from engrampool_client.lanes.attach import AttachLane
from engrampool_client.lanes.grpc import GrpcLane
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.exchange import Exchange
from engrampool_client.lookup.plan import Planner
from engrampool_client.lookup.query import TokenQuery, token_batch
from engrampool_client.lookup.workers import Workers
from engrampool_proto.segment import TRAILER_BYTES, Identity, boot_id, write_trailer
from engrampool_proto.synthetic import synthetic_rows
from engrampool_proto.v1 import pool_pb2
from exchanges import exchange_of
from server_fixtures import LIMIT_S, SPEC, Running, eventually, expected, pack, running

pytestmark = pytest.mark.usefixtures("patient")
VERSION = "0123456789abcdef" * 2
SERVED = ServedModel(SPEC, VERSION, max_rows=10**6, max_answer_bytes=10**9, server_version="", attach=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    packed = pack(tmp_path_factory.mktemp("attach") / "small")
    with running(packed, memory=f"file:{tmp_path_factory.mktemp('segments')}") as run:
        yield run


@pytest.fixture(scope="module")
def attached(server: Running) -> Iterator[AttachLane]:
    grpc_lane = GrpcLane(server.address)
    served = choose(grpc_lane.describe(LIMIT_S), None, None)
    made = AttachLane(lambda timeout_s: grpc_lane.attach("small", served.version, timeout_s), served)
    assert made.attached, made.reason
    yield made
    made.close()
    grpc_lane.close()


class Asked:
    """What a lane asks, and is answered by `answer`: a response, an error to raise, or a function that gives either."""

    def __init__(self, answer: object) -> None:
        self.answer = answer
        self.times: list[float] = []

    def __call__(self, timeout_s: float) -> pool_pb2.AttachResponse:
        self.times.append(time.monotonic())
        answer = self.answer() if callable(self.answer) else self.answer
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, pool_pb2.AttachResponse)
        return answer

    def wait_asked(self, more: int) -> None:
        """Until it was asked so many times from now on, and what the last but one was told has been heeded."""
        wanted = len(self.times) + more
        eventually(lambda: len(self.times) >= wanted, "asked again")


def segment(
    directory: Path, layer: int, /, start: int = 0, stop: int | None = None, flip: int = 0, **trailer: object
) -> pool_pb2.MappedTable:
    """A segment of SPEC's rows as a server would offer it. flip: changes every byte. trailer: says something else."""
    spec = SPEC.table(layer)
    stop = spec.num_rows if stop is None else stop
    rows = synthetic_rows(spec, np.arange(start, stop, dtype=np.uint64)) ^ np.uint8(flip)
    says = {"model": SPEC.name, "version": VERSION, "layer": layer, "num_rows": stop - start, "row_start": start}
    says |= trailer
    path = directory / f"segment-{layer}-{start}-{flip}"
    path.write_bytes(rows.tobytes() + write_trailer(Identity(**{"row_bytes": spec.row_bytes} | says)))
    return offer(path, layer, start, stop)


def offer(path: Path, layer: int, start: int, stop: int) -> pool_pb2.MappedTable:
    status = path.lstat()
    return pool_pb2.MappedTable(
        layer=layer,
        path=str(path),
        device=status.st_dev,
        inode=status.st_ino,
        size=status.st_size,
        row_start=start,
        row_stop=stop,
        in_memory=True,
    )


def answer(*tables: pool_pb2.MappedTable, valid_ms: int = 60_000) -> pool_pb2.AttachResponse:
    return pool_pb2.AttachResponse(tables=tables, valid_ms=valid_ms, boot_id=boot_id())


@pytest.fixture
def whole(tmp_path: Path) -> list[pool_pb2.MappedTable]:
    return [segment(tmp_path, layer) for layer in SPEC.layers]


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[object], tuple[AttachLane, Asked]]]:
    """Makes lanes that ask often, and closes them, however long their keepers take to hear of it."""
    monkeypatch.setattr(lane_module, "_RENEWALS", 100_000)  # so the pauses are the least that there are
    monkeypatch.setattr(lane_module, "_LEAST_PAUSE_S", 0.005)
    monkeypatch.setattr(lane_module, "_FIRST_PAUSE_S", 0.005)
    monkeypatch.setattr(lane_module, "_LONGEST_PAUSE_S", 0.02)
    made = []

    def make(answer: object) -> tuple[AttachLane, Asked]:
        asked = Asked(answer)
        made.append(AttachLane(asked, SERVED))
        return made[-1], asked

    yield make
    for one in made:
        one.close()
        assert not one._keeper.is_alive()


def ask(lane: AttachLane, ids: dict[int, object], out: dict[int, np.ndarray] | None = None) -> dict[int, bytes] | None:
    """The rows' bytes by layer, None if the lane does not have them."""
    exchange = exchange_of(SERVED, ids, out)
    step = exchange.delivery
    exchange.landing.hand_over()
    if not fetch(lane, exchange):
        assert not exchange.landing.complete
        return None
    assert exchange.landing.complete
    assert exchange.times is not None
    return {layer: step.rows[layer].tobytes() for layer in step.layers}


def fetch(lane: AttachLane, exchange: Exchange) -> bool:
    request = lane.ask(exchange, inf)
    return request is not None and request.receive()


def unmapped(*tables: pool_pb2.MappedTable) -> bool:
    gc.collect()
    return not any(map(mapped, tables))


def mapped(table: pool_pb2.MappedTable) -> bool:
    # By its path, too: a file that is gone, and still mapped, may have left its number to this one.
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    of_files = {(int(line[4]), line[5].removesuffix(" (deleted)")) for line in lines if len(line) == 6}
    return (table.inode, table.path) in of_files


# --- rows


@pytest.mark.parametrize("count", [0, 1, 24, 1500, 20_000])
@pytest.mark.parametrize("given_out", [False, True])
@pytest.mark.parametrize("piece_bytes", [1, 5000, 8 << 20])
def test_rows_are_those_of_the_server(attached, monkeypatch, count, given_out, piece_bytes):
    if piece_bytes == 1:
        count //= 10  # a row at a time
    monkeypatch.setattr(lane_module, "_PIECE_BYTES", piece_bytes)
    rng = np.random.default_rng(count)
    ids = {2: rng.integers(0, 6500, (count, 2)), 9: rng.integers(0, 4100, count)}
    out = {2: np.zeros((count, 2, 264), np.uint8), 9: np.zeros((count, 42), np.uint8)} if given_out else None
    wanted = {layer: expected(layer, one.reshape(-1)) for layer, one in ids.items()}
    assert ask(attached, ids, out) == wanted
    if out is not None:
        assert {layer: array.tobytes() for layer, array in out.items()} == wanted


@given(st.lists(st.integers(0, 6499), min_size=1, max_size=50), st.lists(st.integers(0, 4099), max_size=50))
def test_any_rows(attached, wide, narrow):
    ids = {2: np.array(wide), 9: np.array(narrow, np.int64)}
    assert ask(attached, ids) == {2: expected(2, wide), 9: expected(9, narrow)}


def test_every_row(attached):
    ids = {table.layer: np.arange(table.num_rows) for table in SPEC.tables}
    assert ask(attached, ids) == {layer: expected(layer, one) for layer, one in ids.items()}


def test_layers_are_told_one_by_one_the_first_one_first(attached, monkeypatch):
    step, told = Delivery([2, 9]), []
    monkeypatch.setattr(step, "arrived", lambda rows: told.append([(at, rows[at].tobytes()) for at in rows]))
    exchange = exchange_of(SERVED, {9: np.array([1, 2]), 2: np.array([3])}, delivery=step)
    assert fetch(attached, exchange)
    assert told == [[(2, expected(2, [3]))], [(9, expected(9, [1, 2]))]]


def test_what_came_before_is_not_fetched_again(attached):
    exchange = exchange_of(SERVED, {2: np.array([1]), 9: np.array([2])})
    exchange.landing.destination(2, 0, 264)[:] = bytes(264)  # as if by another lane
    exchange.landing.received(2, 264)
    exchange.restart()
    assert fetch(attached, exchange)
    assert exchange.delivery.rows[2].tobytes() == bytes(264)
    assert exchange.delivery.rows[9].tobytes() == expected(9, [2])


def test_parts_of_a_split_lookup(attached):
    ids = np.arange(6000)
    exchange = exchange_of(SERVED, {2: ids})
    step = exchange.delivery
    for part in exchange.split(3):
        assert not step.rows
        assert fetch(attached, part)
    assert step.rows[2].tobytes() == expected(2, ids)


def test_tokens_are_for_the_server_to_hash(attached):
    planner = Planner(SERVED, Layout(SPEC, None), "server", True, None, None, 1)
    exchange = planner.exchange(Delivery([2, 9]), TokenQuery(SPEC, token_batch([1, 2, 3]), [2, 9]))
    assert not fetch(attached, exchange)
    assert exchange.landing._have == {2: 0, 9: 0}


def test_many_threads_at_once(attached):
    failed = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(30):
            ids = rng.integers(0, 6500, 700)
            if ask(attached, {2: ids}) != {2: expected(2, ids)}:
                failed.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_a_step_that_is_given_up_is_not_written_any_more(attached, monkeypatch):
    monkeypatch.setattr(lane_module, "_PIECE_BYTES", 264 * 10)
    out = np.zeros((100, 264), np.uint8)
    exchange = exchange_of(SERVED, {2: np.arange(100)}, {2: out})
    received = exchange.landing.received

    def received_then_cancelled(layer: int, nbytes: int) -> None:
        received(layer, nbytes)
        if exchange.landing._have[2] == 30 * 264:
            exchange.delivery.give_up(StepCancelledError("cancelled"))

    monkeypatch.setattr(exchange.landing, "received", received_then_cancelled)
    with pytest.raises(StepCancelledError):
        fetch(attached, exchange)
    assert out[:30].tobytes() == expected(2, range(30))
    assert not out[30:].any()


def test_only_what_is_attached_is_answered(tmp_path, lane):
    made, _ = lane(answer(segment(tmp_path, 2, 1000, 1500)))
    assert made.attached
    for ids in ([1000], [1499], [1499, 1000, 1250]):
        assert ask(made, {2: ids}) == {2: expected(2, ids)}
    for ids in ([999], [1500], [1200, 6499], [0, 1200]):
        assert ask(made, {2: ids}) is None
    assert ask(made, {9: [1]}) is None
    assert ask(made, {2: [1000], 9: [1]}) is None
    assert ask(made, {2: [1000], 9: np.empty(0, np.int64)}) == {2: expected(2, [1000]), 9: b""}


# --- what is not attached


def other_file(offered: pool_pb2.MappedTable) -> None:
    offered.inode += 1


def other_device(offered: pool_pb2.MappedTable) -> None:
    offered.device += 1


def other_size(offered: pool_pb2.MappedTable) -> None:
    offered.size += 1


def grown(offered: pool_pb2.MappedTable) -> None:
    with Path(offered.path).open("ab") as file:
        file.write(b"\0")


def gone(offered: pool_pb2.MappedTable) -> None:
    Path(offered.path).unlink()


def link(offered: pool_pb2.MappedTable) -> None:
    Path(offered.path).rename(offered.path + "-target")
    Path(offered.path).symlink_to(offered.path + "-target")


def link_itself(offered: pool_pb2.MappedTable) -> None:
    link(offered)
    offered.CopyFrom(offer(Path(offered.path), 2, 0, 6500))


def pipe(offered: pool_pb2.MappedTable) -> None:
    Path(offered.path).unlink()
    os.mkfifo(offered.path)
    offered.CopyFrom(offer(Path(offered.path), 2, 0, 6500))


def directory(offered: pool_pb2.MappedTable) -> None:
    offered.CopyFrom(offer(Path(offered.path).parent, 2, 0, 6500))


def no_path(offered: pool_pb2.MappedTable) -> None:
    offered.path = ""


def no_name(offered: pool_pb2.MappedTable) -> None:
    offered.path = "/dev/shm/a\0b"


def damaged(offered: pool_pb2.MappedTable) -> None:
    with Path(offered.path).open("r+b") as file:
        file.seek(-TRAILER_BYTES + 40, os.SEEK_END)
        file.write(b"\0")


def no_trailer(offered: pool_pb2.MappedTable) -> None:
    os.truncate(offered.path, 6500 * 264)
    offered.CopyFrom(offer(Path(offered.path), 2, 0, 6500))


def too_short(offered: pool_pb2.MappedTable) -> None:
    os.truncate(offered.path, 100)
    offered.CopyFrom(offer(Path(offered.path), 2, 0, 6500))


def cut(offered: pool_pb2.MappedTable) -> None:
    """A row is missing before the trailer, which does not know."""
    raw = Path(offered.path).read_bytes()
    Path(offered.path).write_bytes(raw[264:])
    offered.CopyFrom(offer(Path(offered.path), 2, 0, 6500))


def no_layer(offered: pool_pb2.MappedTable) -> None:
    offered.layer = 3


def other_layer(offered: pool_pb2.MappedTable) -> None:
    offered.layer, offered.row_stop = 9, 4100


def too_many_rows(offered: pool_pb2.MappedTable) -> None:
    offered.row_start, offered.row_stop = 1, 6501


def backwards(offered: pool_pb2.MappedTable) -> None:
    offered.row_start, offered.row_stop = 5, 4


def no_rows(offered: pool_pb2.MappedTable) -> None:
    offered.row_stop = 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (other_file, "another file here"),
        (other_device, "another file here"),
        (other_size, "another file here"),
        (grown, "another file here"),
        (gone, "cannot be mapped"),
        (link, "another file here"),
        (link_itself, "another file here"),
        (pipe, "another file here"),
        (directory, "another file here"),
        (no_path, "cannot be mapped"),
        (no_name, "cannot be mapped"),
        (damaged, "says that it is None"),
        (no_trailer, "says that it is None"),
        (too_short, "cannot be mapped"),
        (cut, "says that it is Identity"),
        (no_layer, "layer 3"),
        (other_layer, "says that it is Identity"),
        (too_many_rows, "has no rows 1 .. 6501"),
        (backwards, "has no rows 5 .. 4"),
        (no_rows, "has no rows 0 .. 0"),
    ],
)
def test_what_is_not_the_servers_file_is_not_attached(tmp_path, lane, change, text):
    offered = segment(tmp_path, 2)
    change(offered)
    made, _ = lane(answer(offered, segment(tmp_path, 9)))
    assert not made.attached
    assert text in made.reason
    assert ask(made, {9: [1]}) is None


@pytest.mark.parametrize(
    "says",
    [
        {"model": "large"},
        {"version": "f" * 32},
        {"layer": 9},
        {"num_rows": 6499},
        {"num_rows": 6501},
        {"row_bytes": 42},
    ],
)
def test_a_segment_of_another_table_is_not_attached(tmp_path, lane, says):
    made, _ = lane(answer(segment(tmp_path, 2, **says)))
    assert not made.attached
    assert "says that it is Identity" in made.reason


def test_a_segment_that_may_not_be_read_is_not_attached(lane, whole, monkeypatch):
    monkeypatch.setattr(lane_module, "_FIRST_PAUSE_S", LIMIT_S)  # once is enough: each try maps the other one
    open_file = os.open

    def refuse(path, *arguments):
        if path == whole[1].path:
            raise PermissionError(13, "Permission denied")  # as root, who runs many a test, is never told
        return open_file(path, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    made, _ = lane(answer(*whole))
    assert not made.attached
    assert "Permission denied" in made.reason
    assert unmapped(whole[0])


def test_a_file_that_is_put_in_place_of_another_meanwhile_is_not_attached(tmp_path, lane, whole, monkeypatch):
    other, look = segment(tmp_path, 2, flip=255), os.lstat

    def look_and_replace(path):
        status = look(path)
        if path == whole[0].path and Path(other.path).exists():  # the keeper may look again
            Path(other.path).replace(path)
        return status

    monkeypatch.setattr(os, "lstat", look_and_replace)
    made, _ = lane(answer(*whole))
    assert not made.attached
    assert "another file here" in made.reason


@pytest.mark.parametrize("other", ["", "11111111-2222-3333-4444-555555555555"])
def test_under_another_kernel_nothing_is_looked_at(lane, whole, other):
    offered = answer(*whole)
    offered.boot_id = other
    made, _ = lane(offered)
    assert not made.attached
    assert "another machine" in made.reason


def test_keeping_goes_on_after_what_nobody_thought_of(lane, whole, caplog):
    made, asked = lane(answer(*whole))
    asked.answer = RuntimeError("what is this")
    asked.wait_asked(3)
    eventually(lambda: not made.attached)
    assert caplog.records  # logged before it was let go
    eventually(lambda: "what is this" in made.reason, "it says so")
    asked.answer = answer(*whole)
    eventually(lambda: made.attached)


def test_a_lease_of_no_time_is_none(lane, whole):
    made, asked = lane(answer(*whole, valid_ms=0))
    asked.wait_asked(3)
    assert not made.attached
    assert ask(made, {2: [1]}) is None


# --- for how long


@pytest.mark.parametrize(
    "error",
    [
        UnknownVersionError("not held", "unknown-version"),
        UnknownVersionError("no tables", "no-attach"),
        UnknownModelError("no model", "unknown-model"),
        ProtocolError("no such call"),
        PoolError("something else"),
    ],
)
def test_what_the_server_takes_back_is_let_go_at_once(lane, whole, error):
    made, asked = lane(answer(*whole))  # for a minute
    assert ask(made, {2: [5]}) == {2: expected(2, [5])}
    asked.answer = error
    eventually(lambda: not made.attached, "detached")
    eventually(lambda: made.reason == str(error), "it says why")
    assert ask(made, {2: [5]}) is None
    eventually(lambda: unmapped(*whole), "unmapped")
    asked.answer = answer(*whole)
    eventually(lambda: made.attached, "attached again")
    eventually(lambda: made.reason == "", "nothing is said against it")
    assert ask(made, {2: [5]}) == {2: expected(2, [5])}


@pytest.mark.parametrize("error", [UnavailableError("gone"), DeadlineError("silent"), OverloadedError("busy")])
def test_while_nobody_answers_the_lease_goes_on_and_ends(lane, whole, error):
    made, asked = lane(answer(*whole))
    asked.answer = error
    asked.wait_asked(5)
    assert made.attached
    asked.answer = answer(*whole, valid_ms=300)
    asked.wait_asked(2)
    asked.answer = error
    asked.wait_asked(2)
    eventually(lambda: not made.attached, "the lease ended")
    assert time.monotonic() - asked.times[0] >= 0.3
    eventually(lambda: made.reason == str(error), "let go")
    eventually(lambda: unmapped(*whole), "unmapped")
    asked.answer = answer(*whole)
    eventually(lambda: made.attached, "attached again")


def test_a_renewal_does_not_map_anew(lane, whole):
    made, asked = lane(answer(*whole))
    tables = dict(made._lease.tables)
    asked.wait_asked(3)
    assert made._lease.tables == tables  # compared by identity


def test_a_lease_ends_though_the_keeper_is_held_up(lane, whole):
    is_held, go_on = threading.Event(), threading.Event()
    made, asked = lane(answer(*whole, valid_ms=200))

    def held_up() -> Exception:
        is_held.set()
        assert go_on.wait(LIMIT_S)
        return UnavailableError("late")

    asked.answer = held_up
    assert is_held.wait(LIMIT_S)
    count = len(asked.times)
    eventually(lambda: not made.attached, "the lease ended")
    assert len(asked.times) == count
    assert made._lease is not None  # nobody has let go
    assert ask(made, {2: [1]}) is None
    go_on.set()


def test_pauses_grow_while_there_is_nothing(monkeypatch):
    pauses = (0.02, 0.04, 0.06, 0.06)
    monkeypatch.setattr(lane_module, "_FIRST_PAUSE_S", pauses[0])
    monkeypatch.setattr(lane_module, "_LONGEST_PAUSE_S", pauses[-1])
    asked = Asked(UnavailableError("down"))
    made = AttachLane(asked, SERVED)
    asked.wait_asked(len(pauses))
    made.close()
    gaps = np.diff(asked.times)
    assert all(gap >= pause for gap, pause in zip(gaps, pauses, strict=False))


def test_other_files_are_mapped_in_place_of_the_first(tmp_path, lane, whole):
    made, asked = lane(answer(*whole))
    rows = made._lease.tables[2].rows[7:]  # as a gather that is under way has them
    other = segment(tmp_path, 2, flip=255)
    Path(whole[0].path).unlink()
    asked.answer = answer(other, whole[1])
    flipped = bytes(byte ^ 255 for byte in expected(2, [7]))
    eventually(lambda: ask(made, {2: [7], 9: [7]}) == {2: flipped, 9: expected(9, [7])}, "the new file's rows")
    assert rows[0].tobytes() == expected(2, [7])
    assert mapped(whole[0])
    del rows
    eventually(lambda: not mapped(whole[0]), "unmapped with the last view")
    assert mapped(whole[1])


def test_a_gather_keeps_what_it_reads(lane, whole, monkeypatch):
    made, asked = lane(answer(*whole))
    gather, begun, go_on = made.form.gather, threading.Event(), threading.Event()

    def held_up(*arguments):
        begun.set()
        assert go_on.wait(LIMIT_S)
        gather(*arguments)

    monkeypatch.setattr(made.form, "gather", held_up)
    found = []
    thread = threading.Thread(target=lambda: found.append(ask(made, {2: [5]})))
    thread.start()
    assert begun.wait(LIMIT_S)
    asked.answer = UnknownVersionError("not held", "unknown-version")
    eventually(lambda: not made.attached, "detached")
    for table in whole:
        Path(table.path).unlink()
    go_on.set()
    thread.join()
    assert found == [{2: expected(2, [5])}]


@pytest.fixture(params=["on", "off"], ids=["kernels", "numpy"])
def side_by_side(request, server) -> Iterator[AttachLane]:
    """Copies parts of 64 KiB and more in three threads."""
    threads, grpc_lane = Workers(2, "parts"), GrpcLane(server.address)
    served = choose(grpc_lane.describe(LIMIT_S), None, None)
    attach = partial(grpc_lane.attach, "small", served.version)
    made = AttachLane(lambda timeout_s: attach(timeout_s), served, form_of(request.param), threads, 3)
    assert made.attached, made.reason
    yield made
    made.close()
    grpc_lane.close()
    threads.close()


@pytest.mark.parametrize("count", [1, 2, 500, 700, 40_000])
@pytest.mark.parametrize("given_out", [False, True])
def test_parts_are_copied_in_several_threads(side_by_side, monkeypatch, count, given_out):
    monkeypatch.setattr(lane_module, "_PART_BYTES", 64 << 10)
    rng = np.random.default_rng(count)
    ids = {2: rng.integers(0, 6500, count), 9: rng.integers(0, 4100, count)}
    out = {2: np.zeros((count, 264), np.uint8)} if given_out else None
    assert ask(side_by_side, ids, out) == {layer: expected(layer, some) for layer, some in ids.items()}
    exchange = exchange_of(SERVED, {2: ids[2]})
    exchange.asked = replace(exchange.asked, tables=((2, np.array([*ids[2], 6500], np.uint32)),))
    assert side_by_side.ask(exchange, inf) is None


def test_a_cancel_waits_for_all_parts_and_nothing_is_written_afterwards(side_by_side, monkeypatch):
    monkeypatch.setattr(lane_module, "_PART_BYTES", 64 << 10)
    gather, at_it, go_on = side_by_side.form.gather, threading.Semaphore(0), threading.Event()

    def held_up(*arguments):
        at_it.release()
        assert go_on.wait(LIMIT_S)
        gather(*arguments)

    monkeypatch.setattr(side_by_side.form, "gather", held_up)
    out = np.zeros((40_000, 264), np.uint8)
    exchange = exchange_of(SERVED, {2: np.arange(40_000) % 6500}, {2: out})
    failed = []

    def run() -> None:
        try:
            fetch(side_by_side, exchange)
        except StepCancelledError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(3):
        assert at_it.acquire(timeout=LIMIT_S)
    exchange.delivery.on_cancel(go_on.set)
    exchange.delivery.give_up(StepCancelledError("cancelled"))
    written = out.copy()
    thread.join()
    assert len(failed) == 1
    assert np.array_equal(out, written)


# --- the end


def test_once_closed_it_has_nothing(lane, whole):
    made, asked = lane(answer(*whole))
    assert mapped(whole[0])
    made.close()
    assert not made.attached
    assert ask(made, {2: [1]}) is None
    assert unmapped(*whole)
    asked.answer = ValueError("Cannot invoke RPC on closed channel!")
    made._ask()  # as if that had begun before
    asked.answer = answer(*whole)
    made._ask()
    assert not made.attached


def test_closing_does_not_wait_for_a_server_that_is_silent(monkeypatch, whole):
    monkeypatch.setattr(lane_module, "_ASK_TIMEOUT_S", 0.01)
    monkeypatch.setattr(lane_module, "_LEAST_PAUSE_S", 0.001)
    monkeypatch.setattr(lane_module, "_RENEWALS", 100_000)
    begun, go_on, asked = threading.Event(), threading.Event(), Asked(answer(*whole))
    made = AttachLane(asked, SERVED)

    def silent() -> pool_pb2.AttachResponse:
        begun.set()
        assert go_on.wait(LIMIT_S)
        return answer(*whole)

    asked.answer = silent
    assert begun.wait(LIMIT_S)
    made.close()
    assert made._keeper.is_alive()
    go_on.set()
    made._keeper.join(LIMIT_S)
    assert not made.attached
    assert unmapped(*whole)


# --- pages


def resident_bytes(table: pool_pb2.MappedTable) -> int:
    """Of its mappings, that are in the page table."""
    lines, found, at = Path("/proc/self/smaps").read_text().splitlines(), 0, False
    for line in lines:
        words = line.split()
        if not words[0].endswith(":"):
            at = int(words[4]) == table.inode
        elif at and words[0] == "Rss:":
            found += int(words[1]) * 1024
    return found


def test_pages_are_touched_ahead(lane, whole, monkeypatch):
    monkeypatch.setattr(lane_module, "_TOUCH_BYTES", 64 << 10)
    made, _ = lane(answer(*whole))
    wanted = [SPEC.table(table.layer).nbytes for table in whole]
    eventually(lambda: all(resident_bytes(table) >= size for table, size in zip(whole, wanted, strict=True)), "touched")
    assert made.attached


def test_what_is_let_go_is_not_touched_any_more(lane, whole, monkeypatch):
    def without_end(tables):
        held = list(tables)
        while held:
            yield True

    monkeypatch.setattr(lane_module, "_touch", without_end)
    made, asked = lane(answer(*whole))
    asked.wait_asked(2)  # in time, though there is more to touch
    asked.answer = UnknownVersionError("not held", "unknown-version")
    eventually(lambda: not made.attached, "detached")
    eventually(lambda: unmapped(*whole), "unmapped")


def test_what_would_be_read_from_a_disk_is_not_touched(tmp_path, lane, whole):
    on_disk = pool_pb2.MappedTable()
    on_disk.CopyFrom(whole[0])
    on_disk.in_memory = False
    assert list(lane_module._touch([lane_module._map(on_disk, SERVED)])) == []
    assert list(lane_module._touch([lane_module._map(whole[0], SERVED)])) == [True]


# --- over gRPC


def test_the_call_and_its_refusals(server):
    grpc_lane = GrpcLane(server.address)
    try:
        served = choose(grpc_lane.describe(LIMIT_S), None, None)
        assert served.attach
        assert [table.layer for table in grpc_lane.attach("small", served.version, LIMIT_S).tables] == [2, 9]
        with pytest.raises(UnknownModelError):
            grpc_lane.attach("large", served.version, LIMIT_S)
        with pytest.raises(UnknownVersionError) as raised:
            grpc_lane.attach("small", "f" * 32, LIMIT_S)
        assert raised.value.reason == "unknown-version"
    finally:
        grpc_lane.close()


def test_an_answer_that_cannot_be_read_is_a_protocol_error():
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: b"\xff")
    peer = grpc.server(ThreadPoolExecutor(1))
    peer.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("engrampool.v1.Pool", {"Attach": handler}),))
    port = peer.add_insecure_port("127.0.0.1:0")
    peer.start()
    grpc_lane = GrpcLane(f"127.0.0.1:{port}")
    try:
        with pytest.raises(ProtocolError, match="Attach was answered with something else"):
            grpc_lane.attach("small", VERSION, LIMIT_S)
    finally:
        grpc_lane.close()
        peer.stop(None).wait()


# --- the whole client


def looked_up(server: Running) -> float:
    """Lookups that the server answered, on any lane."""
    return sum(count for name, count in server.scrape().items() if name.startswith("engrampool_lookup_seconds_count"))


@pytest.mark.parametrize("given_out", [False, True])
def test_a_client_on_the_same_machine_asks_the_server_for_no_rows(server, given_out):
    ids = {2: np.arange(6500).reshape(-1, 2), 9: np.arange(4100)}
    out = {2: np.zeros((3250, 2, 264), np.uint8), 9: np.zeros((4100, 42), np.uint8)} if given_out else None
    with Client(server.address) as client, Client(server.address, attach="off") as asking:
        assert client.attached
        assert not asking.attached
        before = looked_up(server)
        rows = client.lookup_rows(ids, out=out)
        assert {layer: one.tobytes() for layer, one in rows.items()} == {
            layer: expected(layer, one.reshape(-1)) for layer, one in ids.items()
        }
        tokens = np.arange(900, dtype=np.int32)
        found = client.lookup(tokens)
        assert looked_up(server) == before
        wanted = asking.lookup(tokens)
        assert all(np.array_equal(rows, wanted[layer]) for layer, rows in found.items())
        eventually(lambda: looked_up(server) == before + 1, "the other one asked")
    with pytest.raises(ValueError, match="attach must be 'auto' or 'off'"):
        Client(server.address, attach="on")


def test_a_client_that_has_the_server_hash_asks_it(server):
    tokens = np.arange(900, dtype=np.int32)
    with Client(server.address, hashing="server") as client, Client(server.address) as local:
        before = looked_up(server)
        found = client.lookup(tokens)
        assert all(np.array_equal(rows, found[layer]) for layer, rows in local.lookup(tokens).items())
        eventually(lambda: looked_up(server) == before + 1, "asked once")


def test_a_client_that_is_refused_asks_as_it_would_have(tmp_path):
    packed = pack(tmp_path / "small")
    (tmp_path / "segments").mkdir()
    with running(packed, memory=f"file:{tmp_path / 'segments'}") as run, Client(run.address) as client:
        assert client.attached
        (held,) = run.server.lookups.held()
        for table in held.tables.values():
            object.__setattr__(table, "place", None)
        client._shards._sets[0].replicas[0]._attach._ask()  # as its keeper does before long
        assert not client.attached
        assert client.lookup_rows({2: np.array([5])})[2].tobytes() == expected(2, [5])
        eventually(lambda: looked_up(run) == 1, "asked once")
