"""Rows of an engine's forwards: whatever comes late, in any order or not at all, each has its own or an error."""

import os
import signal
import threading
import time
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import pytest

from engine_schedule import schedule
from engrampool_client import Client, DeadlineError, PoolError, StepCancelledError, UnavailableError
from engrampool_client.integrations.forwards.history import Histories
from engrampool_client.integrations.forwards.supply import Supply
from engrampool_client.lookup.step import Step
from engrampool_client.testing import serve_process
from engrampool_proto.hashing import TokenBatch
from interrupts import Interrupt
from landings import NOTHING, HostLanding
from scripted_client import Scripted, rows_of
from server_fixtures import LIMIT_S, lasting_address

DEPTH, NUMBERS, MAX_TOKENS = 3, 6, 48


def landing_of(spec):
    return HostLanding({layer: (24, spec.table(layer).row_bytes) for layer in spec.layers}, MAX_TOKENS)


def right_rows(spec, truth, numbers, starts, counts):
    """layer -> what each token of the chunks is to have, hashed of the whole sequences."""
    found = {layer: [] for layer in spec.layers}
    for number, start, count in zip(numbers, starts, counts, strict=True):
        for layer, ids in spec.hash(TokenBatch.of(np.array(truth[number], np.int32)), spec.layers).items():
            found[layer].append(rows_of(spec, layer, ids[start : start + count]))
    return {layer: np.concatenate(rows) for layer, rows in found.items()}


@contextmanager
def supplying(client, spec, compiled=True, **settings):
    histories = Histories(NUMBERS, 400, DEPTH, compiled=compiled)
    settings = {"timeout_s": LIMIT_S, "ahead_tokens": 64, "piece_tokens": 16, **settings}
    supply = Supply(client, landing_of(spec), histories, **settings)
    try:
        yield supply
    finally:
        supply.close()


def ints(*values):
    return np.array(values, np.int64)


def tell(supply, moment, prompts):
    for number in moment.removed:
        supply.remove(number)
    for number, tokens, computed in moment.added:
        supply.add(number, tokens, computed)
        prompts[number] = len(tokens)
    numbers, starts, counts = moment.arrays
    late = starts + counts > prompts[numbers]
    if late.any():
        given = np.array([token for _, _, tokens, _ in moment.chunks for token in tokens])
        supply.learn(numbers[late], starts[late], counts[late], given[late.repeat(counts)])
    return numbers, starts, counts


def tell_sampled(supply, moment, wait=lambda: None):
    took = np.array([len(ids) for ids in moment.sampled])
    ids = np.full((len(took), max(1, took.max())), -1)
    for at, one in enumerate(moment.sampled):
        ids[at, : len(one)] = one

    def arrived():
        wait()
        return ids, took

    supply.sampled(arrived)


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("seed", range(4))
def test_every_forward_has_the_rows_of_its_own_tokens(spec, seed, drafts):
    """Over schedules of chunks, prefix hits, preempted and resumed requests and rejected drafts; what was asked for
    early comes at once, late and in any order, or is lost."""
    random = np.random.default_rng(seed)

    def fate(_, ahead):
        return random.choice(["now", "late", "lost"], p=[0.3, 0.5, 0.2]) if ahead or decoding else "late"

    client, prompts, decoding = Scripted(spec, fate, seed), np.zeros(NUMBERS, np.int64), False
    with supplying(client, spec, compiled=seed % 2 == 0, early_decode=not drafts) as supply:
        steps = tokens = 0
        for moment, truth in schedule(seed, 1000, drafts=drafts, budget=MAX_TOKENS):
            chunks = tell(supply, moment, prompts)
            decoding = False
            supply.start(*chunks)
            assert supply.wait(MAX_TOKENS).all()
            total = int(chunks[2].sum())
            for layer, right in right_rows(spec, truth, *chunks).items():
                np.testing.assert_array_equal(supply.landed(layer)[:total], right)
                assert not supply.landed(layer)[total:].any(), "tokens that pad it have zeros"
            decoding = True  # whoever asks until the next forward is the thread that sampled ids come to, or a prompt's
            tell_sampled(supply, moment)
            steps, tokens = steps + 1, tokens + total
        counts = supply.counts
        assert (counts.steps, counts.tokens, counts.failed) == (steps, tokens, 0)
    assert counts.early["served"] > tokens / 10, "the tests are of something"
    assert counts.early["thrown_away"] > 0
    assert sum(counts.waits[1].counts) == steps


