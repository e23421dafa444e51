"""Rows read in this process, where the server's tables lie in memory of this machine that they can be mapped from.

gRPC says where that is, and for how long it may be read without asking again (docs/PROTOCOL.md). The other lanes are
always there beside this one: whatever is wrong with it, `ask` says that the rows are to be asked for elsewhere, and
the tables are asked for again later, on a thread of its own.
"""

import ctypes
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from stat import S_ISREG
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_client.compute.forms import NUMPY, Form
from engrampool_client.compute.served import ServedModel
from engrampool_client.errors import (
    DeadlineError,
    EngrampoolError,
    OverloadedError,
    PoolError,
    SpecError,
    UnavailableError,
)
from engrampool_client.event import Event
from engrampool_client.lanes.split import SideBySide
from engrampool_client.lookup.exchange import Exchange
from engrampool_client.lookup.small import Small
from engrampool_client.lookup.workers import Workers
from engrampool_proto import frames, wire
from engrampool_proto.segment import TRAILER_BYTES, Identity, boot_id, read_trailer
from engrampool_proto.tiers.link import EmulatedLink
from engrampool_proto.tiers.tier import Tier
from engrampool_proto.v1 import pool_pb2

# How long the server may take to answer; a lookup never waits for it.
_ASK_TIMEOUT_S = 1.0
# A lease is renewed so many times before it would end, if it is of a sensible length.
_RENEWALS = 4
_LEAST_PAUSE_S = 0.05
# Between tries while there is none.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
# Rows copied between two looks at whether they are still wanted: some milliseconds of work.
_PIECE_BYTES = 8 << 20
# So many are worth the waking of a thread.
_PART_BYTES = 1 << 20
# Pages put into the process's page table by one call: a millisecond or so.
_TOUCH_BYTES = 16 << 20
_MADV_POPULATE_READ = 22
_log = logging.getLogger("engrampool")
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class _NotHereError(EngrampoolError):
    """What the server offers is not on this machine, not for this user, or not what it says."""


@dataclass(frozen=True, eq=False)
class _Table:
    """A table that is mapped, for as long as somebody refers to its rows.

    offer: of the server. rows: uint8 [n, row_bytes], read-only: those from offer.row_start on. dtype: of row ids.
    """

    offer: pool_pb2.MappedTable
    rows: npt.NDArray[np.uint8]
    dtype: np.dtype[Any]


