"""What a caller took, counted by several processes and threads at one time."""

import itertools
import json
import os
import random
import threading

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrampool_proto.kernels.serve import BURST_NS, meter
from engrampool_server.access.callers import Caller
from engrampool_server.answer.accounts import Accounts
from engrampool_server.answer.in_flight import NAMED, Account, InFlight
from engrampool_server.answer.lookups import RefusedError

S = 1_000_000_000
READ = frozenset({"read"})


def caller(name="a", **limits) -> Caller:
    return Caller(name, READ, **limits)


def cell() -> np.ndarray:
    return np.zeros(1, np.int64)


@given(
    st.integers(1, 1_000_000_000),
    st.lists(st.tuples(st.integers(1, 1 << 31), st.integers(0, 10 * S)), min_size=1, max_size=30),
)
def test_a_meter_lets_by_what_the_rate_allows(rows_per_s, asked):
    account = Accounts(1).of(caller(max_rows_per_s=rows_per_s))
    own, now_ns = cell(), 100 * S
    begin_ns, let_by, largest = now_ns, 0, 0
    for rows, pause_ns in asked:
        now_ns += pause_ns
        if meter(own.ctypes.data, rows, account.rate, now_ns) == 0:
            let_by, largest = let_by + rows, rows
            # All but the last ones have had their time.
            seconds = (now_ns - begin_ns + BURST_NS) / 1e9
            assert (let_by - largest) * account.rate / 1000 <= seconds * 1e9 + len(asked)


@given(st.integers(1, 1_000_000), st.integers(1, 1 << 31))
def test_who_is_refused_is_told_when_its_turn_is(rows_per_s, rows):
    account, own = Accounts(1).of(caller(max_rows_per_s=rows_per_s)), cell()
    now_ns = 100 * S
    assert meter(own.ctypes.data, rows, account.rate, now_ns) == 0
    wait_ns = meter(own.ctypes.data, 1, account.rate, now_ns)
    if wait_ns:
        assert meter(own.ctypes.data, 1, account.rate, now_ns + wait_ns - 1) == 1
        assert meter(own.ctypes.data, 1, account.rate, now_ns + wait_ns) == 0


def test_a_rate_that_changes_begins_anew():
    accounts = Accounts(1)
    slow = accounts.of(caller(max_rows_per_s=1))
    assert [bool(meter(slow.meter, 10_000, slow.rate, 100 * S)) for _ in range(2)] == [False, True]
    same = accounts.of(caller(max_rows_per_s=1, max_connections=1))
    assert meter(same.meter, 1, same.rate, 100 * S)
    fast = accounts.of(caller(max_rows_per_s=10_000))
    assert fast.meter == slow.meter
    assert not meter(fast.meter, 10_000, fast.rate, 100 * S)


def test_a_meter_counts_each_of_many_threads_once():
    own, let_by = cell(), itertools.count()
    threads = [
        threading.Thread(
            target=lambda: [next(let_by) for _ in range(1000) if not meter(own.ctypes.data, 1, 10**9, 100 * S)]
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The burst, of a millisecond a row.
    assert next(let_by) == BURST_NS // 10**6 + 1


def test_callers_have_a_place_each_and_keep_it():
    accounts = Accounts(2)
    names = [f"caller-{at}" for at in range(512)]
    places = {name: accounts.of(caller(name)).place for name in names}
    assert len(set(places.values())) == 512
    assert accounts.of(caller("another")).place not in places.values()
    assert {name: accounts.of(caller(name)).place for name in names} == places
    # Limits are those of the last file.
    assert accounts.of(caller("caller-1", max_connections=3)).most_connections == 3
    assert accounts.of(caller("caller-1")).most_connections == 0


def test_places_may_all_be_given_and_then_are_shared():
    accounts = Accounts(1)
    assert len({accounts.of(caller(f"caller-{at}")).place for at in range(NAMED + 10)}) == NAMED
    assert 0 <= accounts.of(caller("another")).place < NAMED


def test_processes_that_meet_callers_at_one_time_give_each_one_place():
    accounts, names = Accounts(1), [f"caller-{at}" for at in range(400)]
    pids, pipes = [], []
    for seed in range(4):
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                random.Random(seed).shuffle(names)
                os.write(writer, json.dumps({name: accounts.of(caller(name)).place for name in names}).encode())
            finally:
                os._exit(0)
        os.close(writer)
        pids.append(pid)
        pipes.append(reader)
    told = []
    for pid, reader in zip(pids, pipes, strict=True):
        with os.fdopen(reader, "rb") as pipe:
            told.append(json.loads(pipe.read()))
        os.waitpid(pid, 0)
    assert told[1:] == told[:-1]
    assert told[0] == {name: accounts.of(caller(name)).place for name in names}
    assert len(set(told[0].values())) == len(names)


def test_connections_are_bounded_over_all_processes_and_those_of_a_dead_one_are_forgotten():
    accounts = Accounts(2)
    account = accounts.of(caller(max_connections=2))
    accounts.connected(account, 0, 1)
    accounts.connected(account, 1, 1)
    for slot in (0, 1):
        with pytest.raises(RefusedError, match="may have 2 connections") as caught:
            accounts.connected(account, slot, 1)
        assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    accounts.clear(1)
    accounts.connected(account, 0, 1)
    accounts.connected(account, 0, -1)
    accounts.connected(accounts.of(caller("b", max_connections=1)), 0, 1)


def test_bytes_in_flight_of_a_caller_have_a_bound_of_their_own():
    bound = InFlight(1000)
    few, many = Account("few", 1, most_bytes=100), Account("many", 2)
    assert [bound.reserve(60, few), bound.reserve(60, few), bound.reserve(40, few)] == [True, False, True]
    assert bound.reserve(400, many)
    assert (bound.of(few), bound.of(many), bound.own) == (100, 400, 500)
    # What is left is shared as ever: nobody has more than is free.
    assert not bound.reserve(200, many)
    bound.release(100, few)
    bound.release(400, many)
    assert (bound.of(few), bound.of(many), bound.own) == (0, 0, 0)
    assert bound.reserve(100, few)
