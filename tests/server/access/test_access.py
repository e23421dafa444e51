"""Who looks at files of callers goes on doing so: after an error, beside a disk that hangs, and after a fork."""

import threading

import pytest

from certificates import write_callers
from engrampool_proto.security.reread import Reread
from engrampool_server.access import access as access_module
from engrampool_server.access.access import Access
from engrampool_server.access.callers import read_callers
from server_fixtures import LIMIT_S, eventually


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(access_module, "LOOK_S", 0.01)
    monkeypatch.setattr(access_module, "SETTLE_S", 0.01)


@pytest.fixture
def path(tmp_path):
    return write_callers(tmp_path / "callers", {"name": "a", "token": "first"})


def test_what_failed_when_callers_had_changed_is_done_again(path):
    access = Access(callers=Reread([path], lambda: read_callers(path)))
    tries, done = [], threading.Event()

    def changed():
        tries.append(access.callers.value.names)
        if len(tries) == 1:
            raise RuntimeError("of a connection that cannot be cut off")
        done.set()

    end = access.watch(changed)
    try:
        write_callers(path, {"name": "b", "token": "second"})
        assert done.wait(LIMIT_S)
        assert tries == [{"b"}, {"b"}]
    finally:
        end()


def test_a_look_that_hangs_keeps_neither_its_process_nor_a_fork_of_it(path):
    began, go_on = threading.Event(), threading.Event()

    def read():
        found = read_callers(path)
        if found.names == {"slow"}:
            began.set()
            assert go_on.wait(LIMIT_S)
        return found

    access = Access(callers=Reread([path], read))
    write_callers(path, {"name": "slow", "token": "x"})
    eventually(lambda: access.look_aside() or began.is_set())
    access.settle()
    access.look_aside()
    assert len([one for one in threading.enumerate() if one.name == "access"]) == 1
    # As in a child, which has the lock as it was.
    access.forked()
    write_callers(path, {"name": "b", "token": "y"})
    assert access.look()
    assert access.callers.value.names == {"b"}
    go_on.set()
    eventually(lambda: not [one for one in threading.enumerate() if one.name == "access"])
