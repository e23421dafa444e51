"""Tables that outlive a server: adopted, shared, freed; and never in the way, wherever the server before was killed."""

import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from engrampool_proto.segment import TRAILER_BYTES, Identity
from engrampool_server.commands.files import segments as segments_command
from engrampool_server.files.table_files import PackedModel, TableFileError
from engrampool_server.memory import segments as segments_module
from engrampool_server.memory.memory import OutOfMemoryError
from engrampool_server.memory.reading import LoadCancelledError, identities
from engrampool_server.memory.segments import (
    Backing,
    Found,
    SegmentError,
    file_name,
    find_backing,
    free,
    survey,
    sweep,
    take,
)
from engrampool_server.memory.table_loader import load
from engrampool_server.memory.tables import LoadedModel
from server_fixtures import LIMIT_S, SPEC, Events, change_byte, eventually, expected, lacking, pack

NAME = "engrampool-{uid}-{version}-{layer}-0-{rows}"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("segments") / "small", block_bytes=100_000)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in another version."""
    return pack(tmp_path_factory.mktemp("segments") / "other", change=True, block_bytes=100_000)


def load_into(directory: Path, packed: Path, stop: threading.Event | None = None, **options) -> LoadedModel:
    with PackedModel.open(packed) as model:
        return load(
            model, f"file:{directory}", options.get("lock", False), 2, stop or threading.Event(), lambda _: None
        )


def wanted(packed: Path) -> list[Identity]:
    with PackedModel.open(packed) as model:
        return identities(model)


def backing(directory: Path) -> Backing:
    found = find_backing(f"file:{directory}")
    assert found is not None
    return found


def right(held: LoadedModel) -> bool:
    return all(
        table.rows.tobytes() == expected(layer, np.arange(len(table.rows))) for layer, table in held.tables.items()
    )


def inodes(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in directory.iterdir()}


def mapped_inodes() -> set[int]:
    return {int(line.split()[4]) for line in Path("/proc/self/maps").read_text().splitlines()}


# --- a warm start


def test_a_second_load_adopts_what_the_first_left(packed, tmp_path, events):
    held = load_into(tmp_path, packed)
    assert events.lines == []
    version = held.version[:16]
    names = {
        NAME.format(uid=os.geteuid(), version=version, layer=table.layer, rows=table.num_rows) for table in SPEC.tables
    }
    before = inodes(tmp_path)
    assert set(before) == names
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.iterdir())
    del held
    gc.collect()
    assert not mapped_inodes() & set(before.values())

    held = load_into(tmp_path, packed)
    assert [(fields["layer"], fields["bytes"]) for fields in events.of("adopted")] == [
        (table.layer, table.nbytes) for table in SPEC.tables
    ]
    assert inodes(tmp_path) == before
    assert mapped_inodes() >= set(before.values())
    assert right(held)
    for table in held.tables.values():
        assert table.rows.ctypes.data % os.sysconf("SC_PAGE_SIZE") == 0
        with pytest.raises(ValueError, match="read-only"):
            table.rows[0] = 0


def test_it_reads_only_some_blocks(packed, tmp_path, monkeypatch):
    load_into(tmp_path, packed)

    def refuse(*_):
        raise AssertionError("a block was read")

    monkeypatch.setattr(PackedModel, "read_block", refuse)
    read = []
    with PackedModel.open(packed) as model:
        load(model, f"file:{tmp_path}", True, 1, threading.Event(), read.append)
    assert read == [table.nbytes for table in SPEC.tables]


def test_a_segment_stays_in_use_until_the_last_view_goes(packed, tmp_path):
    held = load_into(tmp_path, packed)
    assert [found.in_use for found in survey(backing(tmp_path))] == [True, True]
    view = held.tables[2].rows[5:]
    del held
    gc.collect()
    assert sorted((found.identity.layer, found.in_use) for found in survey(backing(tmp_path))) == [
        (2, True),
        (9, False),
    ]
    assert view[0].tobytes() == expected(2, [5])
    del view
    gc.collect()
    assert not any(found.in_use for found in survey(backing(tmp_path)))


def drop_trailer(path: Path) -> None:
    os.truncate(path, path.stat().st_size - TRAILER_BYTES)


def lengthen(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw[:-TRAILER_BYTES] + bytes(TRAILER_BYTES) + raw[-TRAILER_BYTES:])


DAMAGES = {
    "a byte of the first block": ("damaged", lambda path: change_byte(path, 7)),
    "a byte of the last block": ("damaged", lambda path: change_byte(path, SPEC.table(2).nbytes - 1)),
    "a byte of the trailer's digest": ("partial", lambda path: change_byte(path, -TRAILER_BYTES)),
    "a byte of the trailer's text": ("partial", lambda path: change_byte(path, -TRAILER_BYTES + 60)),
    "no trailer": ("partial", drop_trailer),
    "too long": ("partial", lengthen),
    "one byte": ("partial", lambda path: path.write_bytes(b"x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_not_adopted_but_loaded_again(packed, tmp_path, events, damage):
    load_into(tmp_path, packed)
    gc.collect()
    path = tmp_path / file_name(wanted(packed)[0])
    reason, do = DAMAGES[damage]
    do(path)
    held = load_into(tmp_path, packed)
    assert right(held)
    assert [(fields["path"], fields["reason"]) for fields in events.of("freed")] == [(str(path), reason)]
    assert [fields["layer"] for fields in events.of("adopted")] == [9]
    del held
    gc.collect()
    assert len(events.of("adopted")) == 1
    assert right(load_into(tmp_path, packed))
    assert len(events.of("adopted")) == 3


def test_an_empty_file_is_no_segment(packed, tmp_path):
    """As left by a start that was killed, or is about to lock it."""
    for identity in wanted(packed):
        (tmp_path / file_name(identity)).touch(0o600)
    assert right(load_into(tmp_path, packed))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_whole_segment_under_the_name_of_another_is_not_adopted(packed, other, tmp_path):
    load_into(tmp_path, other)
    gc.collect()
    for ours, theirs in zip(wanted(packed), wanted(other), strict=True):
        (tmp_path / file_name(theirs)).rename(tmp_path / file_name(ours))
    assert right(load_into(tmp_path, packed))


def test_a_damaged_segment_that_a_server_uses_is_an_error_that_says_so(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("engrampool_server.memory.reading.POLL_S", 0.001)
    held = load_into(tmp_path, packed)
    path = tmp_path / file_name(wanted(packed)[0])
    change_byte(path, 0)
    with pytest.raises(SegmentError, match=f"{path} is damaged, and a running server uses it"):
        load_into(tmp_path, packed)
    assert path.exists()
    del held


# --- what is freed, and what is not


def test_a_sweep_frees_leftovers_and_old_versions_that_nobody_uses(packed, other, tmp_path, events):
    partial = tmp_path / NAME.format(uid=os.geteuid(), version="0" * 16, layer=3, rows=7)
    partial.write_bytes(b"x" * 100_000)
    (tmp_path / "engrampool-notes.txt").write_text("not a segment")
    (tmp_path / NAME.format(uid=os.geteuid(), version="not-a-version", layer=3, rows=7)).write_text("not one either")
    load_into(tmp_path, packed)
    held = load_into(tmp_path, other)
    gc.collect()
    # Of another model nothing is freed.
    sweep(backing(tmp_path), [Identity("else", "f" * 32, 1, 1, 1)])
    assert [(fields["path"], fields["reason"]) for fields in events.of("freed")] == [(str(partial), "partial")]
    # Both versions may be wanted.
    assert len(sweep(backing(tmp_path), [*wanted(packed), *wanted(other)])) == 4
    # One in use stays whoever wants it gone.
    assert len(sweep(backing(tmp_path), wanted(packed))) == 4
    del held
    gc.collect()
    rest = sweep(backing(tmp_path), wanted(packed))
    assert {found.identity for found in rest} == set(wanted(packed))
    freed = events.of("freed")[1:]
    assert [(fields["model"], fields["layer"], fields["reason"]) for fields in freed] == [
        ("small", 2, "other version"),
        ("small", 9, "other version"),
    ]
    assert all(fields["bytes"] >= SPEC.table(fields["layer"]).nbytes for fields in freed)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_segment_is_not_freed_in_place_of_another(packed, tmp_path):
    load_into(tmp_path, packed)
    gc.collect()
    found = survey(backing(tmp_path))[0]
    other = Found(found.path, None, found.nbytes, False, found.modified_ns)
    assert not free(backing(tmp_path), other, "partial")
    assert free(backing(tmp_path), found, "room")
    assert not free(backing(tmp_path), found, "room")


@pytest.mark.parametrize("how", ["damage", "stop"])
def test_a_load_that_fails_leaves_nothing_partial(packed, tmp_path, monkeypatch, how):
    stop, count = threading.Event(), 0
    read_block = PackedModel.read_block

    def read(self, block, out):
        nonlocal count
        read_block(self, block, out)
        count += 1
        if count == 19:  # in the second table
            if how == "stop":
                stop.set()
            else:
                raise TableFileError("damaged")

    monkeypatch.setattr(PackedModel, "read_block", read)
    with PackedModel.open(packed) as model:
        assert len(model.blocks(2)) < 19 < sum(len(model.blocks(layer)) for layer in (2, 9))
        with pytest.raises(LoadCancelledError if how == "stop" else TableFileError):
            load(model, f"file:{tmp_path}", False, 1, stop, lambda _: None)
    # The first table is whole: the next start need not read it again.
    assert [found.identity and found.identity.layer for found in survey(backing(tmp_path))] == [2]


# --- what must not be trusted


@pytest.mark.parametrize("what", ["link", "dangling link", "directory", "pipe", "writable", "owner"])
def test_what_is_not_ours_is_refused_and_not_touched(packed, tmp_path, what):
    (tmp_path / "there").mkdir()
    load_into(tmp_path / "there", packed)
    name = file_name(wanted(packed)[0])
    directory = tmp_path / "here"
    directory.mkdir()
    path, target = directory / name, tmp_path / "there" / name
    if what == "link":
        path.symlink_to(target)
    elif what == "dangling link":
        path.symlink_to(tmp_path / "not there")
    elif what == "directory":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "writable":
        path.write_bytes(target.read_bytes())
        path.chmod(0o622)
    elif os.geteuid() == 0:
        path.write_bytes(target.read_bytes())
        os.chown(path, 12345, -1)
    else:
        pytest.skip("only root can give a file to another user: run as root")
    status = path.lstat()
    with pytest.raises(SegmentError, match=f"{path} is no segment of ours"):
        load_into(directory, packed)
    assert survey(backing(directory)) == []
    assert sweep(backing(directory), wanted(packed)) == []
    assert path.lstat().st_mtime_ns == status.st_mtime_ns
    assert os.path.samestat(path.lstat(), status)
    assert not (tmp_path / "not there").exists()


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SegmentError, match="not there, where tables are to lie"):
        find_backing(f"file:{tmp_path / 'not there'}")


def test_where_segments_lie(tmp_path):
    assert find_backing("anon") is None
    assert find_backing("shm") == Backing(Path("/dev/shm"))
    mounts = tmp_path / "mounts"
    (tmp_path / "huge pages").mkdir()
    escaped = str(tmp_path / "huge pages").replace(" ", "\\040")
    mounts.write_text(
        f"none {tmp_path} tmpfs rw 0 0\nnone {tmp_path} hugetlbfs rw,pagesize=7M 0 0\n"
        f"none {tmp_path / 'none'} hugetlbfs rw,pagesize=2M 0 0\nnone {escaped} hugetlbfs rw,relatime,pagesize=2M 0 0\n"
    )
    if segments_module.huge_page_bytes() == 2 << 20:
        assert find_backing("hugetlb", mounts) == Backing(tmp_path / "huge pages", 2 << 20)
    mounts.write_text("")
    assert find_backing("hugetlb", mounts) is None


# --- several at once


def load_at_once(directory: Path, packed: Path, barrier, results, done) -> None:
    handler = Events()
    logging.getLogger("engrampool").addHandler(handler)
    logging.getLogger("engrampool").setLevel("INFO")
    barrier.wait(LIMIT_S)
    held = load_into(directory, packed)
    maps = Path("/proc/self/maps").read_text()
    mapped = sum(found.path.name in maps for found in survey(backing(directory)))
    results.put((right(held), mapped, len(handler.of("adopted")), [f["reason"] for f in handler.of("freed")]))
    done.wait(LIMIT_S)


@pytest.mark.parametrize("before", ["nothing", "partial", "whole"])
def test_servers_that_start_at_once_share_one_copy(packed, tmp_path, monkeypatch, before):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # By this its process finds the module, which its children would else import, one by one.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    for number in range(2):
        directory = tmp_path / str(number)
        directory.mkdir()
        if before == "whole":
            load_into(directory, packed)
            gc.collect()
        if before == "partial":
            for identity in wanted(packed):
                (directory / file_name(identity)).write_bytes(bytes(identity.nbytes))
        barrier, results, done = context.Barrier(4), context.Queue(), context.Barrier(5)
        processes = [
            context.Process(target=load_at_once, args=(directory, packed, barrier, results, done)) for _ in range(4)
        ]
        for process in processes:
            process.start()
        answers = [results.get(timeout=LIMIT_S) for _ in processes]
        done.wait(LIMIT_S)
        for process in processes:
            process.join(LIMIT_S)
            assert process.exitcode == 0
        assert [(ok, mapped) for ok, mapped, *_ in answers] == [(True, 2)] * 4
        assert sum(adopted for *_, adopted, _ in answers) == (8 if before == "whole" else 6)
        assert sorted(reason for *_, freed in answers for reason in freed) == ["partial"] * (
            2 if before == "partial" else 0
        )
        assert all(found.identity and not found.in_use for found in survey(backing(directory)))


def test_who_waits_for_another_load_can_be_stopped(packed, tmp_path, events):
    where = backing(tmp_path)
    making = take(where, wanted(packed)[0], lambda rows: True, lambda: None)
    stop, ended = threading.Event(), []

    def start() -> None:
        try:
            load_into(tmp_path, packed, stop)
        except LoadCancelledError as error:
            ended.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    eventually(lambda: events.of("waiting"), "it waits")
    stop.set()
    thread.join(LIMIT_S)
    assert len(ended) == 1
    making.abandon()
    assert list(tmp_path.iterdir()) == []


# --- killed, at every line

KILLED = """
import gc, os, signal, sys, threading
from pathlib import Path
import numpy as np
from engrampool_server.memory import segments
from engrampool_server.memory import reading, table_loader
from engrampool_server.files.table_files import PackedModel
from server_fixtures import SPEC, expected