def decoding(supply, *, tokens=(5, 6, 7)):
    """Two requests whose prompts were run, and which sampled a token each."""
    for number in range(2):
        supply.add(number, [*tokens, number], 0)
    supply.start(ints(0, 1), ints(0, 0), ints(4, 4))
    supply.wait()
    return [[*tokens, 0, 8], [*tokens, 1, 9]]


def test_a_sampled_tokens_rows_are_asked_for_when_it_is_known_and_by_nobody_else(spec):
    client = Scripted(spec, lambda *_: "now")
    with supplying(client, spec, ahead_tokens=0) as supply:
        truth, known, begun = decoding(supply), threading.Event(), len(client.asked)
        supply.sampled(lambda: (known.wait(LIMIT_S), (np.array([[8], [9]]), np.array([1, 1])))[1])
        assert len(client.asked) == begun
        known.set()
        supply.learn(ints(0, 1), ints(4, 4), ints(1, 1), ints(8, 9))
        assert len(client.asked) == begun + 1, "its rows are on their way before the forward is"
        # The other way round, as schedulers may have it: rows are told by their request, not by their place.
        supply.start(ints(1, 0), ints(4, 4), ints(1, 1))
        supply.wait()
        assert len(client.asked) == begun + 1
        for layer, right in right_rows(spec, truth, ints(1, 0), ints(4, 4), ints(1, 1)).items():
            np.testing.assert_array_equal(supply.landed(layer)[:2], right)
    assert supply.counts.early == {"served": 2, "thrown_away": 0}


def test_a_token_that_turns_out_to_be_another_is_asked_for_anew(spec):
    client = Scripted(spec, lambda *_: "now")
    with supplying(client, spec, ahead_tokens=0) as supply:
        truth = decoding(supply)
        supply.sampled(lambda: (np.array([[8], [9]]), np.array([1, 1])))
        supply.learn(ints(0, 1), ints(4, 4), ints(1, 1), ints(8, 3))
        truth[1][4] = 3
        supply.start(ints(0, 1), ints(4, 4), ints(1, 1))
        supply.wait()
        for layer, right in right_rows(spec, truth, ints(0, 1), ints(4, 4), ints(1, 1)).items():
            np.testing.assert_array_equal(supply.landed(layer)[:2], right)
    assert supply.counts.early == {"served": 1, "thrown_away": 1}


def test_what_was_sampled_for_a_request_that_ended_is_not_the_next_ones(spec):
    client = Scripted(spec, lambda *_: "now")
    with supplying(client, spec, ahead_tokens=0) as supply:
        decoding(supply)
        known = threading.Event()
        supply.sampled(lambda: (known.wait(LIMIT_S), (np.array([[8], [9]]), np.array([1, 1])))[1])
        supply.remove(1)
        supply.add(1, [1, 2, 3, 4, 5, 6], 0)
        known.set()
        supply.learn(ints(0), ints(4), ints(1), ints(8))
        supply.start(ints(0, 1), ints(4, 0), ints(1, 6))
        supply.wait()
        truth = [[5, 6, 7, 0, 8], [1, 2, 3, 4, 5, 6]]
        for layer, right in right_rows(spec, truth, ints(0, 1), ints(4, 0), ints(1, 6)).items():
            np.testing.assert_array_equal(supply.landed(layer)[:7], right)


def test_a_prompts_next_pieces_are_on_their_way_while_its_chunk_runs(spec):
    client = Scripted(spec, lambda *_: "now")
    with supplying(client, spec, ahead_tokens=48) as supply:
        prompt = np.random.default_rng(0).integers(0, 1000, 100).tolist()
        supply.add(0, prompt, 4)
        assert [len(one.tokens) for one in client.asked] == [16, 16, 16], "as far as memory goes, from where it is run"
        supply.start(ints(0), ints(4), ints(40))  # two pieces, and half of the third
        supply.wait()
        assert [(one.ahead, len(one.tokens)) for one in client.asked[3:]] == [(True, 16), (True, 16), (True, 16)]
        supply.start(ints(0), ints(44), ints(40))
        supply.wait()
        assert len(client.asked) == 6, "all of it was there"
        for layer, right in right_rows(spec, [prompt], ints(0), ints(44), ints(40)).items():
            np.testing.assert_array_equal(supply.landed(layer)[:40], right)
        supply.remove(0)
    assert supply.counts.early == {"served": 80, "thrown_away": 16}


