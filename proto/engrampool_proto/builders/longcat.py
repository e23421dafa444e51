"""LongCat-Flash's n-gram embedding (SGLang's `n_gram_embedding.py`, vLLM's `longcat_flash_ngram.py`).

It is added to the input embedding, so its one table counts as layer 0. One checkpoint tensor a head. LongCat-2.0's
config and tensors have other names for the same things, the `oe_` ones.
"""

from collections.abc import Mapping
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
)
from engrampool_proto.builders.rows import rows_of
from engrampool_proto.builders.stored import Stored
from engrampool_proto.errors import SpecError
from engrampool_proto.hashing import Polynomial
from engrampool_proto.spec import ModelSpec, RowFormat, Segment, TableSpec
from engrampool_proto.token_map import TokenMap

_KEYS = ("ngram_vocab_size_ratio", "emb_neighbor_num", "emb_split_num")
_OE_KEYS = ("oe_vocab_size_ratio", "oe_neighbor_num", "oe_split_num")


def _build(config: Mapping[str, Any], token_map: TokenMap | None, name: str, stored: Stored | None) -> Blueprint:
    ratio_key, neighbor_key, split_key = _KEYS if config.get(_KEYS[0]) is not None else _OE_KEYS
    vocab_size = integer(config, "vocab_size", low=2)
    ratio = config.get(ratio_key)
    if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 < ratio < 2**31:
        raise SpecError(f"config.json: {ratio_key} must be a positive number; it is {ratio!r}")
    longest = integer(config, neighbor_key, low=2, high=MAX_NGRAM)
    splits = integer(config, split_key, low=1, high=MAX_HEADS_PER_NGRAM)
    hidden = integer(config, "hidden_size", low=1)
    eos = end_of_text(config)
    heads = (longest - 1) * splits
    if hidden < heads:
        raise SpecError(f"config.json: hidden_size {hidden} gives {heads} heads no values")
    base = int(ratio * vocab_size)
    if base + 2 * heads >= 2**32:
        raise SpecError(f"config.json: {ratio_key} {ratio} gives heads of more than 2**32 rows")
    sizes = [base + 2 * head + 1 for head in range(heads)]
    by_order = tuple(tuple(sizes[i : i + splits]) for i in range(0, heads, splits))
    weights = tuple(
        tuple(tuple(pow(vocab_size, back, modulus) for back in range(longest)) for modulus in moduli)
        for moduli in by_order
    )
    values, scales = hidden // heads, tuple[str, ...]()
    names = [(f"ngram_embeddings.embedders.{i}.weight", f"oe_embed_tokens{i}.weight") for i in range(heads)]
    if stored is None:
        rows = RowFormat((Segment("values", float_dtype(config, "bfloat16"), values),))
        parts = tuple(Part(size, {"values": name}) for size, (name, _) in zip(sizes, names, strict=True))
    else:
        rows, parts, scales = rows_of(stored, list(zip(stored.need(names), sizes, strict=True)), values)
    table = TableSpec(0, sum(sizes), rows, Polynomial(by_order, weights, stop=eos))
    return Blueprint(ModelSpec(name, vocab_size, (table,)), {0: parts}, {0: scales} if scales else {})


LONGCAT = Builder("longcat", (_KEYS, _OE_KEYS), ("ngram_embeddings.", "oe_embed_tokens"), False, _build)
