"""What a lookup did, written down as it goes: plain numbers, of which spans are made once it has ended."""

import time
from typing import Any

from engrampool_proto.wire import ServerTimes


class Asked:
    """One request to one server. at, ended_at: by time.monotonic; ended_at is 0 until it ends.

    number: as the logs of both sides name it, 0 where nothing is sent. nbytes: of rows. hedged: a second server was
    asked, as the first was late. first_s: from asking until the first of the answer came, None where nobody saw that.
    times: the server's, None where it did not answer. why: why it did not, "" if it did.
    """

    __slots__ = ("at", "ended_at", "first_s", "hedged", "lane", "nbytes", "number", "server", "times", "why")

    def __init__(self, server: str, lane: str, nbytes: int, number: int, at: float, hedged: bool = False) -> None:
        self.server, self.lane, self.nbytes, self.number, self.at = server, lane, nbytes, number, at
        self.hedged, self.ended_at, self.why = hedged, 0.0, "not answered before the step ended"
        self.first_s: float | None = None
        self.times: ServerTimes | None = None

    def answered(self, times: ServerTimes | None, first_s: float | None) -> None:
        """All of the answer is there, now."""
        self.times, self.first_s, self.ended_at, self.why = times, first_s, time.monotonic(), ""

    def received(self, times: ServerTimes | None, lay_there: bool = False) -> None:
        """As `answered`, received as it came (so sending took no longer), unless it lay there before."""
        first_s = None
        if times is not None and not lay_there:
            first_s = time.monotonic() - self.at - times.send_us / 1e6
        self.answered(times, first_s)

    def gave_up(self, why: str) -> None:
        """Nothing more comes of it, from now on, unless it has ended."""
        if not self.ended_at:
            self.why, self.ended_at = why, time.monotonic()


class Trace:
    """Of one step. Written to by whatever thread has a request to tell of, and read once the step has ended.

    context: its caller's, as OpenTelemetry has it. what: model, version and layers. begun_at: by time.monotonic.
    lost: nobody refers to the step any more, and it ends in the midst of anything.
    """

    __slots__ = ("begun_at", "context", "lost", "nbytes", "requests", "tokens", "what")

    def __init__(self, context: Any, what: tuple[str, str, tuple[int, ...]], tokens: int, nbytes: int) -> None:
        self.context, self.what, self.tokens, self.nbytes = context, what, tokens, nbytes
        self.begun_at, self.lost = time.monotonic(), False
        self.requests: list[Asked] = []

    def asked(
        self, server: str, lane: str, nbytes: int, number: int = 0, at: float | None = None, hedged: bool = False
    ) -> Asked:
        """Write down a request that was sent then, or now; what becomes of it is to be said to what this gives."""
        asked = Asked(server, lane, nbytes, number, time.monotonic() if at is None else at, hedged)
        self.requests.append(asked)
        return asked