def test_memory_that_copies_still_read_is_not_written(spec):
    client = Scripted(spec, lambda *_: "now")
    with supplying(client, spec, ahead_tokens=16) as supply:
        pieces = supply.landing.marks[4:]  # after two of forwards and two of sampled tokens
        prompt = list(range(100))
        supply.add(0, prompt, 0)
        for mark in pieces:
            mark.reached.clear()
        supply.start(ints(0), ints(0), ints(16))
        supply.wait()
        begun = len(client.asked)
        supply.start(ints(0), ints(16), ints(16))  # asks itself, for all of it, and for nothing ahead
        supply.wait()
        assert [one.ahead for one in client.asked[begun:]] == [False]
        for mark in pieces:
            mark.reached.set()
        # Of forwards, the one before the last must have been copied, which is waited for.
        turn = supply._turns[1].copied
        turn.reached.clear()
        third = threading.Thread(target=supply.start, args=(ints(0), ints(32), ints(16)))
        third.start()
        assert turn.waited_for.wait(LIMIT_S)
        asked = len(client.asked)
        turn.reached.set()
        third.join(LIMIT_S)
        assert len(client.asked) == asked + 2
        supply.wait()


def test_rows_in_many_places_are_brought_together_before_they_are_copied(spec):
    client = Scripted(spec, lambda *_: "now")
    numbers = np.arange(40)
    histories = Histories(40, 20, DEPTH)
    supply = Supply(client, landing_of(spec), histories, timeout_s=LIMIT_S)
    for number in numbers:
        supply.add(int(number), [3, int(number)], 0)
    supply.start(numbers, ints(*[1] * 40), ints(*[1] * 40))
    supply.wait()
    supply.sampled(lambda: (numbers[:, None] + 7, np.ones(40, np.int64)))
    supply.learn(numbers, ints(*[2] * 40), ints(*[1] * 40), numbers + 7)
    order, before = np.random.default_rng(1).permutation(40), supply.landing.copies
    supply.start(order, ints(*[2] * 40), ints(*[1] * 40))
    supply.wait()
    assert supply.landing.copies == before + 2
    for layer, right in right_rows(
        spec, [[3, one, one + 7] for one in numbers], order, ints(*[2] * 40), ints(*[1] * 40)
    ).items():
        np.testing.assert_array_equal(supply.landed(layer)[:40], right)
    supply.close()


# --- what goes wrong


def test_what_a_forward_asks_for_itself_and_does_not_get_is_its_error_and_the_next_one_is_well(spec):
    fates = iter(["lost"])
    client = Scripted(spec, lambda *_: next(fates, "now"))
    with supplying(client, spec, ahead_tokens=0) as supply:
        supply.add(0, [1, 2, 3], 0)
        supply.start(ints(0), ints(0), ints(3))
        with pytest.raises(UnavailableError, match="it was lost"):
            supply.wait()
        supply.start(ints(0), ints(0), ints(3))
        assert supply.wait().all()
    assert (supply.counts.failed, supply.counts.steps) == (1, 1)


def test_a_forward_that_is_never_waited_for_is_given_up_by_the_next(spec):
    fates = iter(["never"] * 4)
    client = Scripted(spec, lambda *_: next(fates, "now"))
    with supplying(client, spec, ahead_tokens=16, piece_tokens=8) as supply:
        supply.add(0, list(range(40)), 0)
        supply.start(ints(0), ints(0), ints(20))
        given_up = [one.delivery for one in client.asked]
        supply.remove(0)
        supply.add(0, [4, 5, 6], 0)
        supply.start(ints(0), ints(0), ints(3))
        assert len(given_up) > 3
        assert all(one.done for one in given_up[:4]), "nothing is written into memory that others have now"
        assert supply.wait().all()


def test_a_sampled_token_that_cannot_be_asked_for_early_is_asked_for_by_its_forward(spec, caplog):
    client = Scripted(spec, lambda *_: "now")
    with supplying(client, spec, ahead_tokens=0) as supply:
        decoding(supply)

        def broken():
            raise RuntimeError("the device is gone")

        supply.sampled(broken)
        supply.learn(ints(0, 1), ints(4, 4), ints(1, 1), ints(8, 9))
        supply.start(ints(0, 1), ints(4, 4), ints(1, 1))
        assert supply.wait().all()
    assert "not asked for early: the device is gone" in caplog.text


