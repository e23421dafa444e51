"""SGLang's own Engram layers with rows from a real server, against the same layers with the table that they stock."""

import json
import socket
import sys
import urllib.request
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engrampool_client import Client, DeadlineError, FingerprintError, PoolError
from engrampool_client.config import ENVIRONMENT_PREFIX
from engrampool_client.integrations import sglang as plugin
from engrampool_client.integrations.forwards import metrics
from engrampool_client.integrations.forwards.settings import ENGINE_PREFIX

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-engines` installs it")
pytest.importorskip("sglang", reason="the engines are not there; `make test-engines` unpacks them")
from sglang_ranks import (  # noqa: E402  (needs torch)
    IMAGE,
    MM_PAD,
    SLOTS,
    Comparison,
    Ranks,
    checkpoint,
    exact_numbers,
    forward_of,
    hasher_maker,
    scheduled,
    step,
    unstaged,
    with_plugin,
)


@pytest.fixture(scope="module")
def engine(server):
    with with_plugin(server) as engine:
        yield engine


@pytest.fixture(scope="module")
def make_hasher(engine, config, tokenizer_path):
    return hasher_maker(engine, config, tokenizer_path)


@pytest.fixture
def ranks(engine, config, server, make_hasher, monkeypatch):
    """Ranks of a size; made, and closed at the end."""
    made = []

    def ranks(size, **settings):
        made.append(Ranks(engine, config, monkeypatch, size, make_hasher, **{"target": server.address, **settings}))
        return made[-1]

    yield ranks
    for one in made:
        one.close()


@pytest.mark.parametrize("size", [1, 2, 4, 5, 8])
def test_layers_read_what_they_read_of_the_stocked_table(ranks, size, spec, sequences, same_bits):
    compared = Comparison(ranks(size).make(), spec, same_bits)
    for seed in range(3):
        made = sequences(seed, spec.vocab_size, longest=(3, 8, 16)[seed])
        compared.extend(made, staged=seed != 1)
        # Decode steps upon it, in a graph that is for more requests than there are.
        random, lengths = np.random.default_rng(seed), np.array([len(past) for past in made.histories])
        slots = np.append(np.arange(len(lengths)), [0, 0])
        for _ in range(2):
            tokens = random.integers(0, spec.vocab_size, len(slots))
            compared.step(
                "decode", "DECODE", tokens, np.append(lengths, [0, 0]), slots, locations=[1] * len(lengths) + [0, 0]
            )
            lengths += 1
        # Blocks of drafts, of which some are rejected, and the block after those.
        for accepted in (random.integers(1, 5, len(lengths)), np.full(len(lengths), 4)):
            block = random.integers(0, spec.vocab_size, (len(lengths), 4))
            positions = (lengths[:, None] + np.arange(4)).reshape(-1)
            compared.step("verify", "TARGET_VERIFY", block.reshape(-1), positions, slots[:-2], block=4)
            for own in compared.group.made:
                own.manager.update_after_verify(
                    verify_ids_2d=torch.from_numpy(block),
                    req_pool_indices=torch.from_numpy(slots[:-2]),
                    commit_lens=torch.from_numpy(accepted),
                )
            lengths += accepted


def test_prefixes_that_a_forward_runs_again_are_looked_up_with_their_chunks(ranks, spec, sequences, same_bits):
    """As with a bounded window of the encoder: up to 128 tokens of a prefix that was found are in the batch again."""
    made = sequences(3, spec.vocab_size, longest=6)
    whole = type(made)([0] * len(made.starts), made.histories, made.dead)
    Comparison(ranks(2).make(), spec, same_bits).extend(made, replayed=whole)


def test_ranks_of_other_tokens_have_no_part_in_it(ranks):
    """With data-parallel attention, ranks of one group share the columns, and others have tokens of their own."""
    group = ranks(1)
    group.parallel.tp_size, group.parallel.attn_dp_size, group.parallel.attn_tp_size = 8, 4, 2
    group.make()
    assert [layer.embed.columns for layer in group.made[0].layers] == [slice(0, 12)] * 2
    with group.at(0) as made:
        group.known, group.parts = None, []
        decode(made)
    assert len(group.parts) == 2
    alone = ranks(1)
    alone.parallel.tp_size, alone.parallel.attn_dp_size = 8, 8
    alone.known, alone.parts = None, []
    with alone.make().at(0) as made:
        assert not_missing(decode(made))
    assert alone.parts == alone.votes == [], "it adds up nothing, and asks nobody"


def test_ids_of_a_gpu_are_copied_as_what_the_host_keeps(engine, monkeypatch):
    """PyTorch waits for a copy to the host where types differ; the thread that launches kernels must not."""
    started = []
    monkeypatch.setattr(engine.ours, "_worker", SimpleNamespace(start=lambda ids: started.extend(ids)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    ids = torch.arange(16).view(2, 2, 4)
    engine.ours._start(ids.as_subclass(OnGpu))
    assert [(one.dtype, one.tolist()) for one in started] == [(torch.int32, ids[:, at].tolist()) for at in range(2)]


def test_a_graph_of_a_whole_forward_is_refused_where_it_is_captured(engine, monkeypatch):
    """It would have zeros for ever."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a graph of a whole forward is captured"):
        engine.ours._start(torch.zeros(2, 2, 4).as_subclass(OnGpu))


def test_a_forward_of_more_tokens_than_any_before_gets_more_memory(ranks, spec, same_bits):
    group = ranks(2).make()
    ids = torch.from_numpy(np.random.default_rng(5).integers(0, spec.tables[0].num_rows, (600, 2, 24)))
    exact = [exact_numbers(spec, layer, ids[:, at]) for at, layer in enumerate(spec.layers)]
    group.known = None
    for rank in range(2):
        with group.at(rank) as made:
            made.worker.start(ids[:3].unbind(1))  # and its model fails
            for tokens in (5, 600, 2):
                made.worker.start(ids[:tokens].unbind(1))
                for at, layer in enumerate(made.layers):
                    group.parts = []
                    found = layer.embed(ids[:tokens, at], None)
                    columns = slice(12 * rank, 12 * rank + 12)
                    same_bits("sglang", "EngramEmbedding, a chunk", exact[at][:tokens, columns], found[:, columns])
                    found[:, columns] = 0
                    assert not found.any()


class OnGpu(torch.Tensor):
    """Memory of this machine that says it is a GPU's: the engine's kernel runs on it in Triton's interpreter."""

    is_cuda = property(lambda self: True)


def test_the_engines_kernel_makes_of_rows_what_it_makes_of_a_table(ranks, engine, spec, same_bits, monkeypatch):
    import sglang.kernels.ops.embeddings.engram_gather as kernels
    import triton.runtime.interpreter as interpreter

    load = interpreter.InterpreterBuilder.create_masked_load

    def load_by_truth(self, pointers, mask, *rest):
        mask.data = mask.data.astype(bool)  # the interpreter makes an integer of it, and does not take that
        return load(self, pointers, mask, *rest)

    def gather(weight_ptr, scale_ptr, ids, out, dim, block, row_lo=0, row_hi=1 << 62, sort_ids=False):
        """The engine's own, but for its check that this is a GPU."""
        numbers = {"DIM": dim, "BLK": block, "E8M0_ZERO": 2.0**-127, "HAS_DST": False}
        kernels._engram_gather_kernel[(len(ids),)](weight_ptr, scale_ptr, ids, ids, out, row_lo, row_hi, **numbers)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", load_by_truth)
    monkeypatch.setattr(engine.module, "engram_gather", gather)
    values, scales = checkpoint(spec, 1)
    ids = torch.arange(0, 4800, 100).view(2, 24)
    theirs = torch.empty(2, 24, 256, dtype=torch.bfloat16)
    gather(values.data_ptr(), scales.data_ptr(), ids.view(-1), theirs, 256, 32)
    with ranks(1).make().at(0) as made:
        rows = made.worker.client.lookup_rows({1: ids.numpy()})[1]
        ours = torch.empty(2, 24, 256, dtype=torch.bfloat16).as_subclass(OnGpu)
        engine.ours.numbers(torch.from_numpy(rows), 256, ours)
        same_bits("sglang", "engram_gather, the kernel", theirs, ours.as_subclass(torch.Tensor))


# --- forwards that go wrong


def decode(made, tokens=5, seed=0, mode="DECODE"):
    """A forward of one token a request: what each layer reads, or fails with."""
    numbers = np.random.default_rng(seed).integers(0, 900, tokens)
    forward, numbers = step(mode, numbers, np.zeros(tokens, np.int64), np.arange(tokens) % SLOTS)
    ids = made.hasher(numbers, forward)
    return read(made, ids, forward)


def read(made, ids, forward):
    found = []
    for at, layer in enumerate(made.layers):
        try:
            found.append(layer.embed_rows(ids[:, at], forward, False))
        except PoolError as error:
            found.append(error)
    return found


def prefill(made, sequences, seed=0):
    """A forward of prompts, staged: its batch, and what each layer reads or fails with."""
    chunks = sequences(seed, 900, longest=10)
    batch = made.manager.prepare_for_forward(scheduled(chunks), chunked_req=None)
    forward, tokens = forward_of(batch, chunks)
    return read(made, made.hasher(tokens, forward), forward)


def equal(found, right):
    return all(
        torch.equal(one.view(torch.int16), other.view(torch.int16)) for one, other in zip(found, right, strict=True)
    )


@pytest.mark.parametrize("policy", ["mask", "raise"])
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_server_that_is_silent_costs_a_forward_its_rows_and_the_next_none(ranks, server, sequences, policy, kind):
    run = decode if kind == "decode" else lambda made: prefill(made, sequences)
    with ranks(1).make().at(0) as made:
        right = run(made)
    with ranks(1, timeout_s=0.3, on_failure=policy, breaker_failures=0).make().at(0) as made:
        with server.frozen():
            found = run(made)
        for one in found:
            if policy == "mask":
                assert not one.view(torch.int16).any()
            else:
                assert isinstance(one, DeadlineError)
        # The server was woken, and may take its time.
        again = next(found for found in iter(lambda: run(made), None) if not_missing(found))
        assert equal(again, right)


def not_missing(found):
    return all(isinstance(one, torch.Tensor) and one.view(torch.int16).any() for one in found)


@pytest.mark.parametrize("policy", ["mask", "raise"])
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_one_ranks_silent_server_is_the_outcome_of_all(ranks, server, sequences, policy, kind):
    """The ranks run one after the other, each a group of its own; test_agreement.py has ranks that are processes."""
    run = decode if kind == "decode" else lambda made: prefill(made, sequences)
    silent = ranks(2, timeout_s=0.3, on_failure=policy, breaker_failures=0).make()
    silent.known, silent.parts = None, []
    with silent.at(1) as made, server.frozen():
        first = run(made)
        tokens = len(silent.votes[0]) - 1
        masked = [made.worker.counts.masked]
    other = ranks(2, timeout_s=60, on_failure=policy).make()
    other.known, other.parts, other.others = None, [], iter(silent.votes)
    with other.at(0) as made:
        second = run(made)
        masked.append(made.worker.counts.masked)
        assert made.worker.client.stats.bytes["wire"] > 0
    assert [len(one) for one in silent.votes] == [len(one) for one in other.votes] == [tokens + 1] * 2
    assert all(one.all() for one in other.votes), "this one has its rows"
    if policy == "mask":
        assert [one.any().item() for one in first + second] == [False] * 4
        assert masked == [{1: tokens, 14: tokens}] * 2
    else:
        assert [type(one) for one in first + second] == [DeadlineError] * 2 + [PoolError] * 2
        assert all("another rank of this group" in str(one) for one in second)
        assert silent.parts == other.parts == [], "nobody adds up what others have not"


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_what_stops_a_lookup_from_beginning_is_told_to_the_other_ranks(ranks, engine, sequences, kind, monkeypatch):
    """The engine may begin it long before the forward, where nobody would catch it, and the others would wait."""
    run = decode if kind == "decode" else lambda made: prefill(made, sequences)
    group = ranks(2).make()
    ours, error = engine.ours, PoolError("there is no memory")
    stops = [(ours, "Staging")] if kind == "decode" else [(ours, "Prompts"), (ours.Prompts, "start")]

    def fail(*_, **__):
        raise error

    with group.at(0) as made:
        group.known, group.parts = None, []
        for place, name in stops:
            with monkeypatch.context() as patch:
                patch.setattr(place, name, fail)
                assert run(made) == [error] * 2
        assert [vote.any() for vote in group.votes] == [False] * 2 * len(stops)
        assert made.worker.counts.failed == 2 * len(stops)
    group.votes.clear()
    with group.at(0) as made:
        assert len(run(made)) == len(group.parts) == 2
        assert all(vote.all() for vote in group.votes)


def test_a_staged_batch_that_never_runs_gives_its_rows_to_no_other(ranks, sequences):
    with ranks(1).make().at(0) as made:
        right = decode(made), prefill(made, sequences, seed=1)
        chunks = sequences(0, 900, longest=10)
        batch = made.manager.prepare_for_forward(scheduled(chunks), chunked_req=None)  # and it is taken back
        assert equal(decode(made), right[0])
        forward, tokens = forward_of(batch, chunks)
        found = read(made, made.hasher(tokens, forward), forward)
        assert ["another forward" in str(one) for one in found] == [True, True]
        assert equal(prefill(made, sequences, seed=1), right[1])


def test_rows_are_of_the_forward_that_wants_them_or_of_none(ranks, engine):
    with ranks(1).make().at(0) as made:
        with pytest.raises(PoolError, match="no row ids of layer 14 were given"):
            made.layers[1].embed(torch.zeros(3, 24, dtype=torch.int64))
        made.worker.start([torch.zeros(2, 24, dtype=torch.int64)] * 2)
        with pytest.raises(PoolError, match="rows of 2 tokens were asked for, and of 3 are wanted"):
            made.layers[1].embed(torch.zeros(3, 24, dtype=torch.int64))
        made.worker.start([torch.full((2, 24), 1 << 30)] * 2)
        with pytest.raises(Exception, match="row id 1073741824"):
            made.layers[0].embed(torch.zeros(2, 24, dtype=torch.int64))


def test_an_idle_rank_asks_nobody_and_waits_for_nobody(ranks):
    group = ranks(2).make()
    with group.at(0) as made:
        stats = made.worker.client.stats
        for tokens in (0, 4):
            forward, numbers = step(
                "IDLE", np.zeros(tokens, np.int64), np.zeros(tokens, np.int64), np.zeros(tokens, int)
            )
            for one in read(made, made.hasher(numbers, forward), forward):
                assert (one.shape, one.view(torch.int16).any().item()) == ((tokens, 24, 256), False)
        assert stats.bytes["wire"] == 0


# --- what operators see


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_rank_answers_prometheus_until_the_scheduler_ends(ranks, engine, monkeypatch):
    port = free_port()
    monkeypatch.setenv(f"{ENGINE_PREFIX}METRICS_PORT", str(port))
    with ranks(1).make().at(0) as made:
        decode(made, tokens=5)
        name = made.worker.client.spec.name
        found = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
        assert f'engrampool_engine_tokens_total{{model="{name}"}} 5.0' in found
        assert f'engrampool_engine_wait_seconds_count{{layer="14",model="{name}"}} 1.0' in found
        assert "engrampool_client_steps_total" in found
        engine.ours._closed()
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60)


@pytest.mark.parametrize(
    ("attn_dp_enabled", "dp_rank", "number"),
    [(False, None, 1), (False, 3, 7), (True, 1, 1)],
    ids=["one replica", "the fourth replica", "data-parallel attention"],
)
def test_each_rank_has_a_port_of_its_own(ranks, monkeypatch, attn_dp_enabled, dp_rank, number):
    ports = []
    monkeypatch.setattr(metrics, "serve", lambda port, client, counts: ports.append(port))
    monkeypatch.setenv(f"{ENGINE_PREFIX}METRICS_PORT", "9400")
    group = ranks(2)
    group.parallel.attn_dp_enabled, group.parallel.dp_rank = attn_dp_enabled, dp_rank
    group.make()
    assert ports == [9400 + number - 1, 9400 + number]


def test_forwards_that_ask_nobody_are_counted(ranks, engine):
    with ranks(1).make().at(0) as made:
        engine.ours._quietly(decode, made)
        decode(made)
        counts = made.worker.counts
        assert (counts.dummies, counts.steps, counts.tokens, counts.failed) == (1, 1, 5, 0)


def test_a_prompts_row_ids_are_compared_with_the_engines_own(ranks, sequences, monkeypatch):
    monkeypatch.setenv(f"{ENGINE_PREFIX}VERIFY", "1")
    group = ranks(2).make()
    group.known = None
    with group.at(1) as made:
        group.parts, counts = [], made.worker.counts
        prefill(made, sequences)
        tokens = counts.tokens
        assert (counts.verified, counts.differences) == (tokens, 0)
        theirs = made.hasher.hash_windows

        def other(*windows):
            ids, rest = theirs(*windows)
            ids[2, 1, 5] += 1
            return ids, rest

        monkeypatch.setattr(made.hasher, "hash_windows", other)
        group.votes.clear()
        found = prefill(made, sequences)
        said = rf"layer 14: 1 of {tokens} tokens, the first token 2 \(request \d+, position 2\), head 5: row \d+ here"
        for one in found:
            with pytest.raises(FingerprintError, match=said):
                raise one
        assert [vote.any() for vote in group.votes] == [False] * 2, "it is an error of all ranks"
        assert (counts.verified, counts.differences) == (2 * tokens, 1)


# --- what asks nobody, and graphs


class Interrupting:
    """What the engine warms up or captures: at the first look at it there is a forward, and then all is over."""

    def __init__(self, run):
        vars(self)["run"] = run

    def __getattr__(self, name):
        vars(self)["run"]()
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "run",
    [
        lambda engine, _: engine.graphs.capture_cuda_graphs(model_runner=SimpleNamespace()),
        lambda engine, runner: engine.graphs.capture_prefill_graph(model_runner=runner, eager_runner=None),
        lambda engine, runner: engine.graphs.capture_decode_graph(model_runner=runner),
        lambda engine, runner: engine.BaseRunner._dummy_run(runner, 4, buffers=None),
    ],
    ids=["all", "prefill", "decode", "dummy"],
)
def test_warming_up_tuning_and_capturing_ask_nobody(ranks, engine, monkeypatch, run):
    with ranks(1).make().at(0) as made:
        decode(made)
        stats, ran = made.worker.client.stats, []
        runner = Interrupting(lambda: ran.append(decode(made)))
        monkeypatch.setattr(engine.graphs, "GraphSharedOutput", runner)
        asked = stats.bytes["wire"]
        with pytest.raises(KeyboardInterrupt):
            run(engine, runner)
        assert [one.view(torch.int16).any().item() for one in ran[0]] == [False, False]
        assert stats.bytes["wire"] == asked
        assert not_missing(decode(made))
        assert stats.bytes["wire"] == 2 * asked, "only the forwards before and after were asked for"


def test_pieces_of_a_decode_graph_are_replayed_with_the_rows_of_each_forward(ranks, engine, capture):
    with ranks(1).make().at(0) as made:
        batches = [torch.from_numpy(np.random.default_rng(seed).integers(0, 9000, (5, 2, 24))) for seed in range(3)]
        right = []
        for ids in batches:
            made.worker.start(ids.unbind(1))
            right.append([layer.embed(ids[:, at]) for at, layer in enumerate(made.layers)])
        before = made.worker.client.stats.bytes["wire"]
        forward, tokens = step("DECODE", np.zeros(5, np.int64), np.zeros(5, np.int64), np.arange(5))
        with capture() as between:
            ids = engine.ours._quietly(made.hasher, tokens, forward)
            values = engine.ours._quietly(
                lambda: [one.embed(ids[:, at], forward) for at, one in enumerate(made.layers)]
            )
        assert len(between) == 3
        assert not any(one.any() for one in values)
        assert made.worker.client.stats.bytes["wire"] == before, "a capture asks nobody"
        for given, wanted in zip(batches, right, strict=True):
            ids.copy_(given)  # as a replayed piece has them hashed
            for run in between:
                run()
            assert equal(values, wanted)


@pytest.mark.parametrize("staged", [True, False])
def test_pieces_of_a_prefills_graph_take_the_rows_of_the_batch_that_runs(ranks, engine, capture, sequences, staged):
    """The breaks are the engine's own: where it hashes, and where a layer looks up. Its graph is for more tokens."""
    import sglang.srt.models.deepseek_v4 as model

    with ranks(1).make().at(0) as made, pytest.MonkeyPatch.context() as patch:
        right = prefill(made, sequences)
        wide = len(right[0]) + 7
        context = SimpleNamespace(forward_batch=None)
        for place in (engine.module, model):
            patch.setattr(place, "get_tc_piecewise_forward_context", lambda: context)
        tokens, x = torch.zeros(wide, dtype=torch.int64), torch.randn(wide, 4, 16).bfloat16()
        context.forward_batch, _ = forward_of(scheduled(sequences(1, 900)), sequences(1, 900))

        def whole():
            ids = made.hasher.new_hash_ids(tokens)
            model.bcg_deepseek_v4_engram_hash_ids(made.hasher, tokens, ids)
            layers = enumerate(made.layers)
            return [layer(x, ids[:, at], context.forward_batch, input_ids=tokens) for at, layer in layers]

        numbers = []
        patch.setattr(engine.module, "engram_gate", lambda x, kv, *_: numbers.append(kv) or x)
        for layer in made.layers:
            patch.setattr(layer.wkv, "forward", lambda rows: (rows, None))
        before = made.worker.client.stats.bytes["wire"]
        capture_sized(context.forward_batch, wide)
        with capture() as between:
            engine.ours._quietly(whole)
        assert len(between) == 3
        assert made.worker.client.stats.bytes["wire"] == before
        chunks = sequences(0, 900, longest=10)
        batch = scheduled(chunks)
        made.manager.prepare_for_forward(batch, chunked_req=None)
        if not staged:
            batch.engram_staged_rows = None
        context.forward_batch, own = forward_of(batch, chunks)
        tokens[: len(own)] = own
        context.forward_batch.positions = torch.nn.functional.pad(context.forward_batch.positions, (0, 7))
        for run in between:
            run()
        for one, wanted in zip(numbers, right, strict=True):
            found = one.view(wide, 24, 256)
            assert equal([found[:-7]], [wanted])
            assert staged <= (not found[-7:].any())


def capture_sized(forward, tokens):
    """The batch that a graph is captured with: one request of all its tokens."""
    forward.positions = torch.arange(tokens)
    forward.req_pool_indices = torch.zeros(1, dtype=torch.int64)
    forward.extend_seq_lens, forward.extend_start_loc = torch.tensor([tokens]), torch.tensor([0])
    forward.extend_seq_lens_cpu = None
    forward.engram_history = None


# --- loading, refusals, the end


def checkpoint_of(model, spec, *, tables):
    """What is read of a checkpoint's files: name -> tensor."""
    for layer in spec.layers:
        name = f"layers.{layer}.engram"
        if tables:
            values, scales = checkpoint(spec, layer)
            yield f"{name}.embed.weight", values
            yield f"{name}.embed.scale", scales
        yield f"{name}.wkv.weight", torch.full_like(model.model.layers[layer].engram.wkv.weight, layer)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("METRICS_PORT", "0", "METRICS_PORT='0' is not allowed: a port is 1 .. 65535"),
        ("EARLY_DECODE", "0", "EARLY_DECODE is for vLLM, and does nothing with SGLang: unset it"),
    ],
)
def test_a_setting_that_is_wrong_or_does_nothing_ends_the_process(engine, monkeypatch, name, value, said):
    monkeypatch.setattr(engine.plugins, "_plugins_loaded", False)
    monkeypatch.delitem(sys.modules, engine.ours.__name__)
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}TARGET", "a:1")
    monkeypatch.setenv(f"{ENGINE_PREFIX}{name}", value)
    with pytest.raises(SystemExit, match=f"engrampool: {ENGINE_PREFIX}{said}"):
        engine.plugins.load_plugins()


@pytest.mark.parametrize("tables", [True, False])
def test_the_engines_loader_takes_nothing_of_tables_and_needs_none(ranks, spec, tables):
    from sglang.srt.models.deepseek_v4 import DeepseekV4ForCausalLM as Theirs

    with ranks(4).make().at(3) as made:
        model = torch.nn.Module()
        model.model = torch.nn.Module()
        model.model.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(15))
        for layer, number in zip(made.layers, spec.layers, strict=True):
            model.model.layers[number].engram = layer
        model.config = SimpleNamespace(n_routed_experts=1, model_type="deepseek_v41", num_hidden_layers=15)
        model.wo_a_fp8, model.quant_config, model.num_fused_shared_experts, model.vision = True, None, 0, None
        model.pp_group = SimpleNamespace(is_first_rank=True, is_last_rank=True)
        model.post_load_weights = model._prewarm_mhc_kernels = lambda **_: None
        model.remap_weight_name_to_dpsk_hf_format = Theirs.remap_weight_name_to_dpsk_hf_format
        Theirs.load_weights(model, checkpoint_of(model, spec, tables=tables))
        for layer, number in zip(made.layers, spec.layers, strict=True):
            assert (layer.embed.weight.shape, layer.embed.scale.shape) == ((0, 256), (0, 8))
            assert (layer.wkv.weight == number).all(), "the rest of the layer is loaded"
            assert (layer.embed.columns, layer.embed.host_table, layer.embed.peer) == (slice(18, 24), None, None)


def test_an_index_that_does_not_name_the_tables_needs_no_files_of_them(tmp_path):
    """What docs/INTEGRATION_VLLM.md tells to do, by this engine's function."""
    from sglang.srt.model_loader.weight_utils import filter_duplicate_safetensors_files

    page = (Path(__file__).parents[2] / "docs/INTEGRATION_VLLM.md").read_text(encoding="utf-8")
    index, names = tmp_path / "model.safetensors.index.json", {"layers.1.engram.wkv.weight": "a.safetensors"}
    tables = dict.fromkeys(["layers.1.engram.embed.weight", "layers.1.engram.embed.scale"], "tables.safetensors")
    index.write_text(json.dumps({"weight_map": {**names, **tables}}))
    (tmp_path / "a.safetensors").touch()
    there = [str(tmp_path / "a.safetensors")]
    with pytest.raises(RuntimeError, match="tables"):
        filter_duplicate_safetensors_files(there, str(tmp_path), index.name)
    script = page.partition("```python\n")[2].partition("```")[0]
    exec(script.replace("/models/DeepSeek-V4.1/model.safetensors.index.json", str(index)))
    for files in (there, [*there, str(tmp_path / "tables.safetensors")]):
        assert filter_duplicate_safetensors_files(files, str(tmp_path), index.name) == there


def test_another_sglang_is_refused_by_its_version_and_by_its_functions(engine, monkeypatch):
    plugin.check_version(metadata.version("sglang"))
    with pytest.raises(
        RuntimeError, match=r"of SGLang 0\.5\.23, and this is SGLang 0\.5\.24: install sglang==0\.5\.23 or"
    ):
        plugin.check_version("0.5.24")
    monkeypatch.setattr(engine.module, "EngramEmbedding", engine.Stock)
    plugin.check_parameters()
    monkeypatch.setattr(engine.module.Engram, "embed_rows", lambda self, ids: None)
    monkeypatch.delattr(engine.staging.EngramRowStager, "stage")
    with pytest.raises(
        RuntimeError, match=r"embed_rows\(self, hash_ids, forward_batch, cp_all_tokens\) is now: self ids;.*"
    ):
        plugin.check_parameters()


def test_a_refusal_ends_the_process_though_the_engine_only_logs_what_plugins_raise(engine, monkeypatch, caplog):
    monkeypatch.setattr(engine.plugins, "_plugins_loaded", False)
    monkeypatch.delitem(sys.modules, engine.ours.__name__)
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}TARGET", "a:1")
    monkeypatch.setenv(f"{ENVIRONMENT_PREFIX}TIMEOUT_S", "soon")
    with pytest.raises(SystemExit, match=r"engrampool: .*_TIMEOUT_S='soon'"):
        engine.plugins.load_plugins()


def test_hooks_that_did_not_take_are_an_error_of_the_start(engine, monkeypatch):
    registry = engine.plugins.HookRegistry
    monkeypatch.setattr(registry, "_hooks", defaultdict(list))
    monkeypatch.setattr(registry, "_patched", set())
    theirs = registry._apply_target
    failing = "sglang.srt.layers.engram.EngramHasher.forward"

    def apply(target, hooks):
        if target == failing:
            raise ImportError(target)
        if target.startswith("other"):
            theirs(target, hooks)

    monkeypatch.setattr(registry, "_apply_target", apply)
    monkeypatch.setattr(engine.ours, "_HOOKS", {failing: engine.ours._HOOKS[failing]})
    engine.ours.install()
    with pytest.raises(RuntimeError, match=rf"did not come to stand in SGLang's {failing}: its log says why"):
        registry.apply_hooks()
    registry.apply_hooks()  # the engine's own again


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda group: group.backends.update(decode="full"), "decode breakable"),
        (lambda group: group.backends.update(prefill="full"), "prefill breakable"),
        (lambda group: vars(group.settings).update(speculative_algorithm="DSPARK"), "decode disabled, as there is a"),
        (lambda group: vars(group.settings).update(enable_pdmux=True), "without --enable-pdmux"),
        (lambda group: vars(group.settings.overlap).update(enable_two_batch_overlap=True), "two-batch"),
        (
            lambda group: vars(group.settings.capture).update(enable_torch_compile=True),
            "--enable-torch-compile",
        ),
        (lambda group: vars(group.parallel).update(attn_cp_size=2), "without context parallelism"),
        (
            lambda group: vars(group.parallel).update(attn_tp_size=25),
            "25 tensor-parallel ranks cannot share 24",
        ),
        (lambda group: group.patch.setenv("SGLANG_ENABLE_DSV41_ENGRAM_HOST_TABLE", "1"), "ENGRAM_HOST_TABLE"),
        (lambda group: group.patch.setenv("SGLANG_OPT_DSV41_ENGRAM_PEER_SHARDS", "1"), "ENGRAM_PEER_SHARDS"),
    ],
)
def test_a_way_to_start_that_cannot_be_served_is_refused(ranks, change, said):
    group = ranks(1)
    change(group)
    with pytest.raises(RuntimeError, match=said):
        group.make()


def test_drafts_are_served_without_graphs_of_decoding(ranks):
    group = ranks(1)
    group.settings.speculative_algorithm, group.backends["decode"] = "DSPARK", "disabled"
    group.make()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"engram_layer_ids": [1, 15]}, r"layers: \[1, 15\] here, \[1, 14\] there"),
        ({"engram_pad_token_id": 3}, "layer_1: fill"),
    ],
)
def test_a_server_of_another_model_is_refused_before_the_first_lookup(ranks, config, change, said):
    group = ranks(1)
    for name, value in change.items():
        setattr(group._config, name, value)
    if "engram_pad_token_id" in change:
        make = group._make_hasher
        group._make_hasher = lambda layout: with_pad(make(layout))
    with pytest.raises(FingerprintError, match=said):
        group.make()


def with_pad(hasher):
    hasher.pad_id = int(hasher.token_map[3])
    return hasher


def test_tables_that_the_engine_made_itself_are_refused(ranks, engine, monkeypatch):
    monkeypatch.setattr(engine.module, "EngramEmbedding", engine.Stock)
    with pytest.raises(RuntimeError, match="tables are not in the pool"):
        ranks(1).make()


def test_a_server_that_is_away_is_an_error_of_the_start(ranks):
    with pytest.raises(PoolError):
        ranks(1, target="127.0.0.1:1", connect_timeout_s=0.2).make()


def test_the_scheduler_closes_the_client_at_its_end(ranks, engine):
    with ranks(1).make().at(0) as made:
        client = made.worker.client
        assert isinstance(client, Client)
        nothing = SimpleNamespace(release_host_resources=lambda: None)
        engine.Scheduler.release_host_resources(
            SimpleNamespace(hisparse_coordinator=None, tree_cache=nothing, decode_offload_manager=None)
        )
        assert client.status()["why_unusable"] == "the client is closed"
        assert engine.ours._worker.client is None


class Decoder:
    """A small model of V4.1's order: sixteen layers over four streams, the engine's own Engram at 1 and 14.

    The others are no engine's: what they know of the tokens before is a state a request, so that chunks of any length
    give what the whole would.
    """

    def __init__(self, engrams, requests):
        random = torch.Generator().manual_seed(0)
        self.engrams = {number: (at, layer) for at, (number, layer) in enumerate(zip((1, 14), engrams, strict=True))}
        self.words, self.head = (torch.randn(129_280, 16, generator=random).bfloat16() for _ in range(2))
        self.mix = torch.randn(16, 2, 16, 16, generator=random).bfloat16() / 4
        self.states = torch.zeros(16, requests, 16).bfloat16()

    def __call__(self, tokens, lengths, ids, forward):
        """The logits of each request's last token, [requests, 1000]."""
        x = self.words[tokens][:, None].repeat(1, 4, 1)
        for number in range(16):
            if number in self.engrams:
                at, layer = self.engrams[number]
                x = layer(x, ids[:, at], forward, input_ids=tokens)
            x = x + self._mixed(number, x.mean(1), lengths)[:, None]
        ends = torch.as_tensor(lengths).cumsum(0) - 1
        return x.mean(1)[ends] @ self.head[:1000].T

    def _mixed(self, number, x, lengths):
        came, seen = x @ self.mix[number, 0], []
        for request, chunk in enumerate(came.split(list(lengths))):
            for one in chunk:
                self.states[number, request] = (self.states[number, request] * 0.75 + one).tanh()
                seen.append(self.states[number, request].clone())
        return torch.stack(seen) @ self.mix[number, 1]


@pytest.mark.parametrize("seed", range(3))
def test_a_model_of_sixteen_layers_has_the_same_logits(ranks, spec, sequences, same_bits, seed):
    group = ranks(1).make()
    whole = sequences(seed, spec.vocab_size, longest=20)
    longer = [at for at, past in enumerate(whole.histories) if len(past) > 1]
    whole = type(whole)([0] * len(longer), *([some[at] for at in longer] for some in (whole.histories, whole.dead)))
    count = len(longer)
    stocked, pooled = (Decoder(layers, count) for layers in (*group.stock(spec), group.made[0].layers))
    with group.at(0) as made:

        def both(what, tokens, lengths, ids, forward):
            tokens = torch.where(tokens >= MM_PAD, IMAGE, tokens)
            ours, theirs = pooled(tokens, lengths, ids, forward), stocked(tokens, lengths, ids, unstaged(forward))
            same_bits("sglang", f"Engram at layers 1 and 14 of sixteen, logits, {what}", theirs, ours)
            assert theirs.float().std() > 1
            return theirs.argmax(-1)

        # A prompt in two chunks, the first of them of one token for some.
        cuts = [max(1, len(past) // 2) for past in whole.histories]
        first = type(whole)(
            [0] * count,
            [past[:cut] for past, cut in zip(whole.histories, cuts, strict=True)],
            [dead[:cut] for dead, cut in zip(whole.dead, cuts, strict=True)],
        )
        rest = type(whole)(cuts, whole.histories, whole.dead)
        for chunk in (first, rest):
            batch = scheduled(chunk)
            made.manager.prepare_for_forward(batch, chunked_req=None)
            forward, tokens = forward_of(batch, chunk)
            sampled = both("prompt", tokens, np.diff(chunk.bounds).tolist(), made.hasher(tokens, forward), forward)
        positions = np.array([len(past) for past in whole.histories])
        for _ in range(8):
            forward, tokens = step("DECODE", sampled, positions, np.arange(count), locations=[1] * count)
            sampled = both("decode", tokens, [1] * count, made.hasher(tokens, forward), forward)
            positions += 1
