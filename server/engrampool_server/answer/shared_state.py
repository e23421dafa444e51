"""What the processes of one server have in common: made before the first of them is forked."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import Metric

from engrampool_proto.registry.records import VersionKey
from engrampool_server.access.access import Access
from engrampool_server.answer.accounts import Accounts
from engrampool_server.answer.emulation import Emulation
from engrampool_server.answer.in_flight import InFlight, int64s
from engrampool_server.answer.lane.admission import Admission
from engrampool_server.memory.tables import LoadedModel
from engrampool_server.telemetry.metrics import Metrics


@dataclass
class SharedState:
    """What every process of a server inherits when it is forked.

    models: those loaded before the fork; their rows are the one copy that all processes read.
    admission: of the direct lane, None for no such lane. emulation: of other memory, None for none.
    access: what callers are let in by. accounts: what those take that are known by name.
    metrics_of_all: reads those of all processes; None where there is only one.
    """

    metrics: Metrics
    in_flight: InFlight
    models: list[LoadedModel] = field(default_factory=list)
    admission: Admission | None = None
    emulation: Emulation | None = None
    access: Access = field(default_factory=Access)
    accounts: Accounts = field(init=False)
    metrics_of_all: Callable[[], Iterable[Metric]] | None = None
    # Of each of the models, in memory that forks share: 1 for the version that clients read.
    _active: dict[VersionKey, memoryview] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.accounts = Accounts(self.in_flight.processes)

    def hold(self, model: LoadedModel) -> None:
        """Have another model, for processes that are forked from now on."""
        self.models.append(model)
        self._active[model.key] = int64s(1)

    def drop(self, gone: Collection[VersionKey]) -> None:
        """Have these no more; processes that have them keep them."""
        self.models[:] = [model for model in self.models if model.key not in gone]
        self._active = {key: flag for key, flag in self._active.items() if key not in gone}

    def mark_active(self, active: Mapping[str, str]) -> None:
        """Have every process know which version of a model clients read. active: {model: version}."""
        for (model, version), flag in self._active.items():
            flag[0] = active.get(model) == version

    def read_metrics(self) -> Iterable[Metric]:
        """Every metric of the server, as Prometheus sees it."""
        self.metrics.flush()
        return self.metrics.registry.collect() if self.metrics_of_all is None else self.metrics_of_all()

    def is_active(self, model: str, version: str) -> bool:
        """Whether clients read this version, as far as the registry ever said."""
        flag = self._active.get((model, version))
        return flag is not None and bool(flag[0])


def free_slot(taken: Sequence[int]) -> int:
    """The lowest slot that is not taken."""
    return next(slot for slot in range(len(taken) + 1) if slot not in taken)
