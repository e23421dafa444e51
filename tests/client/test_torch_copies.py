"""Copies to the device: issued once, in order, from memory that nobody writes to; and every way out lets the GPU go on.

There is no GPU here: `Later` is in its place, which does what it is asked for no sooner than it is told to run.
"""

import ctypes
import gc
import importlib
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from math import inf

import numpy as np
import pytest

from engrampool_client import BatchError, Client, DeadlineError, PoolError, Step, StepCancelledError
from engrampool_client.errors import UnavailableError
from engrampool_client.lookup.delivery import Delivery
from engrampool_client.lookup.landing import zeros
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.synthetic import synthetic_rows
from server_fixtures import LIMIT_S, eventually

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-torch` installs it")
pooled = importlib.import_module("engrampool_client.integrations.torch")
copying = importlib.import_module("engrampool_client.integrations.torch_copies")

LAYERS = (1, 14)
SHAPE = (24, 264)


class Copied:
    def __init__(self, later):
        self.done, self._later = False, later

    def synchronize(self):
        self._later.run()
        assert self.done, "the host waits for what the GPU does not get to"


class Later:
    """A GPU's stream, on the CPU: what is asked for is done by `run`, up to a word that was not raised yet."""

    pinned = False

    def __init__(self):
        self.queue, self.issued, self.rooms = [], threading.Semaphore(0), 0

    def room(self, shape):
        self.rooms += 1
        return torch.full(tuple(shape), 99, dtype=torch.uint8)

    def copy(self, host, rows):
        copied = Copied(self)

        def copy():
            with torch.inference_mode():  # a GPU asks for no mode
                rows.copy_(host)
            copied.done = True
            return True

        self.queue.append(copy)
        self.issued.release()
        return copied

    def read(self, rows, copied):
        self.queue.append(lambda: copied.done)

    def mark(self):
        copied = Copied(self)
        self.queue.append(lambda: setattr(copied, "done", True) or True)
        return copied

    def wait_word(self, word, turn):
        at = word.numpy().view(np.uint32)
        self.queue.append(lambda: np.int32(np.uint32((int(at[0]) - turn) & 0xFFFFFFFF).view(np.int32)) >= 0)

    def run(self):
        while self.queue and self.queue[0]():
            self.queue.pop(0)


class Driven:
    """A client whose steps settle when the test says so."""

    target = "nowhere"

    def __init__(self, client, on_failure="raise"):
        self.spec, self.dummy, self._masks = client.spec, client.dummy, on_failure == "mask"
        self.outs = []

    def prefetch(self, tokens, *_, layers, out, timeout_s):
        deadline = inf if timeout_s is None else time.monotonic() + timeout_s
        shapes = {layer: (len(tokens), *SHAPE) for layer in layers}
        self.outs.append(out)
        return Step(Delivery(sorted(layers), deadline, zeros(shapes, out) if self._masks else None))


def come(step, layer, value):
    """Have a layer's rows come, all of them bytes of that value."""
    host = step._host[layer].numpy()
    with step.step.delivery.writing():
        host.fill(value)
    step.step.delivery.arrived({layer: host})


@pytest.fixture(scope="module")
def client(server):
    with Client(server) as client:
        yield client


@pytest.fixture
def later(monkeypatch):
    later = Later()
    monkeypatch.setattr(pooled, "copies_to", lambda device: later)
    return later


@pytest.fixture
def driven(client):
    return Driven(client)


def tokens(seed, *shape):
    return np.random.default_rng(seed).integers(0, 129280, shape, dtype=np.int32)


def expected_rows(spec, layer, ids):
    return synthetic_rows(spec.table(layer), spec.hash(TokenBatch.of(ids), [layer])[layer])


# --- when rows are copied


def test_a_layer_that_comes_is_copied_before_anybody_asks(driven, later):
    pool = pooled.EngramPool(driven, staging=True)
    with pool.start([1, 2]) as step:
        come(step, 14, 7)
        assert len(later.queue) == 1
        later.run()
        come(step, 1, 8)
        assert len(later.queue) == 1
        rows = step.rows(1)
        assert len(later.queue) == 2  # the copy, once, and whoever reads it
        later.run()
        assert (rows == 8).all()
        assert (step.rows(14) == 7).all()
        assert step.rows(14) is step.rows(14)
    assert later.rooms == 2


def test_it_is_copied_when_it_asks_if_so_told(driven, later):
    pool = pooled.EngramPool(driven, staging=True, copy_on_arrival=False)
    with pool.start([1, 2]) as step:
        come(step, 1, 8)
        assert not later.queue
        rows = step.rows(1)
        later.run()
        assert (rows == 8).all()


@pytest.mark.parametrize(("setting", "at_once"), [(None, False), (False, False), (True, True)])
def test_a_small_step_is_received_by_the_layer_that_waits_unless_told_otherwise(
    client, spec, later, monkeypatch, setting, at_once
):
    assert client.compiled
    eventually(lambda: client.direct, "the lane is there")
    pool, ids = pooled.EngramPool(client, staging=True, copy_on_arrival=setting), tokens(1, 3)
    told, add_callback = [], Step.add_callback
    monkeypatch.setattr(Step, "add_callback", lambda step, callback: told.append(1) or add_callback(step, callback))
    with pool.start(ids) as step:
        assert step.step.delivery.receiver is not None
        assert at_once == bool(told)  # which has a thread of the client receive
        if at_once:
            for _ in spec.layers:
                assert later.issued.acquire(timeout=LIMIT_S)
        rows = {layer: step.rows(layer) for layer in spec.layers}
        later.run()
        for layer in spec.layers:
            assert np.array_equal(rows[layer].numpy(), expected_rows(spec, layer, ids))
    assert later.rooms == 2


def test_a_large_step_is_copied_as_it_comes(client, spec, later):
    pool, ids = pooled.EngramPool(client, staging=True), tokens(2, 700)
    with pool.start(ids) as step:
        assert step.step.delivery.receiver is None
        for _ in spec.layers:
            assert later.issued.acquire(timeout=LIMIT_S)
        rows = {layer: step.rows(layer) for layer in spec.layers}
        later.run()
        for layer in spec.layers:
            assert np.array_equal(rows[layer].numpy(), expected_rows(spec, layer, ids))
    assert later.rooms == 2


def test_a_failed_layer_is_not_copied_and_a_masked_one_is_zeros(client, later):
    for masks in (False, True):
        driven = Driven(client, "mask" if masks else "raise")
        pool = pooled.EngramPool(driven, staging=True, buffers=1)
        with pool.start([1, 2]) as step:
            come(step, 1, 5)
            come(step, 14, 5)
            later.run()
        with pool.start([1, 2]) as step:
            come(step, 1, 6)
            step.step.delivery.end(UnavailableError("gone"))
            assert (step.rows(1) == 99).all()
            later.run()
            assert (step.rows(1) == 6).all()
            if masks:
                rows = step.rows(14)
                assert not rows.any()
                assert step.valid(14).tolist() == [False, False]
            else:
                with pytest.raises(UnavailableError):
                    step.rows(14)
                assert not later.queue


def test_a_layer_that_comes_as_the_step_ends_or_later_is_not_copied(driven, later):
    pool = pooled.EngramPool(driven, staging=True, buffers=1)
    first = pool.start([1, 2])
    copies = first._copies
    come(first, 1, 5)
    later.run()
    first.close()
    assert isinstance(first.step.error, StepCancelledError)
    with pool.start([3, 4]) as second:
        first.step.delivery.arrived({14: np.zeros((2, *SHAPE), np.uint8)})
        copies.settled(first.step, 1)  # called back late
        copies.settled(first.step, 14)
        assert not later.queue
        assert copies.read(14) is None
        come(second, 1, 6)
        rows = second.rows(1)
        later.run()
        assert (rows == 6).all()


def test_a_copy_that_fails_when_rows_come_is_made_when_the_layer_asks(driven, later, monkeypatch, caplog):
    pool, room = pooled.EngramPool(driven, staging=True), later.room
    with pool.start([1, 2]) as step:
        monkeypatch.setattr(later, "room", lambda shape: (_ for _ in ()).throw(MemoryError("none left")))
        come(step, 1, 5)
        assert "a callback of a step failed for layer 1" in caplog.text
        with pytest.raises(MemoryError):
            step.rows(1)
        monkeypatch.setattr(later, "room", room)
        rows = step.rows(1)
        later.run()
        assert (rows == 5).all()


# --- whose memory it is


def test_memory_is_not_written_to_while_a_copy_reads_it(driven, later):
    pool = pooled.EngramPool(driven, staging=True, buffers=1)
    with pool.start([1, 2]) as step:
        come(step, 1, 5)
        come(step, 14, 6)
        first = {layer: step.rows(layer) for layer in LAYERS}
    assert not first[1].eq(5).any()  # the GPU did not get to it yet
    with pool.start([3, 4]) as step:  # waits for it
        come(step, 1, 7)
        come(step, 14, 8)
        later.run()
    assert (first[1] == 5).all()
    assert (first[14] == 6).all()


def test_a_copy_that_ctrl_c_came_into_is_waited_for_as_well(driven, later, monkeypatch):
    pool, copy, read = pooled.EngramPool(driven, staging=True, buffers=1, copy_on_arrival=False), later.copy, []

    def interrupted(host, rows):
        copy(host, rows)
        read.append(rows)
        raise KeyboardInterrupt

    step = pool.start([1, 2])
    come(step, 1, 5)
    monkeypatch.setattr(later, "copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step.rows(1)
    step.close()
    assert len(read) == 1
    pool.start([1, 2]).close()
    assert (read[0] == 5).all()


def test_a_step_is_started_while_another_runs_with_copies_under_way(driven, later):
    pool, taken = pooled.EngramPool(driven, staging=True, buffers=2), []
    coming = pool.start([0, 0])
    for number in range(6):
        step, coming = coming, None
        with step:
            come(step, 1, 2 * number)
            coming = pool.start([number] * (2 + number))
            if number % 2:
                come(coming, 14, 2 * number + 3)  # the next step's are there first
            if number % 2 or not number:
                come(step, 14, 2 * number + 1)
            taken.append({layer: step.rows(layer) for layer in LAYERS})
    coming.close()
    later.run()
    assert not later.queue
    for number, rows in enumerate(taken):
        assert [int(rows[layer].unique()) for layer in LAYERS] == [2 * number, 2 * number + 1]


def test_the_memory_of_a_step_ended_by_garbage_collection_amid_its_own_copy(driven, later, monkeypatch):
    pool, room = pooled.EngramPool(driven, staging=True, buffers=1), later.room
    step = pool.start([1, 2])

    def collected(shape):
        step.close()
        with pytest.raises(PoolError, match="all buffers are in use"):
            pool.start([1])
        return room(shape)

    monkeypatch.setattr(later, "room", collected)
    come(step, 1, 5)
    monkeypatch.setattr(later, "room", room)
    assert len(later.queue) == 1
    with pool.start([1, 2]) as step:  # after that copy
        assert not later.queue
        come(step, 1, 6)
        rows = step.rows(1)
        later.run()
        assert (rows == 6).all()


def test_a_step_that_nobody_closed_gives_its_memory_back_though_it_has_a_callback(driven, later):
    pool = pooled.EngramPool(driven, staging=True, buffers=1, copy_on_arrival=True)
    for _ in range(3):
        step = pool.start([1, 2])
        with pytest.raises(PoolError, match="all buffers are in use"):
            pool.start([1, 2])
        inner = step.step
        del step
        gc.collect()
        assert isinstance(inner.error, StepCancelledError)


def test_ctrl_c_as_a_step_is_closed_loses_no_memory(driven, later, monkeypatch):
    pool = pooled.EngramPool(driven, staging=True, buffers=1)
    step = pool.start([1, 2])

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(step.step, "cancel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step.close()
    with pytest.raises(PoolError, match="all buffers are in use"):  # rows may still be written there
        pool.start([1, 2])
    with pytest.raises(PoolError, match="the step has ended"):
        step.rows(1)
    monkeypatch.undo()
    step.close()
    pool.start([1, 2]).close()


def test_ctrl_c_as_a_step_is_started_leaves_its_memory_to_whoever_writes_there(driven, later, monkeypatch):
    pool = pooled.EngramPool(driven, staging=True, buffers=1)
    pool.start([1, 2]).close()
    outs, prefetch = driven.outs, driven.prefetch

    def interrupted(*args, **settings):
        prefetch(*args, **settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(driven, "prefetch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.start([1, 2])
    monkeypatch.setattr(driven, "prefetch", prefetch)
    pool.start([1, 2]).close()
    first, written, then = (out[1].ctypes.data for out in outs)
    assert first == written != then


# --- fixed memory of the device


@pytest.mark.parametrize("staging", [False, True])
def test_rows_of_every_step_land_in_the_same_memory_and_zeros_beyond(client, spec, staging):
    pool = pooled.EngramPool(client, staging=staging, max_tokens=8, dtype=torch.float32)
    landing = {layer: pool.landing(layer) for layer in spec.layers}
    numbers = {layer: torch.empty(8, 24, 256) for layer in spec.layers}
    for seed, count in enumerate([5, 8, 2, 0, 3]):
        ids = tokens(seed, count)
        with pool.start(ids) as step:
            for layer in spec.layers:
                rows = step.rows(layer)
                assert rows.data_ptr() == landing[layer].data_ptr() or not count
                raw = np.zeros((8, 24, 264), np.uint8)
                raw[:count] = expected_rows(spec, layer, ids)
                assert np.array_equal(landing[layer].numpy(), raw)
                assert pool.landing(layer) is landing[layer]
                # As a graph does it, which was captured once.
                table = spec.table(layer)
                given = pooled.dequantize(landing[layer], table.row_format, table.scale, out=numbers[layer])
                assert given is numbers[layer]
                assert torch.equal(given[:count].nan_to_num(1), step.embeddings(layer).nan_to_num(1))
    with pool.start(tokens(9, 2, 3)) as step:
        assert step.rows(1).shape == (2, 3, 24, 264)
    with pool.dummy(4) as step:
        assert not step.rows(1).any()
        assert not landing[1].any()


def test_only_the_step_that_runs_lands(client):
    pool = pooled.EngramPool(client, max_tokens=8)
    with pool.start([1, 2]) as step:
        rows = step.rows(1).clone()
        other = pool.start([3, 4, 5])
        with pytest.raises(PoolError, match="another step of this pool is running"):
            other.rows(1)
        assert torch.equal(pool.landing(1)[:2], rows)
    with other:
        assert torch.equal(other.rows(1), pool.landing(1)[:3])


def test_what_does_not_fit_into_the_memory_is_refused(client):
    pool = pooled.EngramPool(client, max_tokens=3, staging=True, buffers=1)
    for start in (lambda: pool.start([1, 2, 3, 4]), lambda: pool.dummy(2, 2)):
        with pytest.raises(BatchError, match="4 tokens are more than max_tokens, 3"):
            start()
    pool.start([1, 2, 3]).close()
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        pooled.EngramPool(client, max_tokens=0)
    with pytest.raises(ValueError, match=r"only with EngramPool\(max_tokens=...\)"):
        pooled.EngramPool(client).landing(1)


# --- the GPU waits


def words(pool):
    """What the words have come to, by buffer and layer."""
    return [{layer: int(staging.word(layer)) for layer in LAYERS} for staging in pool._buffers]


@pytest.fixture
def waiting(driven, later):
    return pooled.EngramPool(driven, device_waits=True)


def test_the_gpu_waits_and_not_the_host(waiting, later):
    with waiting.start([1, 2]) as step:
        rows = {layer: step.rows(layer) for layer in LAYERS}
        later.run()
        assert (rows[1] == 99).all()
        come(step, 14, 6)
        later.run()
        assert (rows[14] == 99).all()  # copies are in the order of the layers
        come(step, 1, 5)
        later.run()
        assert not later.queue
        assert (rows[1] == 5).all()
        assert (rows[14] == 6).all()
    assert words(waiting) == [{1: 1, 14: 1}, {1: 0, 14: 0}]


def test_many_steps_take_turns_in_words(waiting, later):
    coming, taken = waiting.start([0, 0]), []
    for number in range(7):
        step, coming = coming, None
        with step:
            coming = waiting.start([1, 2])
            taken.append({layer: step.rows(layer) for layer in LAYERS})
            for layer in LAYERS:
                come(step, layer, number + layer)
            if number % 3 == 0:
                later.run()
    coming.close()
    later.run()
    assert not later.queue
    for number, rows in enumerate(taken):
        assert [int(rows[layer].unique()) for layer in LAYERS] == [number + layer for layer in LAYERS]
    assert words(waiting) == [{1: 4, 14: 4}, {1: 4, 14: 4}]


def test_words_count_round(waiting, later):
    later.run()
    for staging in waiting._buffers:
        for layer in LAYERS:
            staging._turns[layer] = 2**32 - 2
            staging.raise_word(layer, 2**32 - 2)
    for value in range(8):
        with waiting.start([1, 2]) as step:
            rows = step.rows(1)
            later.run()
            assert (rows == 99).all()
            come(step, 1, value)
            later.run()
            assert (rows == value).all()
        later.run()
    assert words(waiting) == [{1: 2, 14: 2}, {1: 2, 14: 2}]


def given_up(step):
    step.step.cancel()


def closed(step):
    step.close()


def past_its_deadline(step):
    step.step.delivery.expire()


def failed(step):
    step.step.delivery.end(UnavailableError("gone"))


@pytest.mark.parametrize("way", [given_up, closed, past_its_deadline, failed])
def test_whatever_a_step_ends_by_the_gpu_goes_on_with_zeros_for_what_did_not_come(waiting, later, way):
    step = waiting.start([1, 2])
    rows = {layer: step.rows(layer) for layer in LAYERS}
    host = step._host[14]
    come(step, 1, 5)
    host.fill_(3)  # a part of them came
    way(step)
    later.run()
    assert not later.queue
    assert (rows[1] == 5).all()
    assert not rows[14].any()
    step.close()
    assert words(waiting)[0] == {1: 1, 14: 1}


def test_the_next_call_raises_what_a_layer_failed_with(waiting, later):
    step = waiting.start([1, 2])
    step.__enter__()
    step.rows(14)
    failed(step)
    for call in (lambda: step.rows(1), lambda: step.valid(14), lambda: step.__exit__(None, None, None)):
        with pytest.raises(UnavailableError):
            call()
    later.run()
    assert not later.queue


def test_leaving_a_forward_raises_nothing_of_layers_that_nobody_took_or_beside_its_own_error(waiting, later):
    with waiting.start([1, 2]) as step:
        failed(step)

    def forward():
        with waiting.start([1, 2]) as step:
            step.rows(1)
            failed(step)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        forward()
    later.run()
    assert not later.queue
    with pytest.raises(PoolError, match="no step is running"):
        assert waiting.running


def test_the_end_of_a_forward_waits_for_rows_that_the_gpu_was_told_to_read(waiting, later):
    step = waiting.start([1, 2])
    entered = threading.Event()

    def rows_come():
        assert entered.wait(LIMIT_S)
        come(step, 1, 5)

    thread = threading.Thread(target=rows_come)
    thread.start()
    with step:
        rows = step.rows(1)
        entered.set()
    thread.join()
    later.run()
    assert (rows == 5).all()
    assert not later.queue


@pytest.mark.parametrize("count", [3, 700])
def test_by_the_deadline_the_gpu_goes_on_though_nobody_waits(client, later, monkeypatch, count):
    raised, raise_word = threading.Semaphore(0), copying.Staging.raise_word

    def seen(self, layer, turn):
        raise_word(self, layer, turn)
        raised.release()

    monkeypatch.setattr(copying.Staging, "raise_word", seen)
    step = pooled.EngramPool(client, device_waits=True).start(tokens(3, count), timeout_s=1e-9)
    for _ in LAYERS:
        assert raised.acquire(timeout=LIMIT_S)
    later.run()
    assert not later.queue
    with pytest.raises(DeadlineError):
        step.rows(1)
    step.close()


@pytest.mark.parametrize("count", [3, 700])
def test_rows_of_a_real_client_come_though_no_thread_waits_for_them(client, spec, later, count):
    pool, ids = pooled.EngramPool(client, device_waits=True), tokens(4, count)
    with pool.start(ids) as step:
        rows = {layer: step.rows(layer) for layer in spec.layers}
    later.run()
    for layer in spec.layers:
        assert np.array_equal(rows[layer].numpy(), expected_rows(spec, layer, ids))


@pytest.mark.parametrize("count", [3, 700])
def test_closing_the_client_lets_the_gpu_go_on(server, later, count):
    client = Client(server)
    pool = pooled.EngramPool(client, device_waits=True)
    step = pool.start(tokens(5, count))
    client.close()
    later.run()
    assert not later.queue
    step.close()


@pytest.mark.parametrize("way", [come, failed], ids=["come", "failed"])
@pytest.mark.parametrize("settings", [{"device_waits": True}, {"staging": True}], ids=str)
def test_what_was_started_in_inference_mode_is_settled_by_other_threads(driven, later, way, settings, caplog):
    pool = pooled.EngramPool(driven, max_tokens=4, **settings)
    with torch.inference_mode():
        step = pool.start([1, 2])
    others = threading.Thread(target=way, args=(step, 14, 5) if way is come else (step,))
    others.start()
    others.join()
    assert not caplog.records
    if way is come:
        others = threading.Thread(target=come, args=(step, 1, 6))
        others.start()
        others.join()
    later.run()
    assert not later.queue
    if way is come:
        for mode in (torch.inference_mode(), torch.no_grad()):
            with mode:
                assert (step.rows(14) == 5).all()
    step.close()
    with pool.start([1, 2]) as step:
        come(step, 14, 7)
        come(step, 1, 8)
        later.run()
        assert (step.rows(14) == 7).all()


def test_a_step_that_nobody_refers_to_lets_the_gpu_go_on(waiting, later):
    step = waiting.start([1, 2])
    rows = step.rows(1)
    del step
    gc.collect()
    later.run()
    assert not later.queue
    assert not rows.any()


def test_ctrl_c_or_a_failure_as_copies_are_issued_lets_the_gpu_go_on(waiting, later, monkeypatch):
    wait_word, copy = later.wait_word, later.copy
    for name, plain in (("wait_word", wait_word), ("copy", copy)):
        for nth in (1, 2):
            calls = iter(range(1, 9))

            def interrupted(*args, plain=plain, calls=calls, nth=nth):
                given = plain(*args)
                if next(calls) == nth:
                    raise KeyboardInterrupt
                return given

            monkeypatch.setattr(later, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                waiting.start([1, 2])
            monkeypatch.setattr(later, name, plain)
            later.run()
            assert not later.queue
    for _ in range(3):
        waiting.start([1, 2]).close()


def test_ctrl_c_as_rows_are_raised_is_followed_by_the_end(waiting, later, monkeypatch):
    step = waiting.start([1, 2])
    raise_word = copying.Staging.raise_word

    def interrupted(self, layer, turn):
        if layer == 1:
            raise_word(self, layer, turn)
        raise KeyboardInterrupt

    monkeypatch.setattr(copying.Staging, "raise_word", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step.close()
    monkeypatch.undo()
    step.close()
    later.run()
    assert not later.queue


WAITS = """
import torch
from engrampool_client.integrations import torch_copies as copying

class Waits(copying.Cpu):
    def wait_word(self, word, turn):
        print("waits for", turn, flush=True)

staging = copying.Staging(False, [1])
word = staging.word(1).share_memory_()
copies = copying.Copies(Waits(), staging)
copies.arrays({1: (2, 3)})
copies.issue_all()
print(int(word), flush=True)
"""


def said_by(program):
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_a_child_of_a_fork_lets_nobody_go_on():
    """Nor does it wait for a lock that a thread of the parent holds."""
    fork = """
import os, threading
held, over = threading.Event(), threading.Event()
def hold():
    with copies._lock:
        held.set()
        over.wait()
thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if not child:
    assert copies.issue(1) is None or copies.over
    copies.end(())
    copying._let_go()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
over.set()
thread.join()
print(int(word), flush=True)
copies.end(())
print(int(word), flush=True)
"""
    assert said_by(WAITS + fork) == ["waits for 1", "0", "0", "1"]


def test_the_end_of_the_interpreter_lets_the_gpu_go_on():
    """What is registered first is called last."""
    first = "import atexit\natexit.register(lambda: print(int(word), flush=True))\n"
    assert said_by(first + WAITS) == ["waits for 1", "0", "1"]


def test_words_outlive_their_pool(driven, later):
    pool = pooled.EngramPool(driven, device_waits=True)
    address = pool._buffers[0].word(1).data_ptr()
    del pool
    gc.collect()
    assert any(kept.data_ptr() <= address < kept.data_ptr() + kept.nbytes for kept in copying._words)


def test_dummy_steps_are_zeros_at_once(waiting, later):
    with waiting.dummy(3) as step:
        rows = step.rows(1)
    later.run()
    assert not later.queue
    assert not rows.any()


def test_what_the_gpu_waited_for_lands_where_it_always_does(driven, later):
    """On a GPU the reader's stream copies it there. Here that is done as the rows are taken, so they must be there."""
    pool = pooled.EngramPool(driven, device_waits=True, max_tokens=4)
    with pool.start([1, 2]) as step:
        come(step, 1, 5)
        later.run()
        assert (step.rows(1) == 5).all()
        assert step.rows(1).data_ptr() == pool.landing(1).data_ptr()


def test_the_cpu_cannot_wait(client):
    with pytest.raises(ValueError, match="device_waits needs a GPU"):
        pooled.EngramPool(client, device_waits=True)


@pytest.mark.parametrize("fails", [None, "cuMemHostGetDevicePointer_v2", "cuStreamWaitValue32_v2"])
def test_what_the_driver_is_asked_for(monkeypatch, fails):
    asked = []

    class Driver:
        def cuMemHostGetDevicePointer_v2(self, there, host, flags):
            asked.append((host.value, flags.value))
            ctypes.cast(there, ctypes.POINTER(ctypes.c_uint64))[0] = host.value + 2**40
            return 801 if fails == "cuMemHostGetDevicePointer_v2" else 0

        def cuStreamWaitValue32_v2(self, stream, address, value, flags):
            asked.append((stream.value, address.value, value.value, flags.value))
            return 801 if fails == "cuStreamWaitValue32_v2" else 0

    monkeypatch.setattr(copying.ctypes, "CDLL", lambda name: asked.append(name) or Driver())
    if fails is None:
        copying.wait_value(77, 4096, 2**32 + 3)
        assert asked == ["libcuda.so.1", (4096, 0), (77, 4096 + 2**40, 3, 0)]
    else:
        with pytest.raises(RuntimeError, match="error 801 of the CUDA driver"):
            copying.wait_value(77, 4096, 3)


class Stream:
    """As CUDA's, and one more: it writes down what it is asked for."""

    cuda_stream = 77

    def __init__(self, asked, name):
        self.asked, self.name = asked, name

    def record_event(self):
        self.asked.append((self.name, "records"))
        return f"event of {self.name}"

    def wait_event(self, event):
        self.asked.append((self.name, "waits for", event))


def test_what_a_gpu_is_asked_for_and_on_which_stream(monkeypatch):
    asked, current = [], [None]
    current[0] = reader = Stream(asked, "reader")

    class Cuda:
        Stream = staticmethod(lambda device: Stream(asked, "copies"))
        current_stream = staticmethod(lambda device: current[0])

        @staticmethod
        @contextmanager
        def stream(stream):
            current[0] = stream
            yield
            current[0] = reader

    class Rows:
        def copy_(self, host, non_blocking):
            asked.append((current[0].name, "copies", host, non_blocking))

        def record_stream(self, stream):
            asked.append(("the allocator is told of", stream.name))

    def empty(shape, dtype, device):
        asked.append((current[0].name, "allocates", shape, dtype, device))
        return Rows()

    monkeypatch.setattr(copying.torch, "cuda", Cuda)
    monkeypatch.setattr(copying.torch, "empty", empty)
    monkeypatch.setattr(copying, "wait_value", lambda *given: asked.append((current[0].name, "waits", *given)))
    gpu, word = pooled.copies_to(torch.device("cuda:1")), torch.zeros(1, dtype=torch.int32)
    assert isinstance(gpu, copying.Gpu)
    rows = gpu.room([2, 3])
    gpu.wait_word(word, 5)
    copied = gpu.copy("host", rows)
    gpu.read(rows, copied)
    assert gpu.mark() == copied
    assert asked == [
        ("copies", "allocates", (2, 3), torch.uint8, torch.device("cuda:1")),
        ("copies", "records"),
        ("copies", "waits", 77, word.data_ptr(), 5),
        ("copies", "copies", "host", True),
        ("copies", "records"),
        ("reader", "waits for", "event of copies"),
        ("the allocator is told of", "reader"),
        ("copies", "records"),
    ]
    assert current == [reader]
