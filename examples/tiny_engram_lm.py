"""A small Engram language model whose tables are served: `make tiny-lm`, or `python examples/tiny_engram_lm.py`.

Trains a transformer with two Engram layers on the texts under data/, writes it as a checkpoint of DeepSeek-V4.1's
layout (float8 rows, hashed through the tokenizer's token map), packs the tables and serves them from another process.
Then the same prompts run through the model twice: with the tables in its own memory (torch.nn.Embedding), and with rows
from the server. Prefill in chunks, then token by token, greedy and sampled: every logit must be the same, bit for bit,
whatever the client's settings. Ends with exit code 1 if one is not.

Needs the extras `server` and `torch`, and safetensors.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from engrampool_client import Client
from engrampool_client.integrations.torch import EngramPool, PooledEmbedding, lookback_of
from engrampool_client.testing import serve_process
from engrampool_proto.builders import blueprint, load_config
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec
from engrampool_server.files.table_files import PackedModel

TEXTS = Path(__file__).parent / "data"
VOCAB_SIZE, PAD = 1024, 0
DIM, LAYERS, HEADS, CONTEXT = 128, 4, 4, 256
ENGRAM_LAYERS, NGRAM, ENGRAM_HEADS, ENGRAM_DIM, ENGRAM_VOCAB = (1, 3), 3, 4, 32, 5000
VALUES_PER_SCALE = 32
BATCH, SEQUENCE = 8, 128
PROMPTS, PROMPT, CHUNK, NEW = 4, 100, 48, 48

# The client's settings, and the server's: none of them may change a logit.
COMBINATIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"direct": "off"}, {}),
    ({"hashing": "server"}, {}),
    ({"dedupe": False}, {}),
    ({"cache_bytes": 1 << 20}, {}),
    ({"cache_bytes": 1 << 20, "dedupe": False}, {}),
    ({"on_failure": "mask"}, {}),
    ({"on_failure": "mask", "cache_bytes": 1 << 20}, {}),
    ({}, {"memory": "shm"}),
    ({"attach": "off"}, {"memory": "shm"}),
    ({"attach": "off", "cache_bytes": 1 << 20}, {"memory": "shm"}),
    ({"on_failure": "mask"}, {"memory": "shm"}),
]


class Attention(nn.Module):
    """Causal self-attention over [B, S, DIM] and what the cache holds of the tokens before."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM, bias=False)
        self.out = nn.Linear(DIM, DIM, bias=False)

    def forward(self, hidden: Tensor, cache: list[Tensor]) -> Tensor:
        """cache: keys and values [B, HEADS, tokens before, DIM / HEADS], grown by this call; empty at the start."""
        q, k, v = self.qkv(hidden).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if cache:
            k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        cache[:] = [k, v]
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Engram(nn.Module):
    """Rows of the last n-grams, let into the hidden state as far as the two agree.

    embedding: row ids [B, S, columns] -> [B, S, columns, ENGRAM_DIM]; nn.Embedding, or in its place PooledEmbedding.
    """

    def __init__(self, columns: int, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.key = nn.Linear(columns * ENGRAM_DIM, DIM, bias=False)
        self.value = nn.Linear(columns * ENGRAM_DIM, DIM, bias=False)
        self.norm_hidden, self.norm_key = nn.RMSNorm(DIM), nn.RMSNorm(DIM)

    def forward(self, hidden: Tensor, ids: Tensor | None) -> Tensor:
        """[B, S, DIM] -> the same."""
        rows = self.embedding(ids).flatten(-2)
        agreement = (self.norm_hidden(hidden) * self.norm_key(self.key(rows))).sum(-1, keepdim=True)
        gate = torch.sigmoid(agreement / math.sqrt(DIM))
        if isinstance(self.embedding, PooledEmbedding):  # shut for tokens without rows; there are none in this run
            gate = gate * self.embedding.valid.unsqueeze(-1)
        return hidden + gate * self.value(rows)


class Block(nn.Module):
    """An Engram layer has its Engram before attention."""

    def __init__(self, engram: Engram | None) -> None:
        super().__init__()
        self.engram = engram
        self.norm_attention, self.norm_mlp = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))

    def forward(self, hidden: Tensor, ids: Tensor | None, cache: list[Tensor]) -> Tensor:
        """[B, S, DIM] -> the same."""
        if self.engram is not None:
            hidden = self.engram(hidden, ids)
        hidden = hidden + self.attention(self.norm_attention(hidden), cache)
        return hidden + self.mlp(self.norm_mlp(hidden))


Cache = list[list[Tensor]]