packed, old, directory, first, step = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:])
FILES = (segments.__file__, reading.__file__)
memory = f"file:{directory}"

def start(packed):
    with PackedModel.open(packed) as model:
        wanted = reading.identities(model)
        segments.sweep(segments.find_backing(memory), wanted)
        return table_loader.load(model, memory, False, 1, threading.Event(), lambda _: None), wanted

def child(work):
    pid = os.fork()
    if not pid:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def killed_at(line):
    left = line
    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    threading.settrace(trace)
    sys.settrace(trace)
    start(packed)

RIGHT = {table.layer: expected(table.layer, np.arange(table.num_rows)) for table in SPEC.tables}

def whole():
    held, wanted = start(packed)
    for layer, table in held.tables.items():
        assert table.rows.tobytes() == RIGHT[layer]
    found = segments.survey(segments.find_backing(memory))
    assert {one.identity for one in found} == set(wanted), found
    assert {path.name for path in directory.iterdir()} == {segments.file_name(one) for one in wanted}

killed = 0
for line in range(first, 1 << 30, step):
    assert child(lambda: start(old)) == 0  # so that there is something to free
    code = child(lambda: killed_at(line))
    assert child(whole) == 0, line
    if code == 0:
        break
    assert code == -signal.SIGKILL
    killed += 1
