"""A directory that is written as `OUT.partial` and renamed to OUT once it is whole.

A run that is killed leaves `OUT.partial` with a journal of the files that are finished and on disk; the same run
started again goes on from there.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engrampool_proto.errors import EngrampoolError

JOURNAL_NAME = "journal.json"
PARTIAL_SUFFIX = ".partial"
_DRAFT = ".draft"  # of a file that `_write_durably` has not put in place yet


class OutputError(EngrampoolError):
    """The output cannot be written: it exists, is being written, was begun from another source, or does not fit."""


class Staging:
    """`directory` is where to write; `finished` maps each file that needs no writing to its block checksums."""

    def __init__(self, out: Path, directory: Path, source: Mapping[str, Any], finished: dict[str, list[str]]) -> None:
        self.directory = directory
        self.finished = finished
        self._out = out
        self._source = source
        self._write_journal()

    def require_space(self, nbytes: int) -> None:
        """Raise OutputError if fewer than `nbytes` are free."""
        free = shutil.disk_usage(self.directory).free
        if free < nbytes:
            needed, there, lacking = (n / 2**30 for n in (nbytes, free, nbytes - free))
            raise OutputError(
                f"{self._out} needs {needed:.2f} GiB and its file system has {there:.2f} GiB free: "
                f"{lacking:.2f} GiB too little; free them, or choose another --out"
            )

    def record(self, name: str, checksums: Sequence[str]) -> None:
        """State that the file `name` is complete and synced."""
        self.finished[name] = list(checksums)
        self._write_journal()

    def _write_journal(self) -> None:
        self.write(JOURNAL_NAME, json.dumps({"source": self._source, "finished": self.finished}).encode())

    def write(self, name: str, data: bytes) -> None:
        """Put a whole small file in place, durably: afterwards either all of it is there or none."""
        draft = self.directory / f"{name}{_DRAFT}"
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.directory / name)
        _sync(self.directory)

    def publish(self) -> None:
        """Rename the directory to OUT. Everything in it must have been synced."""
        self.directory.rename(self._out)
        (self._out / JOURNAL_NAME).unlink()
        _sync(self._out.parent)


@contextmanager
def staging(out: Path, source: Mapping[str, Any]) -> Iterator[Staging]:
    """Begin `OUT.partial`, or take up the one that an interrupted run from the same `source` (JSON types) left.

    Raises OutputError if OUT exists, another process is writing it, or the source was another one. What leaves the
    `with` by an OSError becomes an OutputError that says how to go on.
    """
    _refuse_existing(out)
    directory = out.with_name(f"{out.name}{PARTIAL_SUFFIX}")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"another process is writing {directory}; wait for it, or end it") from error
        _refuse_existing(out)  # the process that held the lock may have published it
        finished = _take_up(directory, source)
        try:
            yield Staging(out, directory, source, finished)
        except BaseException as error:
            if not finished:  # nothing that a next run could go on from
                shutil.rmtree(directory, ignore_errors=True)
            if isinstance(error, OSError):
                raise OutputError(f"{out} is not finished: {error}; run the same command again to go on") from error
            raise
    finally:
        os.close(lock)


def _refuse_existing(out: Path) -> None:
    if os.path.lexists(out):
        raise OutputError(f"{out} exists already; remove it, or choose another --out")


def _take_up(directory: Path, source: Mapping[str, Any]) -> dict[str, list[str]]:
    """The journal's finished files. Whatever else lies there is half a file of the interrupted run, and removed."""
    entries = list(directory.iterdir())
    journal = directory / JOURNAL_NAME
    finished: dict[str, list[str]] = {}
    if journal in entries:
        try:
            document = json.loads(journal.read_bytes())
            begun, finished = dict(document["source"]), dict(document["finished"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise OutputError(f"{journal} is damaged; remove {directory} to start over") from error
        differing = [key for key in dict.fromkeys([*begun, *source]) if begun.get(key) != source.get(key)]
        if differing:
            raise OutputError(
                f"{directory} was begun by another run (its {', '.join(differing)} differs); remove it to start over"
            )
    elif any(entry.suffix != _DRAFT for entry in entries):
        raise OutputError(f"{directory} is in the way: no interrupted run left it; remove it, or choose another --out")
    for entry in entries:
        if entry != journal and entry.name not in finished:
            entry.unlink()
    present = {entry.name for entry in entries}
    return {name: checksums for name, checksums in finished.items() if name in present}


def _sync(directory: Path) -> None:
    """Make names in the directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
