"""Hosts with addresses of their own on this machine, on links that can be cut, delay and lose packets.

Each host is a network namespace with a TAP device; a thread of this process is the switch that their links lead to. It
does what `tc netem` would, which many kernels come without. Namespaces have no name and last as long as a process of
ours, so nothing is left behind however the tests end, and the machine's own network does not know of them.
"""

import contextlib
import fcntl
import heapq
import itertools
import os
import random
import selectors
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

_TUN_SET_IFF, _TAP, _NO_PACKET_INFO = 0x400454CA, 0x0002, 0x1000
# Jumbo frames, as data centres have them: the switch has a sixth of the frames to pass on.
_MTU = 9000
_MAX_FRAME_BYTES = _MTU + 64
_FRAMES_AT_ONCE = 64


class NotPermittedError(Exception):
    """This machine lets us make no namespaces; the text says what is missing."""


class Host:
    """One host, and its link to the switch; the fields of the link may be changed at any time.

    prefix: words before a command that is to run there. cut: every packet is lost, and nobody is told.
    forget(): of connections that there are, every packet is lost from now on; new ones are well.
    delay_s: what a packet takes longer, either way. loss: of how many packets each is lost, 0 to 1, either way.
    sent_bytes: what came from it so far.
    """

    def __init__(self, address: str, mac: bytes, pid: int, tap: int) -> None:
        self.address, self.mac, self.tap = address, mac, tap
        self.prefix = ("nsenter", f"--net=/proc/{pid}/ns/net")
        self.cut, self.delay_s, self.loss, self.sent_bytes = False, 0.0, 0.0, 0
        self.flows: set[bytes] = set()  # of what came from it, as `_flow` has them
        self.forgotten: set[bytes] = set()

    def forget(self) -> None:
        self.forgotten.update(self.flows.copy())


@contextmanager
def network(hosts: int) -> Iterator[list[Host]]:
    """So many hosts, which reach each other and nothing else. Raises NotPermittedError."""
    missing = [name for name in ("ip", "nsenter", "unshare") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        raise NotPermittedError(f"{', '.join(missing)} not installed" if missing else "needs root")
    with ExitStack() as stack:
        made = [stack.enter_context(_host(number)) for number in range(1, hosts + 1)]
        for host in made:
            # No questions of who has which address: a link that is cut is as silent as behind a router.
            lines = ["link set lo up", f"link set net0 address {host.mac.hex(':')} mtu {_MTU} up"]
            lines.append(f"address add {host.address}/24 dev net0")
            lines += [f"neigh add {o.address} lladdr {o.mac.hex(':')} dev net0" for o in made if o is not host]
            _run(*host.prefix, "ip", "-batch", "-", lines=lines)
        stop_read, stop_write = os.pipe()
        stack.callback(os.close, stop_read)
        switch = threading.Thread(target=_switch, args=(made, stop_read), name="switch")
        switch.start()
        stack.callback(switch.join)
        stack.callback(os.close, stop_write)
        yield made


@contextmanager
def _host(number: int) -> Iterator[Host]:
    # It ends with its input, and the namespace with it. Once it has said something, the namespace is there.
    command = ["unshare", "--net", "sh", "-c", "echo; exec cat"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as keeper, ExitStack() as stack:
        if not keeper.stdout.readline():
            raise NotPermittedError(keeper.stderr.read().decode().strip())
        try:
            tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            stack.callback(os.close, tap)
            made = fcntl.ioctl(tap, _TUN_SET_IFF, struct.pack("16sH22x", b"", _TAP | _NO_PACKET_INFO))
        except OSError as error:
            raise NotPermittedError(f"/dev/net/tun: {error}") from error
        name = made[:16].rstrip(b"\0").decode()
        _run("ip", "link", "set", name, "netns", str(keeper.pid), "name", "net0")
        yield Host(f"10.0.0.{number}", bytes((2, 0, 0, 0, 0, number)), keeper.pid, tap)


def _run(*command: str, lines: list[str] | None = None) -> None:
    done = subprocess.run(command, input="\n".join(lines or ()), capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise NotPermittedError(f"{' '.join(command)}: {done.stderr.strip()}")


def _switch(hosts: list[Host], stop: int) -> None:
    """Pass frames on until `stop` ends."""
    by_mac = {host.mac: host for host in hosts}
    chance = random.Random(0)
    order = itertools.count()
    later: list[tuple[float, int, int, bytes]] = []  # when, in which order, to which TAP, what
    with selectors.DefaultSelector() as selector:
        selector.register(stop, selectors.EVENT_READ)
        for host in hosts:
            selector.register(host.tap, selectors.EVENT_READ, host)
        while True:
            for key, _ in selector.select(max(0.0, later[0][0] - time.monotonic()) if later else None):
                if key.fd == stop:
                    return
                sender: Host = key.data
                for frame in _frames(sender.tap):
                    sender.sent_bytes += len(frame)
                    sender.flows.add(flow := _flow(frame))
                    receiver = by_mac.get(frame[:6])
                    if (
                        receiver is None
                        or flow in sender.forgotten
                        or flow[6:] + flow[:6] in receiver.forgotten
                        or any(link.cut or (link.loss and chance.random() < link.loss) for link in (sender, receiver))
                    ):
                        continue
                    if delay_s := sender.delay_s + receiver.delay_s:
                        heapq.heappush(later, (time.monotonic() + delay_s, next(order), receiver.tap, frame))
                    else:
                        _pass_on(receiver.tap, frame)
            while later and later[0][0] <= time.monotonic():
                *_, tap, frame = heapq.heappop(later)
                _pass_on(tap, frame)


def _flow(frame: bytes) -> bytes:
    """Addresses and ports of a TCP packet, the sender's first."""
    return frame[26:30] + frame[34:36] + frame[30:34] + frame[36:38]


def _frames(tap: int) -> Iterator[bytes]:
    """Those that wait, up to some: the others are to have their turn."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(_FRAMES_AT_ONCE):
            yield os.read(tap, _MAX_FRAME_BYTES)


def _pass_on(tap: int, frame: bytes) -> None:
    with contextlib.suppress(OSError):  # the host takes nothing now: it is lost, as on any network
        os.write(tap, frame)
