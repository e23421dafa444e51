"""The link to a tier in one process, in Python: when rows that are read here would be there."""

import select
import threading
import time
from dataclasses import dataclass, field

from engrampool_proto.tiers.tier import Tier

# Sleeping ends late by some tens of microseconds; the rest of a wait is looked at without.
_AWAKE_S = 100e-6


class EmulatedLink:
    """The link, which all who read by it share. Thread-safe."""

    def __init__(self, tier: Tier) -> None:
        self.tier = tier
        self._turns = threading.Lock()
        self._free_s = 0.0

    def read(self, nbytes: int, deadline: float) -> "Reading":
        """A lookup of so many bytes begins now. deadline: of it, by time.monotonic."""
        begin_s = time.monotonic()
        with self._turns:
            turn_s = max(begin_s, self._free_s)
            self._free_s = turn_s + nbytes / self.tier.bytes_per_s
        return Reading(self.tier, begin_s, turn_s, deadline)


@dataclass
class Reading:
    """One lookup's way through the tier; its pieces come one after the other."""

    tier: Tier
    begin_s: float
    turn_s: float
    deadline: float
    _so_far: int = field(default=0, init=False)

    def wait(self, nbytes: int, start_s: float, cores: int) -> bool:
        """Sleep until so many bytes are there that so many threads read from then on; False if the deadline came first.

        start_s: by time.monotonic.
        """
        tier, latency_s = self.tier, self.tier.latency_ns / 1e9
        self._so_far += nbytes
        groups = start_s + tier.groups(nbytes, cores) * latency_s if tier.group_bytes else self.begin_s + latency_s
        due = max(groups, self.turn_s + latency_s + self._so_far / tier.bytes_per_s)
        wake = min(due, self.deadline)
        while (left := wake - time.monotonic()) > 0:
            # Without the interpreter's lock either way. To sleep for no time takes as long as to sleep for some.
            if left > _AWAKE_S:
                time.sleep(left - _AWAKE_S)
            else:
                select.select([], [], [], 0)
        return due <= self.deadline
