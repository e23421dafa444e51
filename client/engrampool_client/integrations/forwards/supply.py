"""Rows of an engine's forwards, fetched before they are needed where that can be: start, wait, landed."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_client.client import Client
from engrampool_client.errors import EngrampoolError
from engrampool_client.integrations.forwards.agreement import Agree, Vote
from engrampool_client.integrations.forwards.areas import NOWHERE, Area, Fetch, Forward, Landing
from engrampool_client.integrations.forwards.counts import EngineCounts
from engrampool_client.integrations.forwards.early import Early
from engrampool_client.integrations.forwards.history import Flags, Histories, Numbers
from engrampool_client.integrations.forwards.quiet import Quietable
from engrampool_client.integrations.forwards.verify import Verifier

# Rows are copied to the device in so many pieces at most; of more they are brought together before.
_COPIES = 16
_log = logging.getLogger("engrampool")


class Supply(Quietable):
    """A model's rows, for an engine that tells of its requests: `add`, `sampled`, `remove`; and of its forwards.

    A forward is `start`, then `wait`, once, for all layers: from then on they are in `landed` or on their way there, in
    the order of the device's work, until the next forward's `wait`. Where Python runs between layers, it is `wait_for`
    of each of them in their order. To be used by the engine's one thread.

    requests: numbers of requests are 0 .. requests - 1; each has one token in a forward, or a chunk.
    timeout_s: a forward's deadline, from `start` on. agree: how the ranks of a group come to one outcome.
    ahead_tokens: of a prompt, so many are fetched before their forward at most, in pieces of `piece_tokens`; 0: none.
        There is memory for twice as many, as those of the forward before are still copied from.
    early_decode: whether a sampled token's rows are asked for when it is known. verifier: compares rows, if given.
    """

    def __init__(
        self,
        client: Client,
        landing: Landing,
        histories: Histories,
        *,
        timeout_s: float,
        agree: Agree | None = None,
        counts: EngineCounts | None = None,
        ahead_tokens: int = 0,
        piece_tokens: int = 1024,
        early_decode: bool = True,
        verifier: Verifier | None = None,
    ) -> None:
        self.client, self.landing, self._histories = client, landing, histories
        self.counts = EngineCounts(landing.layers) if counts is None else counts
        self._timeout_s, self._agree, self._early_decode = timeout_s, agree, early_decode
        self._verifier = verifier
        requests, whole = len(histories.lengths), landing.max_tokens
        decodes = requests if early_decode else 0
        sizes = [whole, whole, decodes, decodes, *[piece_tokens] * (2 * -(-ahead_tokens // piece_tokens))]
        bases = np.cumsum([0, *sizes]).tolist()
        self._rows = landing.memory(bases[-1])
        areas = [Area(base, size, landing.event()) for base, size in zip(bases, sizes, strict=False)]
        # Forwards take turns in two areas: rows of one may be on their way to the device when the next one's come.
        self._turns = areas[:2]
        self._early = Early(areas[2:4], areas[4:], ahead_tokens, requests, self._fetch, self.counts)
        self._thread = ThreadPoolExecutor(1, "engrampool-engine")
        self._sampled: Future[None] | None = None
        self._forward: Forward | None = None
        # Of histories and of what is fetched early, both of which the thread changes when sampled ids come.
        self._lock = Lock()

    # --- requests

    def add(self, number: int, tokens: npt.ArrayLike, computed: int | None, first: int = 0) -> None:
        """A request has come, in the place of the number's last one.

        tokens: all that there are from position `first` on; what is before is never read. computed: so many of all need
        no forward; None: nothing is fetched before `extend` or `start`.
        """
        with self._lock:
            self._early.remove(number)
            self._histories.add(number, tokens, first)
            self._early.add(number, int(self._histories.lengths[number]))
            if computed is not None and not self.is_quiet:
                self._early.extend(number, computed)

    def extend(self, number: int, position: int, most: int | None = None) -> bool:
        """Fetch a prompt's tokens from `position` on, `ahead_tokens` of them at most, or `most`.

        What is before is wanted no more. Gives whether all that was asked for; what has no room is for a later call.
        """
        with self._lock:
            return not self.is_quiet and self._early.extend(number, position, most)

    @property
    def has_room(self) -> bool:
        """Whether more can be fetched of prompts now."""
        return self._early.has_room

    def remove(self, number: int) -> None:
        """A request has ended, or its place is taken from it."""
        with self._lock:
            self._early.remove(number)
            self._histories.remove(number)

    def learn(self, numbers: Numbers, starts: Numbers, counts: Numbers, tokens: npt.NDArray[np.integer[Any]]) -> None:
        """What the engine has at these positions of requests, whatever was known: for the forward that follows."""
        self._join()
        with self._lock:
            if self._early.knows(numbers, starts, tokens):
                return
            held = self._histories.put(numbers, starts, counts, tokens)
            if not held.all():
                for number in numbers[~held].tolist():
                    self._early.forget(number)

    def sampled(self, arrived: Callable[[], tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> None:
        """Tokens were sampled after the last forward. arrived: waits until they are there, in a thread of its own.

        It gives ids [requests, most] in the forward's order, and how many of them each request has got.
        """
        forward = self._forward
        if forward is None or self.is_quiet:
            return
        self._join()
        with self._lock:
            ages, firsts = self._early.ages[forward.numbers], self._early.sampled_at(forward.numbers, forward.starts)
        try:
            self._sampled = self._thread.submit(self._take_sampled, arrived, forward.numbers, ages, firsts)
        except RuntimeError as error:  # there can be no thread for it: the engine goes on, and the forward asks itself
            _log.warning("sampled tokens' rows are not asked for early: %s", error)

    @property
    def sampling(self) -> bool:
        """Whether sampled tokens are waited for."""
        return self._sampled is not None and not self._sampled.done()

    def _take_sampled(
        self,
        arrived: Callable[[], tuple[npt.NDArray[Any], npt.NDArray[Any]]],
        numbers: Numbers,
        ages: Numbers,
        firsts: Numbers,
    ) -> None:
        ids, counts = arrived()
        with self._lock:
            # A request that has ended since, or another one in its place, has none of these.
            alive = np.flatnonzero((counts > 0) & (self._early.ages[numbers] == ages))
            numbers, firsts, counts = numbers[alive], firsts[alive], counts[alive].astype(np.int64)
            tokens = ids[alive][np.arange(ids.shape[1]) < counts[:, None]]
            self._histories.put(numbers, firsts, counts, tokens)
            if self._early_decode:
                self._early.decode(numbers, firsts + counts - 1, tokens)

    def _join(self) -> None:
        """The thread is through with what was sampled. What it failed with costs time only: the forward asks itself."""
        job, self._sampled = self._sampled, None
        if job is not None:
            error = job.exception()
            if error is not None:
                _log.warning("sampled tokens' rows are not asked for early: %s", error)

    # --- forwards

    def dummy(self, tokens: int) -> None:
        """A forward that nobody needs the outcome of: its rows are zeros."""
        self._end_forward()
        self.counts.dummies += 1
        for layer in self.landing.layers:
            self.landing.clear(layer, slice(0, tokens))

    def start(self, numbers: Numbers, starts: Numbers, counts: Numbers, *, go_on: bool = True) -> None:
        """A forward has these chunks of requests, one after the other. What it fails with is raised by `wait`.

        go_on: what comes next of their prompts is asked for, too; else `extend` does that.
        """
        total = sum(counts.tolist())  # numpy takes longer for so few
        self._end_forward()
        self._turns.append(self._turns.pop(0))
        forward = self._forward = Forward(
            numbers,
            starts,
            counts,
            time.monotonic() + self._timeout_s,
            self._turns[0],
            NOWHERE,
            Vote(len(self.landing.layers), total, self._agree),
        )
        try:
            self._join()
            forward.area.copied.synchronize()
            with self._lock:
                if not self._early.take(forward, total):
                    self._ask(forward, forward.at < 0, self.landing.layers)
                if go_on:
                    self._early.go_on(forward)
        except BaseException as error:
            forward.error = error

    def failed(self, tokens: int, error: BaseException) -> None:
        """In the place of `start`: so many tokens were to be asked for, and cannot be. `wait` raises it."""
        nothing = np.zeros(0, np.int64)
        self._end_forward()
        vote = Vote(len(self.landing.layers), tokens, self._agree)
        self._forward = Forward(nothing, nothing, nothing, 0.0, self._turns[0], NOWHERE, vote, error=error)

    def wait(self, padded: int = 0) -> Flags:
        """Wait for all layers' rows, and have them copied to where layers read.

        Gives bool [layers, tokens]: which have theirs, on all ranks; rows of the others are zeros, and those of tokens
        up to `padded`. Raises what the forward failed with; PoolError where another rank's did.
        """
        try:
            forward, layers = self._forward, self.landing.layers
            assert forward is not None
            valid = forward.vote.settle(lambda flags: self._find(forward, flags))
        except BaseException:
            assert self._forward is not None
            self._forward.vote.lost()
            self.counts.failed += 1
            raise
        finally:
            self._copied()
        for layer, has in zip(layers, valid, strict=True):
            self._clear(layer, has)
        if padded > len(forward):
            for layer in layers:
                self.landing.clear(layer, slice(len(forward), padded))
        self.counts.steps += 1
        self.counts.tokens += len(forward)
        return valid

    def wait_for(self, layer: int) -> Flags:
        """As `wait`, of one layer: bool [tokens]. An error ends the layer, on all ranks; the next one may be wanted."""
        forward = self._forward
        assert forward is not None
        vote = Vote(1, sum(forward.counts.tolist()), self._agree)
        try:
            valid = vote.settle(lambda flags: self._find_layer(forward, layer, flags[0]))[0]
        except BaseException:
            vote.lost()
            self.counts.failed += 1
            raise
        finally:
            self._copied(layer == self.landing.layers[-1])
        self._clear(layer, valid)
        self.counts.steps += layer == self.landing.layers[0]
        self.counts.tokens += len(forward) if layer == self.landing.layers[0] else 0
        return valid

    def landed(self, layer: int) -> Any:
        """What the layer reads: uint8 [max_tokens, columns, row_bytes] on the device, always the same memory."""
        return self.landing.landed(layer)

    def _find(self, forward: Forward, flags: Flags) -> None:
        for layer, has in zip(self.landing.layers, flags, strict=True):
            self._find_layer(forward, layer, has)

    def _find_layer(self, forward: Forward, layer: int, flags: Flags) -> None:
        if forward.error is not None:
            raise forward.error
        begin = time.perf_counter()
        has = self._receive(forward, layer)
        if has is not None:
            missing = ~has & self._is_early(forward)
            if missing.any():
                self._ask_again(forward, missing, self.landing.layers[self.landing.layers.index(layer) :])
                has = self._receive(forward, layer)
        self.counts.waited(layer, time.perf_counter() - begin)
        flags[:] = True if has is None else has
        if self._verifier is not None:
            chunks, rows = (forward.numbers, forward.starts, forward.counts), self._rows[layer]
            with self._lock:
                self._verifier.rows(layer, chunks, flags, rows, forward.at)
        self._land(forward, layer)

    def _clear(self, layer: int, valid: Flags) -> None:
        """Tokens that have no rows of a layer have zeros."""
        if not valid.all():
            self.landing.clear(layer, np.flatnonzero(~valid))
            self.counts.masked[layer] += int((~valid).sum())

    def _receive(self, forward: Forward, layer: int) -> Flags | None:
        """Wait for a layer of all that was asked for. Gives which tokens have it, None for all.

        What the forward asked for itself ends by its deadline, and may raise. What was asked for before has a deadline
        of its own, and is asked for again if it fails, which then says why.
        """
        flawed: list[tuple[Fetch, Flags | None]] = []
        for fetch in forward.early:
            try:
                fetch.step.rows(layer, max(0.0, forward.deadline - time.monotonic()))
            except EngrampoolError:
                flawed.append((fetch, None))
            else:
                if fetch.step.error is not None:
                    flawed.append((fetch, fetch.step.valid(layer)))
        for fetch in forward.own:
            if layer in fetch.step.layers:
                fetch.step.rows(layer)
                if fetch.step.error is not None:
                    flawed.append((fetch, fetch.step.valid(layer)))
        if not flawed:
            return None
        has, at = np.ones(len(forward), np.bool_), forward.at
        for fetch, valid in flawed:
            there = (at >= fetch.base) & (at < fetch.base + fetch.tokens)
            has[there] = False if valid is None else valid[at[there] - fetch.base]
        return has

    def _is_early(self, forward: Forward) -> Flags:
        """Of each token, whether its rows were asked for before the forward."""
        base, size = forward.area.base, forward.area.size
        return (forward.at < base) | (forward.at >= base + size)

    def _ask_again(self, forward: Forward, missing: Flags, layers: Sequence[int]) -> None:
        """What was asked for early and did not come is asked for again, in the time that is left."""
        with self._lock:
            for fetch in forward.early:
                lost = missing & (forward.at >= fetch.base) & (forward.at < fetch.base + fetch.tokens)
                self._early.lost(fetch, int(lost.sum()))
            self._ask(forward, missing, layers)

    def _ask(self, forward: Forward, mask: Flags, layers: Sequence[int]) -> None:
        """Ask for the rows of some tokens of a forward."""
        which = np.flatnonzero(mask)
        if not len(which):
            return
        numbers, starts, counts = forward.numbers, forward.starts, forward.counts
        if len(which) < len(forward):
            owners = np.arange(len(counts)).repeat(counts)[which]
            positions = which - (counts.cumsum() - counts - starts)[owners]
            # A chunk for each run of tokens that stand one after the other in their request.
            begins = np.flatnonzero(np.r_[True, (np.diff(which) != 1) | (np.diff(owners) != 0)])
            numbers, starts = numbers[owners[begins]], positions[begins]
            counts = np.diff(np.r_[begins, len(which)])
        base = forward.area.base + forward.used
        left = max(1e-3, forward.deadline - time.monotonic())
        forward.own.append(self._fetch(forward.area, base, numbers, starts, counts, layers=layers, timeout_s=left))
        forward.at[which], forward.runs = base + np.arange(len(which)), None
        forward.used += len(which)

    def _fetch(
        self, area: Area, base: int, numbers: Numbers, starts: Numbers, counts: Numbers, **settings: Any
    ) -> Fetch:
        """Ask for the rows of some chunks, into the memory from `base` on."""
        batch = self._histories.batch(numbers, starts, counts)
        tokens = len(batch.tokens)
        layers = settings.setdefault("layers", self.landing.layers)
        out = {layer: self._rows[layer][base : base + tokens] for layer in layers}
        settings.setdefault("timeout_s", self._timeout_s)
        return Fetch(self.client.prefetch(*batch, out=out, **settings), area, base, tokens)

    def _land(self, forward: Forward, layer: int) -> None:
        """Have a layer's rows copied to where it reads them, in as few pieces as they lie in."""
        runs = forward.find_runs()
        if len(runs) > _COPIES:
            rows, area = self._rows[layer], forward.area
            rows[area.base : area.base + len(forward)] = rows[forward.at]
            runs = [(area.base, 0, len(forward))]
        for place, begin, tokens in runs:
            self.landing.copy(layer, place, begin, tokens)

    def _copied(self, last: bool = True) -> None:
        """Copies of the forward's rows were issued, or none follows. last: nor follows any of another layer."""
        forward = self._forward
        assert forward is not None
        forward.area.copied.record()
        for fetch in forward.early:
            fetch.area.copied.record()
        if last:
            with self._lock:
                self._early.release(forward)
            forward.over, forward.early = True, []

    def _end_forward(self) -> None:
        """Nothing of an earlier forward comes any more, whatever became of it."""
        forward, self._forward = self._forward, None
        if forward is None:
            return
        for fetch in forward.own:
            fetch.step.cancel()
        if not forward.over:
            with self._lock:
                self._early.release(forward)

    def close(self) -> None:
        """Give up what is under way, and close the client."""
        self.release()
        self.client.close()

    def release(self) -> None:
        """Give up what is under way, and leave the client to others."""
        self._end_forward()
        self._thread.shutdown()
        with self._lock:
            self._early.close()
