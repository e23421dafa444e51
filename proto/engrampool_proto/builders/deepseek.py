"""DeepSeek's Engram: the paper's demo (deepseek-ai/Engram, engram_demo_v1.py) and DeepSeek-V4.1's config.json.

Both hash compressed token ids; the demo gives each n-gram order its own vocabulary size and rows of plain floats,
V4.1 one size for all orders and rows of float8 values with one power-of-two scale for every 32 of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from engrampool_proto.builders.blueprint import (
    MAX_HEADS_PER_NGRAM,
    MAX_NGRAM,
    Blueprint,
    Builder,
    Part,
    float_dtype,
    integer,
    integers,
    spare_rows,
)
from engrampool_proto.builders.primes import next_prime
from engrampool_proto.builders.rows import rows_of
from engrampool_proto.builders.stored import Stored
from engrampool_proto.errors import SpecError
from engrampool_proto.hashing import XorMix
from engrampool_proto.spec import ModelSpec, RowFormat, Segment, TableSpec
from engrampool_proto.token_map import TokenMap

_LAYER_PRIME = 10007
_VALUES_PER_SCALE = 32


def _multipliers(layer: int, seed: int, max_ngram: int, compressed_size: int) -> tuple[int, ...]:
    """Odd multipliers small enough that a product with a compressed id cannot overflow int64."""
    bound = max(1, (2**63 - 1) // compressed_size // 2)
    drawn = np.random.default_rng(seed + _LAYER_PRIME * layer).integers(0, bound, size=max_ngram, dtype=np.int64)
    return tuple(int(m) * 2 + 1 for m in drawn)


def _primes(layers: int, vocab_sizes: Sequence[int], heads: int) -> list[tuple[tuple[int, ...], ...]]:
    """Head sizes, [layer][order][head]: ascending primes from each order's size on, none of them used twice."""
    taken: set[int] = set()
    by_layer = []
    for _ in range(layers):
        by_order = []
        for size in vocab_sizes:
            prime, row = size - 1, []
            for _ in range(heads):
                prime = next_prime(prime)
                while prime in taken:
                    prime = next_prime(prime)
                taken.add(prime)
                row.append(prime)
            by_order.append(tuple(row))
        by_layer.append(tuple(by_order))
    return by_layer


def _tables(
    layers: Sequence[int],
    vocab_sizes: Sequence[int],
    heads: int,
    seed: int,
    pad: int,
    token_map: TokenMap,
    rows: RowFormat,
) -> list[TableSpec]:
    """One table a layer, in the config's order, which is the order that primes are handed out in."""
    if not 0 <= pad < token_map.vocab_size:
        raise SpecError(f"config.json: the pad id {pad} is no token of the tokenizer ({token_map.vocab_size} ids)")
    if len(set(layers)) != len(layers):
        raise SpecError(f"config.json: a layer is named twice in {list(layers)}")
    fill = int(token_map.ids[pad])
    tables = []
    for layer, primes in zip(layers, _primes(len(layers), vocab_sizes, heads), strict=True):
        mix = XorMix(_multipliers(layer, seed, len(vocab_sizes) + 1, token_map.size), primes, fill)
        tables.append(TableSpec(layer, sum(mix.head_rows()), rows, mix))
    return tables


def _model(name: str, token_map: TokenMap, tables: list[TableSpec]) -> ModelSpec:
    return ModelSpec(name, token_map.vocab_size, tuple(sorted(tables, key=lambda t: t.layer)), token_map)