print(killed)
"""


def test_a_load_that_is_killed_anywhere_is_in_nobodys_way(tmp_path):
    """SIGKILL before a line of segments.py or reading.py, then a start that must serve; every 11th line run."""
    directory = tmp_path / "segments"
    directory.mkdir()
    packed, old = pack(tmp_path / "new", block_bytes=500_000), pack(tmp_path / "old", change=True, block_bytes=500_000)
    command = [sys.executable, "-c", KILLED, str(packed), str(old), str(directory), "0", "11"]
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30


# --- no room

# For each size of a file system that is made there and unmade again.
FULL = """
import os, subprocess, sys, threading
from pathlib import Path
from engrampool_server.files.table_files import PackedModel
from engrampool_server.memory.table_loader import load
packed, where, memory, *sizes = sys.argv[1:]
for size in sizes:
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", where], check=True)
    with PackedModel.open(Path(packed)) as model:
        try:
            load(model, memory, False, 2, threading.Event(), lambda _: None)
        except Exception as error:
            print(type(error).__name__, error)
    print(sorted(name.split("-")[3] for name in os.listdir(where)))
    print(os.statvfs(where).f_bfree > 0 and "free again")
    subprocess.run(["umount", "--lazy", where], check=True)
"""


OWN_MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.fixture
def _may_mount() -> None:
    if subprocess.run([*OWN_MOUNTS, "true"], capture_output=True).returncode:
        lacking("this process may not mount a file system of its own; root may")


@pytest.mark.usefixtures("_may_mount")
@pytest.mark.parametrize("kind", ["shm", "file"])
def test_a_full_file_system_is_an_error_and_not_the_end_of_the_process(packed, tmp_path, kind):
    left_at = {"size=1m": "[]", "size=1800k": "['2']"}
    where, memory = ("/dev/shm", "shm") if kind == "shm" else (str(tmp_path), f"file:{tmp_path}")
    command = [*OWN_MOUNTS, sys.executable, "-c", FULL, str(packed), where, memory, *left_at]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[::3]] == ["OutOfMemoryError"] * 2
    assert lines[1::3] == list(left_at.values())
    assert lines[2::3] == ["free again"] * 2


def test_a_size_that_no_file_system_has_is_an_error(tmp_path):
    with pytest.raises(OutOfMemoryError, match=rf"allocating .* GiB in {tmp_path}"):
        take(backing(tmp_path), Identity("big", "0" * 32, 1, 1 << 32, 1 << 28), lambda rows: True, lambda: None)
    assert list(tmp_path.iterdir()) == []


def test_a_stray_write_to_a_table_ends_the_one_process_that_tried(packed, tmp_path):
    program = (
        "import ctypes, os, sys, threading; from pathlib import Path\n"
        "from engrampool_server.files.table_files import PackedModel\n"
        "from engrampool_server.memory.table_loader import load\n"
        "for memory in sys.argv[2:]:\n"
        "    with PackedModel.open(Path(sys.argv[1])) as model:\n"
        "        held = load(model, memory, False, 1, threading.Event(), lambda _: None)\n"
        "    for table in held.tables.values():\n"
        "        if not (pid := os.fork()): ctypes.memset(table.rows.ctypes.data + 1, 1, 1)\n"
        "        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
        "    del held, table\n"
    )
    memories = ["anon", f"file:{tmp_path}", f"file:{tmp_path}"]  # read, made, adopted
    command = [sys.executable, "-c", program, str(packed), *memories]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == [str(-signal.SIGSEGV)] * 6, done.stderr


# --- the command


def test_the_command_lists_and_frees(packed, other, tmp_path):
    def run(*arguments: str) -> list[str]:
        result = CliRunner().invoke(segments_command, [f"--memory=file:{tmp_path}", *arguments])
        assert result.exit_code == 0, result.output
        return result.output.splitlines()

    assert run() == []
    held = load_into(tmp_path, packed)
    load_into(tmp_path, other)
    gc.collect()
    (tmp_path / NAME.format(uid=os.geteuid(), version="0" * 16, layer=3, rows=7)).write_bytes(b"x")
    lines = run()
    assert len(lines) == 5
    assert sum("unused  small layer" in line for line in lines) == 2
    assert sum(f"in use  small layer 9 rows 0 .. 4099  version {held.version}" in line for line in lines) == 1
    assert sum("unused  partial" in line for line in lines) == 1
    assert sum("  freed  " in line for line in run("--free")) == 3
    assert len(run()) == len(run("--free")) == 2
    result = CliRunner().invoke(segments_command, ["--memory=file:"])
    assert "memory: 'file:' is not allowed" in str(result.exception)
