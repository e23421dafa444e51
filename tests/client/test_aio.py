"""The client of asyncio: how it is made, and every way to give up what it began."""

import asyncio
import gc
import inspect
import socket
import threading
from collections.abc import Callable
from typing import Unpack, get_type_hints

import numpy as np
import pytest

from engrampool_client import AsyncClient, Client, DeadlineError, PoolError, StepCancelledError, UnavailableError
from engrampool_client.aio import AsyncStep
from engrampool_client.config import ClientConfig, ClientSettings
from engrampool_client.lookup.step import Step
from engrampool_proto.synthetic import synthetic_rows
from server_fixtures import LIMIT_S, SPEC, GatherGate, eventually, pack, running

pytestmark = pytest.mark.usefixtures("patient")
TOKENS = np.arange(30, dtype=np.int32)
LANES = {"grpc": "off", "direct": "auto"}


def connecting_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("engrampool-c")]


# --- how it is made


def test_it_is_made_in_two_ways_or_of_a_client(server):
    async def main() -> list[dict]:
        found = []
        async with AsyncClient(server, cache_bytes=1 << 20) as client:
            found.append(await client.lookup(TOKENS))
            assert client.client.cache is not None
        client = await AsyncClient.connect(server)
        async with client as same:
            assert same is client
            found.append(await client.lookup(TOKENS))
        blocking = await asyncio.to_thread(Client, server)
        async with AsyncClient(blocking) as client:
            assert client.client is blocking
            found.append(await client.lookup(TOKENS))
        assert blocking.status()["why_unusable"] == "the client is closed"
        return found

    first, *others = asyncio.run(main())
    for other in others:
        assert all(np.array_equal(first[layer], other[layer]) for layer in (1, 14))


def test_before_it_is_connected_it_says_how_to_connect():
    client = AsyncClient("127.0.0.1:1")
    assert repr(client) == "<AsyncClient on 127.0.0.1:1, not connected>"
    for use in (lambda: client.prefetch(TOKENS), lambda: client.spec, client.status, lambda: client.client):
        with pytest.raises(PoolError, match=r"not connected: use it in `async with`"):
            use()
    with pytest.raises(PoolError, match="not connected"):
        asyncio.run(client.lookup(TOKENS))
    asyncio.run(client.close())


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: AsyncClient(7), ValueError, "target"),
        (lambda: AsyncClient(None), ValueError, "target"),
        (lambda: AsyncClient(""), ValueError, "target"),
        (lambda: AsyncClient("http://a:1"), ValueError, "is not HOST:PORT"),
        (lambda: AsyncClient("a:1", timeout_s=-1), ValueError, "timeout_s must be positive"),
        (lambda: AsyncClient("a:1", tiemout_s=1), TypeError, "a client has no setting tiemout_s"),
    ],
)
def test_what_is_wrong_is_said_at_once(make, kind, text):
    with pytest.raises(kind, match=text):
        make()


def test_a_client_keeps_its_own_settings(server):
    with Client(server) as client, pytest.raises(TypeError, match="takes no settings beside a Client"):
        AsyncClient(client, timeout_s=1.0)


def test_a_failed_connection_raises_what_it_failed_with_and_another_try_is_another_client():
    async def main() -> None:
        client = AsyncClient("127.0.0.1:1", connect_timeout_s=0.2)
        with pytest.raises(UnavailableError):
            async with client:
                raise AssertionError
        with pytest.raises(PoolError, match="make another"):
            async with client:
                raise AssertionError

    asyncio.run(main())
    eventually(lambda: not connecting_threads(), "its threads have ended")


def test_every_setting_and_argument_is_typed_as_the_clients():
    assert get_type_hints(ClientSettings) == get_type_hints(ClientConfig)
    for kind in (AsyncClient, Client):
        assert get_type_hints(kind.__init__)["settings"] == Unpack[ClientSettings]
    for name in ("prefetch", "prefetch_rows", "lookup", "lookup_rows", "amend"):
        ours, theirs = (inspect.signature(getattr(kind, name)).parameters for kind in (AsyncClient, Client))
        kinds = {AsyncStep: Step}
        assert [(p.name, p.kind, p.default, kinds.get(p.annotation, p.annotation)) for p in ours.values()] == [
            (p.name, p.kind, p.default, p.annotation) for p in theirs.values()
        ]


# --- connecting is given up


