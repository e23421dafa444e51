"""SGLang's own Engram layers with the plugin in them: of all ranks of a group, in one process; and its batches."""

import sys
from array import array
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engrampool_client.config import ENVIRONMENT_PREFIX
from engrampool_proto.synthetic import synthetic_rows

SLOTS = 16
# Tokens of a forward of prompts at most, and of a request.
CHUNK, LONGEST = 512, 4096


@contextmanager
def with_plugin(server):
    """The engine's modules with our plugin in them, put there by the engine's own loader; `Stock` is what they had."""
    import sglang.srt.layers.engram as engram
    import sglang.srt.layers.engram_staging as engram_staging
    import sglang.srt.plugins as plugins
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.model_executor.model_runner_components import cuda_graph_setup, ngram_embedding_manager
    from sglang.srt.model_executor.runner.base_runner import BaseRunner
    from sglang.srt.models import qwen4_exp

    stock, hashing = engram.EngramEmbedding, engram.EngramHasher.forward
    with pytest.MonkeyPatch.context() as patch:
        # What the engine's loader changes is put back at the end: other tests use these classes.
        for place, name in (
            (engram, "EngramEmbedding"),
            (engram_staging, "EngramEmbedding"),
            (engram.EngramHasher, "forward"),
            (BaseRunner, "_dummy_run"),
            (Scheduler, "release_host_resources"),
            (Scheduler, "run_batch"),
            (cuda_graph_setup, "capture_cuda_graphs"),
            (cuda_graph_setup, "capture_prefill_graph"),
            (cuda_graph_setup, "capture_decode_graph"),
            (qwen4_exp, "Qwen4ExpPinnedHostEmbedding"),
            (qwen4_exp, "_prepare_ple_batch"),
            (qwen4_exp.Qwen4ExpNGramEmbedding, "__init__"),
            (qwen4_exp.Qwen4ExpModel, "__init__"),
            (qwen4_exp.Qwen4ExpForConditionalGeneration, "load_weights"),
            (qwen4_exp.Qwen4ExpPLELayer, "start_prefetch"),
        ):
            patch.setattr(place, name, vars(place)[name])
        patch.setattr(engram_staging.EngramRowStager, "from_model", vars(engram_staging.EngramRowStager)["from_model"])
        # Ours stands in the engine once a process: what another test's plugin left is not this one's.
        for name in ("sglang_engram", "sglang_prompts", "sglang_qwen4"):
            patch.delitem(sys.modules, f"engrampool_client.integrations.{name}", raising=False)
        patch.delenv(f"{ENVIRONMENT_PREFIX}TARGET", raising=False)
        patch.setattr(plugins, "_plugins_loaded", False)
        plugins.load_plugins()
        assert (engram.EngramEmbedding, engram.EngramHasher.forward) == (stock, hashing), "it was not asked for"
        patch.setenv(f"{ENVIRONMENT_PREFIX}TARGET", server.address)
        for _ in range(2):
            patch.setattr(plugins, "_plugins_loaded", False)
            plugins.load_plugins()
        from engrampool_client.integrations import sglang_engram, sglang_prompts

        assert engram.EngramEmbedding is engram_staging.EngramEmbedding is sglang_engram.PooledTable
        yield SimpleNamespace(
            module=engram,
            staging=engram_staging,
            ours=sglang_engram,
            prompts=sglang_prompts,
            Stock=stock,
            Manager=ngram_embedding_manager.NgramEmbeddingManager,
            BaseRunner=BaseRunner,
            graphs=cuda_graph_setup,
            Scheduler=Scheduler,
            plugins=plugins,
        )
        plugins.HookRegistry.reset()


