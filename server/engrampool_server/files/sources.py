"""Where packed models lie: a directory of this machine, or one of an object store, read alike.

Object stores are read by obstore, which is imported when a URL is opened and not before. Credentials and endpoints are
those of its environment variables (AWS_*, GOOGLE_*, AZURE_*): a URL holds none, so that nothing which prints one tells
a secret. Nor does anything else here: of what a store says, only the status and the error's code are passed on.
"""

import os
import random
import re
import stat
import time
from collections.abc import Hashable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from engrampool_proto.errors import EngrampoolError, how_to_install

SCHEMES = ("s3", "gs", "az", "http", "https")
# How many blocks each loading thread should have asked for at a time. A file system is read ahead; a store answers each
# request only after its latency, and one connection rarely fills the network. bench/sources.py measures it.
STORE_READS_PER_THREAD = 8
# How long a read may make no progress, and what one request may take of that. Opening is given up sooner: at first it
# is more often a wrong name or address than an outage.
PATIENCE_S = 30.0
OPEN_PATIENCE_S = 5.0
READ_TIMEOUT = timedelta(seconds=10)
RETRY: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=10)}
_LONGEST_DELAY_S = 5.0
_HEAD_BYTES = 4096  # a table file's header, as a rule
# Of what a connection has received, at a time. From 64 KiB to 8 MiB speed is the same; what was not handed over
# yet when a connection breaks is asked for again.
CHUNK_BYTES = 256 << 10
_SECRETS = re.compile(r"""(?<=://)[^/@\s'"]*@|(?<=[^\s'"])\?[^\s'"]*""")
# What stands between two colons of a list, the colons of a URL apart.
_ENTRY = re.compile(r"(?:[A-Za-z0-9+.-]+://(?:[^/@]*@)?(?:\[[^]]*\]|[^/:]*)(?::[0-9]+)?)?[^:]*")


class SourceError(EngrampoolError):
    """A URL cannot be opened at all; the text says what to do."""


class ReadError(EngrampoolError):
    """Something cannot be read. The text is the reason alone, for a sentence that names the file."""


class NotThereError(ReadError):
    """There is no such file, directory or bucket."""


class NotPermittedError(ReadError):
    """This user may not read it."""


@dataclass(frozen=True)
class Url:
    """A directory of an object store, or a file in it: {s3,gs}://BUCKET/PATH, az://CONTAINER/PATH, http(s)://HOST/PATH.

    Raises ValueError for another scheme, no bucket or host, and for a user, password, query or fragment.
    """

    text: str

    def __post_init__(self) -> None:
        parts = urlsplit(self.text)
        if parts.scheme not in SCHEMES or not parts.hostname or "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(f"not a URL of {', '.join(SCHEMES)} without user, query and fragment")
        object.__setattr__(self, "text", self.text.rstrip("/"))

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> "Url":
        return Url(f"{self.text}/{name}")

    @property
    def name(self) -> str:
        """The last part of the path, as `Path.name`."""
        return self.text.rsplit("/", 1)[-1]


Location = Path | Url


def parse_location(text: str) -> Location:
    """A path, or the URL that `text` is; file://PATH is a path. Raises ValueError for a URL of another form."""
    if "://" not in text:
        return Path(text)
    parts = urlsplit(text)
    if parts.scheme != "file":
        return Url(text)
    if parts.netloc not in ("", "localhost") or not parts.path or parts.query or parts.fragment:
        raise ValueError("not file:///PATH")
    return Path(unquote(parts.path))


def split_locations(text: str) -> list[str]:
    """The entries of a list separated by colons, as PATH is; those of a URL before its path separate nothing."""
    entries, at = [], 0
    while at <= len(text):
        match = _ENTRY.match(text, at)
        assert match is not None  # it matches nothing, too
        entries.append(match[0])
        at = match.end() + 1
    return entries


def redact(text: str) -> str:
    """`text` without what its URLs might say in confidence: users, passwords, queries."""
    return _SECRETS.sub(lambda found: "***@" if found[0].endswith("@") else "?***", text) if "://" in text else text