def _build_v41(config: Mapping[str, Any], token_map: TokenMap | None, name: str, stored: Stored | None) -> Blueprint:
    assert token_map is not None
    layers = integers(config, "engram_layer_ids")
    max_ngram = integer(config, "engram_max_ngram_size", low=2, high=MAX_NGRAM)
    heads = integer(config, "engram_n_heads", low=1, high=MAX_HEADS_PER_NGRAM)
    dim = integer(config, "engram_head_dim", low=_VALUES_PER_SCALE)
    if dim % _VALUES_PER_SCALE:
        raise SpecError(f"config.json: engram_head_dim must be a multiple of {_VALUES_PER_SCALE}; it is {dim}")
    compressed = integer(config, "engram_compressed_vocab_size", token_map.size)
    if compressed != token_map.size:
        raise SpecError(
            f"config.json says engram_compressed_vocab_size {compressed}, the tokenizer gives {token_map.size}; "
            "every multiplier depends on it, so this is not the tokenizer that the tables were trained with"
        )
    rows = RowFormat(
        (Segment("values", "float8_e4m3fn", dim), Segment("scales", "float8_e8m0fnu", dim // _VALUES_PER_SCALE))
    )
    sizes = [integer(config, "engram_vocab_size", low=2)] * (max_ngram - 1)
    pad = integer(config, "engram_pad_token_id")
    tables = _tables(layers, sizes, heads, 0, pad, token_map, rows)
    if config.get("engram_num_embeddings") is not None:
        stated = integers(config, "engram_num_embeddings", high=2**63 - 1)
        derived = [table.num_rows for table in tables]
        if len(stated) != len(derived) or not all(
            0 <= rows - table.num_rows <= spare_rows(table) for rows, table in zip(stated, tables, strict=True)
        ):
            raise SpecError(
                f"config.json says engram_num_embeddings {stated}; its head sizes sum to {derived}, and a table has "
                "at most a few rows more"
            )
        tables = [replace(table, num_rows=rows) for table, rows in zip(tables, stated, strict=True)]
    names = {layer: [f"layers.{layer}.engram.embed.weight", f"layers.{layer}.engram.embed.scale"] for layer in layers}
    if stored is not None:
        needed = iter(stored.need([[tensor] for pair in names.values() for tensor in pair]))
        names = {layer: [next(needed).name, next(needed).name] for layer in layers}
    parts = {t.layer: (Part(t.num_rows, dict(zip(("values", "scales"), names[t.layer], strict=True))),) for t in tables}
    return Blueprint(_model(name, token_map, tables), parts, rows_stated=True)


def _build_demo(config: Mapping[str, Any], token_map: TokenMap | None, name: str, stored: Stored | None) -> Blueprint:
    assert token_map is not None
    sizes = integers(config, "engram_vocab_size")
    max_ngram = integer(config, "max_ngram_size", low=2, high=MAX_NGRAM)
    heads = integer(config, "n_head_per_ngram", low=1, high=MAX_HEADS_PER_NGRAM)
    dim = integer(config, "n_embed_per_ngram", low=1)
    if len(sizes) != max_ngram - 1 or min(sizes) < 2:
        raise SpecError(
            f"config.json: engram_vocab_size needs a size above 1 for each order 2 .. {max_ngram}; it is {sizes}"
        )
    if dim % heads:
        raise SpecError(f"config.json: n_embed_per_ngram {dim} is no multiple of n_head_per_ngram {heads}")
    rows = RowFormat((Segment("values", float_dtype(config, "float32"), dim // heads),))
    pad, seed = integer(config, "pad_id"), integer(config, "seed", 0, high=2**63 - 1)
    tables = _tables(integers(config, "layer_ids"), sizes, heads, seed, pad, token_map, rows)
    parts: dict[int, tuple[Part, ...]] = {}
    scales, constants = {}, {}
    for at, table in enumerate(tables):
        embedding = f"layers.{table.layer}.engram.multi_head_embedding"
        parts[table.layer] = (Part(table.num_rows, {"values": f"{embedding}.embedding.weight"}),)
        constants[f"{embedding}.offsets"] = tuple(int(first) for first in table.head_offsets)
        if stored is not None:
            (tensor,) = stored.need([list(parts[table.layer][0].tensors.values())])
            rows, parts[table.layer], scale = rows_of(stored, [(tensor, table.num_rows)], dim // heads)
            tables[at] = replace(table, row_format=rows)
            if scale:
                scales[table.layer] = scale
    return Blueprint(_model(name, token_map, tables), parts, scales, constants)


DEEPSEEK_V41 = Builder(
    "deepseek-v4.1", (("engram_layer_ids", "engram_max_ngram_size"),), ("engram.",), True, _build_v41
)
ENGRAM_DEMO = Builder(
    "engram-demo", (("engram_vocab_size", "max_ngram_size", "n_head_per_ngram"),), ("engram.",), True, _build_demo
)
