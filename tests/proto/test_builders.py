"""From config.json to specification: full-size models, where rows lie in a checkpoint, and configs that cannot be."""

import copy
import json
import re
from typing import Any

import golden_vectors
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engrampool_proto.builders import blueprint, find_builder, load_config
from engrampool_proto.builders.primes import is_prime, next_prime
from engrampool_proto.errors import SpecError
from engrampool_proto.spec import RowFormat, Segment
from engrampool_proto.token_map import TokenMap

CONFIGS = golden_vectors.CONFIGS
V41 = CONFIGS["deepseek-v4.1"]


def test_the_token_map_equals_the_reference_on_every_id(token_map, reference_map):
    assert token_map.vocab_size == len(reference_map) == 129280
    assert token_map.size == 99092
    assert token_map.ids.tolist() == reference_map


def test_deepseek_v41_at_full_size(tokenizer, token_map):
    made = blueprint(V41, tokenizer)
    spec = made.spec
    assert (spec.name, spec.layers, spec.lookback, spec.vocab_size) == ("deepseek-v4.1", (1, 14), 3, 129280)
    assert spec.token_map == token_map
    assert [table.num_rows for table in spec.tables] == V41["engram_num_embeddings"]
    assert [sum(table.hash.head_rows()) for table in spec.tables] == V41["engram_num_embeddings"]
    sizes = [size for table in spec.tables for size in table.hash.head_rows()]
    assert len(set(sizes)) == 48
    assert [table.heads for table in spec.tables] == [24, 24]
    row = RowFormat((Segment("values", "float8_e4m3fn", 256), Segment("scales", "float8_e8m0fnu", 8)))
    assert {table.row_format for table in spec.tables} == {row}
    assert row.row_bytes == 264
    assert spec.nbytes == 264 * sum(V41["engram_num_embeddings"])
    assert [table.scale for table in spec.tables] == [None, None]
    ((part,),) = (made.parts[14],)
    assert part.num_rows == 384016682
    assert part.tensors == {"values": "layers.14.engram.embed.weight", "scales": "layers.14.engram.embed.scale"}
    assert made.scales == {}


def test_layers_get_their_primes_in_the_order_of_the_config(tokenizer):
    swapped = {**V41, "engram_layer_ids": [14, 1]}
    spec = blueprint(swapped, tokenizer).spec
    assert spec.layers == (1, 14)
    assert [spec.table(layer).num_rows for layer in (14, 1)] == V41["engram_num_embeddings"]


def test_the_demo(tokenizer):
    made = blueprint(CONFIGS["engram-demo"], tokenizer, "demo")
    assert (made.spec.name, made.spec.layers, made.spec.lookback) == ("demo", (1, 15), 2)
    assert made.spec.table(1).row_format == RowFormat((Segment("values", "float32", 64),))
    assert made.spec.table(15).heads == 16
    halves = blueprint({**CONFIGS["engram-demo"], "torch_dtype": "bfloat16"}, tokenizer)
    assert halves.spec.table(1).row_bytes == 128


def test_qwen():
    made = blueprint({**CONFIGS["qwen-ple"], "split_ngram_parts": 128})
    table = made.spec.table(2)
    assert (made.spec.layers, made.spec.lookback, table.heads) == ((1, 2), 2, 16)
    assert table.num_rows % 128 == 0
    assert 0 <= table.num_rows - sum(table.hash.head_rows()) < 128
    assert table.row_format == RowFormat((Segment("values", "bfloat16", 160),))
    for layer, parts in made.parts.items():
        assert len(parts) == 128
        assert sum(part.num_rows for part in parts) == made.spec.table(layer).num_rows
        assert len({part.num_rows for part in parts[:-1]}) == 1
    # The config counts layers from 1, tensors from 0.
    assert made.parts[2][5].tensors == {"values": "layers.1.ple.ple_embedding.ngram_embedding.shard_5.weight"}


@pytest.mark.parametrize(
    ("change", "rows", "scale"),
    [
        ({"ple_embedding_dtype": "float8_e4m3fn"}, "float8_e4m3fn 160", "weight_scale"),
        ({"quantization_config": {"quant_method": "fp8"}}, "float8_e4m3fn 160", "weight_scale"),
        ({"ple_embedding_dtype": "nvfp4"}, "float4_e2m1fn_x2 80, float8_e4m3fn 10", "weight_scale_2"),
        ({"torch_dtype": "float16"}, "float16 160", None),
        ({"ple_embedding_dtype": "torch.bfloat16", "torch_dtype": "float16"}, "bfloat16 160", None),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "bfloat16 160", None),
        (
            {"quantization_config": {"quant_method": "fp8", "ignored_layers": ["a", "model.ngram_embedding"]}},
            "bfloat16 160",
            None,
        ),
    ],
)
def test_qwen_row_formats(change, rows, scale):
    made = blueprint({**CONFIGS["qwen-ple"], **change})
    segments = made.spec.table(1).row_format.segments
    assert ", ".join(f"{s.dtype} {s.length}" for s in segments) == rows
    assert made.scales.get(1) == (scale and (f"layers.0.ple.ple_embedding.ngram_embedding.{scale}",))
    assert made.parts[1][0].tensors.keys() == {s.name for s in segments}


