"""Listening addresses: taken before anything is loaded, and held for as long as the server lives."""

import errno
import os
import socket
import time
from pathlib import Path
from typing import Any

from engrampool_proto.errors import EngrampoolError
from engrampool_server.setting_kinds import split_address

# A server that was killed holds its port until the kernel has taken its memory apart.
PATIENCE_S = 2.0
_PAUSE_S = 0.05

_Address = tuple[Any, ...]


class ListenError(EngrampoolError):
    """An address cannot be listened on: in use, not of this machine, or not permitted."""


def reserve(listen: str) -> tuple[str, list[socket.socket]]:
    """Take the port of `listen` for the processes of this server, each of which listens with SO_REUSEPORT.

    Returns "HOST:PORT", with the port that port 0 became, and sockets that never listen: while one is open, no server
    that looks first, as this function does, takes the port as well. Without them the system would spread connections
    over both servers. Raises ListenError.
    """
    host, port = split_address(listen)
    held: list[socket.socket] = []
    problem: OSError | None = None
    for family, address in _resolve(listen):
        try:
            held.append(_patiently(family, (address[0], port, *address[2:])))
        except OSError as error:
            problem = error
            # `localhost` may stand for addresses that this machine lacks; one that is taken is never passed over.
            if error.errno == errno.EADDRINUSE:
                break
        else:
            port = held[-1].getsockname()[1]
            problem = problem if problem and problem.errno == errno.EADDRINUSE else None
    if problem is not None and (not held or problem.errno == errno.EADDRINUSE):
        for taken in held:
            taken.close()
        raise _refused(listen, problem) from problem
    return f"{host}:{port}", held


def listen_on(listen: str, purpose: str = "") -> socket.socket:
    """One listening socket, for any number of processes to accept on. Raises ListenError, which names `purpose`."""
    problem: OSError = OSError(errno.EADDRNOTAVAIL, "it has no address")
    for family, address in _resolve(listen, purpose):
        taken = socket.socket(family, socket.SOCK_STREAM)
        try:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind((address[0], split_address(listen)[1], *address[2:]))
            taken.listen()
        except OSError as error:
            taken.close()
            problem = error
        else:
            return taken
    raise _refused(listen, problem, purpose) from problem


def is_taken(path: Path) -> bool:
    """Whether somebody listens at the Unix socket `path`, however busy; never waits. Raises OSError: it cannot tell."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        code = probe.connect_ex(str(path))
    if code in (0, errno.EAGAIN, errno.EPROTOTYPE):  # one that has no room for more callers, or is no stream
        return True
    if code in (errno.ECONNREFUSED, errno.ENOENT):
        return False
    raise OSError(code, os.strerror(code))


def _resolve(listen: str, purpose: str = "") -> list[tuple[socket.AddressFamily, _Address]]:
    host, port = split_address(listen)
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise _refused(listen, error, purpose) from error
    return [(family, address) for family, _, _, _, address in found]


def _patiently(family: socket.AddressFamily, address: _Address) -> socket.socket:
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return _take(family, address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                raise
        time.sleep(_PAUSE_S)


def _take(family: socket.AddressFamily, address: _Address) -> socket.socket:
    if address[1]:
        # Without SO_REUSEPORT, and listening: fails if anybody has the port, listening or reserved as below, but not
        # for connections of the past that wait to be forgotten.
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    taken = socket.socket(family, socket.SOCK_STREAM)
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(address)
        # From here on it is in the way of such a probe.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except OSError:
        taken.close()
        raise
    return taken


def _refused(listen: str, error: OSError, purpose: str = "") -> ListenError:
    what = "in use" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
    return ListenError(f"cannot listen on {listen}{purpose and f' for {purpose}'}: {what}")
