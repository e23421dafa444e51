"""Published checkpoints in detail: what is taken from where, and what is refused in words that help."""

import codecs
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import published
from engrampool_client.engine_checks import check_fingerprint
from engrampool_client.errors import FingerprintError
from engrampool_proto.builders import Stored, blueprint, load_config
from engrampool_proto.errors import SpecError
from engrampool_proto.token_map import TokenMap
from engrampool_server.config import load_config as load_settings
from engrampool_server.files.checkpoint import Checkpoint, CheckpointError
from engrampool_server.files.pack import pack
from engrampool_server.files.synth_checkpoint import synth_checkpoint
from engrampool_server.files.table_files import PackedModel
from engrampool_server.memory.placement import read_placement
from engrampool_server.memory.shard_plan import spec_of
from published import QWEN_PLACE, Published, Tensor, noise, scalar

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%064d\nsize 123456\n" % 0
TABLE = QWEN_PLACE + "ngram_embedding"


def refused(checkpoint: Published | Path, tmp_path: Path, *messages: str) -> None:
    directory = checkpoint if isinstance(checkpoint, Path) else checkpoint.save(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory).close()
    for message in messages:
        assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def spec(checkpoint: Published, tmp_path: Path, **how: Any) -> Any:
    with Checkpoint.open(checkpoint.save(tmp_path / "checkpoint"), **how) as opened:
        return opened.spec


def engrampool(*arguments: object) -> tuple[int, str]:
    command = [sys.executable, "-m", "engrampool_proto", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


# Constants of the hash that a checkpoint holds itself.


@pytest.mark.parametrize("leaf", ["layer_multipliers", "ngram_heads_vocab_sizes", "ngram_heads_offsets"])
@pytest.mark.parametrize("place", [QWEN_PLACE, "model.layers.1.ple."])
def test_another_constant_of_the_hash_is_refused_naming_both(leaf: str, place: str, tmp_path: Path) -> None:
    checkpoint = published.qwen_ple()
    ours = checkpoint.tensors.pop(QWEN_PLACE + leaf).data.view("<i8").ravel().tolist()
    theirs = [*ours[:-1], ours[-1] + 2]
    checkpoint.tensors[place + leaf] = published.integers(theirs)
    refused(checkpoint, tmp_path, place + leaf, f"is {theirs}", f"config.json gives {ours}")


def test_a_seed_that_the_config_leaves_out_is_told_by_the_constants(tmp_path: Path) -> None:
    checkpoint = published.qwen_ple()
    checkpoint.config["text_config"]["seed"] = 0
    refused(checkpoint, tmp_path, "layer_multipliers")


def test_other_offsets_of_heads_are_refused(tmp_path: Path) -> None:
    checkpoint = published.engram_demo()
    name = "layers.3.engram.multi_head_embedding.offsets"
    checkpoint.tensors[name] = published.integers([0, 1, 2, 3, 4, 5, 6, 7])
    refused(checkpoint, tmp_path, f"{name} is [0, 1, 2, 3, 4, 5, 6, 7]", "config.json gives [0, 89, 186, 287")


def test_constants_of_32_bits_are_compared_and_others_refused(tmp_path: Path) -> None:
    checkpoint = published.qwen_ple()
    name = QWEN_PLACE + "ngram_heads_vocab_sizes"
    values = checkpoint.tensors[name].data.view("<i8").astype("<i4")
    checkpoint.tensors[name] = Tensor("I32", [16], values.view(np.uint8))
    assert spec(checkpoint, tmp_path).table(2).heads == 16
    checkpoint.tensors[name] = noise("BF16", 16)
    refused(checkpoint, tmp_path, f"{name} must be 16 integers, I64 or I32", "it is BF16 [16]")
    checkpoint.tensors[name] = published.integers([2, 3])
    refused(checkpoint, tmp_path, f"{name} must be 16 integers", "it is I64 [2]")


# Where texts end.


def several(checkpoint: Published, ids: list[int]) -> Published:
    checkpoint.config.get("text_config", checkpoint.config)["eos_token_id"] = ids
    return checkpoint


@pytest.mark.parametrize(("make", "eos"), [(published.qwen_ple, 7), (published.longcat, 2)])
def test_a_list_of_ends_of_text_asks_which(make: Callable[[], Published], eos: int, tmp_path: Path) -> None:
    single = spec(make(), tmp_path)
    checkpoint = several(make(), [eos + 1, eos])
    refused(checkpoint, tmp_path, f"eos_token_id is a list, [{eos + 1}, {eos}]", "--eos-token-id")
    assert spec(checkpoint, tmp_path, eos_token_id=eos) == single
    assert spec(checkpoint, tmp_path, eos_token_id=eos + 1) != single
    with pytest.raises(CheckpointError, match=rf"eos_token_id \[{eos + 1}, {eos}\], which 9 is none of"):
        spec(checkpoint, tmp_path, eos_token_id=9)
    assert spec(several(make(), [eos]), tmp_path) == single


def test_pack_and_rows_take_the_end_of_text(tmp_path: Path) -> None:
    directory = several(published.qwen_ple(), [8, 7]).save(tmp_path / "checkpoint")
    packing = ("pack", "--checkpoint", directory, "--out", tmp_path / "packed", "--quiet")
    code, said = engrampool(*packing)
    assert (code, said.count("\n")) == (1, 1)
    assert "--eos-token-id" in said
    assert engrampool(*packing, "--eos-token-id", 7)[0] == 0
    np.save(tmp_path / "tokens.npy", np.arange(20, dtype=np.int32))
    hashing = ("rows", "--config", directory / "config.json", "--tokens", tmp_path / "tokens.npy")
    code, said = engrampool(*hashing, "--out", tmp_path / "a.npz")
    assert (code, "--eos-token-id" in said) == (1, True)
    assert engrampool(*hashing, "--eos-token-id", 7, "--out", tmp_path / "a.npz")[0] == 0
    packed = ("rows", "--model", tmp_path / "packed", "--tokens", tmp_path / "tokens.npy", "--out", tmp_path / "b.npz")
    assert engrampool(*packed)[0] == 0
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "b.npz") as b:
        assert np.array_equal(a["layer_2"], b["layer_2"])
    code, said = engrampool(*packed, "--eos-token-id", 7)
    assert (code, "go with --config" in said) == (2, True)


