"""Lookups that are given up, by whatever way, end: at once, on time, and with nothing written afterwards."""

import asyncio
import gc
import math
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest

import forks
from engrampool_client import AsyncClient, Client, DeadlineError, PoolError
from engrampool_client.doctor.record import Recording
from engrampool_client.lookup.plan import EntriesPlan
from engrampool_client.testing import serve_process
from engrampool_proto.hashing import TokenBatch
from forks import FEW, TOKENS, expected
from prefork import PREFORK
from server_fixtures import LIMIT_S, GatherGate, at_work, direct_of, eventually, running

pytestmark = pytest.mark.usefixtures("patient")
LANES = {"grpc": "off", "direct": "auto"}


def arrays(client: Client, tokens) -> dict[int, np.ndarray]:
    tables = map(client.spec.table, client.spec.layers)
    return {table.layer: np.full((len(tokens), table.heads, table.row_bytes), 0xA5, np.uint8) for table in tables}


@pytest.fixture(scope="module")
def silent(packed):
    """A server that answers nothing while it is frozen."""
    with serve_process(packed, workers=1) as server:
        yield server


@pytest.mark.parametrize("kept", ["", "cache"])
def test_a_deadline_that_falls_while_rows_are_handed_over_ends_the_step(server, monkeypatch, kept):
    finish = EntriesPlan._finish

    def held_up(plan, layer):
        rows = finish(plan, layer)
        if layer == 14:
            assert plan._delivery.pause(LIMIT_S)  # within what the caller's memory is written in
        return rows

    monkeypatch.setattr(EntriesPlan, "_finish", held_up)
    told = []
    with Client(server, on_failure="mask", attach="off", cache_bytes=1 << 20 if kept else 0) as client:
        step = client.prefetch(TOKENS, timeout_s=0.5)
        step.add_callback(lambda _, layer: told.append(layer))
        rows, valid = step.rows(14), step.valid(14)
        assert not rows[~valid].any()
        assert np.array_equal(rows[valid], expected(client.spec, TOKENS)[14][valid])
        assert step.done()
        # Who settled it tells of it, and counts it, maybe after this thread was woken.
        eventually(lambda: sorted(told) == [1, 14], "both are told")
        eventually(lambda: (client.stats.pending_bytes, client.stats.in_flight) == (0, 0), "nothing is pending")


@pytest.mark.parametrize("lane", LANES.values(), ids=list(LANES))
def test_a_step_that_nobody_waits_for_ends_at_its_deadline(silent, lane):
    with Client(silent.address, direct=lane, attach="off", max_steps=1, on_failure="mask") as client, silent.frozen():
        client.prefetch(FEW, timeout_s=60.0).add_callback(lambda *_: None)  # it has the only place
        told = threading.Semaphore(0)
        step = client.prefetch(FEW, timeout_s=0.1)
        step.add_callback(lambda *_: told.release())
        assert told.acquire(timeout=LIMIT_S)
        assert told.acquire(timeout=LIMIT_S)
        assert not step.valid(1).any()
        eventually(lambda: client.stats.in_flight == 1, "it is counted")


@pytest.mark.parametrize("lane", LANES.values(), ids=list(LANES))
def test_a_cancelled_step_and_a_hint_leave_their_place_to_who_needs_it(silent, lane):
    settings = {"direct": lane, "attach": "off", "max_steps": 1, "cache_bytes": 1 << 20}
    with Client(silent.address, **settings) as client:
        with silent.frozen():
            first = client.prefetch(FEW, timeout_s=600.0)
            eventually(lambda: at_work(client) == (0, 0, 1), "it asks")
            first.cancel()
            eventually(lambda: at_work(client) == (0, 0, 0), "its place is free")
            second = client.prefetch(FEW + 1, timeout_s=600.0)
            eventually(lambda: at_work(client) == (0, 0, 1), "the next one asks")
            assert (first.done(), second.done(), client.stats.in_flight) == (True, False, 1)
            # A hint has a place as long as nobody else needs it.
            second.cancel()
            eventually(lambda: at_work(client) == (0, 0, 0), "its place is free again")
            assert second.hint(np.array([[7, 8, 9]]))
            eventually(lambda: at_work(client) == (0, 0, 1), "the hint asks")
            assert (client.stats.in_flight, client.stats.pending_hint_bytes > 0) == (0, True)
            third = client.prefetch(FEW + 2, timeout_s=600.0)
            eventually(lambda: not client.stats.pending_hint_bytes, "the hint has given way")
            eventually(lambda: at_work(client) == (0, 0, 1), "the step asks")
        assert np.array_equal(third.rows(14), expected(client.spec, FEW + 2)[14])


