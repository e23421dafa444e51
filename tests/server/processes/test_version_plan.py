"""What a server holds follows what is published, whatever comes when, and whatever cannot be loaded."""

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from engrampool_proto.registry.etcd import Published
from engrampool_server.processes.version_plan import VersionPlan

FIXED = ("fixed", "0")


def published(version, base=None, model="m"):
    return Published(model, version, f"/{version}", base, "d", {1: 10})


# `0` is held without being published, `x` never is; a base may be a patch, or the patch itself.
some = st.builds(published, st.sampled_from("abcd"), st.sampled_from([None, None, "a", "b", "0", "x"]))
some |= st.builds(published, st.sampled_from("ef"), st.sampled_from([None, "0"]), st.just("fixed"))
sets = st.lists(some, max_size=5, unique_by=lambda one: (one.model, one.version))


class Server:
    """Takes the steps. broken: versions that cannot be loaded, as long as they are there."""

    def __init__(self):
        self.versions, self.held, self.broken, self.now = VersionPlan([FIXED]), {FIXED: None}, set(), 0.0

    def step(self):
        """Whether there was one to take."""
        drop = self.versions.to_drop()
        if drop:
            for key in drop:
                del self.held[key]
                self.check_bases()
            self.versions.dropped(drop)
            return True
        one = self.versions.to_load(self.now)
        if one is None:
            return False
        assert self.versions.wants(one)
        key = (one.model, one.version)
        if one.version in self.broken:
            self.versions.could_not_load(key, "broken", self.now)
        else:
            self.held[key] = one.base
            self.versions.loaded(key)
            self.check_bases()
        return True

    def check_bases(self):
        assert all(base is None or (model, base) in self.held for (model, _), base in self.held.items())


def loadable(wanted):
    by_key = {(one.model, one.version): one for one in wanted}

    def good(one):
        key = (one.model, one.base)
        return one.base is None or (key in by_key and by_key[key].base is None) or (key == FIXED and key not in by_key)

    return {key for key, one in by_key.items() if good(one)}


@given(st.lists(st.tuples(sets, st.sets(st.sampled_from("abcdef")), st.integers(0, 12), st.floats(0, 400)), max_size=6))
def test_what_is_held_ends_as_what_is_wanted_whatever_was_before(history):
    server = Server()
    wanted = []
    for wanted, broken, steps, seconds in history:
        server.versions.want(wanted)
        server.broken = broken
        for _ in range(steps):
            server.step()
        server.now += seconds
    server.broken = set()
    while server.step() or server.versions.due_s() < inf:
        server.now = max(server.now, server.versions.due_s())
    assert server.held.keys() == {FIXED, *loadable(wanted)}
    assert server.versions.failed.keys() == {(one.model, one.version) for one in wanted} - loadable(wanted)
    assert server.versions.is_settled(server.now) == bool(history)
    assert server.versions.want(wanted) == (not history)
    assert not server.step()


def test_failures_are_tried_again_less_and_less_often_and_at_once_after_a_change():
    versions, (a, b) = VersionPlan(), (published("a"), published("b", "a"))
    versions.want([a, b])
    now, waits = 0.0, []
    for _ in range(6):
        assert versions.to_load(now) == a  # never the patch
        versions.could_not_load(("m", "a"), "why", now)
        assert not versions.want([a, b])
        assert versions.to_load(now) is None
        waits.append(versions.due_s() - now)
        now = versions.due_s()
    assert waits == [30, 60, 120, 240, 300, 300]
    assert versions.failed == {("m", "a"): "why"}
    versions.could_not_load(("m", "a"), "why", now)
    assert versions.want([a])
    assert versions.to_load(now) == a
    versions.loaded(("m", "a"))
    assert versions.failed == {}


def test_what_cannot_be_held_says_why():
    versions = VersionPlan()
    versions.want([published("a"), published("b", "a"), published("c", "b"), published("d", "x")])
    assert {version: why.split(":")[0] for (_, version), why in versions.failed.items()} == {
        "c": "its base, version b, is a patch itself",
        "d": "its base, version x, is not published",
    }
