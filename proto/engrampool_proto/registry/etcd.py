"""The registry of a pool: an etcd that says which servers there are, what they hold, and which version is active.

A server keeps its record there under a lease; whoever follows a pool is told of changes; the active version changes in
one transaction with what makes it servable. No lookup waits for it.
"""

import base64
import json
import logging
import random
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.client import BadStatusLine
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from engrampool_proto.errors import EngrampoolError, how_to_install
from engrampool_proto.registry.pool_state import (
    Active,
    Held,
    Member,
    NotHeldError,
    Published,
    State,
    UnreadableRecordError,
    VersionError,
    retirement_from_json,
    retirement_json,
)

if TYPE_CHECKING:
    from etcd3gw.client import Etcd3Client
    from etcd3gw.exceptions import Etcd3Exception

__all__ = [
    "SCHEME",
    "Active",
    "ClashError",
    "Held",
    "Member",
    "NotHeldError",
    "Published",
    "Registry",
    "RegistryError",
    "State",
    "VersionError",
    "require_etcd3gw",
]

SCHEME = "etcd://"
_DEFAULT_PREFIX = "engrampool"
_URL = re.compile(r"etcd://(?P<endpoints>[^/]+)(?:/(?P<prefix>[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*))?/?")
_ENDPOINT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):(?P<port>[0-9]{1,5})")
# A watch that lost its other end is silent, as is one with nothing to say: so often the registry is asked.
_PROBE_S = 3.0
# How soon `follow` notices that it is to stop.
_STOP_S = 0.5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
# At most so much of a watch's message is read at a time.
_MESSAGE_BYTES = 1 << 16
# A transaction that others were faster than is made anew from what they left, after a pause of chance, which grows: of
# many servers that join at once each has its turn.
_ATTEMPT_PAUSE_S, _LONGEST_ATTEMPT_PAUSE_S = 0.02, 2.0
_ATTEMPTS_S = 5.0
_NO_ETCD = "is no etcd, or not its port for clients"
# Of what some other server says.
_SHOWN_CHARS = 80

_log = logging.getLogger("engrampool")
_T = TypeVar("_T")


class RegistryError(EngrampoolError):
    """The registry does not answer, or not as an etcd does. The text names it, and what each endpoint said."""


class ClashError(EngrampoolError):
    """A server cannot join the pool: clients could not take its rows beside those of another. The text says which."""


@dataclass(frozen=True)
class _Snapshot:
    """revisions: {key below the prefix: the revision that wrote it}, of unreadable records too."""

    state: State
    revisions: Mapping[str, int]

    @property
    def mark(self) -> tuple[int, int]:
        """Another whenever a key was written or deleted."""
        return max(self.revisions.values(), default=0), len(self.revisions)


