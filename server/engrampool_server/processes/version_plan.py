"""What a server that follows a registry is to hold, what it holds, and what it does next: no processes, no clock."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import inf

from engrampool_proto.registry.etcd import Published
from engrampool_server.memory.tables import VersionKey

# A version that could not be loaded is tried again, less and less often.
_FIRST_DELAY_S, _MAX_DELAY_S = 30.0, 300.0


@dataclass
class _Failure:
    why: str
    delay_s: float
    due_s: float


class VersionPlan:
    """Steps from what is held to what is wanted: the versions of `to_drop` first, then that of `to_load`.

    A patch is held only beside its base. Times are of one clock, in seconds.

    fixed: what is held for ever, whatever is published.
    """

    def __init__(self, fixed: Collection[VersionKey] = ()) -> None:
        self._fixed = frozenset(fixed)
        self._wanted: Mapping[VersionKey, Published] | None = None
        self._held: list[VersionKey] = []
        self._failed: dict[VersionKey, _Failure] = {}

    @property
    def published(self) -> Collection[VersionKey]:
        """What is wanted by the registry; nothing before it is known."""
        return self._wanted.keys() if self._wanted else ()

    @property
    def is_known(self) -> bool:
        """Whether it is known what is published."""
        return self._wanted is not None

    @property
    def held(self) -> Collection[VersionKey]:
        """What is held."""
        return {*self._fixed, *self._held}

    @property
    def failed(self) -> dict[VersionKey, str]:
        """Why what is wanted cannot be held."""
        wanted = self._wanted or {}
        reasons = {key: self._hindrance(one) or "" for key, one in wanted.items()}
        reasons |= {key: reasons[key] or failure.why for key, failure in self._failed.items()}
        return {key: why for key, why in reasons.items() if why}

    def want(self, published: Iterable[Published]) -> bool:
        """Take these as wanted. Whether that is anything new; then all that failed is tried again."""
        wanted = {(one.model, one.version): one for one in published}
        if wanted == self._wanted:
            return False
        self._wanted = wanted
        self._failed = {key: _Failure(one.why, one.delay_s, -inf) for key, one in self._failed.items() if key in wanted}
        return True

    def wants(self, published: Published) -> bool:
        """Whether this version is still one to be held."""
        key = (published.model, published.version)
        return self._wanted is not None and self._wanted.get(key) == published and not self._hindrance(published)

    def to_drop(self) -> list[VersionKey]:
        """What is held and no longer to be held, each patch before its base."""
        wanted = self._wanted or {}
        # In the order of loading a base comes first.
        return [key for key in reversed(self._held) if key not in wanted or self._hindrance(wanted[key])]

    def to_load(self, now_s: float) -> Published | None:
        """The first version, in the order of publication, that can be loaded now."""
        return next((one for key, one in self._to_come() if self._due_s(key) <= now_s), None)

    def due_s(self) -> float:
        """When there will be something to load, if nothing is published before; inf for never."""
        return min((self._due_s(key) for key, _ in self._to_come()), default=inf)

    def loaded(self, key: VersionKey) -> None:
        """This one is held now."""
        self._held.append(key)
        self._failed.pop(key, None)

    def dropped(self, keys: Iterable[VersionKey]) -> None:
        """These are held no more."""
        for key in keys:
            self._held.remove(key)

    def could_not_load(self, key: VersionKey, why: str, now_s: float) -> None:
        """This one could not be loaded; it is tried again later, if it is still wanted."""
        if key not in self.published:
            return
        before = self._failed.get(key)
        delay_s = min(2 * before.delay_s, _MAX_DELAY_S) if before else _FIRST_DELAY_S
        self._failed[key] = _Failure(why, delay_s, now_s + delay_s)

    def is_settled(self, now_s: float) -> bool:
        """Whether it is known what is published, and there is nothing to do about that now."""
        return self.is_known and not self.to_drop() and self.to_load(now_s) is None

    def _to_come(self) -> list[tuple[VersionKey, Published]]:
        """What is wanted and not held, and could be."""
        present = self.held
        return [
            (key, one)
            for key, one in (self._wanted or {}).items()
            if key not in present
            and not self._hindrance(one)
            and (one.base is None or (one.model, one.base) in present)
        ]

    def _due_s(self, key: VersionKey) -> float:
        return self._failed[key].due_s if key in self._failed else -inf

    def _hindrance(self, published: Published) -> str | None:
        """Why a version cannot be held whatever its files are."""
        if published.base is None:
            return None
        key = (published.model, published.base)
        base = (self._wanted or {}).get(key)
        if base is None and key not in self._fixed:
            return f"its base, version {published.base}, is not published: publish that, too"
        if base is not None and base.base is not None:
            return (
                f"its base, version {published.base}, is a patch itself: patch the packed model that is changed by it"
            )
        return None