class _Gather:
    """Rows that are here. work: (layer, ids, table) of each."""

    def __init__(
        self,
        lane: "AttachLane",
        exchange: Exchange,
        work: Sequence[tuple[int, npt.NDArray[Any], _Table]],
        deadline: float,
    ) -> None:
        self._lane, self._exchange, self._work, self._deadline = lane, exchange, work, deadline

    def receive(self) -> bool:
        """See `Request`. Copies every row to where it belongs."""
        begin = time.perf_counter()
        exchange, landing, link = self._exchange, self._exchange.landing, self._lane.link
        total = sum(len(ids) * table.rows.shape[1] for _, ids, table in self._work)
        reading = None if link is None else link.read(total, self._deadline)
        for layer, ids, table in sorted(self._work, key=itemgetter(0)):
            row_bytes = table.rows.shape[1]
            count = max(1, _PIECE_BYTES // row_bytes)
            for first in range(0, len(ids), count):
                some = ids[first : first + count]
                nbytes = len(some) * row_bytes
                place, start_s = landing.destination(layer, first, nbytes), time.monotonic()
                self._copy(table, some, np.frombuffer(place, np.uint8).reshape(-1, row_bytes))
                if reading is not None and not reading.wait(nbytes, start_s, self._ways(nbytes)):
                    raise DeadlineError(f"the rows are not there by the deadline ({reading.tier}, emulated)")
                landing.received(layer, nbytes)
                landing.hand_over()
        took_us = round((time.perf_counter() - begin) * 1e6)
        exchange.times = wire.ServerTimes(0, took_us, took_us)
        landing.check_complete()
        if (trace := exchange.delivery.trace) is not None:
            at = time.monotonic() - took_us / 1e6
            trace.asked(self._lane.target, "attached", total, at=at).answered(exchange.times, None)
        return True

    def _copy(self, table: _Table, ids: npt.NDArray[Any], out: npt.NDArray[np.uint8]) -> None:
        """Copy rows, in several threads where there are enough of them."""
        lane = self._lane
        ways = self._ways(out.nbytes)
        if lane.threads is None or ways < 2:
            self._copy_part(table, ids, out)
            return
        cuts = [len(ids) * way // ways for way in range(ways + 1)]
        with SideBySide(lane.threads, self._exchange.delivery) as others:
            for start, stop in pairwise(cuts[1:]):
                others.begin(self._copy_part, table, ids[start:stop], out[start:stop])
            self._copy_part(table, ids[: cuts[1]], out[: cuts[1]])

    def _ways(self, nbytes: int) -> int:
        """Threads that copy so many bytes."""
        return 1 if self._lane.threads is None else max(1, min(self._lane.ways, nbytes // _PART_BYTES))

    def _copy_part(self, table: _Table, ids: npt.NDArray[Any], out: npt.NDArray[np.uint8]) -> None:
        with self._exchange.delivery.writing():
            self._lane.form.gather(table.rows, ids, table.offer.row_start, out)

    def abandon(self) -> None:
        """See `Request`. Nothing has begun."""


@dataclass(frozen=True, eq=False)
class _Lease:
    """Tables by layer, and until when they may be read, by time.monotonic."""

    tables: Mapping[int, _Table]
    until: float


class AttachLane:
    """The tables of one version of a model, mapped into this process while the server lets it. Thread-safe.

    attach: asks the server for them, within so many seconds; raises PoolError. form: what copies rows. threads: for
    parts of large lookups, of which there are `ways` at most, one in the caller's thread. emulate: a tier whose
    memory is emulated. target: the server, for traces.
    reason: why nothing is attached, for people; "" while it is.
    """

    def __init__(
        self,
        attach: Callable[[float], pool_pb2.AttachResponse],
        served: ServedModel,
        form: Form = NUMPY,
        threads: Workers | None = None,
        ways: int = 1,
        emulate: str | None = None,
        target: str = "",
    ) -> None:
        self.link = None if emulate is None else EmulatedLink(Tier.of(emulate))
        self._attach, self._served, self.target = attach, served, target
        self.form, self.threads, self.ways = form, threads, ways
        # Replaced as a whole, and read once by whoever needs it: a gather keeps the memory that it reads.
        self._lease: _Lease | None = None
        self._closed = Event()
        self.reason = ""
        self._interval_s, self._pause_s = 0.0, _FIRST_PAUSE_S
        self._touching: Iterator[bool] = iter(())
        self._ask_at = 0.0
        self._ask()  # here and now, so that the first lookup finds the tables
        self._keeper = threading.Thread(target=self._keep, name="engrampool-attach", daemon=True)
        self._keeper.start()

    @property
    def attached(self) -> bool:
        """Whether `ask` has tables to read."""
        return self._current() is not None

    def ask(self, exchange: Exchange, deadline: float, *, spin_s: float = 0.0) -> "_Gather | None":
        """See `Lane`. None if tables or rows of them are not attached, or if tokens are asked for."""
        lease, asked = self._current(), exchange.asked_tables
        if lease is None or asked is None:
            return None
        missing = dict(exchange.landing.missing())
        work = []
        for layer, ids in asked:
            if layer in missing:
                table = lease.tables.get(layer)
                if table is None or not self.form.holds(ids, table.offer.row_start, table.offer.row_stop):
                    return None
                work.append((layer, ids, table))
        return _Gather(self, exchange, work, deadline)

    def read(self, small: Small) -> wire.ServerTimes | None:
        """Copy the rows of a small lookup to where they belong, here and now; None if they are not attached.

        What does not lie in memory takes longer than anybody may hold the GIL: `ask` has another way for that.
        """
        lease = self._current()
        if lease is None or self.link is not None:  # nobody sleeps in the caller's thread
            return None
        begin, at = time.perf_counter(), 0
        for layer, count in zip(small.rows, small.counts.tolist(), strict=True):
            table = lease.tables.get(layer)
            if table is None or not table.offer.in_memory:
                return None
            nbytes = count * table.dtype.itemsize
            ids = small.ids[at : at + nbytes].view(table.dtype)
            at += frames.padded(nbytes)
            if not self.form.gather_held(table.rows, ids, table.offer.row_start, small.rows[layer]):
                return None
        took_us = round((time.perf_counter() - begin) * 1e6)
        times = wire.ServerTimes(0, took_us, took_us)
        if small.trace is not None:
            since = time.monotonic() - took_us / 1e6
            small.trace.asked(self.target, "attached", small.nbytes, at=since).answered(times, None)
        return times

    def forked(self) -> None:
        """See `Lane`. Mapped memory is there in the child as well."""

    def stop(self) -> None:
        """Let go of the tables, without waiting for what is asked; `close` is to follow."""
        self._closed.set()
        self._lease = None

    def close(self) -> None:
        """Let go of the tables. Gathers under way end as they would have."""
        self.stop()
        # In time even where the system does not answer, as a network file system may not.
        self._keeper.join(2 * _ASK_TIMEOUT_S)

    def _current(self) -> _Lease | None:
        lease = self._lease
        # Looked at here, too, since the keeper may come late: a process that was stopped goes on with any thread first.
        return lease if lease is not None and time.monotonic() < lease.until else None

    # --- the keeper's

    def _keep(self) -> None:
        while not self._closed.is_set():
            try:
                if time.monotonic() < self._ask_at and next(self._touching, False):
                    continue
                if not self._closed.wait(max(0.0, self._ask_at - time.monotonic())):
                    self._ask()
            except Exception as error:  # keeping goes on whatever happens: nobody else attaches again
                _log.exception("attaching failed, and is tried again")
                self._go_without(_NotHereError(f"attaching failed: {error!r}"), at_once=True)
        self._touching = iter(())

    def _ask(self) -> None:
        """Attach, stay attached or let go, by what the server says; and settle when to ask again."""
        asked = time.monotonic()
        try:
            answer = self._attach(_ASK_TIMEOUT_S)
            tables = self._mapped(answer)
        except (UnavailableError, DeadlineError, OverloadedError) as error:
            self._go_without(error, at_once=False)
        except (PoolError, _NotHereError) as error:
            self._go_without(error, at_once=True)
        except Exception:
            if not self._closed.is_set():  # gRPC has its own ways to say that a channel is closed
                raise
        else:
            valid_s = answer.valid_ms / 1e3
            self._lease, self.reason = _Lease(tables, asked + valid_s), ""
            if self._closed.is_set():  # just now
                self._lease = None
            self._interval_s, self._pause_s = max(_LEAST_PAUSE_S, valid_s / _RENEWALS), _FIRST_PAUSE_S
            self._ask_at = asked + self._interval_s

    def _go_without(self, error: EngrampoolError, *, at_once: bool) -> None:
        """None was given now: what was given before ends, at once or when it would anyway; and try again later."""
        now, lease = time.monotonic(), self._current()
        if lease is not None and not at_once:
            self._ask_at = min(now + self._interval_s, lease.until)
            return
        self._lease, self._touching, self.reason = None, iter(()), str(error)
        self._ask_at = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def _mapped(self, answer: pool_pb2.AttachResponse) -> dict[int, _Table]:
        """The tables offered, by layer; those that are mapped already stay so. Raises _NotHereError."""
        if not boot_id() or answer.boot_id != boot_id():
            raise _NotHereError("the server runs on another machine, or under another kernel")
        held = {} if self._lease is None else self._lease.tables
        same = {offer.layer: held[offer.layer] for offer in answer.tables if _is(held.get(offer.layer), offer)}
        new = {offer.layer: _map(offer, self._served) for offer in answer.tables if offer.layer not in same}
        if new:
            self._touching = _touch([*same.values(), *new.values()])
        return same | new


def _is(table: _Table | None, offer: pool_pb2.MappedTable) -> bool:
    # An inode's number is not given to another file while we hold this one.
    return table is not None and table.offer == offer


def _map(offer: pool_pb2.MappedTable, served: ServedModel) -> _Table:
    """Raises _NotHereError unless the file is there, may be read, and says that it is what is offered."""
    try:
        spec = served.spec.table(offer.layer)
        if not offer.row_start < offer.row_stop <= spec.num_rows:
            raise _NotHereError(f"layer {offer.layer} has no rows {offer.row_start} .. {offer.row_stop}")
        count = offer.row_stop - offer.row_start
        wanted = Identity(served.spec.name, served.version, offer.layer, count, spec.row_bytes, offer.row_start)
        # Looked at before it is opened, too: to open some things is to use them.
        _check_file(os.lstat(offer.path), offer)
        descriptor = os.open(offer.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            _check_file(os.fstat(descriptor), offer)
            found = read_trailer(os.pread(descriptor, TRAILER_BYTES, offer.size - TRAILER_BYTES))
            if found != wanted or wanted.nbytes + TRAILER_BYTES > offer.size:
                raise _NotHereError(f"{offer.path} says that it is {found}, and not {wanted}")
            memory = mmap.mmap(descriptor, offer.size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
    except (SpecError, OSError, ValueError) as error:  # ValueError: a path that no file can have
        raise _NotHereError(f"{offer.path} cannot be mapped: {error}") from error
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    rows = np.frombuffer(memory, np.uint8, wanted.nbytes).reshape(-1, spec.row_bytes)
    return _Table(offer, rows, np.dtype(spec.id_dtype))


def _check_file(status: os.stat_result, offer: pool_pb2.MappedTable) -> None:
    found = (status.st_dev, status.st_ino, status.st_size)
    if not S_ISREG(status.st_mode) or found != (offer.device, offer.inode, offer.size):
        raise _NotHereError(f"{offer.path} is another file here than the server's")


def _touch(tables: Iterable[_Table]) -> Iterator[bool]:
    """Have the pages of what lies in memory put into this process's page table, so that no lookup waits for that.

    Piece by piece, True after each. An older kernel (before Linux 5.14) refuses; then lookups do it.
    """
    for table in tables:
        if table.offer.in_memory:
            start, nbytes = table.rows.ctypes.data, table.rows.nbytes
            for at in range(0, nbytes, _TOUCH_BYTES):
                if _LIBC.madvise(start + at, min(_TOUCH_BYTES, nbytes - at), _MADV_POPULATE_READ):
                    return
                yield True