@pytest.mark.parametrize("lane", LANES.values(), ids=list(LANES))
def test_rows_that_are_all_cached_wait_for_no_server(silent, lane):
    settings = {"direct": lane, "attach": "off", "max_steps": 2, "cache_bytes": 1 << 20}
    with Client(silent.address, **settings) as client:
        step = client.prefetch(FEW)
        step.wait()
        kept = threading.Event()
        step.delivery.on_idle(kept.set)
        assert kept.wait(LIMIT_S)
        with silent.frozen():
            stuck = [client.prefetch(TOKENS[100 * at : 100 * at + 50], timeout_s=600.0) for at in range(1, 5)]
            eventually(lambda: at_work(client)[2] == 2, "every place is taken")
            assert np.array_equal(client.prefetch(FEW, timeout_s=600.0).rows(14), expected(client.spec, FEW)[14])
            assert not any(one.done() for one in stuck)


@pytest.mark.parametrize("way", ["cancelled", "timed out", "closed", "dropped", "deadline"])
@pytest.mark.parametrize("lane", LANES.values(), ids=list(LANES))
def test_nothing_is_written_once_a_lookup_was_given_up(packed, monkeypatch, lane, way):
    gate = GatherGate(monkeypatch)
    with running(packed) as server:
        client = Client(server.address, direct=lane, attach="off")
        out = arrays(client, TOKENS)

        async def lookup() -> None:
            task = asyncio.create_task(AsyncClient(client).lookup(TOKENS, out=out))
            await asyncio.to_thread(gate.wait_begun, 1)
            if way == "cancelled":
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(task, 0.01)

        try:
            if way in ("cancelled", "timed out"):
                asyncio.run(lookup())
            else:
                step = client.prefetch(TOKENS, out=out, timeout_s=60.0)
                gate.wait_begun(1)
                if way == "closed":
                    client.close()
                elif way == "deadline":
                    step.delivery.deadline = time.monotonic() + 0.05  # once it is sent, however long that took
                    with pytest.raises(DeadlineError):
                        step.rows(1)
                else:
                    del step
                    gc.collect()
            before = {layer: array.copy() for layer, array in out.items()}
            assert client.stats.pending_bytes == 0
            gate.open.set()
            # What the server had for it has been gathered, and sent or thrown away, by the time that this is over.
            with Client(server.address, direct=lane, attach="off") as other:
                assert np.array_equal(other.lookup(FEW)[14], expected(other.spec, FEW)[14])
            eventually(lambda: server.scrape()["engrampool_in_flight_bytes"] == 0, "the server is through with it")
            assert all(np.array_equal(out[layer], before[layer]) for layer in out)
        finally:
            gate.open.set()
            client.close()


@pytest.mark.parametrize("lane", LANES.values(), ids=list(LANES))
def test_ctrl_c_in_a_lookup_leaves_nothing_behind(silent, lane, request):
    # Programs that a shell starts in the background ignore it, and this may be one.
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Client(silent.address, direct=lane, attach="off") as client:
        with silent.frozen():
            caller = threading.get_ident()

            def interrupt() -> None:
                eventually(lambda: client.stats.in_flight, "it has begun")
                time.sleep(0.2)  # by then it waits for the server, most often
                signal.pthread_kill(caller, signal.SIGINT)

            threading.Thread(target=interrupt).start()
            with pytest.raises(KeyboardInterrupt):
                client.lookup(TOKENS[:100], timeout_s=60.0)
        gc.collect()  # what the traceback referred to
        assert (client.stats.pending_bytes, client.stats.in_flight) == (0, 0)
        assert client.stats.steps["cancelled"] == 1
        assert np.array_equal(client.lookup(FEW)[14], expected(client.spec, FEW)[14])


@pytest.mark.parametrize("lane", LANES.values(), ids=list(LANES))
def test_a_lookup_may_have_no_deadline_but_not_one_that_is_no_time(server, lane):
    with Client(server, direct=lane, attach="off", timeout_s=math.inf, connect_timeout_s=math.inf) as client:
        for tokens in (FEW, TOKENS):
            for rows in (client.lookup(tokens), client.lookup(tokens, timeout_s=math.inf)):
                assert np.array_equal(rows[14], expected(client.spec, tokens)[14])
        assert np.array_equal(client.prefetch(FEW).rows(1), expected(client.spec, FEW)[1])
        assert client.direct == (lane == "auto")
        for bad in (0, -1.0, math.nan, -math.inf):
            with pytest.raises(ValueError, match="timeout_s must be positive"):
                client.prefetch(FEW, timeout_s=bad)
            with pytest.raises(ValueError, match="timeout_s must be positive"):
                client.lookup(FEW, timeout_s=bad)
        assert client.stats.in_flight == 0


def test_a_deadline_that_passed_before_anything_was_sent_costs_no_connection(server):
    with Client(server, attach="off") as client:
        client.lookup(FEW)
        connections = direct_of(client)
        for _ in range(5):
            with pytest.raises(DeadlineError):
                client.lookup(FEW, timeout_s=1e-9)
        assert direct_of(client) == connections
        assert client.direct
        assert not client.breaker_open


