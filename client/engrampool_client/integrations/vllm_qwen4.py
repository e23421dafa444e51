"""What stands in vLLM's Qwen4: n-gram tables without rows, and three methods that have rows come from the pool.

Rows come in a forward, so graphs must run Python between their pieces, or there are none. Imported by `vllm.py` alone.
"""

from collections.abc import Iterable
from functools import wraps
from typing import Any, ClassVar

import torch
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import get_current_vllm_config
from vllm.models.qwen4_exp.common import ngram_embedding as common
from vllm.models.qwen4_exp.nvidia import ngram_embedding as nvidia
from vllm.platforms import current_platform

from engrampool_client.errors import PoolError
from engrampool_client.integrations import engine
from engrampool_client.integrations.vllm_engram import check_mode, worker

# The engine's two, which differ in where rows lie.
_TABLES = ("Qwen4ExpPLEPinnedHostEmbedding", "Qwen4ExpPLEDeviceEmbedding")

# What a table has one of, as the loader of weights names it; NVFP4's first one is of blocks, and has no elements here.
_SCALES = {"ngram_embedding.weight_scale", "ngram_embedding.weight_scale_2"}


class PooledTable(common.Qwen4ExpPLEPinnedHostEmbedding):
    """In the place of a layer's table: its parameters, of no rows. What a table has one scale of is loaded as ever.

    columns: of the row ids, those that this rank asks for. The ranks add up the bytes that they have, as they do with
    the engine's own tables. layer: its number, counted from 1, once the embedding is made.
    """

    supports_prefetch: ClassVar[bool] = True
    layer: int

    def __init__(self, *arguments: Any, num_ngram_heads: int, max_total_tokens: int, **named: Any) -> None:
        check_settings(get_current_vllm_config())
        # Not the base's own, which lays its table into memory that a GPU reads.
        common.Qwen4ExpPLEEmbedding.__init__(self, *arguments, **named)
        if self.etp_data_parallel_size > 1:
            raise RuntimeError(
                "rows come from the pool to each data-parallel rank by itself: start vLLM without embedding_across_dp "
                "in --engram-config"
            )
        self.heads, self.max_tokens = num_ngram_heads, max_total_tokens
        self.columns = engine.columns_of(num_ngram_heads, self.tp_rank, self.tp_size)
        worker().connect(self.columns, num_ngram_heads)

    def allocate_embedding_weight(self, num_embeddings: int, embedding_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """No rows."""
        return torch.empty(0, embedding_dim, dtype=dtype)

    def weight_loader(
        self, param: torch.Tensor, loaded_weight: torch.Tensor, checkpoint_start: int | None = None
    ) -> None:
        """Load what is no row: the one scale of a table."""
        if param.dim() != 2:
            super().weight_loader(param, loaded_weight, checkpoint_start)

    @property
    def segments(self) -> list[tuple[str, int]]:
        """What a row is made of: the type and length of each part, as the pool has it."""
        if isinstance(self.embedding_method, common.Qwen4ExpPLENvFp4EmbeddingMethod):
            return [("float4_e2m1fn_x2", self.weight.shape[1]), ("float8_e4m3fn", self.weight_scale.shape[1])]
        return [(str(self.weight.dtype).removeprefix("torch."), self.embedding_dim)]

    def start_prefetch(self, ngram_ids: torch.Tensor) -> None:
        """Start the lookup of a forward's rows. ngram_ids: int64 [tokens, heads]."""
        _start(self, ngram_ids)

    def finalize_prefetch(self, total_tokens: int) -> torch.Tensor:
        """Rows as the engine keeps them, [tokens, heads * dim], of all ranks unless the caller adds them up."""
        dtype = self.embedding_method.lookup_dtype(self)
        output = torch.empty(total_tokens, self.heads * self.embedding_dim, dtype=dtype, device=self.weight.device)
        _finish(self, output)
        return output

    def _lookup(self, input_ids: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor:
        raise PoolError("this table's rows are in the pool: start_prefetch asks for them")

    def fill(self, rows: torch.Tensor, output: torch.Tensor) -> None:
        """Write this rank's rows, uint8 [tokens, columns, row_bytes], where the engine wants them."""
        places = output.unflatten(-1, (self.heads, self.embedding_dim))[:, self.columns]
        if isinstance(self.embedding_method, common.Qwen4ExpPLENvFp4EmbeddingMethod):
            places.copy_(self._nvfp4_numbers(rows))
        else:
            places.view(torch.uint8).copy_(rows)

    def _nvfp4_numbers(self, rows: torch.Tensor) -> torch.Tensor:
        """By the engine's own kernel, for which these rows are a table."""
        numbers = torch.empty(*rows.shape[:2], self.embedding_dim, dtype=self.params_dtype, device=rows.device)
        count, width = numbers.numel() // self.embedding_dim, self.weight.shape[1]
        if count:
            common._lookup_nvfp4_ple_embedding_kernel[(count,)](
                rows[..., :width].contiguous(),
                rows[..., width:].contiguous(),
                self.weight_scale_2,
                torch.arange(count, device=rows.device),
                numbers,
                self.embedding_dim,
                0,
                count,
                BLOCK_D=common.triton.next_power_of_2(self.embedding_dim),
            )
        return numbers


def check_settings(vllm_config: Any) -> None:
    """Raise RuntimeError for a vLLM that was started in a way that this cannot serve."""
    if current_platform.is_rocm():
        raise RuntimeError("rows of Qwen4 come from the pool to vLLM's code for NVIDIA's GPUs only")
    if check_mode(vllm_config):
        raise RuntimeError(
            "rows of Qwen4 come from the pool between the pieces of a graph, or without graphs, and "
            f"{vllm_config.compilation_config.cudagraph_mode} has graphs of whole forwards: start vLLM with "
            '--compilation-config \'{"cudagraph_mode": "PIECEWISE"}\', or with --enforce-eager'
        )


@eager_break_during_capture
def _start(table: PooledTable, ngram_ids: torch.Tensor) -> None:
    own = ngram_ids[:, table.columns]
    staging = worker().staging
    assert staging is not None
    # As the host's memory has them: where types differ, PyTorch waits for the copy.
    staging.start(table.layer, own.int() if own.is_cuda else own)


@eager_break_during_capture
def _finish(table: PooledTable, output: torch.Tensor) -> None:
    """Wait for a layer's rows, write them, and add up what the ranks have."""
    staging = worker().staging
    assert staging is not None
    rows = staging.rows(table.layer)
    if rows is None or table.tp_size > 1:
        output.view(torch.uint8).zero_()
    if rows is not None:
        if len(rows) != len(output):
            raise PoolError(f"rows of {len(rows)} tokens were asked for, and of {len(output)} are wanted")
        if output.is_cuda:
            rows = rows.to(output.device, non_blocking=True)
            staging.copied()
        table.fill(rows, output)
    if table.reduce_results and table.tp_size > 1:
        output.copy_(table._reduce_etp_embeddings(output))


def start_prefetch(
    self: Any, input_ids: torch.Tensor, query_start_loc: torch.Tensor, ngram_context: torch.Tensor
) -> None:
    """Where the first layer's lookup starts, start that of all layers: they are one request."""
    embeddings = worker().layers
    if self is embeddings[0]:
        for one in embeddings:
            _start_one(one, input_ids, query_start_loc, ngram_context)


def _made(embedding: Any, config: Any, index: int) -> None:
    """An n-gram embedding is made; all of them, if it is the last."""
    table = embedding.ngram_embedding
    table.layer = engine.ngram_layer(config, index)
    embeddings = worker().layers
    embeddings.append(embedding)
    if len(embeddings) == len(set(config.ple_layer_ids)):
        check_served(embeddings)
        numbers = [one.ngram_embedding.layer for one in embeddings]
        worker().ready(numbers, table.columns, table.max_tokens, table.weight.device)


def check_served(embeddings: list[Any]) -> None:
    """Refuse a server that does not serve what these hash and read. Raises FingerprintError."""
    client = worker().client
    assert client is not None
    by_layer = {one.ngram_embedding.layer: one for one in embeddings}
    engine.check_ngram_served(client, by_layer, embeddings[0].ngram_embedding.segments)


_start_one = nvidia.Qwen4ExpNGramEmbedding.start_prefetch


def install() -> None:
    """Put all this into the engine, once, after `vllm_engram.install`."""
    embedding = nvidia.Qwen4ExpNGramEmbedding
    if embedding.start_prefetch is start_prefetch:
        return
    for module in (common, nvidia):
        for name in _TABLES:
            setattr(module, name, PooledTable)
    made, loaded = embedding.__init__, embedding.load_weights

    @wraps(made)
    def make_and_check(self: Any, config: Any, dim: int, ple_dense_layer_id: int, *more: Any, **named: Any) -> None:
        made(self, config, dim, ple_dense_layer_id, *more, **named)
        _made(self, config, ple_dense_layer_id)

    @wraps(loaded)
    def load_and_check(self: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        names: set[str] = loaded(self, weights)
        check_served(worker().layers)  # a checkpoint brings constants of its own
        client = worker().client
        for name in _SCALES & names:
            scale = self.get_parameter(name)
            if scale.numel() == 1:
                assert client is not None
                engine.check_scale(client, self.ngram_embedding.layer, scale)
        return names

    embedding.__init__, embedding.load_weights = make_and_check, load_and_check
    embedding.start_prefetch = start_prefetch