def test_longcat():
    made = blueprint(CONFIGS["longcat"])
    table = made.spec.table(0)
    assert table.hash.head_rows() == tuple(78 * 131072 + 2 * head + 1 for head in range(12))
    assert table.row_bytes == 3072 // 12 * 2
    assert [part.num_rows for part in made.parts[0]] == list(table.hash.head_rows())
    assert made.parts[0][11].tensors == {"values": "ngram_embeddings.embedders.11.weight"}


def test_gemma():
    made = blueprint(CONFIGS["gemma-ple"])
    table = made.spec.table(0)
    assert (made.spec.vocab_size, made.spec.lookback, table.num_rows, table.heads) == (262400, 0, 262144, 1)
    assert table.row_bytes == 30 * 256 * 2
    assert made.parts[0][0].tensors == {"values": "embed_tokens_per_layer.weight"}


def test_next_prime_against_a_sieve():
    sieve = np.ones(20_000, bool)
    sieve[:2] = False
    for n in range(2, 142):
        sieve[n * n :: n] = False
    assert [n for n in range(20_000) if is_prime(n)] == np.flatnonzero(sieve).tolist()
    assert next_prime(2**31 - 2) == 2**31 - 1
    assert next_prime(3215031751 - 1) == 3215031767  # a strong pseudoprime to 2, 3, 5 and 7


# Reading a config.json


def test_the_text_part_of_a_config_is_found(tmp_path):
    config = dict(CONFIGS["qwen-ple"])
    top = {"eos_token_id": config.pop("eos_token_id"), "vocab_size": 7, "text_config": config}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(top))
    assert blueprint(load_config(path)).spec == blueprint(CONFIGS["qwen-ple"]).spec


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b'"x"', b"\xff\xfe", b"{'a': 1}", b"[" * 100_000])
def test_a_file_that_is_no_config_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=r"config\.json"):
        load_config(path)


def test_a_config_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"nowhere\.json"):
        load_config(tmp_path / "nowhere.json")


@pytest.mark.parametrize("text_config", [None, 3, [], {"hidden_size": 5}])
def test_a_config_of_another_model_is_refused(tmp_path, text_config):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"hidden_size": 4096, "text_config": text_config}))
    with pytest.raises(SpecError, match=r"no model that engrampool knows.*deepseek-v4\.1: engram_layer_ids"):
        blueprint(load_config(path))


@pytest.mark.parametrize("family", golden_vectors.COMPRESSED)
def test_a_missing_tokenizer_is_refused(family):
    with pytest.raises(SpecError, match=f"{family} model .* tokenizer.json is needed"):
        blueprint(CONFIGS[family])


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff", b"[]"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError, match=r"tokenizer\.json cannot be read"):
        TokenMap.from_tokenizer(path)


def test_the_wrong_tokenizer_is_refused(tokenizer):
    with pytest.raises(SpecError, match=r"engram_compressed_vocab_size 99093, the tokenizer gives 99092"):
        blueprint({**V41, "engram_compressed_vocab_size": 99093}, tokenizer)


@pytest.mark.parametrize("rows", [[384006168], [384006168, 384016681], [384006168, 384016682 + 17_000_000]])
def test_other_table_sizes_than_stated_are_refused(tokenizer, rows):
    with pytest.raises(SpecError, match=rf"engram_num_embeddings {re.escape(str(rows))}; .* 384016682"):
        blueprint({**V41, "engram_num_embeddings": rows}, tokenizer)


def test_a_stated_table_may_be_padded(tokenizer):
    spec = blueprint({**V41, "engram_num_embeddings": [384006168, 384016896]}, tokenizer).spec
    assert [table.num_rows for table in spec.tables] == [384006168, 384016896]
    assert spec.table(14).hash == blueprint(V41, tokenizer).spec.table(14).hash


def test_what_v41_may_leave_out(tokenizer):
    optional = {"engram_compressed_vocab_size": None, "engram_num_embeddings": None}
    assert blueprint({**V41, **optional}, tokenizer).spec == blueprint(V41, tokenizer).spec


# Every value, spoiled

WRONG = [None, True, "8", 2.5, float("nan"), -1, 2**63, 10**400, [], [None], ["1"], [-1], [2**63], [1.5], {}, {"a": 1}]
OPTIONAL = {
    "qwen-ple": {"torch_dtype", "dtype", "ple_embedding_dtype", "make_ngram_vocab_size_divisible_by", "ngram_size"}
    | {"heads_per_ngram", "seed", "split_ngram_parts", "ple_embed_dim", "ngram_vocab_size_base"},
    "deepseek-v4.1": {"engram_num_embeddings", "engram_compressed_vocab_size"},
    "engram-demo": {"torch_dtype", "dtype", "seed"},
    "longcat": {"torch_dtype", "dtype"},
    "gemma-ple": {"torch_dtype", "dtype", "vocab_size", "vocab_size_per_layer_input"},
}