@pytest.fixture
def silent():
    """An address that takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


TARGETS: dict[str, Callable[[str], object]] = {
    "silent": lambda silent: silent,
    "away": lambda _: "127.0.0.1:1",
    "several": lambda silent: [silent, "127.0.0.1:1"],
    "name": lambda _: "dns:///no.such.name.invalid:1",
    "registry": lambda _: "etcd://127.0.0.1:1",
}


@pytest.mark.parametrize("way", ["cancelled", "timed out"])
@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_connecting_that_is_given_up_ends_and_leaves_no_thread(target, way, silent):
    """With an hour to connect: whoever waited for the thread would wait so long."""

    async def main() -> None:
        connect = AsyncClient.connect(target(silent), connect_timeout_s=3600.0)
        if way == "timed out":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await connect
            return
        task = asyncio.create_task(connect)
        while not connecting_threads():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    eventually(lambda: not connecting_threads(), "its threads have ended")


def test_a_connection_that_is_there_as_the_task_is_cancelled_is_closed(server, monkeypatch):
    made, go_on = [], threading.Event()
    connect = Client._connect

    def late(client: Client, *arguments: object) -> None:
        connect(client, *arguments)
        made.append(client)
        assert go_on.wait(LIMIT_S)  # connected, and nobody knows yet

    monkeypatch.setattr(Client, "_connect", late)

    async def main() -> None:
        task = asyncio.create_task(AsyncClient.connect(server))
        while not made:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    asyncio.run(main())
    eventually(lambda: made[0].status()["why_unusable"] == "the client is closed", "it is closed")
    eventually(lambda: not connecting_threads(), "its threads have ended")


# --- lookups are given up


@pytest.mark.parametrize("lane", LANES.values(), ids=list(LANES))
@pytest.mark.parametrize("way", ["task", "timeout", "wait_for", "group", "loop"])
def test_lookups_that_are_given_up_hold_nothing_and_delay_nobody(tmp_path, monkeypatch, lane, way):
    """More of them than places, while the server holds every large answer back: the next small one is answered."""
    gate = GatherGate(monkeypatch)
    ids = {2: np.arange(2000)}
    with running(pack(tmp_path / "small"), gather_threads=16) as run:
        client = Client(run.address, direct=lane, attach="off", dedupe=False, max_steps=4, max_pending_bytes=5 << 20)
        pool = AsyncClient(client)

        async def ask() -> None:
            await pool.lookup_rows(ids, timeout_s=3600.0)

        async def all_asked() -> None:
            await asyncio.to_thread(gate.wait_begun, 4)
            await asyncio.to_thread(eventually, lambda: client.status()["steps"]["waiting"] == 4)

        async def in_time() -> None:
            async with asyncio.timeout(None) as timeout:
                both = asyncio.gather(*(ask() for _ in range(8)))
                await all_asked()
                timeout.reschedule(asyncio.get_running_loop().time())
                await both

        async def in_group() -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(8):
                    group.create_task(ask())
                await all_asked()
                raise ValueError

        async def main() -> None:
            if way == "task":
                tasks = [asyncio.create_task(ask()) for _ in range(8)]
                await all_asked()
                for task in tasks:
                    task.cancel()
                found = await asyncio.gather(*tasks, return_exceptions=True)
                assert {type(one) for one in found} == {asyncio.CancelledError}
            elif way == "timeout":
                with pytest.raises(TimeoutError):
                    await in_time()
            elif way == "wait_for":
                tasks = [asyncio.create_task(asyncio.wait_for(ask(), 3600.0)) for _ in range(8)]
                await all_asked()
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
            elif way == "group":
                with pytest.raises(ExceptionGroup):
                    await in_group()
            else:
                tasks = [asyncio.create_task(ask()) for _ in range(8)]
                await all_asked()
                return  # `asyncio.run` cancels them
            await settled()

        async def settled() -> None:
            steps = client.status()["steps"]
            assert (steps["in_flight"], steps["pending_bytes"]) == (0, 0)
            few = np.arange(3)
            rows = await pool.lookup_rows({2: few}, timeout_s=3600.0)
            assert np.array_equal(rows[2], synthetic_rows(SPEC.table(2), few.astype(np.uint64)))
            await asyncio.to_thread(eventually, lambda: client.status()["steps"]["asking"] == 0)
            assert not gate.open.is_set()

        try:
            asyncio.run(main())
            asyncio.run(settled())
            assert client.stats.steps["cancelled"] == 8
        finally:
            gate.open.set()
            client.close()


def test_to_stop_waiting_for_a_layer_leaves_the_step_to_others(tmp_path, monkeypatch):
    gate = GatherGate(monkeypatch)

    async def main(address: str) -> None:
        async with AsyncClient(address, attach="off", dedupe=False, timeout_s=60.0) as pool:
            step = pool.prefetch_rows({2: np.arange(2000)})
            other = asyncio.create_task(step.rows(2))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(step.rows(2), 0.01)
            with pytest.raises(DeadlineError, match=r"not there within 0\.01 s"):
                await step.rows(2, timeout_s=0.01)
            assert not step.done()
            gate.open.set()
            assert len(await other) == 2000
            assert step.error is None
            assert step.arrived_s.keys() == {2}

    with running(pack(tmp_path / "small"), gather_threads=4) as run:
        asyncio.run(main(run.address))


@pytest.mark.parametrize("way", ["leaving", "error", "cancel", "dropped", "close"])
def test_a_step_is_given_up_by_leaving_it_cancelling_it_forgetting_it_and_closing(tmp_path, monkeypatch, way):
    gate = GatherGate(monkeypatch)

    async def main(address: str) -> None:
        pool = await AsyncClient.connect(address, attach="off", dedupe=False)
        step = pool.prefetch_rows({2: np.arange(2000)}, timeout_s=3600.0)
        await asyncio.to_thread(gate.wait_begun, 1)
        if way == "leaving":
            async with step:
                pass
        elif way == "error":
            with pytest.raises(KeyError):
                async with step:
                    raise KeyError
        elif way == "cancel":
            step.cancel()
        elif way == "dropped":
            del step
            gc.collect()
        else:
            await pool.close()
        assert pool.stats.in_flight == 0
        assert pool.stats.pending_bytes == 0
        if way != "dropped":
            assert isinstance(step.error, StepCancelledError)
            with pytest.raises(StepCancelledError):
                await step.rows(2)
        await pool.close()

    with running(pack(tmp_path / "small"), gather_threads=4) as run:
        asyncio.run(main(run.address))
        gate.open.set()
