"""Spans of OpenTelemetry, made of steps that have ended: a step, its requests, and what each server did when."""

import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from engrampool_client.errors import EngrampoolError
from engrampool_client.tracing.record import Asked, Trace
from engrampool_proto.errors import how_to_install

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

# Of spans that cannot be made, a line in so long.
_TOLD_EVERY_S = 60.0
_log = logging.getLogger("engrampool")


class Spans:
    """Makes spans by the process's tracer provider. Thread-safe. Raises ValueError without opentelemetry-api.

    All spans of a step are made when it has ended, at the times that were measured: until then a step that is traced
    costs a few numbers that are written down, and one that is not sampled never more than that and one span.
    """

    def __init__(self) -> None:
        try:
            from opentelemetry import context, trace
        except ImportError as error:
            raise ValueError(f"trace needs the package 'opentelemetry-api': {how_to_install('otel')}") from error
        self._context, self._trace = context, trace
        self._tracer: Tracer = trace.get_tracer("engrampool")
        # A step may be lost where its thread has a lock of OpenTelemetry's: its spans are made by the next one's end.
        self._ended: deque[tuple[Trace, float, str, EngrampoolError | None, int, Mapping[int, float]]] = deque()
        self._told_at = -_TOLD_EVERY_S

    def begin(self, what: tuple[str, str, tuple[int, ...]], tokens: int, nbytes: int) -> Trace:
        """Of a step of the caller's, whose context is that of this thread or task now."""
        return Trace(self._context.get_current(), what, tokens, nbytes)

    def ended(
        self, trace: Trace, outcome: str, error: EngrampoolError | None, masked: int, arrived_s: Mapping[int, float]
    ) -> None:
        """Make spans of a step that ends now. masked: tokens that went without rows. arrived_s: of each layer."""
        self._ended.append((trace, time.monotonic(), outcome, error, masked, dict(arrived_s)))
        if not trace.lost:
            self.flush()

    def flush(self) -> None:
        """Make what was put off."""
        while self._ended:
            try:
                step = self._ended.popleft()
            except IndexError:  # another thread took it
                return
            try:
                self._make(*step)
            except Exception:  # of a sampler, say: no step fails by how it is told of
                now = time.monotonic()
                if now >= self._told_at + _TOLD_EVERY_S:
                    self._told_at = now
                    _log.exception("spans of a step could not be made")

    def _make(
        self,
        trace: Trace,
        ended_at: float,
        outcome: str,
        error: EngrampoolError | None,
        masked: int,
        arrived_s: Mapping[int, float],
    ) -> None:
        model, version, layers = trace.what
        attributes: dict[str, str | int | Sequence[int]] = {
            "engrampool.model": model,
            "engrampool.version": version,
            "engrampool.layers": layers,
            "engrampool.tokens": trace.tokens,
            "engrampool.bytes": trace.nbytes,
            "engrampool.outcome": outcome,
        }
        if masked:
            attributes["engrampool.masked_tokens"] = masked
        if error is not None:
            attributes["error.type"] = type(error).__name__
        clock = _Clock()
        context, begin = trace.context, clock.ns(trace.begun_at)
        step = self._tracer.start_span("engrampool.step", context, attributes=attributes, start_time=begin)
        if step.is_recording():
            for layer, seconds in arrived_s.items():
                at = clock.ns(trace.begun_at + seconds)
                step.add_event("engrampool.layer", {"engrampool.layer": layer}, timestamp=at)
            inside = self._trace.set_span_in_context(step, context)
            for asked in list(trace.requests):
                self._make_request(inside, asked, ended_at, clock)
            if outcome in ("failed", "masked"):
                step.set_status(self._trace.StatusCode.ERROR, str(error))
        step.end(clock.ns(ended_at))

    def _make_request(self, context: object, asked: Asked, ended_at: float, clock: "_Clock") -> None:
        attributes: dict[str, str | int] = {
            "server.address": asked.server,
            "engrampool.lane": asked.lane,
            "engrampool.bytes": asked.nbytes,
            "engrampool.hedged": asked.hedged,
        }
        if asked.number:
            attributes["engrampool.request"] = f"{asked.number:016x}"
        span = self._tracer.start_span(
            "engrampool.request",
            context,  # type: ignore[arg-type]
            kind=self._trace.SpanKind.CLIENT,
            attributes=attributes,
            start_time=clock.ns(asked.at),
        )
        end = asked.ended_at or ended_at
        if asked.why:
            span.set_status(self._trace.StatusCode.ERROR, asked.why)
        if asked.times is not None and span.is_recording():
            inside = self._trace.set_span_in_context(span, context)  # type: ignore[arg-type]
            for hop, begin_s, end_s in placed(asked, end):
                child = self._tracer.start_span(f"engrampool.{hop}", inside, start_time=clock.ns(begin_s))
                child.end(clock.ns(end_s))
        span.end(clock.ns(end))


class _Clock:
    """From time.monotonic to the nanoseconds of the epoch, as the two stand now."""

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.monotonic_ns()

    def ns(self, seconds: float) -> int:
        return self._offset + round(seconds * 1e9)


def placed(asked: Asked, end: float) -> list[tuple[str, float, float]]:
    """What the server says of its time, within the request: (hop, begin, end), by time.monotonic.

    Its clock is another one, so only how long each took is known. What the request took beside queue and gather until
    the first of the answer came is the network's, half of it on the way there. Where nobody saw the first of it come,
    the network's part is what is left of the whole. Nothing is placed outside of the request.
    """
    if asked.times is None:
        return []
    spans = [("queue", asked.times.queue_us), ("gather", asked.times.gather_us), ("send", asked.times.send_us)]
    took_s, first_s = asked.times.total_us / 1e6, asked.first_s
    before_s = (asked.times.queue_us + asked.times.gather_us) / 1e6
    network_s = end - asked.at - took_s if first_s is None else first_s - before_s
    at, placed_at = asked.at + max(0.0, network_s) / 2, []
    for hop, micros in spans:
        begin, at = min(at, end), min(at + micros / 1e6, end)
        placed_at.append((hop, begin, at))
    return placed_at
