"""The records of a pool: what its servers hold, which versions are published, which one is active.

A record is a JSON value under a key of the registry; docs/VERSIONS.md lays both down. Whoever can write to the registry
can write anything there: what is no record raises UnreadableRecordError, and nothing else.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

from engrampool_proto.errors import EngrampoolError
from engrampool_proto.spec import MAX_LAYER, canonical_json

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MAX_ROWS = 1 << 63
# A refusal names so many servers or ranges of rows, and counts the others.
_NAMED = 4


class UnreadableRecordError(EngrampoolError, ValueError):
    """A value of the registry is not the record that its key says."""


class VersionError(EngrampoolError):
    """A version cannot be published, made active or retired as things are. The text says why, and what to do."""


class NotHeldError(VersionError):
    """A version cannot be active yet: servers that should hold it do not."""


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
        return canonical_json(
            {"address": self.address, "held": held, "failed": dict(self.failed), "active": dict(self.active)}
        )

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
        return canonical_json({**vars(self), "rows": dict(self.rows)})

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
        return canonical_json({"version": self.version, "previous": self.previous})

    @classmethod
    def from_json(cls, model: str, raw: bytes) -> "Active":
        """The record under the key of `model`. Raises UnreadableRecordError."""
        with _reading(f"active/{model}"):
            document = json.loads(raw)
            previous = document["previous"]
            return cls(_name(model), _name(document["version"]), None if previous is None else _name(previous))


def retirement_json(model: str, version: str) -> bytes:
    """The record that a version was retired."""
    return canonical_json({"model": model, "version": version})


def retirement_from_json(model: str, version: str, raw: bytes) -> tuple[str, str]:
    """(model, version) of the record under the key of this version. Raises UnreadableRecordError."""
    with _reading(f"retired/{model}/{version}"):
        document = json.loads(raw)
        _same(document["model"], _name(model))
        _same(document["version"], _name(version))
        return model, version


@dataclass(frozen=True)
class State:
    """All records of a pool at one moment.

    members: by address. active: by model. revision: the registry's. retired: {(model, version): revision that says so}
    of each that servers are to give up. cluster: the etcd's id, which is another for another etcd.
    """

    members: Mapping[str, Member]
    published: tuple[Published, ...]
    active: Mapping[str, Active]
    revision: int
    retired: Mapping[tuple[str, str], int] = field(default_factory=dict)
    cluster: str = ""

    def find(self, model: str, version: str) -> Published | None:
        """The record of a published version."""
        return next((one for one in self.published if (one.model, one.version) == (model, version)), None)

    def holders(self, model: str, version: str) -> tuple[Member, ...]:
        """The servers that hold rows of a version, in order of address."""
        return tuple(member for _, member in sorted(self.members.items()) if member.of(model, version))

    def known_active(self, model: str) -> str | None:
        """The active version; of a registry that lost its record, that which most servers know as active and hold."""
        if model in self.active:
            return self.active[model].version
        said = Counter(
            version
            for member in self.members.values()
            if (version := member.active.get(model)) and member.of(model, version)
        )
        return max(sorted(said), key=said.__getitem__, default=None)

    def clash(self, member: Member) -> str | None:
        """Why clients could not take this server's rows beside those of the others; None if they could."""
        for address, other in sorted(self.members.items()):
            for held in member.held if address != member.address else ():
                theirs = other.of(held.model, held.version)
                parts = theirs.parts if theirs else {}
                for layer in sorted(held.parts.keys() & parts.keys()):
                    mine, rows = held.parts[layer], parts[layer]
                    if mine != rows and mine[0] < rows[1] and rows[0] < mine[1]:
                        return _overlapping(layer, mine, member.address, rows, address)
        return None

    def lacking(self, model: str, version: str) -> tuple[Member, ...]:
        """The servers that hold rows of the active version, or of any if none is active, but not of this one."""
        active = self.active.get(model)
        present = active.version if active else None
        return tuple(
            member
            for _, member in sorted(self.members.items())
            if member.of(model, present) and not member.of(model, version)
        )

    def uncovered(self, published: Published) -> list[tuple[int, int, int]]:
        """(layer, first row, one past the last) of what no server holds of a version, in order."""
        held = [member.of(published.model, published.version) for member in self.members.values()]
        missing = []
        for layer, rows in sorted(published.rows.items()):
            covered = 0
            parts = sorted(one.parts[layer] for one in held if one and layer in one.parts)
            for start, stop in chain(parts, [(rows, rows)]):
                if min(start, rows) > covered:
                    missing.append((layer, covered, min(start, rows)))
                covered = max(covered, stop)
        return missing

    def conflict(self, model: str, version: str) -> str | None:
        """Two servers whose rows of a version overlap and are not the same, which no client takes; None if none do."""
        layers: dict[int, dict[tuple[int, int], str]] = {}
        for address, member in sorted(self.members.items()):
            held = member.of(model, version)
            for layer, rows in held.parts.items() if held else ():
                layers.setdefault(layer, {}).setdefault(rows, address)
        for layer, ranges in sorted(layers.items()):
            for (one, holder), (other, second) in pairwise(sorted(ranges.items())):
                if other[0] < one[1]:
                    return _overlapping(layer, one, holder, other, second)
        return None

    def check_spec(self, model: str, version: str, spec_digest: str) -> None:
        """Raise VersionError if clients could not go over to a version of this specification from the active one."""
        name, active = f"{model} {version}", self.known_active(model)
        present = self.find(model, active) if active else None
        if active in (None, version) or (present is None and model not in self.active):
            return
        if present is None:
            raise VersionError(
                f"{name} cannot be compared with the active version {active}, whose record is missing or"
                " damaged: publish that one again first"
            )
        if present.spec_digest != spec_digest:
            raise VersionError(
                f"{name} has another specification than the active version {active}, so clients cannot"
                " follow: pack and publish it under another model name"
            )

    def check(self, model: str, version: str, *, partial: bool = False) -> None:
        """Raise VersionError unless the version may be active: NotHeldError if servers may yet come to hold it.

        partial: enough that every row is held by some server, though others hold the active version and not this one.
        """
        name = f"{model} {version}"
        published = self.find(model, version)
        if published is None:
            raise VersionError(f"{name} is not published: `engrampool publish` it first")
        self.check_spec(model, version, published.spec_digest)
        if conflict := self.conflict(model, version):
            raise VersionError(f"{name} cannot be active: {conflict}")
        wanting = []
        if missing := self.uncovered(published):
            wanting.append("no server holds " + _listed(f"rows {a}..{b - 1} of layer {n}" for n, a, b in missing))
        if not partial and (lacking := self.lacking(model, version)):
            wanting.append("still to load it: " + _listed(member.address for member in lacking))
        if wanting:
            raise NotHeldError(f"{name} cannot be active yet: {'; '.join(wanting)}")


@contextmanager
def _reading(key: str) -> Iterator[None]:
    """Whatever is wrong with a record that is read within raises UnreadableRecordError."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UnreadableRecordError(f"the value of {key!r} is no record: {error!r:.200}") from error


def _overlapping(layer: int, one: tuple[int, int], holder: str, other: tuple[int, int], second: str) -> str:
    return (
        f"{holder} holds rows {one[0]}..{one[1] - 1} of layer {layer}, {second} rows {other[0]}..{other[1] - 1}, and"
        " clients refuse parts that overlap: start all servers of the pool with the same number of shards"
    )


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


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - _NAMED
    return ", ".join(listed[:_NAMED]) + (f" and {more} more" if more > 0 else "")
