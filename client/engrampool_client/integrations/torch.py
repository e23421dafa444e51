"""Rows as tensors of a PyTorch model. Needs the extra `torch`.

pool = EngramPool(Client("memory-node:50051"), device="cuda")
embedding = PooledEmbedding(pool, layer=1)  # in the place of the layer's nn.Embedding
with pool.start(input_ids):                 # as soon as the token ids are known
    model(input_ids)                        # embedding() waits for the rows of layer 1 only
"""

import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from engrampool_client.client import Client
from engrampool_client.config import columns
from engrampool_client.errors import BatchError, PoolError, SpecError
from engrampool_client.lookup.step import Step
from engrampool_proto.hashing import exactly
from engrampool_proto.spec import RowFormat

_FLOATS = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# What token ids, boundaries and masks may come as: on any device, of any integer type that holds them.
Ids: TypeAlias = torch.Tensor | npt.ArrayLike


def dequantize(
    rows: torch.Tensor, row_format: RowFormat, scale: float | None = None, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """The numbers that rows stand for: uint8 [..., row_bytes] -> `dtype` [..., dim], on the device of `rows`.

    row_format, scale: of the `TableSpec`. A segment `values` of floats may be followed by `scales`, float8_e8m0fnu,
    each for an equal run of values; or every value is multiplied by `scale`, which is rounded to bfloat16 first, as the
    engines do. The result is the exact product rounded once to `dtype`, except that a product with `scale` is float32
    first. May be a view of `rows` where nothing is to be done.

    Raises BatchError unless `rows` are of this format, SpecError for a format whose meaning the specification does not
    tell (nvfp4: the order of the two values of a byte, and of its roundings), ValueError for another dtype than
    bfloat16, float16 or float32.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}; it is {dtype}")
    if rows.dtype != torch.uint8 or rows.shape[-1:] != (row_format.row_bytes,):
        raise BatchError(f"rows must be uint8 [..., {row_format.row_bytes}]; they are {rows.dtype} {list(rows.shape)}")
    dim, scales = _check_format(row_format, scale)
    stored = _FLOATS[row_format.segments[0].dtype]
    values = _aligned(rows[..., row_format.slice_of("values")], stored.itemsize).view(stored)
    if scales:
        # In bfloat16 both factors are exact, and a product is rounded once: no need for tensors twice as large.
        exact = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        factors = rows[..., row_format.slice_of("scales")].view(torch.float8_e8m0fnu).to(exact)
        runs = values.to(exact).unflatten(-1, (scales, dim // scales))
        return runs.mul_(factors.unsqueeze(-1)).flatten(-2).to(dtype)
    if scale is not None:
        rounded = torch.tensor(scale, dtype=torch.float32).to(torch.bfloat16).item()
        return (values.to(torch.float32) * rounded).to(dtype)
    return values.to(dtype)


def lookback_of(history: Ids, width: int) -> npt.NDArray[np.int32]:
    """What `EngramPool.start` wants to know of the tokens before a chunk.

    history: token ids [R, H] of R requests, the newest last. width: n - 1 of the longest n-gram (`spec.lookback`).
    Returns int32 [R, width]: column 0 the token just before the chunk, -1 before the sequence start. Raises BatchError.
    """
    tokens = _array("history", history, np.int32)
    if tokens.ndim != 2:
        raise BatchError(f"history must be [requests, tokens]; it is {list(tokens.shape)}")
    before = np.full((len(tokens), width), -1, np.int32)
    newest = tokens[:, ::-1][:, :width]
    before[:, : newest.shape[1]] = newest
    return before


class EngramPool:
    """A model's view of a `Client`: starts lookups, and gives the rows to the model's layers as tensors.

    One a model. Lookups may be started ahead, one forward runs at a time.

    device: where the layers run. On a GPU the client writes rows into pinned memory, and they are copied on a stream of
        their own; on the CPU they are written where the layers read them.
    dtype: of the embeddings: bfloat16, float16 or float32.
    buffers: steps that may be under way at once, the one that the model is running included.
    staging: whether steps take turns in lasting buffers; None where the device is a GPU.

    The client stays the caller's to close, after the last step. A copy of the pool is itself. A model is saved without
    it, which the layers say when they are run.
    """

    def __init__(
        self,
        client: Client,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        buffers: int = 2,
        staging: bool | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, _DTYPES))}; it is {dtype}")
        if buffers < 1:
            raise ValueError(f"buffers must be at least 1; it is {buffers}")
        self.client, self.device, self.dtype = client, torch.device(device), dtype
        cuda = self.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.device) if cuda else None
        self._staged = cuda if staging is None else staging
        self._buffers = [_Staging(pinned=cuda) for _ in range(buffers)]
        # [heads, row_bytes] by layer, as the client gives them: it may be one for some heads only.
        nothing = client.dummy(0)
        self._row_shapes = {layer: nothing.rows(layer).shape[1:] for layer in client.spec.layers}
        self._running: PooledStep | None = None

    @property
    def running(self) -> "PooledStep":
        """The step whose `with` the caller is in. Raises PoolError outside of any."""
        if self._running is None:
            raise PoolError("no step is running: call the model inside `with pool.start(input_ids):`")
        return self._running

    def start(
        self,
        input_ids: Ids,
        query_start_loc: Ids | None = None,
        lookback: Ids | None = None,
        dead: Ids | None = None,
        lookback_dead: Ids | None = None,
        *,
        layers: Sequence[int] | None = None,
        timeout_s: float | None = None,
    ) -> "PooledStep":
        """Start the lookup of a forward's rows and return at once; run the forward in `with` of what is returned.

        input_ids: [T] as `Client.prefetch` takes it, with query_start_loc [R + 1] if there are several requests; or
        [B, S], a request a line. lookback: [R, <= n - 1], see `lookback_of`; by default every request starts here.
        dead: bool, of the shape of input_ids: tokens outside any n-gram, padding for instance.
        Ids on a GPU are fetched from there, which waits for whatever computes them.

        Raises as `Client.prefetch` does, and PoolError if all buffers are in use.
        """
        ids = _array("input_ids", input_ids, np.int32)
        bounds = None if query_start_loc is None else _array("query_start_loc", query_start_loc, np.int32)
        if ids.ndim == 2 and bounds is None:
            bounds = np.arange(len(ids) + 1, dtype=np.int32) * np.int32(ids.shape[1])
        elif ids.ndim != 1:
            raise BatchError(f"input_ids must be [T], or [B, S] without query_start_loc; they are {list(ids.shape)}")
        mask = None if dead is None else _array("dead", dead, np.bool_)
        if mask is not None and mask.shape != ids.shape:
            raise BatchError(f"dead must have the shape of input_ids, {list(ids.shape)}; it has {list(mask.shape)}")
        wanted = self.client.spec.layers if layers is None else tuple(layers)
        staging, host = self._room(wanted, ids.size)
        try:
            step = self.client.prefetch(
                ids.reshape(-1),
                bounds,
                None if lookback is None else _array("lookback", lookback, np.int32),
                None if mask is None else mask.reshape(-1),
                None if lookback_dead is None else _array("lookback_dead", lookback_dead, np.bool_),
                layers=wanted,
                out={layer: rows.numpy() for layer, rows in host.items()},
                timeout_s=timeout_s,
            )
        except BaseException:
            self._give_back(staging)
            raise
        return PooledStep(self, step, ids.shape, host, staging)

    def dummy(self, *shape: int) -> "PooledStep":
        """A step of T, or B and S, tokens whose rows are zeros and not valid; no server is asked.

        For warm-up and profiling runs. Raises PoolError if all buffers are in use.
        """
        num_tokens = math.prod(shape)
        staging, host = self._room(self.client.spec.layers, num_tokens)
        try:
            step = self.client.dummy(num_tokens, out={layer: rows.numpy() for layer, rows in host.items()})
        except BaseException:
            self._give_back(staging)
            raise
        return PooledStep(self, step, shape, host, staging)

    def num_heads(self, layer: int) -> int:
        """Heads of a layer that the client gives: all, or as many as its own `heads` has. Raises SpecError."""
        return int(self._row_shapes[self.client.spec.table(layer).layer][0])

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _NoPool, ()

    def _room(self, layers: Sequence[int], num_tokens: int) -> "tuple[_Staging | None, dict[int, torch.Tensor]]":
        """Host memory for a step: uint8 [T, heads, row_bytes] a layer."""
        shapes = {layer: (num_tokens, *self._row_shapes[self.client.spec.table(layer).layer]) for layer in layers}
        if not self._staged:
            return None, {layer: torch.empty(shape, dtype=torch.uint8) for layer, shape in shapes.items()}
        if not self._buffers:
            raise PoolError("all buffers are in use: leave the `with` of a step, or `close` it, before the next start")
        staging = self._buffers.pop(0)
        return staging, staging.arrays(shapes)

    def _give_back(self, staging: "_Staging | None") -> None:
        if staging is not None:
            self._buffers.append(staging)

    def _on_device(self, host: torch.Tensor, staging: "_Staging | None") -> torch.Tensor:
        """Rows where the layers read them, in memory that no later step writes to."""
        if staging is None:
            return host
        if self._stream is None:
            return host.clone()
        with torch.cuda.stream(self._stream):
            rows = host.to(self.device, non_blocking=True)
            copied = self._stream.record_event()
        staging.copies.append(copied)
        reader = torch.cuda.current_stream(self.device)
        reader.wait_event(copied)
        rows.record_stream(reader)  # it was allocated on the other stream
        return rows


class PooledStep:
    """One forward's rows. From `EngramPool.start`; the forward runs in `with` of it.

    shape: [T] or [B, S], as the ids came. step: the client's own, with its times and waits.
    """

    def __init__(
        self,
        pool: EngramPool,
        step: Step,
        shape: Sequence[int],
        host: Mapping[int, torch.Tensor],
        staging: "_Staging | None",
    ) -> None:
        self.step, self.shape = step, tuple(shape)
        self._pool, self._staging = pool, staging
        self._host = dict(host)
        self._rows: dict[int, torch.Tensor] = {}
        self._closed = False

    def rows(self, layer: int) -> torch.Tensor:
        """Wait for one layer only: uint8 [*shape, heads, row_bytes] on the pool's device. Raises as `Step.rows`."""
        self._check_open()
        if layer not in self._rows:
            self.step.rows(layer)  # they are in `host` by then
            rows = self._pool._on_device(self._host[layer], self._staging)
            self._rows[layer] = rows.view(*self.shape, *rows.shape[1:])
        return self._rows[layer]

    def embeddings(self, layer: int, heads: tuple[int, int] | None = None) -> torch.Tensor:
        """`rows` as numbers: [*shape, heads, dim] of the pool's dtype. heads: (start, stop): only these of them."""
        table = self._pool.client.spec.table(layer)
        rows = self.rows(layer)
        if heads is not None:
            rows = rows[..., heads[0] : heads[1], :]
        return dequantize(rows, table.row_format, table.scale, self._pool.dtype)

    def valid(self, layer: int) -> torch.Tensor:
        """Wait for one layer only: bool [*shape] on the device, False where rows are zeros for want of an answer.

        All True, except of a client with on_failure="mask" and of a dummy step.
        """
        self._check_open()
        return torch.from_numpy(np.array(self.step.valid(layer))).to(self._pool.device).view(self.shape)

    def close(self) -> None:
        """End the step: what is still on its way is cancelled, its buffers serve the next. Tensors taken stay good."""
        if self._closed:
            return
        self._closed = True
        if len(self.step.arrived_s) < len(self.step.layers):  # else its end is near, and not worth a connection
            self.step.cancel()  # no more is written into the buffers after this
        self._pool._give_back(self._staging)
        self._host.clear()
        self._rows.clear()

    def __enter__(self) -> Self:
        self._check_open()
        if self._pool._running is not None:
            raise PoolError("another step of this pool is running: one forward at a time")
        self._pool._running = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool._running = None
        self.close()

    def __del__(self) -> None:
        """Of one that nobody closed: its buffers serve the next, once nothing is written into them any more."""
        if not getattr(self, "_closed", True):
            self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise PoolError("the step has ended: start another for each forward")


class _NoPool:
    """In the place of a pool that a model was saved without."""

    @property
    def running(self) -> PooledStep:
        raise PoolError("this model was saved without its pool: set `pool` of each PooledEmbedding to an EngramPool")


class PooledEmbedding(nn.Module):
    """What a model has in the place of an Engram layer's embedding: no parameters, the rows come from the pool.

    heads: (start, stop): only these of the heads that the client has; None for all.
    num_heads, embedding_dim: heads that it gives, and values of each.

    A copy (`copy.deepcopy`) shares the pool. Saved by `torch.save`, it is saved without: set `pool` after loading.
    Raises SpecError for a layer without a table, or rows that `dequantize` cannot read, ValueError for other heads.
    """

    def __init__(self, pool: EngramPool, layer: int, heads: tuple[int, int] | None = None) -> None:
        super().__init__()
        table = pool.client.spec.table(layer)
        self.embedding_dim, _ = _check_format(table.row_format, table.scale)
        self.pool, self.layer = pool, layer
        self.heads = columns(heads, pool.num_heads(layer))
        self.num_heads = pool.num_heads(layer) if self.heads is None else self.heads[1] - self.heads[0]

    def forward(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        """[*shape, num_heads, dim] of the running step, in the pool's dtype; waits for this layer's rows only.

        ids: row ids [*shape, heads], if the model has them; they are not looked at, but their shape must be the step's.
        Raises what the lookup failed with, PoolError outside of a step, BatchError for ids of another shape.
        """
        step = self.pool.running
        if ids is not None and tuple(ids.shape[:-1]) != step.shape:
            raise BatchError(f"ids are for {list(ids.shape[:-1])} tokens, the running step for {list(step.shape)}")
        return step.embeddings(self.layer, self.heads)

    @property
    def valid(self) -> torch.Tensor:
        """Bool [*shape]: where the gate may open; see `PooledStep.valid`."""
        return self.pool.running.valid(self.layer)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        target = self.pool.client.target if isinstance(self.pool, EngramPool) else None
        heads = "" if self.heads is None else f"heads={self.heads}, "
        return f"layer={self.layer}, {heads}embedding_dim={self.embedding_dim}, target={target!r}"

    def _load_from_state_dict(self, *_: Any) -> None:
        """Take nothing from a checkpoint that holds the table, and miss nothing in one that does not."""


class _Staging:
    """Host memory that steps take turns in: one buffer a layer, as large as the largest step so far.

    copies: CUDA events of the copies out of it; what is copied must not be overwritten before.
    """

    def __init__(self, pinned: bool) -> None:
        self.copies: list[Any] = []
        self._pinned = pinned
        self._buffers: dict[int, torch.Tensor] = {}

    def arrays(self, shapes: Mapping[int, tuple[int, ...]]) -> dict[int, torch.Tensor]:
        """Uint8 tensors of these shapes, once nobody reads what was there."""
        for copied in self.copies:
            copied.synchronize()
        self.copies.clear()
        arrays = {}
        for layer, shape in shapes.items():
            size = math.prod(shape)
            if layer not in self._buffers or self._buffers[layer].numel() < size:
                self._buffers[layer] = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
            arrays[layer] = self._buffers[layer][:size].view(shape)
        return arrays


def _check_format(row_format: RowFormat, scale: float | None) -> tuple[int, int]:
    """Values and scales in a row. Raises SpecError for what `dequantize` does not know the meaning of."""
    values, *others = row_format.segments
    known = values.name == "values" and values.dtype in _FLOATS
    if known and not others:
        return values.length, 0
    if known and len(others) == 1 and scale is None:
        scales = others[0]
        if (scales.name, scales.dtype) == ("scales", "float8_e8m0fnu") and values.length % scales.length == 0:
            return values.length, scales.length
    found = ", ".join(f"{s.name} {s.dtype} x {s.length}" for s in row_format.segments)
    raise SpecError(
        f"rows of {found}{'' if scale is None else ' with one scale for the table'} are not known to be numbers; "
        "take the bytes with `PooledStep.rows`"
    )


def _aligned(segment: torch.Tensor, itemsize: int) -> torch.Tensor:
    """The same bytes where a view of elements of `itemsize` bytes is possible; themselves if they are already."""
    if itemsize == 1:
        return segment
    segment = segment.contiguous()
    return segment.clone() if segment.storage_offset() % itemsize else segment


def _array(name: str, values: Ids, dtype: type[np.int32] | type[np.bool_]) -> npt.NDArray[Any]:
    """`values` as a numpy array of `dtype`. Raises BatchError if that would change any of them."""
    return exactly(name, values.detach().cpu() if isinstance(values, torch.Tensor) else values, dtype)
