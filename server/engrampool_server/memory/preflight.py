"""Before a byte is read: does the machine have what the tables need, and if not, what is short and by how much."""

import resource
from collections.abc import Iterator
from dataclasses import dataclass

from engrampool_proto.errors import EngrampoolError
from engrampool_proto.segment import TRAILER_BYTES
from engrampool_server.machine import Machine, Room

__all__ = [
    "Line",
    "Machine",
    "Need",
    "PreflightError",
    "Report",
    "Room",
    "check",
    "format_bytes",
    "raise_soft_limits",
    "require_address_space",
]

# Beside the tables: interpreter, libraries, load buffers, connections.
OVERHEAD_BYTES = 512 << 20
# What a worker has for itself: interpreter state, connections, metrics. The answers are counted apart.
WORKER_BYTES = 64 << 20
# Beside the workers, at most: supervisor, exporter, registrar, and the lobby or a worker on its way in or out.
OTHER_PROCESSES = 4
CONNECTIONS = 64
# Beside models and connections: standard streams, event loops, listening sockets, the log, libraries.
DESCRIPTOR_MARGIN = 64

_MIB, _GIB = 1 << 20, 1 << 30


class PreflightError(EngrampoolError):
    """The machine is short of something that the tables need. The operator must give it, or serve less here."""


