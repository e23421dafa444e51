"""The child processes of a process that forks: one loop looks after them, after signals, and after what is due.

Each child has a pipe on which it gives signs of life, and says how it is; see reports.py. One that falls silent is
killed, unless it has not come to its work yet and is seen to be busy. None of them outlives the process that started
it, however that one ends.
"""

import ctypes
import os
import selectors
import signal
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from typing import Any, NoReturn, TypeVar

from engrampool_proto.errors import EngrampoolError
from engrampool_server.processes.reports import GarbledError, Report, Reporter, ReportReader, shown
from engrampool_server.processes.stderr_pipe import StderrPipe
from engrampool_server.telemetry import log

# A child that ends soon after its start, again and again, is started less and less often.
_FIRST_DELAY_S, MAX_DELAY_S = 0.1, 10.0
_SETTLED_S = 30.0
_BEAT_S = 1.0
# Until a child is ready it has so long between two signs of life, and may show by its use of processors, too, that it
# is at work: it may have a slow disk or a far store to read, or a compiler to wait for. So little is no work.
START_TIMEOUT_S = 60.0
_BUSY_S = 1e-3
# But it may not go on like this for ever.
LONGEST_SILENCE_S = 1800.0
# Of one that ended, what a process that it left behind may still say is not waited for.
_LAST_READS = 64
# For work on a thread to end that nobody wants any more: it may be held up by a file system that does not answer.
GIVE_UP_S = 5.0
_LONGEST_WAIT_S = 3600.0
# For the log to be taken, before a process ends.
_LAST_LINES_S = 0.2
_PR_SET_PDEATHSIG = 1
_HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_SIGNALS = (*_HANDED_ON, signal.SIGCHLD)
_LIBC = ctypes.CDLL(None, use_errno=True)
_T = TypeVar("_T")


@dataclass(eq=False)
class Child:
    """role: what it does. index: what is started again in its place has the same. slot: see SharedState.

    report: its pipe, to read. stderr: its standard error.
    heard_s, ready_s: when it was last heard of (at first, forked), and ready. busy_s: when it was last seen to be at
    work, and cpu_s: how much it had done. kill_s: once it was told to end, when waiting for that is over. hung: it was
    killed because it was silent. is_garbled: what it said was not understood. failure: why it ended, as it said itself.
    status: how it ended.
    generation, loaded_bytes, of_bytes: for whoever started it to note of which state it is a fork, and how far it is.
    """

    role: str
    index: int
    slot: int
    pid: int
    report: int
    stderr: StderrPipe
    heard_s: float
    ready_s: float | None = None
    busy_s: float = 0.0
    cpu_s: float = 0.0
    kill_s: float | None = None
    hung: bool = False
    is_garbled: bool = False
    failure: str = ""
    status: str = ""
    generation: int = 0
    loaded_bytes: int = 0
    of_bytes: int = 0
    reports: ReportReader = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.reports = ReportReader(self.report)

    @property
    def why(self) -> str:
        """Why it ended, as well as that is known."""
        return self.failure or ("it gave no sign of life, and was killed" if self.hung else self.status)

    @property
    def name(self) -> int | str:
        """As the log has it."""
        return _name(self.role, self.index)


