"""The staging of rows with a GPU that is pretended: in which order it is waited for, and by whom."""

import threading
from contextlib import suppress

import numpy as np
import pytest

from engrampool_client import Client, SpecError
from engrampool_proto.synthetic import synthetic_rows
from interrupts import Interrupt

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-engines` installs it")
LIMIT_S = 60
IDS = np.arange(4 * 24, dtype=np.int32).reshape(4, 24)


class Event:
    """As CUDA's, of a GPU that comes to it when `reached` is set; what was never recorded is not waited for."""

    made: list["Event"]

    def __init__(self):
        self.reached, self.recorded, self.waited_for = threading.Event(), False, threading.Event()
        self.made.append(self)

    def record(self):
        self.recorded = True

    def synchronize(self):
        self.waited_for.set()
        assert not self.recorded or self.reached.wait(LIMIT_S)


@pytest.fixture
def staging(server, monkeypatch):
    """For a GPU that has done nothing yet. events: by turn, when ids came, and when rows had been copied."""
    from engrampool_client.integrations.staging import Staging

    monkeypatch.setattr(Event, "made", [], raising=False)
    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "zeros", lambda *shape, pin_memory, **settings: zeros(*shape, **settings))
    with torch.device("meta"):  # as an engine builds its model for a GPU
        made = Staging(Client(server.address), [1, 14], 24, 10, torch.device("cuda"))
    made.events = [Event.made[2:4], Event.made[:2]]  # a forward takes the turn that is longest unused
    yield made
    for event in Event.made:
        event.reached.set()
    made.close()


def start(staging, ids=IDS):
    for layer in (1, 14):
        staging.start(layer, torch.from_numpy(ids))


def assert_right(staging, spec, ids=IDS):
    for layer in (1, 14):
        expected = synthetic_rows(spec.table(layer), ids.reshape(-1).astype(np.uint64)).reshape(*ids.shape, 264)
        np.testing.assert_array_equal(staging.rows(layer).numpy(), expected)


def test_ids_are_waited_for_by_a_thread_of_its_own(staging, spec):
    put, _ = staging.events[0]
    start(staging)  # returns, though the ids are not there
    assert put.waited_for.wait(LIMIT_S)
    assert put.recorded
    assert staging.client.stats.begun == 0, "a GPU that is behind takes nothing of the lookup's time"
    put.reached.set()
    assert_right(staging, spec)


def test_rows_do_not_land_where_a_copy_still_reads(staging, spec):
    for put, _ in staging.events:
        put.reached.set()
    first, copied = staging.events[0][1], []
    for number in range(3):
        start(staging, IDS + number)
        if number < 2:  # two turns; the third forward has the first one's memory
            assert_right(staging, spec, IDS + number)
            copied.append(staging.rows(1).clone())
            staging.copied()
    assert first.waited_for.wait(LIMIT_S)
    np.testing.assert_array_equal(staging._turns[0].rows[1][:4].numpy(), copied[0].numpy())
    first.reached.set()
    assert_right(staging, spec, IDS + 2)


def test_a_forward_that_is_left_while_its_ids_are_waited_for_lands_nowhere(staging, spec):
    put, _ = staging.events[0]
    start(staging)
    assert put.waited_for.wait(LIMIT_S)
    following = threading.Thread(target=start, args=(staging, IDS + 7))
    following.start()  # gives it up, for which its thread must be through
    put.reached.set()
    following.join(LIMIT_S)
    staging.events[1][0].reached.set()
    assert_right(staging, spec, IDS + 7)


def test_what_cannot_be_begun_is_an_error_of_the_layer(staging, monkeypatch):
    for failing in (SpecError("none"), RuntimeError("no thread")):

        def fail(*_, failing=failing):
            raise failing

        monkeypatch.setattr(staging._thread, "submit", fail)
        start(staging)
        with pytest.raises(type(failing), match=str(failing)):
            staging.rows(14)


def test_ctrl_c_in_the_beginning_leaves_nobody_waiting(staging, monkeypatch, spec):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(staging._thread, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start(staging)
        with pytest.raises(KeyboardInterrupt):
            staging.rows(1)
    for put, _ in staging.events:
        put.reached.set()
    start(staging)
    assert_right(staging, spec)


def test_ctrl_c_at_any_line_of_waiting_tells_the_other_ranks_and_once(server):
    from engrampool_client.integrations.staging import Staging

    at, raised, told = 0, True, []

    def agree(flags):
        told.append(len(flags))
        return flags

    with Client(server.address) as client:
        while raised:
            made = Staging(client, [1, 14], 24, 10, torch.device("cpu"), agree=agree)
            start(made)
            told.clear()
            files, never = ("/staging.py", "/agreement.py"), ("return self._agree(",)  # as in test_supply.py
            with Interrupt(at, files, never) as interrupt, suppress(KeyboardInterrupt):
                made.rows(1)
            raised = interrupt.raised
            assert told == [5], interrupt.where
            at += 1
    assert at > 15


def test_closing_gives_up_a_forward_that_is_under_way(staging):
    put, _ = staging.events[0]
    start(staging)
    assert put.waited_for.wait(LIMIT_S)
    put.reached.set()
    staging.close()
    assert staging.client.status()["why_unusable"] == "the client is closed"
