"""vLLM's own Engram layers with the plugin in them: of all ranks of a group, in one process."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engrampool_client.config import ENVIRONMENT_PREFIX
from engrampool_proto.synthetic import synthetic_rows

MAX_TOKENS, MAX_REQUESTS = 200, 8
REPLACED = ("_create_embedding", "_init_staging", "prepare_embeddings", "_ready_rows")


def with_plugin(server):
    """The engine's module with our plugin in it, put there by the engine's own loader; `Stock` is what it was."""
    import vllm.models.deepseek_v41.common.engram as engram
    import vllm.models.qwen4_exp.common.ngram_embedding as tables
    import vllm.plugins
    import vllm.v1.worker.gpu_worker as gpu_worker

    stock = {name: vars(engram.Engram)[name] for name in REPLACED}
    pinned, device = tables.Qwen4ExpPLEPinnedHostEmbedding, tables.Qwen4ExpPLEDeviceEmbedding
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(f"{ENVIRONMENT_PREFIX}TARGET", raising=False)
        patch.setattr(vllm.plugins, "plugins_loaded", False)
        vllm.plugins.load_general_plugins()
        assert {name: vars(engram.Engram)[name] for name in REPLACED} == stock, "it was not asked for"
        patch.setenv(f"{ENVIRONMENT_PREFIX}TARGET", server.address)
        for _ in range(2):  # as the engine may
            patch.setattr(vllm.plugins, "plugins_loaded", False)
            vllm.plugins.load_general_plugins()
    from engrampool_client.integrations import vllm_engram

    assert {name: vars(engram.Engram)[name].__module__ for name in REPLACED} == dict.fromkeys(
        REPLACED, vllm_engram.__name__
    )
    return SimpleNamespace(
        module=engram,
        ours=vllm_engram,
        Stock=type("Stock", (engram.Engram,), stock),
        Pinned=pinned,
        Device=device,
        Worker=gpu_worker.Worker,
    )


class Ranks:
    """The layers of a tensor-parallel group's ranks, all of them in this process, one after the other."""

    def __init__(self, engine, config, patch, size, make_state, device="cpu", **settings):
        self.engine, self.size, self.patch, self.made = engine, size, patch, []
        self.device = torch.device(device)
        self._make_state, self._config, self._settings = make_state, config, settings
        modes = SimpleNamespace(cudagraph_mode=engine.ours.CUDAGraphMode.NONE, mode=engine.ours.CompilationMode.NONE)
        self.compilation = modes
        self.vllm_config = SimpleNamespace(
            engram_config=SimpleNamespace(cpu_offload=False, dp_shared_memory=False, use_thp=False),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=MAX_TOKENS, max_num_seqs=MAX_REQUESTS),
            compilation_config=modes,
            use_v2_model_runner=False,
            parallel_config=SimpleNamespace(
                prefill_context_parallel_size=1, data_parallel_rank=0, world_size=size, rank=0
            ),
        )
        module = engine.module
        patch.setattr(module, "get_current_vllm_config", lambda: self.vllm_config)
        patch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)
        patch.setattr(module, "get_tensor_model_parallel_rank", lambda: self.rank)
        patch.setattr(module, "get_engram_dp_size", lambda: 1)
        patch.setattr(module, "ColumnParallelLinear", lambda *_, **__: torch.nn.Identity())
        patch.setattr(module, "tensor_model_parallel_all_gather", self._all_gather)
        # Ranks of one process have nobody to come to an outcome with; test_agreement.py has some.
        patch.setattr(engine.ours, "get_tp_group", lambda: SimpleNamespace(world_size=1))
        if self.device.type == "cpu":
            patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=4))
            patch.setattr(torch.accelerator, "current_device_index", lambda: 0)

    @contextmanager
    def at(self, rank):
        """Within this, the process is that rank."""
        self.rank = rank
        self.patch.setattr(self.engine.ours, "_worker", self.made[rank].worker)
        yield self.made[rank]

    def make(self):
        """Layers with pooled rows for each rank, as the model's constructor makes them."""
        with self.device:  # as an engine builds its model
            layout = self.engine.module.EngramLayout.from_config(self._config)
        for name, value in self._settings.items():
            self.patch.setenv(f"{ENVIRONMENT_PREFIX}{name.upper()}", str(value))
        for rank in range(self.size):
            self.made.append(SimpleNamespace(worker=self.engine.ours._Worker()))
            with self.at(rank) as made:
                made.layers = [self.layer(self.engine.module.Engram, layout, at) for at in range(len(layout.layer_ids))]
                with self.device:
                    made.group, made.state = self, self._make_state(layout)
        return self

    def layer(self, kind, layout, at):
        model = SimpleNamespace(hidden_size=8, hc_mult=4, rms_norm_eps=1e-6)
        with self.device:
            return kind(model, None, layout, at, False, f"layers.{at}.engram")

    def _all_gather(self, rows, dim):
        """What every rank has, this one's among it."""
        return torch.cat(self.gathered, dim)

    def embed(self, layers, hash_ids):
        """What each rank's layer reads. layers: of each rank, the same one."""
        self.gathered = []
        for rank, layer in enumerate(layers):
            with self.at(rank):
                self.gathered.append(layer._ready_rows(len(hash_ids)).clone())
        with self.at(0):
            return list(self.gathered), layers[0].embed(hash_ids)

    def close(self):
        for rank in range(len(self.made)):
            with self.at(rank):
                self.engine.ours.close()


def stock_layers(ranks, layout, spec):
    """For each rank, the engine's own layers, their tables loaded by its own loader from a checkpoint's tensors."""
    made = []
    for rank in range(ranks.size):
        with ranks.at(rank):
            layers = [ranks.layer(ranks.engine.Stock, layout, at) for at in range(len(layout.layer_ids))]
        for layer, table in zip(layers, spec.tables, strict=True):
            load(layer.embed_tokens, table)
        made.append(layers)
    return made


def load(embedding, table):
    rows = torch.from_numpy(synthetic_rows(table, np.arange(table.num_rows, dtype=np.uint64)))
    embedding.weight.weight_loader(embedding.weight, rows[:, :256].contiguous().view(torch.float8_e4m3fn))
    scales = rows[:, 256:].contiguous().view(torch.float8_e8m0fnu)
    embedding.weight_scale_inv.weight_loader(embedding.weight_scale_inv, scales)


def hashed(state, made):
    """The engine's own row ids of a batch: int32 [T, layers, columns]."""
    batch, device = made.batch, state.token_map.device
    arrays = batch.tokens, made.positions, batch.query_start_loc, batch.dead, batch.lookback, batch.lookback_dead
    return state(*(torch.from_numpy(one).to(device) for one in arrays), None, None)


def bits(tensor):
    return tensor.contiguous().view(torch.int16).cpu().numpy()
