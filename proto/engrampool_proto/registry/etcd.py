"""The registry of a pool: an etcd that says which servers there are, what they hold, and which version is active.

A server keeps its record there under a lease; whoever follows a pool is told of changes; the active version changes in
one transaction with what makes it servable. No lookup waits for it.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass

from engrampool_proto.errors import EngrampoolError
from engrampool_proto.registry.etcd_client import SCHEMES, Contents, EtcdClient, RegistryError, require_etcd3gw
from engrampool_proto.registry.pool_state import NotHeldError, State, VersionError
from engrampool_proto.registry.records import (
    Active,
    Held,
    Member,
    Published,
    UnreadableRecordError,
    retirement_from_json,
    retirement_json,
)

__all__ = [
    "SCHEMES",
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

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0
# A transaction that others were faster than is made anew from what they left, after a pause of chance, which grows: of
# many servers that join at once each has its turn.
_ATTEMPT_PAUSE_S, _LONGEST_ATTEMPT_PAUSE_S = 0.02, 2.0
_ATTEMPTS_S = 5.0

_log = logging.getLogger("engrampool")


class ClashError(EngrampoolError):
    """A server cannot join the pool: clients could not take its rows beside those of another. The text says which."""


@dataclass(frozen=True)
class _Snapshot:
    """The records that can be read, and all keys there are."""

    state: State
    contents: Contents


class Registry:
    """A pool's records. Thread-safe; connects with the first call.

    url: etcd://HOST:PORT[,HOST:PORT...][/PREFIX], of one etcd's endpoints, which are tried in turn; the prefix, by
        default `engrampool`, is the pool.
    timeout_s: how long to wait for an endpoint to take a connection, and to answer.

    Raises ValueError for another URL; every method RegistryError.
    """

    def __init__(self, url: str, timeout_s: float = 2.0) -> None:
        self._etcd = EtcdClient(url, timeout_s)
        self.url = url
        # What is registered: the member to show, the lease, and the member that lies under the lease.
        self._registering = threading.Lock()
        self._member: Member | None = None
        self._ttl_s = 0
        self._lease = 0
        self._shown: Member | None = None

    @property
    def age_s(self) -> float:
        """Seconds since the registry answered; inf before it ever did."""
        return self._etcd.age_s

    def read(self) -> State:
        """What the registry holds now. A record that cannot be read is left out, and logged."""
        return self._snapshot(self._etcd.read()).state

    def follow(self, changed: Callable[[State], None], stop: threading.Event) -> None:
        """Call `changed` with what the registry holds, at once and whenever that changed, until `stop` is set.

        Changes that follow on one another may come as one, and after trouble the same state may come again. While the
        registry is away it is looked for at least once a second; a RegistryError of `changed` is such trouble, too.
        Raises what else `changed` raises, and RegistryError only if `etcd3gw` is missing.
        """
        self._etcd.connected()
        pause = 0.0
        while not stop.wait(pause):
            try:
                with closing(self._etcd.watch()) as watch:
                    # What was written before the watch began is read; what is written later ends a wait.
                    latest = None
                    while not stop.is_set():
                        contents = watch.newer(latest)
                        if contents is not None:
                            latest = contents.mark
                            changed(self._snapshot(contents).state)
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
            writes = {key: published.to_json(), f"retired/{name}": None}
            if self._etcd.commit(self._etcd.unchanged(snapshot.contents, needed), writes):
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
            if key not in snapshot.contents.revisions and not is_known:
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
            others = self._etcd.none_since(snapshot.contents, f"published/{model}/")
            if self._etcd.commit([*self._etcd.unchanged(snapshot.contents, [f"active/{model}"]), others], writes):
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
            if self._etcd.commit(self._etcd.unchanged(snapshot.contents, needed), {key: active.to_json()}):
                return active
        raise AssertionError  # _attempts ends by an error

    def _attempts(self, within_s: float = _ATTEMPTS_S) -> Iterator[_Snapshot]:
        end, longest = time.monotonic() + within_s, 0.0
        while True:
            yield self._snapshot(self._etcd.read())
            longest = min(2 * longest or _ATTEMPT_PAUSE_S, _LONGEST_ATTEMPT_PAUSE_S)
            pause = random.uniform(0, longest)  # noqa: S311
            if time.monotonic() + pause > end:
                break
            time.sleep(pause)
        raise RegistryError(f"the registry {self.url} kept changing meanwhile; try again")

    def _renew(self) -> None:
        if not self._lease or not self._etcd.keep(self._lease):
            self._lease, self._shown = self._etcd.grant(self._ttl_s), None

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
            others = self._etcd.none_since(snapshot.contents, "servers/")
            if self._etcd.commit([others], {f"servers/{member.address}": member.to_json()}, self._lease):
                self._shown = member
                return
            # It may take longer than the lease lasts.
            self._renew()

    def _end_lease(self) -> None:
        lease, self._lease, self._shown = self._lease, 0, None
        if lease:
            self._etcd.revoke(lease)

    def _snapshot(self, contents: Contents) -> _Snapshot:
        members: dict[str, Member] = {}
        published: list[Published] = []
        active: dict[str, Active] = {}
        retired: dict[tuple[str, str], int] = {}
        for key, value in contents.values.items():
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
                    retired[retirement_from_json(model, version, value)] = contents.revisions[key]
            except UnreadableRecordError as error:
                _log.warning("left out of the registry %s: %s", self.url, error)
        state = State(members, tuple(published), active, contents.revision, retired, contents.cluster)
        return _Snapshot(state, contents)
