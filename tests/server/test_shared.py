"""The bound on bytes in flight is one for all processes of a server."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from engrampool_server.shared import InFlight, free_slot, int64s

LIMIT = 100


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.one_of(st.integers(0, 2 * LIMIT), st.sampled_from(["end", "die"]))), max_size=60
    )
)
def test_it_counts_what_a_plain_sum_would(steps):
    """Three processes that reserve, end the oldest of their calls, or die with all of them."""
    slots = int64s(3)
    processes = [InFlight(LIMIT, slots, slot) for slot in range(3)]
    calls = [[], [], []]
    for at, what in steps:
        if what == "die":
            processes[(at + 1) % 3].clear(at)
            calls[at] = []
        elif what == "end":
            if calls[at]:
                processes[at].release(calls[at].pop(0))
        else:
            fits = sum(map(sum, calls)) + what <= LIMIT
            assert processes[at].reserve(what) == fits
            if fits:
                calls[at].append(what)
        assert [one.own for one in processes] == [sum(own) for own in calls]
        assert {one.total for one in processes} == {sum(map(sum, calls))}


# Four processes reserve 3 of 8 as fast as they can, and look how many of them hold one: never more than two.
RACE = """
import os, sys
from engrampool_server.shared import InFlight, int64s
slots, held = int64s(4), int64s(4)
children = []
for slot in range(4):
    pid = os.fork()
    if not pid:
        mine, most, got = InFlight(8, slots, slot), 0, 0
        while got < 2000:
            if mine.reserve(3):
                held[slot] = 1
                most = max(most, sum(held))
                held[slot] = 0
                mine.release(3)
                got += 1
        os._exit(most)
    children.append(pid)
print(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children), list(slots))
"""


def test_processes_that_race_never_exceed_the_bound():
    done = subprocess.run([sys.executable, "-c", RACE], capture_output=True, text=True, timeout=100, check=True)
    most, left = done.stdout.split(maxsplit=1)
    assert int(most) in (1, 2)
    assert left.strip() == "[0, 0, 0, 0]"


def test_the_lowest_free_slot_is_taken():
    assert [free_slot(taken) for taken in ([], [0], [1, 0], [0, 2], [2, 1])] == [0, 1, 2, 1, 0]
