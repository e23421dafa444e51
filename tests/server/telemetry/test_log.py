"""The log: no process waits for whoever reads it, nothing of it is lost without a word, and all of it is JSON."""

import fcntl
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from engrampool_client.testing import serve_process
from server_fixtures import LIMIT_S, eventually, pack, scrape

# Logs so many lines of 200 characters, says so, and again once it may.
SPEAKER = """
import sys
from engrampool_server.telemetry import log
log.configure("info")
dropped = []
log.count_dropped(dropped.append)
for number in range(int(sys.argv[1])):
    log.event("said", number=number, text="x" * 200)
log.tend()
print("done", flush=True)
sys.stdin.readline()
log.tend(30)
log.event("last")
log.tend(30)
print(sum(dropped), flush=True)
"""


@contextmanager
def stalled(kind: str) -> Iterator[tuple[int, int]]:
    """The ends, to read and to write, of what has room for less than a line, and of which nobody reads."""
    if kind == "pipe":
        reader, writer = os.pipe()
    elif kind == "terminal":
        reader, writer = pty.openpty()
        tty.setraw(writer)
    else:
        reader, writer = (end.detach() for end in socket.socketpair())
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"\n" * 4096)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"\n")
    if kind == "terminal":
        os.read(reader, 100)
    os.set_blocking(writer, True)
    try:
        yield reader, writer
    finally:
        os.close(reader)
        with suppress(OSError):
            os.close(writer)


def lines_of(reader: int) -> list[dict]:
    """All JSON lines until nobody writes any more."""
    text = b""
    with suppress(OSError):  # what a terminal says at its end
        while read := os.read(reader, 65536):
            text += read
    return [json.loads(line) for line in text.splitlines() if line.startswith(b"{")]


@pytest.mark.parametrize("kind", ["pipe", "terminal", "socket"])
@pytest.mark.parametrize("count", [20, 3000], ids=["kept", "dropped"])
def test_a_process_never_waits_for_who_reads_its_log_and_says_what_is_missing(kind, count):
    with stalled(kind) as (reader, writer):
        command = [sys.executable, "-c", SPEAKER, str(count)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=writer, text=True)
        with process:
            try:
                os.close(writer)
                assert process.stdout.readline() == "done\n"
                process.stdin.write("\n")
                process.stdin.flush()
                said = lines_of(reader)
                dropped = int(process.stdout.readline())
            finally:
                process.kill()
    assert [line["number"] for line in said if line["event"] == "said"] == list(range(count - dropped))
    if count == 20:
        assert [line["event"] for line in said[-2:]] == ["said", "last"]
    else:
        assert [line["event"] for line in said[-2:]] == ["lines-dropped", "last"]
        assert said[-2]["lines"] == dropped > 0


def test_lines_of_libraries_and_warnings_are_json():
    code = """
import logging, warnings
from engrampool_server.telemetry import log
log.configure("info")
logging.getLogger("asyncio").error("a task failed")
logging.getLogger("engrampool.registry").warning("it is away")
warnings.warn("old", stacklevel=1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    said = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["event"], line.get("logger")) for line in said] == [
        ("library", "asyncio"),
        ("registry", None),
        ("library", "py.warnings"),
    ]
    assert said[0]["message"] == "a task failed"


# One process logs what is too long for the pipe, then another one says a word, then the first goes on.
TWO_SPEAKERS = """
import fcntl, os, socket, sys
from engrampool_server.telemetry import log
if sys.argv[1] == "pipe":
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
else:
    ends = socket.socketpair()
    ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    reader, writer = (end.detach() for end in ends)
os.set_blocking(reader, False)
os.dup2(writer, 2)

def read():
    try:
        sys.stdout.buffer.write(os.read(reader, 65536))
    except BlockingIOError:
        pass

log.configure("info")
log.event("long", text="a" * 9000 + "z", names=["b" * 100] * 90, wide="\u00e9" * 9000, number=7)
read()
if not os.fork():
    log.event("short")
    os._exit(0)
os.wait()
read()
log.tend()
read()
"""


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_long_lines_are_cut_where_others_write_and_so_stay_whole(kind):
    command = [sys.executable, "-c", TWO_SPEAKERS, kind]
    done = subprocess.run(command, capture_output=True, timeout=300)
    lines = done.stdout.splitlines(keepends=True)
    long, short = map(json.loads, lines)
    assert len(lines[0]) <= 4096
    assert short["event"] == "short"
    assert (long["event"], long["number"], long["cut"]) == ("long", 7, ["text", "names", "wide"])
    assert long["text"].startswith("aaa")
    assert long["text"].endswith("aaz")
    assert set(long["names"]) == {"b" * 100}
    assert "\u00e9" in long["wide"]


def test_a_line_of_very_many_fields_is_short_too():
    code = """
from engrampool_server.telemetry import log
log.configure("info")
log.event("many", **{f"field{number}": number for number in range(1000)})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    said = json.loads(done.stderr)
    assert (said["event"], said["cut"]) == ("many", ["*"])


