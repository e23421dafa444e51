"""Metrics of several processes: each keeps its values in memory that forks share, and exporter.py adds them up.

This is prometheus_client's multiprocess mode, without its files: a file system that is full would end whoever maps a
file of it (SIGBUS), in the midst of a lookup. There is one part of the memory for each writer and kind of metric.
Writers are slots instead of process ids: a process goes on counting where the one before it in the slot ended, so sums
never go back and parts do not pile up.
"""

import mmap
import os
from collections.abc import Iterable, Iterator

from prometheus_client import Metric, mmap_dict, multiprocess, values
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from engrampool_proto.errors import EngrampoolError
from engrampool_server.telemetry import log
from engrampool_server.telemetry.metrics import INFO

SUPERVISOR = "supervisor"
# As prometheus_client begins the names of its files: the kinds of metric that metrics.py has.
_KINDS = ("counter", "histogram", "gauge_livesum", "gauge_livemax")
# Of a part: the address space set aside, some 100000 series; and how much is reserved of it at a time.
_PART_BYTES = 16 << 20
_STEP_BYTES = 64 << 10
# At the end of each part: where series go for which no memory is left. Nobody reads them.
_LOST_AT = _PART_BYTES - mmap.PAGESIZE
_USED_BYTES = 4

_memory = [-1]
_writer = [""]


class MetricsMemory(Collector):
    """The metrics of this server alone, for this process and its forks. To be made once in a process.

    file: the descriptor of the memory that they lie in.
    Raises EngrampoolError if the system gives no memory.
    """

    def __init__(self) -> None:
        try:
            self.file = os.memfd_create("engrampool-metrics")
        except OSError as error:
            raise EngrampoolError(f"no memory for metrics: {error.strerror}") from error

    def close(self) -> None:
        """Give it back. No metric may be counted in this process any more."""
        os.close(self.file)

    def use(self, writer: str) -> None:
        """Keep the metrics that are made from now on here; this process is `writer`: SUPERVISOR, or a slot's number."""
        _memory[0] = self.file
        # prometheus_client joins a directory and a name each time it opens a file; here the name is all.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = ""
        values.MmapedDict = multiprocess.MmapedDict = _Part  # type: ignore[assignment, attr-defined]
        become(writer)
        values.ValueClass = values.MultiProcessValue(lambda: _writer[0])  # type: ignore[no-untyped-call]

    def forget(self, writer: str) -> None:
        """Drop the gauges of a writer that ended; what it counted stays."""
        for kind in _KINDS:
            if kind.startswith("gauge"):
                name = _name(kind, writer)
                if _place(name) < os.fstat(self.file).st_size:
                    os.pwrite(self.file, bytes(_USED_BYTES), _place(name))

    def collect(self) -> Iterator[Metric]:
        """The sums of what all writers counted."""
        parts = range(os.fstat(self.file).st_size // _PART_BYTES)
        names = [_name(_KINDS[part % len(_KINDS)], _writer_at(part // len(_KINDS))) for part in parts]
        for metric in MultiProcessCollector.merge(names):  # type: ignore[no-untyped-call]
            if metric.name in INFO:
                metric.samples = [sample for sample in metric.samples if sample.value]
            yield metric


def become(writer: str) -> None:
    """Count as `writer` from now on, after a fork. No two processes at one time are the same writer."""
    _writer[0] = writer


class _Part(mmap_dict.MmapedDict):
    """One part of the memory, in the place of a file: prometheus_client opens, reads and fills it by the file's name.

    A series for which no memory is left is not counted; the log says so, once a part.
    """

    def __init__(self, filename: str) -> None:
        self._at = _place(filename)
        self._name = filename
        self._is_full = False
        self._positions: dict[str, int] = {}
        try:
            os.posix_fallocate(_memory[0], self._at + _LOST_AT, mmap.PAGESIZE)
            os.posix_fallocate(_memory[0], self._at, _STEP_BYTES)
            self._m = mmap.mmap(_memory[0], _PART_BYTES, offset=self._at)
        except OSError as error:
            raise EngrampoolError(f"no memory for metrics: {error.strerror}") from error
        self._used = int.from_bytes(self._m[:_USED_BYTES], "little") or 8
        self._m[:_USED_BYTES] = self._used.to_bytes(_USED_BYTES, "little")
        self._capacity = max(_STEP_BYTES, -(-self._used // _STEP_BYTES) * _STEP_BYTES)
        for key, _, _, position in self._read_all_values():  # type: ignore[no-untyped-call]
            self._positions[key] = position

    def _init_value(self, key: str) -> None:
        # An entry is the key, padded, with a length and two doubles.
        end = self._used + len(key.encode()) + 32
        try:
            while end > self._capacity:
                if self._capacity + _STEP_BYTES > _LOST_AT:
                    raise MemoryError(f"{_LOST_AT} bytes are all that one process may have")
                os.posix_fallocate(_memory[0], self._at + self._capacity, _STEP_BYTES)
                self._capacity += _STEP_BYTES
        except (OSError, MemoryError) as error:
            self._positions[key] = _LOST_AT
            if not self._is_full:
                self._is_full = True
                log.event("metrics-full", level="warning", part=self._name, error=str(error))
            return
        super()._init_value(key)  # type: ignore[no-untyped-call]

    @staticmethod
    def read_all_values_from_file(filename: str) -> Iterable[tuple[str, float, float, int]]:
        """(key, value, timestamp, position) of each series of a part."""
        at = _place(filename)
        used = int.from_bytes(os.pread(_memory[0], _USED_BYTES, at), "little")
        if not used:  # nobody came to write in it
            return ()
        data = os.pread(_memory[0], used, at)
        found: Iterable[tuple[str, float, float, int]] = mmap_dict._read_all_values(data, used)  # type: ignore[no-untyped-call]
        return found

    def close(self) -> None:
        self._m.close()


def _name(kind: str, writer: str) -> str:
    return f"{kind}_{writer}.db"


def _place(name: str) -> int:
    """Where a part begins in the memory."""
    kind, _, writer = name.removesuffix(".db").rpartition("_")
    slot = 0 if writer == SUPERVISOR else int(writer) + 1
    return (slot * len(_KINDS) + _KINDS.index(kind)) * _PART_BYTES


def _writer_at(slot: int) -> str:
    return str(slot - 1) if slot else SUPERVISOR
