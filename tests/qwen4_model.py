"""A small model of Qwen4's layout: two layers of n-gram tables, in each form that engines keep them in."""

from types import SimpleNamespace

import numpy as np
import torch

from engrampool_proto.builders import blueprint
from engrampool_proto.synthetic import synthetic_rows

EOS, VOCABULARY, LAYERS = 7, 500, [2, 5]
CONFIG = {
    "vocab_size": VOCABULARY,
    "ple_layer_ids": LAYERS,
    "ple_embed_dim": 512,
    "ngram_size": 3,
    "heads_per_ngram": 8,
    "ngram_vocab_size_base": 300,
    "make_ngram_vocab_size_divisible_by": 128,
    "split_ngram_parts": 4,
    "eos_token_id": EOS,
}
HEADS, DIM, SCALE = 16, 32, 0.0321
FORMS = ("bfloat16", "float8_e4m3fn", "nvfp4")


def config_of(form, **changes):
    """What engines read of config.json."""
    return SimpleNamespace(**{**CONFIG, "ple_embedding_dtype": None if form == "bfloat16" else form, **changes})


def spec_of(form):
    return blueprint({**CONFIG, "ple_embedding_dtype": form}).spec


def checkpoint(table, tables=True):
    """A layer's tensors as a checkpoint has them, by name: tables in parts, what they have one of, and constants."""
    rows = torch.from_numpy(synthetic_rows(table, np.arange(table.num_rows, dtype=np.uint64)))
    dtypes = [segment.dtype for segment in table.row_format.segments]
    if dtypes[0] == "float4_e2m1fn_x2":
        parts = {"weight": rows[:, : DIM // 2], "weight_scale": rows[:, DIM // 2 :].view(torch.float8_e4m3fn)}
        once = {"ngram_embedding.weight_scale_2": torch.tensor([SCALE])}
    else:
        parts = {"weight": rows.view(getattr(torch, dtypes[0]))}
        once = {"ngram_embedding.weight_scale": torch.tensor([SCALE])} if dtypes[0] == "float8_e4m3fn" else {}
    size = -(-table.num_rows // CONFIG["split_ngram_parts"])
    tensors = {
        f"ngram_embedding.shard_{at}.{leaf}": whole[at * size : (at + 1) * size].contiguous()
        for leaf, whole in parts.items()
        for at in range(CONFIG["split_ngram_parts"])
    }
    constants = {
        "layer_multipliers": table.hash.multipliers,
        "ngram_heads_vocab_sizes": table.hash.head_rows(),
        "ngram_heads_offsets": table.head_offsets.tolist(),
    }
    made = {name: torch.tensor(values, dtype=torch.int64) for name, values in constants.items()}
    return {**(tensors if tables else {}), **once, **made}