def test_what_cannot_be_begun_early_is_no_error_of_the_engines_step(spec, monkeypatch, caplog):
    client = Scripted(spec, lambda *_: "now")
    with supplying(client, spec) as supply:

        def fail(*_, **__):
            raise RuntimeError("no thread can be started")

        with monkeypatch.context() as patch:
            patch.setattr(client, "prefetch", fail)
            supply.add(0, list(range(40)), 0)
        supply.start(ints(0), ints(0), ints(40))
        assert supply.wait().all()
        monkeypatch.setattr(supply._thread, "submit", fail)
        supply.sampled(lambda: 1 / 0)
        supply.learn(ints(0), ints(40), ints(1), ints(7))
        supply.start(ints(0), ints(40), ints(1))
        assert supply.wait().all()
    assert "not asked for early: no thread can be started" in caplog.text


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_what_stops_a_start_is_raised_by_wait_once_the_other_ranks_know(spec, monkeypatch, kind):
    told = []

    def agree(flags):
        told.append(flags.copy())
        return flags

    client = Scripted(spec, lambda *_: "now")
    with supplying(client, spec, agree=agree, ahead_tokens=0) as supply:
        supply.add(0, [1, 2, 3], 0)

        def fail(*_, **__):
            raise kind("stop")

        with monkeypatch.context() as patch:
            patch.setattr(client, "prefetch", fail)
            supply.start(ints(0), ints(0), ints(3))
        with pytest.raises(kind, match="stop"):
            supply.wait()
        supply.failed(3, kind("before it could start"))
        with pytest.raises(kind, match="before it could start"):
            supply.wait()
        assert [len(one) for one in told] == [7, 7]
        assert not any(one.any() for one in told)


def test_ctrl_c_at_any_line_of_a_forward_leaves_the_next_one_well(spec):
    """A prompt's chunk, and a token that was sampled: wherever it comes, the next forward has rows of its own."""
    prompt, files = list(range(30)), ("/supply.py", "/early.py", "/history.py", "/agreement.py", "/areas.py")
    right = right_rows(spec, [[*prompt, 7]], ints(0), ints(0), ints(31))
    at, raised = 0, True
    while raised:
        client = Scripted(spec, lambda *_: "late", at)
        with supplying(client, spec, ahead_tokens=16, piece_tokens=8) as supply:
            with Interrupt(at, files) as interrupt, suppress(KeyboardInterrupt):
                supply.add(0, prompt, 0)
                supply.start(ints(0), ints(0), ints(30))
                supply.wait()
                supply.sampled(lambda: (np.array([[7]]), np.array([1])))
                supply.learn(ints(0), ints(30), ints(1), ints(7))
                supply.start(ints(0), ints(30), ints(1))
                supply.wait()
            raised = interrupt.raised
            supply.remove(0)
            supply.add(0, [*prompt, 7], 0)
            supply.start(ints(0), ints(0), ints(31))
            assert supply.wait().all(), interrupt.where
            for layer, rows in right.items():
                np.testing.assert_array_equal(supply.landed(layer)[:31], rows, interrupt.where)
        at += 1
    assert at > 100


def test_ctrl_c_at_any_line_of_waiting_tells_the_other_ranks_and_once(spec):
    files, at, raised = ("/supply.py", "/agreement.py", "/areas.py"), 0, True
    while raised:
        client, told = Scripted(spec, lambda *_: "now"), []

        def agree(flags, told=told):
            told.append(flags.copy())
            return flags

        with supplying(client, spec, agree=agree, ahead_tokens=0) as supply:
            supply.add(0, [1, 2, 3], 0)
            supply.start(ints(0), ints(0), ints(3))
            # CPython looks for signals where functions begin and end: not between the line before and this one.
            with Interrupt(at, files, ("return self._agree(",)) as interrupt, suppress(KeyboardInterrupt):
                supply.wait()
            raised = interrupt.raised
            assert [len(one) for one in told] == [7], interrupt.where
        at += 1
    assert at > 40


def test_another_ranks_error_is_an_error_here_and_its_masked_tokens_are_masked_here(spec):
    answers = iter([[True] * 6 + [False], [True, True, False, True, True, True, True]])
    client = Scripted(spec, lambda *_: "now")
    with supplying(client, spec, agree=lambda flags: flags & np.array(next(answers)), ahead_tokens=0) as supply:
        supply.add(0, [1, 2, 3], 0)
        supply.start(ints(0), ints(0), ints(3))
        with pytest.raises(PoolError, match="another rank of this group did not get its rows"):
            supply.wait()
        supply.start(ints(0), ints(0), ints(3))
        assert supply.wait().tolist() == [[True, True, False], [True, True, True]]
        assert not supply.landed(1)[2].any()
        assert supply.landed(14)[2].any()
    assert supply.counts.masked == {1: 1, 14: 0}


