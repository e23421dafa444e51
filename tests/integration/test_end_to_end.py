"""From a Hugging Face checkpoint to rows in a client, each step by the real program, against the tensors themselves."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize

from engrampool_client import Client
from engrampool_client.testing import serve_process
from engrampool_proto.hashing import TokenBatch
from engrampool_server.files.table_files import PackedModel
from prefork import PREFORK
from server_fixtures import PATIENCE
from small_model import TOKENIZER

WINDOWS = 30_000
BATCH = 5_000


def engrampool(*arguments) -> None:
    PREFORK.run([sys.executable, "-m", "engrampool_proto", *map(str, arguments)]).check_returncode()


def tensors(checkpoint: Path, suffix: str) -> np.ndarray:
    """The bytes of the one tensor whose name ends so, uint8 [rows, row bytes], as the safetensors library reads it."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in deserialize(path.read_bytes()):
            if name.endswith(suffix):
                return np.frombuffer(tensor["data"], np.uint8).reshape(tensor["shape"][0], -1)
    raise AssertionError(f"no tensor {suffix}")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("e2e") / "checkpoint"
    size = ("--like", "deepseek-v4.1", "--vocab-size", 3000)
    engrampool("synth", *size, "--tokenizer", TOKENIZER, "--checkpoint-out", "--out", path, "--quiet")
    return path


@pytest.fixture(scope="module")
def address(checkpoint) -> Iterator[str]:
    packed = checkpoint.with_name("packed")
    engrampool("pack", "--checkpoint", checkpoint, "--out", packed, "--quiet")
    engrampool("verify", packed, "--quiet")
    with serve_process(packed) as server:
        yield server.address


def test_every_row_is_the_checkpoints_own(checkpoint, address):
    """30 000 random windows of tokens: values and scales, byte for byte."""
    values = {layer: tensors(checkpoint, f"layers.{layer}.engram.embed.weight") for layer in (1, 14)}
    scales = {layer: tensors(checkpoint, f"layers.{layer}.engram.embed.scale") for layer in (1, 14)}
    assert values[1].shape[1] == 256
    assert scales[14].shape[1] == 8
    random = np.random.default_rng(2026)
    with Client(address, **PATIENCE) as pool:
        layout = pool.spec.table(1).row_format
        for start in range(0, WINDOWS, BATCH):
            # Each request is one token with the three before it; some windows begin their sequence.
            tokens = random.integers(0, 129280, BATCH).astype(np.int32)
            lookback = random.integers(-1, 129280, (BATCH, 3)).astype(np.int32)
            lookback[random.random((BATCH, 3)) < 0.05] = -1
            bounds = np.arange(BATCH + 1, dtype=np.int32)
            step = pool.prefetch(tokens, bounds, lookback)
            ids = pool.spec.hash(TokenBatch(tokens, bounds, lookback))
            for layer in (1, 14):
                rows = step.rows(layer)
                assert np.array_equal(rows[..., layout.slice_of("values")], values[layer][ids[layer]]), start
                assert np.array_equal(rows[..., layout.slice_of("scales")], scales[layer][ids[layer]]), start


def test_rows_read_as_numbers(address):
    """What a consumer does with a row: float8 values times one power of two for every 32 of them."""
    with Client(address, **PATIENCE) as pool:
        row = pool.lookup_rows({14: np.array([123])})[14][0]
    values = row[:256].view(ml_dtypes.float8_e4m3fn).astype(np.float32).reshape(8, 32)
    scales = row[256:].view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    numbers = values * scales[:, None]
    assert np.isfinite(numbers).all()
    assert np.abs(numbers).max() > 0


@pytest.mark.parametrize(
    ("like", "size"), [("engram-demo", 500), ("qwen-ple", 300), ("longcat", 2000), ("gemma-ple", 400)]
)
def test_every_family_is_packed_and_served(like, size, tmp_path):
    checkpoint, direct, packed = tmp_path / "checkpoint", tmp_path / "direct", tmp_path / "packed"
    how = ["--like", like, "--vocab-size", size, "--quiet"]
    if like == "engram-demo":
        words = {"type": "WordLevel", "vocab": {f"word{n}": n for n in range(1000)}, "unk_token": "word0"}
        tokenizer = tmp_path / "tokenizer.json"
        tokenizer.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": words}))
        how += ["--tokenizer", tokenizer]
    engrampool("synth", *how, "--checkpoint-out", "--out", checkpoint)
    engrampool("synth", *how, "--out", direct)
    engrampool("pack", "--checkpoint", checkpoint, "--out", packed, "--quiet")
    with serve_process(packed) as server, Client(server.address, **PATIENCE) as pool, PackedModel.open(direct) as same:
        assert (same.spec, same.version) == (pool.spec, pool.version)  # one version: the same bytes, by digest
        tokens = np.random.default_rng(1).integers(0, pool.spec.vocab_size, 64).astype(np.int32)
        ids = pool.spec.hash(TokenBatch.of(tokens))
        for layer, found in pool.lookup(tokens).items():
            table = same.spec.table(layer)
            rows = np.empty((table.num_rows, table.row_bytes), np.uint8)
            for block in same.blocks(layer):
                same.read_block(block, rows[block.start : block.stop])
            assert np.array_equal(found, rows[ids[layer]])