def test_the_served_end_of_text_is_one_of_the_configs(tmp_path: Path) -> None:
    directory = several(published.qwen_ple(), [8, 7]).save(tmp_path / "checkpoint")
    served = spec(published.qwen_ple(), tmp_path / "..").tables
    packed = pack(directory, tmp_path / "packed", eos_token_id=7)
    with PackedModel.open(tmp_path / "packed") as model:
        assert model.version == packed
        assert model.spec.tables == served
        directory = several(published.qwen_ple(), [8, 7]).save(tmp_path / "checkpoint")
        check_fingerprint(model.spec, directory / "config.json", None)
        directory = several(published.qwen_ple(), [8, 9]).save(tmp_path / "checkpoint")
        with pytest.raises(FingerprintError, match=r"hash\.stop: 8 here, 7 there"):
            check_fingerprint(model.spec, directory / "config.json", None)


# What rows are made of.


def test_a_scale_that_is_needed_and_not_there_is_named(tmp_path: Path) -> None:
    checkpoint = published.qwen_ple("fp8")
    del checkpoint.tensors[TABLE + ".weight_scale"]
    refused(checkpoint, tmp_path, f"{TABLE}.shard_0.weight as F8_E4M3, and no weight_scale")
    checkpoint = published.qwen_ple("nvfp4")
    for part in range(4):
        del checkpoint.tensors[f"{TABLE}.shard_{part}.weight_scale_2"]
    refused(checkpoint, tmp_path, f"{TABLE}.shard_0.weight as U8, and no weight_scale_2")
    checkpoint = published.qwen_ple("fp8, a scale a row")
    del checkpoint.tensors[f"{TABLE}.shard_2.weight_scale"]
    refused(checkpoint, tmp_path, f"no weight_scale beside {TABLE}.shard_2.weight")


