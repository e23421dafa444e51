"""LongCat-Flash's n-gram embedding (SGLang's `n_gram_embedding.py`, vLLM's `longcat_flash_ngram.py`).

It is added to the input embedding, so its one table counts as layer 0. One checkpoint tensor a head.
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
)
from engrampool_proto.errors import SpecError
from engrampool_proto.hashing import Polynomial
from engrampool_proto.spec import ModelSpec, RowFormat, Segment, TableSpec
from engrampool_proto.token_map import TokenMap


def _build(config: Mapping[str, Any], token_map: TokenMap | None, name: str) -> Blueprint:
    vocab_size = integer(config, "vocab_size", low=2)
    ratio = config.get("ngram_vocab_size_ratio")
    if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 < ratio < 2**31:
        raise SpecError(f"config.json: ngram_vocab_size_ratio must be a positive number; it is {ratio!r}")
    longest = integer(config, "emb_neighbor_num", low=2, high=MAX_NGRAM)
    splits = integer(config, "emb_split_num", low=1, high=MAX_HEADS_PER_NGRAM)
    hidden = integer(config, "hidden_size", low=1)
    eos = integer(config, "eos_token_id", high=vocab_size - 1)
    heads = (longest - 1) * splits
    if hidden < heads:
        raise SpecError(f"config.json: hidden_size {hidden} gives {heads} heads no values")
    base = int(ratio * vocab_size)
    if base + 2 * heads >= 2**32:
        raise SpecError(f"config.json: ngram_vocab_size_ratio {ratio} gives heads of more than 2**32 rows")
    sizes = [base + 2 * head + 1 for head in range(heads)]
    by_order = tuple(tuple(sizes[i : i + splits]) for i in range(0, heads, splits))
    weights = tuple(
        tuple(tuple(pow(vocab_size, back, modulus) for back in range(longest)) for modulus in moduli)
        for moduli in by_order
    )
    rows = RowFormat((Segment("values", float_dtype(config, "bfloat16"), hidden // heads),))
    table = TableSpec(0, sum(sizes), rows, Polynomial(by_order, weights, stop=eos))
    parts = tuple(Part(size, {"values": f"ngram_embeddings.embedders.{i}.weight"}) for i, size in enumerate(sizes))
    return Blueprint(ModelSpec(name, vocab_size, (table,)), {0: parts})


LONGCAT = Builder("longcat", ("ngram_vocab_size_ratio", "emb_neighbor_num", "emb_split_num"), False, _build)