def hasher_maker(engine, config, tokenizer_path):
    """Makes the engine's own hashes of a layout; it reads the tokenizer for as long as a second, so only once."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    tokens = engine.module.build_compressed_token_map(tokenizer)

    def make(layout):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.module, "build_compressed_token_map", lambda _: tokens)
            numbers = config.engram_pad_token_id, config.engram_compressed_vocab_size
            made = engine.module.EngramHasher(layout, tokenizer, *numbers)
        made.image_token_id = IMAGE
        return made

    return make


class Ranks:
    """The layers of a tensor-parallel group's ranks, all of them in this process, one after the other."""

    def __init__(self, engine, config, patch, size, make_hasher, device="cpu", **settings):
        self.engine, self.size, self.patch, self.made = engine, size, patch, []
        self.device = torch.device(device)
        self._make_hasher, self._settings = make_hasher, settings
        self._config = SimpleNamespace(hidden_size=16, hc_mult=4, rms_norm_eps=1e-6, **vars(config))
        self.settings = SimpleNamespace(
            speculative_algorithm=None,
            overlap=SimpleNamespace(enable_two_batch_overlap=False),
            enable_pdmux=False,
            capture=SimpleNamespace(enable_torch_compile=False),
            chunked_prefill_size=CHUNK,
            max_prefill_tokens=2 * CHUNK,
        )
        self.backends = {"decode": "breakable", "prefill": "breakable"}
        self.parallel = SimpleNamespace(
            tp_size=size,
            attn_tp_size=size,
            attn_cp_size=1,
            attn_dp_size=1,
            attn_dp_enabled=False,
            dp_rank=None,
            launch_world_size=size,
            attn_tp_group=SimpleNamespace(cpu_group="processors"),
        )
        self.votes, self.others = [], None
        for place in (engine.module, engine.ours):
            patch.setattr(place, "get_parallel", lambda: self.parallel)
        for name in ("get_spec", "get_exec", "get_disagg", "get_flags"):
            patch.setattr(engine.ours, name, lambda: self.settings)
        patch.setattr(engine.prompts, "get_schedule", lambda: self.settings)
        patch.setattr(engine.ours, "check_cuda_graph_backend", lambda phase, backend: self.backends[phase] == backend)
        patch.setattr(engine.ours, "over", {"processors": self._agree}.__getitem__)
        patch.setattr(engine.ours, "attn_tp_all_reduce", self._all_reduce)
        patch.setattr(engine.module, "tensor_model_parallel_all_reduce", self._all_reduce)

    @contextmanager
    def at(self, rank):
        """Within this, the process is that rank."""
        self.parallel.tp_rank = self.parallel.attn_tp_rank = self.parallel.launch_world_rank = rank
        self.patch.setattr(self.engine.ours, "_worker", self.made[rank].worker)
        yield self.made[rank]

    def make(self):
        """Layers with pooled rows for each rank, as the model's constructor makes them, and what stages for them."""
        self.layout = self.engine.module.EngramLayout.from_config(self._config)
        for name, value in self._settings.items():
            self.patch.setenv(f"{ENVIRONMENT_PREFIX}{name.upper()}", str(value))
        for rank in range(self.size):
            self.made.append(SimpleNamespace(worker=self.engine.ours._Worker()))
            with self.at(rank) as made:
                with self.device:  # as an engine builds its model
                    made.layers = self._layers()
                    made.hasher = self._make_hasher(self.layout)
                made.manager = self._manager(made)
        return self

    def _layers(self):
        made = []
        for layer in self.layout.layer_ids:
            made.append(self.engine.module.Engram(self._config, layer, self.layout, image_token_id=IMAGE))
            torch.manual_seed(layer)
            made[-1].wkv.weight.data = torch.randn(made[-1].wkv.weight.shape).bfloat16() / 64
            made[-1].q_weight.data.normal_()
        return made

    def _manager(self, made):
        model = torch.nn.Module()
        model.hasher, model.layers = made.hasher, torch.nn.ModuleList(made.layers[::-1])
        return self.engine.Manager.from_model(
            model=model,
            model_config=SimpleNamespace(use_ngram_embedding=False, use_engram=True, ngram_embedding_n=0),
            req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(SLOTS, 1)),
            max_running_requests=SLOTS,
            device=self.device,
        )

    def stock(self, spec):
        """For each rank, the engine's own layers, their tables loaded by its own loader from a checkpoint's tensors."""
        made = []
        for rank in range(self.size):
            with self.at(rank), self.device, self.patch.context() as patch:
                patch.setattr(self.engine.module, "EngramEmbedding", self.engine.Stock)
                layers = self._layers()
            for layer, number in zip(layers, spec.layers, strict=True):
                load(layer.embed, spec, number)
            made.append(layers)
        return made

    def _all_reduce(self, values):
        """What all ranks have together, if it is known by now, and else this one's, which is kept."""
        if self.known is not None:
            return self.known
        self.parts.append(values.clone())
        return values

    def _agree(self, flags):
        """What all ranks say of a layer's tokens. others: what the other ones said, in their turn, before."""
        self.votes.append(flags.copy())
        return flags if self.others is None else flags & next(self.others)

    def run(self, layers, hash_ids, at, forward, prepare=lambda rank: None):
        """What each rank has of a layer's rows, and what the layer makes of all of them. layers: of each rank."""
        self.parts, self.known, found = [], None, []
        for rank, own in enumerate(layers):
            with self.at(rank):
                prepare(rank)
                found.append(own[at].embed_rows(hash_ids[:, at], forward[rank], False))
        if self.size > 1:
            assert all(one is part or torch.equal(one, part) for one, part in zip(found, self.parts, strict=True))
            self.known = sum(self.parts[1:], self.parts[0])
        with self.at(0):
            x = (
                torch.randn(len(hash_ids), 4, 16, generator=torch.Generator().manual_seed(at))
                .bfloat16()
                .to(self.device)
            )
            made = layers[0][at](x, hash_ids[:, at], forward[0], input_ids=self.input_ids)
        return found, made

    def close(self):
        for made in self.made:
            made.worker.close()


