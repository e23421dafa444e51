"""Large answers that kernels receive: whatever else happens meanwhile."""

import gc
import itertools
import threading
import time
from contextlib import suppress

import numpy as np
import pytest

from direct_peers import NUMBER, SERVED, TIMES, exchange, numbered, peer, rows_frame, whole_answer
from engrampool_client import Client
from engrampool_client.errors import ForkedError
from engrampool_client.lanes.compiled import CompiledConnection
from engrampool_proto import frames
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.kernels import receive
from engrampool_proto.synthetic import synthetic_rows
from exchanges import exchange_of
from forks import child
from interrupts import Interrupt
from server_fixtures import LIMIT_S, eventually

pytestmark = pytest.mark.usefixtures("patient")
TOKENS = np.random.default_rng(3).integers(0, 129280, 150).astype(np.int32)
COUNT = 100_000  # rows of a peer's layers: 300 kB each


def right(client: Client, rows: dict[int, np.ndarray]) -> bool:
    ids = client.spec.hash(TokenBatch.of(TOKENS))
    return all(np.array_equal(rows[layer], synthetic_rows(client.spec.table(layer), ids[layer])) for layer in ids)


def test_a_layer_is_handed_over_before_the_next_one_comes():
    wanted, sent = whole_answer(COUNT, set())
    second = sent.index(rows_frame(9, 0, wanted[9])[:20])
    taken, there = exchange(COUNT, out=True), threading.Event()
    taken.delivery.add_callback(lambda layer: there.set())

    def reply(connection, number):
        answer = numbered(sent, number)
        connection.sendall(answer[:second])
        assert there.wait(LIMIT_S)
        assert list(taken.delivery.rows) == [2]
        assert taken.delivery.rows[2].tobytes() == wanted[2]
        connection.sendall(answer[second:])

    with peer(reply, kind=CompiledConnection) as made:
        assert made.ask(taken, time.monotonic() + LIMIT_S).receive()
    assert taken.delivery.rows[9].tobytes() == wanted[9]


@pytest.mark.parametrize("empties", [[0], [1], [2], [0, 1, 1, 2]])  # before, within and after the rows
def test_frames_without_rows_are_passed_over_wherever_they_stand(empties):
    rows = np.random.default_rng(9).bytes(3 * COUNT)
    halves = [rows_frame(9, 0, rows[: 3 * 7]), rows_frame(9, 7, rows[3 * 7 :]), frames.end(NUMBER, TIMES)]
    sent = b"".join(rows_frame(2, 0, b"") * empties.count(at) + part for at, part in enumerate(halves))
    with peer(sent, sent, kind=CompiledConnection) as made:
        for _ in range(2):
            taken = exchange_of(SERVED, {2: np.zeros(0, np.uint32), 9: np.zeros(COUNT, np.uint32)})
            assert made.ask(taken, time.monotonic() + LIMIT_S).receive()
            assert taken.delivery.rows[9].tobytes() == rows
            assert taken.times == TIMES


def test_a_child_of_a_fork_takes_nothing_of_an_answer_that_a_thread_receives(server, monkeypatch):
    take, taking, go_on = receive.take, threading.Event(), threading.Event()

    def held(*arguments):
        taking.set()
        assert go_on.wait(LIMIT_S)
        return take(*arguments)

    monkeypatch.setattr(receive, "take", held)
    with Client(server, attach="off", compiled="on") as client:
        step = client.prefetch(TOKENS)
        assert taking.wait(LIMIT_S)

        def run() -> bytes:
            with pytest.raises(ForkedError):
                step.rows(1)
            return b"good" if step.done() else b"not done"

        assert child(run) == b"good"
        go_on.set()
        assert right(client, {layer: step.rows(layer) for layer in (1, 14)})
        assert client.stats.retries == 0


# On the way of a large answer.
FILES = ("/compiled.py", "/landing.py", "/native.py", "/plan.py", "/endpoint.py")


@pytest.mark.parametrize("first", range(3))
@pytest.mark.parametrize("connections", [1, 2])
def test_ctrl_c_at_any_line_leaves_nothing_behind(server, connections, first, monkeypatch, request):
    monkeypatch.setattr("engrampool_client.pool.endpoint.SPLIT_ABOVE_BYTES", 100_000)
    gc.collect()  # or a step that an earlier test left is what is interrupted
    gc.freeze()  # to collect garbage takes long with all the rest
    request.addfinalizer(gc.unfreeze)
    with Client(server, attach="off", compiled="on", connections=connections) as client:
        ids = client.spec.hash(TokenBatch.of(TOKENS))
        out = {layer: np.zeros((len(TOKENS), 24, 264), np.uint8) for layer in ids}
        for at in itertools.count(first, 3):
            interrupt = Interrupt(at, FILES)
            with suppress(KeyboardInterrupt), interrupt:
                client.lookup(TOKENS, out=out)
            for array in out.values():
                array[:] = 0xA5  # it is the caller's again
            gc.collect()
            eventually(lambda: not client.stats.pending_bytes, f"after {interrupt.where}")
            # A connection that was lost is replaced when one is wanted.
            eventually(lambda: right(client, client.lookup(TOKENS)) and client.direct, f"after {interrupt.where}")
            assert client.stats.in_flight == 0, interrupt.where
            assert all((array == 0xA5).all() for array in out.values()), interrupt.where
            if not interrupt.raised:
                break
