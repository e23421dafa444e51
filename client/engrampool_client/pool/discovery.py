"""From what a client is given to the addresses of servers, and to the version that is active."""

import logging
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import replace

from engrampool_client.config import ClientConfig
from engrampool_client.errors import PoolError, UnavailableError, UnknownModelError, UnknownVersionError
from engrampool_client.event import Event
from engrampool_proto.registry.etcd import SCHEMES, Registry, RegistryError, State, require_etcd3gw

_DNS, _RAY = "dns:///", "ray:///"
# What gRPC knows besides.
_OTHER_SCHEMES = ("dns", "unix", "xds")
# Names that gRPC knows, and that have no port.
_PORTLESS = ("unix:", "unix-abstract:", "vsock:", "xds:")
# Between tries to reach a registry, or to find there what a client is to begin with.
_PAUSE_S = 0.1
# How long the system may take to look a name up until those who ask go on without, for now.
_PATIENCE_S = 1.0
# After what nobody thought of has met whoever follows the registry.
_AGAIN_S = 1.0
_log = logging.getLogger("engrampool")


class Servers:
    """The servers that a client's targets stand for, now and later. Thread-safe.

    targets: addresses; "dns:///NAME:PORT" stands for every address that NAME has, "ray:///NAME" for the servers of a
    placement by that name, "etcd://..." for those registered there. Raises ValueError for two registries, a URL of
    another kind or that is none, or an address without a port.
    """

    def __init__(self, targets: Sequence[str]) -> None:
        if not targets:
            raise ValueError("target must name a server at least")
        for target in targets:
            if not isinstance(target, str) or not target.strip():
                raise ValueError(f"target must be HOST:PORT or a URL, or a list of such; {target!r} is neither")
            scheme, url, _ = target.partition("://")
            if url and scheme not in _OTHER_SCHEMES and not target.startswith((*SCHEMES, _RAY)):
                raise ValueError(f"{target!r} is not HOST:PORT, {_DNS}NAME:PORT, {_RAY}NAME or {SCHEMES[0]}HOST:PORT")
            if not target.startswith((*SCHEMES, _RAY, *_PORTLESS)):
                _check_ports(target)
        urls = [target for target in targets if target.startswith(SCHEMES)]
        if len(urls) > 1:
            raise ValueError(f"a client follows one registry, not {' and '.join(urls)}; one URL may name all its hosts")
        self.text = ",".join(targets)
        self._targets = [_Target(target) for target in targets if target not in urls]
        self._registry = Registry(urls[0]) if urls else None
        self._state: State | None = None
        self._reading = threading.Lock()
        # Taken by itself: see delivery.py.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._turn = 0
        self._closed = Event()
        self._follower: threading.Thread | None = None

    @property
    def registered(self) -> bool:
        """Whether there is a registry, which says what version is active."""
        return self._registry is not None

    @property
    def may_change(self) -> bool:
        """Whether the targets may stand for other servers later."""
        return self.registered or any(target.is_name for target in self._targets)

    @property
    def age_s(self) -> float | None:
        """Seconds since the registry was last known to answer, inf if it never did; None without one."""
        return None if self._registry is None else self._registry.age_s

    def named(self, config: ClientConfig) -> ClientConfig:
        """The settings, with the name that certificates have where servers are reached by the addresses of one name."""
        names = {target.host for target in self._targets}
        if config.tls_ca is None or config.tls_name is not None or len(names) != 1 or None in names or self.registered:
            return config
        return replace(config, tls_name=names.pop())

    def find(self, model: str | None, version: str | None) -> tuple[list[str], bool]:
        """The addresses of servers that may hold the version, and whether they are all there are.

        They are not while a name cannot be looked up, or not soon: that says nothing of its servers. Of a registry
        that does not answer, the last that was known counts.
        """
        found = [target.addresses() for target in self._targets]
        if self._registry is not None:
            found.append(None if self._state is None else _holders(self._state, model, version))
        return list(dict.fromkeys(address for some in found for address in some or ())), None not in found

    def active(self, model: str) -> str | None:
        """The active version, as far as it is known."""
        active = None if self._state is None else self._state.active.get(model)
        return None if active is None else active.version

    def start(self, model: str | None, version: str | None, timeout_s: float) -> tuple[str | None, str | None]:
        """What to connect to, by model and version: where none is named, the active one, once the registry says so.

        A registry that cannot be reached is not waited for where other targets have an address. From now on it is
        followed. Raises UnavailableError, UnknownModelError, UnknownVersionError; RegistryError without `etcd3gw`.
        """
        if self._registry is None:
            return model, version
        require_etcd3gw(self._registry.url)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                self.look()
                found: tuple[str | None, str | None] = (model, version)
                if version is None:
                    found = self._active(model)
                if self.find(*found)[0]:
                    break
                what = " ".join(filter(None, found))
                failure: PoolError = UnavailableError(
                    f"no server registered at {self._registry.url} holds {what}; `engrampool versions` shows"
                    " what they hold"
                )
            except RegistryError as error:
                if self.find(model, version)[0]:
                    _log.warning("connecting without the registry, which is followed once it is there: %s", error)
                    found = model, version
                    break
                failure = UnavailableError(f"no registry was there within {timeout_s} s: {error}")
            except UnknownVersionError as error:
                failure = error
            if self._closed.is_set() or time.monotonic() + _PAUSE_S >= deadline:
                raise failure
            self._closed.wait(_PAUSE_S)
        follower = threading.Thread(target=self._follow, name="engrampool-registry", daemon=True)
        follower.start()
        self._follower = follower  # now that it can be joined
        return found

    def look(self) -> None:
        """Read the registry now. Raises RegistryError."""
        assert self._registry is not None
        # Whatever the follower has read meanwhile is as new or newer, and waits.
        with self._reading:
            self._take(self._registry.read())

    def wait(self, seen: int, timeout_s: float) -> int:
        """Wait until something changed since `seen`, which the last call gave (0 at first), or for `timeout_s`."""
        with self._lock:
            self._changed.wait_for(lambda: self._turn != seen, timeout_s)
            return self._turn

    def wake(self) -> None:
        """Have every `wait` end: something else changed that those who wait look at."""
        with self._lock:
            self._turn += 1
            self._changed.notify_all()

    def close(self) -> None:
        """Follow the registry no more."""
        self._closed.set()
        self.wake()
        if self._follower is not None:
            self._follower.join()

    def _follow(self) -> None:
        assert self._registry is not None
        said = ""
        while not self._closed.is_set():
            try:
                self._registry.follow(self._update, self._closed)
            except Exception as error:  # following goes on whatever happens
                if repr(error) != said:
                    said = repr(error)
                    _log.exception("following the registry failed, and is tried again")
                self._closed.wait(_AGAIN_S)

    def _update(self, state: State) -> None:
        with self._reading:
            self._take(state)

    def _take(self, state: State) -> None:
        self._state = state
        self.wake()

    def _active(self, model: str | None) -> tuple[str, str]:
        """The model, or the only one, and its active version. Raises UnknownModelError, UnknownVersionError."""
        assert self._registry is not None
        assert self._state is not None
        # Servers say what was active before a registry lost its records.
        told = {model for member in self._state.members.values() for model in member.active}
        active = {name: self._state.known_active(name) for name in told | set(self._state.active)}
        models = sorted(name for name, version in active.items() if version) if model is None else [model]
        if len(models) > 1:
            raise UnknownModelError(f"name the model: {self._registry.url} has active versions of {', '.join(models)}")
        version = active.get(models[0]) if models else None
        if version is None:
            known = ", ".join(f"{one.model} {one.version}" for one in self._state.published)
            raise UnknownVersionError(
                f"{self._registry.url} has no active version of {model or 'any model'}; published there: "
                f"{known or 'none'}. `engrampool activate` makes one active"
            )
        return models[0], version


