"""What stands in SGLang's Qwen4: n-gram tables without rows, and hooks that have rows come from the pool.

For graphs that run Python between their pieces, or none. Imported by `sglang.py` alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph.breakable_cuda_graph import eager_on_graph
from sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph.context import is_in_breakable_cuda_graph
from sglang.srt.models import qwen4_exp
from sglang.srt.plugins.hook_registry import HookType
from sglang.srt.runtime_context import get_parallel

from engrampool_client.errors import PoolError
from engrampool_client.integrations import engine, sglang_engram
from engrampool_client.integrations.sglang_engram import refuse_capture, worker


class PooledTable(qwen4_exp.Qwen4ExpPinnedHostEmbedding):
    """In the place of a layer's table: its parameter, of no rows, which the engine's own loader fills with none.

    layer: its number, counted from 1; columns: of the row ids, those that this rank asks for, once the model is made.
    between: whether the forward that began runs in a break of a graph that the engine itself made.
    """

    layer: int
    columns: slice
    between = False

    def __init__(self, embedding: Any, *, backend: str = "pinned", table_dir: str | None = None) -> None:
        embedding.weight = torch.nn.Parameter(embedding.weight[:0], requires_grad=False)
        super().__init__(embedding)
        # The loader copies what a checkpoint's rows have in common with these.
        self.shard_indices = type(embedding.shard_indices)(*[0] * 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The numbers of a forward's rows, whose lookup began with its batch. input_ids: [tokens, heads]."""
        output = self.allocate_output((*input_ids.shape, self.embedding_dim), input_ids.device)
        if len(output):
            (_fill.run_eager if self.between else _fill)(self, output)
        return self.reduce(output)

    def gather(self, input_ids: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Raise PoolError: rows are asked for where a batch is prepared, and read by `forward`."""
        raise PoolError("this table's rows are in the pool: its forward has them")


def _refuse(_: Any, config: Any, *__: Any, **___: Any) -> None:
    """Before the engine makes a table: refuse what it was started with, if rows cannot come."""
    parallel = get_parallel()
    sglang_engram.check_settings(
        (
            (not config.ple_offload_embedding, "with --ple-offload-embedding"),
            (parallel.pp_size > 1, "without pipeline parallelism"),
            (
                parallel.attn_dp_size > 1 and not envs.SGLANG_USE_ATTN_TP_NGRAM.get(),
                "with SGLANG_USE_ATTN_TP_NGRAM=1, as there is data-parallel attention",
            ),
        )
    )


def _made(_: None, model: Any, config: Any, *__: Any, **___: Any) -> None:
    """The model is made, or a draft's, which has no tables: compare what is served with what it hashes and reads."""
    found = [one for one in model.modules() if isinstance(one, qwen4_exp.Qwen4ExpNGramEmbedding)]
    if not found:
        return
    embeddings = sorted(found, key=lambda one: one.ple_layer_index)
    for one in embeddings:
        table = one.ngram_embedding
        table.layer = engine.ngram_layer(config, one.ple_layer_index)
        ranks, table.columns = worker().connect(one.ngram_heads)
        assert ranks == table.tp_size
    worker().embeddings = embeddings
    check_served()
    layers = [one.ngram_embedding.layer for one in embeddings]
    worker().ready(layers, embeddings[0].ngram_embedding.columns, embeddings[0].layer_multipliers.device)


def check_served() -> None:
    """Refuse a server that does not serve what the model hashes and reads. Raises FingerprintError."""
    client, embeddings = worker().client, worker().embeddings
    assert client is not None
    table = embeddings[0].ngram_embedding
    segments = [(str(table.weight.dtype).removeprefix("torch."), table.embedding_dim)]
    engine.check_ngram_served(client, {one.ngram_embedding.layer: one for one in embeddings}, segments)


def _loaded(*_: Any, **__: Any) -> None:
    """A checkpoint was loaded, which brings constants of its own."""
    client, embeddings = worker().client, worker().embeddings
    if client is None or not embeddings:
        return
    check_served()
    for one in embeddings:
        engine.check_scale(client, one.ngram_embedding.layer, one.ngram_embedding.weight_scale)


def _prepared(batch: Any, input_ids: torch.Tensor, forward_batch: Any, **_: Any) -> None:
    """A forward's batch is there: hash it for all layers, and begin the lookup of their rows."""
    embeddings = worker().embeddings
    if batch is None or not batch.processed_tokens or not embeddings:
        return
    ids = torch.stack([one.compute_ngram_ids(batch) for one in embeddings], 1)
    if batch.mode.is_decode() and forward_batch.out_cache_loc is not None:
        # What pads a graph has no row. Its place in the cache is 0, by which the engine itself knows it.
        ids = ids.masked_fill((forward_batch.out_cache_loc[: len(ids)] == 0)[:, None, None], -1)
    between = is_in_breakable_cuda_graph() and forward_batch.forward_mode.is_extend()
    for one in embeddings:
        one.ngram_embedding.between = between
    (_start.run_eager if between else _start)(ids)


@eager_on_graph
def _start(ids: torch.Tensor) -> None:
    refuse_capture(ids)
    # As the host's memory has them: where types differ, PyTorch waits for the copy.
    worker().start((ids.int() if ids.is_cuda else ids).unbind(1))


@eager_on_graph
def _fill(table: PooledTable, output: torch.Tensor) -> None:
    """Wait for a layer's rows, and write their numbers. output: bfloat16 [tokens, heads, dim]."""
    refuse_capture(output)
    rows = worker().rows(table.layer)
    if rows is None or table.tp_size > 1:
        output.zero_()
    if rows is None:
        return
    if len(rows) != len(output):
        raise PoolError(f"rows of {len(rows)} tokens were asked for, and of {len(output)} are wanted")
    if rows.device != output.device:
        rows = rows.to(output.device, non_blocking=True)
    output[:, table.columns].copy_(rows.view(table.weight.dtype))


def _nothing(*_: Any, **__: Any) -> None:
    """In the place of a layer's prefetch: the lookup began with the batch, for all layers."""


_MODEL = "sglang.srt.models.qwen4_exp"
HOOKS: dict[str, tuple[Callable[..., Any], HookType]] = {
    f"{_MODEL}.Qwen4ExpPinnedHostEmbedding": (PooledTable, HookType.REPLACE),
    f"{_MODEL}.Qwen4ExpNGramEmbedding.__init__": (_refuse, HookType.BEFORE),
    f"{_MODEL}.Qwen4ExpModel.__init__": (_made, HookType.AFTER),
    f"{_MODEL}.Qwen4ExpForConditionalGeneration.load_weights": (_loaded, HookType.AFTER),
    f"{_MODEL}._prepare_ple_batch": (_prepared, HookType.AFTER),
    f"{_MODEL}.Qwen4ExpPLELayer.start_prefetch": (_nothing, HookType.REPLACE),
}