def test_a_scale_beside_plain_floats_is_refused(tmp_path: Path) -> None:
    checkpoint = published.qwen_ple("bf16")
    checkpoint.tensors[TABLE + ".weight_scale"] = scalar("F32", 2.0)
    refused(checkpoint, tmp_path, f"{TABLE}.shard_0.weight as BF16 and beside it {TABLE}.weight_scale")


def test_parts_with_different_scales_are_refused(tmp_path: Path) -> None:
    checkpoint = published.qwen_ple("nvfp4")
    checkpoint.tensors[f"{TABLE}.shard_3.weight_scale_2"] = scalar("F32", 0.5)
    refused(checkpoint, tmp_path, f"{TABLE}.shard_3.weight_scale_2 is 0.5", "shard_0.weight_scale_2 is 0.0078125")


def test_parts_of_different_dtypes_are_refused(tmp_path: Path) -> None:
    checkpoint = published.qwen_ple("fp8")
    name = f"{TABLE}.shard_1.weight"
    checkpoint.tensors[name] = noise("BF16", *checkpoint.tensors[name].shape)
    refused(checkpoint, tmp_path, f"{name} must be F8_E4M3 [", "it is BF16 [")


def test_mlx_quantisation_is_named(tmp_path: Path) -> None:
    checkpoint = published.qwen_ple("bf16", split="shards.")
    for name in [name for name in checkpoint.tensors if ".shards." in name]:
        checkpoint.tensors[name] = noise("U32", checkpoint.tensors[name].shape[0], 4)
    refused(checkpoint, tmp_path, f"{TABLE}.shards.0.weight as U32", "MLX's own quantisation is not served")


def test_a_part_that_is_missing_or_too_many_is_told_by_the_rows(tmp_path: Path) -> None:
    checkpoint = published.qwen_ple("bf16")
    rows = len(checkpoint.tables[2])
    parts = [checkpoint.tensors[f"{TABLE}.shard_{at}.weight"] for at in range(4)]
    third = checkpoint.tensors.pop(f"{TABLE}.shard_2.weight")
    held = parts[0].shape[0] + parts[1].shape[0]
    refused(checkpoint, tmp_path, f"has {held} rows of {TABLE} in 2 tensors", f"config.json gives {rows}")
    checkpoint.tensors |= {f"{TABLE}.shard_2.weight": third, f"{TABLE}.shard_4.weight": noise("BF16", 5000, 32)}
    refused(checkpoint, tmp_path, f"has {rows + 5000} rows of {TABLE} in 5 tensors")


def test_a_table_without_the_configs_padding_is_served_without(tmp_path: Path) -> None:
    checkpoint = published.qwen_ple("bf16", split=None, padding=-1)
    table = spec(checkpoint, tmp_path).table(2)
    assert table.num_rows == len(checkpoint.tables[2]) == checkpoint.model[2].num_rows - 1
    checkpoint = published.qwen_ple("bf16", split=None, padding=-200)
    refused(checkpoint, tmp_path, f"has {checkpoint.model[2].num_rows - 200} rows of {TABLE}")


def test_far_more_rows_than_the_heads_have_are_refused(tmp_path: Path) -> None:
    for stated in (True, False):
        refused(published.deepseek_v41(5000, stated=stated), tmp_path, f"{published.deepseek_v41().model[1].num_rows}")
    refused(published.longcat(padding=5000), tmp_path, "embedders.0.weight must be BF16 [101, 16]", "BF16 [5101, 16]")
    checkpoint = published.gemma_ple()
    checkpoint.config["text_config"]["vocab_size_per_layer_input"] = 301
    refused(checkpoint, tmp_path, "embed_tokens_per_layer.weight must be BF16 [301, 24]", "it is BF16 [300, 24]")


