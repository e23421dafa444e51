"""Small models of every family, random requests for them, and both sides' answers side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import golden_vectors
import numpy as np
from hash_reference import Model, Request
from hypothesis import strategies as st

from engrampool_proto.builders import blueprint
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec

# The golden files' configs with few, small heads: collisions of wrong and right rows stay rare, primes cheap.
_SMALL: dict[str, dict[str, Any]] = {
    "deepseek-v4.1": {"engram_vocab_size": 50021, "engram_n_heads": 2, "engram_num_embeddings": None},
    "engram-demo": {"engram_vocab_size": [5003, 70001], "n_head_per_ngram": 2, "layer_ids": [15, 1], "seed": 7},
    "qwen-ple": {"ngram_vocab_size_base": 4001, "heads_per_ngram": 3, "ngram_size": 4, "ple_embed_dim": 9 * 32},
    "longcat": {"ngram_vocab_size_ratio": 0.37, "emb_split_num": 2},
    "gemma-ple": {"vocab_size_per_layer_input": 200000},
}
FAMILIES = tuple(_SMALL)


@dataclass(frozen=True)
class Case:
    """One model as the implementation and as the reference have it."""

    spec: ModelSpec
    tables: Model
    eos: int


def case(family: str, tokenizer: Path) -> Case:
    config = golden_vectors.CONFIGS[family] | _SMALL[family]
    spec = blueprint(config, tokenizer).spec
    return Case(spec, golden_vectors.model(family, config), config.get("eos_token_id", 2))


def requests(vocab: int, eos: int, depth: int) -> st.SearchStrategy[list[Request]]:
    """One to five requests, empty ones too, whose look-back columns and optional flags one batch can hold."""
    token = st.one_of(st.just(eos), st.integers(0, vocab - 1), st.sampled_from([0, 1, vocab - 1]))

    @st.composite
    def batch(draw: st.DrawFn) -> list[Request]:
        width = draw(st.integers(0, depth))
        has_dead, has_before = draw(st.booleans()), draw(st.booleans())
        flag = st.sampled_from([False, False, False, True])
        out = []
        for _ in range(draw(st.integers(1, 5))):
            tokens = draw(st.lists(token, max_size=9))
            before = draw(st.lists(st.one_of(token, st.just(-1)), min_size=width, max_size=width))
            dead = draw(st.lists(flag, min_size=len(tokens), max_size=len(tokens))) if has_dead else None
            before_dead = draw(st.lists(flag, min_size=width, max_size=width)) if has_before else None
            out.append(Request(tokens, before, dead, before_dead))
        return out

    return batch()


def batch_of(parts: Sequence[Request]) -> TokenBatch:
    """The requests as engines hand them over. All have as many look-back columns, and the same flags or none."""
    width = len(parts[0].lookback)
    flags = [f for part in parts for f in part.dead or ()]
    before_flags = [part.lookback_dead for part in parts]
    return TokenBatch(
        np.array([t for part in parts for t in part.tokens], np.int32),
        np.array([0, *accumulate(len(part.tokens) for part in parts)], np.int32),
        np.array([part.lookback for part in parts], np.int32).reshape(len(parts), width),
        None if parts[0].dead is None else np.array(flags, bool),
        None if before_flags[0] is None else np.array(before_flags, bool).reshape(len(parts), width),
    )


def reference_rows(tables: Model, parts: Sequence[Request]) -> dict[int, list[list[int]]]:
    return {layer: [row for part in parts for row in table.rows(part)] for layer, table in sorted(tables.items())}


def as_lists(rows: dict[int, Any]) -> dict[int, list[list[int]]]:
    return {layer: ids.tolist() for layer, ids in rows.items()}


def chunked(request: Request, cuts: Sequence[int], depth: int) -> list[Request]:
    """`request` cut at `cuts`; each piece carries the last `depth` tokens before it and their flags."""
    pieces = []
    dead = request.dead or [False] * len(request.tokens)
    before_dead = request.lookback_dead or [False] * len(request.lookback)
    for start, stop in zip([0, *cuts], [*cuts, len(request.tokens)], strict=True):
        tokens = request.tokens[:start][::-1] + request.lookback
        flags = dead[:start][::-1] + before_dead
        missing = max(0, depth - len(tokens))
        lookback = (tokens + [-1] * missing)[:depth]
        pieces.append(
            Request(request.tokens[start:stop], lookback, dead[start:stop], (flags + [False] * missing)[:depth])
        )
    return pieces
