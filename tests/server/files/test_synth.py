"""Synthetic models: the shapes are the public models', the rows those that FORMAT.md's function gives."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from engrampool_proto.builders import blueprint, find_builder
from engrampool_proto.errors import SpecError
from engrampool_server.files.staging import OutputError
from engrampool_server.files.synth import CONFIGS, DEEPSEEK_TOKEN_IDS, fill_rows, synth, synthetic_model
from engrampool_server.files.synth_checkpoint import synth_checkpoint
from engrampool_server.files.table_files import PackedModel

Rows = dict[int, npt.NDArray[np.uint8]]


def test_every_row_is_the_synthetic_one(
    family: str,
    packed_model: Callable[[str], Path],
    read_all: Callable[[Path], Rows],
    expected_rows: Callable[[Path], Rows],
) -> None:
    directory = packed_model(family)
    found, expected = read_all(directory), expected_rows(directory)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[layer], expected[layer]) for layer in expected)
    with PackedModel.open(directory) as model:
        assert all(len(model.blocks(layer)) > 1 for layer in model.spec.layers)
        assert len(model.files) > len(model.spec.layers)


def test_a_configuration_is_its_familys(family: str) -> None:
    builder = find_builder(CONFIGS[family](1000))
    assert builder is not None
    assert builder.name == family


def test_the_real_sizes_give_the_real_tables(tokenizer: Path) -> None:
    v41 = synthetic_model("deepseek-v4.1", 16_000_000, tokenizer)
    assert [(t.layer, t.num_rows, t.row_bytes) for t in v41.spec.tables] == [
        (1, 384006168, 264),
        (14, 384016682, 264),
    ]
    assert v41.config["engram_compressed_vocab_size"] == 99092
    qwen = synthetic_model("qwen-ple", 20_000_000).spec.tables[0]
    assert (qwen.heads, qwen.row_bytes, qwen.num_rows // 10**6) == (16, 160, 320)
    demo = synthetic_model("engram-demo", 646400).spec
    assert [(t.layer, t.heads, t.row_bytes) for t in demo.tables] == [(1, 16, 256), (15, 16, 256)]
    longcat = synthetic_model("longcat", 10_000_001).spec.tables[0]
    assert (longcat.heads, longcat.row_bytes, longcat.hash.head_rows()[0]) == (12, 512, 10_000_002)
    gemma = synthetic_model("gemma-ple", 262144).spec.tables[0]
    assert (gemma.num_rows, gemma.row_bytes) == (262144, 30 * 256 * 2)


def test_without_a_tokenizer_tokens_map_to_themselves() -> None:
    token_map = synthetic_model("engram-demo", 10).spec.token_map
    assert token_map is not None
    assert np.array_equal(token_map.ids, np.arange(DEEPSEEK_TOKEN_IDS))


def test_rows_of_a_part_are_those_of_the_whole() -> None:
    table = synthetic_model("deepseek-v4.1", 400).spec.tables[0]
    whole = np.empty((table.num_rows, table.row_bytes), np.uint8)
    fill_rows(table, 0, whole)
    part = np.empty((5000, table.row_bytes), np.uint8)
    fill_rows(table, 777, part)
    assert np.array_equal(part, whole[777:5777])


def test_a_checkpoint_describes_itself(tmp_path: Path, small_tokenizer: Path) -> None:
    synth_checkpoint("deepseek-v4.1", 20, tmp_path / "out", small_tokenizer)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    model = synthetic_model("deepseek-v4.1", 20, small_tokenizer)
    assert config == model.config
    assert blueprint(config, tmp_path / "out" / "tokenizer.json").spec == model.spec
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4


def test_impossible_models_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(SpecError, match=r"tokenizer\.json"):
        synth_checkpoint("deepseek-v4.1", 20, out)
    with pytest.raises(SpecError, match="name"):
        synth("gemma-ple", 20, out, name="a/b")
    with pytest.raises(OutputError, match="GiB too little"):
        synth_checkpoint("gemma-ple", 2**31 - 1, out)
    assert not list(tmp_path.iterdir())
