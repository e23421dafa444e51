"""The kinds of value that a setting can have: how each is read from text or TOML, checked, and written as TOML."""

import ipaddress
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from engrampool_proto.registry.etcd_client import split_url
from engrampool_proto.sharding import MAX_SHARDS, is_shard_name, parse_shard
from engrampool_server.files.sources import SCHEMES, Location, Url, parse_location

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_UNITS = {"": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}
_SIZE = re.compile(r"([0-9]+) ?(|KiB|MiB|GiB|TiB)")
_HOST = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_ADDRESS = re.compile(rf"(?:\[(?P<ipv6>[^\]]+)\]|(?P<host>{_HOST})):(?P<port>[0-9]{{1,5}})")

_Number = TypeVar("_Number", int, float)


class Kind(Protocol):
    """What a setting's values can be.

    allowed: the range, for people.
    unit: what numbers count, "" for what is not a number.
    metavar: what a command line's help shows as the value; None for a flag that takes none.
    """

    @property
    def allowed(self) -> str: ...  # noqa: D102
    @property
    def unit(self) -> str: ...  # noqa: D102
    @property
    def metavar(self) -> str | None: ...  # noqa: D102

    def parse(self, value: Any) -> Any:
        """The value that text or TOML stands for; parsed values are returned as they are. Raises ValueError."""

    def toml(self, value: Any) -> str:
        """A parsed value as TOML that `parse` reads back."""


@dataclass(frozen=True)
class Integer:
    """low..high, both included."""

    low: int
    high: int
    unit: str
    metavar = "INTEGER"

    @property
    def allowed(self) -> str:
        """The range."""
        return f"{self.low}..{self.high} {self.unit}"

    def parse(self, value: Any) -> int:
        """From an integer or its digits."""
        # bool is an int to Python; to whoever wrote `load_threads = true` it is a mistake.
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError
        return _within(int(value), self.low, self.high)

    def toml(self, value: int) -> str:
        """Digits."""
        return str(value)


@dataclass(frozen=True)
class Size(Integer):
    """low..high bytes, as an integer or as text with a binary unit."""

    unit: str = "bytes"
    metavar = "SIZE"

    @property
    def allowed(self) -> str:
        """The range, and how to write a size."""
        return f'{format_size(self.low)}..{format_size(self.high)}, in bytes or as text such as "512MiB"'

    def parse(self, value: Any) -> int:
        """From bytes or text such as "2GiB"."""
        if isinstance(value, str):
            match = _SIZE.fullmatch(value)
            if not match:
                raise ValueError
            value = int(match[1]) * _UNITS[match[2]]
        return super().parse(value)

    def toml(self, value: int) -> str:
        """In the largest unit that divides it."""
        text = format_size(value)
        return text if text.isdigit() else f'"{text}"'


@dataclass(frozen=True)
class Seconds:
    """low..high, both included."""

    low: float
    high: float
    unit = "seconds"
    metavar = "SECONDS"

    @property
    def allowed(self) -> str:
        """The range."""
        return f"{self.low:g}..{self.high:g} seconds"

    def parse(self, value: Any) -> float:
        """From a number or its digits."""
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        return _within(float(value), self.low, self.high)

    def toml(self, value: float) -> str:
        """The shortest text of the same number."""
        return repr(value)


@dataclass(frozen=True)
class Choice:
    """One of several words."""

    choices: tuple[str, ...]
    unit = ""

    @property
    def allowed(self) -> str:
        """The words."""
        return ", ".join(self.choices)

    @property
    def metavar(self) -> str:
        """As click shows choices."""
        return f"[{'|'.join(self.choices)}]"

    def parse(self, value: Any) -> str:
        """Only the exact word."""
        if not isinstance(value, str) or value not in self.choices:
            raise ValueError
        return value

    def toml(self, value: str) -> str:
        """A string."""
        return _quote(value)


@dataclass(frozen=True)
class ChoiceOrFile(Choice):
    """One of several words, or "file:" and a directory."""

    @property
    def allowed(self) -> str:
        """The words, and the form."""
        return f"{super().allowed}, file:DIR"

    @property
    def metavar(self) -> str:
        """As click shows choices."""
        return f"[{'|'.join(self.choices)}|file:DIR]"

    def parse(self, value: Any) -> str:
        """Only the exact word, or any directory."""
        if isinstance(value, str) and value.startswith("file:"):
            return f"file:{_path(value.removeprefix('file:'))}"
        return super().parse(value)


@dataclass(frozen=True)
class Boolean:
    """True or false."""

    allowed = "true, false"
    unit = ""
    metavar = None

    def parse(self, value: Any) -> bool:
        """From a boolean, or one of the words true, false, 1 and 0 in any case."""
        words = {"true": True, "1": True, "false": False, "0": False}
        if isinstance(value, bool):
            return value
        if not isinstance(value, str) or value.lower() not in words:
            raise ValueError
        return words[value.lower()]

    def toml(self, value: bool) -> str:
        """True or false in TOML's lower case."""
        return str(value).lower()


@dataclass(frozen=True)
class Listen:
    """Where to listen, as gRPC takes it: a host name or address, and a port. Where they may be, also others.

    may_be_off: "off". may_be_unix: the path of a Unix socket.
    """

    may_be_off: bool = False
    may_be_unix: bool = False
    unit = ""
    metavar = "HOST:PORT"

    @property
    def allowed(self) -> str:
        """The form."""
        also = [word for may_be, word in ((self.may_be_unix, '"unix:PATH"'), (self.may_be_off, '"off"')) if may_be]
        return " or ".join(["HOST:PORT, IPv6 in brackets, port 0..65535" + "," * bool(also), *also])

    def parse(self, value: Any) -> str:
        """From text only. Resolves no names."""
        if not isinstance(value, str):
            raise ValueError
        if self.may_be_off and value == "off":
            return value
        if self.may_be_unix and value.startswith("unix:"):
            return f"unix:{_path(value.removeprefix('unix:'))}"
        host, port = split_address(value)
        return f"{host}:{port}"

    def toml(self, value: str) -> str:
        """A string."""
        return _quote(value)


