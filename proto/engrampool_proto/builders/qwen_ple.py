"""Qwen's n-gram per-layer embedding (vLLM's `qwen4_exp`): raw token ids, splitmix64 multipliers, EOS as boundary.

`ple_layer_ids` counts decoder layers from 1: table `layer_L` is the one that the config calls L, and its tensors lie
under `layers.{L-1}.`. Primes and multipliers count these layers from 0 in ascending order.
"""

from collections.abc import Mapping
from typing import Any

from engrampool_proto.builders.blueprint import (
    MAX_HEADS_PER_NGRAM,
    MAX_NGRAM,
    Blueprint,
    Builder,
    Part,
    float_dtype,
    integer,
    integers,
)
from engrampool_proto.builders.primes import next_prime
from engrampool_proto.errors import SpecError
from engrampool_proto.hashing import XorMix
from engrampool_proto.spec import ModelSpec, RowFormat, Segment, TableSpec
from engrampool_proto.token_map import TokenMap

_LAYER_PRIME = 10007
_GAMMA = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
# Segment -> the leaf of its tensor's name; row dtype -> the leaf of the one scalar for the whole table.
_TENSORS = {"values": "weight", "scales": "weight_scale"}
_TABLE_SCALE = {"float8_e4m3fn": "weight_scale", "nvfp4": "weight_scale_2"}
_NVFP4_BLOCK = 16


def _splitmix64(value: int) -> int:
    """One step of splitmix64 from the state `value` (Steele, Lea and Flood, 2014): add gamma, then mix."""
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _multipliers(index: int, seed: int, ngram_size: int, vocab_size: int) -> tuple[int, ...]:
    half = max(1, (2**63 - 1) // vocab_size // 2)
    base = seed + _LAYER_PRIME * index
    return tuple(2 * (_splitmix64(base + _GAMMA * (i + 1)) % half) + 1 for i in range(ngram_size))


def _row_dtype(config: Mapping[str, Any]) -> str:
    stated = config.get("ple_embedding_dtype")
    if stated in ("float8_e4m3fn", "nvfp4"):
        return str(stated)
    if stated is not None:
        raise SpecError(f"config.json: ple_embedding_dtype must be float8_e4m3fn, nvfp4 or absent; it is {stated!r}")
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise SpecError(f"config.json: quantization_config must be an object; it is {quantization!r}")
    unquantised = quantization.get("ignored_layers") or quantization.get("modules_to_not_convert") or []
    if not isinstance(unquantised, list) or not all(isinstance(name, str) for name in unquantised):
        raise SpecError(f"config.json: quantization_config must list the names of unquantised layers: {unquantised!r}")
    if quantization.get("quant_method") == "fp8" and not any("ngram_embedding" in name for name in unquantised):
        return "float8_e4m3fn"
    return float_dtype(config, "bfloat16")


def _row_format(dtype: str, head_dim: int) -> RowFormat:
    if dtype != "nvfp4":
        return RowFormat((Segment("values", dtype, head_dim),))
    if head_dim % _NVFP4_BLOCK:
        raise SpecError(f"config.json: nvfp4 rows need a multiple of {_NVFP4_BLOCK} values; they have {head_dim}")
    packed = Segment("values", "float4_e2m1fn_x2", head_dim // 2)
    return RowFormat((packed, Segment("scales", "float8_e4m3fn", head_dim // _NVFP4_BLOCK)))


def _build(config: Mapping[str, Any], token_map: TokenMap | None, name: str) -> Blueprint:
    layers = sorted(set(integers(config, "ple_layer_ids")))
    if layers[0] < 1:
        raise SpecError(f"config.json: ple_layer_ids counts from 1; it has {layers[0]}")
    ngram_size = integer(config, "ngram_size", 3, low=2, high=MAX_NGRAM)
    per_ngram = integer(config, "heads_per_ngram", 8, low=1, high=MAX_HEADS_PER_NGRAM)
    heads = (ngram_size - 1) * per_ngram
    dim = integer(config, "ple_embed_dim", config.get("hidden_size"), low=1)
    if dim % heads:
        raise SpecError(f"config.json: ple_embed_dim {dim} is no multiple of the {heads} heads")
    vocab_size = integer(config, "vocab_size", low=1)
    eos = integer(config, "eos_token_id", high=vocab_size - 1)
    base = integer(config, "ngram_vocab_size_base", 20_000_000, low=2)
    divisor = integer(config, "make_ngram_vocab_size_divisible_by", 128, low=1)
    shards = integer(config, "split_ngram_parts", 512, low=1, high=1 << 16)
    seed = integer(config, "seed", 1234, high=_MASK)
    dtype = _row_dtype(config)
    rows = _row_format(dtype, dim // heads)
    tables, parts, scales = [], {}, {}
    prime = base - 1
    for index, layer in enumerate(layers):
        primes = []
        for _ in range(heads):
            prime = next_prime(prime)
            primes.append(prime)
        by_order = tuple(tuple(primes[i : i + per_ngram]) for i in range(0, heads, per_ngram))
        mix = XorMix(_multipliers(index, seed, ngram_size, vocab_size), by_order, fill=eos, stop=eos)
        num_rows = -(-sum(primes) // divisor) * divisor
        tables.append(TableSpec(layer, num_rows, rows, mix))
        embedding = f"layers.{layer - 1}.ple.ngram_embedding"
        shard_rows = -(-num_rows // shards)
        tensors = {segment.name: _TENSORS[segment.name] for segment in rows.segments}
        parts[layer] = tuple(
            Part(min(shard_rows, num_rows - start), {s: f"{embedding}.shard_{i}.{t}" for s, t in tensors.items()})
            for i, start in enumerate(range(0, num_rows, shard_rows))
        )
        if dtype in _TABLE_SCALE:
            scales[layer] = f"{embedding}.{_TABLE_SCALE[dtype]}"
    return Blueprint(ModelSpec(name, vocab_size, tuple(tables)), parts, scales)


QWEN_PLE = Builder("qwen-ple", ("ple_layer_ids", "ngram_vocab_size_base"), False, _build)