class File(Protocol):
    """An open file. Reading is safe from several threads; to be closed after the last.

    size: its bytes. stamp: what is another once the file was replaced.
    """

    size: int
    stamp: Hashable

    def read(self, offset: int, out: memoryview) -> int:
        """Fill `out`, bytes, from byte `offset` on. Returns how many came: fewer only where the file ends.

        Raises ReadError.
        """

    def drop_cached(self, offset: int, length: int) -> None:
        """Have the page cache forget these bytes, where they came through one."""

    def close(self) -> None: ...  # noqa: D102


class Source(Protocol):
    """A directory, to be closed after its files. reads_per_thread: blocks that each thread should read at a time."""

    reads_per_thread: int

    def open(self, name: str) -> File:
        """Open a file. Raises ReadError."""

    def close(self) -> None: ...  # noqa: D102


def open_source(location: Location) -> Source:
    """The directory at `location`, which may not be there. Raises SourceError."""
    return _Store(location) if isinstance(location, Url) else _Directory(location)


# --- this machine


class _Directory:
    reads_per_thread = 1

    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self, name: str) -> "_LocalFile":
        path = self._path / name
        try:
            # Opening a pipe would wait for a writer.
            if not stat.S_ISREG(path.stat().st_mode):
                raise ReadError("not a regular file")
            return _LocalFile(os.open(path, os.O_RDONLY))
        except OSError as error:
            raise _read_error(error) from error

    def close(self) -> None:
        pass


