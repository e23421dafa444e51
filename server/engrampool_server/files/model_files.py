"""Reads what packed models and patches have in common: a manifest, safetensors files, checksums over all they hold."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from engrampool_server.files.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, IsPatchError, TableFileError
from engrampool_server.files.safetensors_header import HeaderError, Tensor, header_of
from engrampool_server.files.sources import (
    File,
    Location,
    NotPermittedError,
    NotThereError,
    ReadError,
    Source,
    open_source,
)
from engrampool_server.files.staging import JOURNAL_NAME, PARTIAL_SUFFIX

# check(scratch): read a block into `scratch`, uint8 of its size; raises TableFileError if it is damaged.
Check = Callable[[npt.NDArray[np.uint8]], None]
Decoded = TypeVar("Decoded")

_ADVICE = "copy it again from where it was packed, or pack the model again"
_REPLACED = f"{MANIFEST_NAME} was replaced since it was read, so another model is being put in its place; start again"


class ModelFiles(ABC):
    """The open files of a packed model or patch. Reading is safe from several threads; `close` it after the last.

    directory: where they lie, here or in an object store.
    reads_per_thread: how many blocks each thread should read at a time, more than one where that takes waiting.
    """

    def __init__(self, directory: Location, source: Source, stamp: Hashable, opened: dict[str, File]) -> None:
        self.directory = directory
        self.reads_per_thread = source.reads_per_thread
        self._source, self._stamp, self._opened = source, stamp, opened

    @abstractmethod
    def checks(self) -> Sequence[tuple[int, Check]]:
        """For each block the bytes it has, and what reads it into scratch memory of this size and checks it."""

    def fill(self, name: str, pieces: Sequence[tuple[int, memoryview]], checksum: str, what: str) -> None:
        """Fill each piece from its byte of the file `name` on. checksum: of all of them together; what: for errors.

        Raises TableFileError if they cannot be read or have another checksum.
        """
        file = self._opened.get(name)
        if file is None:
            raise TableFileError(f"{self.directory} was closed before {what} was read")
        found = self._read(file, name, pieces, what)
        if found != checksum and not isinstance(self.directory, Path):
            found = self._read(file, name, pieces, what)  # it may have been damaged on its way, or by a proxy
        if found != checksum:
            raise self.damaged(name, f"{what} has checksum {found}, the manifest says {checksum}")

    def _read(self, file: File, name: str, pieces: Sequence[tuple[int, memoryview]], what: str) -> str:
        """The checksum of what was read."""
        hasher = xxhash.xxh3_64()
        for offset, out in pieces:
            try:
                missing = len(out) - file.read(offset, out)
            except ReadError as error:
                raise self.damaged(name, f"{what} cannot be read ({error})") from error
            if missing:
                raise self.damaged(name, f"{what} ends {missing} bytes too early")
            hasher.update(out)
        return hasher.hexdigest()

    def forget(self, name: str, offset: int, nbytes: int) -> None:
        """Have the page cache forget what was read of the file `name`."""
        self._opened[name].drop_cached(offset, nbytes)

    def damaged(self, name: str, problem: str) -> TableFileError:
        """The error for the file `name`; it says whether the file was replaced meanwhile."""
        advice = _REPLACED if self._replaced() else _ADVICE
        return TableFileError(f"{self.directory / name}: {problem}; {advice}")

    def _replaced(self) -> bool:
        """Whether the manifest is another by now, as far as can be found out."""
        try:
            with closing(self._source.open(MANIFEST_NAME)) as file:
                return file.stamp != self._stamp
        except ReadError as error:
            return isinstance(error, NotThereError)

    def close(self) -> None:
        """Close the files; no read may be under way. A second call does nothing."""
        _close(self._opened)
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_manifest(directory: Location, decode: Callable[[bytes], Decoded]) -> tuple[Source, Hashable, Decoded]:
    """The directory's source, the stamp of its manifest.json, and what `decode` makes of that.

    Raises TableFileError, SourceError. What `decode` raises is to be a TableFileError; it is told which file it was.
    """
    source = open_source(directory)
    # The journal goes only after the rename: until then even a directory with its manifest is unfinished.
    if directory.name.endswith(PARTIAL_SUFFIX):
        with suppress(NotThereError):
            source.open(JOURNAL_NAME).close()
            raise TableFileError(f"{directory} was not finished; run the command that began it again")
    path = directory / MANIFEST_NAME
    try:
        with closing(source.open(MANIFEST_NAME)) as file:
            stamp, raw = file.stamp, _read_head(file, MAX_MANIFEST_BYTES + 1)
    except NotThereError as error:
        raise TableFileError(
            f"{directory} is no packed model: there is no {MANIFEST_NAME} in it ({error}); see `engrampool pack`"
        ) from error
    except ReadError as error:
        raise TableFileError(f"{path} cannot be read: {error}") from error
    try:
        return source, stamp, decode(raw)
    except IsPatchError as error:
        raise IsPatchError(f"{directory} {error}") from error
    except TableFileError as error:
        raise TableFileError(f"{path} {error}; {_ADVICE}") from error


@dataclass(frozen=True)
class Wanted:
    """A file that a manifest names: the tensors it must have, no others, and what they are of, for errors."""

    name: str
    table: str
    tensors: Sequence[Tensor]


def open_files(source: Source, directory: Location, wanted: Sequence[Wanted]) -> dict[str, File]:
    """Open the files and compare size and header of each; by name. Raises TableFileError, with all closed again."""
    opened: dict[str, File] = {}
    try:
        with ThreadPoolExecutor(source.reads_per_thread, "open") as pool:
            # Where each takes a round trip or two, not one after the other.
            files = (map if source.reads_per_thread == 1 else pool.map)(partial(_open, source, directory), wanted)
            for one, file in zip(wanted, files, strict=True):
                opened[one.name] = file
    except BaseException:
        _close(opened)
        raise
    return opened


def _open(source: Source, directory: Location, expected: Wanted) -> File:
    path = directory / expected.name
    try:
        file = source.open(expected.name)
    except NotPermittedError as error:
        raise TableFileError(f"{path}, with {expected.table}, cannot be opened: {error}") from error
    except ReadError as error:
        raise TableFileError(f"{path}, with {expected.table}, cannot be opened: {error}; {_ADVICE}") from error

    try:
        found = header_of(file.size, lambda nbytes: _read_head(file, nbytes))
        if found != {tensor.name: tensor for tensor in expected.tensors}:
            raise HeaderError(f"holds {list(found.values())}, the manifest says {list(expected.tensors)}")
    except (HeaderError, ReadError) as error:
        file.close()
        raise TableFileError(f"{path} {error}; {_ADVICE}") from error
    return file


def _read_head(file: File, nbytes: int) -> bytes:
    raw = bytearray(min(file.size, nbytes))
    return bytes(raw[: file.read(0, memoryview(raw))])


def _close(opened: dict[str, File]) -> None:
    while opened:
        opened.popitem()[1].close()
