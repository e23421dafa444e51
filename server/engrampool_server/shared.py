"""What the processes of one server have in common: made before the first of them is forked."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from engrampool_server.entrance import Entrance
from engrampool_server.in_flight import InFlight
from engrampool_server.metrics import Metrics
from engrampool_server.tables import HeldModel


@dataclass
class Shared:
    """What every process of a server inherits when it is forked.

    models: those loaded before the fork; their rows are the one copy that all processes read.
    entrance: of the direct lane, None for no such lane.
    """

    metrics: Metrics
    in_flight: InFlight
    models: list[HeldModel] = field(default_factory=list)
    entrance: Entrance | None = None


def free_slot(taken: Sequence[int]) -> int:
    """The lowest slot that is not taken."""
    return next(slot for slot in range(len(taken) + 1) if slot not in taken)