def test_the_default_of_the_engines_stands_in_for_ngram_vocab_size_base() -> None:
    config = load_text(published.qwen_ple())
    explicit = blueprint({**config, "ngram_vocab_size_base": 20_000_000}).spec
    del config["ngram_vocab_size_base"]
    assert blueprint(config).spec == explicit


def load_text(checkpoint: Published) -> dict[str, Any]:
    return dict(checkpoint.config["text_config"])


def test_what_the_text_part_leaves_null_is_taken_from_the_top(tmp_path: Path) -> None:
    checkpoint = published.qwen_ple()
    expected = spec(checkpoint, tmp_path)
    checkpoint.config["eos_token_id"] = checkpoint.config["text_config"].pop("eos_token_id")
    checkpoint.config["text_config"]["eos_token_id"] = None
    assert spec(checkpoint, tmp_path) == expected
    # Old exports have a copy at the top; the text part counts.
    checkpoint = published.qwen_ple()
    checkpoint.config = {**checkpoint.config["text_config"], "ngram_vocab_size_base": 9, **checkpoint.config}
    assert spec(checkpoint, tmp_path) == expected


def test_a_plan_reads_the_row_format_off_the_tensors(tmp_path: Path) -> None:
    directory = published.qwen_ple("fp8, among layers of nvfp4").save(tmp_path / "checkpoint")
    assert spec_of(directory).table(2).row_bytes == 32
    (directory / "model-00001-of-00002.safetensors").unlink()  # not downloaded yet
    assert spec_of(directory).table(2).row_bytes == 64
    assert spec_of(several(published.qwen_ple(), [8, 7]).save(directory)).table(2).row_bytes == 32


def test_a_model_of_very_many_tensors_is_searched_by_words() -> None:
    names = [f"model.layers.{at}.mlp.experts.{at}.down_proj.weight" for at in range(10)]
    stored = Stored([*names, "model.layers.1.engram.embed.weight"], lambda _: ("BF16", (1, 1)), ("engram.",))
    assert stored.find("layers.1.engram.embed.weight") is not None
    assert stored.find("layers.1.mlp.experts.1.down_proj.weight") is None


# Files.


def test_files_without_an_index_are_all_looked_into(tmp_path: Path) -> None:
    checkpoint = published.deepseek_v41()
    indexed, bare = checkpoint.save(tmp_path / "indexed", 3), checkpoint.save(tmp_path / "bare", 3, index=False)
    assert pack(indexed, tmp_path / "a") == pack(bare, tmp_path / "b")
    (bare / "model-00002-of-00003.safetensors").unlink()
    refused(bare, tmp_path, "has no model-00002-of-00003.safetensors, and no model.safetensors.index.json")
    (bare / "model-00003-of-00003.safetensors").rename(bare / "model-00002-of-00003.safetensors")
    refused(bare, tmp_path, "has no model-00003-of-00003.safetensors")
    checkpoint.save(tmp_path / "bare", 3, index=False)
    for number in range(3):  # some writers count from 0
        (bare / f"model-{number + 1:05}-of-00003.safetensors").rename(bare / f"model-{number:05}-of-00003.safetensors")
    assert pack(bare, tmp_path / "c") == pack(indexed, tmp_path / "d")
    (bare / "model-00002-of-00003.safetensors").unlink()
    refused(bare, tmp_path, "has no model-00002-of-00003.safetensors")
    for file in bare.glob("*.safetensors"):
        file.unlink()
    shutil.copytree(checkpoint.save(tmp_path / "bare", 3, index=False), tmp_path / "twice")
    shutil.copy(bare / "model-00001-of-00003.safetensors", tmp_path / "twice" / "other.safetensors")
    refused(tmp_path / "twice", tmp_path, "twice, in model-00001-of-00003.safetensors and in other.safetensors")


@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"],
)
def test_a_git_lfs_pointer_is_named_as_such(name: str, tmp_path: Path) -> None:
    directory = published.deepseek_v41().save(tmp_path / "checkpoint")
    (directory / name).write_bytes(POINTER)
    refused(directory, tmp_path, f"{directory / name} is a git-lfs pointer", "git lfs pull")