def test_dummy_forwards_and_those_for_warming_up_ask_nobody(spec):
    client = Scripted(spec, lambda *_: "now")
    with supplying(client, spec) as supply:
        with supply.quiet():
            supply.add(0, list(range(40)), 0)
            supply.dummy(10)
            supply.sampled(lambda: 1 / 0)
        assert not client.asked
        assert not supply.landed(1)[:10].any()
        assert (supply.landed(1)[10:] == NOTHING).all()
    assert (supply.counts.dummies, supply.counts.steps) == (1, 0)


def test_closing_in_the_midst_leaves_nothing_on_its_way(spec):
    client = Scripted(spec, lambda *_: "never")
    with supplying(client, spec, ahead_tokens=16, piece_tokens=8) as supply:
        supply.add(0, list(range(40)), 0)
        supply.start(ints(0), ints(0), ints(20))
        supply.sampled(lambda: (np.array([[3]]), np.array([0])))
    assert all(one.delivery.done for one in client.asked)
    with pytest.raises(StepCancelledError):
        Step(client.asked[-1].delivery).rows(1)


# --- real servers


@pytest.mark.parametrize("policy", ["mask", "raise"])
def test_a_server_that_is_silent_costs_forwards_their_rows_by_their_deadline(packed, spec, policy):
    """What was asked for before the server fell silent, and after; and all is well once it answers again."""
    prompt = np.random.default_rng(3).integers(0, 1000, 60).tolist()
    with (
        serve_process(packed) as server,
        supplying(
            Client(server.address, on_failure=policy, breaker_failures=0), spec, timeout_s=0.3, ahead_tokens=32
        ) as supply,
    ):
        supply.add(1, [1, 2, 3], 0)
        supply.start(ints(1), ints(0), ints(3))
        assert supply.wait().all()
        with server.frozen():
            supply.add(0, prompt, 0)
            supply.start(ints(0), ints(0), ints(40))
            if policy == "raise":
                with pytest.raises(DeadlineError):
                    supply.wait()
            else:
                assert not supply.wait().any()
                assert not supply.landed(1)[:40].any()
        while True:  # until it is awake, which the test's own limit bounds
            supply.start(ints(0), ints(0), ints(40))
            try:
                if supply.wait().all():
                    break
            except PoolError:
                assert policy == "raise"
        for layer, right in right_rows(spec, [prompt], ints(0), ints(0), ints(40)).items():
            np.testing.assert_array_equal(supply.landed(layer)[:40], right)
    assert (supply.counts.masked[1] > 0, supply.counts.failed > 0) == ((policy == "mask"), (policy == "raise"))


@pytest.mark.parametrize("policy", ["mask", "raise"])
def test_a_pool_that_is_killed_and_comes_back_costs_the_forwards_in_between(packed, spec, policy):
    """By SIGKILL, in the midst of forwards that are prefetched; and back on the same port. No forward takes long."""
    address, random = lasting_address(), np.random.default_rng(4)
    prompt = random.integers(0, 1000, 300).tolist()
    with ExitStack() as stack:
        server = stack.enter_context(serve_process(packed, listen=address))
        client = Client(server.address, on_failure=policy)
        supply = stack.enter_context(supplying(client, spec, timeout_s=2.0, ahead_tokens=32))
        chunk = ints(0), ints(100), ints(20)
        right = right_rows(spec, [prompt], *chunk)

        def forward():
            """Whether its rows came, which are right then; a decode step's token is asked for early beside."""
            supply.remove(0)
            supply.add(0, prompt, 100)
            supply.start(*chunk)
            try:
                valid = supply.wait()
            except PoolError:
                return False
            for has, layer in zip(valid, supply.landing.layers, strict=True):
                rows = np.where(has[:, None, None], right[layer], 0)  # as it comes back, some may have theirs
                np.testing.assert_array_equal(supply.landed(layer)[:20], rows)
            return bool(valid.all())

        assert [forward() for _ in range(3)] == [True] * 3
        for pid in (server.process.pid, *server.worker_pids().values()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.wait_ended()
        begin = time.monotonic()
        away = [forward() for _ in range(30)]
        assert not any(away)
        # Far less than the deadlines of so many: once it is known to be away nobody waits for it.
        assert time.monotonic() - begin < LIMIT_S
        stack.enter_context(serve_process(packed, listen=address))
        until = time.monotonic() + LIMIT_S
        while not forward():
            assert time.monotonic() < until
        assert all(forward() for _ in range(5))
        counts = supply.counts
    if policy == "mask":
        assert counts.masked[1] >= 30 * 20
        assert counts.failed == 0
    else:
        assert counts.failed >= 30
        assert counts.masked == {1: 0, 14: 0}
