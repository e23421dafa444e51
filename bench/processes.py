"""Child processes of the harness, which end with it, and what they cost."""

import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_TICKS = os.sysconf("SC_CLK_TCK")


class ChildError(Exception):
    """A child ended, or did not answer in time; the text has the last it said."""


class Child:
    """A script of this folder in a process group of its own; both sides speak in lines of JSON."""

    def __init__(self, process: "subprocess.Popen[str]", errors: IO[str]) -> None:
        self._process, self._errors = process, errors
        self.pid = process.pid

    def say(self, message: Any) -> None:
        """Send one line. Raises ChildError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ChildError(self.last_words() or "ended") from None

    def hear(self, timeout_s: float) -> Any:
        """The next line. Raises ChildError."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(timeout_s):
                raise ChildError(f"no answer within {timeout_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            self._process.wait(10)
            raise ChildError(self.last_words() or f"ended with {self._process.returncode}")
        return json.loads(line)

    def last_words(self) -> str:
        """The last line of its errors."""
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines else ""


@contextmanager
def child(script: str, *arguments: object) -> Iterator[Child]:
    """Run `script` of this folder until the block ends."""
    folder = Path(__file__).parent
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, str(folder / script), *map(str, arguments)],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            yield Child(process, errors)
        finally:
            assert process.stdin is not None
            assert process.stdout is not None
            with suppress(BrokenPipeError, subprocess.TimeoutExpired):
                process.stdin.close()
                process.wait(3)  # the end of its input ends it, unless it is measuring
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()


def die_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Have the kernel end this process when its parent ends, however that ends."""
    ctypes.CDLL(None).prctl(1, signal_number)  # PR_SET_PDEATHSIG


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for member in found:
        for path in Path(f"/proc/{member}/task").glob("*/children"):
            found += map(int, _read(path).split())
    return found


def cpu_s(pid: int) -> float:
    """User and system time of a process and its living descendants, and of the dead that were waited for."""
    total = 0.0
    for member in family(pid):
        fields = _read(Path(f"/proc/{member}/stat")).rpartition(")")[2].split()
        with suppress(OSError):  # it has ended
            # The clock of that process, as clock_getcpuclockid gives it: /proc has hundredths of a second only.
            total += time.clock_gettime(~member << 3 | 2) + sum(map(int, fields[13:15])) / _TICKS
    return total


def children_pss_bytes(pid: int) -> int:
    """Proportional set size of a process's descendants: pages that they share are counted once."""
    total = 0
    for member in family(pid)[1:]:
        for line in _read(Path(f"/proc/{member}/smaps_rollup")).splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
