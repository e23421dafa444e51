"""A small lookup that was sent in the caller's thread: its rows are received by whichever thread comes for them."""

import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import partial
from math import inf
from typing import Protocol

from engrampool_client.errors import DeadlineError, EngrampoolError, PoolError, StepCancelledError
from engrampool_client.lookup.delivery import Delivery, Rows
from engrampool_client.lookup.workers import Job, Workers
from engrampool_proto.wire import ServerTimes

# A thread is in compiled code, where Ctrl-C waits, for no longer than this.
_SLICE_S = 0.05
# Who waits as long as the lookup has time works that out by a clock that goes on meanwhile.
_SLACK_S = 1e-3
# If nobody has come for the rows by then, a thread of the client does: after this, or this part of the lookup's time.
_ALONE_S, _ALONE_PART = 0.05, 0.25
# How long a thread of the client receives what nobody wants any more, to keep the connection.
_PASS_OVER_S = 1.0


class Came(Enum):
    """What there is to say of an answer: all of it is there; more is to come; nothing more comes this way."""

    ALL, LATER, NOTHING = auto(), auto(), auto()


class Request(Protocol):
    """One that was sent. One thread at a time, but for `shut`.

    small: whether all of the answer is there before any of its rows is written. timed: whether `ready` and `take` come
    back in time; else `ready` does so with the next of the answer, by the lookup's deadline, or once it is `shut`.
    """

    small: bool
    timed: bool

    @property
    def number(self) -> int:
        """The request's, by which the server's log names it."""

    @property
    def times(self) -> ServerTimes | None:
        """The server's, once all was answered."""

    def ready(self, until: float, spin_s: float) -> Came | None:
        """Wait for an answer, if that can be done before its rows are written; None if `take` is to follow."""

    def take(self, until: float, spin_s: float) -> int | Came:
        """Have rows come until a layer is whole, and give its place. Raises PoolError."""

    def shut(self) -> None:
        """Have the thread that waits come back soon. Any thread."""

    def late(self, error: DeadlineError) -> None:
        """The lookup's deadline has passed: count that against the server, if nothing of the answer has come."""

    def let_go(self, error: BaseException | None) -> None:
        """The end, with what the lookup ended with."""

    def pass_over(self, until: float, error: EngrampoolError) -> None:
        """The end, of an answer that nobody wants: what comes of it by `until` is received, to keep the connection."""


class Part(Request, Protocol):
    """One for some of a lookup's rows."""

    def whole(self, layer: int) -> bool:
        """Whether all that was asked for of a layer is where it belongs."""


