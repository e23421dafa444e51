"""One /metrics for several processes: their files summed up, and their use of the machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engrampool_server.exporter import Processes
from engrampool_server.in_flight import int64s

PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")


class Proc:
    """A /proc of processes that do what they are told."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "stat").write_text("cpu 1 2\nbtime 1000\n")

    def process(self, pid, *, cpu=(0, 0, 0, 0), start=0, virtual=0, pages=0, shared=0, fds=1, max_fds="10"):
        directory = self.root / str(pid)
        (directory / "fd").mkdir(parents=True, exist_ok=True)
        for number in range(fds):
            (directory / "fd" / str(number)).touch()
        ticks = " ".join(str(seconds * TICKS) for seconds in cpu)
        stat = f"{pid} (a ) (name) S 1 2 3 4 5 6 7 8 9 10 {ticks} 20 0 1 0 {start * TICKS} {virtual} {pages}"
        (directory / "stat").write_text(stat)
        (directory / "statm").write_text(f"{virtual} {pages} {shared} 0 0 0 0")
        (directory / "limits").write_text(f"Limit  Soft  Hard  Units\nMax open files   {max_fds}   20   files\n")

    def end(self, pid):
        for path in (self.root / str(pid)).glob("*"):
            if path.is_file():
                path.unlink()


@pytest.fixture
def proc(tmp_path):
    return Proc(tmp_path)


def values(processes: Processes) -> dict[str, float]:
    return {sample.name: sample.value for metric in processes.collect() for sample in metric.samples}


def test_the_tables_count_once_and_the_fullest_process_stands_for_its_limit(proc):
    proc.process(1, cpu=(1, 2, 30, 40), start=7, virtual=5000, pages=1100, shared=50, fds=4, max_fds="100")
    proc.process(2, cpu=(1, 1, 0, 0), virtual=9000, pages=1080, shared=60, fds=6, max_fds="12")
    proc.process(3, cpu=(5, 0, 0, 0), pages=100, shared=90, fds=2, max_fds="unlimited")  # forked before the tables
    pids, inherited = int64s(5), int64s(5)
    pids[1], pids[4] = 2, 3
    inherited[1], inherited[4] = 1000 * PAGE, 15 * PAGE
    assert values(Processes(1, pids, inherited, proc.root)) == {
        "process_cpu_seconds_total": 80,
        "process_resident_memory_bytes": (90 + 1050 + 20 + 0) * PAGE,
        "process_virtual_memory_bytes": 9000,
        "process_start_time_seconds": 1007,
        "process_open_fds": 6,
        "process_max_fds": 12,
    }


def test_cpu_time_does_not_go_back_when_a_process_ends(proc):
    proc.process(1, cpu=(1, 0, 0, 0))
    proc.process(2, cpu=(5, 0, 0, 0))
    pids = int64s(1)
    pids[0] = 2
    processes = Processes(1, pids, int64s(1), proc.root)
    assert values(processes)["process_cpu_seconds_total"] == 6
    proc.end(2)  # and its parent has not been told yet
    assert values(processes)["process_cpu_seconds_total"] == 6
    proc.process(1, cpu=(1, 0, 6, 0))
    assert values(processes)["process_cpu_seconds_total"] == 7


def test_the_real_processes_of_this_machine_are_read():
    pids = int64s(2)
    pids[0] = os.getpid()
    found = values(Processes(os.getpid(), pids, int64s(2)))
    assert all(value > 0 for value in found.values())
    assert len(found) == 6


# Writers come and go in one slot; a third is cut off in the middle of making its files.
WRITERS = """
import os, sys
from pathlib import Path
from prometheus_client import generate_latest, CollectorRegistry
from engrampool_server.exporter import _Files
from engrampool_server.metrics import Metrics
from engrampool_server.metrics_files import MetricsDirectory, become

directory = MetricsDirectory()
directory.use("supervisor")
metrics = Metrics()
metrics.serving.set(1)

def child(slot, rows, in_flight):
    pid = os.fork()
    if not pid:
        directory.leave()
        become(slot)
        metrics.rows.labels("m", "1").inc(rows)
        metrics.lookup.labels("m", "Lookup").observe(0.01)
        metrics.in_flight.set(in_flight)
        metrics.in_flight_limit.set(7)
        metrics.flush()
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)

registry = CollectorRegistry()
registry.register(_Files(directory.path))
def show():
    text = generate_latest(registry).decode()
    print(*(line for line in text.splitlines() if line.startswith(tuple(sys.argv[1:]))), sep="|")

show()
child("0", 3, 10)
child("1", 4, 20)
show()
directory.forget("0")
child("0", 100, 5)
(directory.path / "counter_2.db").touch()
show()
for slot in "01":
    directory.forget(slot)
show()
print(sorted(path.name for path in directory.path.iterdir() if path.name.startswith("gauge")))
path = directory.path
directory.close()
print(path.exists())
"""


def test_counters_survive_their_process_and_gauges_do_not():
    names = [
        "engrampool_lookup_rows_total",
        "engrampool_in_flight",
        "engrampool_serving",
        "engrampool_lookup_seconds_count",
    ]
    done = subprocess.run([sys.executable, "-c", WRITERS, *names], capture_output=True, text=True, timeout=60)
    *shown, left, exists = done.stdout.splitlines()

    def parsed(text: str) -> dict[str, float]:
        return {line.split("{")[0].split()[0]: float(line.split()[-1]) for line in text.split("|")}

    always = {"engrampool_serving": 1}
    assert [parsed(text) for text in shown] == [
        always | {"engrampool_in_flight_bytes": 0, "engrampool_in_flight_limit_bytes": 0},
        always
        | {
            "engrampool_in_flight_bytes": 30,
            "engrampool_in_flight_limit_bytes": 7,
            "engrampool_lookup_rows_total": 7,
            "engrampool_lookup_seconds_count": 2,
        },
        always
        | {
            "engrampool_in_flight_bytes": 25,
            "engrampool_in_flight_limit_bytes": 7,
            "engrampool_lookup_rows_total": 107,
            "engrampool_lookup_seconds_count": 3,
        },
        always
        | {
            "engrampool_in_flight_bytes": 0,
            "engrampool_in_flight_limit_bytes": 0,
            "engrampool_lookup_rows_total": 107,
            "engrampool_lookup_seconds_count": 3,
        },
    ], done.stderr
    assert left == "['gauge_livemax_supervisor.db', 'gauge_livesum_supervisor.db']"
    assert exists == "False"


LEFT = """
import os, sys
from engrampool_server.metrics_files import MetricsDirectory
directory = MetricsDirectory()
print(directory.path, flush=True)
sys.stdin.read()
os._exit(0)  # as if killed: nothing is removed
"""


def test_a_directory_left_behind_goes_at_the_next_start_and_one_in_use_stays(tmp_path):
    def start() -> tuple[subprocess.Popen[str], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", LEFT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return process, Path(process.stdout.readline().strip())

    first, one = start()
    second, other = start()
    assert one != other
    assert one.is_dir()
    first.communicate()
    third, last = start()
    assert [path.is_dir() for path in (one, other, last)] == [False, True, True]
    second.communicate()
    third.communicate()
    fourth, path = start()
    fourth.kill()
    fourth.communicate()
    assert not other.exists()
    assert not last.exists()
    path.rmdir()
