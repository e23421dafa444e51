"""The health service's states, without a wire."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2

from engrampool_server.answer.health import MOST_WATCHES, NOT_SERVING, SERVING, Health


class Call:
    """The part of a call's context that a watch looks at."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._host = host

    def peer(self) -> str:
        return f"ipv4:{self._host}:1"

    async def abort(self, code: grpc.StatusCode, text: str) -> None:
        raise ConnectionError(f"{code.name}: {text}")


def watch(health: Health, service: str = "pool", host: str = "127.0.0.1"):
    return health.Watch(health_pb2.HealthCheckRequest(service=service), Call(host))


def test_it_serves_nothing_until_told_so():
    async def life() -> list[int]:
        health, request = Health("", "pool"), health_pb2.HealthCheckRequest(service="pool")
        statuses = [(await health.Check(request, None)).status]
        for change in (lambda: health.set(SERVING), lambda: health.set(NOT_SERVING), health.end):
            change()
            statuses.append((await health.Check(request, None)).status)
        return statuses

    assert asyncio.run(life()) == [NOT_SERVING, SERVING, NOT_SERVING, NOT_SERVING]


def test_a_watch_tells_every_change_and_no_status_twice():
    async def life() -> list[int]:
        health = Health("pool")
        seen, statuses = [], watch(health)
        seen.append((await anext(statuses)).status)
        following = asyncio.ensure_future(anext(statuses))
        for _ in range(3):
            health.set(NOT_SERVING)
            await asyncio.sleep(0)
        assert not following.done()
        health.set(SERVING)
        seen.append((await following).status)
        return seen

    assert asyncio.run(life()) == [NOT_SERVING, SERVING]


@pytest.mark.parametrize("before", [[], [SERVING], [SERVING, NOT_SERVING]])
def test_an_end_while_a_status_is_being_sent_is_still_told(before):
    """The generator stands at its `yield` then, which is where a message waits until gRPC took it."""

    async def life() -> list[int]:
        health = Health("pool")
        for status in before:
            health.set(status)
        statuses = watch(health)
        first = (await anext(statuses)).status
        health.end()
        return [first, *[status.status async for status in statuses]]

    last = before[-1] if before else NOT_SERVING
    assert asyncio.run(life()) == ([SERVING, NOT_SERVING] if last == SERVING else [NOT_SERVING])


def test_an_unknown_service_is_watched_to_the_end_too():
    async def life() -> list[int]:
        health = Health("pool")
        statuses = watch(health, "other")
        first = (await anext(statuses)).status
        health.set(SERVING)
        health.end()
        return [first, *[status.status async for status in statuses]]

    assert asyncio.run(life()) == [health_pb2.HealthCheckResponse.SERVICE_UNKNOWN]


def test_watches_are_bounded_and_nobody_takes_anothers():
    async def life() -> None:
        health = Health("pool")
        open_ones = []
        for host, most in (("10.0.0.1", MOST_WATCHES // 2), ("10.0.0.2", MOST_WATCHES // 4)):
            for _ in range(most):
                open_ones.append(watch(health, host=host))
                assert (await anext(open_ones[-1])).status == NOT_SERVING
            with pytest.raises(ConnectionError, match=f"RESOURCE_EXHAUSTED: {most} watches are open from {host}"):
                await anext(watch(health, host=host))
        assert (await anext(watch(health, host="10.0.0.3"))).status == NOT_SERVING
        for one in open_ones[-2:]:
            await one.aclose()
        assert (await anext(watch(health, host="10.0.0.2"))).status == NOT_SERVING

    asyncio.run(life())
