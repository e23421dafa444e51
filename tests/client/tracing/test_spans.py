"""Spans of OpenTelemetry: made by its own SDK, of lookups of real servers, whichever way they go."""

import asyncio
import gc
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import StatusCode

from engrampool_client import AsyncClient, Client, RejectedError, UnavailableError
from engrampool_client.pool import latency
from engrampool_client.testing import ServerProcess, serve_process
from engrampool_client.tracing.record import Asked
from engrampool_client.tracing.spans import placed
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.wire import ServerTimes
from server_fixtures import LIMIT_S, PATIENCE, eventually
from small_model import small_spec, write_model

HOPS = ["engrampool.queue", "engrampool.gather", "engrampool.send"]
TRACED = {"trace": True, **PATIENCE}


class Chosen(Sampler):
    """Samples by what a step has come to, as its attributes say."""

    wanted = re.compile("")
    asked = 0

    def should_sample(self, parent_context, trace_id, name, kind=None, attributes=None, links=None, trace_state=None):
        self.asked += 1
        samples = self.wanted.search(str((attributes or {}).get("engrampool.outcome", "")))
        return SamplingResult(Decision.RECORD_AND_SAMPLE if samples else Decision.DROP, attributes)

    def get_description(self) -> str:
        return "chosen"


EXPORTER, SAMPLER = InMemorySpanExporter(), Chosen()


@pytest.fixture(autouse=True, scope="module")
def provider() -> TracerProvider:
    """The process's, which it has once."""
    provider = TracerProvider(sampler=SAMPLER)
    provider.add_span_processor(SimpleSpanProcessor(EXPORTER))
    trace.set_tracer_provider(provider)
    return provider


@pytest.fixture(autouse=True)
def nothing_before() -> None:
    EXPORTER.clear()
    SAMPLER.wanted, SAMPLER.asked = re.compile(""), 0


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("traced") / "small", small_spec())


@pytest.fixture(scope="module")
def server(packed) -> Iterator[ServerProcess]:
    with serve_process(packed, workers=1, memory="shm") as running:
        yield running


def spans(name: str = "") -> list[ReadableSpan]:
    return [span for span in EXPORTER.get_finished_spans() if span.name.startswith(name)]


def the_step() -> ReadableSpan:
    """The only step's. Who waits for a step may go on before its spans are made, by the thread that ended it."""
    (span,) = eventually(lambda: spans("engrampool.step"), "the step has a span")
    return span


def below(span: ReadableSpan) -> list[ReadableSpan]:
    """Its children, as they begin."""
    ours = [one for one in spans() if one.parent is not None and one.parent.span_id == span.context.span_id]
    return sorted(ours, key=lambda one: (one.start_time, [*HOPS, one.name].index(one.name)))


def within(inner: ReadableSpan, outer: ReadableSpan) -> bool:
    return outer.start_time <= inner.start_time <= inner.end_time <= outer.end_time


def assert_whole(step: ReadableSpan, requests: int) -> None:
    """A step whose requests were answered, each with its server's times, all of them where they were."""
    asked = below(step)
    assert [one.name for one in asked] == ["engrampool.request"] * requests
    for one in asked:
        assert within(one, step)
        hops = below(one)
        assert [hop.name for hop in hops] == HOPS
        assert all(within(hop, one) for hop in hops)
        assert hops[0].end_time == hops[1].start_time
        assert hops[1].end_time == hops[2].start_time


# Small and large over the direct lane; over gRPC in one message, in several and begun by the caller; tokens.
WAYS = [
    ("auto", 20, "local", "direct"),
    ("auto", 3000, "local", "direct"),
    ("auto", 20, "server", "direct"),
    ("off", 5, "local", "grpc"),
    ("off", 40, "local", "grpc"),
    ("off", 3000, "local", "grpc"),
]


