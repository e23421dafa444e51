"""Rows in a mapped file, and which of them can be believed."""

import logging
import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

_log = logging.getLogger("engrampool")


class FileRows:
    """Which rows of a mapped file are what was written: each is looked at when it is first found, and only then.

    rows: uint8 [rows, entry_bytes]. sums: uint64 [rows]. damaged: rows that were found to be other bytes.
    Of what is written over the file in place nothing is believed: `untouched` is to be asked before it is read.
    """

    def __init__(self, path: Path, descriptor: int, rows: npt.NDArray[np.uint8], sums: npt.NDArray[np.uint64]) -> None:
        self._path, self._rows, self._sums = path, rows, sums
        self._descriptor = os.dup(descriptor)
        weakref.finalize(self, os.close, self._descriptor)
        self._seen = self._stat()
        self._looked_at = np.zeros(len(rows), np.bool_)
        self._right = np.zeros(len(rows), np.bool_)
        self._touched = False
        self.damaged = 0

    def untouched(self) -> bool:
        """Whether the file is as long as it was when it was opened, and was last written to before."""
        if not self._touched and self._stat() != self._seen:
            self._touched = True
            _log.warning("%s was written to and is used no more: replace such a file by renaming", self._path)
        return not self._touched

    def right(self, rows: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which of these rows are what was written."""
        right = self._right.take(rows)
        if not right.all():
            unknown = rows[~self._looked_at.take(rows)]
            if len(unknown):
                self._look_at(list(dict.fromkeys(unknown.tolist())))
                right = self._right.take(rows)
        return right

    def _look_at(self, rows: list[int]) -> None:
        right = sums_of(self._rows[row] for row in rows) == self._sums.take(rows)
        self._looked_at[rows] = True
        self._right[rows] = right
        wrong = len(rows) - int(np.count_nonzero(right))
        if wrong and not self.damaged:
            _log.warning("%s is damaged; its wrong rows come from the server instead. Save it again", self._path)
        self.damaged += wrong

    def _stat(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns


def sums_of(rows: Iterable[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint64]:
    """xxh3-64 of each row, each contiguous."""
    return np.fromiter((xxhash.xxh3_64_intdigest(row.data) for row in rows), np.uint64)
