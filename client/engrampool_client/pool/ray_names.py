"""The addresses of the servers that `engrampool up --on ray` placed, as their actors tell them.

A process that is connected to Ray asks by itself. Another has a child that connects and asks: Ray prints what happens
to the cluster on the standard output of whoever is connected, and ends them when its head is away for a minute.
"""

import json
import logging
import subprocess
import sys
import threading
from concurrent.futures import Future
from importlib.util import find_spec
from typing import Any

from engrampool_client.errors import UnavailableError
from engrampool_proto.errors import how_to_install

# As `up` names them.
_NAMESPACE = "engrampool"
# How long actors may take to answer.
_ANSWER_S = 0.5
# How long whoever wants addresses waits for Ray, which may take minutes to say that its head is away; and the first
# time, when there may be a process to start.
_PATIENCE_S, _FIRST_PATIENCE_S = 1.0, 20.0

_log = logging.getLogger("engrampool")
_lock = threading.Lock()
_names: dict[str, "_Name"] = {}


def addresses(name: str) -> list[str] | None:
    """Where the servers of that name serve, now. None if Ray cannot be asked now.

    The cluster is the one this process is connected to; else that of RAY_ADDRESS, or this machine's.
    Raises UnavailableError where Ray is not installed.
    """
    if find_spec("ray") is None:
        raise UnavailableError(f"ray:///{name} needs the package ray here: {how_to_install('ray')}")
    with _lock:
        asked = _names.setdefault(name, _Name(name))
    return asked.addresses()


class _Name:
    """What there is by one name. Ray is asked on a thread that may take its time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._actors = _Actors(name)
        self._lock = threading.Lock()
        self._answer: Future[list[str] | None] | None = None
        self._patience_s = _FIRST_PATIENCE_S
        self._trouble = ""

    def addresses(self) -> list[str] | None:
        """As `addresses` of the module."""
        with self._lock:
            if self._answer is None:
                self._answer = Future()
                threading.Thread(target=self._ask, args=(self._answer,), name="engrampool-ray", daemon=True).start()
            try:
                found = self._answer.result(self._patience_s)
            except TimeoutError:
                return None
            self._answer, self._patience_s = None, _PATIENCE_S
            return found

    def _ask(self, answer: Future[list[str] | None]) -> None:
        found, trouble = None, ""
        try:
            ray = sys.modules.get("ray")
            connected = ray is not None and ray.is_initialized()
            found = self._actors.addresses() if connected else _child.addresses(self._name)
        except BaseException as error:  # Ray raises SystemExit, too
            trouble = repr(error)
        if trouble not in ("", self._trouble):
            _log.warning("Ray cannot be asked for the servers of %s, those known go on: %s", self._name, trouble)
        self._trouble = trouble
        answer.set_result(found)


class _Actors:
    """The servers' actors of one name, asked by a process that is connected to Ray."""

    def __init__(self, name: str) -> None:
        self._prefix = f"{name}/"
        # By actor's name; answers: those that are still to come, as of actors that Ray is restarting.
        self._actors: dict[str, Any] = {}
        self._answers: dict[str, Any] = {}

    def addresses(self) -> list[str]:
        """Raises what Ray raises."""
        import ray

        names = {
            one["name"]
            for one in ray.util.list_named_actors(all_namespaces=True)
            if one["namespace"] == _NAMESPACE and one["name"].startswith(self._prefix)
        }
        self._actors = {name: actor for name, actor in self._actors.items() if name in names}
        self._answers = {name: answer for name, answer in self._answers.items() if name in names}
        for name in names - set(self._answers):
            if name not in self._actors:
                self._actors[name] = ray.get_actor(name, _NAMESPACE)
            self._answers[name] = self._actors[name].address.remote()
        if not names:
            return []
        there, _ = ray.wait(list(self._answers.values()), num_returns=len(names), timeout=_ANSWER_S)
        found: list[str | None] = []
        for name in [name for name, answer in self._answers.items() if answer in there]:
            try:
                found.append(ray.get(self._answers.pop(name)))
            except ray.exceptions.RayActorError:  # there may be another of the name by now
                del self._actors[name]
        return sorted(address for address in found if address is not None)


class _Child:
    """The process that asks for one that is not connected to Ray, and ends with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def addresses(self, name: str) -> list[str]:
        """Raises ConnectionError."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(  # noqa: S603
                    [sys.executable, "-m", __name__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    start_new_session=True,  # what is typed at a terminal is not meant for it
                )
            process = self._process
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(f"{name}\n")
                process.stdin.flush()
                said = json.loads(process.stdout.readline())
            except (OSError, ValueError) as error:
                raise ConnectionError("the process that asks Ray ended") from error
        if isinstance(said, str):
            raise ConnectionError(said)
        return [str(address) for address in said]


_child = _Child()


def _answer_lines() -> None:
    """The child: for each name on standard input a line of JSON, its addresses or what went wrong."""
    import ray

    answers, sys.stdout = sys.stdout, sys.stderr
    names: dict[str, _Actors] = {}
    for line in sys.stdin:
        name = line.rstrip("\n")
        said: list[str] | str
        try:
            if not ray.is_initialized():
                ray.init("auto", log_to_driver=False, logging_level=logging.ERROR)
            said = names.setdefault(name, _Actors(name)).addresses()
        except Exception as error:
            said = repr(error)
        print(json.dumps(said), file=answers, flush=True)


if __name__ == "__main__":
    _answer_lines()
