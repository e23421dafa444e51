"""Packed models and checkpoints that the server's tests read, and what must be in them."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from tokenizers import Tokenizer, models

from engrampool_proto.synthetic import synthetic_rows
from engrampool_server.files.synth import synth
from engrampool_server.files.synth_checkpoint import synth_checkpoint
from engrampool_server.files.table_files import PackedModel
from server_fixtures import Events
from small_model import TOKENIZER

# Small enough to be quick, and still several files of several blocks each.
SIZES = {"deepseek-v4.1": 30, "engram-demo": 60, "qwen-ple": 60, "longcat": 60, "gemma-ple": 60}
FILE_BYTES, BLOCK_BYTES = 200_000, 30_000


@pytest.fixture(scope="session")
def tokenizer() -> Path:
    """The DeepSeek V4 tokenizer.json."""
    return TOKENIZER


@pytest.fixture(scope="session")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json of 40 words that is mapped in no time, for tests that are not about the token map."""
    words = {f"word{i}": i for i in range(40)}
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    Tokenizer(models.WordLevel(words, unk_token="word0")).save(str(path))
    return path


@pytest.fixture(scope="session")
def sizes() -> dict[str, int]:
    """The vocabulary size that each family is tested with."""
    return SIZES


@pytest.fixture(params=SIZES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def packed_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Callable[[str], Path]:
    """A packed model of a family, made once; not to be changed."""
    made: dict[str, Path] = {}

    def make(like: str) -> Path:
        if like not in made:
            made[like] = tmp_path_factory.mktemp("packed") / like
            using = tokenizer if like.startswith("deepseek") else None
            synth(like, SIZES[like], made[like], using, file_bytes=FILE_BYTES, block_bytes=BLOCK_BYTES)
        return made[like]

    return make


@pytest.fixture
def checkpoint(tmp_path: Path, small_tokenizer: Path) -> Callable[[str], Path]:
    """A fresh checkpoint of a family, free to be damaged."""

    def make(like: str) -> Path:
        synth_checkpoint(like, SIZES[like], tmp_path / "checkpoint", small_tokenizer)
        return tmp_path / "checkpoint"

    return make


@pytest.fixture(scope="session")
def read_all() -> Callable[[Path], dict[int, npt.NDArray[np.uint8]]]:
    """Every row of a packed model, {layer: uint8 [num_rows, row_bytes]}, through `read_block`."""

    def read(directory: Path) -> dict[int, npt.NDArray[np.uint8]]:
        with PackedModel.open(directory) as model:
            tables = {t.layer: np.empty((t.num_rows, t.row_bytes), np.uint8) for t in model.spec.tables}
            for layer, rows in tables.items():
                for block in model.blocks(layer):
                    model.read_block(block, rows[block.start : block.stop])
        return tables

    return read


@pytest.fixture(scope="session")
def expected_rows() -> Callable[[Path], dict[int, npt.NDArray[np.uint8]]]:
    """What every row of a synthetic packed model must be."""

    def compute(directory: Path) -> dict[int, npt.NDArray[np.uint8]]:
        with PackedModel.open(directory) as model:
            return {t.layer: synthetic_rows(t, np.arange(t.num_rows, dtype=np.uint64)) for t in model.spec.tables}

    return compute


@pytest.fixture
def events() -> Iterator[Events]:
    logger, handler = logging.getLogger("engrampool"), Events()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)