def test_a_packed_file_that_is_a_git_lfs_pointer_is_named_as_such(tmp_path: Path) -> None:
    pack(published.gemma_ple().save(tmp_path / "checkpoint"), tmp_path / "packed")
    (tables,) = (tmp_path / "packed").glob("*.safetensors")
    tables.write_bytes(POINTER)
    code, said = engrampool("verify", tmp_path / "packed", "--quiet")
    assert (code, f"{tables} is a git-lfs pointer" in said) == (1, True)


def test_a_byte_order_mark_is_no_harm(tmp_path: Path) -> None:
    plain, marked = published.deepseek_v41(), published.deepseek_v41()
    marked.bytes_before_json = codecs.BOM_UTF8
    assert spec(plain, tmp_path) == spec(marked, tmp_path)
    settings = tmp_path / "settings.toml"
    settings.write_bytes(codecs.BOM_UTF8 + b'models = ["x"]\nworkers = 3\n')
    assert load_settings({}, {}, settings).config.workers == 3
    served = spec(published.gemma_ple(), tmp_path)
    placement = tmp_path / "placement.json"
    placement.write_bytes(codecs.BOM_UTF8 + json.dumps({"layers": {}}).encode())
    with pytest.raises(SpecError, match=r"placement\.json: (?!.*BOM)"):
        read_placement(placement, served)
    config = tmp_path / "utf16.json"  # as a Windows shell's `>` writes it
    config.write_text(json.dumps(published.gemma_ple().config), encoding="utf-16")
    assert load_config(config)["vocab_size_per_layer_input"] == 300


# The tokenizer.


def test_a_tokenizer_that_skips_ids_is_refused_naming_them(tmp_path: Path) -> None:
    checkpoint = published.deepseek_v41()
    del checkpoint.tokenizer["word7"], checkpoint.tokenizer["word9"]
    refused(checkpoint, tmp_path, "tokens up to the id 39, and none with the id 7, 9;")
    checkpoint = published.deepseek_v41()
    checkpoint.added = {"<begin>": 40, "<end>": 43}  # `tokenizers` itself would make them 40 and 41
    refused(checkpoint, tmp_path, "tokens up to the id 43, and none with the id 41, 42;")
    checkpoint.added = {}
    checkpoint.tokenizer = {"word0": 0, "last": 50}
    refused(checkpoint, tmp_path, "none with the id 1, 2, 3, 4, 5, 6, 7, 8 and 41 more")


def test_a_tokenizer_that_gives_an_id_twice_is_refused(tmp_path: Path) -> None:
    checkpoint = published.deepseek_v41()
    checkpoint.tokenizer["other"] = 4
    refused(checkpoint, tmp_path, "two tokens the id 4: ")


def test_a_tokenizer_without_tokens_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}))
    with pytest.raises(SpecError, match="has no tokens"):
        TokenMap.from_tokenizer(path)


# Our own writer.


def test_synthetic_checkpoints_have_the_published_names(tmp_path: Path, small_tokenizer: Path) -> None:
    published_names = {
        "deepseek-v4.1": {f"layers.{n}.engram.embed.{leaf}" for n in (1, 14) for leaf in ("weight", "scale")},
        "qwen-ple": {
            *(f"layers.1.ple.ple_embedding.ngram_embedding.shard_{at}.weight" for at in range(8)),
            "layers.1.ple.ple_embedding.ngram_embedding.weight_scale",
        },
        "longcat": {f"ngram_embeddings.embedders.{at}.weight" for at in range(12)},
        "gemma-ple": {"embed_tokens_per_layer.weight"},
    }
    for family, names in published_names.items():
        synth_checkpoint(family, 64, tmp_path / family, small_tokenizer)
        index = json.loads((tmp_path / family / "model.safetensors.index.json").read_text())
        assert {name.removeprefix("model.") for name in index["weight_map"]} == names
