"""Qwen's n-gram per-layer embedding (`qwen4_exp`): raw token ids, splitmix64 multipliers, EOS as boundary.

`ple_layer_ids` counts decoder layers from 1: table `layer_L` is the one that the config calls L, and its tensors lie
under `layers.{L-1}.ple.ple_embedding.`. Primes and multipliers count these layers from 0 in ascending order. A table is
split into parts, `ngram_embedding.shard_0.weight` and on (`shards.0` where MLX wrote it), or it is one tensor.
"""

from collections.abc import Mapping
from itertools import count
from typing import Any

from engrampool_proto.builders.blueprint import (
    MAX_HEADS_PER_NGRAM,
    MAX_NGRAM,
    Blueprint,
    Builder,
    Part,
    end_of_text,
    float_dtype,
    integer,
    integers,
    spare_rows,
)
from engrampool_proto.builders.primes import next_prime
from engrampool_proto.builders.rows import nvfp4_segments, rows_of
from engrampool_proto.builders.stored import Stored, StoredTensor
from engrampool_proto.errors import SpecError
from engrampool_proto.hashing import XorMix
from engrampool_proto.spec import ModelSpec, RowFormat, Segment, TableSpec
from engrampool_proto.token_map import TokenMap

_LAYER_PRIME = 10007
_GAMMA = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1
_FLOATS = ("bfloat16", "float16", "float32")
# Segment -> the leaf of its tensor's name; row dtype -> the leaf of the one scalar for the whole table.
_TENSORS = {"values": "weight", "scales": "weight_scale"}
_TABLE_SCALE = {"float8_e4m3fn": "weight_scale", "nvfp4": "weight_scale_2"}


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
    """As far as the config tells; a checkpoint's tensors may be others."""
    stated = config.get("ple_embedding_dtype")
    if stated is not None:
        dtype = str(stated).removeprefix("torch.")
        if dtype not in (*_TABLE_SCALE, *_FLOATS):
            known = ", ".join((*_TABLE_SCALE, *_FLOATS))
            raise SpecError(f"config.json: ple_embedding_dtype must be {known} or absent; it is {stated!r}")
        return dtype
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
    return RowFormat(tuple(nvfp4_segments(head_dim)) if dtype == "nvfp4" else (Segment("values", dtype, head_dim),))


def _find(stored: Stored, layer: int) -> tuple[str, list[StoredTensor]]:
    """The table's name without `.weight`, in full, and its parts in order, or the one tensor that is all of it."""
    places = [f"layers.{layer - 1}.ple.{at}ngram_embedding" for at in ("ple_embedding.", "")]
    for part in [f"{place}.{split}" for place in places for split in ("shard_", "shards.")]:
        parts = []
        for number in count():
            tensor = stored.find(f"{part}{number}.weight")
            if tensor is None:
                break
            parts.append(tensor)
        if parts:
            return parts[0].name[: parts[0].name.rindex(".shard")], parts
    (whole,) = stored.need([[f"{places[0]}.shard_0.weight", *(f"{place}.weight" for place in places)]])
    return whole.name.removesuffix(".weight"), [whole]


def _stored_table(stored: Stored, table: TableSpec, values: int) -> tuple[TableSpec, tuple[Part, ...], tuple[str, ...]]:
    """The table as the checkpoint holds it: its row format, its rows where the padding is another, parts and scales."""
    name, tensors = _find(stored, table.layer)
    rows = [tensor.shape[0] if tensor.shape else 0 for tensor in tensors]
    if sum(rows) < sum(table.hash.head_rows()) or sum(rows) - table.num_rows > spare_rows(table):
        raise SpecError(
            f"the checkpoint has {sum(rows)} rows of {name} in {len(tensors)} tensors, {tensors[0].name} to "
            f"{tensors[-1].name}; config.json gives {table.num_rows}: either is incomplete, or of another model"
        )
    left, weights = table.num_rows, []
    for tensor, num_rows in zip(tensors, rows, strict=True):
        if min(num_rows, left):
            weights.append((tensor, min(num_rows, left)))
            left -= weights[-1][1]
    row_format, parts, scales = rows_of(stored, weights, values, name)
    kept = TableSpec(table.layer, table.num_rows - left, row_format, table.hash)
    return kept, parts, scales


def _build(config: Mapping[str, Any], token_map: TokenMap | None, name: str, stored: Stored | None) -> Blueprint:
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
    eos = end_of_text(config)
    base = integer(config, "ngram_vocab_size_base", 20_000_000, low=2)
    divisor = integer(config, "make_ngram_vocab_size_divisible_by", 128, low=1)
    shards = integer(config, "split_ngram_parts", 512, low=1, high=1 << 16)
    seed = integer(config, "seed", 1234, high=_MASK)
    dtype = "bfloat16" if stored is not None else _row_dtype(config)
    rows = _row_format(dtype, dim // heads)
    tables, parts, scales, constants = [], {}, {}, {}
    prime = base - 1
    for index, layer in enumerate(layers):
        primes = []
        for _ in range(heads):
            prime = next_prime(prime)
            primes.append(prime)
        by_order = tuple(tuple(primes[i : i + per_ngram]) for i in range(0, heads, per_ngram))
        mix = XorMix(_multipliers(index, seed, ngram_size, vocab_size), by_order, fill=eos, stop=eos)
        table = TableSpec(layer, -(-sum(primes) // divisor) * divisor, rows, mix)
        for place in (f"layers.{layer - 1}.ple.ple_embedding.", f"layers.{layer - 1}.ple."):
            constants[place + "layer_multipliers"] = mix.multipliers
            constants[place + "ngram_heads_vocab_sizes"] = tuple(primes)
            constants[place + "ngram_heads_offsets"] = tuple(int(first) for first in table.head_offsets)
        if stored is not None:
            table, parts[layer], scale = _stored_table(stored, table, dim // heads)
            if scale:
                scales[layer] = scale
        else:
            embedding = f"layers.{layer - 1}.ple.ple_embedding.ngram_embedding"
            part_rows = -(-table.num_rows // shards)
            parts[layer] = tuple(
                Part(
                    min(part_rows, table.num_rows - start),
                    {s.name: f"{embedding}.shard_{i}.{_TENSORS[s.name]}" for s in rows.segments},
                )
                for i, start in enumerate(range(0, table.num_rows, part_rows))
            )
            if dtype in _TABLE_SCALE:
                scales[layer] = (f"{embedding}.{_TABLE_SCALE[dtype]}",)
        tables.append(table)
    return Blueprint(ModelSpec(name, vocab_size, tuple(tables)), parts, scales, constants)


QWEN_PLE = Builder("qwen-ple", (("ple_layer_ids",),), (".ple.",), False, _build)