class _Target:
    """One target, and what it stands for as far as that is known soon. Thread-safe."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._asked: Future[list[str] | None] | None = None

    @property
    def is_name(self) -> bool:
        """Whether it may stand for other addresses later."""
        return self._target.startswith((_DNS, _RAY))

    @property
    def host(self) -> str | None:
        """The name whose addresses it stands for, None for another target."""
        return self._target.removeprefix(_DNS).rpartition(":")[0] if self._target.startswith(_DNS) else None

    def addresses(self) -> list[str] | None:
        """As `resolve`; None also while the system takes its time to look the name up, which nobody can end."""
        if not self._target.startswith(_DNS):  # Ray is asked in a way of its own
            return resolve(self._target)
        with self._lock:
            if self._asked is None:
                asked: Future[list[str] | None] = Future()
                threading.Thread(target=self._ask, args=(asked,), name="engrampool-name", daemon=True).start()
                self._asked = asked
            if not wait([self._asked], _PATIENCE_S).done:
                return None
            asked, self._asked = self._asked, None
            return asked.result()

    def _ask(self, asked: "Future[list[str] | None]") -> None:
        try:
            asked.set_result(resolve(self._target))
        except BaseException as error:
            asked.set_exception(error)


def _check_ports(target: str) -> None:
    """Raise ValueError unless each address of "HOST:PORT", or of a gRPC name for some, has a port."""
    scheme = next((one for one in ("dns:", "ipv4:", "ipv6:") if target.startswith(one)), "")
    rest = target.removeprefix(scheme).rpartition("/")[2]
    form = f"{_DNS}NAME:PORT" if target.startswith(_DNS) else "HOST:PORT"
    for address in rest.split(",") if scheme in ("ipv4:", "ipv6:") else [rest]:
        host, _, port = address.rpartition(":")
        if ":" in host and not (host.startswith("[") and host.endswith("]")):
            raise ValueError(f"{target!r} has no port that can be told from the address; write [IPV6]:PORT")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"{target!r} has no port, or none from 1 to 65535; it is {form}")


def _holders(state: State, model: str | None, version: str | None) -> list[str]:
    """Addresses of the members that hold the version. None: any."""
    return [
        address
        for address, member in state.members.items()
        if any(model in (None, held.model) and version in (None, held.version) for held in member.held)
    ]


def resolve(target: str) -> list[str] | None:
    """The addresses that a target stands for: itself, or those of a name. None if the name cannot be looked up now."""
    if target.startswith(_RAY):
        from engrampool_client.pool.ray_names import addresses  # which needs ray

        return addresses(target.removeprefix(_RAY))
    if not target.startswith(_DNS):
        return [target]
    host, _, port = target.removeprefix(_DNS).rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        return None
    names = [f"[{address[0]}]" if family == socket.AF_INET6 else str(address[0]) for family, *_, address in found]
    return list(dict.fromkeys(f"{name}:{port}" for name in names))