def test_long_lines_are_whole_in_a_file(tmp_path):
    code = "from engrampool_server.telemetry import log; log.configure('info'); log.event('long', text='x' * 9000)"
    with (tmp_path / "log").open("w") as file:
        subprocess.run([sys.executable, "-c", code], stderr=file, check=True, timeout=300)
    assert json.loads((tmp_path / "log").read_text())["text"] == "x" * 9000


def test_a_line_that_is_no_json_is_dropped_and_counted_without_another_word():
    code = """
from engrampool_server.telemetry import log
class Mute:
    def __str__(self):
        raise ValueError
log.configure("info")
dropped = []
log.count_dropped(dropped.append)
log.event("bad", value=Mute())
log.event("good")
log.tend()
print(dropped)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout == "[1]\n"
    said = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in said] == ["lines-dropped", "good"]


# --- a server's


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("log") / "small")


def test_lines_of_grpc_are_json_and_say_which_process_wrote_them(packed):
    with serve_process(packed, workers=1, environ={"GRPC_VERBOSITY": "info"}) as server:
        # gRPC warns of that level itself.
        line = server.wait_for("grpc")
        assert line["level"] == "warning"
        assert line["worker"] in ("lobby", 0)
        assert "log.cc" in line["where"]
        assert "INFO" in line["message"]
    assert all(json.loads(line)["event"] for line in server.last_lines)


LAST_WORDS = """
import ctypes, os
from engrampool_server.processes import supervisor
answer = supervisor.answer
def fail(config, shared, link, *, serving):
    if serving and os.path.exists(os.environ["TEST_FLAG"]):
        os.unlink(os.environ["TEST_FLAG"])
        os.write(2, b"free(): invalid pointer\\nand half a line")
        os.abort()
    answer(config, shared, link, serving=serving)
supervisor.answer = fail
"""


def test_what_a_worker_says_as_it_crashes_is_in_the_log(packed, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(LAST_WORDS.replace("\\\\n", "\\n"))
    flag = tmp_path / "flag"
    search = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    with serve_process(packed, workers=1, environ={"PYTHONPATH": search, "TEST_FLAG": str(flag)}) as server:
        flag.touch()
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        server.wait_until(lambda lines: [line["event"] for line in lines].count("worker-ready") == 2)
        said = server.said("stderr")
        assert [line["message"] for line in said] == ["free(): invalid pointer", "and half a line"]
        assert {line["worker"] for line in said} == {0}


def test_a_server_whose_terminal_takes_no_more_obeys_sigterm_and_counts(packed, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("from engrampool_server.telemetry import log; log.KEPT_BYTES = 500")
    search = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    reader, writer = pty.openpty()
    tty.setraw(writer)
    command = [sys.executable, "-m", "engrampool_proto", "serve", f"--model={packed}", "--workers=1"]
    command += ["--listen=127.0.0.1:0", "--metrics=127.0.0.1:0"]
    with subprocess.Popen(command, stderr=writer, env={**os.environ, "PYTHONPATH": search}) as process:
        try:
            said = b""
            # A terminal gives a line in pieces, as they come.
            while not (serving := re.search(rb'^.*"serving".*\n', said, re.MULTILINE)):
                said += os.read(reader, 65536)
            metrics = json.loads(serving[0])["metrics"]
            os.set_blocking(writer, False)
            for size in (4096, 1):
                with suppress(BlockingIOError):
                    while True:
                        os.write(writer, b"x" * size)
            os.set_blocking(writer, True)
            os.read(reader, 100)  # room for some of a line

            def dropped() -> float:
                process.send_signal(signal.SIGHUP)
                return scrape(metrics)["engrampool_log_dropped_lines_total"]

            eventually(dropped, "lines are dropped")
            process.terminate()
            assert process.wait(LIMIT_S) == 0
        finally:
            process.kill()
            os.close(reader)
            os.close(writer)


def test_a_start_that_failed_and_cannot_say_so_ends_at_sigterm(tmp_path):
    with stalled("pipe") as (_, writer):
        command = [sys.executable, "-m", "engrampool_proto", "serve", f"--model={tmp_path / 'absent'}"]
        with subprocess.Popen([*command, "--listen=127.0.0.1:0", "--metrics=off"], stderr=writer) as process:
            try:
                syscall = Path(f"/proc/{process.pid}/syscall")
                # In the midst of a call whose first argument is standard error.
                eventually(lambda: syscall.read_text().split()[1:2] == ["0x2"], "it waits to be heard")
                process.terminate()
                assert process.wait(LIMIT_S) == -signal.SIGTERM
            finally:
                process.kill()


def test_the_log_leaves_what_it_shares_with_others_as_it_was():
    reader, writer = os.pipe()
    before = fcntl.fcntl(writer, fcntl.F_GETFL)
    code = "from engrampool_server.telemetry import log; log.configure('info'); log.event('said')"
    subprocess.run([sys.executable, "-c", code], stderr=writer, check=True, timeout=300)
    assert fcntl.fcntl(writer, fcntl.F_GETFL) == before
    assert json.loads(os.read(reader, 4096))["event"] == "said"
    os.close(reader)
    os.close(writer)
