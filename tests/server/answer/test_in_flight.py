"""The bound on bytes in flight is one for all processes of a server, and no peer may have more than it leaves free."""

import copy
import subprocess
import sys
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from engrampool_server.answer.in_flight import InFlight

LIMIT = 100


def peers_apart(number: int) -> list[str]:
    """So many names of peers of which no two share a bucket. Python hashes them otherwise in each process."""
    bound, names, peers = InFlight(LIMIT), map(str, count()), []
    while len(peers) < number:
        peer = next(names)
        if not bound.of(peer):
            assert bound.reserve(1, peer)
            peers.append(peer)
    return peers


PEERS = peers_apart(3)


def processes_of(bound: InFlight, number: int) -> list[InFlight]:
    """What each of `number` forks has."""
    made = [copy.copy(bound) for _ in range(number)]
    for slot, one in enumerate(made):
        one.slot = slot
    return made


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from(PEERS),
            st.one_of(st.integers(0, 2 * LIMIT), st.integers(0, 20), st.sampled_from(["end", "die"])),
        ),
        max_size=60,
    )
)
def test_it_counts_what_plain_sums_would(steps):
    """Three processes that reserve for three peers, end the oldest of their calls, or die with all of them."""
    processes = processes_of(InFlight(LIMIT, 3), 3)
    calls = [[], [], []]

    def of(peer: str) -> int:
        return sum(nbytes for own in calls for whose, nbytes in own if whose == peer)

    for at, peer, what in steps:
        if what == "die":
            processes[(at + 1) % 3].clear(at)
            calls[at] = []
        elif what == "end":
            if calls[at]:
                whose, nbytes = calls[at].pop(0)
                processes[at].release(nbytes, whose)
        else:
            free = LIMIT - what - sum(map(of, PEERS))
            fits = of(peer) + what <= free
            assert processes[at].reserve(what, peer) == fits
            if fits:
                calls[at].append((peer, what))
        assert [one.own for one in processes] == [sum(nbytes for _, nbytes in own) for own in calls]
        assert {one.total for one in processes} == {sum(map(of, PEERS))}
        assert [processes[0].of(peer) for peer in PEERS] == [of(peer) for peer in PEERS]


def test_however_many_peers_are_greedy_there_is_room_for_one_more():
    bound = InFlight(1 << 30, 2)
    processes = processes_of(bound, 2)
    *greedy, newcomer = peers_apart(9)
    for peer in greedy:
        had = 0
        while any(one.reserve(1 << 20, peer) for one in processes):
            had += 1
        assert had > 0
    assert bound.total < bound.limit_bytes
    assert bound.reserve(1 << 20, newcomer)


# Four processes, each a peer of its own, reserve 3 of 10 as fast as they can, and look how many of them hold one: never
# more than two.
RACE = """
import os, sys
from engrampool_server.answer.in_flight import InFlight, int64s
bound, held = InFlight(10, 4), int64s(4)
children = []
for slot in range(4):
    pid = os.fork()
    if not pid:
        bound.slot, most, got = slot, 0, 0
        while got < 2000:
            if bound.reserve(3, str(slot)):
                held[slot] = 1
                most = max(most, sum(held))
                held[slot] = 0
                bound.release(3, str(slot))
                got += 1
        os._exit(most)
    children.append(pid)
print(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children), bound.total)
"""


def test_processes_that_race_never_exceed_the_bound():
    done = subprocess.run([sys.executable, "-c", RACE], capture_output=True, text=True, timeout=300, check=True)
    most, left = done.stdout.split()
    assert int(most) in (1, 2)
    assert left == "0"