@pytest.mark.parametrize("way", ["cancelled", "dropped", "deadline", "closed"])
def test_an_old_steps_arrays_are_the_callers_once_the_new_step_is_done(packed, monkeypatch, way):
    gate = GatherGate(monkeypatch)
    with running(packed) as server:
        client = Client(server.address, attach="off", cache_bytes=1 << 20)
        try:
            out = arrays(client, TOKENS)
            old = client.prefetch(TOKENS, out=out, timeout_s=60.0)
            gate.wait_begun(1)
            new = client.amend(old, TOKENS + 1, timeout_s=0.05 if way == "deadline" else 60.0)
            if way == "cancelled":
                new.cancel()
            elif way == "closed":
                client.close()
            elif way == "deadline":
                with pytest.raises(DeadlineError):
                    new.wait()
            else:
                del new
                gc.collect()
            before = {layer: array.copy() for layer, array in out.items()}
            assert old.done()
            gate.open.set()
            eventually(lambda: server.scrape()["engrampool_in_flight_bytes"] == 0, "the server is through with it")
            assert all(np.array_equal(out[layer], before[layer]) for layer in out)
        finally:
            gate.open.set()
            client.close()


def test_what_stands_for_a_number_is_one_and_deadlines_go_on_being_kept(silent):
    with Client(silent.address, attach="off") as client:
        for timeout_s in (np.float32(30), np.float16(30), np.int64(30)):
            client.prefetch(FEW, timeout_s=timeout_s).wait()
        begin = time.monotonic()
        step = client.prefetch(FEW, timeout_s=True)
        assert 1 <= step.deadline - begin <= 1 + time.monotonic() - begin
        eventually(step.done, "it came, or was late")
        with pytest.raises(TypeError):
            client.prefetch(FEW, timeout_s="1")
        with silent.frozen():
            told = threading.Semaphore(0)
            client.prefetch(FEW, timeout_s=0.05).add_callback(lambda *_: told.release())
            assert told.acquire(timeout=LIMIT_S)
        eventually(lambda: client.stats.in_flight == 0, "it is counted")


def test_a_thread_that_cannot_be_started_fails_one_step_and_no_other(server, monkeypatch):
    caller, start = threading.get_ident(), threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if threading.get_ident() != caller:
            return start(thread)
        raise RuntimeError("can't start new thread")

    with Client(server, attach="off") as client:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(PoolError, match="no thread"):
                client.prefetch(FEW)
            assert (client.stats.in_flight, client.stats.pending_bytes) == (0, 0)
        assert np.array_equal(client.prefetch(FEW).rows(1), expected(client.spec, FEW)[1])


@pytest.mark.parametrize("kept", ["", "cache"])
@pytest.mark.parametrize("lane", LANES.values(), ids=list(LANES))
def test_a_client_may_be_closed_in_callbacks_and_beside_them(server, lane, kept):
    for _ in range(5):
        client = Client(server, direct=lane, attach="off", cache_bytes=1 << 20 if kept else 0)
        steps = [client.prefetch(TOKENS, timeout_s=30.0) for _ in range(6)]
        for step in steps:
            step.add_callback(lambda *_, client=client: client.close())
        closer = threading.Thread(target=client.close, daemon=True)
        closer.start()
        closer.join(LIMIT_S)
        assert not closer.is_alive()
        assert all(step.done() for step in steps)
        assert client.stats.pending_bytes == 0


# --- another process


def run_forks(*arguments: object) -> None:
    """Run a scenario of forks.py in a process of its own."""
    done = PREFORK.run([sys.executable, forks.__file__, *map(str, arguments)], timeout=150)
    assert done.stdout == "good\n", done.stderr


def test_a_child_is_told_that_the_client_is_its_parents_and_takes_nothing_from_it(packed):
    run_forks("told", packed)


def test_a_child_is_told_by_a_step_whose_client_is_gone(packed):
    run_forks("orphan", packed)


def test_a_child_has_a_client_of_its_own_and_ends_as_processes_do(silent):
    run_forks("own", silent.address)


def test_what_a_child_asks_for_on_its_parents_connection_is_never_the_parents_row(silent):
    run_forks("by hand", silent.address)


def test_a_child_collects_nothing_that_its_parent_had(silent):
    run_forks("garbage", silent.address)


def test_parent_and_child_of_a_fork_both_end_as_processes_do(silent):
    """By way of all that Python does then, with a client open and a step under way."""
    program = (
        "import os, sys; from engrampool_client import Client; pool = Client(sys.argv[1], attach='off', timeout_s=60);"
        "step = pool.prefetch(list(range(2000))); pid = os.fork();"
        "sys.exit(3) if not pid else print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), step.rows(14).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, silent.address], capture_output=True, text=True, timeout=150, check=True
    )
    assert done.stdout == "3 (2000, 24, 264)\n"


def test_a_recording_is_the_parents_alone(server, tmp_path):
    path = tmp_path / "rows.rec"
    run_forks("recording", server, path)
    with Client(server) as client:
        spec = client.spec
    wanted = {layer: ids.tolist() for layer, ids in spec.hash(TokenBatch.of(FEW)).items()}
    found = [{layer: ids.tolist() for layer, ids in one.ids.items()} for one in Recording(path).of(spec)]
    assert found == [wanted, wanted]