class Sent:
    """The receiver of one lookup. Thread-safe.

    One thread at a time receives; it has the claim meanwhile, and others that wait are told when it is free. Nobody
    need hold it: what comes lies in the socket. Where nobody comes for the rows in time, or callbacks are to be called,
    a thread of `workers` waits for them as a caller does. The lookup's end, whoever brings it about, ends this, too:
    by then nobody is writing, and the connection is given back, or by whoever has the claim when he lets go.
    """

    def __init__(
        self,
        delivery: Delivery,
        request: Request,
        rows: Sequence[tuple[int, Rows]],
        workers: Workers,
        spin_s: float,
        again: Callable[[], None],
        left: Callable[[], None],
        place: Callable[[int], None] | None = None,
        before: Sequence[Callable[[], None]] = (),
    ) -> None:
        """rows: by place, layer and what the caller gets of it. left: told of the end, after `before`, the last first.

        again: told instead where the request came to nothing, to have by other ways what is missing.
        place: puts a layer that came where the caller gets it; None where it comes there. Once more does no harm.
        """
        self._delivery, self._request, self._rows, self._workers = delivery, request, rows, workers
        self._spin_s, self._again, self._place = spin_s, again, place
        # What is to be done at the end, the last first; each is taken by whoever does it, once.
        self._ends = [left, *before, self._let_go]
        # Taken by itself: see delivery.py.
        self._lock = threading.RLock()
        self._holder = 0  # the thread that has the claim
        self._helper = 0  # the client's own one, that waits as nobody else may
        self._ended = self._elsewhere = False
        limit_s = _ALONE_PART * (delivery.deadline - time.monotonic())
        self.attend_at = time.monotonic() + min(_ALONE_S, limit_s)

    @property
    def free(self) -> bool:
        """Whether nobody receives, and somebody may."""
        return not (self._holder or self._ended)

    def open_to(self, until: float) -> bool:
        """Whether nobody receives, and one who waits until then may."""
        return self.free and (self._request.timed or until >= self._delivery.deadline - _SLACK_S)

    def receive(self, enough: Callable[[], bool], until: float) -> None:
        """Receive in this thread until `enough`, or `until` (time.monotonic), unless another one does.

        One who cannot wait as long as it may take has a thread of the client do it.
        """
        me = threading.get_ident()
        again = self._holder == me  # in a callback, say
        try:
            with self._lock:
                if self._ended or self._holder not in (0, me):
                    return
                self._holder = me
            self._receive(enough, until)
        finally:
            if not again and self._holder == me:
                self._release(me)

    def hand_over(self) -> None:
        """Have a thread of the client wait for the rows, as nobody else may."""
        self.attend_at = inf
        if self._elsewhere or self._ended:
            return
        self._elsewhere = True
        try:
            self._workers.submit(Job(self._delivery, _planned, self._wait))
        except RuntimeError:  # the system gives no thread: whoever waits receives, or the deadline settles it
            return

    def give_up(self) -> None:
        """The lookup was given up: a thread that waits for its rows is to come back.

        One of the client's own has left its place by then: it may wait for the end of a call that is dear to cancel.
        """
        holder, error = self._holder, self._delivery.error
        # At the deadline he has no more time himself, and the connection may be good.
        late = isinstance(error, DeadlineError)
        if isinstance(error, DeadlineError) and not error.number:
            error.number = self._request.number
        if holder and holder != threading.get_ident() and not late and (self._request.timed or holder != self._helper):
            self._request.shut()

    def end(self) -> None:
        """The lookup has ended, and nobody is writing. Once more does no harm."""
        with self._lock:
            self._ended = True
            free = not self._holder
        if free:
            self._end()

    def forked(self) -> None:
        """In the child of a fork, where this thread may receive: let go without a word, and wait for nobody."""
        self._lock = threading.RLock()  # the old one may be another thread's for ever
        self._ended, self._ends = True, []

    def _receive(self, enough: Callable[[], bool], until: float) -> None:
        delivery = self._delivery
        if not self._request.timed and until < delivery.deadline - _SLACK_S:
            self.hand_over()
            return
        while not (self._ended or delivery.given_up or enough()):
            now = time.monotonic()
            # What is there is taken, even if there is no time to wait.
            came = self._come(min(until, now + _SLICE_S) if now < until else 0.0)
            while isinstance(came, int):
                layer, rows = self._rows[came]
                delivery.arrived({layer: rows})
                # The end of the answer comes with the last rows, if it can. A layer waits for no more than its own.
                last = len(delivery.rows) == len(delivery.layers)
                came = self._come(0.0) if last and not self._ended else Came.LATER
            if came is Came.ALL:
                # One that came before, as this thread was interrupted, was not handed over yet.
                delivery.arrived({layer: rows for layer, rows in self._rows if layer not in delivery.rows})
                delivery.end(None, self._request.times)
                return
            if came is Came.NOTHING:
                self._pass_on()
                return
            if now >= until:
                return

    def _come(self, until: float) -> int | Came:
        """What comes next."""
        delivery, request = self._delivery, self._request
        try:
            came: int | Came | None = request.ready(until, self._spin_s)
            if came is None:
                return self._taken(until)
            if came is Came.ALL and self._place is not None:
                with delivery.writing():
                    self._put_in_place(came, self._place)
            return came
        except EngrampoolError as error:
            delivery.end(error)  # unless it was given up, and that was it
            return Came.LATER

    def _taken(self, until: float) -> int | Came:
        """Have the next layer's rows written; where nobody takes a layer before all are there, as many as come."""
        delivery, take, place = self._delivery, self._request.take, self._place
        whole: list[int] = []
        try:
            with delivery.writing():
                came = take(until, self._spin_s)
                while delivery.whole and isinstance(came, int):
                    if place is not None:
                        self._put_in_place(came, place)
                    whole.append(came)
                    came = take(until, self._spin_s)
                if place is not None:
                    self._put_in_place(came, place)
                return came
        finally:
            if whole:
                delivery.arrived(dict([self._rows[one] for one in whole]))

    def _put_in_place(self, came: int | Came, place: Callable[[int], None]) -> None:
        """Before it is handed over; at the end also a layer that came as this thread was interrupted."""
        if isinstance(came, int):
            place(self._rows[came][0])
        elif came is Came.ALL:
            for layer, _ in self._rows:
                if layer not in self._delivery.rows:
                    place(layer)

    def _pass_on(self) -> None:
        """Have what is missing come by other ways, unless nothing is, or nobody wants it."""
        delivery = self._delivery
        if len(delivery.rows) == len(delivery.layers):
            delivery.end(None)
            return
        try:
            with self._lock:
                if self._ended or delivery.given_up:
                    return
                self._ended = True
                del self._ends[:-1]  # what they are to let go of goes on being used
            delivery.receiver = None
            self._again()
        except BaseException as error:
            over = StepCancelledError("the lookup was interrupted")
            delivery.end(error if isinstance(error, PoolError) else over)
            if not isinstance(error, PoolError):
                raise

    def _release(self, me: int) -> None:
        over, interrupt = False, None
        while not over:
            try:
                self._delivery.written()
                with self._lock:
                    if self._holder == me:
                        self._holder = 0
                    ended = self._ended
                if ended:
                    self._end()
                self._delivery.rouse()
                over = True
            except KeyboardInterrupt as error:  # once more: others wait for the claim
                interrupt = error
        if interrupt is not None:
            try:
                raise interrupt
            finally:
                interrupt = None  # or what it refers to, a step's caller say, would wait for garbage collection

    def _end(self) -> None:
        while self._ends:
            try:
                end = self._ends.pop()
            except IndexError:  # another thread took it
                return
            end()

    def _let_go(self) -> None:
        """Give the connection back, at once or once the answer that nobody wants any more has come."""
        request, error = self._request, self._delivery.error
        if isinstance(error, DeadlineError):
            request.late(error)
        cancelled = isinstance(error, StepCancelledError)
        # Of what is not timed, the end comes by itself at the deadline.
        if isinstance(error, StepCancelledError | DeadlineError) and (
            request.small or (cancelled and not request.timed)
        ):
            over = partial(request.pass_over, time.monotonic() + _PASS_OVER_S, error)
            nobodys = Delivery(self._delivery.layers)
            nobodys.end(error)  # it takes no place from lookups that somebody waits for
            try:
                if self._workers.submit(Job(nobodys, _planned, over)):
                    return
            except RuntimeError:  # the system gives no thread
                pass
        request.let_go(error)

    def _wait(self) -> None:
        """As a caller, until this has ended: what comes by other ways may need the place that this thread has."""
        self._helper = threading.get_ident()
        self._delivery.wait_for(lambda: self._ended or self._delivery.ended, None)


def _planned() -> bool:
    return True