@pytest.mark.parametrize("compiled", ["on", "off"])
@pytest.mark.parametrize(("direct", "tokens", "hashing", "lane"), WAYS)
def test_a_step_has_its_requests_and_they_have_the_servers_times(server, compiled, direct, tokens, hashing, lane):
    given = np.arange(tokens, dtype=np.int32) % 1000
    settings = {"direct": direct, "hashing": hashing, "connections": 1, "compiled": compiled, "attach": "off"}
    with Client(server.address, **settings, **TRACED) as client:
        eventually(lambda: client.direct == (direct == "auto"), "the direct lane is there")
        before = time.time_ns()
        with trace.get_tracer("caller").start_as_current_span("forward") as caller:
            step = client.prefetch(given)
            step.wait()
        span = the_step()
        assert span.parent is not None
        assert span.parent.span_id == caller.get_span_context().span_id
        assert span.attributes == {
            "engrampool.model": client.spec.name,
            "engrampool.version": client.version,
            "engrampool.layers": tuple(client.spec.layers),
            "engrampool.tokens": tokens,
            "engrampool.bytes": sum(step.rows(layer).nbytes for layer in step.layers),
            "engrampool.outcome": "ok",
        }
        assert before <= span.start_time <= span.end_time <= time.time_ns()
        assert [event.attributes["engrampool.layer"] for event in span.events] == sorted(client.spec.layers)
        assert_whole(span, 1)
        (asked,) = below(span)
        assert asked.attributes["engrampool.lane"] == lane
        assert asked.attributes["server.address"] == server.address
        assert asked.attributes["engrampool.hedged"] is False
        assert asked.attributes["engrampool.bytes"] > 0
        assert re.fullmatch("[0-9a-f]{16}", asked.attributes["engrampool.request"])
        took = {hop.name: (hop.end_time - hop.start_time) / 1e3 for hop in below(asked)}
        assert took["engrampool.gather"] <= step.times.gather_us + 1

        EXPORTER.clear()
        client.lookup(given)
        span = the_step()
        assert span.parent is None
        assert_whole(span, 1)


@pytest.mark.parametrize("tokens", [20, 3000])
def test_rows_that_are_read_from_memory_are_a_request_without_a_number(server, tokens):
    with Client(server.address, **TRACED) as client:
        eventually(lambda: client.attached, "attached")
        client.prefetch(np.arange(tokens, dtype=np.int32) % 1000).wait()
        span = the_step()
        (asked,) = below(span)
        assert asked.attributes["engrampool.lane"] == "attached"
        assert "engrampool.request" not in asked.attributes
        assert_whole(span, 1)


@pytest.mark.parametrize("compiled", ["on", "off"])
def test_a_cache_asks_for_what_it_lacks(server, compiled):
    settings = {"cache_bytes": 1 << 20, "compiled": compiled, "attach": "off"}
    with Client(server.address, **settings, **TRACED) as client:
        client.prefetch([1, 2, 3]).wait()
        assert_whole(the_step(), 1)

        def nobody_was_asked() -> bool:
            """What came is kept after the step has ended."""
            EXPORTER.clear()
            client.prefetch([1, 2, 3]).wait()
            return len(spans()) == 1

        eventually(nobody_was_asked, "the cache has it")


@pytest.mark.parametrize("compiled", ["on", "off"])
@pytest.mark.parametrize("direct", ["auto", "off"])
def test_each_shard_is_a_request(packed, compiled, direct):
    with ExitStack() as stack:
        servers = [stack.enter_context(serve_process(packed, workers=1, shard=f"{at}/2")) for at in range(2)]
        addresses = [one.address for one in servers]
        settings = {"direct": direct, "compiled": compiled, "attach": "off"}
        client = stack.enter_context(Client(addresses, **settings, **TRACED))
        for tokens in (20, 3000):
            EXPORTER.clear()
            client.prefetch(np.arange(tokens, dtype=np.int32) % 1000).wait()
            span = the_step()
            assert_whole(span, 2)
            assert {one.attributes["server.address"] for one in below(span)} == set(addresses)
            assert len({one.attributes["engrampool.request"] for one in below(span)}) == 2


