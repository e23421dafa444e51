"""What is fetched before its forward: the next pieces of prompts, and the tokens that were sampled last."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_client.integrations.forwards.areas import Area, Fetch, Forward, Piece
from engrampool_client.integrations.forwards.counts import EngineCounts
from engrampool_client.integrations.forwards.history import Numbers

_log = logging.getLogger("engrampool")


class Early:
    """What is on its way for requests, by their numbers. Not thread-safe: its owner has a lock.

    decodes: two areas that sampled tokens' rows take turns in. free: areas of a piece each, of which a prompt fills
    those of `ahead_tokens`.
    ages: of each number, how many requests have had it, so that a request is told from the next one.
    """

    def __init__(
        self,
        decodes: list[Area],
        free: list[Area],
        ahead_tokens: int,
        requests: int,
        fetch: Callable[..., Fetch],
        counts: EngineCounts,
    ) -> None:
        self._decodes, self._free, self._fetch, self._counts = decodes, free, fetch, counts
        self._ahead = ahead_tokens
        self._pieces: dict[int, list[Piece]] = {}
        self._has_pieces = np.zeros(requests, np.bool_)
        # Where the prompt ends of each request, and from where on tokens are sampled.
        self._ends = np.zeros(requests, np.int64)
        self.ages = np.zeros(requests, np.int64)
        self._decoded: Fetch | None = None
        # Numbers of requests whose prompts go on.
        self._open: set[int] = set()
        # Of sampled tokens, in their order, as bytes, which are compared in one go: of which requests and at which
        # positions, and which they are. None once one is not to be used, or histories may have others.
        self._decoding: tuple[bytes, bytes] | None = None
        self._sampled: bytes | None = None
        # Where in memory the row of each request's sampled token is to be, or -1; and its position.
        self._decoded_at, self._decoded_position = np.full(requests, -1), np.zeros(requests, np.int64)

    def add(self, number: int, end: int) -> None:
        """A request whose prompt ends there."""
        self._ends[number] = end
        if self._ahead:
            self._open.add(number)

    def remove(self, number: int) -> None:
        """A request is no more."""
        self.ages[number] += 1
        self._ends[number] = 0
        self._open.discard(number)
        self.forget(number)

    def forget(self, number: int) -> None:
        """What is on its way for a request is not to be used."""
        self._decoded_at[number], self._decoding = -1, None
        self._has_pieces[number] = False
        for piece in self._pieces.pop(number, ()):
            self._free_again(piece)

    def sampled_at(self, numbers: Numbers, starts: Numbers) -> Numbers:
        """The position of the first token that is sampled after chunks that begin there."""
        return np.maximum(self._ends[numbers], starts + 1)

    def go_on(self, forward: Forward) -> None:
        """Fetch what comes next of the prompts that a forward runs a chunk of."""
        if not self._open:
            return
        numbers, stops = forward.numbers, forward.starts + forward.counts
        more = stops < self._ends[numbers]
        self._open.difference_update(numbers[~more].tolist())
        for number, stop in zip(numbers[more].tolist(), stops[more].tolist(), strict=True):
            self.extend(number, stop)

    def extend(self, number: int, position: int, most: int | None = None) -> bool:
        """Fetch the next pieces of a prompt from a position on, as far as there is memory that nobody reads.

        most: up to so many tokens beyond the position, if that is fewer than `ahead_tokens`. Pieces that end before the
        position are given up. Gives whether all that may be asked for was.
        """
        pieces = self._pieces.setdefault(number, [])
        while pieces and pieces[0].stop <= position:
            self._free_again(pieces.pop(0))
        begin = pieces[-1].stop if pieces else position
        end = int(self._ends[number])
        last = min(end, position + (self._ahead if most is None else min(most, self._ahead)))
        while begin < last and self.has_room:
            area = self._free[0]
            stop = min(end, begin + area.size)
            chunk = (np.array([one]) for one in (number, begin, stop - begin))
            try:
                fetch = self._fetch(area, area.base, *chunk, ahead=True)
            except Exception as error:  # the forward asks itself, and says what is wrong
                _log.debug("a prompt's rows are not asked for early: %s", error)
                break
            self._free.pop(0)
            pieces.append(Piece(fetch, begin, stop))
            begin = stop
        self._has_pieces[number] = bool(pieces)
        if not pieces:
            del self._pieces[number]
        return begin >= last

    @property
    def has_room(self) -> bool:
        """Whether there is memory for another piece."""
        return bool(self._free) and self._free[0].copied.query()

    def decode(self, numbers: Numbers, positions: Numbers, tokens: npt.NDArray[Any]) -> None:
        """Fetch the rows of one token of each of these requests. tokens: all that were sampled."""
        self._let_go_of_decoded()
        if not len(numbers):
            return
        self._decodes.append(self._decodes.pop(0))
        area = self._decodes[0]
        area.copied.synchronize()
        fetch = self._decoded = self._fetch(area, area.base, numbers, positions, np.ones(len(numbers), np.int64))
        fetch.at = np.arange(fetch.base, fetch.base + len(numbers))
        self._decoded_at[numbers], self._decoded_position[numbers] = fetch.at, positions
        self._decoding = numbers.tobytes(), positions.tobytes()
        self._sampled = tokens.astype(np.int32).tobytes()

    def knows(self, numbers: Numbers, starts: Numbers, tokens: npt.NDArray[Any]) -> bool:
        """Whether these requests have just these tokens there, which were sampled, and nothing else was told since."""
        sampled, self._sampled = self._sampled, None
        if sampled is None or self._decoding is None:
            return False
        of = numbers.tobytes(), starts.tobytes()
        return of == self._decoding and tokens.astype(np.int32, copy=False).tobytes() == sampled

    def take(self, forward: Forward, tokens: int) -> bool:
        """Let a forward of so many tokens have what is on its way for them. Gives whether that is all of them."""
        numbers, starts, counts = forward.numbers, forward.starts, forward.counts
        decoded = self._decoded
        if decoded is not None and decoded.step.error is None:
            # Most forwards have the very tokens that were sampled, in their order.
            if tokens == len(numbers) and (numbers.tobytes(), starts.tobytes()) == self._decoding:
                forward.at, forward.runs = decoded.at, [(decoded.base, 0, tokens)]
                self._decoded_at.fill(-1)
                self._decoding = None
                self._use(forward, decoded, tokens)
                return True
            forward.at = np.full(tokens, -1)
            at = self._decoded_at[numbers]
            good = (at >= 0) & (self._decoded_position[numbers] == starts)
            if good.any():
                forward.at[(counts.cumsum() - counts)[good]] = at[good]
                self._use(forward, decoded, int(good.sum()))
            self._decoded_at[numbers], self._decoding = -1, None
        else:
            forward.at = np.full(tokens, -1)
        if self._pieces:
            self._take_pieces(forward)
        return bool((forward.at >= 0).all())

    def _take_pieces(self, forward: Forward) -> None:
        numbers, starts, counts = forward.numbers, forward.starts, forward.counts
        firsts = counts.cumsum() - counts
        for one in np.flatnonzero(self._has_pieces[numbers]):
            number, start, stop = int(numbers[one]), int(starts[one]), int(starts[one] + counts[one])
            left = []
            for piece in self._pieces[number]:
                low, high = max(start, piece.start), min(stop, piece.stop)
                if low < high and piece.fetch.step.error is None:
                    place = slice(firsts[one] + low - start, firsts[one] + high - start)
                    forward.at[place] = piece.fetch.base + np.arange(low - piece.start, high - piece.start)
                    self._use(forward, piece.fetch, high - low)
                if piece.stop > stop and piece.fetch.step.error is None:
                    left.append(piece)
                else:
                    forward.spent.append(piece)
            self._pieces[number] = left
            self._has_pieces[number] = bool(left)
            if not left:
                del self._pieces[number]

    def _use(self, forward: Forward, fetch: Fetch, tokens: int) -> None:
        if fetch not in forward.early:
            forward.early.append(fetch)
        fetch.served += tokens

    def lost(self, fetch: Fetch, tokens: int) -> None:
        """So many tokens of what a forward took did not come."""
        fetch.served -= tokens

    def release(self, forward: Forward) -> None:
        """A forward reads its pieces no more, other than by copies that were issued."""
        spent, forward.spent = forward.spent, []
        for piece in spent:
            self._free_again(piece)

    def close(self) -> None:
        """Nothing comes any more."""
        self._let_go_of_decoded()
        for number in list(self._pieces):
            self.forget(number)

    def _let_go_of_decoded(self) -> None:
        fetch, self._decoded = self._decoded, None
        self._decoding = self._sampled = None
        if fetch is not None:
            self._decoded_at.fill(-1)
            self._done(fetch)

    def _free_again(self, piece: Piece) -> None:
        self._done(piece.fetch)
        self._free.append(piece.fetch.area)

    def _done(self, fetch: Fetch) -> None:
        fetch.step.cancel()
        self._counts.early["served"] += fetch.served
        self._counts.early["thrown_away"] += fetch.tokens - fetch.served
