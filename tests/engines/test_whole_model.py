"""Whole models with random weights, by other people's model code: every logit with the pool is that without it."""

import copy
from collections.abc import Iterator

import numpy as np
import pytest

from engrampool_client import Client
from engrampool_client.testing import serve_process
from engrampool_server.files.pack import pack

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-engines` installs it")
pytest.importorskip("vllm", reason="the engines are not there; `make test-engines` unpacks them")

EOS = 7
# Qwen4's own shape, but small: linear and indexed attention, experts, hyper-connections; n-grams at two of its layers.
QWEN = {
    "vocab_size": 500,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hc_lowrank": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "ple_layer_ids": [1, 3],
    "ple_embed_dim": 128,
    "ngram_vocab_size_base": 1000,
    "split_ngram_parts": 4,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "dtype": "bfloat16",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Of PyTorch: on a machine that is busy its threads wait for each other more than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def qwen():
    from transformers.models.qwen4_exp import Qwen4ExpTextConfig
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpForCausalLM

    torch.manual_seed(0)
    model = Qwen4ExpForCausalLM(Qwen4ExpTextConfig(**QWEN)).to(torch.bfloat16).eval()
    for layer in model.model.layers:
        if layer.ple is not None:
            # Random ones are too small to be seen in the logits.
            layer.ple.ple_embedding.ngram_embedding.weight.data.normal_()
    return model


@pytest.fixture(scope="module")
def client(qwen, tmp_path_factory) -> Iterator[Client]:
    """Of a server of the checkpoint that transformers saved."""
    saved = tmp_path_factory.mktemp("qwen")
    qwen.save_pretrained(saved / "checkpoint")
    pack(saved / "checkpoint", saved / "packed")
    with serve_process(saved / "packed") as server, Client(server.address, attach="off") as client:
        yield client


class Conversation:
    """A model that goes on with what it was given, and its pool if it has one."""

    def __init__(self, model, pool=None) -> None:
        from transformers import DynamicCache

        self.model, self.pool = model, pool
        self.cache = DynamicCache(config=model.config)
        self.tokens = torch.empty((0, 0), dtype=torch.int64)

    def go_on(self, tokens):
        """The logits of the next chunk, [B, S, vocabulary]."""
        from engrampool_client.integrations.torch import lookback_of

        before, self.tokens = self.tokens, torch.cat([self.tokens, tokens], dim=1) if self.tokens.numel() else tokens
        with torch.no_grad():
            if self.pool is None:
                return self.model(input_ids=tokens, cache=self.cache).logits
            depth = self.pool.client.spec.lookback
            lookback = lookback_of(before, depth) if before.numel() else None
            with self.pool.start(tokens, lookback=lookback):
                return self.model(input_ids=tokens, cache=self.cache).logits


def without_tables(model, pool):
    """The same model, whose n-gram tables are elsewhere."""
    from engrampool_client.integrations.torch import PooledEmbedding

    memo = {}
    for layer in model.model.layers:
        if layer.ple is not None:  # not copied
            memo[id(layer.ple.ple_embedding.ngram_embedding)] = None
    model = copy.deepcopy(model, memo)
    for number, layer in enumerate(model.model.layers):
        if layer.ple is not None:
            ours = PooledEmbedding(pool, number + 1)
            ours.weight = torch.empty(0)  # the model asks where it lies
            layer.ple.ple_embedding.ngram_embedding = ours
    return model


@pytest.mark.parametrize("device", ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
@pytest.mark.parametrize("seed", range(4))
def test_qwens_logits_are_equal(qwen, client, same, seed, device):
    from engrampool_client.integrations.torch import EngramPool

    qwen = qwen.to(device)
    pool = EngramPool(client, device=device, dtype=torch.bfloat16)
    stock, ours = Conversation(qwen), Conversation(without_tables(qwen, pool), pool)
    tables = sum(one.numel() for name, one in qwen.named_parameters() if "ngram_embedding" in name)
    count = [sum(one.numel() for one in each.model.parameters()) for each in (stock, ours)]
    assert count[0] - count[1] == tables > 0
    random = torch.Generator().manual_seed(seed)

    def both(tokens, what):
        tokens = tokens.to(device)
        theirs, found = stock.go_on(tokens), ours.go_on(tokens)
        what = f"Qwen4ExpForCausalLM on {device}, {what}"
        same("transformers", what, theirs.float().cpu().numpy(), found.float().cpu().numpy())
        return found

    # Prompts in chunks, of fewer than the n-gram's tokens, too; some sequences end in between.
    for length in (1 + seed, 12, 1, 7):
        chunk = torch.randint(0, QWEN["vocab_size"], (3, length), generator=random)
        chunk[torch.rand(chunk.shape, generator=random) < 0.1] = EOS
        logits = both(chunk, "a prompt's chunks")
    for _ in range(8):
        logits = both(logits[:, -1:].argmax(-1), "decode")


def test_qwens_logits_would_show_a_wrong_row(qwen, client, monkeypatch):
    from engrampool_client.integrations.torch import EngramPool

    prefetch = Client.prefetch

    def other_tokens(self, tokens, *arguments, **settings):
        return prefetch(self, np.where(np.arange(len(tokens)) == 4, 1, tokens).astype(np.int32), *arguments, **settings)

    monkeypatch.setattr(Client, "prefetch", other_tokens)
    qwen = qwen.to("cpu")
    pool = EngramPool(client, device="cpu", dtype=torch.bfloat16)
    tokens = torch.arange(10, 20)[None]
    stock, found = Conversation(qwen).go_on(tokens), Conversation(without_tables(qwen, pool), pool).go_on(tokens)
    assert torch.equal(stock[:, :4], found[:, :4])
    assert not torch.equal(stock[:, 4:], found[:, 4:])
