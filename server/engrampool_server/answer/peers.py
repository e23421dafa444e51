"""Who asks: a host, as far as a server can tell, so that none can take what the others need.

All callers of one IPv4 address are one peer, and all of one IPv6 network of 64 bits, as a host may choose any address
in it; over a Unix socket all processes of one user are.
"""

import ipaddress
import socket
import struct
from functools import lru_cache
from urllib.parse import unquote

_UCRED = struct.Struct("3i")
_V6_NETWORK_BITS = 64


@lru_cache(maxsize=4096)  # gRPC asks with every call
def of_call(peer: str) -> str:
    """The peer of a gRPC call. peer: as its context names it, such as "ipv4:10.0.0.1:4711" or "unix:"."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return kind
    return of_host(rest.rpartition(":")[0].strip("[]"))


@lru_cache(maxsize=4096)
def of_host(host: str) -> str:
    """The peer that has this IP address."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address), _V6_NETWORK_BITS), strict=False))


def of_connection(accepted: socket.socket) -> str:
    """The peer at the other end of a connection. Raises OSError for one that left already."""
    if accepted.family == socket.AF_UNIX:
        _, uid, _ = _UCRED.unpack(accepted.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        return f"user {uid}"
    return of_host(accepted.getpeername()[0])
