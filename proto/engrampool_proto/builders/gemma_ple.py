"""Gemma 3n / 4 per-layer embeddings: one row a token id, which holds every layer's slice one after the other.

The model projects all slices at its start, so the one table counts as layer 0.
"""

from collections.abc import Mapping
from typing import Any

from engrampool_proto.builders.blueprint import Blueprint, Builder, Part, float_dtype, integer
from engrampool_proto.builders.rows import rows_of
from engrampool_proto.builders.stored import Stored
from engrampool_proto.hashing import Identity
from engrampool_proto.spec import ModelSpec, RowFormat, Segment, TableSpec
from engrampool_proto.token_map import TokenMap

_TENSOR = "embed_tokens_per_layer.weight"


def _build(config: Mapping[str, Any], token_map: TokenMap | None, name: str, stored: Stored | None) -> Blueprint:
    key = "vocab_size" if config.get("vocab_size_per_layer_input") is None else "vocab_size_per_layer_input"
    num_rows = integer(config, key, low=1)
    vocab_size = integer(config, "vocab_size", num_rows, low=1)
    values = integer(config, "num_hidden_layers", low=1) * integer(config, "hidden_size_per_layer_input", low=1)
    parts: tuple[Part, ...] = (Part(num_rows, {"values": _TENSOR}),)
    scale: tuple[str, ...] = ()
    if stored is None:
        rows = RowFormat((Segment("values", float_dtype(config, "bfloat16"), values),))
    else:
        (tensor,) = stored.need([[_TENSOR]])
        rows, parts, scale = rows_of(stored, [(tensor, num_rows)], values)
    table = TableSpec(0, num_rows, rows, Identity(num_rows))
    return Blueprint(ModelSpec(name, vocab_size, (table,)), {0: parts}, {0: scale} if scale else {})


GEMMA_PLE = Builder("gemma-ple", (("hidden_size_per_layer_input",),), ("embed_tokens_per_layer",), False, _build)
