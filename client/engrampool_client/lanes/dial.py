"""A socket to the direct lane of a server that has let a client in."""

import socket
from collections.abc import Callable

from engrampool_proto.v1 import pool_pb2

# A port that is blocked costs this once, when a client is made.
OPEN_TIMEOUT_S = 1.0
# Of a connection that is idle: when the system first asks for a sign of life, how often then, and how often in vain.
_KEEP_IDLE_S, _KEEP_EVERY_S, _KEEP_TRIES = 10, 2, 3

# Takes a connected socket, and the server's target, to the same inside TLS; raises OSError, and closes it then.
Secure = Callable[[socket.socket, str], socket.socket]


def dial(way_in: pool_pb2.OpenDirectResponse, target: str, secure: Secure | None = None) -> socket.socket:
    """A blocking socket, inside TLS by `secure` where the server asks for that. Raises OSError."""
    if way_in.unix_path:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connected.settimeout(OPEN_TIMEOUT_S)
            connected.connect(way_in.unix_path)
        except BaseException:
            connected.close()
            raise
    else:
        host = way_in.host or host_of(target)
        if not host:
            raise OSError(f"{target} has no host to connect to")
        connected = socket.create_connection((host, way_in.port), OPEN_TIMEOUT_S)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEP_IDLE_S)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEP_EVERY_S)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEP_TRIES)
    connected.settimeout(None)
    if not way_in.tls:
        return connected
    if secure is None:
        connected.close()
        raise OSError(f"{target}: its direct lane speaks TLS, and this client does not")
    return secure(connected, target)


def address_of(target: str) -> tuple[str, int] | None:
    """The host and port of "HOST:PORT" or a gRPC name for one; None for other names."""
    host, port = host_of(target), target.rpartition(":")[2]
    return (host, int(port)) if host and port.isdigit() else None


def host_of(target: str) -> str:
    """The host of "HOST:PORT" or a gRPC name for one; "" for other names, such as a Unix socket's."""
    scheme, separator, rest = target.partition(":")
    if separator and scheme in ("dns", "ipv4", "ipv6"):
        target = rest.rpartition("/")[2]
    if "," in target or "/" in target or target.startswith("unix"):
        return ""
    host, separator, port = target.rpartition(":")
    if not separator or not port.isdigit() or host.endswith(":"):
        host = target
    return host.removeprefix("[").removesuffix("]")
