"""Children that end in the midst of a line, babble, hang or take their time: none ends or stops their parent."""

import json
import subprocess
import sys
import threading
import time
from collections import deque

from engrampool_server.files.table_files import PackedModel
from server_fixtures import pack
from stores import http_files

# Runs `scenario`, a piece of code, in a process that forks: it may fork as `start(role, work)`, and turn `until` a
# condition. Prints a JSON list of what was said and who ended, in order.
PARENT = """
import json, os, signal, sys, threading, time
from engrampool_server.processes import children as module
from engrampool_server.telemetry import log
from engrampool_server.processes.children import Children
from engrampool_server.processes.reports import Report

log.configure("info")
happened = []

def said(child, report):
    happened.append([child.role, "ready" if report.ready else "loaded" if report.loaded else "other"])

def ended(child):
    happened.append([child.role, "ended", child.status, child.hung, child.failure])

asked = []
family = Children(float(sys.argv[2]), signalled=asked.append, said=said, ended=ended, start=lambda index: None)
parent = os.getpid()
numbers = iter(range(1, 100))

def start(role, work):
    number = next(numbers)
    return family.fork(role, number, number, work)

def until(done):
    family.turn_until(done, time.monotonic() + 60)
    assert done(), happened

def well(reporter):
    reporter.ready()
    while True:
        time.sleep(0.05)
        reporter.beat()

with family:
    exec(sys.argv[1])
print(json.dumps(happened))
"""


