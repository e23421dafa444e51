"""Checkpoints: tensors are found wherever they lie, and what does not fit is named."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from engrampool_proto.errors import EngrampoolError
from engrampool_proto.synthetic import synthetic_rows
from engrampool_server.files.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, CheckpointError
from engrampool_server.files.synth import SYNTHETIC_SCALE, synthetic_model

MakeCheckpoint = Callable[[str], Path]


def weight_map(directory: Path) -> dict[str, str]:
    files: dict[str, str] = json.loads((directory / INDEX_NAME).read_text())["weight_map"]
    return files


def set_weight_map(directory: Path, files: dict[str, Any]) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": files}))


def file_of(directory: Path, suffix: str) -> Path:
    (file,) = (file for name, file in weight_map(directory).items() if name.endswith(suffix))
    return directory / file


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change the one tensor's entry of a file and leave the data where it is."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    ((name, entry),) = header.items()
    edit(entry)
    changed = json.dumps({entry.pop("name", name): entry}).encode().ljust(length)
    path.write_bytes(raw[:8] + changed + raw[8 + length :])


def refused(directory: Path, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    assert message in str(caught.value)


# Reading.


@pytest.mark.parametrize("like", ["longcat", "qwen-ple", "deepseek-v4.1"])
def test_rows_are_read_across_parts_and_segments(like: str, checkpoint: MakeCheckpoint) -> None:
    with Checkpoint.open(checkpoint(like)) as opened:
        table = opened.spec.tables[0]

        @given(st.integers(0, table.num_rows - 1), st.integers(1, 500))
        def check(start: int, count: int) -> None:
            count = min(count, table.num_rows - start)
            out = np.empty((count, table.row_bytes), np.uint8)
            opened.read_rows(table, start, out)
            assert np.array_equal(out, synthetic_rows(table, np.arange(start, start + count, dtype=np.uint64)))

        check()


def test_a_single_file_needs_no_index_and_no_prefix(tmp_path: Path) -> None:
    config = synthetic_model("gemma-ple", 20).config
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma", "text_config": config}))
    values = np.arange(20 * 7680, dtype=np.float32).reshape(20, 7680).astype(ml_dtypes.bfloat16)
    others = {"lm_head.weight": np.zeros((3, 3), np.float32), "steps": np.array([7])}
    safetensors.numpy.save_file({"embed_tokens_per_layer.weight": values, **others}, tmp_path / SINGLE_NAME)
    with Checkpoint.open(tmp_path, "mine") as opened:
        out = np.empty((3, 7680 * 2), np.uint8)
        opened.read_rows(opened.spec.tables[0], 17, out)
    assert opened.spec.name == "mine"
    assert np.array_equal(out, values[17:].view(np.uint8))


def test_a_suffix_counts_only_at_a_dot(checkpoint: MakeCheckpoint) -> None:
    directory = checkpoint("gemma-ple")
    ((name, file),) = weight_map(directory).items()
    set_weight_map(directory, {name: file, "model.not_" + name.removeprefix("model."): "absent.safetensors"})
    Checkpoint.open(directory).__exit__(None, None, None)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_scalar_becomes_the_tables_scale(
    checkpoint: MakeCheckpoint, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> None:
    directory = checkpoint("qwen-ple")
    with Checkpoint.open(directory) as opened:
        assert opened.spec.tables[0].scale == SYNTHETIC_SCALE
    path = file_of(directory, "ngram_embedding.weight_scale")
    name = "model.layers.1.ple.ple_embedding.ngram_embedding.weight_scale"
    safetensors.numpy.save_file({name: np.full(shape, 0.3125, dtype)}, path)
    with Checkpoint.open(directory) as opened:
        assert opened.spec.tables[0].scale == 0.3125


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array(np.nan, np.float32), "must be a finite scale; it is nan"),
        (np.array(1.0, np.float64), "must be one F32 or BF16 number; it is F64 []"),
        (np.ones(2, np.float32), "must be one F32 or BF16 number; it is F32 [2]"),
    ],
)
def test_an_impossible_scale_is_refused(checkpoint: MakeCheckpoint, value: Any, message: str) -> None:
    directory = checkpoint("qwen-ple")
    name = "model.layers.1.ple.ple_embedding.ngram_embedding.weight_scale"
    safetensors.numpy.save_file({name: value}, file_of(directory, "ngram_embedding.weight_scale"))
    refused(directory, message)


def test_scales_stored_as_bytes_are_taken(checkpoint: MakeCheckpoint) -> None:
    directory = checkpoint("deepseek-v4.1")
    edit_header(file_of(directory, "layers.1.engram.embed.scale"), lambda entry: entry.update(dtype="U8"))
    Checkpoint.open(directory).__exit__(None, None, None)


# What does not fit.


def test_a_missing_tensor_is_named(checkpoint: MakeCheckpoint) -> None:
    directory = checkpoint("longcat")
    files = weight_map(directory)
    del files["model.ngram_embeddings.embedders.5.weight"]
    set_weight_map(directory, files)
    refused(directory, "has no tensor ngram_embeddings.embedders.5.weight under any prefix; config.json needs it")
    set_weight_map(directory, {})
    refused(directory, "has no tensor ngram_embeddings.embedders.0.weight under any prefix and 11 more")


def test_a_name_under_two_prefixes_is_refused(checkpoint: MakeCheckpoint) -> None:
    directory = checkpoint("gemma-ple")
    ((name, file),) = weight_map(directory).items()
    set_weight_map(directory, {name: file, "draft." + name: file})
    suffix = "embed_tokens_per_layer.weight"
    refused(directory, f"has two tensors {suffix}: model.{suffix} and draft.model.{suffix}")


def test_another_shape_or_dtype_is_named_with_what_was_expected(checkpoint: MakeCheckpoint) -> None:
    directory = checkpoint("deepseek-v4.1")
    path = file_of(directory, "layers.14.engram.embed.weight")
    rows = json.loads((directory / "config.json").read_text())["engram_num_embeddings"][1]
    name, whole = "model.layers.14.engram.embed.weight", path.read_bytes()
    expected = f"{path}: {name} must be F8_E4M3 [{rows}, 256], as config.json says; it is"
    edit_header(path, lambda entry: entry.update(shape=[rows * 2, 128]))
    refused(directory, f"{expected} F8_E4M3 [{rows * 2}, 128]")
    edit_header(path, lambda entry: entry.update(shape=[rows, 128], dtype="BF16"))
    refused(directory, f"{expected} BF16 [{rows}, 128]")
    path.write_bytes(whole)
    path = file_of(directory, "layers.14.engram.embed.scale")
    edit_header(path, lambda entry: entry.update(dtype="I8"))
    refused(directory, f"must be F8_E8M0 or U8 [{rows}, 8]")


@pytest.mark.parametrize("kept", [0, 7, 8, 100, 4095, 4096, -1])
def test_a_truncated_file_is_named(checkpoint: MakeCheckpoint, kept: int) -> None:
    directory = checkpoint("gemma-ple")
    path = file_of(directory, "embed_tokens_per_layer.weight")
    path.write_bytes(path.read_bytes()[:kept])
    refused(directory, f"{path} is {path.stat().st_size} bytes long")


def test_a_file_cut_while_it_is_read_is_named(checkpoint: MakeCheckpoint) -> None:
    directory = checkpoint("gemma-ple")
    path = file_of(directory, "embed_tokens_per_layer.weight")
    with Checkpoint.open(directory) as opened:
        path.write_bytes(path.read_bytes()[:-1])
        table = opened.spec.tables[0]
        with pytest.raises(CheckpointError, match=f"{re.escape(str(path))} became shorter"):
            opened.read_rows(table, 0, np.empty((table.num_rows, table.row_bytes), np.uint8))


def test_an_index_that_lies_is_named(checkpoint: MakeCheckpoint) -> None:
    directory = checkpoint("longcat")
    files = weight_map(directory)
    first, second = list(files)[:2]
    set_weight_map(directory, {**files, first: "model-99999.safetensors"})
    refused(directory, f"model-99999.safetensors, which should hold {first}, cannot be opened: No such file")
    set_weight_map(directory, {**files, first: files[second]})
    refused(directory, f"{files[second]} does not hold {first}, although {INDEX_NAME} says so")
    set_weight_map(directory, {**files, first: "../elsewhere.safetensors"})
    refused(directory, "must give each tensor the name of a file beside it")
    for raw in ("", "[]", "{}", '{"weight_map": 3}', "[" * 100_000):
        (directory / INDEX_NAME).write_text(raw)
        refused(directory, INDEX_NAME)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    refused(directory, f"has neither {INDEX_NAME} nor {SINGLE_NAME}")


def test_a_tokenizer_that_contradicts_the_config_is_refused(checkpoint: MakeCheckpoint, tokenizer: Path) -> None:
    directory = checkpoint("deepseek-v4.1")
    shutil.copy(tokenizer, directory)
    refused(directory, "engram_compressed_vocab_size 40, the tokenizer gives 99092")
    (directory / "tokenizer.json").write_text("{}")
    refused(directory, "cannot be read as a tokenizer.json")
    (directory / "tokenizer.json").unlink()
    refused(directory, "its tokenizer.json is needed")


def test_a_directory_without_a_usable_config_is_refused(checkpoint: MakeCheckpoint) -> None:
    directory = checkpoint("gemma-ple")
    refused(directory / "absent", "is no directory")
    (directory / "config.json").write_text("{}")
    refused(directory, "describes no model that engrampool knows")
    (directory / "config.json").unlink()
    refused(directory, "config.json")
    assert issubclass(CheckpointError, EngrampoolError)
