"""Files that tell n-grams: whoever may have read what was there before reads none of the new one."""

import os
import stat

import pytest

from engrampool_client import private_files


@pytest.fixture(autouse=True)
def _no_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def test_a_file_is_its_owners_before_anything_is_in_it(tmp_path):
    with private_files.create(tmp_path / "new") as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600
        file.write(b"told")
    assert (tmp_path / "new").read_bytes() == b"told"


def test_who_has_the_file_that_was_there_reads_nothing_of_the_new_one(tmp_path):
    path, name = tmp_path / "old", tmp_path / "another name"
    path.write_bytes(b"before")
    name.hardlink_to(path)
    with path.open("rb") as reader, private_files.create(path) as file:
        file.write(b"told")
        file.flush()
        assert (reader.read(), name.read_bytes()) == (b"before", b"before")
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"told", 0o600)


@pytest.mark.parametrize("dangling", [True, False])
def test_a_symbolic_link_is_not_followed(tmp_path, dangling):
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to(target)
    if not dangling:
        target.write_bytes(b"before")
    with pytest.raises(OSError, match="no regular file"):
        private_files.create(link)
    assert link.is_symlink()
    assert dangling is not target.exists()
    assert dangling or target.read_bytes() == b"before"


def test_a_device_is_written_to_and_neither_a_pipe_nor_a_directory_is(tmp_path):
    """A pipe without a reader would hold the writer up."""
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(OSError, match="no regular file; name another"):
        private_files.create(tmp_path / "pipe")
    with pytest.raises(IsADirectoryError):
        private_files.create(tmp_path)
    os.mknod(tmp_path / "null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    with private_files.create(tmp_path / "null") as file:
        file.write(b"told")
    assert stat.S_ISCHR((tmp_path / "null").lstat().st_mode)


@pytest.mark.parametrize("kind", ["device", "pipe", "directory", "link"])
def test_nothing_but_a_regular_file_is_replaced(tmp_path, kind):
    path = tmp_path / "there"
    private_files.check_replaceable(path)
    if kind == "device":
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="no regular file; name another"):
        private_files.check_replaceable(path)
    path.rmdir() if kind == "directory" else path.unlink()
    path.touch()
    private_files.check_replaceable(path)
