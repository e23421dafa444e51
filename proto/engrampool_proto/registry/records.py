"""The records of a pool: what its servers hold, which versions are published, which one is active.

A record is a JSON value under a key of the registry; docs/VERSIONS.md lays both down. Whoever can write to the registry
can write anything there: what is no record raises UnreadableRecordError, and nothing else.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from engrampool_proto.errors import EngrampoolError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAX_ROWS = 1 << 63


class UnreadableRecordError(EngrampoolError, ValueError):
    """A value of the registry is not the record that its key says."""


@dataclass(frozen=True)
class Held:
    """What a server holds of a version. parts: {layer: (first row, one past the last)}, none of them empty."""

    model: str
    version: str
    parts: Mapping[int, tuple[int, int]]


@dataclass(frozen=True)
class Member:
    """A server. address: where it answers. failed: {version: why it could not be loaded}.

    active: {model: version} that it knows as the one that clients read, whatever became of the registry since.
    """

    address: str
    held: tuple[Held, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    active: Mapping[str, str] = field(default_factory=dict)

    def of(self, model: str, version: str | None = None) -> Held | None:
        """What it holds of this version, or of any version of the model; None if nothing."""
        return next((held for held in self.held if held.model == model and version in (None, held.version)), None)

    def to_json(self) -> bytes:
        """The record's bytes."""
        held = [{**vars(one), "parts": dict(one.parts)} for one in self.held]
        return _json({"address": self.address, "held": held, "failed": dict(self.failed), "active": dict(self.active)})

    @classmethod
    def from_json(cls, address: str, raw: bytes) -> "Member":
        """The record under the key of `address`. Raises UnreadableRecordError."""
        with _reading(f"servers/{address}"):
            document = json.loads(raw)
            _same(document["address"], _text(address))
            held = tuple(
                Held(_name(one["model"]), _name(one["version"]), _parts(one["parts"])) for one in document["held"]
            )
            failed = {_name(key): _printable(why) for key, why in document["failed"].items()}
            # Servers of an earlier release do not say it.
            active = {_name(model): _name(version) for model, version in document.get("active", {}).items()}
            return cls(address, held, failed, active)


@dataclass(frozen=True)
class Published:
    """A version that servers are to hold.

    location: directory or URL of the packed model or patch, as servers open it.
    base: of a patch, the version that it changes.
    rows: {layer: rows of its table}.
    """

    model: str
    version: str
    location: str
    base: str | None
    spec_digest: str
    rows: Mapping[int, int]

    def to_json(self) -> bytes:
        """The record's bytes."""
        return _json({**vars(self), "rows": dict(self.rows)})

    @classmethod
    def from_json(cls, model: str, version: str, raw: bytes) -> "Published":
        """The record under the key of this version. Raises UnreadableRecordError."""
        with _reading(f"published/{model}/{version}"):
            document = json.loads(raw)
            _same(document["model"], _name(model))
            _same(document["version"], _name(version))
            base = document["base"]
            rows = {layer: _row(count, 1) for layer, count in _layers(document["rows"]).items()}
            return cls(
                model,
                version,
                _text(document["location"]),
                None if base is None else _name(base),
                _text(document["spec_digest"]),
                rows,
            )


@dataclass(frozen=True)
class Active:
    """The version of a model that clients read, and the one that was active before it, to go back to."""

    model: str
    version: str
    previous: str | None = None

    def to_json(self) -> bytes:
        """The record's bytes."""
        return _json({"version": self.version, "previous": self.previous})

    @classmethod
    def from_json(cls, model: str, raw: bytes) -> "Active":
        """The record under the key of `model`. Raises UnreadableRecordError."""
        with _reading(f"active/{model}"):
            document = json.loads(raw)
            previous = document["previous"]
            return cls(_name(model), _name(document["version"]), None if previous is None else _name(previous))


def retirement_json(model: str, version: str) -> bytes:
    """The record that a version was retired."""
    return _json({"model": model, "version": version})


def retirement_from_json(model: str, version: str, raw: bytes) -> tuple[str, str]:
    """(model, version) of the record under the key of this version. Raises UnreadableRecordError."""
    with _reading(f"retired/{model}/{version}"):
        document = json.loads(raw)
        _same(document["model"], _name(model))
        _same(document["version"], _name(version))
        return model, version


def _json(document: Any) -> bytes:
    # Not before: it brings numpy, and whoever only names a registry needs none.
    from engrampool_proto.spec import canonical_json

    return canonical_json(document)


@contextmanager
def _reading(key: str) -> Iterator[None]:
    """Whatever is wrong with a record that is read within raises UnreadableRecordError."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UnreadableRecordError(f"the value of {key!r} is no record: {error!r:.200}") from error


def _text(value: Any) -> str:
    """Text that can be written out: JSON also has halves of surrogate pairs."""
    if not isinstance(value, str):
        raise TypeError(f"not a text: {value!r:.80}")
    value.encode()
    return value


def _printable(value: Any) -> str:
    return str(value).encode(errors="replace").decode()


def _name(value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(f"not a name: {value!r:.80}")
    return value


def _same(value: Any, expected: str) -> None:
    if value != expected:
        raise ValueError(f"it says {value!r:.80}")


def _layers(document: Any) -> dict[int, Any]:
    from engrampool_proto.spec import MAX_LAYER

    layers = {int(layer): value for layer, value in document.items()}
    if [str(layer) for layer in layers] != list(document) or not all(0 <= layer <= MAX_LAYER for layer in layers):
        raise ValueError(f"not layers: {list(document)!r:.80}")
    return layers


def _row(value: Any, least: int) -> int:
    if type(value) is not int or not least <= value < _MAX_ROWS:
        raise ValueError(f"not a row from {least} on: {value!r:.80}")
    return value


def _parts(document: Any) -> dict[int, tuple[int, int]]:
    parts = {}
    for layer, (first, stop) in _layers(document).items():
        start = _row(first, 0)
        parts[layer] = (start, _row(stop, start + 1))
    return parts