@pytest.mark.parametrize("compiled", ["on", "off"])
def test_a_hedge_is_a_second_request(packed, monkeypatch, compiled):
    # Nothing but a hedge is to help, however slow this machine is: see test_replicas.py.
    monkeypatch.setattr("engrampool_client.pool.replicas._PATIENCE_S", LIMIT_S)
    monkeypatch.setattr("engrampool_client.pool.replicas._late_s", lambda *_, whole: 2e-3)
    monkeypatch.setattr(latency, "_TRY_ONE_IN", 1)
    monkeypatch.setattr(latency, "_TRY_EVERY_S", 0.0)
    with ExitStack() as stack:
        servers = [stack.enter_context(serve_process(packed, workers=1)) for _ in range(2)]
        settings = {"compiled": compiled, "attach": "off", "breaker_failures": 0}
        client = stack.enter_context(Client([one.address for one in servers], **settings, **TRACED))
        eventually(lambda: client.direct and len(client.status()["servers"]) == 2, "both are there")
        for _ in range(100):
            client.lookup(np.arange(24, dtype=np.int32))
        (both,) = client._shards._sets
        both.budget._tokens = latency._MOST_TOKENS
        for endpoint in client._shards._open.values():
            monkeypatch.setattr(endpoint.breaker, "_probe", lambda: None)
        lanes = [endpoint._native for endpoint in client._shards._open.values()]

        def hedged() -> ReadableSpan | None:
            EXPORTER.clear()
            won = client.stats.hedges_won
            client.lookup(np.arange(24, dtype=np.int32))
            return the_step() if client.stats.hedges_won > won else None

        def hedged_at_once() -> ReadableSpan | None:
            """Whoever has lost its connection is passed over, and not late."""
            eventually(lambda: all(lane.idle or lane._want_one() for lane in lanes), "each has a connection")
            with servers[0].frozen():
                return next(filter(None, (hedged() for _ in range(10))), None)

        span = eventually(hedged_at_once, "a hedge won")
        first, second = below(span)
        assert first.attributes["server.address"] == servers[0].address
        assert not first.attributes["engrampool.hedged"]
        assert first.status.status_code is StatusCode.ERROR
        assert first.status.description == "another server answered first"
        assert below(first) == []
        assert second.attributes["server.address"] == servers[1].address
        assert second.attributes["engrampool.hedged"]
        assert [hop.name for hop in below(second)] == HOPS


@pytest.mark.parametrize("direct", ["auto", "off"])
def test_what_fails_names_its_request_in_the_error_the_span_and_the_servers_log(server, direct, monkeypatch):
    # The server, in a process of its own, looks at tokens all the same.
    monkeypatch.setattr(TokenBatch, "check_tokens", lambda *_: None)
    with Client(server.address, direct=direct, attach="off", hashing="server", **TRACED) as client:
        eventually(lambda: client.direct == (direct == "auto"), "the direct lane is there")

        def refused() -> RejectedError:
            EXPORTER.clear()
            with pytest.raises(RejectedError) as caught:
                client.prefetch([client.spec.vocab_size + 5]).wait()
            return caught.value

        error = refused()
        span = the_step()
        assert span.attributes["engrampool.outcome"] == "failed"
        assert span.attributes["error.type"] == "RejectedError"
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, str(error))
        (asked,) = below(span)
        assert asked.attributes["engrampool.request"] == f"{error.number:016x}"
        assert f"[request {error.number:016x}]" in str(error)
        assert asked.status.status_code is StatusCode.ERROR

        def told() -> bool:
            """One a second is told of, and the log comes a little later."""
            number = f"{refused().number:016x}"
            time.sleep(0.01)
            return any(line["request"] == number for line in server.said("refused"))

        eventually(told, "the server tells of one")


def test_a_step_that_is_masked_says_why_and_the_log_does(packed, caplog):
    with serve_process(packed, workers=1) as lone:
        settings = {"on_failure": "mask", "attach": "off", **TRACED, "timeout_s": 0.2}
        with Client(lone.address, **settings) as client, lone.frozen():
            step = client.prefetch([1, 2, 3])
            step.wait()
            assert not step.valid(client.spec.layers[0]).any()
            span = the_step()
            assert span.attributes["engrampool.outcome"] == "masked"
            assert span.attributes["engrampool.masked_tokens"] == 3
            assert span.attributes["error.type"] == "DeadlineError"
            (asked,) = below(span)
            number = asked.attributes["engrampool.request"]
            assert step.error.number == int(number, 16)
            assert asked.status.description == "not answered before the step ended"
            assert f"[request {number}]" in caplog.text


def test_whose_server_is_away_has_no_request(packed):
    with serve_process(packed, workers=1) as lone:
        client = Client(lone.address, attach="off", breaker_failures=1, **TRACED | {"retry_s": 0.0})
    with client:
        eventually(lambda: _fails(client) and client.breaker_open, "the breaker is open")
        EXPORTER.clear()
        assert _fails(client)
        (span,) = spans()
        assert span.attributes["engrampool.outcome"] == "failed"


def _fails(client: Client) -> bool:
    with pytest.raises(UnavailableError):
        client.lookup([1, 2, 3])
    return True