def live(scenario: str, timeout_s: float = 600) -> tuple[list[list[object]], list[dict]]:
    """What happened to the children, which may be silent for timeout_s, and what was logged."""
    command = [sys.executable, "-c", PARENT, scenario, str(timeout_s)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    logged = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    return json.loads(done.stdout), logged


HALVES = [
    b'{"loaded": 12',
    b'{"failed": "so',
    b"\xff\xfe\x00",
    b"[1, 2]\n",
    b'{"loaded": "1", "of": 2}\n',
    b"x" * 9000,
]


def test_a_child_that_ends_in_the_midst_of_a_line_is_one_that_ended():
    happened, logged = live(f"""
other = start("other", well)
for half in {HALVES!r}:
    start(repr(half)[:40], lambda reporter: (reporter.ready(), os.write(reporter.report, half), os._exit(3)))
until(lambda: len(family) == 1)
until(lambda: other.ready_s is not None)
assert other in family
""")
    garbled = {line["worker"]: line["line"] for line in logged if line["event"] == "worker-garbled"}
    assert garbled == {repr(half)[:40]: repr(half.strip()[:200]) for half in HALVES}
    for half in HALVES:
        of_half = [what[1:] for what in happened if what[0] == repr(half)[:40]]
        assert of_half == [["ready"], ["ended", "exit code 3", False, ""]]


def test_a_child_that_babbles_counts_as_silent_and_is_told_of_once():
    happened, logged = live(
        """
def babble(reporter):
    os.write(reporter.report, b"babble\\n")  # however long it stands still after that
    reporter.ready()
    while True:
        try:
            os.write(reporter.report, b"babble" * 1000)
            os.write(reporter.report, b"\\n")
        except BlockingIOError:
            time.sleep(0.001)
start("babbler", babble)
until(lambda: not family)
""",
        timeout_s=3,
    )
    assert happened[-1] == ["babbler", "ended", "SIGKILL", True, ""]
    assert [line["event"] for line in logged] == ["worker-garbled", "worker-hung"]


def test_a_family_without_children_is_looked_after():
    happened, _ = live("""
threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGHUP)).start()
until(lambda: asked)
""")
    assert happened == []


def test_what_a_child_left_behind_holds_up_nobody():
    """A process of its own still has the pipe, and says nothing: the end of the pipe never comes."""
    happened, _ = live("""
reader, writer = os.pipe()
def parent(reporter):
    reporter.ready()
    if not os.fork():
        os.close(reader)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.write(writer, str(os.getpid()).encode())
        time.sleep(60)
        os._exit(0)
    reporter.failed("I leave")
    os._exit(1)
start("parent", parent)
left = int(os.read(reader, 20))
try:
    until(lambda: any(what[1] == "ended" for what in happened))
finally:
    os.kill(left, signal.SIGKILL)
""")
    assert happened[-1] == ["parent", "ended", "exit code 1", False, "I leave"]


def test_a_child_that_works_before_it_is_ready_is_busy_and_one_that_waits_hangs():
    """Both say nothing for much longer than a start may be silent: only one of them does anything.

    Which is so long that whoever computes does have a processor meanwhile.
    """
    happened, logged = live("""
module.START_TIMEOUT_S = 3.0
def compute(reporter):
    end = time.monotonic() + 7
    while time.monotonic() < end:
        sum(range(20_000))
    well(reporter)
def wait(reporter):
    os.read(reporter.life, 1)
def stop(reporter):
    os.kill(os.getpid(), signal.SIGSTOP)
busy = start("busy", compute)
start("stuck", wait)
start("stopped", stop)
until(lambda: busy.ready_s is not None)
until(lambda: len(family) == 1)
assert busy in family
""")
    hung = [line for line in logged if line["event"] == "worker-hung"]
    assert {line["worker"] for line in hung} == {"stuck", "stopped"}
    assert all(line["silent_s"] >= 3 for line in hung)
    ends = [what for what in happened if what[1] == "ended"]
    assert sorted(ends) == [[role, "ended", "SIGKILL", True, ""] for role in ("stopped", "stuck")]


def test_a_parent_that_was_stopped_hears_what_was_said_meanwhile_before_it_judges():
    """For a little longer than children may be silent, so that it does not see that it was stopped itself."""
    happened, logged = live(
        """
child = start("well", well)
until(lambda: child.ready_s is not None)
stopper = os.fork()  # no child of the family
if not stopper:
    for number, after_s in ((signal.SIGSTOP, 0.1), (signal.SIGCONT, 4.5)):
        time.sleep(after_s)
        os.kill(os.getppid(), number)
    os._exit(0)
until(lambda: not os.path.exists(f"/proc/{stopper}"))
assert child in family
""",
        timeout_s=4,
    )
    assert happened == [["well", "ready"]]
    assert logged == []


def test_a_child_that_is_busy_for_ever_before_it_is_ready_is_killed_in_the_end():
    happened, _ = live("""
module.START_TIMEOUT_S, module.LONGEST_SILENCE_S = 0.2, 0.5
def spin(reporter):
    while True:
        pass
start("spinner", spin)
until(lambda: not family)
""")
    assert happened == [["spinner", "ended", "SIGKILL", True, ""]]


def test_a_child_that_ends_while_another_is_forked_is_seen_to_end():
    happened, _ = live("""
first = start("first", well)
until(lambda: first.ready_s is not None)
def end():
    if first in family and os.getpid() == parent:
        os.kill(first.pid, signal.SIGKILL)
        os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
os.register_at_fork(before=end)
second = start("second", well)
until(lambda: second.ready_s is not None and first not in family)
assert list(family) == [second]
""")
    assert happened == [["first", "ready"], ["first", "ended", "SIGKILL", False, ""], ["second", "ready"]]


def test_work_that_nobody_wants_any_more_is_not_waited_for_without_end():
    happened, _ = live("""
module.GIVE_UP_S = 0.1
threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
assert family.on_thread(lambda cancel: time.sleep(60), lambda: bool(asked)) is None
assert family.has_thread
""")
    assert happened == []


LOADERS = """
module.START_TIMEOUT_S = 4.0
from engrampool_proto.registry.etcd import Published
from engrampool_server.config import ServerConfig
from engrampool_server.processes.loader import become_loader

def load(where):
    config = ServerConfig(registry="etcd://127.0.0.1:1", memory=f"file:{memory}/{where}")
    published = Published("small", version, f"{url}/{where}", None, "d", {2: 6500, 9: 4100})
    return start(where, lambda reporter: become_loader(published, config, [], reporter))

slow, silent = load("slow"), load("silent")
until(lambda: silent not in family and slow.ready_s is not None)
assert slow in family
"""


def test_a_loader_of_a_slow_store_is_waited_for_and_one_of_a_silent_store_is_not(tmp_path):
    """Of the one every file takes its time to be opened, of the other no row ever comes."""
    directory = pack(tmp_path / "small", block_bytes=100_000)
    with PackedModel.open(directory) as packed:
        version = packed.version
    over = threading.Event()

    def slowly(body: bytes) -> bytes:
        time.sleep(1.2)
        return body

    def never(_: bytes) -> bytes:
        over.wait(150)
        return b""

    for where in ("slow", "silent"):
        (tmp_path / where).mkdir()
    with http_files() as files:
        for where in ("slow", "silent"):
            files.add(directory, where)
        tables = [name for name in files.files if name.endswith(".safetensors")]
        files.faults = {name: deque([slowly]) for name in files.files if name.startswith("slow")}
        files.faults |= {name: deque([bytes] + [never] * 1000) for name in tables if name.startswith("silent")}
        try:
            setting = f"memory, url, version = {str(tmp_path)!r}, {files.url!r}, {version!r}\n"
            happened, logged = live(setting + LOADERS)
        finally:
            over.set()
    assert [line["worker"] for line in logged if line["event"] == "worker-hung"] == ["silent"]
    # The loader's own events are lines like all others, not what a library said.
    assert [line["level"] for line in logged if line["event"] == "loaded"] == ["info"]
    assert [line for line in logged if line["event"] == "stderr"] == []
    assert ["slow", "loaded"] in happened
    assert ["slow", "ready"] in happened
    assert [what for what in happened if what[0] == "silent"][-1] == ["silent", "ended", "SIGKILL", True, ""]
