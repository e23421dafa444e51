"""Small checkpoints in the forms that models are published in, written with `json` and `struct` alone.

Names, dtypes and what lies beside the tables are those of the public checkpoints and of the engines that read them;
which row belongs to which tokens is told by `hash_reference`. Nothing of ours had a part in either.
"""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hash_reference
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
WORDS = 40  # of the tokenizer, which maps each to itself
ELEMENT_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8, "I32": 4, "U32": 4}


@dataclass(frozen=True)
class Tensor:
    """data: the bytes, uint8 [shape[0], bytes of one of those]."""

    dtype: str
    shape: list[int]
    data: Bytes

    def part(self, start: int, stop: int) -> "Tensor":
        return Tensor(self.dtype, [stop - start, *self.shape[1:]], self.data[start:stop])


@dataclass
class Published:
    """tables: by layer, uint8 [rows, row bytes], what must come back. model: which of these rows for which tokens."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    tables: dict[int, Bytes]
    model: hash_reference.Model
    vocab_size: int
    row_format: str
    scale: float | None = None
    tokenizer: dict[str, int] | None = None
    bytes_before_json: bytes = b""
    more: dict[str, Tensor] = field(default_factory=lambda: {"model.norm.weight": noise("BF16", 64)})

    def save(self, directory: Path, files: int = 2, *, index: bool = True) -> Path:
        """Spread the tensors over `files` files. index: with model.safetensors.index.json beside them."""
        directory.mkdir(exist_ok=True)
        everything = list({**self.more, **self.tensors}.items())
        names = [f"model-{at + 1:05}-of-{files:05}.safetensors" for at in range(files)]
        if files == 1 and not index:
            names = ["model.safetensors"]
        weight_map = {}
        for at, name in enumerate(names):
            here = dict(everything[at::files])
            write_file(directory / name, here)
            weight_map.update(dict.fromkeys(here, name))
        self._json(directory / "config.json", self.config)
        if index:
            self._json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
        if self.tokenizer is not None:
            words = {"type": "WordLevel", "vocab": self.tokenizer, "unk_token": "word0"}
            self._json(directory / "tokenizer.json", {"version": "1.0", "added_tokens": [], "model": words})
        return directory

    def _json(self, path: Path, document: Any) -> None:
        path.write_bytes(self.bytes_before_json + json.dumps(document).encode())


def write_file(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + tensor.data.size]}
        at += tensor.data.size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(t.data.tobytes() for t in tensors.values()))


def noise(dtype: str, *shape: int) -> Tensor:
    """Bytes that are another row for row, the same at each call."""
    width = int(np.prod(shape[1:], dtype=int)) * ELEMENT_BYTES.get(dtype, 1)
    random = np.random.default_rng([len(dtype), *shape])
    return Tensor(dtype, list(shape), random.integers(0, 256, (shape[0], width), dtype=np.uint8))


def integers(values: list[int]) -> Tensor:
    return Tensor("I64", [len(values)], np.array(values, "<i8").view(np.uint8).reshape(len(values), 8))


def scalar(dtype: str, value: float, *shape: int) -> Tensor:
    """value: one that bfloat16 holds, too."""
    raw = struct.pack("<f", value)[2 if dtype == "BF16" else 0 :]
    return Tensor(dtype, list(shape), np.frombuffer(raw, np.uint8))


def words() -> dict[str, int]:
    return {f"word{i}": i for i in range(WORDS)}


def deepseek_v41(padding: int = 0, *, stated: bool = True, prefix: str = "") -> Published:
    """padding: rows after the last head's. stated: whether config.json counts them in."""
    config: dict[str, Any] = {
        "model_type": "deepseek_v41",
        "engram_layer_ids": [1, 14],
        "engram_max_ngram_size": 4,
        "engram_vocab_size": 60,
        "engram_n_heads": 8,
        "engram_head_dim": 256,
        "engram_pad_token_id": 2,
        "engram_compressed_vocab_size": WORDS,
    }
    model = hash_reference.deepseek_v41(config, list(range(WORDS)))
    rows = {layer: table.num_rows + padding for layer, table in model.items()}
    config["engram_num_embeddings"] = [n if stated else n - padding for n in rows.values()]
    tensors = {}
    for layer, n in rows.items():
        tensors[f"{prefix}layers.{layer}.engram.embed.weight"] = noise("F8_E4M3", n, 256)
        tensors[f"{prefix}layers.{layer}.engram.embed.scale"] = noise("F8_E8M0", n, 8)
    columns = list(tensors.values())
    tables = {
        layer: np.concatenate([columns[2 * at].data, columns[2 * at + 1].data], axis=1) for at, layer in enumerate(rows)
    }
    row_format = "float8_e4m3fn 256, float8_e8m0fnu 8"
    return Published(config, tensors, tables, model, WORDS, row_format, tokenizer=words())


