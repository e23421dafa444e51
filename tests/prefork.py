"""The program `engrampool` as a fork of a process that has imported it: most of what its start costs is its imports.

Or a script that uses our packages, by its path.

That process is this file as a program. A message tells it of each fork the arguments, the directory and the network,
and has the standard streams with it, and a pipe for the fork's process id and, at last, its exit code. A fork goes on
as the program itself: nothing is left to it of the tests, or of what tests set up in their own process.

A test may change a server by a sitecustomize.py, which a fork runs before the program. It comes after the imports then:
what a module imported by name from another one stays as it was.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_MODULE = "engrampool_proto"
_PROGRAM = (sys.executable, "-m", _MODULE)
# What it imports, some of it not before it is needed.
_IMPORTS = (
    "engrampool_proto.cli",
    "engrampool_server.commands.serve",
    "engrampool_server.serve",
    "engrampool_server.processes.supervisor",
    "engrampool_server.commands.files",
    "engrampool_server.commands.versions",
    "engrampool_server.files.pack",
    "engrampool_server.files.synth_checkpoint",
    "engrampool_server.files.verify",
    "etcd3gw.client",
    "tokenizers",
    "engrampool_client.client",
    "engrampool_client.commands",
    "engrampool_client.compute.compiled",
)
_IN_NETWORK = ("nsenter", "--net=")
_CLONE_NEWNET = 0x40000000
_NUMBER = struct.Struct("i")
_MESSAGE_BYTES = 1 << 17


class Fork:
    """What subprocess.Popen is for a program, as far as tests use it. stderr: its text, to be read, if it is piped."""

    def __init__(self, status: int, stderr: int | None) -> None:
        self._status = status
        weakref.finalize(self, os.close, status)
        self._lock = threading.Lock()
        self.stderr = None if stderr is None else os.fdopen(stderr)
        self.returncode: int | None = None
        self.pid = self._told()

    def _told(self) -> int:
        told = os.read(self._status, _NUMBER.size)
        if not told:
            raise RuntimeError("the process that programs are forked from has ended")
        return int(_NUMBER.unpack(told)[0])

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        poll = select.poll()
        poll.register(self._status, select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1e3):
            raise subprocess.TimeoutExpired(_PROGRAM, timeout or 0.0)
        with self._lock:
            if self.returncode is None:
                self.returncode = self._told()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended just now
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Prefork:
    """Starts programs: `engrampool` by a fork where that is the same. is_on: whether it forks at all."""

    def __init__(self) -> None:
        self.is_on = True
        self._environ = _comparable(os.environ)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: socket.socket | None = None

    def start(self, command: Sequence[str], environ: Mapping[str, str]) -> Any:
        """As `engrampool_client.testing.start_program`, to be in its place."""
        request = self._request(command, environ)
        if request is None:
            return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environ)
        reader, writer = os.pipe()
        try:
            return Fork(self._fork(request, (0, 1, writer)), reader)
        finally:
            os.close(writer)

    def run(
        self, command: Sequence[str], timeout: float = 300, environ: Mapping[str, str] = os.environ
    ) -> "subprocess.CompletedProcess[str]":
        """As subprocess.run, with its output captured as text."""
        request = self._request(command, environ)
        if request is None:
            return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environ)
        with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
            fork = Fork(self._fork(request, (0, stdout.fileno(), stderr.fileno())), None)
            try:
                code = fork.wait(timeout)
            except BaseException:
                fork.kill()
                fork.wait()
                raise
            stdout.seek(0)
            stderr.seek(0)
            return subprocess.CompletedProcess(command, code, stdout.read(), stderr.read())

    def _request(self, command: Sequence[str], environ: Mapping[str, str]) -> bytes | None:
        """What to ask for; None where a fork would not be the same."""
        network, words = "", tuple(command)
        if words[0] == _IN_NETWORK[0] and words[1].startswith(_IN_NETWORK[1]):
            network, words = words[1].removeprefix(_IN_NETWORK[1]), words[2:]
        changed = self._changed(_comparable(environ))
        is_script = words[0] == sys.executable and words[1].endswith(".py")
        if not self.is_on or not (is_script or words[: len(_PROGRAM)] == _PROGRAM) or changed is None:
            return None
        return json.dumps([words[1 if is_script else 2 :], str(Path.cwd()), network, changed]).encode()

    def _changed(self, environ: Mapping[str, str]) -> dict[str, str] | None:
        """Variables that a fork is to have otherwise; None where that would come too late for it."""
        changed = {name: value for name, value in environ.items() if self._environ.get(name) != value}
        known = all(name == "PYTHONPATH" or name.startswith(("TEST_", "AWS_")) for name in changed)
        if not known or self._environ.keys() - environ.keys():
            return None
        if "PYTHONPATH" in changed:
            first, _, others = changed["PYTHONPATH"].partition(os.pathsep)
            if others != self._environ.get("PYTHONPATH", "") or not Path(first, "sitecustomize.py").is_file():
                return None
        return changed

    def _fork(self, request: bytes, streams: Sequence[int]) -> int:
        """Ask for a fork with these standard streams. Gives the pipe that tells of it."""
        reader, writer = os.pipe()
        try:
            socket.send_fds(self._started(), [request], [*streams, writer])
        finally:
            os.close(writer)
        return reader

    def _started(self) -> socket.socket:
        with self._lock:
            if self._requests is None:
                self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                command = [sys.executable, "-P", __file__, str(theirs.fileno())]
                with theirs:
                    self._process = subprocess.Popen(command, env=self._environ, pass_fds=[theirs.fileno()])
            return self._requests

    def close(self) -> None:
        """End the process that programs are forked from, if there is one."""
        if self._requests is not None and self._process is not None:
            self._requests.close()
            self._process.wait()


def _comparable(environ: Mapping[str, str]) -> dict[str, str]:
    # The second is set by whoever imports Ray.
    return {name: value for name, value in environ.items() if name not in ("PYTEST_CURRENT_TEST", "RAY_CLIENT_MODE")}


# For whatever tests start, in either way: a worker that stands still on a machine that is busy is not taken to hang.
os.environ["ENGRAMPOOL_WORKER_TIMEOUT_S"] = "600"
# The one of this process of tests.
PREFORK = Prefork()


def _fork_until_end(requests: socket.socket) -> list[str] | None:
    """Fork for each request: gives the arguments in a fork, and None once there are no more requests."""
    ends: dict[int, tuple[int, int]] = {}  # by what tells that it ended: its process id, where to say its exit code
    with requests, selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fd in ends:
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    pid, status = ends.pop(key.fd)
                    _tell(status, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                    os.close(status)
                    continue
                message, descriptors, *_ = socket.recv_fds(requests, _MESSAGE_BYTES, 4)
                if not message:
                    return None
                *streams, status = descriptors
                pid = os.fork()
                if not pid:
                    for descriptor in (*ends, *(status for _, status in ends.values()), status):
                        os.close(descriptor)
                    return _become(json.loads(message), streams)
                for descriptor in streams:
                    os.close(descriptor)
                _tell(status, pid)
                ended = os.pidfd_open(pid)
                ends[ended] = pid, status
                selector.register(ended, selectors.EVENT_READ)


def _tell(status: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # the test is over
        os.write(status, _NUMBER.pack(number))


def _become(request: Any, streams: Sequence[int]) -> list[str]:
    words, directory, network, changed = request
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(directory)
    if network:
        with Path(network).open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
    os.environ |= changed
    if "PYTHONPATH" in changed:
        sys.path.insert(0, changed["PYTHONPATH"].partition(os.pathsep)[0])
        sys.modules.pop("sitecustomize", None)  # some systems have one
        importlib.import_module("sitecustomize")
    return words


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the tests, which then end this
    for name in _IMPORTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    words = _fork_until_end(requests)
    if words is not None:
        sys.argv = words
        if words[0] != _MODULE:
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
            return
        sys.path.insert(0, str(Path.cwd()))  # as -m does
        try:
            runpy.run_module(_MODULE, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            # As the interpreter does, but for freeing one module after the other, which takes a third of a start.
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(ended.code)


if __name__ == "__main__":
    main()
