"""One lookup without its transport: the request's bytes, and the answer put together from its messages."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from engrampool_client.errors import ProtocolError, RejectedError
from engrampool_client.served import ServedModel
from engrampool_proto import wire
from engrampool_proto.errors import BatchError, WireError
from engrampool_proto.hashing import TokenBatch

Hashing = Literal["local", "server"]
IntArray = npt.ArrayLike
Rows = npt.NDArray[np.uint8]


def token_batch(
    tokens: IntArray,
    query_start_loc: IntArray | None = None,
    lookback: IntArray | None = None,
    dead: npt.ArrayLike | None = None,
    lookback_dead: npt.ArrayLike | None = None,
) -> TokenBatch:
    """A batch of the caller's own arrays, copied so that they may be overwritten at once.

    Arrays must have the dtypes of `TokenBatch`; plain sequences are converted. Raises BatchError.
    """
    return TokenBatch.of(
        _own("tokens", tokens, np.int32),
        None if query_start_loc is None else _own("query_start_loc", query_start_loc, np.int32),
        None if lookback is None else _own("lookback", lookback, np.int32),
        None if dead is None else _own("dead", dead, np.bool_),
        None if lookback_dead is None else _own("lookback_dead", lookback_dead, np.bool_),
    )


def _own(name: str, values: Any, dtype: type[np.generic]) -> npt.NDArray[Any]:
    if isinstance(values, np.ndarray):
        return values.copy()
    try:
        return np.array(values, dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise BatchError(f"{name} cannot be made {np.dtype(dtype).name}: {error}") from error


class Exchange:
    """A request and its growing answer.

    request: bytes of the LookupRequest. answer_bytes: rows that will come back, in bytes.
    shapes: layer -> shape of its rows. times: the server's, once the whole answer is there.
    Not thread-safe: one thread adds, and a layer's rows are read after `add` said it is complete.
    """

    def __init__(self, request: wire.LookupRequest, shapes: Mapping[int, tuple[int, ...]]) -> None:
        self.request = wire.encode_request(request)
        self.shapes = dict(shapes)
        self.times: wire.ServerTimes | None = None
        self._sizes = {layer: math.prod(shape) for layer, shape in self.shapes.items()}
        self.answer_bytes = sum(self._sizes.values())
        self._have = dict.fromkeys(self._sizes, 0)
        self._rows: dict[int, Rows] = {layer: np.empty(0, np.uint8) for layer in self.empty_layers()}

    @classmethod
    def of_tokens(cls, served: ServedModel, batch: TokenBatch, layers: Sequence[int], hashing: Hashing) -> "Exchange":
        """Every token's rows: [T, heads, row_bytes] a layer, ascending. Raises BatchError, SpecError, RejectedError."""
        spec = served.spec
        tables = [spec.table(layer) for layer in layers]
        shapes = {table.layer: (batch.num_tokens, table.heads, table.row_bytes) for table in tables}
        _check_limits(served, shapes)
        if hashing == "server":
            batch.check_tokens(spec.vocab_size, spec.lookback)
            return cls(wire.LookupRequest(spec.name, served.version, (), batch, tuple(layers)), shapes)
        ids = tuple((layer, rows.reshape(-1)) for layer, rows in spec.hash(batch, layers).items())
        return cls(wire.LookupRequest(spec.name, served.version, ids), shapes)

    @classmethod
    def of_rows(cls, served: ServedModel, rows: Mapping[int, npt.NDArray[Any]]) -> "Exchange":
        """Ask for rows by id: [*ids.shape, row_bytes] a layer. Raises BatchError, SpecError, RejectedError."""
        tables, shapes = [], {}
        for layer in sorted(rows):
            table, ids = served.spec.table(layer), rows[layer]
            tables.append((layer, _row_ids(layer, ids, table.num_rows, table.id_dtype)))
            shapes[layer] = (*ids.shape, table.row_bytes)
        _check_limits(served, shapes)
        return cls(wire.LookupRequest(served.spec.name, served.version, tuple(tables)), shapes)

    def empty_layers(self) -> list[int]:
        """Layers that no rows will come for (a batch of no tokens); they are complete from the start."""
        return [layer for layer, size in self._sizes.items() if size == 0]

    def add(self, message: bytes) -> list[int]:
        """Take in one LookupResponse; returns the layers that are complete by it. Raises ProtocolError."""
        try:
            response = wire.parse_response(message)
        except WireError as error:
            raise ProtocolError(f"the answer cannot be read: {error}") from error
        complete = []
        for piece in response.tables:
            size = self._sizes.get(piece.layer)
            if size is None:
                raise ProtocolError(f"the answer has rows of layer {piece.layer}, which was not asked for")
            have, end = self._have[piece.layer], self._have[piece.layer] + len(piece.rows)
            if piece.first * self.shapes[piece.layer][-1] != have or end > size:
                raise ProtocolError(
                    f"layer {piece.layer}: {len(piece.rows)} bytes at row {piece.first} do not follow the {have} bytes "
                    f"that came before; {size} were asked for"
                )
            data = np.frombuffer(piece.rows, np.uint8)
            if len(data) == size:
                self._rows[piece.layer] = data  # the whole table in one message: a view of it
            else:
                if piece.layer not in self._rows:
                    self._rows[piece.layer] = np.empty(size, np.uint8)
                self._rows[piece.layer][have:end] = data
            self._have[piece.layer] = end
            if end == size and size:
                complete.append(piece.layer)
        self.times = response.times or self.times
        return complete

    def finish(self) -> None:
        """Raise ProtocolError unless every row has come."""
        short = [layer for layer, size in self._sizes.items() if self._have[layer] != size]
        if short:
            raise ProtocolError(f"the answer ended before the rows of layer {short[0]} were complete")

    def rows(self, layer: int) -> Rows:
        """The layer's rows in their shape, read-only. Only once complete."""
        rows = self._rows[layer].reshape(self.shapes[layer])
        rows.flags.writeable = False
        return rows


def _row_ids(layer: int, ids: Any, num_rows: int, dtype: type[np.unsignedinteger[Any]]) -> npt.NDArray[Any]:
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu":
        found = ids.dtype.name if isinstance(ids, np.ndarray) else type(ids).__name__
        raise BatchError(f"row ids of layer {layer} must be an integer array; they are {found}")
    flat = ids.reshape(-1)
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >= num_rows):
        at = int(np.argmax((flat < 0) | (flat >= num_rows)))
        raise BatchError(f"row id {flat[at]} at position {at} of layer {layer} is not in 0 .. {num_rows - 1}")
    return flat.astype(dtype)


def _check_limits(served: ServedModel, shapes: Mapping[int, tuple[int, ...]]) -> None:
    num_rows = sum(math.prod(shape[:-1]) for shape in shapes.values())
    nbytes = sum(math.prod(shape) for shape in shapes.values())
    if num_rows > served.max_rows or nbytes > served.max_answer_bytes:
        raise RejectedError(
            f"{num_rows} rows, {nbytes} bytes, are over the server's limits of {served.max_rows} rows and "
            f"{served.max_answer_bytes} bytes a request; split the batch",
            "too-many-rows",
        )