class LanguageModel(nn.Module):
    """embed(layer): the embedding of an Engram layer."""

    def __init__(self, spec: ModelSpec, embed: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB_SIZE, DIM), nn.Embedding(CONTEXT, DIM)
        engrams = {layer: Engram(spec.table(layer).heads, embed(layer)) for layer in spec.layers}
        self.layers = nn.ModuleList(Block(engrams.get(layer)) for layer in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(DIM), nn.Linear(DIM, VOCAB_SIZE, bias=False)

    def forward(self, tokens: Tensor, cache: Cache | None = None, ids: dict[int, Tensor] | None = None) -> Tensor:
        """Token ids [B, S] -> logits [B, S, VOCAB_SIZE]. ids: row ids by layer, for tables of this process."""
        cache = [[] for _ in self.layers] if cache is None else cache
        before = cache[0][0].shape[2] if cache[0] else 0
        hidden = self.tokens(tokens) + self.positions(torch.arange(before, before + tokens.shape[1]))
        for layer, block in enumerate(self.layers):
            hidden = block(hidden, None if ids is None else ids.get(layer), cache[layer])
        return self.head(self.norm(hidden))


def row_ids(spec: ModelSpec, tokens: Tensor) -> dict[int, Tensor]:
    """By layer, the row ids [B, S, columns] of whole sequences [B, S]."""
    flat = tokens.numpy().astype(np.int32)
    bounds = np.arange(len(flat) + 1, dtype=np.int32) * np.int32(flat.shape[1])
    ids = spec.hash(TokenBatch.of(flat.reshape(-1), bounds))
    return {layer: torch.from_numpy(rows.astype(np.int64)).view(*tokens.shape, -1) for layer, rows in ids.items()}


def make_tokenizer(text: str, path: Path) -> Tokenizer:
    """Byte-level BPE of VOCAB_SIZE tokens, trained on the text and saved as a tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.save(str(path))
    return tokenizer


def make_config(path: Path) -> None:
    """A config.json with the keys that DeepSeek-V4.1's has."""
    config = {
        "engram_layer_ids": list(ENGRAM_LAYERS),
        "engram_max_ngram_size": NGRAM,
        "engram_vocab_size": ENGRAM_VOCAB,
        "engram_n_heads": ENGRAM_HEADS,
        "engram_head_dim": ENGRAM_DIM,
        "engram_pad_token_id": PAD,
        "vocab_size": VOCAB_SIZE,
    }
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")


def train(model: LanguageModel, spec: ModelSpec, tokens: Tensor, steps: int) -> None:
    """Adam on random windows of the text."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    begin = time.perf_counter()
    for step in range(steps):
        starts = torch.randint(0, len(tokens) - SEQUENCE, (BATCH,), generator=generator)
        batch = torch.stack([tokens[start : start + SEQUENCE + 1] for start in starts.tolist()])
        inputs, targets = batch[:, :-1], batch[:, 1:]
        logits = model(inputs, ids=row_ids(spec, inputs))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"  step {step:4}  loss {loss.item():.3f}  {time.perf_counter() - begin:5.1f} s", flush=True)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn values [rows, dim], and float8_e8m0fnu scales [rows, dim / 32] as bytes: powers of two."""
    runs = weight.unflatten(-1, (-1, VALUES_PER_SCALE))
    largest = runs.abs().amax(-1).clamp(min=1e-30)
    exponents = torch.ceil(torch.log2(largest / 448)).clamp(-127, 127)
    values = (runs * torch.exp2(-exponents).unsqueeze(-1)).flatten(-2)
    return values.to(torch.float8_e4m3fn), (exponents + 127).to(torch.uint8)


def local_table(values: Tensor, scales: Tensor) -> nn.Embedding:
    """What a process without a pool would hold: the numbers of every row of the checkpoint."""
    exponents = scales.to(torch.int32) - 127
    runs = values.to(torch.float32).unflatten(-1, (-1, VALUES_PER_SCALE))
    return nn.Embedding.from_pretrained(torch.ldexp(runs, exponents.unsqueeze(-1)).flatten(-2))


def save_checkpoint(model: LanguageModel, directory: Path) -> None:
    """Every weight in one safetensors file, under the names that DeepSeek-V4.1 has for the tables."""
    tensors = {}
    for name, weight in model.state_dict().items():
        if name.endswith("engram.embedding.weight"):
            table = "model." + name.replace("embedding.weight", "embed.")
            tensors[table + "weight"], tensors[table + "scale"] = quantized(weight)
        else:
            tensors["model." + name] = weight
    save_file(tensors, directory / "model.safetensors")


def load_model(directory: Path, spec: ModelSpec, embed: Callable[[int], nn.Module]) -> LanguageModel:
    """The checkpoint's model with other embeddings in its Engram layers."""
    model = LanguageModel(spec, embed)
    tensors = {
        name.removeprefix("model."): tensor for name, tensor in load_file(directory / "model.safetensors").items()
    }
    kept = {name: tensor for name, tensor in tensors.items() if ".engram.embed." not in name}
    missing, unexpected = model.load_state_dict(kept, strict=False)
    assert not unexpected
    assert all(name.endswith("engram.embedding.weight") for name in missing)
    return model.eval()


# history [B, H], chunk [B, S], cache -> logits [B, S, VOCAB_SIZE]
Forward = Callable[[Tensor, Tensor, Cache], Tensor]


@dataclass
class Transcript:
    """logits: of every forward, in order. tokens: [B, H], prompts and what was generated."""

    logits: list[Tensor]
    tokens: Tensor
    decode_s: float

    def differs(self, other: "Transcript") -> str:
        """What differs first, or nothing."""
        for number, (mine, theirs) in enumerate(zip(self.logits, other.logits, strict=True)):
            if not torch.equal(mine, theirs):
                return f"forward {number} differs by {(mine - theirs).abs().max():.3g}"
        return "" if torch.equal(self.tokens, other.tokens) else "the text differs"


@torch.inference_mode()
def transcript(forward: Forward, prompts: Tensor, new: int, seed: int | None) -> Transcript:
    """Prefill the prompts in chunks, then generate `new` tokens each: greedily, or sampled with `seed`."""
    cache: Cache = [[] for _ in range(LAYERS)]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    logits = [
        forward(prompts[:, :start], prompts[:, start : start + CHUNK], cache)
        for start in range(0, prompts.shape[1], CHUNK)
    ]
    tokens, begin = prompts, time.perf_counter()
    for left in reversed(range(new)):
        last = logits[-1][:, -1]
        if generator is None:
            chosen = last.argmax(-1, keepdim=True)
        else:
            chosen = torch.multinomial(torch.softmax(last / 0.8, -1), 1, generator=generator)
        if left:
            logits.append(forward(tokens, chosen, cache))
        tokens = torch.cat([tokens, chosen], 1)
    return Transcript(logits, tokens, time.perf_counter() - begin)


def local_forward(model: LanguageModel, spec: ModelSpec) -> Forward:
    """Rows out of this process; their ids from the whole text so far, so that no look-back can be wrong."""

    def forward(history: Tensor, chunk: Tensor, cache: Cache) -> Tensor:
        ids = row_ids(spec, torch.cat([history, chunk], 1))
        return model(chunk, cache, {layer: rows[:, history.shape[1] :] for layer, rows in ids.items()})

    return forward


def pooled_forward(model: LanguageModel, pool: EngramPool, forget: bool = False) -> Forward:
    """Rows from the server. forget: leave the look-back out, which must be noticed."""
    width = 0 if forget else pool.client.spec.lookback

    def forward(history: Tensor, chunk: Tensor, cache: Cache) -> Tensor:
        with pool.start(chunk, lookback=lookback_of(history, width)):
            return model(chunk, cache)

    return forward


@contextmanager
def served(packed: Path, **settings: Any) -> Iterator[str]:
    """`engrampool serve` in a process of its own: its address. What it leaves in /dev/shm is freed."""
    with PackedModel.open(packed) as model:
        segments = f"engrampool-{os.geteuid()}-{model.version[:16]}-*"
    try:
        with serve_process(packed, workers=1, **settings) as process:
            yield process.address
    finally:
        for segment in Path("/dev/shm").glob(segments):
            segment.unlink(missing_ok=True)


def shown(settings: dict[str, Any]) -> str:
    """As a caller would write them."""
    return ", ".join(f"{name}={value!r}" for name, value in settings.items()) or "-"


def main() -> None:
    """Train, pack, serve, compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="of training (default: %(default)s)")
    parser.add_argument("--new", type=int, default=NEW, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="keep checkpoint and packed model in this new directory")
    arguments = parser.parse_args()
    if arguments.steps < 1 or not 1 <= arguments.new <= CONTEXT - PROMPT:
        parser.error(f"--steps must be at least 1, --new 1 to {CONTEXT - PROMPT}")
    # Where others compute too, threads wait for each other far longer than such small matrices take one of them.
    torch.set_num_threads(1)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True)
        sys.exit(run(arguments.out, arguments.steps, arguments.new))
    with tempfile.TemporaryDirectory(prefix="tiny-engram-lm-") as directory:
        sys.exit(run(Path(directory), arguments.steps, arguments.new))


def run(directory: Path, steps: int, new: int) -> int:
    """The whole of it in an empty directory; the exit code."""
    torch.manual_seed(0)
    checkpoint, packed = directory / "checkpoint", directory / "packed"
    checkpoint.mkdir()
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(TEXTS.glob("*.txt")))
    tokenizer = make_tokenizer(text, checkpoint / "tokenizer.json")
    make_config(checkpoint / "config.json")
    spec = blueprint(load_config(checkpoint / "config.json"), checkpoint / "tokenizer.json").spec
    tokens = torch.tensor(tokenizer.encode(text).ids)

    trained = LanguageModel(spec, lambda layer: nn.Embedding(spec.table(layer).num_rows, ENGRAM_DIM))
    count = sum(weight.numel() for weight in trained.parameters())
    in_tables = sum(table.num_rows for table in spec.tables) * ENGRAM_DIM
    print(
        f"{count / 1e6:.1f} million parameters, {in_tables / 1e6:.1f} of them in tables; {len(tokens)} tokens of text"
    )
    train(trained, spec, tokens, steps)
    save_checkpoint(trained, checkpoint)

    command = ["pack", "--checkpoint", str(checkpoint), "--out", str(packed)]
    print("$ engrampool", *command, flush=True)
    subprocess.run([sys.executable, "-m", "engrampool_proto", *command], check=True)

    weights = load_file(checkpoint / "model.safetensors")
    tables = {
        layer: local_table(*(weights[f"model.layers.{layer}.engram.embed.{part}"] for part in ("weight", "scale")))
        for layer in spec.layers
    }
    local = local_forward(load_model(checkpoint, spec, tables.__getitem__), spec)
    starts = torch.linspace(0, len(tokens) - PROMPT - 1, PROMPTS).long().tolist()
    prompts = torch.stack([tokens[start : start + PROMPT] for start in starts])
    seeds = {"greedy": None, "sampled": 7}
    expected = {name: transcript(local, prompts, new, seed) for name, seed in seeds.items()}
    for name, one in expected.items():
        print(f"{name}: {tokenizer.decode(one.tokens[0, PROMPT:].tolist())!r}")

    forwards = sum(len(one.logits) for one in expected.values())
    print(f"\n{PROMPTS} prompts of {PROMPT} tokens in chunks of {CHUNK}, {new} new tokens each, {forwards} forwards;")
    print("each logit is compared with the one that tables in this process give:\n")
    print(f"{'client':38} {'server':12} {'greedy':9} {'sampled':9} ms/step  rows from")
    own = 1e3 * expected["greedy"].decode_s / new
    print(f"{'(tables in this process)':38} {'':12} {'':9} {'':9} {own:7.2f}")
    failed = False
    for settings, group in itertools.groupby(COMBINATIONS, lambda one: one[1]):
        with served(packed, **settings) as address:
            for client_settings, _ in group:
                failed |= not compare(address, checkpoint, client_settings, settings, prompts, new, seeds, expected)
    return int(failed)


def compare(
    address: str,
    checkpoint: Path,
    client_settings: dict[str, Any],
    server_settings: dict[str, Any],
    prompts: Tensor,
    new: int,
    seeds: dict[str, int | None],
    expected: dict[str, Transcript],
) -> bool:
    """Print one line of the table; whether all was equal, no token was masked, and a missing look-back was noticed."""
    files = {"config": checkpoint / "config.json", "tokenizer": checkpoint / "tokenizer.json"}
    with Client(address, **files, **client_settings) as client:
        pool = EngramPool(client, dtype=torch.float32)
        model = load_model(checkpoint, client.spec, lambda layer: PooledEmbedding(pool, layer))
        found = {name: transcript(pooled_forward(model, pool), prompts, new, seed) for name, seed in seeds.items()}
        differences = {name: one.differs(expected[name]) for name, one in found.items()}
        nbytes, masked = client.stats.bytes.copy(), sum(client.stats.masked_tokens.values())
        forgetful = transcript(pooled_forward(model, pool, forget=True), prompts, new, None)
    words = " ".join(f"{differences[name] or 'bit-equal':9}" for name in seeds)
    step_ms = 1e3 * found["greedy"].decode_s / new
    sources = ", ".join(f"{source} {count / nbytes.total():.0%}" for source, count in nbytes.items() if count)
    print(f"{shown(client_settings):38} {shown(server_settings):12} {words} {step_ms:7.2f}  {sources}", flush=True)
    if masked:
        print(f"  {masked} tokens went without their rows")
    if not forgetful.differs(expected["greedy"]):
        print("  a lookup without look-back was not noticed: this comparison proves nothing")
        return False
    return not masked and not any(differences.values())


if __name__ == "__main__":
    main()
