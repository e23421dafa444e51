"""A /dev/shm that is full, small or read-only, as containers have it: a server says so, or needs none of it.

Each test has a /dev/shm of its own, in a mount namespace that ends with the server.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engrampool_client.testing import ServerProcess, ServerStartError, serve_process
from server_fixtures import LIMIT_S, RawPool, eventually, expected, lacking, pack, rows_of, scrape, version_of

UNSHARE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
SIZE = 8 << 20
# The rows of SPEC take 1.8 MiB.
TIGHT = 1 << 20


def own_shm(options: str = "", free: int = SIZE) -> list[str]:
    """Words before a command that give it a /dev/shm of `SIZE` bytes, of which so many are free."""
    script = f"""set -e
    mount -t tmpfs -o size={SIZE},mode=1777 tmpfs /dev/shm
    dd if=/dev/zero of=/dev/shm/filler bs=4096 count={(SIZE - free) // 4096} status=none
    [ -z "{options}" ] || mount -o remount,{options} /dev/shm
    exec "$@"
    """
    return [*UNSHARE, "sh", "-c", script, "sh"]


@pytest.fixture(scope="module", autouse=True)
def _may_mount() -> None:
    try:
        tried = subprocess.run([*own_shm(), "true"], capture_output=True, text=True, timeout=LIMIT_S)
        problem = tried.stderr.strip()
    except FileNotFoundError:
        problem = "no program `unshare` (util-linux)"
    if problem:
        lacking(f"no mount namespace ({problem}): run as root, or where users may have namespaces")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("shm") / "small")


def shm_of(server: ServerProcess) -> Path:
    return Path(f"/proc/{server.process.pid}/root/dev/shm")


def fill(server: ServerProcess) -> None:
    """Leave nothing free in a server's /dev/shm."""
    with (shm_of(server) / "neighbour").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)) == 4096:
                pass
        except OSError:
            pass
    assert os.statvfs(shm_of(server)).f_bfree == 0


def ask(server: ServerProcess, packed: Path, times: int = 1) -> None:
    with RawPool(server.address, version_of(packed)) as pool:
        for _ in range(times):
            answer = pool.lookup(pool.by_ids((2, [5, 6]), (9, [7])), timeout=LIMIT_S, wait_for_ready=True)
            assert rows_of(answer) == {2: expected(2, [5, 6]), 9: expected(9, [7])}


def rows_counted(server: ServerProcess) -> float:
    return scrape(server.metrics_address).get('engrampool_lookup_rows_total{layer="2",model="small"}', 0)


@pytest.mark.parametrize("options", ["", "ro"], ids=["full", "read-only"])
def test_a_server_with_private_tables_starts_and_counts_whatever_becomes_of_shm(packed, options):
    with serve_process(packed, prefix=own_shm(options, free=0), workers=2) as server:
        ask(server, packed, times=3)
        eventually(lambda: rows_counted(server) == 6)
    assert server.process.returncode == 0


def test_workers_go_on_and_others_come_once_a_neighbour_filled_shm(packed):
    with serve_process(packed, prefix=own_shm(), workers=2) as server:
        workers = server.worker_pids()
        fill(server)
        for _ in range(8):  # connections, so that both workers count something for the first time
            ask(server, packed)
        assert server.worker_pids() == workers
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("rolled")
        ask(server, packed)
        eventually(lambda: rows_counted(server) == 18)
        assert scrape(server.metrics_address)['engrampool_worker_restarts_total{reason="died"}'] == 0
    assert server.process.returncode == 0


def test_tables_that_do_not_fit_shm_are_refused_before_they_are_read(packed):
    with (
        pytest.raises(ServerStartError, match=r"/dev/shm: 1\.\d MiB needed, 1\.0 MiB available.*larger /dev/shm"),
        serve_process(packed, prefix=own_shm(free=TIGHT), memory="shm"),
    ):
        raise AssertionError("it serves")


# A neighbour takes the last of it once the machine was looked at.
TAKEN = """
from engrampool_server.memory import load as loader
before = loader.ModelLoader.load
def load(self, *args):
    with open("/dev/shm/neighbour", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)) == 4096:
                pass
        except OSError:
            pass
    return before(self, *args)
loader.ModelLoader.load = load
"""


def test_a_neighbour_that_takes_the_last_of_shm_during_a_load_ends_it_with_a_reason(packed, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(TAKEN)
    search = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    with (
        pytest.raises(ServerStartError, match=r"no memory is left for the tables: the file system .* is full"),
        serve_process(packed, prefix=own_shm(), memory="shm", environ={"PYTHONPATH": search}),
    ):
        raise AssertionError("it serves")


def test_shm_that_is_read_only_is_named_where_tables_are_to_lie_there(packed):
    with (
        pytest.raises(ServerStartError, match=r"/dev/shm.*read-only.*memory"),
        serve_process(packed, prefix=own_shm("ro"), memory="shm"),
    ):
        raise AssertionError("it serves")


# Rows that fill the file system to its last page: there is none for the trailer.
LAST_PAGE = """
import os
from pathlib import Path
from engrampool_proto.segment import Identity
from engrampool_server.memory.memory import OutOfMemoryError, populate
from engrampool_server.memory.segments import Backing, take
free = os.statvfs("/dev/shm")
nbytes = free.f_bfree * free.f_bsize
backing = Backing(Path("/dev/shm"))
segment = take(backing, Identity("m", "0" * 64, 1, nbytes // 4096, 4096), lambda rows: True, lambda: None)
populate(segment.rows)
segment.rows[:] = 1
try:
    segment.finish()
except OutOfMemoryError as error:
    segment.abandon()
    print(error, os.listdir("/dev/shm"))
"""


def test_a_segment_whose_last_page_there_is_no_room_for_is_an_error():
    done = subprocess.run(
        [*own_shm(free=TIGHT), sys.executable, "-c", LAST_PAGE], capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done
    assert done.stdout == "no memory is left for the tables: the file system that they lie in is full ['filler']\n"
