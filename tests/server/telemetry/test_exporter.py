"""One /metrics for several processes: their files summed up, and their use of the machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engrampool_server.answer.in_flight import int64s
from engrampool_server.telemetry.exporter import Processes

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
from prometheus_client import generate_latest, CollectorRegistry
from engrampool_server.telemetry.metrics import Metrics
from engrampool_server.telemetry.metrics_files import MetricsMemory, become

memory = MetricsMemory()
memory.use("supervisor")
metrics = Metrics()
metrics.serving.set(1)

def child(slot, rows, in_flight):
    pid = os.fork()
    if not pid:
        become(slot)
        metrics.rows.labels("m", "1").inc(rows)
        metrics.lookup.labels("m", "Lookup").observe(0.01)
        metrics.in_flight.set(in_flight)
        metrics.in_flight_limit.set(7)
        metrics.flush()
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)

registry = CollectorRegistry()
registry.register(memory)
def show():
    text = generate_latest(registry).decode()
    print(*(line for line in text.splitlines() if line.startswith(tuple(sys.argv[1:]))), sep="|")

show()
child("0", 3, 10)
child("1", 4, 20)
show()
memory.forget("0")
child("0", 100, 5)
os.ftruncate(memory.file, 40 << 24)  # and a third made its part, and wrote nothing
show()
for slot in "01":
    memory.forget(slot)
memory.forget("20")  # who never counted
show()
memory.close()
"""


def test_counters_survive_their_process_and_gauges_do_not():
    names = [
        "engrampool_lookup_rows_total",
        "engrampool_in_flight",
        "engrampool_serving",
        "engrampool_lookup_seconds_count",
    ]
    done = subprocess.run([sys.executable, "-c", WRITERS, *names], capture_output=True, text=True, timeout=300)
    shown = done.stdout.splitlines()

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


FULL = """
import logging, resource
from engrampool_server.telemetry import metrics_files
from engrampool_server.telemetry.metrics import Metrics

said = []
class Heard(logging.Handler):
    def emit(self, record):
        said.append((record.getMessage(), record.fields["part"]))
logging.getLogger("engrampool").addHandler(Heard())
memory = metrics_files.MetricsMemory()
memory.use("supervisor")
metrics = Metrics()
metrics.workers.set(3)
# From here on the memory does not grow.
def refuse(*_):
    raise OSError(28, "No space left on device")
metrics_files.os.posix_fallocate = refuse
for number in range(2000):
    metrics.load_seconds.labels(f"model-{number}").set(1)
metrics.workers.set(4)
found = {sample.name: sample.value for metric in memory.collect() for sample in metric.samples if not sample.labels}
kept = sum(len(metric.samples) for metric in memory.collect() if metric.name == "engrampool_load_seconds")
print(said, found["engrampool_workers"], 0 < kept < 2000)
"""


def test_series_without_memory_are_not_counted_and_all_others_are():
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, timeout=300)
    assert done.stdout == "[('metrics-full', 'gauge_livesum_supervisor.db')] 4.0 True\n", done.stderr
