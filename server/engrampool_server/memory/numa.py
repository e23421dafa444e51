"""Which nodes of a machine with several sockets tables lie on (setting `numa`): said to the kernel, and read back.

The policy is the process's, so it holds for every kind of memory, and is inherited by threads and forks.
"""

import ctypes
import errno
import os
import platform
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engrampool_proto.errors import EngrampoolError

_BIND, _INTERLEAVE = 2, 3
_MAX_NODES = 1024
_SAMPLED_PAGES = 4096
# There is no libnuma to be relied on, so the calls go by number: set_mempolicy, move_pages.
_CALLS = {"x86_64": (238, 279), "aarch64": (237, 239)}
_LIBC = ctypes.CDLL(None, use_errno=True)
_NODES = Path("/sys/devices/system/node")


class NumaError(EngrampoolError):
    """Tables cannot be placed as the setting `numa` says, or do not lie where it says. The operator must act."""


def place(numa: str) -> None:
    """Have memory that is taken from now on lie as the setting says, and run beside it where it is one node's.

    Of this thread, and of threads and processes that it starts. Raises NumaError.
    """
    if numa == "off":
        return
    nodes = nodes_of(numa)
    if numa != "interleave":
        (node,) = nodes
        cpus = _cpus(node) & os.sched_getaffinity(0)
        if not cpus:
            raise NumaError(f"numa = {numa}: node {node} has no processor that this process may run on; see taskset")
        os.sched_setaffinity(0, cpus)
    mask = (ctypes.c_ulong * (_MAX_NODES // 64))()
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    mode = _INTERLEAVE if numa == "interleave" else _BIND
    if _LIBC.syscall(_call(0), mode, mask, ctypes.c_ulong(_MAX_NODES)):
        number = ctypes.get_errno()
        hint = "; a container needs CAP_SYS_NICE for it" if number in (errno.EPERM, errno.ENOSYS) else ""
        raise NumaError(f"numa = {numa}: the kernel refuses (set_mempolicy: {os.strerror(number)}){hint}")


def nodes_of(numa: str) -> tuple[int, ...]:
    """The nodes that the setting stands for, here. Raises NumaError for one that is not there, or is not one."""
    allowed = _allowed_nodes()
    if numa == "interleave":
        return allowed
    if numa.startswith("bind:"):
        node = int(numa.removeprefix("bind:"))
        if node not in allowed:
            raise NumaError(f"numa = {numa}: no memory of node {node} may be used here; of {_listed(allowed)} it may")
        return (node,)
    mine = [node for node in allowed if _cpus(node) & os.sched_getaffinity(0)]
    if len(mine) != 1:
        raise NumaError(
            f"numa = local: this process may run on {_listed(mine)}, so nothing is local; start it on one "
            "(numactl --cpunodebind, taskset), or say bind:N"
        )
    return tuple(mine)


def shares(rows: npt.NDArray[np.uint8]) -> dict[int, float]:
    """Node -> share of a table's pages that lie there, of up to 4096 that are looked at; those in no memory apart.

    Empty where the kernel does not tell.
    """
    if not rows.size or platform.machine() not in _CALLS:
        return {}
    count = min(_SAMPLED_PAGES, -(-rows.nbytes // 4096))
    # The kernel tells nothing of a page that this process has not touched.
    offsets = np.linspace(0, rows.nbytes - 1, count).astype(np.int64)
    rows.reshape(-1)[offsets].sum()
    pages = (offsets + rows.ctypes.data).astype(np.uint64) // 4096 * 4096
    status = np.full(count, -1, np.int32)
    addresses = [ctypes.c_void_p(array.ctypes.data) for array in (pages, status)]
    if _LIBC.syscall(_call(1), 0, ctypes.c_ulong(count), addresses[0], None, addresses[1], 0):
        return {}
    found = Counter(status[status >= 0].tolist())
    return {node: found[node] / found.total() for node in sorted(found)}


def check(numa: str, name: str, found: dict[int, float]) -> None:
    """Raise NumaError where pages of a table lie on other nodes than the setting says. found: of `shares`."""
    if numa in ("off", "interleave"):
        return
    (node,) = nodes_of(numa)
    elsewhere = {other: share for other, share in found.items() if other != node}
    if elsewhere:
        text = ", ".join(f"{share:.0%} on node {other}" for other, share in elsewhere.items())
        raise NumaError(
            f"numa = {numa}: {name} does not lie on node {node} ({text}); where it was adopted, free it by "
            "`engrampool segments --free` and start again"
        )


def _allowed_nodes() -> tuple[int, ...]:
    """Nodes whose memory this process may use."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Mems_allowed_list:"):
            return tuple(sorted(_parsed(line.split(":")[1])))
    return (0,)


def _cpus(node: int) -> set[int]:
    try:
        return _parsed((_NODES / f"node{node}" / "cpulist").read_text())
    except OSError:  # a kernel without nodes is all one
        return set(os.sched_getaffinity(0)) if node == 0 else set()


def _parsed(ranges: str) -> set[int]:
    """The numbers of "0-3,8"."""
    found: set[int] = set()
    for part in ranges.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found.update(range(int(first), int(last or first) + 1))
    return found


def _listed(nodes: tuple[int, ...] | list[int]) -> str:
    return f"node{'s' * (len(nodes) != 1)} {', '.join(map(str, nodes)) or 'none'}"


def _call(which: int) -> int:
    machine = platform.machine()
    if machine not in _CALLS:
        raise NumaError(f"numa: not known for {machine}; set it off, and place the server by numactl")
    return _CALLS[machine][which]