class Registry:
    """A pool's records. Thread-safe; connects with the first call.

    url: etcd://HOST:PORT[,HOST:PORT...][/PREFIX], of one etcd's endpoints, which are tried in turn; the prefix, by
        default `engrampool`, is the pool.
    timeout_s: how long to wait for an endpoint to take a connection, and to answer.

    Raises ValueError for another URL; every method RegistryError.
    """

    def __init__(self, url: str, timeout_s: float = 2.0) -> None:
        match = _URL.fullmatch(url)
        endpoints = [_ENDPOINT.fullmatch(text) for text in match["endpoints"].split(",")] if match else []
        if not match or not all(found and 0 < int(found["port"]) < 65_536 for found in endpoints):
            raise ValueError(f"not etcd://HOST:PORT[,HOST:PORT...][/PREFIX]: {url!r}")
        self.url = url
        self._endpoints = [(found["host"].strip("[]"), int(found["port"])) for found in endpoints if found]
        self._root = f"/{match['prefix'] or _DEFAULT_PREFIX}/"
        self._timeout_s = timeout_s
        self._clients: list[Etcd3Client] = []
        # Of the endpoint to be asked first.
        self._index = 0
        self._answered = float("-inf")
        # What is registered: the member to show, the lease, and the member that lies under the lease.
        self._registering = threading.Lock()
        self._member: Member | None = None
        self._ttl_s = 0
        self._lease = 0
        self._shown: Member | None = None

    @property
    def age_s(self) -> float:
        """Seconds since the registry answered; inf before it ever did."""
        return time.monotonic() - self._answered

    def read(self) -> State:
        """What the registry holds now. A record that cannot be read is left out, and logged."""
        return self._each(self._snapshot).state

    def follow(self, changed: Callable[[State], None], stop: threading.Event) -> None:
        """Call `changed` with what the registry holds, at once and whenever that changed, until `stop` is set.

        Changes that follow on one another may come as one, and after trouble the same state may come again. While the
        registry is away it is looked for at least once a second; a RegistryError of `changed` is such trouble, too.
        Raises what else `changed` raises, and RegistryError only if `etcd3gw` is missing.
        """
        self._connected()
        pause = 0.0
        while not stop.wait(pause):
            try:
                with closing(self._each(self._watch)) as watch:
                    # What was written before the watch began is read; what is written later ends a wait.
                    latest = None
                    while not stop.is_set():
                        snapshot = self._ask(watch.endpoint, partial(self._newer, latest))
                        if snapshot is not None:
                            latest = snapshot.mark
                            changed(snapshot.state)
                        with self._trouble(watch.endpoint):
                            watch.wait(stop)
                        if pause:
                            _log.info("the registry %s answers again", self.url)
                            pause = 0.0
            except RegistryError as error:
                if not pause:
                    _log.warning("going on with what is known: %s", error)
                pause = min(max(2 * pause, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)

    def join(self, member: Member, ttl_s: int = 10) -> None:
        """Register a server, or replace what this object registered, until nobody calls `keep` for `ttl_s`.

        While other servers join it is tried again, for at most `ttl_s`. If it raises, the next `keep` registers the
        member. Raises ClashError, as `keep` does, where its rows do not fit
        those of another server; then nothing is registered.
        """
        with self._registering:
            self._member, self._ttl_s = member, ttl_s
            self._register()

    def keep(self) -> None:
        """Keep the member registered, if there is one: to be called several times in `ttl_s`."""
        with self._registering:
            if self._member is not None:
                self._register()

    def leave(self) -> None:
        """Take the member away, at once if the registry answers, else after `ttl_s`. Raises nothing."""
        # Whoever registers it at the moment does not try again.
        self._member = None
        with self._registering:
            self._member = None
            with suppress(RegistryError):
                self._end_lease()

    def publish(self, published: Published) -> None:
        """Have servers load a version. Raises VersionError if it was published otherwise, or its base is missing."""
        name = f"{published.model}/{published.version}"
        key = f"published/{name}"
        # As whoever reads it will: nothing is written that cannot be read.
        Published.from_json(published.model, published.version, published.to_json())
        for snapshot in self._attempts():
            present = snapshot.state.find(published.model, published.version)
            if present == published:
                return
            if present is not None:
                raise VersionError(
                    f"{published.model} {published.version} is published already, from {present.location}: to publish"
                    f" it from {published.location}, retire it first"
                )
            needed = [key]
            if published.base is not None:
                if snapshot.state.find(published.model, published.base) is None:
                    raise VersionError(
                        f"{published.model} {published.version} is a patch of {published.base}, which is not published:"
                        " publish that first"
                    )
                needed.append(f"published/{published.model}/{published.base}")
            if self._commit(self._unchanged(snapshot, needed), {key: published.to_json(), f"retired/{name}": None}):
                return

    def activate(self, model: str, version: str, *, partial: bool = False) -> Active:
        """Have clients read this version, which servers hold at that moment. Returns what is active now.

        partial: see `State.check`. Raises VersionError; NotHeldError if it may yet come to be held.
        """
        return self._switch(model, version, partial)

    def rollback(self, model: str) -> Active:
        """Have clients read the version that was active before, if every row of it is held. Raises VersionError."""
        active = self.read().active.get(model)
        if active is None or active.previous is None:
            raise VersionError(f"{model} has no previous version to go back to; `engrampool activate` another")
        return self._switch(model, active.previous, True, leaving=active.version)

    def retire(self, model: str, version: str) -> None:
        """Have servers give a version up; that stays on record. Servers may hold it though its record was lost.

        It is written anew for a version that servers hold though it is on record: that record may be a backup's.

        Raises VersionError if it is active, a published patch's base, or unknown.
        """
        key = f"published/{model}/{version}"
        before: int | None = None
        for snapshot in self._attempts():
            state = snapshot.state
            active = state.active.get(model)
            # On record since the first attempt: that one was heard, and only its answer lost.
            retired = state.retired.get((model, version), 0)
            if before is not None and retired > before:
                return
            is_known = state.holders(model, version) or any(version in one.failed for one in state.members.values())
            if key not in snapshot.revisions and not is_known:
                raise VersionError(f"{model} {version} is not published")
            before = retired if before is None else before
            if state.known_active(model) == version:
                raise VersionError(f"{model} {version} is active: activate another version first")
            patches = [one.version for one in state.published if (one.model, one.base) == (model, version)]
            if patches:
                raise VersionError(f"{model} {version} is the base of the patch {patches[0]}: retire that first")
            writes: dict[str, bytes | None] = {key: None, f"retired/{model}/{version}": retirement_json(model, version)}
            if active and active.previous == version:
                writes[f"active/{model}"] = Active(model, active.version, None).to_json()
            # No patch was published meanwhile.
            others = self._none_since(snapshot, f"published/{model}/")
            if self._commit([*self._unchanged(snapshot, [f"active/{model}"]), others], writes):
                return

    def _switch(self, model: str, version: str, partial: bool, leaving: str | None = None) -> Active:
        for snapshot in self._attempts():
            state = snapshot.state
            present = state.active.get(model)
            if present is not None and present.version == version:
                return present
            if leaving is not None and (present is None or present.version != leaving):
                raise VersionError(f"{model}: the active version {leaving} was replaced meanwhile; look again")
            state.check(model, version, partial=partial)
            key = f"active/{model}"
            needed = [key, f"published/{model}/{version}"]
            needed += [f"servers/{member.address}" for member in state.holders(model, version)]
            active = Active(model, version, present.version if present else None)
            if self._commit(self._unchanged(snapshot, needed), {key: active.to_json()}):
                return active
        raise AssertionError  # _attempts ends by an error

    def _attempts(self, within_s: float = _ATTEMPTS_S) -> Iterator[_Snapshot]:
        end, longest = time.monotonic() + within_s, 0.0
        while True:
            yield self._each(self._snapshot)
            longest = min(2 * longest or _ATTEMPT_PAUSE_S, _LONGEST_ATTEMPT_PAUSE_S)
            pause = random.uniform(0, longest)  # noqa: S311
            if time.monotonic() + pause > end:
                break
            time.sleep(pause)
        raise RegistryError(f"the registry {self.url} kept changing meanwhile; try again")

    def _renew(self) -> None:
        if not self._lease or not self._each(partial(_renewed, lease=self._lease)):
            granted = self._each(lambda client: int(_post(client, "/lease/grant", {"TTL": self._ttl_s})["ID"]))
            self._lease, self._shown = granted, None

    def _register(self) -> None:
        self._renew()
        member = self._member
        if member is None or member == self._shown:
            return
        for snapshot in self._attempts(self._ttl_s):
            if self._member is None:
                return
            if clash := snapshot.state.clash(member):
                # What it was registered with before is not so any more.
                self._end_lease()
                raise ClashError(f"{member.address} does not join the pool {self.url}: {clash}")
            # No other server came meanwhile, or holds other rows.
            key = f"servers/{member.address}"
            if self._commit([self._none_since(snapshot, "servers/")], {key: member.to_json()}, self._lease):
                self._shown = member
                return
            # It may take longer than the lease lasts.
            self._renew()

    def _end_lease(self) -> None:
        lease, self._lease, self._shown = self._lease, 0, None
        if lease:
            self._each(lambda client: _post(client, "/lease/revoke", {"ID": lease}))

    def _commit(self, compare: list[dict[str, Any]], writes: Mapping[str, bytes | None], lease: int = 0) -> bool:
        """Whether all that is compared was so, and so everything is written, under a lease; None deletes."""
        success = [
            {"request_delete_range": {"key": self._b64(key)}}
            if value is None
            else {"request_put": {"key": self._b64(key), "value": _b64(value), "lease": lease}}
            for key, value in writes.items()
        ]
        body = {"compare": compare, "success": success}
        return bool(self._each(lambda client: _post(client, "/kv/txn", body)).get("succeeded"))

    def _unchanged(self, snapshot: _Snapshot, keys: Iterable[str]) -> list[dict[str, Any]]:
        return [self._compare(key, "EQUAL", snapshot.revisions.get(key, 0)) for key in keys]

    def _none_since(self, snapshot: _Snapshot, folder: str) -> dict[str, Any]:
        """That nothing in a folder was written since, whatever was deleted."""
        compare = self._compare(folder, "LESS", snapshot.state.revision + 1)
        return {**compare, "range_end": self._b64(folder[:-1] + "0")}

    def _compare(self, key: str, result: str, revision: int) -> dict[str, Any]:
        return {"key": self._b64(key), "target": "MOD", "result": result, "mod_revision": revision}

    def _b64(self, key: str) -> str:
        return _b64(f"{self._root}{key}".encode(errors="surrogateescape"))

    @property
    def _below(self) -> dict[str, str]:
        """The range of all keys of this pool."""
        return {"key": self._b64(""), "range_end": _b64(f"{self._root[:-1]}0".encode())}

    def _snapshot(self, client: "Etcd3Client") -> _Snapshot:
        answer = _post(client, "/kv/range", self._below)
        members: dict[str, Member] = {}
        published: list[Published] = []
        active: dict[str, Active] = {}
        retired: dict[tuple[str, str], int] = {}
        revisions: dict[str, int] = {}
        for item in answer.get("kvs", ()):
            key = base64.b64decode(item["key"]).decode(errors="surrogateescape")[len(self._root) :]
            value = base64.b64decode(item.get("value", ""))
            revisions[key] = int(item["mod_revision"])
            folder, _, name = key.partition("/")
            try:
                if folder == "servers":
                    members[name] = Member.from_json(name, value)
                elif folder == "published":
                    model, _, version = name.rpartition("/")
                    published.append(Published.from_json(model, version, value))
                elif folder == "active":
                    active[name] = Active.from_json(name, value)
                elif folder == "retired":
                    model, _, version = name.rpartition("/")
                    retired[retirement_from_json(model, version, value)] = revisions[key]
            except UnreadableRecordError as error:
                _log.warning("left out of the registry %s: %s", self.url, error)
        header = answer["header"]
        cluster = str(header.get("cluster_id", ""))
        state = State(members, tuple(published), active, int(header["revision"]), retired, cluster)
        return _Snapshot(state, revisions)

    def _newer(self, mark: tuple[int, int] | None, client: "Etcd3Client") -> _Snapshot | None:
        """What there is, unless its mark is this one."""
        if mark is not None:
            newest = {"limit": 1, "sort_target": "MOD", "sort_order": "DESCEND", "keys_only": True}
            answer = _post(client, "/kv/range", {**self._below, **newest})
            found = max((int(item["mod_revision"]) for item in answer.get("kvs", ())), default=0)
            if mark == (found, int(answer.get("count", 0))):
                return None
        return self._snapshot(client)

    def _watch(self, client: "Etcd3Client") -> "_Watch":
        return _Watch(client, self._below, self._timeout_s)

    def _each(self, action: Callable[["Etcd3Client"], _T]) -> _T:
        """What the first endpoint answers that does, from the one on that did last."""
        problems = []
        clients = self._connected()
        first = self._index
        for step in range(len(clients)):
            try:
                return self._ask(clients[(first + step) % len(clients)], action)
            except RegistryError as error:
                problems.append(str(error))
        raise RegistryError(f"the registry {self.url} cannot be asked: {'; '.join(problems)}")

    def _ask(self, client: "Etcd3Client", action: Callable[["Etcd3Client"], _T]) -> _T:
        with self._trouble(client):
            answer = action(client)
        self._answered = time.monotonic()
        return answer

    @contextmanager
    def _trouble(self, client: "Etcd3Client") -> Iterator[None]:
        """Whatever an endpoint does wrong within raises RegistryError, and has the next endpoint asked first."""
        from etcd3gw import exceptions

        try:
            yield
        except (exceptions.Etcd3Exception, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            clients = self._connected()
            if clients[self._index] is client:
                self._index = (self._index + 1) % len(clients)
            if isinstance(error, exceptions.ConnectionTimeoutError):
                what = f"does not answer within {self._timeout_s:g} s"
            elif isinstance(error, exceptions.ConnectionFailedError):
                what = _unreached(error)
            elif isinstance(error, exceptions.Etcd3Exception):
                what = _refused(error)
            # What `requests` says of an answer that is no JSON is both.
            elif isinstance(error, OSError) and not isinstance(error, ValueError):
                what = "broke the connection off"
            else:
                what = f"answers otherwise than etcd 3.4 or later does: {error!r:.200}"
            raise RegistryError(f"{client.host}:{client.port} {what}") from error

    def _connected(self) -> "list[Etcd3Client]":
        """A client for each endpoint."""
        if not self._clients:
            require_etcd3gw(self.url)
            from etcd3gw.client import Etcd3Client
            from requests import Session

            clients = []
            for host, port in self._endpoints:
                session = Session()
                # As servers are reached: without a proxy that the environment names.
                session.trust_env = False
                clients.append(Etcd3Client(host, port, timeout=self._timeout_s, api_path="/v3/", session=session))
            self._clients = clients
        return self._clients


def require_etcd3gw(url: str) -> None:
    """Raise RegistryError where the package is missing that the registry `url` is asked through."""
    if find_spec("etcd3gw") is None:
        raise RegistryError(f"the registry {url} needs the package 'etcd3gw': {how_to_install('etcd')}")


class _Watch:
    """A request that etcd answers bit by bit, whenever something in a range is written or deleted.

    Opening it raises what `requests` does, or ValueError.
    """

    def __init__(self, client: "Etcd3Client", below: Mapping[str, str], timeout_s: float) -> None:
        self.endpoint = client
        self._response = client.session.post(
            client.get_url("/watch"), json={"create_request": below}, stream=True, timeout=timeout_s
        )
        self._lines: Iterator[bytes] = self._response.iter_lines(_MESSAGE_BYTES)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def wait(self, stop: threading.Event) -> None:
        """Return when something came, or may have, when `stop` is set, or after a while. Raises as opening does.

        Of several messages that came together all but one stay here. What they tell of is older than anything asked
        of etcd from now on.
        """
        ready = select.poll()
        ready.register(self._response.raw.fileno(), select.POLLIN)
        end = time.monotonic() + _PROBE_S
        while not stop.is_set() and time.monotonic() < end:
            if ready.poll(_STOP_S * 1000):
                self._read()
                return

    def _read(self) -> None:
        line = next(self._lines, None)
        if line is None:
            raise ConnectionError("the watch ended")
        answer = json.loads(line)
        if "error" in answer or answer["result"].get("canceled"):
            # As when etcd stops.
            raise ConnectionError(f"the watch was cancelled: {line!r:.200}")

    def close(self) -> None:
        """Give the connection up."""
        self._response.close()


def _post(client: "Etcd3Client", path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    answer = client.post(client.get_url(path), json=body)
    if not isinstance(answer, dict):
        raise TypeError(f"not an object: {answer!r:.80}")
    return answer


def _unreached(error: Exception) -> str:
    """Why nothing came of a connection, as well as that is known."""
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
        if isinstance(cause, socket.gaierror):
            return f"is no host that is known here: {cause.strerror}"
        if isinstance(cause, BadStatusLine) and not isinstance(cause, OSError):
            return f"{_NO_ETCD}: it does not speak HTTP/1.1, but {cause!r:.{_SHOWN_CHARS}}"
    return "takes no connection"


def _refused(error: "Etcd3Exception") -> str:
    """What an endpoint answered instead of doing what it was asked."""
    text = error.detail_text or ""
    try:
        answer = json.loads(text)
        said = str(answer.get("error") or answer["message"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{_NO_ETCD}: it answers {text.strip() or repr(error)!r:.{_SHOWN_CHARS}}"
    if "database space exceeded" in said:
        said += "; compact and defragment it, then `etcdctl alarm disarm`"
    return f"refuses: {said}"


def _renewed(client: "Etcd3Client", lease: int) -> bool:
    """Whether the lease goes on; False if it ended."""
    return int(_post(client, "/lease/keepalive", {"ID": lease})["result"].get("TTL", 0)) > 0


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