@dataclass(frozen=True)
class Need:
    """What is about to be loaded.

    table_bytes: of all rows of all tables.
    files: descriptors that the models keep open.
    tables: how many; in reserved huge pages each starts on a page of its own.
    answer_bytes: of answers held at one time, at most; 0 leaves them to the constant overhead.
    workers: processes that answer; the first is within the constant overhead.
    present_bytes: of the tables, those that lie in segments which can be adopted.
    """

    table_bytes: int
    files: int
    tables: int = 1
    answer_bytes: int = 0
    workers: int = 1
    present_bytes: int = 0

    @property
    def missing_bytes(self) -> int:
        """Of the tables, what is to be read into fresh memory."""
        return self.table_bytes - self.present_bytes

    @property
    def working_bytes(self) -> int:
        """Memory beside the tables."""
        return OVERHEAD_BYTES + (self.workers - 1) * WORKER_BYTES + self.answer_bytes

    @property
    def page_table_bytes(self) -> int:
        """Page tables of the supervisor and every worker, each of which maps all tables.

        8 bytes for a page of 4 KiB; a transparent huge page has as much set aside, for the day it is split.
        """
        return (self.workers + 1) * (self.table_bytes // 512)

    @property
    def memory_bytes(self) -> int:
        """Of a machine that has nothing of it yet, and small pages."""
        return self.table_bytes + self.working_bytes + self.page_table_bytes

    @property
    def descriptors(self) -> int:
        """Descriptors to be open at one time in one process; that which starts the workers has two pipes to each."""
        return self.files + CONNECTIONS + DESCRIPTOR_MARGIN + 2 * (self.workers - 1)

    def huge_pages(self, page_bytes: int) -> int:
        """Pages of `page_bytes` that hold the tables, at most: every table but one may end in a page barely used."""
        if not self.missing_bytes:
            return 0
        return -(-(self.missing_bytes + self.tables * TRAILER_BYTES) // page_bytes) + self.tables - 1


@dataclass(frozen=True)
class Line:
    """One resource. needed, available: bytes, or pieces where `counted`; available None: no limit known."""

    resource: str
    needed: int
    available: int | None
    remedy: str
    counted: bool = False

    @property
    def short(self) -> int:
        """By how much it falls short; 0 where it suffices."""
        return 0 if self.available is None else max(0, self.needed - self.available)

    def __str__(self) -> str:
        available = "no limit" if self.available is None else f"{self._amount(self.available)} available"
        verdict = f"short by {self._amount(self.short, up=True)}: {self.remedy}" if self.short else "ok"
        return f"{self.resource}: {self._amount(self.needed, up=True)} needed, {available}, {verdict}"

    def _amount(self, amount: int, up: bool = False) -> str:
        return str(amount) if self.counted else format_bytes(amount, up)


@dataclass(frozen=True)
class Report:
    """What was compared. warnings: what slows the server and does not stop it. `str()` is a line each."""

    lines: tuple[Line, ...]
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing falls short."""
        return not any(line.short for line in self.lines)

    @property
    def short_bytes(self) -> int:
        """What the resource that is shortest falls short by."""
        return max((line.short for line in self.lines if not line.counted), default=0)

    def raise_if_short(self) -> None:
        """Raise PreflightError naming every resource that falls short, by how much, and what to do."""
        if not self.ok:
            raise PreflightError("the tables do not fit: " + "; ".join(str(line) for line in self.lines if line.short))

    def __str__(self) -> str:
        return "\n".join([*map(str, self.lines), *(f"warning: {warning}" for warning in self.warnings)])


def check(need: Need, memory: str, lock_memory: bool, machine: Machine) -> Report:
    """Compare what `need` takes in memory of one kind, locked or not, with what `machine` leaves."""
    warnings: tuple[str, ...] = ()
    if memory == "anon" and machine.transparent_huge_pages == "never":
        warnings = (
            "transparent huge pages are off, so lookups miss the TLB more often: "
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
    return Report(tuple(_lines(need, memory, lock_memory, machine)), warnings)


def raise_soft_limits(need: Need, lock_memory: bool) -> None:
    """Raise this process's soft limits on descriptors, and on locked memory if it is to lock, to their hard limits.

    A limit is left as it is where it suffices already, or where even the hard limit would not. `check` counts on this.
    """
    wanted = [(resource.RLIMIT_NOFILE, need.descriptors)]
    if lock_memory:
        wanted.append((resource.RLIMIT_MEMLOCK, need.table_bytes))
    for which, needed in wanted:
        soft, hard = resource.getrlimit(which)
        if not _suffices(soft, needed) and _suffices(hard, needed):
            resource.setrlimit(which, (hard, hard))


def format_bytes(size_bytes: int, up: bool = False) -> str:
    """One decimal of GiB, or of MiB below one GiB, rounded down, or up: what falls short must not read as 0.0."""
    unit, name = (_GIB, "GiB") if size_bytes >= _GIB else (_MIB, "MiB")
    tenths = (size_bytes * 10 + (unit - 1 if up else 0)) // unit
    return f"{tenths // 10}.{tenths % 10} {name}"


def _lines(need: Need, memory: str, lock_memory: bool, machine: Machine) -> Iterator[Line]:
    # Reserved huge pages are outside of both what the kernel calls available and a group's memory limit. /dev/shm is
    # inside of both, beside its own size. Files of a disk are page cache, which the kernel may drop, unless locked.
    directory = memory.removeprefix("file:") if memory.startswith("file:") else None
    elsewhere = memory == "hugetlb" or (directory is not None and not (lock_memory or machine.directory_in_memory))
    memory_bytes = need.working_bytes + (0 if elsewhere else need.missing_bytes)
    if memory != "hugetlb":
        memory_bytes += need.page_table_bytes
    yield Line(
        "host memory",
        memory_bytes,
        machine.mem_available_bytes,
        "stop what else uses memory here, or serve fewer tables on this machine",
    )
    if machine.memory_room is not None:
        yield Line(
            f"memory of cgroup {machine.memory_room.cgroup}",
            memory_bytes,
            machine.memory_room.available_bytes,
            "raise the container's memory limit (Kubernetes resources.limits.memory, docker --memory)",
        )
    if memory == "shm":
        size = -(-need.table_bytes // _GIB)
        yield Line(
            "/dev/shm",  # noqa: S108
            need.missing_bytes,
            machine.shm_available_bytes,
            f"mount a larger /dev/shm (docker --shm-size={size}g, Kubernetes emptyDir with medium: Memory)",
        )
    if directory is not None:
        yield Line(
            "table directory",
            need.missing_bytes,
            machine.directory_available_bytes,
            f"free space in {directory}, or give memory another directory",
        )
    if memory == "hugetlb":
        yield from _huge_page_lines(need, machine)
    if lock_memory:
        yield Line(
            "locked memory",
            need.table_bytes,
            machine.lock_limit_bytes,
            "ulimit -l unlimited (systemd LimitMEMLOCK=infinity, docker --ulimit memlock=-1), or CAP_IPC_LOCK",
        )
    if machine.address_limit_bytes is not None:
        yield _address_space(need, machine)
    yield Line(
        "file descriptors",
        need.descriptors,
        machine.descriptor_limit,
        f"ulimit -n {need.descriptors} (systemd LimitNOFILE, docker --ulimit nofile)",
        counted=True,
    )


def require_address_space(answer_bytes: int) -> None:
    """Raise this process's soft limit on address space to its hard limit; PreflightError if no table at all would fit.

    `check` has that, too, but a process that may map so little does not come to it.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    Report((_address_space(Need(0, 0, answer_bytes=answer_bytes), Machine.read()),)).raise_if_short()


def _address_space(need: Need, machine: Machine) -> Line:
    """Of the process that has most: it maps all tables, and may have all answers in hand."""
    return Line(
        "address space",
        machine.address_used_bytes + need.table_bytes + OVERHEAD_BYTES + need.answer_bytes,
        machine.address_limit_bytes,
        "ulimit -v unlimited (systemd LimitAS=infinity)",
    )


def _huge_page_lines(need: Need, machine: Machine) -> Iterator[Line]:
    pages = need.huge_pages(machine.huge_page_bytes)
    total = machine.huge_pages_total + max(0, pages - machine.huge_pages_available)
    yield Line(
        "reserved huge pages",
        pages * machine.huge_page_bytes,
        machine.huge_pages_available * machine.huge_page_bytes,
        f"sysctl vm.nr_hugepages={total}",
    )
    if machine.huge_page_room is not None:
        yield Line(
            f"huge pages of cgroup {machine.huge_page_room.cgroup}",
            pages * machine.huge_page_bytes,
            machine.huge_page_room.available_bytes,
            "raise the container's limit of huge pages (Kubernetes resources.limits.hugepages-2Mi or -1Gi)",
        )


def _suffices(limit: int, needed: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= needed
