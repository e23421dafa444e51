"""Our row ids, maps and layouts against those that the engines' own classes make of the same tokens."""

from types import SimpleNamespace

import numpy as np
import pytest

from engrampool_client import FingerprintError
from engrampool_client.engine_checks import check_layout
from engrampool_proto.builders import blueprint
from engrampool_proto.spec import ModelSpec
from engrampool_server.files.synth import synthetic_model

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-engines` installs it")
pytest.importorskip("vllm", reason="the engines are not there; `make test-engines` unpacks them")
SEEDS = range(8)


@pytest.fixture(scope="module")
def vllm_engram():
    import vllm.models.deepseek_v41.common.engram as engram

    return engram


@pytest.fixture(scope="module")
def vllm_hash(vllm_engram, config, tokenizer_path):
    """The engine's own, made by its own constructor of the tokenizer's files."""
    model = SimpleNamespace(tokenizer=tokenizer_path, trust_remote_code=False, revision=None)
    cache = SimpleNamespace(block_size=64, kv_cache=torch.zeros(1))
    vllm_config = SimpleNamespace(model_config=model, use_v2_model_runner=True)
    return vllm_engram.NgramHashState(vllm_config, vllm_engram.EngramLayout.from_config(config), cache)


@pytest.fixture(scope="module")
def sglang_hash(config, tokenizer_path):
    from sglang.srt.layers.engram import EngramHasher, EngramLayout
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    layout = EngramLayout.from_config(config)
    made = EngramHasher(layout, tokenizer, config.engram_pad_token_id, config.engram_compressed_vocab_size)
    made.init_history(16, "cpu")
    return made


def numbers(layout):
    """Layer -> rows of each head."""
    flat = [[rows for order in layer for rows in order] for layer in layout.primes]
    return dict(zip(layout.layer_ids, flat, strict=True))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_engines_layout_is_the_served_one(engine, spec, vllm_hash, sglang_hash, config, same):
    hasher = vllm_hash if engine == "vllm" else sglang_hash
    if engine == "vllm":
        layout = hasher.layout
    else:
        from sglang.srt.layers.engram import EngramLayout

        layout = EngramLayout.from_config(config)
    check_layout(spec, numbers(layout), 264, hasher.token_map.numpy())
    same(engine, "token map", hasher.token_map.numpy(), spec.token_map.ids)
    for at, table in enumerate(spec.tables):
        same(engine, "multipliers", hasher.multipliers[at].numpy(), np.array(table.hash.multipliers))
        same(engine, "offsets of heads", hasher.offsets[at].numpy(), table.head_offsets.astype(np.int64))
        assert hasher.pad_id == table.hash.fill
    other = {layer: [rows + 2 * (at == 5) for at, rows in enumerate(heads)] for layer, heads in numbers(layout).items()}
    with pytest.raises(FingerprintError, match="rows of head 5"):
        check_layout(spec, other, 264, hasher.token_map.numpy())


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_vllm_hashes_alike(vllm_hash, spec, sequences, same, seed, padding):
    ends = int(padding > 0)  # one more boundary, and one more row of look-back
    made = sequences(seed, spec.vocab_size)
    batch = made.batch
    tokens = torch.from_numpy(np.concatenate([batch.tokens, np.zeros(padding, np.int32)]))
    dead = torch.from_numpy(np.concatenate([batch.dead, np.zeros(padding, bool)]))
    positions = torch.from_numpy(np.concatenate([made.positions, np.zeros(padding, np.int64)]))
    bounds = torch.from_numpy(np.concatenate([batch.query_start_loc, [batch.query_start_loc[-1]] * ends]))
    lookback = np.concatenate([batch.lookback, np.full((ends, 3), -1, np.int32)])
    dead_before = np.concatenate([batch.lookback_dead, np.zeros((ends, 3), bool)])
    theirs = vllm_hash(
        tokens, positions, bounds.int(), dead, torch.from_numpy(lookback), torch.from_numpy(dead_before), None, None
    )
    for at, (_, ours) in enumerate(spec.hash(batch).items()):
        code = "NgramHashState.forward" + (", padded" if padding else "")
        same("vllm", code, theirs[: len(batch.tokens), at].numpy(), ours.astype(np.int32))


@pytest.mark.parametrize("seed", SEEDS)
def test_sglang_hashes_a_prompts_chunks_alike(sglang_hash, spec, sequences, same, seed):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    made = sequences(seed, spec.vocab_size, dead=False)
    batch, bounds = made.batch, made.bounds
    history = torch.tensor([sglang_hash.history_row(before[before >= 0][::-1].tolist()) for before in batch.lookback])
    forward = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        positions=torch.from_numpy(made.positions),
        req_pool_indices=torch.arange(len(made.starts)),
        extend_seq_lens=torch.from_numpy(np.diff(bounds)),
        extend_seq_lens_cpu=np.diff(bounds).tolist(),
        extend_start_loc=torch.from_numpy(bounds[:-1].copy()),
        engram_history=history.int(),
        out_cache_loc=None,
    )
    theirs = sglang_hash(torch.from_numpy(batch.tokens), forward)
    for at, ours in enumerate(spec.hash(batch).values()):
        same("sglang", "EngramHasher.forward, extend", theirs[:, at].numpy(), ours.astype(np.int64))
    # The step after it: one more token each, on the history that was committed.
    random = np.random.default_rng(seed)
    following = [np.append(past, random.integers(0, spec.vocab_size)) for past in made.histories]
    alive = [np.zeros(len(past), bool) for past in following]
    decode = type(made)([len(past) - 1 for past in following], following, alive)
    forward = SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        positions=torch.from_numpy(decode.positions),
        req_pool_indices=torch.arange(len(made.starts)),
        out_cache_loc=torch.ones(len(made.starts), dtype=torch.int64),
    )
    theirs = sglang_hash(torch.from_numpy(decode.batch.tokens), forward)
    for at, ours in enumerate(spec.hash(decode.batch).values()):
        same("sglang", "EngramHasher.forward, decode", theirs[:, at].numpy(), ours.astype(np.int64))


@pytest.mark.parametrize("seed", SEEDS)
def test_sglang_stages_the_windows_that_we_hash(sglang_hash, spec, sequences, same, seed):
    from sglang.srt.layers.engram_staging import EngramRowStager

    made = sequences(seed, spec.vocab_size, dead=False)
    stager = EngramRowStager.__new__(EngramRowStager)  # its constructor makes a CUDA stream
    stager.hasher = sglang_hash
    batch = SimpleNamespace(
        encoder_swa_reset=None,
        prefix_lens=made.starts,
        extend_lens=np.diff(made.bounds).tolist(),
        reqs=[SimpleNamespace(full_untruncated_fill_ids=past.tolist()) for past in made.histories],
    )
    theirs, _ = sglang_hash.hash_windows(*stager._windows(batch))
    for at, ours in enumerate(spec.hash(made.batch).values()):
        same("sglang", "EngramRowStager windows, hashed", theirs[:, at].numpy(), ours.astype(np.int64))


@pytest.mark.parametrize("seed", SEEDS)
def test_qwens_per_layer_embedding_hashes_alike(sequences, same, seed):
    from vllm.models.qwen4_exp.common.ops.ple import ple_ngram_ids
    from vllm.models.qwen4_exp.nvidia.ngram_embedding import Qwen4ExpNGramEmbedding as Theirs

    config = {**synthetic_model("qwen-ple", 1000).config, "ple_layer_ids": [2, 5]}
    spec, eos = blueprint(config).spec, config["eos_token_id"]
    made = sequences(seed, spec.vocab_size, dead=False)
    for past in made.histories:
        past[::7] = eos
    made.depth = spec.lookback
    context = made.before(made.histories, eos)[:, ::-1].copy()
    for at, (layer, ours) in enumerate(spec.hash(made.batch).items()):
        theirs = Theirs.__new__(Theirs)  # its constructor wants a whole engine; the numbers are what it would make
        torch.nn.Module.__init__(theirs)
        theirs.ngram_size, theirs.heads_per_ngram, theirs.eos_token_id = 3, 8, eos  # as its config has by default
        multipliers = theirs._make_layer_multipliers(
            ngram_size=theirs.ngram_size,
            unigram_vocab_size=config["vocab_size"],
            seed=1234,
            ple_dense_layer_id=at,
        )
        sizes, offsets, _ = theirs._make_vocab_layout(
            ngram_vocab_size_base=config["ngram_vocab_size_base"],
            ngram_heads=(theirs.ngram_size - 1) * theirs.heads_per_ngram,
            ple_dense_layer_id=at,
        )
        theirs.layer_multipliers = torch.tensor(multipliers)
        theirs.ngram_heads_vocab_sizes, theirs.ngram_heads_offsets = torch.tensor(sizes), torch.tensor(offsets)
        table = spec.table(layer)
        check_layout(ModelSpec("one", spec.vocab_size, (table,)), {layer: sizes}, table.row_bytes, None)
        batch = torch.from_numpy(made.batch.tokens), torch.from_numpy(made.bounds), torch.from_numpy(context)
        found = theirs.compute_ngram_ids(*batch)
        same("vllm", "Qwen4ExpNGramEmbedding.compute_ngram_ids", found.numpy(), ours.astype(np.int64))
        found = ple_ngram_ids(
            *batch,
            theirs.layer_multipliers,
            theirs.ngram_heads_vocab_sizes,
            theirs.ngram_heads_offsets,
            eos,
            theirs.heads_per_ngram,
        )
        same("vllm", "ple_ngram_ids, the kernel", found.numpy(), ours.astype(np.int64))
