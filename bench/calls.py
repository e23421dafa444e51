"""How many Python functions one decode lookup calls, and in how many files: `python bench/calls.py`.

64 sequences of one token each, both layers of V4.1, the direct lane, no cache: once by `lookup`, in the caller's
thread, and once by `prefetch` and `rows` of each layer. Calls of all threads are counted. A figure is the median of the
steps, function by function, so that a thing which runs once a second does not show. Figures do not hang on the machine.
"""

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from engrampool_client import Client
from engrampool_client.testing import serve_process
from engrampool_server.files.synth import synth

SEQUENCES = 64
# A step's last work may come after its rows: what gives its memory back, say.
PAUSE_S = 0.02
_HOUSE = Path(__file__).resolve().parent.parent
_OURS = tuple(str(_HOUSE / room) + "/" for room in ("proto", "client", "server"))

Calls = Counter[tuple[str, str]]  # by file and function


class Counting:
    """Counts calls while it is switched on, in this thread and in those that start after it was made."""

    def __init__(self) -> None:
        self._calls: Calls | None = None
        threading.setprofile(self._event)
        sys.setprofile(self._event)

    def _event(self, frame: FrameType, event: str, _: Any) -> None:
        calls = self._calls
        if event == "call" and calls is not None and frame.f_code.co_filename != __file__:
            # A method that a dataclass makes has no file name of its own, but the globals of its module.
            file = frame.f_globals.get("__file__", frame.f_code.co_filename)
            calls[file, frame.f_code.co_qualname] += 1

    def of(self, step: Callable[[], object], steps: int) -> Calls:
        """The median of each function's calls."""
        counted = []
        for _ in range(steps):
            time.sleep(PAUSE_S)
            self._calls = calls = Counter()
            step()
            time.sleep(PAUSE_S)
            self._calls = None
            counted.append(calls)
        functions = {function for calls in counted for function in calls}
        medians = {function: statistics.median_low(calls[function] for calls in counted) for function in functions}
        return Counter({function: calls for function, calls in medians.items() if calls})


def report(title: str, calls: Calls, each: bool) -> None:
    """Print the table of one way."""
    files: Counter[str] = Counter()
    for (file, _), count in calls.items():
        files[file] += count
    ours = [file for file in files if file.startswith(_OURS)]
    total = sum(files[file] for file in ours)
    print(f"\n{title}: {calls.total()} calls, of them {total} in {len(ours)} files of ours")
    for file, count in sorted(files.items(), key=lambda item: (item[0] not in ours, -item[1], item[0])):
        name = file.removeprefix(str(_HOUSE) + "/") if file in ours else f"({Path(file).name}, none of ours)"
        print(f"{count:6}  {name}")
        if each:
            of_file = [(count, function) for (of, function), count in calls.items() if of == file]
            for count, function in sorted(of_file, key=lambda item: (-item[0], item[1])):
                print(f"{count:14}  {function}")


@contextmanager
def packed(given: Path | None) -> Iterator[Path]:
    """The model that was given, or one of V4.1's shape with few rows."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory() as directory:
        made = Path(directory) / "packed"
        synth("deepseek-v4.1", 1000, made)
        yield made


def main() -> None:
    """Count, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="a packed model of V4.1's shape; made if it is left out")
    parser.add_argument("--each", action="store_true", help="the functions of each file as well")
    parser.add_argument("--steps", type=int, default=20)
    chosen = parser.parse_args()
    tokens, bounds = np.arange(SEQUENCES, dtype=np.int32), np.arange(SEQUENCES + 1, dtype=np.int32)
    counting = Counting()
    with (
        packed(chosen.model) as model,
        serve_process(model, workers=1) as server,
        Client(server.address, attach="off", keep_memory=True) as client,
    ):
        lookback = np.zeros((SEQUENCES, client.spec.lookback), np.int32)

        def lookup() -> None:
            client.lookup(tokens, bounds, lookback)

        def prefetch() -> None:
            step = client.prefetch(tokens, bounds, lookback)
            for layer in step.layers:
                step.rows(layer)

        for title, step in (("lookup", lookup), ("prefetch and rows of each layer", prefetch)):
            for _ in range(8):
                step()
            report(title, counting.of(step, chosen.steps), chosen.each)
        assert client.status()["lane"] == "direct", "the direct lane was not used"


if __name__ == "__main__":
    main()
