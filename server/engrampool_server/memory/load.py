"""The models that a server is to hold: opened, compared with the machine, and loaded."""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

from engrampool_proto.errors import EngrampoolError
from engrampool_proto.sharding import Part, part_nbytes
from engrampool_server.config import ServerConfig
from engrampool_server.files.raw_model import RawModel
from engrampool_server.files.table_files import PackedModel
from engrampool_server.machine import Machine
from engrampool_server.memory.placement import part_of
from engrampool_server.memory.preflight import Need, PreflightError, Report, check, raise_soft_limits
from engrampool_server.memory.reading import TableRows, identities, read
from engrampool_server.memory.segments import check_writable, file_name, find_backing, free, sweep
from engrampool_server.telemetry import log
from engrampool_server.telemetry.metrics import Metrics

if TYPE_CHECKING:
    from engrampool_server.memory.tables import LoadedModel

_Brought = TypeVar("_Brought")

_PROGRESS_S = 5.0
_READS_ALL = (
    "{} is a checkpoint, of which all is read at every start, though this server holds a shard: its version is known "
    "only then; pack it (`engrampool pack`) to have only the shard's part read"
)
_NO_HUGETLBFS = (
    "no hugetlbfs of the default page size is mounted where this user may write, so tables {}: "
    "mount -t hugetlbfs none /dev/hugepages"
)


class ModelLoader:
    """Models, or the parts of them to be held here, on their way into memory. To be closed.

    Says in log and metrics how far they are.

    others: (model, version) of what is held here beside them, or to be; None if that is not known yet.
    loaded_bytes: of their rows, those that are in memory by now.
    """

    def __init__(
        self,
        config: ServerConfig,
        metrics: Metrics,
        workers: int = 1,
        others: Collection[tuple[str, str]] | None = (),
    ) -> None:
        self._config, self._metrics, self._workers, self._others = config, metrics, workers, others
        self.loaded_bytes = 0
        self._packed: list[PackedModel | RawModel] = []
        self._parts: list[Part] = []

    def open(self) -> None:
        """Open every model and check the machine.

        Raises TableFileError, CheckpointError, PreflightError, SegmentError; ShardError, SpecError for no such shard.
        """
        shard = self._config.shard
        for directory in self._config.models:
            packed = RawModel(directory) if RawModel.lies_in(directory) else PackedModel.open(directory)
            self._packed.append(packed)
            part = part_of(packed.spec, self._config)
            self._parts.append(part)
            nbytes = part_nbytes(packed.spec, part)
            log.event("opened", model=packed.spec.name, version=packed.version, shard=shard, table_bytes=nbytes)
            if isinstance(packed, RawModel) and nbytes < packed.spec.nbytes:
                log.event("preflight", level="warning", warning=_READS_ALL.format(directory))
        _refuse_duplicates(self._packed)
        self._preflight()

    @property
    def _held(self) -> list[tuple[PackedModel | RawModel, Part]]:
        return list(zip(self._packed, self._parts, strict=True))

    @property
    def nbytes(self) -> int:
        """Of all their rows that are to be held, once they are open."""
        return sum(part_nbytes(packed.spec, part) for packed, part in self._held)

    def _preflight(self) -> None:
        config = self._config
        table_bytes = self.nbytes
        backing = find_backing(config.memory)
        wanted = [identity for packed, part in self._held for identity in identities(packed, part)]
        others = self._others or ()
        present = [] if backing is None else sweep(backing, () if self._others is None else wanted, others)
        # One that is in use and partial is being made by another server, which will share it.
        names = {found.path.name for found in present if found.identity in wanted or found.in_use}
        need = Need(
            table_bytes,
            files=sum(len(packed.files) for packed in self._packed),
            tables=sum(map(len, self._parts)),
            answer_bytes=config.max_in_flight_bytes,
            workers=self._workers,
            present_bytes=sum(identity.nbytes for identity in wanted if file_name(identity) in names),
        )
        if backing is not None and need.missing_bytes:
            check_writable(backing, config.memory)
        raise_soft_limits(need, config.lock_memory)

        def compare() -> Report:
            directory = None if backing is None else backing.directory
            return check(need, config.memory, config.lock_memory, Machine.read(directory=directory))

        report = compare()
        unused = [
            found
            for found in present
            if not found.in_use
            and found.identity not in wanted
            and (found.identity is None or (found.identity.model, found.identity.version) not in others)
        ]
        if backing is not None and report.short_bytes <= sum(found.nbytes for found in unused):
            for found in unused:
                if report.ok:
                    break
                free(backing, found, "room")
                report = compare()
        if backing is None and config.memory == "hugetlb":
            log.event(
                "preflight", level="warning", warning=_NO_HUGETLBFS.format("will be read again by the next start")
            )
        for line in report.warnings:
            log.event("preflight", level="warning", warning=line)
        report.raise_if_short()
        self._metrics.to_load_bytes.set(table_bytes)

    def load(self, cancel: threading.Event) -> "Iterator[LoadedModel]":
        """Hold one model after the other. Raises what `table_loader.load` raises, LoadCancelledError after `cancel`."""
        from engrampool_server.memory.table_loader import load  # it imports the kernels

        for held, seconds in self._bring(load, cancel):
            show(self._metrics, held, seconds, self._config.shard)
            yield held

    def fill(self, cancel: threading.Event, tell: Callable[[int, int], None]) -> list[dict[int, TableRows]]:
        """Have the rows of each model in memory, by layer, to be held by others. Raises what `load` raises.

        tell: called with `loaded_bytes` and `nbytes` after each block, from any thread, but never from two at a time.
        """
        return [rows for rows, _ in self._bring(read, cancel, tell)]

    def _bring(
        self,
        bring: Callable[..., _Brought],
        cancel: threading.Event,
        tell: Callable[[int, int], None] = lambda *_: None,
    ) -> Iterator[tuple[_Brought, float]]:
        """What `bring` makes of one model after the other, and in how many seconds."""
        config, metrics = self._config, self._metrics
        total = self.nbytes
        begin = reported = time.monotonic()
        lock = threading.Lock()

        def progress(nbytes: int) -> None:
            nonlocal reported
            with lock:
                self.loaded_bytes += nbytes
                metrics.loaded_bytes.inc(nbytes)
                tell(self.loaded_bytes, total)
                now = time.monotonic()
                if now - reported < _PROGRESS_S:
                    return
                reported, done = now, self.loaded_bytes
                eta_s = (total - done) * (now - begin) / done
            log.event("loading", bytes=done, of_bytes=total, eta_s=round(eta_s, 1))

        for packed, part in self._held:
            model_begin = time.monotonic()
            brought = bring(
                packed,
                config.memory,
                config.lock_memory,
                config.load_threads,
                cancel,
                progress,
                config.attach,
                part,
            )
            # What version a checkpoint is, is known only now.
            _refuse_duplicates(self._packed)
            packed.close()
            seconds = time.monotonic() - model_begin
            log.event("loaded", model=packed.spec.name, version=packed.version, seconds=round(seconds, 3))
            yield brought, seconds

    def close(self) -> None:
        """Close the files. Twice is once."""
        for packed in self._packed:
            packed.close()


