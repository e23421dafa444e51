"""What a server knows of its pool, whatever becomes of the registry: no processes, no clock."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engrampool_proto.registry.etcd import Published, State
from engrampool_server.memory.tables import VersionKey


@dataclass(frozen=True)
class PoolView:
    """The versions to be held, and which of them clients read.

    A registry may lose its records, or another one may answer in its place. So a version is given up only for a record
    that it was retired, which was written to a registry that has been seen without it; and never before clients have
    another one to read, of which all rows are held. A record that another registry was found with, as of a backup, does
    not count there, but a later one does.

    published: in the order of loading. seen: of a version, {cluster of a registry: revision}; only a retirement that
    was written there after that revision counts. It is 0 where the version was seen not to be retired.
    active: {model: version} that clients read.
    """

    published: Mapping[VersionKey, Published] = field(default_factory=dict)
    seen: Mapping[VersionKey, Mapping[str, int]] = field(default_factory=dict)
    active: Mapping[str, str] = field(default_factory=dict)

    def after(self, state: State) -> "PoolView":
        """What is known after the registry said this."""
        theirs = {(one.model, one.version): one for one in state.published}
        published = {**self.published, **theirs}
        active = dict(self.active)
        for model, one in state.active.items():
            if (record := published.get((model, one.version))) and not state.uncovered(record):
                active[model] = one.version

        def is_read(key: VersionKey) -> bool:
            """Whether clients may read this version still, as they have no other one."""
            model, version = key
            reads = state.active[model].version if model in state.active else active.get(model)
            record = published.get((model, reads)) if reads else None
            return active.get(model) == version or (reads is not None and (not record or bool(state.uncovered(record))))

        gone = {key for key in published if key not in theirs and self._is_later(key, state) and not is_read(key)}
        # A patch needs its base.
        gone -= {(one.model, one.base) for key, one in published.items() if one.base is not None and key not in gone}
        for key in gone:
            del published[key]
        seen = {
            key: {state.cluster: state.retired[key], **self.seen.get(key, {})}
            if key in state.retired and key not in theirs
            else {state.cluster: 0}
            for key in published
        }
        return PoolView(published, seen, active)

    def unpublished(self, state: State) -> list[Published]:
        """Those that the registry knows nothing of, or only a retirement that does not count."""
        theirs = {(one.model, one.version) for one in state.published}
        return [one for key, one in self.published.items() if key not in theirs and not self._is_later(key, state)]

    def _is_later(self, key: VersionKey, state: State) -> bool:
        """Whether it was retired after this registry was first seen."""
        since = self.seen.get(key, {}).get(state.cluster)
        return since is not None and state.retired.get(key, 0) > since

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        published = [
            [one.model, one.version, one.to_json().decode(), dict(self.seen.get(key, {}))]
            for key, one in self.published.items()
        ]
        return {"published": published, "active": dict(self.active)}

    @classmethod
    def from_json(cls, document: Any) -> "PoolView":
        """What `to_json` gave. Raises ValueError (also UnreadableRecordError), TypeError, LookupError, AttributeError.

        Files of an earlier release say neither what is active nor where a version was seen.
        """
        published, seen = {}, {}
        for model, version, raw, *where in document["published"]:
            published[model, version] = Published.from_json(model, version, raw.encode())
            seen[model, version] = {str(one): int(since) for one, since in where[0].items()} if where else {}
        active = {str(model): str(version) for model, version in document.get("active", {}).items()}
        return cls(published, seen, active)
