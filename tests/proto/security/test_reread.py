"""Files that change while somebody goes by them: another value, or the last good one."""

import os
import threading

import pytest

from engrampool_proto.errors import EngrampoolError
from engrampool_proto.security import reread
from engrampool_proto.security.reread import Reread


class DamagedError(EngrampoolError):
    """Of a test."""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_text("1")
    return path


def number(path):
    try:
        return int(path.read_text())
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path.name}: {error}") from error


def put(path, text):
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(path)


def test_a_file_that_changes_gives_another_value(file):
    kept = Reread([file], lambda: number(file))
    assert (kept.value, kept.look()) == (1, False)
    put(file, "2")
    assert (kept.look(), kept.value, kept.look()) == (True, 2, False)


def test_of_a_damaged_file_the_last_good_value_stays_and_it_is_said_once(file):
    said = []
    kept = Reread([file], lambda: number(file), said.append)
    for text in ("one", "one"):
        put(file, text)
        assert (kept.look(), kept.value, len(said)) == (False, 1, 1)
    file.unlink()
    assert (kept.look(), kept.value, len(said)) == (False, 1, 2)
    put(file, "3")
    assert (kept.look(), kept.value) == (True, 3)
    put(file, "one")
    kept.look()
    assert len(said) == 3  # once more, as it was good in between


def test_whatever_reading_raises_is_damage(file):
    said = []

    def read():
        if (value := number(file)) == 2:
            raise RuntimeError("of a kind that nobody thought of")
        return value

    kept = Reread([file], read, said.append)
    put(file, "2")
    assert (kept.look(), kept.value, len(said)) == (False, 1, 1)
    put(file, "3")
    assert (kept.look(), kept.value) == (True, 3)


def test_a_file_that_is_damaged_from_the_start_has_no_value(file):
    file.write_text("one")
    with pytest.raises(DamagedError, match="one"):
        Reread([file], lambda: number(file))


def test_a_second_change_within_one_tick_of_the_file_systems_clock_is_seen(file):
    kept = Reread([file], lambda: number(file))
    put(file, "2")
    status = file.stat()
    assert kept.look()
    file.write_text("3")  # the same inode, the same size
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (kept.look(), kept.value) == (True, 3)


def test_a_file_that_is_not_young_is_not_read_again(file):
    reads = []
    os.utime(file, (1, 1))
    kept = Reread([file], lambda: reads.append(0))
    assert not any(kept.look() for _ in range(5))
    assert len(reads) == 1


def test_a_file_that_changes_while_it_is_read_is_read_again(file):
    texts = ["2", "3"]

    def read():
        value = number(file)
        if texts and value != 1:
            put(file, texts.pop())
        return value

    kept = Reread([file], read)
    put(file, "5")
    assert [kept.look() for _ in range(3)] == [False, False, True]
    assert kept.value == 2


def test_who_looks_waits_for_nobody(file):
    began, go_on = threading.Event(), threading.Event()

    def read():
        if (value := number(file)) != 1:
            began.set()
            assert go_on.wait(60)
        return value

    kept = Reread([file], read)
    put(file, "2")
    slow = threading.Thread(target=kept.look)
    slow.start()
    assert began.wait(60)
    assert (kept.look(), kept.value) == (False, 1)
    go_on.set()
    slow.join()
    assert kept.value == 2


def test_files_are_looked_at_so_often_and_no_more(file, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(reread.time, "monotonic", lambda: now[0])
    kept = Reread([file], lambda: number(file), every_s=1.0)
    put(file, "2")
    assert not kept.look()
    now[0] += 1.0
    assert kept.look()
