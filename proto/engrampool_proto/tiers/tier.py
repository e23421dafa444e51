"""A tier: memory with a stated latency and bandwidth, named by a preset with its source or read from a file.

The model is coarse on purpose. Rows are read in groups: a group is what is on its way at one time, and the next one
begins when it is there. Each group takes the latency once. All groups of all requests share one link of the bandwidth.
"""

import json
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, get_args

from engrampool_proto.errors import EngrampoolError

Kind = Literal["memory", "network"]
_GIGA = 10**9
_MOST_LATENCY_S, _MOST_GROUP_BYTES = 1.0, 1 << 40
_LEAST_GB_PER_S, _MOST_GB_PER_S = 0.01, 100_000.0


class TierError(EngrampoolError, ValueError):
    """No tier has this name, or a file of one does not say what a tier needs. Whoever gave it must change it."""


@dataclass(frozen=True, kw_only=True)
class Tier:
    """What memory is like, as far as it is emulated.

    latency_ns: of a group, in nanoseconds, from when it is asked for until it is there.
    group_bytes: of rows that are on their way at one time; 0 for all rows of a request.
    bytes_per_s: of all that read it, together.
    kind: "memory" that a processor reads itself, or a "network" behind which rows lie.
    sources, sure: where the figures are from, and how far they can be believed; for people.
    Raises TierError for a figure out of its range.
    """

    name: str
    latency_ns: int
    group_bytes: int
    bytes_per_s: int
    kind: Kind = "memory"
    sources: str = ""
    sure: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.latency_ns <= _MOST_LATENCY_S * _GIGA:
            raise TierError(f"tier {self.name}: latency_s must be 0 .. {_MOST_LATENCY_S:g} seconds")
        if not 0 <= self.group_bytes <= _MOST_GROUP_BYTES:
            raise TierError(f"tier {self.name}: group_bytes must be 0 .. {_MOST_GROUP_BYTES}, 0 for all of a request")
        if not _LEAST_GB_PER_S * _GIGA <= self.bytes_per_s <= _MOST_GB_PER_S * _GIGA:
            raise TierError(
                f"tier {self.name}: bandwidth_gb_per_s must be {_LEAST_GB_PER_S:g} .. {_MOST_GB_PER_S:g}, of 1e9 bytes"
            )
        if self.kind not in get_args(Kind):
            raise TierError(f"tier {self.name}: kind must be {' or '.join(get_args(Kind))}, not {self.kind!r}")

    @classmethod
    def of(cls, name_or_file: str) -> Self:
        """The preset of that name, or the tier in a JSON file of that path. Raises TierError."""
        found = _presets()
        if name_or_file in found:
            return cls._read(name_or_file, found[name_or_file])
        path = Path(name_or_file)
        if not is_path(name_or_file):
            raise TierError(f"no tier is called {name_or_file!r}; there are {', '.join(found)}, or the path of a file")
        try:
            said = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, or no path at all
            raise TierError(f"{name_or_file} cannot be read as a tier: {error}") from error
        return cls._read(path.stem, said)

    @classmethod
    def _read(cls, name: str, said: Any) -> Self:
        needed, more = {"latency_s", "bandwidth_gb_per_s"}, {"group_bytes", "kind", "sources", "sure"}
        if not isinstance(said, dict) or not needed <= said.keys() <= needed | more:
            raise TierError(
                f"tier {name}: it must be a JSON object with {', '.join(sorted(needed))}, and may have "
                f"{', '.join(sorted(more))}; nothing else"
            )
        numbers = {key: said.get(key, 0) for key in ("latency_s", "bandwidth_gb_per_s", "group_bytes")}
        for key, number in numbers.items():
            # NaN and what is too large for an integer are out of every range.
            if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < 1e15:
                raise TierError(f"tier {name}: {key} must be a number; it is {number!r}")
        return cls(
            name=name,
            latency_ns=round(numbers["latency_s"] * _GIGA),
            group_bytes=int(numbers["group_bytes"]),
            bytes_per_s=round(numbers["bandwidth_gb_per_s"] * _GIGA),
            kind=said.get("kind", "memory"),
            sources=str(said.get("sources", "")),
            sure=str(said.get("sure", "")),
        )

    def groups(self, nbytes: int, cores: int = 1) -> int:
        """How many groups follow one another where so many cores read `nbytes` together; one for a request at least."""
        return max(1, -(-nbytes // (self.group_bytes * cores))) if self.group_bytes else 1

    def alone_s(self, nbytes: int, cores: int = 1) -> float:
        """Seconds until `nbytes` of one request are there, with nobody else about."""
        latency_s = self.latency_ns / _GIGA
        return max(self.groups(nbytes, cores) * latency_s, latency_s + nbytes / self.bytes_per_s)

    def __str__(self) -> str:
        """For people."""
        group = f"{self.group_bytes} bytes" if self.group_bytes else "a request"
        return f"{self.name}: {self.latency_ns / 1e3:g} us a group of {group}, {self.bytes_per_s / 1e9:g} GB/s"

    def to_json(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)


def preset_names() -> tuple[str, ...]:
    """Of all presets."""
    return tuple(_presets())


def is_path(name_or_file: str) -> bool:
    """Whether it can only be meant as a file."""
    return "/" in name_or_file or name_or_file.endswith(".json")


@cache
def _presets() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(__file__).with_name("presets.json").read_bytes())
    return found
