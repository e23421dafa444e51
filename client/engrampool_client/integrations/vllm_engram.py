"""What stands in vLLM's Engram layers: a table without rows, and four methods that have rows come from the pool.

For graphs that run Python between their pieces, or none (`--enforce-eager`). Imported by `vllm.py` alone.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.models.deepseek_v41.common import engram

from engrampool_client.client import Client
from engrampool_client.errors import PoolError
from engrampool_client.integrations import engine
from engrampool_client.integrations.staging import Staging
from engrampool_client.integrations.vllm import check_parameters

# Rows are made numbers of so many tokens at a time, which bounds what that takes.
_AT_ONCE = 1024
_MODES = (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE)


class _Worker:
    """What this process has. client: from the first Engram layer on. staging: once all layers are made, and checked."""

    client: Client | None = None
    staging: Staging | None = None

    def __init__(self) -> None:
        self.layers: list[Any] = []


_worker = _Worker()


class PooledTable(engram.ParallelEngramEmbedding):
    """In the place of a layer's table: the same shards and parameters, of no rows.

    columns: of the row ids, those that are this rank's. What the engine has beyond the last head stays zeros.
    A checkpoint's table is loaded into it by the engine's own loader, which takes no rows of it.
    """

    # The pool is not sharded over data-parallel ranks; the engine asks its tables whether they are.
    dp_size = property(lambda self: 1, lambda self, value: None)

    def __init__(self, layout: Any, layer_hash_index: int) -> None:
        heads = tuple(size for order in layout.primes[layer_hash_index] for size in order)
        super().__init__(layout.num_embeddings[layer_hash_index], layout.head_dim, heads)
        self.layer = layout.layer_ids[layer_hash_index]
        self.columns = slice(self.head_start, min(self.head_start + self.part_n_hash_cols, self.n_hash_cols))

    def _allocate_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.empty(0, self.dim, dtype=torch.float8_e4m3fn)
        return values, torch.empty(0, self.dim // self.block_size, dtype=torch.uint8)

    def _storage(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise PoolError("this table's rows are in the pool: Engram.prepare_embeddings asks for them")


def _create_embedding(self: Any, layout: Any, layer_hash_index: int) -> PooledTable:
    compilation = engram.get_current_vllm_config().compilation_config
    if compilation.cudagraph_mode not in _MODES or compilation.mode != CompilationMode.NONE:
        raise RuntimeError(
            "rows come from the pool between the pieces of a graph, or without graphs: start vLLM with "
            '--compilation-config \'{"cudagraph_mode": "PIECEWISE"}\' and without VLLM_USE_BREAKABLE_CUDAGRAPH=0, or '
            f"with --enforce-eager; now there are {compilation.cudagraph_mode} and {compilation.mode}"
        )
    table = PooledTable(layout, layer_hash_index)
    if _worker.client is None:
        every = table.columns == slice(0, table.n_hash_cols)
        heads = None if every else (table.columns.start, table.columns.stop)
        _worker.client = Client.from_environment(os.environ, heads=heads)
    _worker.layers.append(self)
    return table


def _init_staging(self: Any, max_tokens: int, head_dim: int) -> None:
    table = self.embed_tokens
    # Of fixed addresses, as graphs read it. Columns beyond the last head are never written, and stay zeros.
    self.staged_rows = torch.zeros(max_tokens, table.part_n_hash_cols, head_dim, dtype=torch.bfloat16)
    self._prefetch_stream = None


def prepare_embeddings(self: Any, hash_ids: torch.Tensor) -> None:
    """Start the lookup of a forward's rows. hash_ids: of all columns, -1 for tokens without rows."""
    assert hash_ids.shape[0] <= self.staged_rows.shape[0], "engram staging buffer too small"
    _start(self, hash_ids)


@eager_break_during_capture
def _start(layer: Any, hash_ids: torch.Tensor) -> None:
    table = layer.embed_tokens
    assert _worker.staging is not None
    _worker.staging.start(table.layer, hash_ids[:, table.columns])


def _ready_rows(self: Any, num_tokens: int) -> torch.Tensor:
    rows = self.staged_rows[:num_tokens]
    _finish(self, rows)
    return rows


