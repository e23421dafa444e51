"""Servers that hold the same rows, and which of them a lookup asks."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from engrampool_client.direct import Connection
from engrampool_client.endpoint import Endpoint
from engrampool_client.errors import (
    DeadlineError,
    PoolError,
    RejectedError,
    UnavailableError,
    UnknownModelError,
    UnknownVersionError,
)
from engrampool_client.exchange import Exchange
from engrampool_client.step import Step

# Where there are other replicas, one may take so long, and so long for each byte: far more than one that is well does.
_PATIENCE_S, _PATIENCE_S_PER_BYTE = 0.1, 1e-8


class ReplicaSet:
    """Servers that hold the same rows. parts: layer -> (first row, one past the last).

    suspects: of all sets: servers that may hold others by now, as they refused what another one was asked for next.
    """

    def __init__(self, parts: Mapping[int, tuple[int, int]], suspects: set[Endpoint]) -> None:
        self.parts, self._suspects = dict(parts), suspects
        self.replicas: tuple[Endpoint, ...] = ()  # replaced as a whole
        self._turn = count()

    def begin(self, exchange: Exchange, step: Step) -> "_Begun | None":
        """Only send the request to one replica: `ask` or `_Begun.abandon` is to follow. None if that cannot be done."""
        replicas = self._in_order()
        if not replicas:
            return None
        sent = replicas[0].begin(exchange, _deadline(exchange, step, len(replicas) - 1))
        return None if sent is None else _Begun(replicas, sent)

    def ask(self, exchange: Exchange, step: Step, spin_s: float, begun: "_Begun | None" = None) -> None:
        """Have the rows come from one replica, or another if that one cannot. Raises PoolError."""
        replicas = self._in_order() if begun is None else begun.replicas
        sent = None if begun is None else begun.sent
        if not replicas:
            raise UnavailableError("no server is known that holds these rows", "no-replica")
        # First each for a moment; if none could, those that were only slow, or all, for as long as the step has.
        waiting, slow = list(replicas), []
        patient = len(replicas) == 1
        while True:
            endpoint = waiting.pop(0)
            deadline = step.deadline if patient else _deadline(exchange, step, len(replicas) - 1)
            try:
                asked, sent = sent, None
                endpoint.ask(exchange, step, spin_s, deadline, asked, patient=patient)
                return
            except PoolError as error:
                if step.given_up() or time.monotonic() >= step.deadline or (patient and not waiting):
                    raise
                if isinstance(error, DeadlineError):
                    slow.append(endpoint)
                elif isinstance(error, RejectedError | UnknownModelError | UnknownVersionError):
                    self._suspects.add(endpoint)
            exchange.restart()
            if exchange.complete:  # only the end of the answer was lost
                return
            if not waiting:
                waiting, patient = slow or list(replicas), True

    def _in_order(self) -> Sequence[Endpoint]:
        """Attached ones first, those that are known to be away last; the others take turns."""
        replicas = self.replicas
        if len(replicas) <= 1:
            return replicas
        turn = next(self._turn) % len(replicas)
        turned = (*replicas[turn:], *replicas[:turn])
        return sorted(turned, key=lambda endpoint: (endpoint.breaker.is_open, not endpoint.attached))


@dataclass(frozen=True, eq=False)
class _Begun:
    """A request on its way to the first of the replicas."""

    replicas: Sequence[Endpoint]
    sent: Connection

    def abandon(self) -> None:
        """Do without the answer."""
        self.replicas[0].abandon(self.sent)


def _deadline(exchange: Exchange, step: Step, others: int) -> float:
    """Until when one replica may take, where there are so many others to go to."""
    if not others:
        return step.deadline
    now = time.monotonic()
    patience_s = _PATIENCE_S + _PATIENCE_S_PER_BYTE * exchange.answer_bytes
    return min(step.deadline, now + min(patience_s, (step.deadline - now) / 2))
