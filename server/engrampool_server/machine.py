"""What this machine and the limits around this process leave to use."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path, PurePosixPath

# v1 writes "no limit" as the largest multiple of a page below 2**63.
_NO_LIMIT = 1 << 62
_CAP_IPC_LOCK = 14


@dataclass(frozen=True)
class Room:
    """What the tightest control group around this process leaves, in bytes. cgroup: its path within its mount."""

    cgroup: str
    available_bytes: int


@dataclass(frozen=True)
class Machine:
    """What is left to use; None is no limit, or none that can be read.

    mem_available_bytes: what the kernel could hand out without swapping.
    memory_room: of control groups, inactive page cache counted as free.
    shm_available_bytes: free in /dev/shm; 0 where there is none.
    directory_available_bytes: free in a directory that was asked for.
    directory_in_memory: whether what lies there is memory, and not merely cached.
    huge_page_bytes, huge_pages_total: reserved pages of the default size.
    huge_pages_available: those neither in use nor promised to a mapping.
    huge_page_room: of control groups, for pages of that size.
    lock_limit_bytes: what this process may lock, once its soft limit is raised; None too where it has CAP_IPC_LOCK.
    descriptor_limit: descriptors this process may have open, once its soft limit is raised.
    transparent_huge_pages: "always", "madvise" or "never".
    address_limit_bytes: of address space, for each process, once its soft limit is raised.
    address_used_bytes: of that, what this process has by now, as will its children.
    """

    mem_available_bytes: int | None
    memory_room: Room | None
    shm_available_bytes: int | None
    huge_page_bytes: int
    huge_pages_total: int
    huge_pages_available: int
    huge_page_room: Room | None
    lock_limit_bytes: int | None
    descriptor_limit: int | None
    transparent_huge_pages: str | None
    directory_available_bytes: int | None = None
    directory_in_memory: bool = False
    address_limit_bytes: int | None = None
    address_used_bytes: int = 0

    @property
    def available_bytes(self) -> float:
        """Memory that this process could still be given; infinite where no limit can be read."""
        group = inf if self.memory_room is None else self.memory_room.available_bytes
        return min(group, inf if self.mem_available_bytes is None else self.mem_available_bytes)

    @classmethod
    def read(cls, root: Path = Path("/"), directory: Path | None = None) -> "Machine":
        """Read /proc, /sys and /dev under `root`. What is missing or unreadable there counts as no limit."""
        memory = _colon_fields(_read(root / "proc/meminfo"))
        huge_page_bytes = _kibibytes(memory.get("Hugepagesize")) or 2 << 20
        size = f"{huge_page_bytes >> 30}GB" if huge_page_bytes >= 1 << 30 else f"{huge_page_bytes >> 20}MB"
        modes = re.search(r"\[(\w+)\]", _read(root / "sys/kernel/mm/transparent_hugepage/enabled"))
        return cls(
            mem_available_bytes=_kibibytes(memory.get("MemAvailable")),
            memory_room=_tightest(root, "memory", _MEMORY_V2, _MEMORY_V1),
            shm_available_bytes=_free_bytes(root / "dev/shm"),
            huge_page_bytes=huge_page_bytes,
            huge_pages_total=_number(memory.get("HugePages_Total")) or 0,
            huge_pages_available=max(
                0, (_number(memory.get("HugePages_Free")) or 0) - (_number(memory.get("HugePages_Rsvd")) or 0)
            ),
            huge_page_room=_tightest(
                root,
                "hugetlb",
                _Files(f"hugetlb.{size}.max", f"hugetlb.{size}.current"),
                _Files(f"hugetlb.{size}.limit_in_bytes", f"hugetlb.{size}.usage_in_bytes"),
            ),
            lock_limit_bytes=None if _may_lock_all(root) else _hard_limit(root, "Max locked memory"),
            descriptor_limit=_hard_limit(root, "Max open files"),
            transparent_huge_pages=modes[1] if modes else None,
            directory_available_bytes=None if directory is None else _free_bytes(directory),
            directory_in_memory=directory is not None and in_memory(directory, root),
            address_limit_bytes=_hard_limit(root, "Max address space"),
            address_used_bytes=_kibibytes(_colon_fields(_read(root / "proc/self/status")).get("VmSize")) or 0,
        )


def in_memory(directory: Path, root: Path = Path("/")) -> bool:
    """Whether files in `directory` have no other place than memory, as those of a tmpfs."""
    device = directory.stat().st_dev
    mounts = _read(root / "proc/self/mountinfo")
    number = f"{os.major(device)}:{os.minor(device)}"
    return re.search(rf"^\d+ \d+ {number} .* - (tmpfs|ramfs) ", mounts, re.MULTILINE) is not None


@dataclass(frozen=True)
class _Files:
    """The files of one controller in a control group; reclaimable: a key of its memory.stat."""

    limit: str
    use: str
    reclaimable: str | None = None

    def room(self, directory: Path) -> int | None:
        """Bytes left below the limit of one group; None where it has none."""
        limit = _number(_read(directory / self.limit))
        if limit is None or limit >= _NO_LIMIT:
            return None
        use = _number(_read(directory / self.use)) or 0
        if self.reclaimable is not None:
            match = re.search(rf"^{self.reclaimable} (\d+)$", _read(directory / "memory.stat"), re.MULTILINE)
            use -= int(match[1]) if match else 0
        return max(0, limit - use)


_MEMORY_V2 = _Files("memory.max", "memory.current", "inactive_file")
_MEMORY_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def usable_cores(root: Path = Path("/")) -> int:
    """The cores this process may use: those it may run on, or fewer where a control group limits its CPU time."""
    cores = len(os.sched_getaffinity(0))
    for directory, _, is_v2 in _groups(root, "cpu"):
        if is_v2:
            quota, _, period = _read(directory / "cpu.max").partition(" ")
        else:
            quota, period = (_read(directory / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        limit_us, of_us = _number(quota), _number(period)
        if limit_us and of_us:
            cores = min(cores, -(-limit_us // of_us))
    return cores


def _tightest(root: Path, controller: str, v2: _Files, v1: _Files) -> Room | None:
    """The least room of any group that this process is in, in either hierarchy."""
    rooms = []
    for directory, name, is_v2 in _groups(root, controller):
        available_bytes = (v2 if is_v2 else v1).room(directory)
        if available_bytes is not None:
            rooms.append(Room(name, available_bytes))
    return min(rooms, key=lambda room: room.available_bytes, default=None)


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, str, bool]]:
    """Directory and name of each control group that this process is in, and whether it is of version 2."""
    for controllers, path in re.findall(r"^\d+:([^:]*):(.*)$", _read(root / "proc/self/cgroup"), re.MULTILINE):
        if controllers == "":
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        # A container may see its path as the host does while its own group is mounted as the root. Then the groups of
        # the path are not there, and walking up to the mount finds the right one.
        group = PurePosixPath("/", *(part for part in path.split("/") if part not in ("", "..")))
        for ancestor in (group, *group.parents):
            yield mount / ancestor.relative_to("/"), str(ancestor), controllers == ""


def _may_lock_all(root: Path) -> bool:
    # The kernel asks for the capability in the initial user namespace: that of a rootless container does not count.
    initial = _read(root / "proc/self/uid_map").split() in ([], ["0", "0", "4294967295"])
    match = re.search(r"^CapEff:\s*([0-9a-f]+)$", _read(root / "proc/self/status"), re.MULTILINE)
    return initial and match is not None and bool(int(match[1], 16) >> _CAP_IPC_LOCK & 1)


def _hard_limit(root: Path, name: str) -> int | None:
    match = re.search(rf"^{name} +\S+ +(\S+)", _read(root / "proc/self/limits"), re.MULTILINE)
    return _number(match[1]) if match else None


def _free_bytes(directory: Path) -> int | None:
    try:
        status = os.statvfs(directory)
    except OSError:
        return 0
    # A tmpfs of unlimited size states 0 blocks in all.
    return status.f_bavail * status.f_frsize if status.f_blocks else None


def _colon_fields(text: str) -> dict[str, str]:
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def _kibibytes(text: str | None) -> int | None:
    number = _number(text.removesuffix(" kB")) if text else None
    return None if number is None else number * 1024


def _number(text: str | None) -> int | None:
    """None for "max", "unlimited" and what is missing."""
    text = (text or "").strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    """Empty where it cannot be read: a preflight must not be what stops a server."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