@eager_break_during_capture
def _finish(layer: Any, staged: torch.Tensor) -> None:
    """Wait for the layer's rows, and write their numbers where the layer reads them."""
    table = layer.embed_tokens
    assert _worker.staging is not None
    rows = _worker.staging.rows(table.layer)
    staged = staged[:, : table.columns.stop - table.columns.start]
    if rows is None:
        staged.zero_()
        return
    if len(rows) != len(staged):
        raise PoolError(f"rows of {len(rows)} tokens were asked for, and of {len(staged)} are wanted")
    if staged.is_cuda:
        rows = rows.to(staged.device, non_blocking=True)
        _worker.staging.copied()
    for at in range(0, len(rows), _AT_ONCE):
        numbers(rows[at : at + _AT_ONCE], table.dim, table.block_size, staged[at : at + _AT_ONCE])


def numbers(rows: torch.Tensor, dim: int, block: int, out: torch.Tensor) -> None:
    """Rows as the engine's kernel has them: a scale's byte is a float's exponent, so 0 is zero, and 255 infinity."""
    values = rows[..., :dim].view(torch.float8_e4m3fn).to(torch.float32)
    scales = (rows[..., dim:].to(torch.int32) << 23).view(torch.float32)
    out.copy_((values.unflatten(-1, (-1, block)) * scales.unsqueeze(-1)).flatten(-2))


def check_served(client: Client, state: Any) -> None:
    """Refuse a server that does not serve what this engine's hashes are of. Raises FingerprintError."""
    layout = state.layout
    heads = {
        layer: [size for order in orders for size in order]
        for layer, orders in zip(layout.layer_ids, layout.primes, strict=True)
    }
    multipliers = {layer: state.multipliers[at].tolist() for at, layer in enumerate(layout.layer_ids)}
    engine.check_served(client, heads, layout.head_dim, state.token_map.cpu().numpy(), multipliers, state.pad_id)


def _made(state: Any) -> None:
    """All of this process's Engram layers are made, and what they hash by."""
    if _worker.client is None:
        return
    check_served(_worker.client, state)
    tables = [layer.embed_tokens for layer in _worker.layers]
    columns, staged = tables[0].columns, _worker.layers[0].staged_rows
    _worker.staging = Staging(
        _worker.client,
        [table.layer for table in tables],
        columns.stop - columns.start,
        len(staged),
        staged.device,
    )


def install() -> None:
    """Put all this into the engine, once. Raises RuntimeError if its functions are others than expected."""
    if engram.Engram.prepare_embeddings is prepare_embeddings:
        return
    check_parameters()
    from vllm.v1.worker.gpu_worker import Worker

    for function in (_create_embedding, _init_staging, prepare_embeddings, _ready_rows):
        setattr(engram.Engram, function.__name__, function)
    made = engram.NgramHashState.__init__

    @wraps(made)
    def make_and_check(self: Any, *arguments: Any, **named: Any) -> None:
        made(self, *arguments, **named)
        _made(self)

    engram.NgramHashState.__init__ = make_and_check
    for name in ("determine_available_memory", "compile_or_warm_up_model", "execute_dummy_batch"):
        setattr(Worker, name, _quietly(getattr(Worker, name)))
    Worker.shutdown = _closing(Worker.shutdown)


def _quietly(run: Callable[..., Any]) -> Callable[..., Any]:
    """A method of the worker whose forwards are for warming up, profiling or capturing, or another rank's company."""

    @wraps(run)
    def quietly(self: Any, *arguments: Any, **named: Any) -> Any:
        with _worker.staging.quiet() if _worker.staging is not None else nullcontext():
            return run(self, *arguments, **named)

    return quietly


def _closing(shutdown: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(shutdown)
    def close_after(self: Any) -> Any:
        try:
            return shutdown(self)
        finally:
            close()

    return close_after


def close() -> None:
    """Give up what is under way, and let go of the client."""
    global _worker
    worker, _worker = _worker, _Worker()
    if worker.staging is not None:
        worker.staging.close()
    elif worker.client is not None:
        worker.client.close()