IMAGE = 1000


@cache
def checkpoint(spec, layer):
    """A layer's tensors in the checkpoint: values and scales."""
    table = spec.table(layer)
    rows = torch.from_numpy(synthetic_rows(table, np.arange(table.num_rows, dtype=np.uint64)))
    values, scales = rows[:, :256].contiguous(), rows[:, 256:].contiguous()
    return values.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu)


def load(embedding, spec, layer):
    values, scales = checkpoint(spec, layer)
    embedding.weight.weight_loader(embedding.weight, values)
    embedding.scale.weight_loader(embedding.scale, scales)
    embedding.finish_load(f"layer {layer}")


# --- batches, as the scheduler makes them


def scheduled(made, mode="EXTEND"):
    """The scheduler's batch of a prompt's chunks. What is dead are an image's tokens, numbered as the engine does."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    pasts = [
        np.where(dead, MM_PAD + np.arange(len(past)), past)
        for past, dead in zip(made.histories, made.dead, strict=True)
    ]
    return SimpleNamespace(
        forward_mode=ForwardMode[mode],
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(SLOTS, LONGEST)),
        encoder_swa_reset=None,
        prefix_lens=list(made.starts),
        extend_lens=np.diff(made.bounds).tolist(),
        reqs=[SimpleNamespace(full_untruncated_fill_ids=array("q", past.tolist())) for past in pasts],
        engram_history=None,
        engram_staged_rows=None,
    )


MM_PAD = 1_000_000


def forward_of(batch, made, device="cpu"):
    """The forward's batch, and its tokens."""
    fills = zip(batch.reqs, made.starts, strict=True)
    tokens = [token for req, start in fills for token in req.full_untruncated_fill_ids[start:]]
    forward = SimpleNamespace(
        forward_mode=batch.forward_mode,
        positions=torch.from_numpy(made.positions).to(device),
        req_pool_indices=torch.arange(len(made.starts), device=device),
        extend_seq_lens=torch.from_numpy(np.diff(made.bounds)).to(device),
        extend_seq_lens_cpu=np.diff(made.bounds).tolist(),
        extend_start_loc=torch.from_numpy(made.bounds[:-1].copy()).to(device),
        engram_history=batch.engram_history,
        engram_staged_rows=batch.engram_staged_rows,
        out_cache_loc=None,
    )
    return forward, torch.tensor(tokens, device=device)


