"""Real servers for tests, as child processes: the program is started, none of its code is imported. And a fake lane.

The interpreter that runs the tests must have the extra `server`.
"""

import collections
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engrampool_client.lanes.fake import FakeLane
from engrampool_proto.errors import EngrampoolError

__all__ = ["FakeLane", "ServerProcess", "ServerStartError", "serve_process"]
_START_TIMEOUT_S = 60.0


class ServerStartError(EngrampoolError):
    """The server ended, or did not serve in time; the text has the last it said."""


@dataclass
class ServerProcess:
    """A running `engrampool serve`. address, metrics_address: "127.0.0.1:PORT". process: for signals and waiting."""

    process: subprocess.Popen[str]
    address: str = ""
    metrics_address: str = ""
    _events: list[dict[str, Any]] = field(default_factory=list)
    _tail: "collections.deque[str]" = field(default_factory=lambda: collections.deque(maxlen=20))
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _ended: bool = False

    def wait_for(self, event: str, timeout_s: float = _START_TIMEOUT_S) -> dict[str, Any]:
        """The first log line of that event, waiting for it. Raises ServerStartError if the server ends before."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._find(event) is not None, timeout_s)
            found = self._find(event)
            if found is None:
                raise ServerStartError(f"the server did not say {event!r} in {timeout_s} s: {' | '.join(self._tail)}")
            return found

    def wait_until(
        self, condition: Callable[[list[dict[str, Any]]], bool], timeout_s: float = _START_TIMEOUT_S
    ) -> None:
        """Wait until the log lines so far meet `condition`. Raises ServerStartError if the server ends before."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or condition(self._events), timeout_s)
            if not condition(self._events):
                raise ServerStartError(f"it did not come to that in {timeout_s} s: {' | '.join(self._tail)}")

    def wait_ended(self, timeout_s: float = _START_TIMEOUT_S) -> None:
        """Until all that it said was read, as it has ended. Raises ServerStartError if that takes longer."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended, timeout_s):
                raise ServerStartError(f"it did not end in {timeout_s} s: {' | '.join(self._tail)}")

    def said(self, event: str | None = None) -> list[dict[str, Any]]:
        """The log lines of that event so far, or those of all events."""
        with self._changed:
            return [line for line in self._events if event in (None, line["event"])]

    def worker_pids(self) -> dict[int, int]:
        """The process of each worker by its number, as the log last had it."""
        with self._changed:
            return {line["worker"]: line["pid"] for line in self._events if line["event"] == "worker-ready"}

    @property
    def last_lines(self) -> list[str]:
        """The last 20 lines that it wrote, whatever they are."""
        with self._changed:
            return list(self._tail)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop all of it by SIGSTOP within this: it takes connections, and answers nothing."""
        # The supervisor first: it would replace workers that are silent.
        processes = [self.process.pid, *self.worker_pids().values()]
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        try:
            for pid in processes:
                _await_stopped(pid)
            yield
        finally:
            for pid in reversed(processes):
                os.kill(pid, signal.SIGCONT)

    def _find(self, event: str) -> dict[str, Any] | None:
        return next((line for line in self._events if line["event"] == event), None)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for text in self.process.stderr:
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            with self._changed:
                self._tail.append(text.strip())
                if isinstance(line, dict) and "event" in line:
                    self._events.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


def start_program(command: Sequence[str], environ: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start a program whose standard error is text to be read. Another function in this place may do it cheaper."""
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)  # noqa: S603


def _await_stopped(pid: int) -> None:
    """Wait until every thread of a process that was sent SIGSTOP has stopped: each does so in its own time."""
    while any(_runs(one) for one in Path(f"/proc/{pid}/task").glob("*/stat")):
        time.sleep(0.001)


def _runs(state: Path) -> bool:
    try:
        return state.read_text().rpartition(")")[2].split()[0] not in "TtZX"
    except (FileNotFoundError, ProcessLookupError):  # it ended
        return False


@contextmanager
def serve_process(
    *models: Path | str,
    environ: Mapping[str, str] | None = None,
    ready: bool = True,
    prefix: Sequence[str] = (),
    **settings: Any,
) -> Iterator[ServerProcess]:
    """A server in a child process, on free ports of 127.0.0.1, stopped by SIGTERM (by SIGKILL if that takes too long).

    models: packed directories, or URLs of them; none with a registry. settings: flags of `engrampool serve`, such as
    gather_threads=2. ready: wait until it serves; else only until it runs. prefix: words before the command, of a
    program that becomes the server, as `nsenter` does. Raises ServerStartError.
    """
    flags = {"listen": "127.0.0.1:0", "metrics": "127.0.0.1:0", **settings}
    command = [*prefix, sys.executable, "-m", "engrampool_proto", "serve"]
    command += [word for path in models for word in ("--model", str(path))]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    process = start_program(command, {**os.environ, **(environ or {})})
    server = ServerProcess(process)
    reader = threading.Thread(target=server._read, daemon=True)
    reader.start()
    try:
        if ready:
            serving = server.wait_for("serving")
            server.address, server.metrics_address = serving["listen"], serving["metrics"]
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()
        assert process.stderr is not None
        process.stderr.close()
