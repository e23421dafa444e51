"""From what a client is given to the addresses of servers."""

import socket

_DNS = "dns:///"


def changes(target: str) -> bool:
    """Whether what the target stands for may be other addresses later."""
    return target.startswith(_DNS)


def resolve(target: str) -> list[str] | None:
    """The addresses that a target stands for: itself, or those of a name. None if the name cannot be looked up now."""
    if not target.startswith(_DNS):
        return [target]
    host, _, port = target.removeprefix(_DNS).rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        return None
    names = [f"[{address[0]}]" if family == socket.AF_INET6 else str(address[0]) for family, *_, address in found]
    return list(dict.fromkeys(f"{name}:{port}" for name in names))
