"""What the callers of one connection registered, as numbers that the loop without Python reads."""

from itertools import pairwise

import numpy as np

from engrampool_proto import wire
from engrampool_proto.errors import WireError
from engrampool_proto.frames import MAX_HANDLES
from engrampool_proto.kernels import serve
from engrampool_server.answer.lookups import Lookups, RefusedError
from engrampool_server.memory.tables import LoadedModel, LoadedTable
from engrampool_server.telemetry.metrics import Metrics


class Handles:
    """To be used by one connection's thread.

    handles, entries: as `serve` takes them; entries become another array with each registration.
    """

    def __init__(self, lookups: Lookups, metrics: Metrics, most_row_bytes: int) -> None:
        """most_row_bytes: rows larger than that are answered by Python."""
        self._lookups, self._metrics, self._most_row_bytes = lookups, metrics, most_row_bytes
        self._named: dict[int, wire.LookupRequest] = {}
        # Those that the loop answers: their layers' entries; and the model, so that no memory goes which it reads.
        self._ready: dict[int, tuple[list[list[int]], LoadedModel]] = {}
        self.handles = np.zeros((MAX_HANDLES, serve.HANDLE_WORDS), np.int64)
        self.entries = np.zeros((0, serve.ENTRY_WORDS), np.int64)

    def register(self, handle: int, named: wire.LookupRequest) -> None:
        """Have it stand for these layers from now on. Raises WireError for what is no registration."""
        if handle >= MAX_HANDLES:
            raise WireError(f"handle {handle} is not in 0 .. {MAX_HANDLES - 1}")
        if named.tables or named.tokens is not None or not named.layers:
            raise WireError("a handle stands for a model, a version and layers, and for nothing else")
        if any(a >= b for a, b in pairwise(named.layers)):
            raise WireError("the layers of a handle must ascend without repeats")
        self._named[handle] = named
        if self._ready.pop(handle, None) is not None:
            self._lay_out()
        self._resolve(handle)

    def request(self, handle: int, body: memoryview) -> wire.LookupRequest:
        """A lookup by a handle as gRPC would bring it. Raises RefusedError, WireError.

        body: of the frame. Ids of the request are views into it.
        """
        named = self._named.get(handle)
        if named is None:
            raise WireError(f"nothing was registered as handle {handle}")
        self._resolve(handle)  # perhaps it is held by now
        model = self._lookups.find(named.model, named.version)
        tables: list[tuple[int, wire.Ids]] = []
        count = len(named.layers)
        if len(body) < 8 * count:
            raise WireError(f"a lookup by handle {handle} begins with {count} counts; its body is {len(body)} bytes")
        counts, at = np.frombuffer(body, np.uint64, count).tolist(), 8 * count
        for layer, ids in zip(named.layers, counts, strict=True):
            dtype = self._lookups.table(model, layer).spec.id_dtype
            nbytes = ids * np.dtype(dtype).itemsize
            if at + nbytes > len(body):
                raise WireError(f"layer {layer}: {ids} ids are more than the frame has")
            tables.append((layer, np.frombuffer(body, dtype, ids, at)))
            at += -nbytes // 8 * -8
        if at != len(body):
            raise WireError(f"a lookup has {len(body)} bytes of counts and ids; by its counts it has {at}")
        return wire.LookupRequest(named.model, named.version, tuple(tables))

    def _resolve(self, handle: int) -> None:
        """Let the loop answer lookups by this handle, if it can and does not yet."""
        if handle in self._ready:
            return
        named = self._named[handle]
        try:
            self._lookups.check_ready()
            model = self._lookups.find(named.model, named.version)
        except RefusedError:
            return
        rows = []
        for layer in named.layers:
            table = model.tables.get(layer)
            if table is None or not table.is_plain or table.spec.row_bytes > self._most_row_bytes:
                return
            rows.append(self._entry(model, table))
        self._ready[handle] = rows, model
        self._lay_out()

    def _lay_out(self) -> None:
        """Write all of them as the loop reads them."""
        flat: list[list[int]] = []
        self.handles[:] = 0
        for handle, (rows, model) in self._ready.items():
            times = self._metrics.times_of_direct(model.spec.name)
            self.handles[handle] = len(flat), len(rows), times.ctypes.data
            flat += rows
        self.entries = np.array(flat, np.int64).reshape(-1, serve.ENTRY_WORDS)

    def _entry(self, model: LoadedModel, table: LoadedTable) -> list[int]:
        counts = self._metrics.rows_of_direct(model.spec.name, table.spec.layer)
        id_bytes = np.dtype(table.spec.id_dtype).itemsize
        held, width = table.rows.shape
        address = table.rows.ctypes.data
        return [table.spec.layer, id_bytes, table.row_start, held, width, address, counts.ctypes.data]