@dataclass(frozen=True)
class Direct:
    """Where the direct lane listens: "auto", "off", an address, or the path of a Unix socket."""

    allowed = 'HOST:PORT, "unix:PATH", "auto" or "off"'
    unit = ""
    metavar = "ADDRESS"

    def parse(self, value: Any) -> str:
        """From text only. Resolves no names."""
        if not isinstance(value, str):
            raise ValueError
        if value in ("auto", "off"):
            return value
        if value.startswith("unix:"):
            return f"unix:{_path(value.removeprefix('unix:'))}"
        return Listen().parse(value)

    def toml(self, value: str) -> str:
        """A string."""
        return _quote(value)


@dataclass(frozen=True)
class Advertise:
    """The address that clients are given for this server, or "auto"."""

    allowed = 'HOST:PORT, IPv6 in brackets, port 1..65535, or "auto"'
    unit = ""
    metavar = "HOST:PORT"

    def parse(self, value: Any) -> str:
        """From text only. Resolves no names."""
        if value == "auto":
            return "auto"
        address = Listen().parse(value)
        if split_address(address)[1] == 0:
            raise ValueError
        return address

    def toml(self, value: str) -> str:
        """A string."""
        return _quote(value)


@dataclass(frozen=True)
class RegistryOrOff:
    """The URL of a registry, or "off"."""

    allowed = 'etcd://HOST:PORT[,HOST:PORT...][/PREFIX], etcds://... over TLS, or "off"'
    unit = ""
    metavar = "URL"

    def parse(self, value: Any) -> str:
        """From text only. Connects to nothing."""
        if not isinstance(value, str):
            raise ValueError
        if value != "off":
            split_url(value)
        return value

    def toml(self, value: str) -> str:
        """A string."""
        return _quote(value)


@dataclass(frozen=True)
class Shard:
    """Which part of each model is held: "all", "I/N", or the name of a part in a placement."""

    allowed = f'"all", I/N with I from 0 to N - 1 and N up to {MAX_SHARDS}, or a name in `placement`'
    unit = ""
    metavar = "I/N"

    def parse(self, value: Any) -> str:
        """From text only. Whether a placement has the name is for its reader to find out."""
        if not isinstance(value, str):
            raise ValueError
        if value != "all" and not is_shard_name(value):
            parse_shard(value)
        return value

    def toml(self, value: str) -> str:
        """A string."""
        return _quote(value)


@dataclass(frozen=True)
class FileOrOff:
    """The path of a file, or "off"."""

    allowed = 'the path of a file, or "off"'
    unit = ""
    metavar = "FILE"

    def parse(self, value: Any) -> str:
        """From text or a path. Whether the file exists is for its reader to find out."""
        return str(_path(value))

    def toml(self, value: str) -> str:
        """A string."""
        return _quote(value)


@dataclass(frozen=True)
class Directories:
    """Directories, here or by URL, none twice. Whether they exist is for their reader to find out."""

    allowed = f"different directories, or URLs ({', '.join(SCHEMES)}) without user, password and query"
    unit = ""
    metavar = "DIR|URL"

    def parse(self, value: Any) -> tuple[Location, ...]:
        """From a list of paths, URLs or texts."""
        if not isinstance(value, list | tuple):
            raise ValueError
        paths = tuple(item if isinstance(item, Url) else parse_location(_path_text(item)) for item in value)
        if len(set(paths)) != len(paths):
            raise ValueError
        return paths

    def toml(self, value: tuple[Location, ...]) -> str:
        """A list of strings."""
        return f"[{', '.join(_quote(str(path)) for path in value)}]"


def split_address(address: str) -> tuple[str, int]:
    """The host of HOST:PORT, IPv6 in its brackets, and the port. Raises ValueError for anything else."""
    match = _ADDRESS.fullmatch(address)
    if not match or int(match["port"]) > 65535:
        raise ValueError(f"not HOST:PORT with IPv6 in brackets and a port in 0..65535: {address!r}")
    host = match["host"]
    if host is None:
        return f"[{ipaddress.IPv6Address(match['ipv6'])}]", int(match["port"])
    if not host.strip("0123456789."):
        ipaddress.IPv4Address(host)  # digits and dots are no name: 10.0.0.256 is a slip
    return host, int(match["port"])


def format_size(size_bytes: int) -> str:
    """The shortest exact text that a Size reads: "2GiB", or digits alone where no unit divides it."""
    fitting = (unit for unit in reversed(_UNITS) if size_bytes >= _UNITS[unit] and size_bytes % _UNITS[unit] == 0)
    unit = next(fitting, "")
    return f"{size_bytes // _UNITS[unit]}{unit}"


def _within(number: _Number, low: _Number, high: _Number) -> _Number:
    if not low <= number <= high:  # false for NaN too
        raise ValueError
    return number


def _path(item: Any) -> Path:
    return Path(_path_text(item))


def _path_text(item: Any) -> str:
    # Path("") would be the working directory: nobody means that by an empty entry.
    if not isinstance(item, str | Path) or not str(item) or "\0" in str(item):
        raise ValueError
    str(item).encode()  # UnicodeEncodeError is a ValueError: TOML could not hold a name that is not UTF-8
    return str(item)


def _quote(text: str) -> str:
    # JSON's escapes are TOML's, but for DEL, which only TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
