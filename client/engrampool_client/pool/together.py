"""Requests to several shards for one small lookup, received as one."""

from collections.abc import Collection, Sequence

from engrampool_client.errors import DeadlineError, EngrampoolError
from engrampool_client.lookup.exchange import slowest
from engrampool_client.lookup.sent import Came, Part
from engrampool_proto.wire import ServerTimes


class Together:
    """Requests to shards for parts of one lookup, as one `Request`.

    All were sent, and are worked on at once; they are received in the caller's thread, one after the other. A layer is
    whole once each has brought its part. What has come is asked of them each time: a thread may be interrupted at any
    line.
    """

    timed = True

    def __init__(self, layers: Sequence[int], parts: Sequence[tuple[Part, Collection[int]]]) -> None:
        """layers: of the lookup. parts: each request and its layers."""
        self._layers, self._parts = layers, parts
        self.small = all(request.small for request, _ in parts)
        self._given: set[int] = set()

    @property
    def times(self) -> ServerTimes | None:
        """The servers', of what ran side by side."""
        return slowest([request.times for request, _ in self._parts])

    @property
    def number(self) -> int:
        """As of `Request`: of the first that was not answered."""
        waiting = [request for request, _ in self._parts if request.times is None]
        return (waiting or [request for request, _ in self._parts])[0].number

    def ready(self, until: float, spin_s: float) -> Came | None:
        """As of `Request`."""
        for request, _ in self._parts:
            came = request.ready(until, spin_s)
            if came is not None:
                return came
        return None

    def take(self, until: float, spin_s: float) -> int | Came:
        """As of `Request`."""
        place = next((place for place in range(len(self._layers)) if place not in self._given), None)
        layer, later = None if place is None else self._layers[place], False
        for request, layers in self._parts:
            while (request.times is None) if layer is None else (layer in layers and not request.whole(layer)):
                came = request.take(0.0 if later else until, spin_s)
                if came is Came.NOTHING:
                    return came
                if came is Came.LATER:  # the others may have come
                    later = True
                    break
        if later:
            return Came.LATER
        if place is None:
            return Came.ALL
        self._given.add(place)
        return place

    def shut(self) -> None:
        """As of `Request`."""
        for request, _ in self._parts:
            request.shut()

    def late(self, error: DeadlineError) -> None:
        """As of `Request`."""
        for request, _ in self._parts:
            request.late(error)

    def let_go(self, error: BaseException | None) -> None:
        """As of `Request`."""
        for request, _ in self._parts:
            request.let_go(error)

    def pass_over(self, until: float, error: EngrampoolError) -> None:
        """As of `Request`."""
        for request, _ in self._parts:
            request.pass_over(until, error)
