"""`engrampool synth`: tables of a real model's shape, of any size, whose every byte can be computed again.

The configurations are those of the families' public models; only the size of the tables is the caller's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_proto.builders import Blueprint, blueprint, find_builder
from engrampool_proto.spec import ModelSpec, TableSpec
from engrampool_proto.synthetic import synthetic_rows
from engrampool_proto.token_map import TokenMap
from engrampool_server.files.checkpoint import with_scales
from engrampool_server.files.table_writer import BLOCK_BYTES, FILE_BYTES, write_tables

DEEPSEEK_TOKEN_IDS = 129280
# What every per-tensor scale is in a synthetic model; float32 and bfloat16 hold it exactly.
SYNTHETIC_SCALE = 0.015625
_CHUNK_BYTES = 1 << 20  # rows computed at a time, so that they stay in the CPU's cache


def _deepseek_v41(size: int) -> dict[str, Any]:
    return {
        "engram_layer_ids": [1, 14],
        "engram_max_ngram_size": 4,
        "engram_vocab_size": size,
        "engram_n_heads": 8,
        "engram_head_dim": 256,
        "engram_pad_token_id": 2,
    }


def _engram_demo(size: int) -> dict[str, Any]:
    return {
        "engram_vocab_size": [size, size],
        "max_ngram_size": 3,
        "n_embed_per_ngram": 512,
        "n_head_per_ngram": 8,
        "layer_ids": [1, 15],
        "pad_id": 2,
        "seed": 0,
    }


def _qwen_ple(size: int) -> dict[str, Any]:
    return {
        "ple_layer_ids": [2],
        "ple_embed_dim": 2560,
        "ple_embedding_dtype": "float8_e4m3fn",
        "ngram_vocab_size_base": size,
        "split_ngram_parts": 8,
        "vocab_size": 248320,
        "eos_token_id": 248044,
    }


def _longcat(size: int) -> dict[str, Any]:
    vocab_size = 131072  # a power of two: the ratio is exact
    return {
        "ngram_vocab_size_ratio": size / vocab_size,
        "vocab_size": vocab_size,
        "emb_neighbor_num": 4,
        "emb_split_num": 4,
        "hidden_size": 3072,
        "eos_token_id": 2,
    }


def _gemma_ple(size: int) -> dict[str, Any]:
    return {
        "vocab_size_per_layer_input": size,
        "vocab_size": size,
        "hidden_size_per_layer_input": 256,
        "num_hidden_layers": 30,
    }


CONFIGS: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "deepseek-v4.1": _deepseek_v41,
    "engram-demo": _engram_demo,
    "qwen-ple": _qwen_ple,
    "longcat": _longcat,
    "gemma-ple": _gemma_ple,
}


@dataclass(frozen=True)
class SyntheticModel:
    """config: what the model's config.json would say. spec: the blueprint's, scales included."""

    config: dict[str, Any]
    blueprint: Blueprint
    spec: ModelSpec


def synthetic_model(like: str, size: int, tokenizer: Path | None = None, name: str | None = None) -> SyntheticModel:
    """Derive a model of the family `like` (a key of CONFIGS).

    size: what the family's config calls the (n-gram) vocabulary size: about the rows of one head.
    tokenizer: a tokenizer.json for the DeepSeek families; without one their token map is the identity.
    Raises SpecError for an impossible size or a bad tokenizer.
    """
    config = CONFIGS[like](size)
    builder = find_builder(config)
    assert builder is not None
    if builder.needs_tokenizer and tokenizer is None:
        identity = TokenMap(np.arange(DEEPSEEK_TOKEN_IDS, dtype=np.int32))
        plan = builder.build(config, identity, name or builder.name, None)
    else:
        plan = blueprint(config, tokenizer, name)
    if like == "deepseek-v4.1":
        assert plan.spec.token_map is not None
        config["engram_compressed_vocab_size"] = plan.spec.token_map.size
        config["engram_num_embeddings"] = [table.num_rows for table in plan.spec.tables]
    return SyntheticModel(config, plan, with_scales(plan.spec, dict.fromkeys(plan.scales, SYNTHETIC_SCALE)))


def synth(
    like: str,
    size: int,
    out: Path,
    tokenizer: Path | None = None,
    name: str | None = None,
    *,
    file_bytes: int = FILE_BYTES,
    block_bytes: int = BLOCK_BYTES,
    quiet: bool = True,
) -> str:
    """Write a synthetic packed model (see `synthetic_model`); returns its version.

    Raises SpecError, or OutputError if `out` exists or cannot be written.
    """
    spec = synthetic_model(like, size, tokenizer, name).spec
    return write_tables(
        out, spec, {"rows": "synthetic"}, fill_rows, file_bytes=file_bytes, block_bytes=block_bytes, quiet=quiet
    )


def fill_rows(table: TableSpec, start: int, out: npt.NDArray[np.uint8]) -> None:
    """Fill `out`, uint8 [n, row_bytes], with the synthetic rows start .. start + n."""
    step = max(1, _CHUNK_BYTES // table.row_bytes)
    for at in range(0, len(out), step):
        chunk = out[at : at + step]
        chunk[:] = synthetic_rows(table, np.arange(start + at, start + at + len(chunk), dtype=np.uint64))