def require_segments(memory: str) -> None:
    """Raise PreflightError where `memory` (a setting) cannot be loaded by one process and served by others."""
    if find_backing(memory) is None:
        raise PreflightError(_NO_HUGETLBFS.format("cannot come and go by a registry"))


def show(
    metrics: Metrics,
    held: "LoadedModel",
    seconds: float,
    shard: str,
    *,
    is_patch: bool = False,
    sign: Literal[1, -1] = 1,
) -> None:
    """Have Prometheus see that a model is held, which took `seconds` to load; sign -1: that it is held no more.

    shard: the setting. is_patch: of its rows, only those that the patch changes are its own.
    """
    name = held.spec.name
    # Gauges add up: two versions of one model share its name.
    metrics.load_seconds.labels(name).inc(sign * seconds)
    metrics.model_info.labels(name, held.version, held.spec.digest).set(max(sign, 0))
    metrics.part_info.labels(name, held.version, shard).set(max(sign, 0))
    for layer, table in held.tables.items():
        rows = table.rows
        if is_patch:
            rows = table.overlay.rows if table.overlay else rows[:0]
        metrics.table_bytes.labels(name, str(layer)).inc(sign * rows.nbytes)
        metrics.table_rows.labels(name, str(layer)).inc(sign * len(rows))


def _refuse_duplicates(models: Sequence[PackedModel | RawModel]) -> None:
    seen: dict[tuple[str, str], PackedModel | RawModel] = {}
    for packed in models:
        if packed.version is None:
            continue
        key = (packed.spec.name, packed.version)
        if key in seen:
            where = f"{seen[key].directory} and {packed.directory}"
            raise EngrampoolError(f"model {key[0]}, version {key[1]}, is given twice: {where}")
        seen[key] = packed
