"""Rows as tensors of a PyTorch model. Needs the extra `torch`.

pool = EngramPool(Client("memory-node:50051"), device="cuda")
embedding = PooledEmbedding(pool, layer=1)  # in the place of the layer's nn.Embedding
with pool.start(input_ids):                 # as soon as the token ids are known
    model(input_ids)                        # embedding() waits for the rows of layer 1 only
"""

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from engrampool_client.client import Client
from engrampool_client.config import columns
from engrampool_client.errors import BatchError, PoolError
from engrampool_client.integrations.torch_copies import Copies, Cpu, Gpu, Staging
from engrampool_client.integrations.torch_numbers import check_dtype, check_format, dequantize
from engrampool_client.lookup.landing import by_layer
from engrampool_client.lookup.step import Step
from engrampool_proto.hashing import exactly

__all__ = ["EngramPool", "PooledEmbedding", "PooledStep", "dequantize", "lookback_of"]
# What token ids, boundaries and masks may come as: on any device, of any integer type that holds them.
Ids: TypeAlias = torch.Tensor | npt.ArrayLike


def copies_to(device: torch.device) -> Cpu | Gpu:
    """What copies rows to a device."""
    return Gpu(device) if device.type == "cuda" else Cpu()


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
    copy_on_arrival: whether a layer's rows are copied out of such a buffer when they come, by the thread that had them
        come, or when the layer asks for them, by its own. None: when they come, except for a small step, whose rows
        would have to be received by another thread for that.
    max_tokens: if given, the rows of every step, which has no more tokens, land in the same memory (`landing`).
    device_waits: whether the GPU waits for rows, and not the thread that launches its work; docs/INTEGRATION_TORCH.md
        says what must not be done then. A layer's failure is raised by the next call of its step, or by leaving `with`.

    The client stays the caller's to close, after the last step. A copy of the pool is itself. A model is saved without
    it, which the layers say when they are run.

    Raises ValueError for settings that cannot be, OSError or RuntimeError for a GPU that cannot wait.
    """

    def __init__(
        self,
        client: Client,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        buffers: int = 2,
        staging: bool | None = None,
        copy_on_arrival: bool | None = None,
        max_tokens: int | None = None,
        device_waits: bool = False,
    ) -> None:
        check_dtype(dtype)
        for name, value in (("buffers", buffers), ("max_tokens", 1 if max_tokens is None else max_tokens)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; it is {value}")
        self.client, self.device, self.dtype, self.max_tokens = client, torch.device(device), dtype, max_tokens
        self._device = copies_to(self.device)
        self._copy_on_arrival, self._device_waits = copy_on_arrival, device_waits
        self._staged = (self._device.pinned if staging is None else staging) or device_waits
        waited_for = client.spec.layers if device_waits else ()
        self._buffers = [Staging(self._device.pinned, waited_for) for _ in range(buffers)]
        if waited_for:  # of no effect, but where that cannot be
            self._device.wait_word(self._buffers[0].word(waited_for[0]), 0)
        self._turn, self._lock = 0, threading.RLock()
        # [heads, row_bytes] by layer, as the client gives them: it may be one for some heads only.
        nothing = client.dummy(0)
        self._row_shapes = {layer: nothing.rows(layer).shape[1:] for layer in client.spec.layers}
        self._landings: dict[int, torch.Tensor] = {}
        if max_tokens is not None:
            for layer, shape in self._row_shapes.items():
                self._landings[layer] = torch.zeros((max_tokens, *shape), dtype=torch.uint8, device=self.device)
        self._landed = dict.fromkeys(self._landings, 0)  # tokens beyond which a landing is zeros
        self._running: PooledStep | None = None

    @property
    def running(self) -> "PooledStep":
        """The step whose `with` the caller is in. Raises PoolError outside of any."""
        if self._running is None:
            raise PoolError("no step is running: call the model inside `with pool.start(input_ids):`")
        return self._running

    def start(
        self,
        input_ids: Ids | None = None,
        query_start_loc: Ids | None = None,
        lookback: Ids | None = None,
        dead: Ids | None = None,
        lookback_dead: Ids | None = None,
        *,
        rows: Mapping[int, Ids] | None = None,
        layers: Sequence[int] | None = None,
        timeout_s: float | None = None,
    ) -> "PooledStep":
        """Start the lookup of a forward's rows and return at once; run the forward in `with` of what is returned.

        input_ids: [T] as `Client.prefetch` takes it, with query_start_loc [R + 1] if there are several requests; or
        [B, S], a request a line. lookback: [R, <= n - 1], see `lookback_of`; by default every request starts here.
        dead: bool, of the shape of input_ids: tokens outside any n-gram, padding for instance.
        rows: in the place of all these, the row ids of a model that hashes itself: layer -> integers [*shape, heads],
        of the heads that the client has, with the same shape for every layer.
        Ids on a GPU are fetched from there, which waits for whatever computes them.

        Raises as `Client.prefetch` does, and PoolError if all buffers are in use.
        """
        if rows is not None:
            if any(given is not None for given in (input_ids, query_start_loc, lookback, dead, lookback_dead, layers)):
                raise BatchError("rows say what is asked for: tokens, or layers, cannot be given beside them")
            return self._start_rows(rows, timeout_s)
        if input_ids is None:
            raise BatchError("input_ids or rows must be given")
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
        before = None if lookback is None else _array("lookback", lookback, np.int32)
        dead_before = None if lookback_dead is None else _array("lookback_dead", lookback_dead, np.bool_)
        flat_mask = None if mask is None else mask.reshape(-1)

        def begin(out: dict[int, npt.NDArray[np.uint8]]) -> Step:
            return self.client.prefetch(
                ids.reshape(-1), bounds, before, flat_mask, dead_before, layers=wanted, out=out, timeout_s=timeout_s
            )

        return self._begin(begin, wanted, ids.shape)

    def dummy(self, *shape: int) -> "PooledStep":
        """A step of T, or B and S, tokens whose rows are zeros and not valid; no server is asked.

        For warm-up and profiling runs. Raises PoolError if all buffers are in use.
        """
        num_tokens = math.prod(shape)
        return self._begin(lambda out: self.client.dummy(num_tokens, out=out), self.client.spec.layers, shape)

    def landing(self, layer: int) -> torch.Tensor:
        """Where a layer's rows of every step land: uint8 [max_tokens, heads, row_bytes], always the same tensor.

        `PooledStep.rows` has them copied there on the stream that is current; beyond the step's tokens are zeros.
        Raises ValueError without `max_tokens`, SpecError.
        """
        if self.max_tokens is None:
            raise ValueError("rows land in the same memory only with EngramPool(max_tokens=...)")
        return self._landings[self.client.spec.table(layer).layer]

    def num_heads(self, layer: int) -> int:
        """Heads of a layer that the client gives: all, or as many as its own `heads` has. Raises SpecError."""
        return int(self._row_shapes[self.client.spec.table(layer).layer][0])

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _NoPool, ()

    def _start_rows(self, rows: Mapping[int, Ids], timeout_s: float | None) -> "PooledStep":
        ids: dict[int, npt.NDArray[Any]] = {}
        for layer, given in by_layer("rows", rows).items():
            name, heads = f"rows of layer {layer}", self.num_heads(layer)
            array = ids[self.client.spec.table(layer).layer] = _row_ids(name, given)
            shape = next(iter(ids.values())).shape
            if array.shape != shape or array.ndim < 2 or shape[-1] != heads:
                raise BatchError(f"{name} must be [*shape, {heads}], as of every layer; they are {list(array.shape)}")
        if not ids:
            raise BatchError("a lookup needs at least one layer")
        flat = {layer: array.reshape(-1, array.shape[-1]) for layer, array in ids.items()}
        return self._begin(
            lambda out: self.client.prefetch_rows(flat, out=out, timeout_s=timeout_s), tuple(flat), shape[:-1]
        )

    def _begin(
        self, begin: Callable[[dict[int, npt.NDArray[np.uint8]]], Step], layers: Sequence[int], shape: Sequence[int]
    ) -> "PooledStep":
        """A step that `begin` makes, of memory for its rows."""
        num_tokens = math.prod(shape)
        if self.max_tokens is not None and num_tokens > self.max_tokens:
            raise BatchError(f"{num_tokens} tokens are more than max_tokens, {self.max_tokens}")
        shapes = {layer: (num_tokens, *self._row_shapes[self.client.spec.table(layer).layer]) for layer in layers}
        copies = self._take_buffer() if self._staged else None
        try:
            if copies is None:
                host = {layer: torch.empty(shape, dtype=torch.uint8) for layer, shape in shapes.items()}
            else:
                host = copies.arrays(shapes)
            step = begin({layer: rows.numpy() for layer, rows in host.items()})
            begun = PooledStep(self, step, shape, host, copies)
        except BaseException:
            if copies is not None:
                copies.forget()
            raise
        try:
            if copies is not None:
                if self._device_waits:
                    copies.issue_all()
                # Rows of a small step come in the thread that waits for them, unless somebody is to be told of them.
                by_themselves = step.delivery.receiver is None
                if self._device_waits or (by_themselves if self._copy_on_arrival is None else self._copy_on_arrival):
                    step.add_callback(copies.settled)
        except BaseException:
            begun.close()
            raise
        return begun

    def _take_buffer(self) -> Copies:
        with self._lock:
            for turn in range(self._turn, self._turn + len(self._buffers)):
                staging = self._buffers[turn % len(self._buffers)]
                if staging.free:
                    self._turn = turn + 1
                    return Copies(self._device, staging)
        raise PoolError("all buffers are in use: leave the `with` of a step, or `close` it, before the next start")

    def _land(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """Copy a layer's rows to where they always land, after whatever the caller's stream did before."""
        landing, before = self._landings[layer], self._landed[layer]
        self._landed[layer] = max(before, len(rows))
        landing[: len(rows)].copy_(rows)
        if before > len(rows):
            landing[len(rows) : before].zero_()
        self._landed[layer] = len(rows)
        return landing[: len(rows)]


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
        copies: Copies | None,
    ) -> None:
        self.step, self.shape = step, tuple(shape)
        self._pool, self._copies = pool, copies
        self._host = dict(host)
        self._rows: dict[int, torch.Tensor] = {}
        self._closed = self._over = False

    def rows(self, layer: int) -> torch.Tensor:
        """Wait for one layer only: uint8 [*shape, heads, row_bytes] on the pool's device. Raises as `Step.rows`.

        With `max_tokens` they are in `EngramPool.landing`, until the next step's are. With `device_waits` it is the
        stream that is current which waits; rows that do not come are zeros then.
        """
        self._check_open()
        if layer not in self._rows:
            if not self._pool._device_waits or self.step.delivery.settled(layer):
                self.step.rows(layer)  # they are in `host` by then
            self.step.check_layer(layer)
            if self._pool.max_tokens is not None and self._pool._running not in (None, self):
                raise PoolError("another step of this pool is running, and its rows are where these would land")
            rows = self._host[layer] if self._copies is None else self._copies.read(layer)
            if rows is None:
                raise PoolError("the step has ended: start another for each forward")
            if self._pool.max_tokens is not None:
                rows = self._pool._land(layer, rows)
            self._rows[layer] = rows.view(*self.shape, *rows.shape[1:])
        return self._rows[layer]

    def embeddings(
        self, layer: int, heads: tuple[int, int] | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`rows` as numbers: [*shape, heads, dim] of the pool's dtype. heads: (start, stop): only these of them.

        out: where they are written to, see `dequantize`.
        """
        table = self._pool.client.spec.table(layer)
        rows = self.rows(layer)
        if heads is not None:
            rows = rows[..., heads[0] : heads[1], :]
        return dequantize(rows, table.row_format, table.scale, self._pool.dtype, out)

    def valid(self, layer: int) -> torch.Tensor:
        """Wait for one layer only: bool [*shape] on the device, False where rows are zeros for want of an answer.

        All True, except of a client with on_failure="mask" and of a dummy step.
        """
        self._check_open()
        return torch.from_numpy(np.array(self.step.valid(layer))).to(self._pool.device).view(self.shape)

    def close(self) -> None:
        """End the step: what is still on its way is cancelled, its buffers serve the next. Tensors taken stay good."""
        if self._over:
            return
        self._closed = True
        if len(self.step.arrived_s) < len(self.step.layers):  # else its end is near, and not worth a connection
            self.step.cancel()  # no more is written into the buffers after this
        if self._copies is not None:
            self._copies.end(self.step.delivery.rows)
        self._host.clear()
        self._rows.clear()
        self._over = True

    def __enter__(self) -> Self:
        self._check_open()
        if self._pool._running is not None:
            raise PoolError("another step of this pool is running: one forward at a time")
        self._pool._running = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._pool._device_waits:
                for layer in self._rows:  # the GPU waits for them, and is to have them
                    self.step.rows(layer)
        finally:
            self._pool._running = None
            self.close()

    def __del__(self) -> None:
        """Of one that nobody closed: its buffers serve the next, once nothing is written into them any more."""
        if not getattr(self, "_over", True):
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
        self.embedding_dim, _ = check_format(table.row_format, table.scale)
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


def _array(name: str, values: Ids, dtype: type[np.int32] | type[np.bool_]) -> npt.NDArray[Any]:
    """`values` as a numpy array of `dtype`. Raises BatchError if that would change any of them."""
    return exactly(name, values.detach().cpu() if isinstance(values, torch.Tensor) else values, dtype)


def _row_ids(name: str, values: Ids) -> npt.NDArray[Any]:
    """`values` as a numpy array. Raises BatchError for what is no array of integers."""
    try:
        ids = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values)
    except (TypeError, ValueError, OverflowError) as error:
        raise BatchError(f"{name} cannot be made an array: {error}") from error
    if ids.dtype.kind not in "iu" and ids.size:
        raise BatchError(f"{name} must be integers; they are {ids.dtype.name}")
    return ids if ids.size else ids.astype(np.int32)