def engram_demo(dtype: str = "F32") -> Published:
    config: dict[str, Any] = {
        "engram_vocab_size": [50, 70],
        "max_ngram_size": 3,
        "n_embed_per_ngram": 64,
        "n_head_per_ngram": 4,
        "layer_ids": [1, 3],
        "pad_id": 2,
        "seed": 0,
    }
    model = hash_reference.engram_demo(config, list(range(WORDS)))
    tensors, tables = {}, {}
    for layer, table in model.items():
        at = f"layers.{layer}.engram.multi_head_embedding."
        tensors[at + "embedding.weight"] = noise(dtype, table.num_rows, 16)
        tensors[at + "offsets"] = integers([sum(table.head_sizes[:head]) for head in range(8)])
        tables[layer] = tensors[at + "embedding.weight"].data
    formats = {"F32": "float32 16", "BF16": "bfloat16 16"}
    return Published(config, tensors, tables, model, WORDS, formats[dtype], tokenizer=words())


QWEN_PLACE = "model.language_model.layers.1.ple.ple_embedding."
QWEN_VALUES = 32


def qwen_ple(form: str = "fp8", split: str | None = "shard_", place: str = QWEN_PLACE, padding: int = 0) -> Published:
    """form: how rows are stored. split: how the parts are called; None for one tensor. padding: more or fewer rows."""
    text: dict[str, Any] = {
        "model_type": "qwen4_exp_text",
        "vocab_size": 1000,
        "eos_token_id": 7,
        "hidden_size": 512,
        "ple_layer_ids": [2],
        "ple_embed_dim": 16 * QWEN_VALUES,
        "ngram_size": 3,
        "heads_per_ngram": 8,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 128,
        "split_ngram_parts": 4,
        "dtype": "bfloat16",
    }
    config = {"model_type": "qwen4_exp", "architectures": ["Qwen4ExpForConditionalGeneration"], "text_config": text}
    model = hash_reference.qwen_ple({**text, "seed": 1234})
    table = model[2]
    rows = table.num_rows + padding
    whole = place + "ngram_embedding"
    columns, loose, row_format = _qwen_form(form, rows, config)
    tensors: dict[str, Tensor] = {}
    if split is None:
        tensors = {f"{whole}.{leaf}": tensor for leaf, tensor in columns.items()}
    else:
        each = -(-rows // 4)
        for at, start in enumerate(range(0, rows, each)):
            for leaf, tensor in columns.items():
                tensors[f"{whole}.{split}{at}.{leaf}"] = tensor.part(start, min(start + each, rows))
    for leaf, tensor in loose.items():
        if leaf == "weight_scale_2" and split is not None:  # each part has the table's
            tensors.update({f"{whole}.{split}{at}.{leaf}": tensor for at in range(4)})
        else:
            tensors[f"{whole}.{leaf}"] = tensor
    tensors[place + "layer_multipliers"] = integers(table.constants["multipliers"])
    tensors[place + "ngram_heads_vocab_sizes"] = integers(table.head_sizes)
    tensors[place + "ngram_heads_offsets"] = integers([sum(table.head_sizes[:head]) for head in range(16)])
    rows_ = np.concatenate([tensor.data for tensor in columns.values()], axis=1)[: table.num_rows]
    return Published(config, tensors, {2: rows_}, model, 1000, row_format, 0.0078125 if loose else None)


def _qwen_form(form: str, rows: int, config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """Columns by leaf, tensors for all rows by leaf, the row format. Says in `config` what such checkpoints say."""
    text, n = config["text_config"], QWEN_VALUES
    scale = {"weight_scale": scalar("F32", 0.0078125)}
    match form:
        case "bf16":
            return {"weight": noise("BF16", rows, n)}, {}, f"bfloat16 {n}"
        case "bf16, stated":
            text["ple_embedding_dtype"] = "bfloat16"
            return {"weight": noise("BF16", rows, n)}, {}, f"bfloat16 {n}"
        case "fp8":
            text["ple_embedding_dtype"] = "float8_e4m3fn"
            return {"weight": noise("F8_E4M3", rows, n)}, scale, f"float8_e4m3fn {n}"
        case "fp8, scale of SGLang's form":
            config["quantization_config"] = {"quant_method": "fp8"}
            scale = {"weight_scale": scalar("BF16", 0.0078125, 1)}
            return {"weight": noise("F8_E4M3", rows, n)}, scale, f"float8_e4m3fn {n}"
        case "fp8, among layers of nvfp4":
            config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
            return {"weight": noise("F8_E4M3", rows, n)}, scale, f"float8_e4m3fn {n}"
        case "fp8, and a config that says bfloat16":
            text["ple_embedding_dtype"] = "bfloat16"
            return {"weight": noise("F8_E4M3", rows, n)}, scale, f"float8_e4m3fn {n}"
        case "fp8, a scale a row":
            columns = {"weight": noise("F8_E4M3", rows, n), "weight_scale": noise("F32", rows, 1)}
            return columns, {}, f"float8_e4m3fn {n}, float32 1"
        case "int8, a scale a row, flat":
            flat = noise("BF16", rows, 1)
            columns = {"weight": noise("I8", rows, n), "weight_scale": Tensor("BF16", [rows], flat.data)}
            return columns, {}, f"int8 {n}, bfloat16 1"
        case "nvfp4":
            text["ple_embedding_dtype"] = "nvfp4"
            columns = {"weight": noise("U8", rows, n // 2), "weight_scale": noise("F8_E4M3", rows, n // 16)}
            loose = {"weight_scale_2": scalar("F32", 0.0078125)}
            return columns, loose, f"float4_e2m1fn_x2 {n // 2}, float8_e4m3fn {n // 16}"
    raise ValueError(form)


QWEN_FORMS = (
    "bf16",
    "bf16, stated",
    "fp8",
    "fp8, scale of SGLang's form",
    "fp8, among layers of nvfp4",
    "fp8, and a config that says bfloat16",
    "fp8, a scale a row",
    "int8, a scale a row, flat",
    "nvfp4",
)


def longcat(form: str = "flash", padding: int = 0) -> Published:
    """form: "flash", or "2.0" with the `oe_` keys and flat names. padding: more rows of each head's tensor."""
    reference = {
        "vocab_size": 200,
        "eos_token_id": 2,
        "ngram_vocab_size_ratio": 0.503,
        "emb_neighbor_num": 4,
        "emb_split_num": 2,
    }
    model = hash_reference.longcat(reference)
    names = {"ngram_vocab_size_ratio": "oe_vocab_size_ratio"}
    names |= {"emb_neighbor_num": "oe_neighbor_num", "emb_split_num": "oe_split_num"}
    config: dict[str, Any] = {**reference, "hidden_size": 96, "torch_dtype": "bfloat16"}
    if form == "2.0":
        config = {names.get(key, key): value for key, value in config.items()} | {"emb_split_num": None}
    tensors, rows = {}, []
    for head, size in enumerate(model[0].head_sizes):
        name = f"model.oe_embed_tokens{head}" if form == "2.0" else f"model.ngram_embeddings.embedders.{head}"
        tensors[f"{name}.weight"] = noise("BF16", size + padding, 16)
        rows.append(tensors[f"{name}.weight"].data[:size])
        beside = f"model.oe_embed_proj{head}" if form == "2.0" else f"model.ngram_embeddings.post_projs.{head}"
        tensors[f"{beside}.weight"] = noise("BF16", 96, 16)
    return Published(config, tensors, {0: np.concatenate(rows)}, model, 200, "bfloat16 16")


def gemma_ple(*, stated: bool = True) -> Published:
    """stated: whether the config has `vocab_size_per_layer_input`; the tokens beyond are multimodal ones."""
    text: dict[str, Any] = {"vocab_size": 300, "num_hidden_layers": 3, "hidden_size_per_layer_input": 8}
    if stated:
        text |= {"vocab_size": 320, "vocab_size_per_layer_input": 300}
    config = {"model_type": "gemma3n", "text_config": text}
    tensor = noise("BF16", 300, 24)
    model = hash_reference.gemma_ple({"vocab_size_per_layer_input": 300})
    tensors = {"model.language_model.embed_tokens_per_layer.weight": tensor}
    return Published(config, tensors, {0: tensor.data}, model, text["vocab_size"], "bfloat16 24")
