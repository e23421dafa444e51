"""A small lookup that several servers could answer: a second one is asked as well where the first is late."""

import time
from collections.abc import Callable, Sequence
from math import inf
from typing import TYPE_CHECKING, TypeVar

from engrampool_client.errors import DeadlineError, EngrampoolError
from engrampool_client.lanes.native import first_to_answer
from engrampool_client.lookup.sent import Came
from engrampool_client.lookup.small import Small
from engrampool_client.pool.endpoint import Endpoint
from engrampool_client.pool.latency import HedgeBudget
from engrampool_client.stats import AT_ONCE_S, Stats
from engrampool_proto import wire

if TYPE_CHECKING:  # it needs numba
    from engrampool_client.lanes.small import SmallRequest

_T = TypeVar("_T")


class Raced:
    """A request that one server has, and maybe another as well: whichever begins to answer first is listened to.

    Whether the first is late is looked at when somebody comes for the rows: what has come by then is in time. Without a
    sign of either for as long as one of several may take, it comes to nothing, and is asked for by other ways.
    """

    timed = True

    def __init__(
        self,
        small: Small,
        deadline: float,
        replicas: Sequence[Endpoint],
        request: "SmallRequest",
        late_s: float,
        patience_s: float,
        budget: HedgeBudget,
        stats: Stats,
    ) -> None:
        """replicas: the first has `request` by now, the others may be asked. late_s: when a first byte is late.

        patience_s: how long to wait for one, once somebody does. budget: of what may be asked for twice.
        """
        self._small, self._deadline, self._endpoint, self._others = small, deadline, replicas[0], replicas[1:]
        self._patience_s, self._budget, self._stats = patience_s, budget, stats
        self._since = time.monotonic()
        self._late_at, self._patient_until = self._since + late_s, inf
        self._request, self.small = request, request.small
        self._second: tuple[Endpoint, SmallRequest] | None = None
        self._asked_twice = False
        # Whether it is known when the answer began: somebody looked for it at once, or before it was there.
        self._known: bool | None = None
        self._took_s: float | None = None  # of what was waited for so far, once it had begun

    @property
    def times(self) -> wire.ServerTimes | None:
        """As of `Request`."""
        return self._request.times

    def whole(self, layer: int) -> bool:
        """As of `Part`."""
        return self._request.whole(layer)

    def ready(self, until: float, spin_s: float) -> Came | None:
        """As of `Request`."""
        return self._come(lambda request, by: request.ready(by, spin_s), until)

    def take(self, until: float, spin_s: float) -> int | Came:
        """As of `Request`."""
        return self._come(lambda request, by: request.take(by, spin_s), until)

    def shut(self) -> None:
        """As of `Request`."""
        self._request.shut()
        if (second := self._second) is not None:
            second[1].shut()

    def late(self, error: DeadlineError) -> None:
        """As of `Request`."""
        self._request.late(error)

    def let_go(self, error: BaseException | None) -> None:
        """As of `Request`."""
        if (second := self._second) is not None:
            self._second = None
            second[1].abandon()
        self._request.let_go(error)

    def pass_over(self, until: float, error: EngrampoolError) -> None:
        """As of `Request`."""
        if (second := self._second) is not None:
            self._second = None
            second[1].abandon()
        self._request.pass_over(until, error)

    def _come(self, call: "Callable[[SmallRequest, float], _T]", until: float) -> "_T | Came":
        """What `call` gives, of whichever begins first; another is asked as well once the first is late."""
        begin = time.monotonic()
        if self._known is None:
            self._patient_until, self._known = begin + self._patience_s, begin - self._since < AT_ONCE_S
        while not self._request.begun:
            if (second := self._second) is not None:
                chosen = first_to_answer([self._request, second[1]], min(until, self._patient_until))
                if chosen is None:
                    return self._not_yet()
                self._listen_to(chosen)
                break
            by = min(until, self._patient_until, inf if self._asked_twice else self._late_at)
            came = call(self._request, by)
            if came is not Came.LATER or self._request.begun:
                return self._noted(came, begin)
            self._known = True
            if self._asked_twice or time.monotonic() < self._late_at:
                return self._not_yet()
            self._ask_another()
        return self._noted(call(self._request, until), begin)

    def _ask_another(self) -> None:
        """If it may be, and somebody can be asked at once."""
        self._asked_twice = True
        if not self._budget.ready:
            return
        for endpoint in self._others:
            request = endpoint.send_direct(self._small, self._deadline)
            if request is not None:
                self._second = endpoint, request
                self._budget.spend()
                self._stats.hedged()
                return

    def _listen_to(self, chosen: "SmallRequest") -> None:
        """And do without the other."""
        first, second = self._request, self._second
        assert second is not None
        self._second = None
        if chosen is first:
            second[1].abandon()
            return
        self._endpoint.latency.began(self._small.nbytes, time.monotonic() - self._since)
        self._endpoint.latency.ended(self._small.nbytes, inf)
        self._endpoint.breaker.doubt()
        self._endpoint, self._request = second
        self._stats.hedge_won()
        first.abandon()

    def _not_yet(self) -> Came:
        if time.monotonic() < self._patient_until:
            return Came.LATER
        self._endpoint.latency.ended(self._small.nbytes, inf)
        self._endpoint.breaker.failed(DeadlineError(f"{self._endpoint.target} took longer than one of several may"))
        return Came.NOTHING

    def _noted(self, came: "_T | Came", begin: float) -> "_T | Came":
        """As it is, once it was noted how long it took, as far as somebody waited for it.

        Of an answer that lay there when somebody came, nobody knows.
        """
        if self._request.begun and self._known:
            now, nbytes, latency = time.monotonic(), self._small.nbytes, self._endpoint.latency
            if self._took_s is None:
                self._took_s = now - self._since
                latency.began(nbytes, self._took_s)
            else:
                self._took_s += now - begin
            if came is Came.ALL:
                latency.ended(nbytes, self._took_s)
        return came