class Children(Collection[Child]):
    """Those that have not ended. To be used as a context, in the main thread: at its end none is left.

    timeout_s: how long a child that was ready may be silent.

    The others are called within `turn_until`, which raises what they raise. signalled: with SIGTERM, SIGINT or SIGHUP.
    said: with a child and what it reports; that it is ready, or why it failed, is noted by then. ended: with
    a child that is none of these any more. start: with an index that is due, see `start_again`. turned: after all that,
    each time; with a child that is well, about once a second.
    """

    def __init__(
        self,
        timeout_s: float,
        *,
        signalled: Callable[[signal.Signals], None],
        said: Callable[[Child, Report], None],
        ended: Callable[[Child], None],
        start: Callable[[int], None],
        turned: Callable[[], None] = lambda: None,
    ) -> None:
        self._timeout_s = timeout_s
        self._signalled, self._said, self._ended, self._start = signalled, said, ended, start
        self._turned = turned
        self._pid = os.getpid()
        self._by_pid: dict[int, Child] = {}
        # By index: when the next is started, and how long the last one had to wait for that.
        self._due_s: dict[int, float] = {}
        self._delay_s: dict[int, float] = {}
        self._turned_s = time.monotonic()
        self._has_thread = False
        self._handlers: dict[signal.Signals, Any] = {}
        self._selector = selectors.DefaultSelector()
        self._life_reader, self._life_writer = os.pipe()
        self._wake_reader, self._wake_writer = os.pipe()

    def __enter__(self) -> None:
        for end in (self._wake_reader, self._wake_writer):
            os.set_blocking(end, False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)
        signal.set_wakeup_fd(self._wake_writer, warn_on_full_buffer=False)
        for number in _SIGNALS:
            self._handlers[number] = signal.signal(number, lambda *_: None)  # the wake-up pipe has it

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None:  # that is still to be told, to somebody who may not listen: a signal is to end that
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
        for pid in self._by_pid:
            os.kill(pid, signal.SIGKILL)
        for pid in self._by_pid:
            os.waitpid(pid, 0)

    def __contains__(self, child: object) -> bool:
        return isinstance(child, Child) and self._by_pid.get(child.pid) is child

    def __iter__(self) -> Iterator[Child]:
        return iter(self._by_pid.values())

    def __len__(self) -> int:
        return len(self._by_pid)

    @property
    def has_thread(self) -> bool:
        """Whether `on_thread` has one: nobody forks then."""
        return self._has_thread

    def turn_until(self, done: Callable[[], bool], until_s: float = inf) -> None:
        """Look after signals and children until `done`, which is asked again after each of them, or until a time."""
        while not done() and time.monotonic() < until_s:
            due_s = min((until_s, *self._deadlines()))  # there may be no child at all
            wait_s = max(0.0, min(due_s - time.monotonic(), _LONGEST_WAIT_S))
            for key, _ in self._selector.select(wait_s):
                if key.data is None:
                    self._take_signals()
                elif isinstance(key.data, StderrPipe):
                    if key.data.reader >= 0 and not key.data.read():
                        self._close_stderr(key.data)
                elif key.data.report >= 0:  # it may have ended just now
                    self._hear(key.data)
            now = time.monotonic()
            if now > max(due_s, self._turned_s) + _BEAT_S:
                # We stood still ourselves, as when a whole container is frozen: that others were silent says nothing.
                for child in self:
                    child.heard_s = now
            self._turned_s = now
            self._keep_deadlines(now)
            self._turned()
            log.tend()

    def on_thread(self, work: Callable[[threading.Event], _T], is_off: Callable[[], bool]) -> _T | None:
        """What `work` gives, while children and signals are looked after; None once `is_off`.

        `work` is told so by the event. Raises what it raises.
        """
        cancel, finished = threading.Event(), threading.Event()
        results: list[_T] = []
        failures: list[BaseException] = []

        def run() -> None:
            try:
                results.append(work(cancel))
            except BaseException as error:
                failures.append(error)
            finally:
                finished.set()
                os.write(self._wake_writer, b"\0")

        thread = threading.Thread(target=run, name="load", daemon=True)
        self._has_thread = True
        thread.start()
        self.turn_until(lambda: is_off() or finished.is_set())
        cancel.set()
        # What is off is over, however long this takes.
        thread.join(GIVE_UP_S if is_off() else None)
        self._has_thread = thread.is_alive()
        if is_off():
            return None
        if failures:
            # Taken out: see table_loader.py of what an error keeps in memory.
            raise failures.pop()
        return results.pop()

    def _deadlines(self) -> Iterator[float]:
        for child in self:
            yield self._patient_until(child) if child.kill_s is None else child.kill_s
        if not self._has_thread:
            yield from self._due_s.values()

    def _patient_until(self, child: Child) -> float:
        if child.ready_s is not None:
            return child.heard_s + self._timeout_s
        return max(child.heard_s, child.busy_s) + START_TIMEOUT_S

    def _is_silent(self, child: Child, now: float) -> bool:
        """Whether a child's time is over, nothing that it said is unread, and nothing else speaks for it."""
        if now < self._patient_until(child):
            return False
        # One that was stopped itself, and goes on beyond its time, is told by `select` of nothing.
        if child.report >= 0:
            self._hear(child)
        return now >= self._patient_until(child) and not self._is_busy(child, now)

    def _is_busy(self, child: Child, now: float) -> bool:
        """Whether a child that has not come to its work yet, and is silent, did anything since this was asked last."""
        if child.ready_s is not None or now >= child.heard_s + LONGEST_SILENCE_S:
            return False
        cpu_s, before_s = _cpu_s(child.pid), child.cpu_s
        child.busy_s, child.cpu_s = now, cpu_s
        return cpu_s - before_s > _BUSY_S

    def _keep_deadlines(self, now: float) -> None:
        for child in list(self):
            if child.kill_s is None and self._is_silent(child, now):
                log.event(
                    "worker-hung",
                    level="error",
                    worker=child.name,
                    pid=child.pid,
                    silent_s=round(now - child.heard_s, 1),
                )
                child.hung, child.kill_s = True, now
            if child.kill_s is not None and now >= child.kill_s:
                self.kill(child)
        if not self._has_thread:  # a fork beside threads may take their locks along
            for index in [index for index, due_s in self._due_s.items() if now >= due_s]:
                del self._due_s[index]
                self._start(index)

    def _take_signals(self) -> None:
        with suppress(BlockingIOError):
            for number in os.read(self._wake_reader, 4096):
                if number in _HANDED_ON:
                    self._signalled(signal.Signals(number))
        # More than one child may have ended for one SIGCHLD.
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                child = self._by_pid.pop(ended[0], None)
                if child is not None:  # else an orphan of others, if we are the first process of a container
                    reads = 0
                    while reads < _LAST_READS and child.report >= 0 and self._hear(child):
                        reads += 1
                    self._close(child)
                    self._close_stderr(child.stderr)
                    code = os.waitstatus_to_exitcode(ended[1])
                    child.status = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                    self._ended(child)

    def _hear(self, child: Child) -> bool:
        """Read what there is on a child's pipe, or close it at its end. Whether there may be more."""
        try:
            lines = child.reports.read()
        except BlockingIOError:
            return False
        if lines is None:
            self._close(child)
            if child in self:  # it is ending, or can no longer be watched
                os.kill(child.pid, signal.SIGKILL)
            return False
        for line in lines:
            try:
                report = Report.of(line)
            except GarbledError as error:
                self._garbled(child, line, str(error))
                continue
            child.heard_s = time.monotonic()
            child.failure = report.failed or child.failure
            if report.ready:
                child.ready_s = time.monotonic()
            if line:
                self._said(child, report)
        return True

    def _close(self, child: Child) -> None:
        """Hear no more of a child."""
        if child.report < 0:
            return
        if child.reports.unread:
            self._garbled(child, child.reports.unread, "it has no end")
        self._selector.unregister(child.report)
        os.close(child.report)
        child.report = -1

    def _close_stderr(self, stderr: StderrPipe) -> None:
        if stderr.reader >= 0:
            self._selector.unregister(stderr.reader)
            stderr.close()

    def _garbled(self, child: Child, line: bytes, error: str) -> None:
        """Log, once for a child, that it says what cannot be understood. Such a line counts for nothing."""
        if not child.is_garbled:
            child.is_garbled = True
            said = shown(line)
            log.event("worker-garbled", level="error", worker=child.name, pid=child.pid, line=said, error=error)

    def fork(self, role: str, index: int, slot: int, work: Callable[[Reporter], None]) -> Child:
        """Start a child that does `work`, and ends with it. Raises OSError."""
        reader, writer = os.pipe()
        stderr = None
        # No signal may reach the child before it has handlers of its own.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            stderr = StderrPipe()
            pid = os.fork()
            if not pid:
                os.close(reader)
                os.set_blocking(writer, False)
                stderr.take_over()
                reporter = Reporter(self._life_reader, writer, min(_BEAT_S, self._timeout_s / 4))
                self._live(_name(role, index), reporter, work)
        except OSError:
            os.close(reader)
            if stderr is not None:
                stderr.leave()
            raise
        finally:
            os.close(writer)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.set_blocking(reader, False)
        stderr.listen(_name(role, index), pid)
        child = Child(role, index, slot, pid, reader, stderr, time.monotonic())
        self._by_pid[pid] = child
        self._selector.register(reader, selectors.EVENT_READ, child)
        self._selector.register(stderr.reader, selectors.EVENT_READ, stderr)
        return child

    def _live(self, name: int | str, reporter: Reporter, work: Callable[[Reporter], None]) -> NoReturn:
        """A child's life, from fork to end."""
        code = 1
        try:
            # Die with the parent, even if it is killed; `life` is for what happened before this call.
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != self._pid:
                os._exit(1)
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                # A terminal sends these two to all of us; what to do about them is the parent's to say.
                ignored = number in (signal.SIGINT, signal.SIGHUP)
                signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            self._selector.close()
            for end in (self._life_writer, self._wake_reader, self._wake_writer):
                os.close(end)
            for child in self:
                if child.report >= 0:  # else it is ending
                    os.close(child.report)
                child.stderr.leave()
            work(reporter)
            code = 0
        except EngrampoolError as error:
            reporter.failed(str(error))
        except BaseException as error:
            log.event("worker-failed", level="error", worker=name, error=traceback.format_exc())
            reporter.failed(repr(error))
        finally:
            log.tend(_LAST_LINES_S)
            os._exit(code)

    def start_again(self, child: Child) -> None:
        """Start another in place of one that ended, at once unless that happens again and again."""
        now, index = time.monotonic(), child.index
        if index not in self._delay_s or (child.ready_s is not None and now - child.ready_s >= _SETTLED_S):
            self._delay_s[index] = 0.0
        else:
            self._delay_s[index] = min(max(2 * self._delay_s[index], _FIRST_DELAY_S), MAX_DELAY_S)
        self._due_s[index] = now + self._delay_s[index]

    def start_later(self, index: int) -> None:
        """Start one that could not be forked now."""
        self._due_s[index] = time.monotonic() + MAX_DELAY_S

    def start_none(self) -> None:
        """Start none of those that are due."""
        self._due_s.clear()

    def stop(self, child: Child, within_s: float) -> None:
        """Have a child end by itself, and see to it that it does."""
        if child in self and child.kill_s is None:
            child.kill_s = time.monotonic() + within_s
            os.kill(child.pid, signal.SIGTERM)

    def kill(self, child: Child) -> None:
        """Have one of these end now."""
        child.kill_s = inf
        os.kill(child.pid, signal.SIGKILL)


def _name(role: str, index: int) -> int | str:
    return index if role == "worker" else role


def _cpu_s(pid: int) -> float:
    """CPU time of a process, all of its threads together; 0 where the system does not say."""
    try:
        # The clock of a process, as clock_getcpuclockid makes it.
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0