def test_a_sampler_sees_what_became_of_a_step_and_one_that_is_not_sampled_is_one_decision(server):
    SAMPLER.wanted = re.compile("cancelled")
    with Client(server.address, attach="off", **TRACED) as client:
        client.prefetch([1, 2, 3]).wait()
        eventually(lambda: SAMPLER.asked == 1, "it was decided")
        assert spans() == []
        SAMPLER.wanted = re.compile("ok|^$")
        client.prefetch([1, 2, 3]).wait()
        assert below(the_step())
        assert (len(spans()), SAMPLER.asked) == (5, 1 + 5)


def test_a_step_that_nobody_refers_to_is_told_of_by_the_next_one(server):
    with Client(server.address, attach="off", **TRACED) as client:
        ready = []

        def never() -> None:
            while not ready:
                time.sleep(0.001)

        tokens = np.arange(3, dtype=np.int32)
        step = client.prefetch(tokens, ready=never)
        del step
        gc.collect()
        assert spans() == []  # it may have ended in the midst of the exporter
        ready.append(True)
        client.lookup([1, 2, 3])
        assert [one.attributes["engrampool.outcome"] for one in spans("engrampool.step")] == ["cancelled", "ok"]


def test_the_end_of_a_client_tells_of_what_is_left(server):
    with Client(server.address, attach="off", **TRACED) as client:
        client.prefetch([1, 2, 3], ready=None)
        gc.collect()
    assert len(spans("engrampool.step")) == 1


def test_awaited_lookups_have_their_tasks_span_as_parent(server):
    async def run() -> dict[int, int]:
        async with AsyncClient(server.address, attach="off", **TRACED) as client:

            async def one(tokens: int) -> tuple[int, int]:
                with trace.get_tracer("caller").start_as_current_span("task") as span:
                    await client.lookup(np.arange(tokens, dtype=np.int32))
                    return tokens, span.get_span_context().span_id

            return dict(await asyncio.gather(*map(one, (1, 2, 3, 4))))

    parents = asyncio.run(run())
    eventually(lambda: len(spans("engrampool.step")) == 4, "all have spans")
    found = {one.attributes["engrampool.tokens"]: one.parent.span_id for one in spans("engrampool.step")}
    assert found == parents


def test_a_tracer_that_fails_fails_no_step(server, monkeypatch, caplog):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no spans today")

    monkeypatch.setattr(SAMPLER, "should_sample", fails)
    with Client(server.address, attach="off", **TRACED) as client:
        for _ in range(3):
            client.prefetch([1, 2, 3]).wait()
    assert caplog.text.count("spans of a step could not be made") == 1


def test_without_trace_nothing_is_noted(server):
    with Client(server.address, attach="off", **PATIENCE) as client:
        step = client.prefetch([1, 2, 3])
        step.wait()
        assert step.delivery.trace is None
    assert spans() == []


def test_it_is_set_by_the_environment(server):
    environ = {"ENGRAMPOOL_CLIENT_TARGET": server.address, "ENGRAMPOOL_CLIENT_TRACE": "true"}
    with Client.from_environment(environ) as client:
        client.lookup([1, 2, 3])
    assert len(spans("engrampool.step")) == 1


@pytest.mark.parametrize(
    ("first_s", "begins"),
    [
        (5e-3, 12.0),  # of 5 ms 1 are the server's: 2 there, 2 back
        (None, 12.5),  # of 10 ms 5 are the server's
        (0.0, 10.0),  # a first byte that seems to have come before the server was done
    ],
)
def test_what_a_server_did_is_placed_by_what_was_measured(first_s, begins):
    asked = Asked("one", "direct", 100, 1, 10.0)
    asked.times, asked.first_s = ServerTimes(400, 600, 5000), first_s
    found = placed(asked, 10.010)
    at = 10.0 + (begins - 10.0) / 1e3
    expected = [("queue", at, at + 400e-6), ("gather", at + 400e-6, at + 1e-3), ("send", at + 1e-3, at + 5e-3)]
    for (hop, begin, end), (wanted, wanted_begin, wanted_end) in zip(found, expected, strict=True):
        assert hop == wanted
        assert (begin, end) == pytest.approx((wanted_begin, wanted_end))


def test_nothing_is_placed_outside_of_the_request():
    asked = Asked("one", "direct", 100, 1, 10.0)
    asked.times, asked.first_s = ServerTimes(4000, 6000, 50_000), 9e-3
    assert [(hop, round(end, 4)) for hop, _, end in placed(asked, 10.005)] == [
        ("queue", 10.004),
        ("gather", 10.005),
        ("send", 10.005),
    ]
