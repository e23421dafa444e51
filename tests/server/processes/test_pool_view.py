"""What a server is to hold follows its registry only where that says so itself: not where it forgot, or is another."""

from dataclasses import replace

import pytest

from engrampool_proto.registry.etcd import Active, Held, Member, Published, State
from engrampool_server.processes.pool_view import PoolView

ROWS = {1: 10}


def published(version, base=None, **changed):
    return replace(Published("m", version, f"/{version}", base, "d", ROWS), **changed)


def state(*versions, active=None, retired="", held=(), rows=(0, 10), cluster="7", since=1):
    """held: versions that a server holds these rows of. since: the revision that wrote the retirements."""
    member = Member("h:1", tuple(Held("m", version, {1: rows}) for version in held))
    return State(
        {"h:1": member},
        tuple(one if isinstance(one, Published) else published(one) for one in versions),
        {"m": Active("m", active)} if active else {},
        since,
        {("m", version): since for version in retired},
        cluster,
    )


def known(*states):
    knows = PoolView()
    for one in states:
        knows = knows.after(one)
    return knows


def names(knows):
    return "".join(sorted(version for _, version in knows.published))


@pytest.mark.parametrize("cluster", ["7", "8"])
def test_a_registry_that_knows_nothing_of_a_version_is_no_reason_to_give_it_up(cluster):
    before = state("a", "b", active="a", held="ab")
    lost = known(before, state(held="ab", cluster=cluster))
    assert names(lost) == "ab"
    assert lost.active == {"m": "a"}
    assert [one.version for one in lost.unpublished(state(held="ab", cluster=cluster))] == ["a", "b"]
    # Nor is the first version that is published in it again, or another one.
    for version in "abc":
        again = state(version, held="ab", cluster=cluster)
        assert set(names(lost.after(again))) == {*"ab", version}


def test_a_version_is_given_up_once_it_is_retired():
    before = state("a", "b", active="b", held="ab")
    assert names(known(before, state("b", active="b", retired="a", held="ab"))) == "b"
    # One that is published again is wanted again.
    again = known(before, state("b", active="b", retired="a", held="ab"), state("a", "b", active="b", held="ab"))
    assert names(again) == "ab"
    # A record of both is one of a program that does not know of retirements.
    assert names(known(before, state("a", "b", active="b", retired="a", held="ab"))) == "ab"


def test_a_retirement_counts_only_in_the_registry_that_was_seen_without_it():
    before = state("a", "b", active="b", held="ab")
    other = known(before, state("b", active="b", retired="a", held="ab", cluster="8"))
    assert names(other) == "ab"
    # There it counts once it was published there, or seen not to be retired.
    assert names(other.after(state("b", active="b", retired="a", held="ab", cluster="8"))) == "ab"
    moved = other.after(state("b", active="b", held="ab", cluster="8"))
    assert names(moved.after(state("b", active="b", retired="a", held="ab", cluster="8"))) == "b"
    # In the first one it goes on to count.
    assert names(other.after(state("b", active="b", retired="a", held="ab"))) == "b"


def test_a_retirement_that_a_backup_brought_back_is_told_and_counts_once_it_is_written_again():
    restored = state("b", active="b", retired="a", held="ab", cluster="8", since=5)
    knows = known(state("a", "b", active="b", held="ab"), restored, restored)
    assert names(knows) == "ab"
    assert [one.version for one in knows.unpublished(restored)] == ["a"]
    # As after a restart.
    knows = PoolView.from_json(knows.to_json())
    again = knows.after(state("b", active="b", retired="a", held="ab", cluster="8", since=6))
    assert names(again) == "b"
    assert again.unpublished(restored) == []
    # Not while clients may read it; then it waits only for that, and nobody has to do anything about it.
    read = known(state("a", "b", active="a", held="ab"), restored)
    waits = state("c", active="c", retired="a", held="ab", cluster="8", since=6)
    assert "a" in names(read.after(waits))
    assert "a" not in [one.version for one in read.after(waits).unpublished(waits)]


def test_what_clients_read_stays_until_another_version_is_active_with_all_rows_held():
    knows = known(state("a", "b", active="a", held="ab"))
    steps = [
        state("b", retired="a", held="ab"),
        # Active, and not yet held; held in part; held, and its record is damaged.
        state("b", active="b", retired="a", held="a"),
        state("b", active="b", retired="a", held="ab", rows=(0, 9)),
        state("c", active="c", retired="a", held="a"),
        state(active="x", retired="a", held="ax"),
    ]
    for step in steps:
        knows = knows.after(step)
        assert "a" in names(knows)
        assert knows.active == {"m": "a"}
    knows = knows.after(state("b", active="b", retired="a", held="ab"))
    assert "a" not in names(knows)
    assert knows.active == {"m": "b"}


def test_what_nobody_reads_goes_though_nothing_was_ever_active():
    assert names(known(state("a", "b", held="ab"), state("b", retired="a", held="ab"))) == "b"
    assert names(known(state("a", held="a"), state(retired="a", held="a"))) == ""


def test_the_version_before_stays_while_the_active_one_is_not_wholly_held():
    before = state("a", "b", active="b", held="ab")
    assert names(known(before, state("b", active="b", retired="a", held="a"))) == "ab"


def test_a_base_stays_as_long_as_its_patch():
    patch = published("p", "a")
    before = state("a", patch, active="p", held="ap")
    lost = known(before, state("a", held="ap"), state(retired="a", held="ap"))
    assert names(lost) == "ap"
    gone = lost.after(state("b", active="b", held="apb")).after(state("b", active="b", retired="ap", held="apb"))
    assert names(gone) == "b"


def test_it_comes_back_from_json():
    knows = known(state("a", published("p", "a"), active="p", held="ap"), state("b", held="apb", cluster="8"))
    assert PoolView.from_json(knows.to_json()) == knows
    assert knows.seen == {("m", "a"): {"8": 0}, ("m", "p"): {"8": 0}, ("m", "b"): {"8": 0}}
    knows = knows.after(state("b", retired="a", held="apb", cluster="9", since=5))
    assert PoolView.from_json(knows.to_json()) == knows
    assert knows.seen["m", "a"] == {"8": 0, "9": 5}


def test_a_version_that_is_published_from_elsewhere_is_the_same_version():
    knows = known(state("a", active="a", held="a"), state(held="a"), state(published("a", location="/new"), held="a"))
    assert knows.published["m", "a"].location == "/new"
