"""The state of a pool, as its records say, and what follows from it: which version may be active, who may join."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain, pairwise

from engrampool_proto.errors import EngrampoolError
from engrampool_proto.registry.records import Active, Member, Published

# A refusal names so many servers or ranges of rows, and counts the others.
_NAMED = 4


class VersionError(EngrampoolError):
    """A version cannot be published, made active or retired as things are. The text says why, and what to do."""


class NotHeldError(VersionError):
    """A version cannot be active yet: servers that should hold it do not."""


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


def _overlapping(layer: int, one: tuple[int, int], holder: str, other: tuple[int, int], second: str) -> str:
    return (
        f"{holder} holds rows {one[0]}..{one[1] - 1} of layer {layer}, {second} rows {other[0]}..{other[1] - 1}, and"
        " clients refuse parts that overlap: start all servers of the pool with the same number of shards"
    )


def _listed(names: Iterable[str]) -> str:
    listed = list(names)
    more = len(listed) - _NAMED
    return ", ".join(listed[:_NAMED]) + (f" and {more} more" if more > 0 else "")
