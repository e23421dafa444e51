"""Clients of a cluster, each in a process of its own, and how they say they fare."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CLIENT = Path(__file__).with_name("integration") / "cluster_client.py"
# After so long something hangs.
_LIMIT_S = 150.0


class Load:
    """A client in a process of its own.

    said: how it goes, the last it told. slowest_s: its longest lookup so far; set it to 0.
    """

    def __init__(self, seed: int, targets: Sequence[str], prefix: Sequence[str], timeout_s: float) -> None:
        command = [*prefix, sys.executable, str(_CLIENT), str(seed), str(timeout_s), *targets]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        # Modules of tests are found beside this one.
        path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
        self.process = subprocess.Popen(command, env=environ, **pipes)
        self.said: dict[str, Any] = {"lookups": 0, "away": None, "open": [], "version": ""}
        self.slowest_s = 0.0
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            with self._changed:
                self.said = json.loads(line)
                self.slowest_s = max(self.slowest_s, self.said["slowest_s"])
                self._changed.notify_all()
        with self._changed:
            self.said = {**self.said, "ended": True}
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: "ended" in self.said or condition(self.said), _LIMIT_S), self.said
            assert "ended" not in self.said

    def answered(self, lookups: int) -> None:
        """Wait until it has made so many more."""
        until = self.said["lookups"] + lookups
        self.wait_for(lambda said: said["lookups"] >= until)

    def go_on(self, lookups: int = 5) -> None:
        """Wait until it has made so many more, with nobody away."""
        until = self.said["lookups"] + lookups
        self.wait_for(lambda said: said["lookups"] >= until and said["away"] == [])

    def end(self) -> dict[str, Any]:
        self.process.stdin.close()
        assert self.process.wait(_LIMIT_S) == 0
        self._reader.join()
        self.process.stdout.close()
        return self.said


@contextmanager
def loads(targets: Sequence[str], prefix: Sequence[str] = (), timeout_s: float = 60.0) -> Iterator[list[Load]]:
    """Two clients: the first on gRPC alone, the second with the direct lane. prefix: words before their command.

    timeout_s: of a lookup; as long as it is, one that fails was lost, and not only slow.
    """
    running = [Load(seed, targets, prefix, timeout_s) for seed in (0, 1)]
    try:
        yield running
    finally:
        for load in running:
            load.process.kill()
            load.process.wait()