class _LocalFile:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        status = os.fstat(descriptor)
        self.size = status.st_size
        self.stamp: Hashable = (status.st_ino, status.st_size, status.st_mtime_ns)

    def read(self, offset: int, out: memoryview) -> int:
        done = 0
        try:
            while done < len(out):
                count = os.preadv(self._descriptor, [out[done:]], offset + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            raise _read_error(error) from error
        return done

    def drop_cached(self, offset: int, length: int) -> None:
        os.posix_fadvise(self._descriptor, offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self._descriptor)


def _read_error(error: OSError) -> ReadError:
    if isinstance(error, PermissionError):
        return NotPermittedError(
            f"{error.strerror}: user {os.geteuid()} may not read it; change owner or mode of it, or of its directory"
        )
    kind = NotThereError if isinstance(error, FileNotFoundError | NotADirectoryError) else ReadError
    return kind(error.strerror)


# --- object stores


class _Store:
    """A directory of an object store. Requests that fail for a moment are made again, by obstore and by `_Object`."""

    reads_per_thread = STORE_READS_PER_THREAD

    def __init__(self, url: Url) -> None:
        try:
            import obstore
            import obstore.store
        except ImportError as error:
            raise SourceError(f"{url} needs obstore: {how_to_install('sources')}") from error
        parts = urlsplit(url.text)
        # An endpoint that is plain HTTP is one that somebody asked for by its name.
        options: Any = {"allow_http": True, "read_timeout": READ_TIMEOUT, "timeout": timedelta(minutes=5)}
        how: Any = {"client_options": options, "retry_config": RETRY}
        kinds: Any = {"s3": obstore.store.S3Store, "gs": obstore.store.GCSStore, "az": obstore.store.AzureStore}
        try:
            if parts.scheme in kinds:
                self._store: Any = kinds[parts.scheme](parts.netloc, prefix=parts.path.strip("/") or None, **how)
            else:
                self._store = obstore.store.HTTPStore.from_url(url.text, **how)
        except obstore.exceptions.BaseError as error:
            raise SourceError(f"{url} cannot be opened: {_reason(error)}") from error

    def open(self, name: str) -> "_Object":
        import obstore

        patience = _Patience(OPEN_PATIENCE_S)
        while True:
            try:
                # Not HEAD: its answer has no body to say what is wrong, and what we read first comes along.
                found = obstore.get(self._store, name, options={"range": (0, _HEAD_BYTES)})
                return _Object(self._store, name, found.meta, bytes(found.bytes()))
            except (obstore.exceptions.BaseError, OSError) as error:
                if _status(error) == 416:  # there are no bytes to give
                    return _Object(self._store, name, {"size": 0}, b"")
                patience.wait(error)

    def close(self) -> None:
        self._store = None  # with the last reference its connections are closed


class _Object:
    """One object, as it was when it was opened: once it was replaced, reading fails, where the store can tell.

    meta: what obstore says of it. head: its first bytes.
    """

    def __init__(self, store: Any, name: str, meta: Any, head: bytes) -> None:
        self._store, self._name, self._head = store, name, head
        self.size: int = meta["size"]
        e_tag: str | None = meta.get("e_tag")
        self.stamp: Hashable = (e_tag, self.size, meta.get("last_modified"))
        # A weak tag is equal for objects that are only alike, and no store takes one as a condition.
        self._condition = {} if e_tag is None or e_tag.startswith("W/") else {"if_match": e_tag}

    def read(self, offset: int, out: memoryview) -> int:
        """As `File.read`. What breaks off goes on where it did, for as long as something comes within PATIENCE_S."""
        import obstore

        wanted = max(0, min(len(out), self.size - offset))
        known = self._head[offset : offset + wanted]
        out[: len(known)] = known
        done = len(known)
        patience = _Patience(PATIENCE_S)
        while done < wanted:
            try:
                options: Any = {"range": (offset + done, offset + wanted), **self._condition}
                found = obstore.get(self._store, self._name, options=options)
                if found.meta["size"] != self.size:
                    raise ReadError(f"it was replaced meanwhile: {self.size} bytes then, {found.meta['size']} now")
                # Piece by piece as it comes: whole, it would lie in a buffer of its own first, for one more copy.
                for piece in found.stream(min_chunk_size=CHUNK_BYTES):
                    if len(piece) > wanted - done:
                        raise ReadError("the server sent more than was asked for")
                    out[done : done + len(piece)] = memoryview(piece)
                    done += len(piece)
                    patience.renew()
                if done < wanted:
                    raise ConnectionError("the answer was too short")
            except (obstore.exceptions.BaseError, OSError) as error:
                patience.wait(error)
        return done

    def drop_cached(self, offset: int, length: int) -> None:
        pass

    def close(self) -> None:
        self._store = None


class _Patience:
    """For how long to ask again: up to `limit_s` since something came."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self.renew()

    def renew(self) -> None:
        """Something came."""
        self._failures = 0
        self._deadline_s = time.monotonic() + self._limit_s

    def wait(self, error: Exception) -> None:
        """Sleep before the next try. Raises ReadError where there is to be none."""
        if not _is_passing(error):
            raise _store_error(error) from error
        if time.monotonic() >= self._deadline_s:
            raise ReadError(f"{_reason(error)}, for {self._limit_s:g} s") from error
        # Not all threads at the same moment: they failed together, most likely.
        time.sleep(min(0.1 * 2**self._failures, _LONGEST_DELAY_S) * random.uniform(0.5, 1))  # noqa: S311
        self._failures += 1


def _status(error: Exception) -> int | None:
    found = re.search(r"status code: ([0-9]{3})", str(error))
    return int(found[1]) if found else None


def _is_passing(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    import obstore

    status = _status(error)
    return isinstance(error, obstore.exceptions.GenericError | TimeoutError | ConnectionError) and (
        status is None or status >= 500 or status in (408, 429)
    )


def _store_error(error: Exception) -> ReadError:
    import obstore

    if isinstance(error, FileNotFoundError):
        return NotThereError(_reason(error))
    if isinstance(error, obstore.exceptions.PreconditionError):
        return ReadError(f"it was replaced while it was read ({_reason(error)})")
    return ReadError(_reason(error))


def _reason(error: Exception) -> str:
    """What a store answered, or why it did not. URLs and bodies may hold signatures, keys' names and tokens."""
    text = str(error).split("\n\nDebug source")[0]
    if "169.254." in text or "metadata.google" in text:
        return "no credentials were found in the environment, nor does this machine have any (see docs/OPERATIONS.md)"
    status = re.search(r"status code: ([0-9]{3}[ A-Za-z]*)", text)
    if status:
        code = re.search(r"<Code>([A-Za-z0-9]+)</Code>", text)
        return f"{status[1].strip()}, {code[1]}" if code else status[1].strip()
    return re.sub(r"[a-z0-9]+://\S+", "...", text.rsplit(" - ", 1)[-1]).strip()