def spoiled() -> list[tuple[str, str, Any]]:
    cases = []
    for family, config in CONFIGS.items():
        keys = dict.fromkeys([*config, *sorted(OPTIONAL[family])])
        for key in keys:
            wrong = [value for value in WRONG if not (value is None and key in OPTIONAL[family])]
            if key == "seed":
                wrong.remove(2**63)
            if key == "hidden_size" and family == "qwen-ple":
                continue
            if key == "ngram_vocab_size_ratio":
                wrong.remove(2.5)
            cases += [(family, key, value) for value in wrong]
    return cases


@pytest.mark.parametrize(("family", "key"), dict.fromkeys((family, key) for family, key, _ in spoiled()))
def test_a_value_that_cannot_be_is_refused_by_its_key(family, key, tokenizer):
    for wrong in [value for f, k, value in spoiled() if (f, k) == (family, key)]:
        with pytest.raises(SpecError) as caught:
            blueprint({**CONFIGS[family], key: wrong}, tokenizer)
        assert key in str(caught.value), f"{wrong!r:.40}: {caught.value}"


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("deepseek-v4.1", {"engram_layer_ids": [1, 1]}, "a layer is named twice"),
        ("deepseek-v4.1", {"engram_pad_token_id": 129280}, "pad id 129280"),
        ("deepseek-v4.1", {"engram_head_dim": 40}, "engram_head_dim must be a multiple of 32"),
        ("deepseek-v4.1", {"engram_vocab_size": 1}, "engram_vocab_size"),
        ("deepseek-v4.1", {"engram_n_heads": 10**9}, "engram_n_heads"),
        ("deepseek-v4.1", {"engram_max_ngram_size": 10**9}, "engram_max_ngram_size"),
        ("engram-demo", {"engram_vocab_size": [646400]}, "each order 2 .. 3"),
        ("engram-demo", {"engram_vocab_size": [646400, 1]}, "above 1"),
        ("engram-demo", {"n_embed_per_ngram": 511}, "n_embed_per_ngram 511"),
        ("qwen-ple", {"ple_layer_ids": [0, 1]}, "counts from 1"),
        ("qwen-ple", {"ple_embed_dim": 2561}, "ple_embed_dim 2561"),
        ("qwen-ple", {"ple_embed_dim": None}, "ple_embed_dim"),
        ("qwen-ple", {"ple_embed_dim": 16, "ple_embedding_dtype": "nvfp4"}, "multiple of 16"),
        ("qwen-ple", {"eos_token_id": 248320}, "eos_token_id"),
        ("qwen-ple", {"quantization_config": "fp8"}, "quantization_config"),
        ("qwen-ple", {"quantization_config": {"quant_method": "fp8", "ignored_layers": 5}}, "quantization_config"),
        ("qwen-ple", {"quantization_config": {"quant_method": "fp8", "ignored_layers": [5]}}, "quantization_config"),
        ("qwen-ple", {"split_ngram_parts": 10**9}, "split_ngram_parts"),
        ("longcat", {"hidden_size": 11}, "hidden_size 11 gives 12 heads no values"),
        ("longcat", {"ngram_vocab_size_ratio": 40000}, "ngram_vocab_size_ratio 40000"),
        ("longcat", {"emb_neighbor_num": 10**9}, "emb_neighbor_num"),
        ("longcat", {"emb_split_num": 10**9}, "emb_split_num"),
        ("longcat", {"eos_token_id": 131072}, "eos_token_id"),
        ("gemma-ple", {"hidden_size_per_layer_input": 2**20}, "limit"),
    ],
)
def test_values_that_contradict_each_other_are_refused(family, change, message, tokenizer):
    with pytest.raises(SpecError, match=message):
        blueprint({**CONFIGS[family], **change}, tokenizer)


VALUES = st.one_of(
    st.sampled_from([*WRONG, 0, 1, 2, 3, 31, 32, 33, 2**20, 2**31 - 1, 2**31, 2**40, 2**64, 0.001, "nvfp4", "fp8"]),
    st.lists(st.one_of(st.none(), st.booleans(), st.integers(-1, 2**31), st.text(max_size=2)), max_size=3),
    st.fixed_dictionaries({}, optional={"quant_method": st.just("fp8"), "ignored_layers": st.sampled_from(WRONG)}),
)


@pytest.mark.parametrize("family", CONFIGS)
@settings(max_examples=2 * settings.default.max_examples)
@given(data=st.data())
def test_nothing_but_spec_errors_comes_out(tokenizer, family, data):
    config = copy.deepcopy(CONFIGS[family])
    keys = [*config, *sorted(OPTIONAL[family]), "quantization_config", "hidden_size", "engram_layer_ids"]
    for _ in range(data.draw(st.integers(1, 3))):
        config[data.draw(st.sampled_from(keys))] = data.draw(VALUES)
    try:
        made = blueprint(config, tokenizer)
    except SpecError:
        return
    # What was accepted holds together.
    assert find_builder(config).name == made.spec.name
    for table in made.spec.tables:
        assert sum(part.num_rows for part in made.parts[table.layer]) == table.num_rows
        assert json.loads(json.dumps(table.to_json())) == table.to_json()
