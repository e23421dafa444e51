"""Ctrl-C, as tests have it come."""

import dis
import linecache
import sys

# On the way of a small step.
SMALL_STEPS = (
    *(
        "/client.py",
        "/run.py",
        "/work.py",
        "/sent.py",
        "/step.py",
        "/delivery.py",
        "/workers.py",
        "/shards.py",
        "/native.py",
    ),
    *("/streamed.py", "/together.py", "/raced.py", "/replicas.py", "/lookup/small.py", "/compute/cache.py"),
)
_LEAVES_EXCEPT = dis.opmap["POP_EXCEPT"]


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line that this thread runs in these files of the client's, once.

    Not where a `with` begins, or ends, nor at a `try`, where nothing is done: within a `with`, CPython 3.11 takes it
    for a place outside. There it would come before a lock is let go of, which Ctrl-C cannot. Nor where an `except` is
    left: there it would come before the exception is let go of, which CPython does without a look for signals. This
    thread would handle that one for good, and keep all that the frames below it refer to.
    """

    def __init__(self, at: int, files: tuple[str, ...] = SMALL_STEPS, never: tuple[str, ...] = ()) -> None:
        """never: nor at lines that begin with these."""
        self.left, self.raised, self.where = at, False, ""
        self._files, self._never = files, ("with ", "try:", *never)

    def __enter__(self) -> "Interrupt":
        sys.settrace(self._call)
        return self

    def __exit__(self, *_) -> None:
        sys.settrace(None)

    def _call(self, frame, event, arg):
        name = frame.f_code.co_filename
        return self._line if "/engrampool_client/" in name and name.endswith(self._files) else None

    def _line(self, frame, event, arg):
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        leaves = frame.f_code.co_code[frame.f_lasti] == _LEAVES_EXCEPT
        if event == "line" and not self.raised and not leaves and not line.lstrip().startswith(self._never):
            self.left -= 1
            if self.left < 0:
                self.raised, self.where = True, f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line
