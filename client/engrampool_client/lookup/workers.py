"""The client's threads: lookups are planned there, and wait for a place from which servers are asked."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

from engrampool_client.errors import StepCancelledError
from engrampool_client.lookup.delivery import Delivery

# Threads that a call may hold whose lookup was given up, before such a lookup keeps its place.
_MOST_HELD = 16
# How long anybody waits for a call that does not end though nobody wants its answer.
HELD_S = 2.0
_LOOK_S = 0.05
_log = logging.getLogger("engrampool")


@dataclass(eq=False)
class Job:
    """A lookup's work. plan: what needs no server; gives whether `ask` is to follow. ask: the rest.

    ahead: others overtake it. hint: it gives its place to a lookup that finds none.
    """

    delivery: Delivery
    plan: Callable[[], bool]
    ask: Callable[[], None]
    ahead: bool = False
    hint: bool = False


class Workers:
    """Up to `most` places from which servers are asked, and threads for them, started as they are needed. Thread-safe.

    There is one thread more than places, so that planning never waits for a server: a lookup that the cache answers
    whole ends at once, however silent servers are. One place is never given to jobs asked for ahead, unless it is the
    only one: what is needed now finds a place. A job whose lookup is given up leaves its place at once, even if its
    thread is still held by the call; there may be a few such threads beside the others.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most, self._most_ahead, self._name = most, max(1, most - 1), name
        # Taken by itself: see delivery.py.
        self._lock = threading.RLock()
        # Idle threads take from it; one that is woken for nothing goes to sleep again. No condition: where Ctrl-C comes
        # into its `notify`, it wakes nobody the next time.
        self._wakes: SimpleQueue[None] = SimpleQueue()
        # By whether they are asked for ahead. What is planned waits in `_planned` for a place.
        self._new: tuple[deque[Job], deque[Job]] = (deque(), deque())
        self._planned: tuple[deque[Job], deque[Job]] = (deque(), deque())
        self._asking: list[Job] = []  # one a place
        self._threads: set[threading.Thread] = set()
        self._idle = self._held = 0  # threads; held: by a call whose lookup was given up
        self._started = 0
        self._closed = False

    def submit(self, job: Job) -> bool:
        """Have it run in its turn. False if the workers are closed. Raises RuntimeError if no thread can be started."""
        with self._lock:
            if self._closed:
                return False
            self._new[job.ahead].append(job)
            try:
                self._staff()
            except RuntimeError:
                if not self._threads:
                    self._new[job.ahead].remove(job)
                    raise
            return True

    @property
    def asking(self) -> int:
        """Jobs that have a place."""
        return len(self._asking)

    @property
    def waiting(self) -> int:
        """Jobs that are planned, and wait for a place."""
        return sum(map(len, self._planned))

    @property
    def new(self) -> int:
        """Jobs that wait to be planned."""
        return sum(map(len, self._new))

    def close(self, wait: bool = True) -> None:
        """Run what was submitted, take nothing more, and wait for the threads to end.

        A thread that a call holds though its lookup was given up is not waited for longer than a few seconds.
        """
        with self._lock:
            self._closed = True
            self._wakes.put(None)
        if not wait:
            return
        left = {threading.current_thread()}
        while others := self._threads - left:
            thread = others.pop()
            thread.join(HELD_S if len(left) == 1 else _LOOK_S)  # together, and not one after the other
            if thread.is_alive() and self._nothing_is_wanted():
                _log.warning("closing without the end of %s, which a call holds", thread.name)
                left.add(thread)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it a thread that plans waits for what is none of ours; so another one may be started in its place."""
        with self._lock:
            held = self._held < _MOST_HELD
            if held:
                self._held += 1
                self._staff()
        try:
            yield
        finally:
            if held:
                with self._lock:
                    self._held -= 1

    def _nothing_is_wanted(self) -> bool:
        """Whether all that threads are at are calls whose lookups were given up."""
        with self._lock:
            waiting = [*self._new[0], *self._new[1], *self._planned[0], *self._planned[1]]
            given_up = all(job.delivery.given_up for job in self._asking)
            return not waiting and given_up and self._held + len(self._asking) >= len(self._threads)

    def _staff(self) -> None:
        """With the lock: see that a thread takes up what can be taken up."""
        waiting = sum(1 for _ in self._ready())
        if not waiting:
            return
        if self._idle < waiting and len(self._threads) - self._held <= self._most:
            thread = threading.Thread(target=self._work, name=f"{self._name}-{self._started}", daemon=True)
            try:
                thread.start()
                self._threads.add(thread)
                self._started += 1
                return
            except RuntimeError:  # the system gives no more of them
                if not self._threads:
                    raise
        if self._wakes.qsize() <= self._idle:  # else all of them are woken already
            self._wakes.put(None)

    def _ready(self) -> Iterator[tuple[bool, Job]]:
        """With the lock: what can be taken up now, in this order, and whether it is planned."""
        for ahead in (False, True):
            for job in self._planned[ahead]:
                if self._has_place(job):
                    yield True, job
            for job in self._new[ahead]:
                yield False, job

    def _has_place(self, job: Job) -> bool:
        """With the lock: whether it may ask now. One that was given up needs no place to end."""
        if job.delivery.given_up:
            return True
        if len(self._asking) >= self._most:
            return False
        return not job.ahead or sum(one.ahead for one in self._asking) < self._most_ahead

    def _work(self) -> None:
        while True:
            with self._lock:
                planned, job = next(self._ready(), (False, None))
                if job is None and not self._closed:
                    self._idle += 1
                elif job is None or len(self._threads) - self._held > self._most + 1:
                    # Closing, and others are at what there is; or there are threads enough. Another one looks, too.
                    self._threads.discard(threading.current_thread())
                    self._wakes.put(None)
                    return
                else:
                    (self._planned if planned else self._new)[job.ahead].remove(job)
                    if planned:
                        self._asking.append(job)
            if job is None:
                self._wakes.get()
                with self._lock:
                    self._idle -= 1
                continue
            try:
                if planned or self._plan(job):
                    self._ask(job)
            except BaseException:
                _log.exception("unexpected failure in a thread of the client")
            job = None  # it holds on to a whole lookup

    def _plan(self, job: Job) -> bool:
        """Whether it is to be asked for now, from a place that it has."""
        if not job.plan():
            return False
        with self._lock:
            if self._has_place(job):
                self._asking.append(job)
                return True
            self._planned[job.ahead].append(job)
            way = (
                None
                if job.ahead
                else next((one for one in self._asking if one.hint and not one.delivery.given_up), None)
            )
        # It holds memory, and a version: let it go as soon as nobody wants it.
        job.delivery.on_cancel(self._look)
        if way is not None:
            way.delivery.give_up(StepCancelledError("the hint gave way to a lookup"), wait=False)
        return False

    def _look(self) -> None:
        with self._lock:
            self._staff()

    def _ask(self, job: Job) -> None:
        job.delivery.on_cancel(partial(self._leave, job))
        try:
            job.ask()
        finally:
            with self._lock:
                if job in self._asking:
                    self._asking.remove(job)
                else:
                    self._held -= 1
                self._staff()

    def _leave(self, job: Job) -> None:
        """Let others have the place of a job that was given up; its thread is held until the call returns."""
        with self._lock:
            if job in self._asking and self._held < _MOST_HELD:
                # In this order, as Ctrl-C may come between: the end of a job without a place counts one less.
                self._held += 1
                self._asking.remove(job)
                self._staff()
