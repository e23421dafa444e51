"""Brings a published version into memory beside those that are served.

Another process, this module's `main`, fills the segments, so that whatever goes wrong there costs no answer; then the
supervisor adopts them. A patch is small, and laid over its base in the supervisor's own memory.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from engrampool_proto.errors import EngrampoolError
from engrampool_proto.registry.etcd import Published
from engrampool_proto.sharding import part_nbytes
from engrampool_server.config import ServerConfig
from engrampool_server.files.patches.patch_files import PatchFiles
from engrampool_server.files.sources import Location, parse_location, redact
from engrampool_server.files.table_files import PackedModel
from engrampool_server.memory.load import ModelLoader
from engrampool_server.memory.placement import part_of
from engrampool_server.memory.preflight import Machine, Need, check, raise_soft_limits
from engrampool_server.memory.segments import find_backing, free, survey
from engrampool_server.processes.reports import Reporter
from engrampool_server.telemetry import log
from engrampool_server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from engrampool_server.memory.tables import LoadedModel

# For the log to be taken, before the loader ends.
_LAST_LINES_S = 0.2


class LoadError(EngrampoolError):
    """A published version cannot be held here; the text says what is wrong with it."""


def become_loader(
    published: Published, config: ServerConfig, others: Collection[tuple[str, str]], reporter: Reporter
) -> NoReturn:
    """Turn this process, a fresh fork, into one that fills the segments of a version, as far as they are held here.

    It reports how far it is, and once all is there it is ready: nobody frees the segments until it is killed.
    others: (model, version) of what is held here as well, or to be.
    """
    order = {
        "published": [published.model, published.version, published.to_json().decode()],
        "config": vars(config),
        "others": list(others),
        "report": reporter.report,
        "beat_s": reporter.beat_s,
        # Standard error is a pipe, for libraries.
        "log": log.descriptor(),
    }
    for descriptor in (reporter.report, log.descriptor()):
        os.set_inheritable(descriptor, True)
    # A program of its own: what reads object stores does not work in the forks of a process that has used it. Its
    # metrics are nobody's.
    environ = {name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"}
    command = [sys.executable, "-P", "-m", __name__, json.dumps(order, default=str)]
    os.execve(command[0], command, environ)  # noqa: S606


def adopt(
    published: Published,
    config: ServerConfig,
    held: "Sequence[LoadedModel]",
    cancel: threading.Event,
    progress: Callable[[int], None],
) -> "LoadedModel":
    """Hold a version whose segments a loader filled; or a patch, whose base is among `held`.

    progress: called with the bytes of each block of a patch. Raises what loading raises, LoadError.
    """
    from engrampool_server.memory.table_loader import load, load_patched  # the loader does without the kernels

    location = _location(published)
    if published.base is not None:
        base = next(one for one in held if (one.spec.name, one.version) == (published.model, published.base))
        with PatchFiles.open(location) as patch:
            _check(published, patch)
            need = Need(patch.nbytes, files=len(patch.layers))
            check(need, "anon", config.lock_memory, Machine.read()).raise_if_short()
            return load_patched(patch, base, config.load_threads, cancel, progress, config.lock_memory)
    with PackedModel.open(location) as packed:
        _check(published, packed)
        part = part_of(packed.spec, config)
        rows = sum(table.rows.nbytes for one in held for table in one.tables.values())
        raise_soft_limits(Need(rows + part_nbytes(packed.spec, part), files=len(packed.files)), config.lock_memory)
        return load(
            packed,
            config.memory,
            config.lock_memory,
            config.load_threads,
            cancel,
            lambda _: None,
            config.attach,
            part,
        )


def discard(memory: str, versions: Collection[tuple[str, str]]) -> None:
    """Free the segments of these versions, of (model, version), and partial ones, unless another server uses them."""
    backing = find_backing(memory)
    assert backing is not None
    for found in survey(backing):
        one = found.identity
        if one is None:
            free(backing, found, "partial")
        elif (one.model, one.version) in versions:
            free(backing, found, "withdrawn")


def main() -> int:
    """The process that `become_loader` makes. Its exit code."""
    order = json.loads(sys.argv[1])
    reporter = Reporter(-1, order["report"], order["beat_s"])
    try:
        config = ServerConfig(**order["config"])
        log.configure(config.log_level, order["log"])
        model, version, record = order["published"]
        published = Published.from_json(model, version, record.encode())
        _fill(published, config, {(model, version) for model, version in order["others"]}, reporter)
    except EngrampoolError as error:
        reporter.failed(str(error))
    except BaseException as error:
        log.event("worker-failed", level="error", worker="loader", error=traceback.format_exc())
        reporter.failed(repr(error))
    log.tend(_LAST_LINES_S)
    return 1


def _fill(
    published: Published, config: ServerConfig, others: Collection[tuple[str, str]], reporter: Reporter
) -> NoReturn:
    location = _location(published)
    with PackedModel.open(location) as packed:
        _check(published, packed)
    # Nothing is said where nothing goes on: whether this is work or a standstill is to be seen.
    said_s = time.monotonic()

    def tell(nbytes: int, of_bytes: int) -> None:
        nonlocal said_s
        if time.monotonic() >= said_s + reporter.beat_s:
            said_s = time.monotonic()
            reporter.loaded(nbytes, of_bytes)

    loader = ModelLoader(replace(config, models=(location,)), Metrics(), config.workers, others)
    loader.open()
    held = loader.fill(threading.Event(), tell)
    reporter.loaded(loader.loaded_bytes, loader.nbytes)
    reporter.ready()
    assert held  # it goes on using the segments, until this process ends
    while True:
        time.sleep(reporter.beat_s)
        reporter.beat()


def _location(published: Published) -> Location:
    try:
        return parse_location(published.location)
    except ValueError as error:
        raise LoadError(
            f"its location {redact(repr(published.location))} is {error}; publish it from another"
        ) from error


def _check(published: Published, files: PackedModel | PatchFiles) -> None:
    if (files.spec.name, files.version) != (published.model, published.version):
        raise LoadError(
            f"{files.directory} is version {files.version} of {files.spec.name} now: publish that, and put the version "
            "that was published somewhere else"
        )


if __name__ == "__main__":
    sys.exit(main())