def step(mode, tokens, positions, slots, locations=None, block=0, device="cpu"):
    """A forward's batch of one token a request, or of a block of drafts."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    forward = SimpleNamespace(
        forward_mode=ForwardMode[mode],
        positions=torch.as_tensor(positions, device=device),
        req_pool_indices=torch.as_tensor(slots, device=device),
        engram_history=None,
        engram_staged_rows=None,
        out_cache_loc=None if locations is None else torch.as_tensor(locations, device=device),
        spec_info=SimpleNamespace(draft_token_num=block),
    )
    return forward, torch.as_tensor(tokens, device=device)


def unstaged(forward):
    return SimpleNamespace(**{**vars(forward), "engram_staged_rows": None})


class Comparison:
    """Forwards of a group with pooled rows, each compared with what the stocked layers have."""

    def __init__(self, group, spec, same_bits):
        self.group, self.same_bits = group, same_bits
        self.stocked = group.stock(spec)

    def extend(self, made, staged=True, replayed=None):
        """replayed: the same, and before each chunk what the engine has the forward run again of a prefix."""
        forwards = []
        for rank in range(self.group.size):
            with self.group.at(rank) as own:
                batch = scheduled(made)
                if replayed is not None:
                    batch.encoder_swa_reset = [True] * len(batch.reqs)
                if staged:
                    own.manager.prepare_for_forward(batch, chunked_req=None)
                    assert batch.engram_staged_rows is not None
                else:  # as where a batch's newest tokens are on the GPU
                    own.manager._prepare_engram_history(batch)
                if replayed is not None:
                    batch.engram_history = torch.zeros(len(batch.reqs), 3, dtype=torch.int32)
                forward, tokens = forward_of(batch, replayed or made, self.group.device)
                forwards.append(forward)
                ids = own.hasher(tokens, forward)
        kind = ", not staged" * (not staged) + ", its prefixes again" * (replayed is not None)
        self.compare(f"prefill{kind}", forwards, tokens, ids)

    def step(self, what, mode, tokens, positions, slots, **more):
        forwards = []
        for rank in range(self.group.size):
            with self.group.at(rank) as own:
                forward, tokens = step(mode, tokens, positions, slots, device=self.group.device, **more)
                forwards.append(forward)
                ids = own.hasher(tokens, forward)
        real = None if forward.out_cache_loc is None else int((forward.out_cache_loc > 0).sum())
        self.compare(what, forwards, tokens, ids, real)

    def compare(self, what, forwards, tokens, ids, real=None):
        group = self.group
        group.input_ids = torch.where(tokens >= MM_PAD, IMAGE, tokens)
        for at in range(2):
            ours, read = group.run([own.layers for own in group.made], ids, at, forwards)
            theirs, right = group.run(self.stocked, ids, at, [unstaged(forward) for forward in forwards])
            for rank in range(group.size if 24 % group.size == 0 else 0):
                self.same_bits(
                    "sglang", f"EngramEmbedding, {what}, TP {group.size}", theirs[rank][:real], ours[rank][:real]
                )
            self.same_bits("sglang", f"Engram, {what}, TP {group.size}", right[:real], read[:real])
            assert not any(one[len(one) if real is None else real :].any() for one in ours)


def exact_numbers(spec, layer, ids):
    rows = torch.from_numpy(synthetic_rows(spec.table(layer), ids.cpu().numpy().reshape(-1).astype(np.uint64)))
    values = rows[:, :256].view(torch.float8_e4m3fn).double().unflatten(-1, (8, 32))
    exact = (values * torch.exp2(rows[:, 256:].double() - 127).unsqueeze(-1)).bfloat16()
    return exact.flatten(-2).view(*ids.shape, 256)
