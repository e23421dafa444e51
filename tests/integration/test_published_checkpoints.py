"""Checkpoints as they are published, of every family and form: packed, served, and back byte for byte.

Writer and hash are not ours: `published` and `hash_reference`.
"""

import sys
from collections.abc import Callable

import hash_reference
import numpy as np
import pytest

import published
from engrampool_client import Client
from engrampool_client.testing import serve_process
from engrampool_server.files.pack import pack
from engrampool_server.files.raw_model import RawModel
from engrampool_server.files.table_files import PackedModel
from prefork import PREFORK
from published import Published
from server_fixtures import PATIENCE, serve_thread

FORMS: dict[str, Callable[[], Published]] = {
    "deepseek-v4.1": published.deepseek_v41,
    "deepseek-v4.1 under model.": lambda: published.deepseek_v41(prefix="model."),
    "deepseek-v4.1 padded": lambda: published.deepseek_v41(100),
    "deepseek-v4.1 padded, not stated": lambda: published.deepseek_v41(100, stated=False),
    "engram-demo": published.engram_demo,
    "engram-demo bf16": lambda: published.engram_demo("BF16"),
    **{f"qwen-ple {form}": lambda form=form: published.qwen_ple(form) for form in published.QWEN_FORMS},
    "qwen-ple MLX": lambda: published.qwen_ple(
        split="shards.", place="language_model.model.layers.1.ple.ple_embedding."
    ),
    "qwen-ple text only": lambda: published.qwen_ple(place="model.layers.1.ple.ple_embedding."),
    "qwen-ple as earlier versions wrote it": lambda: published.qwen_ple(place="model.layers.1.ple."),
    "qwen-ple more padding": lambda: published.qwen_ple(padding=256),
    "qwen-ple one tensor": lambda: published.qwen_ple(split=None),
    "qwen-ple one tensor of nvfp4": lambda: published.qwen_ple("nvfp4", split=None),
    "qwen-ple one tensor, a scale a row": lambda: published.qwen_ple("fp8, a scale a row", split=None),
    "longcat": published.longcat,
    "longcat 2.0": lambda: published.longcat("2.0"),
    "longcat padded": lambda: published.longcat(padding=5),
    "longcat int8, a scale a row": lambda: published.longcat("int8", padding=5),
    "gemma-ple": published.gemma_ple,
    "gemma-ple without vocab_size_per_layer_input": lambda: published.gemma_ple(stated=False),
}


def expected(checkpoint: Published, tokens: list[int]) -> dict[int, np.ndarray]:
    """What a lookup must answer, by layer: uint8 [tokens, heads, row bytes]."""
    request = hash_reference.Request(tokens)
    return {layer: checkpoint.tables[layer][np.array(table.rows(request))] for layer, table in checkpoint.model.items()}


def some_tokens(checkpoint: Published) -> list[int]:
    """Texts that end, too: each end of text is met at every distance."""
    last = min(checkpoint.vocab_size, len(checkpoint.tables.get(0, range(checkpoint.vocab_size))))
    tokens = np.random.default_rng(7).integers(0, last, 200)
    tokens[::11] = 7
    tokens[::13] = 2
    return [int(token) for token in tokens]


def compare(checkpoint: Published, address: str, **settings) -> None:
    tokens = some_tokens(checkpoint)
    with Client(address, **PATIENCE, **settings) as client:
        found = client.lookup(np.array(tokens, np.int32))
        wanted = expected(checkpoint, tokens)
        assert found.keys() == wanted.keys()
        for layer, rows in wanted.items():
            assert np.array_equal(found[layer], rows)
            table = client.spec.table(layer)
            segments = table.row_format.segments
            assert ", ".join(f"{s.dtype} {s.length}" for s in segments) == checkpoint.row_format
            assert table.scale == checkpoint.scale


@pytest.mark.parametrize("form", FORMS)
def test_every_published_form_comes_back_byte_for_byte(form, tmp_path):
    checkpoint = FORMS[form]()
    directory = checkpoint.save(tmp_path / "checkpoint")
    pack(directory, tmp_path / "packed")
    with PackedModel.open(tmp_path / "packed") as model:
        for layer, wanted in checkpoint.tables.items():
            table = model.spec.table(layer)
            rows = np.empty((table.num_rows, table.row_bytes), np.uint8)
            for block in model.blocks(layer):
                model.read_block(block, rows[block.start : block.stop])
            assert np.array_equal(rows, wanted[: table.num_rows])
    with serve_thread(tmp_path / "packed") as address:
        # The checkpoint's own config.json is the model's that is served.
        tokenizer = directory / "tokenizer.json"
        files = {"config": directory / "config.json", "tokenizer": tokenizer if tokenizer.exists() else None}
        compare(checkpoint, address, **files)


def test_by_the_commands_and_as_it_is(tmp_path):
    checkpoint = published.qwen_ple("fp8, among layers of nvfp4")
    directory = checkpoint.save(tmp_path / "checkpoint", files=5)
    command = [sys.executable, "-m", "engrampool_proto"]
    packing = ["pack", "--checkpoint", str(directory), "--out", str(tmp_path / "packed"), "--quiet"]
    PREFORK.run([*command, *packing]).check_returncode()
    PREFORK.run([*command, "verify", str(tmp_path / "packed"), "--quiet"]).check_returncode()
    assert RawModel.lies_in(directory)
    with serve_process(tmp_path / "packed", workers=1) as packed, serve_process(directory, workers=1) as raw:
        compare(checkpoint, packed.address)
        compare(checkpoint, raw.address)
        version = packed.wait_for("loaded")["version"]
        assert raw.wait_for("loaded")["version"] == version
