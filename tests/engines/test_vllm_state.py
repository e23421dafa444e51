"""vLLM's model state with rows: its own runner's code makes each forward's batch, whose rows layers then read.

Forwards are made up (`engine_schedule`): chunks, prefix hits, preempted and resumed requests, rejected drafts. What
runs is what the engine runs before and after a forward, in its order, and of the forward the Engram layers' reading.
"""

import json
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from engine_schedule import Moment, schedule
from engrampool_client import DeadlineError, FingerprintError, PoolError
from engrampool_client.integrations.forwards.settings import ENGINE_PREFIX
from engrampool_proto.synthetic import synthetic_rows

torch = pytest.importorskip("torch", reason="PyTorch is not installed; `make test-engines` installs it")
pytest.importorskip("vllm", reason="the engines are not there; `make test-engines` unpacks them")
from safetensors.torch import save_file  # noqa: E402  (needs torch)

from vllm_ranks import bits, stock_layers  # noqa: E402  (needs torch)
from vllm_runner import LIMIT_S, Event, after, assert_right, engine_of, exact, prompts  # noqa: E402  (needs torch)


@pytest.fixture(scope="module")
def runner_module():
    import vllm.v1.worker.gpu.model_runner as model_runner

    return model_runner


@pytest.fixture
def interpreted(monkeypatch, runner_module):
    """What the engine's kernels and buffers need where there is no GPU."""
    import triton.runtime.interpreter as interpreter
    import vllm.platforms
    import vllm.v1.worker.gpu.async_utils as async_utils
    import vllm.v1.worker.gpu.buffer_utils as buffer_utils

    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)
    monkeypatch.setattr("vllm.utils.torch_utils.PIN_MEMORY", False)
    monkeypatch.setattr(vllm.platforms.current_platform, "device_type", "cpu", raising=False)
    # The interpreter makes integers of flags that it has and-ed, and takes none where a mask is wanted.
    load = interpreter.InterpreterBuilder.create_masked_load

    def masked_load(self, pointers, mask, *rest):
        return load(self, pointers, interpreter.TensorHandle(mask.data.astype(bool), mask.dtype), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", masked_load)
    monkeypatch.setattr(async_utils, "stream", lambda *_: nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", Event)


@pytest.mark.parametrize(("seed", "drafts", "size"), [(0, 0, 1), (1, 0, 2), (2, 2, 1), (3, 3, 4)])
def test_forwards_read_the_rows_of_what_the_engine_hashes(
    ranks, runner_module, interpreted, spec, same, seed, drafts, size
):
    with engine_of(ranks, runner_module, drafts, size, size - 1) as engine:
        columns = engine.made.layers[0].embed_tokens.columns
        for moment, _ in schedule(seed, spec.vocab_size, drafts=drafts, steps=25, longest=60, numbers=6):
            engine.begin(moment)
            ids = engine.hashed().numpy()
            for at, read in enumerate(engine.read()):
                own = read[:, : columns.stop - columns.start]
                same(
                    "vllm",
                    f"a forward's rows, TP {size}",
                    bits(exact(spec, at, ids[:, at], columns)),
                    bits(own[: len(ids)]),
                )
                assert not own[len(ids) :].view(torch.int16).any(), "tokens that pad the graph have zeros"
            engine.end(moment)
        counts = engine.made.worker.counts
    assert counts.early["served"] > counts.tokens / 4
    assert (counts.failed, counts.masked) == (0, {1: 0, 14: 0})


def test_forwards_read_what_they_read_of_the_stocked_table(ranks, runner_module, interpreted, spec, same):
    """Bit for bit, as the engine's own layers read it by its own kernel, which takes long here."""
    with engine_of(ranks, runner_module) as engine:
        group = engine.made.group
        stocked = stock_layers(group, engine.made.state.layout, spec)[0]
        for moment, _ in schedule(5, spec.vocab_size, steps=5, budget=12, longest=14, numbers=4):
            engine.begin(moment)
            ids = engine.hashed()
            for at, read in enumerate(engine.read()):
                stocked[at].prepare_embeddings(ids[:, at])
                same(
                    "vllm",
                    "a forward's rows, and the stocked table's",
                    bits(stocked[at]._ready_rows(len(ids))),
                    bits(read[: len(ids)]),
                )
            engine.end(moment)


def test_a_sampled_tokens_rows_are_asked_for_when_its_copy_has_come(
    ranks, runner_module, interpreted, spec, monkeypatch
):
    with engine_of(ranks, runner_module) as engine:
        client, moment = engine.made.worker.client, prompts(5, 6)
        engine.begin(moment)
        monkeypatch.setattr(Event, "at_once", False)
        output = engine.end(moment)
        begun = client.stats.begun
        following = after(moment)
        thread = threading.Thread(target=engine.begin, args=(following,))
        thread.start()  # the engine's thread is at the next forward before the device is at its tokens
        assert client.stats.begun == begun
        output.copy_event.reached.set()
        thread.join(LIMIT_S)
        assert client.stats.begun == begun + 1
        assert_right(engine, spec)
        monkeypatch.setattr(Event, "at_once", True)
        engine.end(following)
        engine.begin(after(following))  # waits for the thread that is told of what was sampled
    assert engine.made.worker.counts.early["served"] == 2 + 11


def test_what_a_graph_has_of_the_layers_reads_the_same_memory_in_every_forward(ranks, runner_module, interpreted, spec):
    """What ran of PyTorch in a pretended capture, and nothing else, has the layers read the next forward's rows."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with engine_of(ranks, runner_module) as engine:
        engine.state.prepare_dummy_inputs(2, 11)
        layers = engine.made.layers
        graph = make_fx(lambda: [layer._ready_rows(11) for layer in layers])()
        assert engine.made.worker.client.stats.begun == 0, "a capture asks nobody"
        for seed in range(3):
            moment = prompts(4, 7, seed=seed)
            engine.begin(moment)
            ids = engine.hashed().numpy()
            for at, read in enumerate(graph()):
                np.testing.assert_array_equal(bits(exact(spec, at, ids[:, at])), bits(read[:11]))
            engine.end(moment)


def test_dummy_forwards_and_those_for_warming_up_ask_nobody(ranks, runner_module, interpreted, spec):
    from vllm.v1.worker.gpu.input_batch import InputBatch

    with engine_of(ranks, runner_module) as engine:
        client, runner = engine.made.worker.client, engine.runner
        batch = InputBatch.make_dummy(2, 6, runner.input_buffers)
        runner.model_state.prepare_inputs(batch, runner.req_states)
        with engine.made.worker.supply.quiet():
            moment = prompts(5, 6)
            engine.begin(moment)
            engine.end(moment)
        assert client.stats.begun == 0
        assert not any(read.view(torch.int16).any() for read in engine.read())
        for index in (0, 1):
            runner._remove_request(f"r{index}")
        engine.begin(moment)
        assert_right(engine, spec)
    assert engine.made.worker.counts.dummies == 2


@pytest.mark.parametrize("policy", ["raise", "mask"])
def test_a_silent_server_is_a_forwards_outcome_by_its_deadline(ranks, runner_module, interpreted, server, spec, policy):
    settings = {"timeout_s": 0.3, "on_failure": policy, "breaker_failures": 0}
    with engine_of(ranks, runner_module, **settings) as engine:
        moment = prompts(5, 6)
        with server.frozen():
            if policy == "raise":
                with pytest.raises(DeadlineError):
                    engine.begin(moment)
            else:
                engine.begin(moment)
                assert not any(read.view(torch.int16).any() for read in engine.read())
        again = Moment(removed=[0, 1], added=moment.added, chunks=moment.chunks, sampled=moment.sampled)
        while True:  # until it is awake, which the test's own limit bounds
            try:
                engine.begin(again)
            except PoolError:
                continue
            if all(read[:11].view(torch.int16).any() for read in engine.read()):
                break
        assert_right(engine, spec)


def test_verifying_finds_a_row_id_that_the_engine_has_otherwise(ranks, runner_module, interpreted, spec, monkeypatch):
    monkeypatch.setenv(f"{ENGINE_PREFIX}VERIFY", "1")
    with engine_of(ranks, runner_module) as engine:
        for moment, _ in schedule(3, spec.vocab_size, steps=4, budget=12):
            engine.begin(moment)
            engine.end(moment)
        counts = engine.made.worker.counts
        assert (counts.verified, counts.differences) == (counts.tokens, 0)
        multipliers = engine.made.state.multipliers
        multipliers[1, 0] += 2
        try:
            for number in list(engine.runner.req_states.req_id_to_index):
                engine.runner._remove_request(number)
            with pytest.raises(FingerprintError, match=r"layer 14: 9 of 9 tokens, the first token 0 \(request \d, pos"):
                engine.begin(prompts(9))
        finally:
            multipliers[1, 0] -= 2  # it is other tests', too
        assert (counts.differences, counts.failed) == (9, 1)


def test_verifying_finds_rows_that_a_checkpoint_has_otherwise(
    ranks, runner_module, interpreted, spec, monkeypatch, tmp_path
):
    names = {}
    for table in spec.tables:
        rows = torch.from_numpy(synthetic_rows(table, np.arange(table.num_rows, dtype=np.uint64)))
        if table.layer == 14:
            rows[:, 5] ^= 1
        name = f"layers.{table.layer}.engram.embed."
        tensors = {
            f"{name}weight": rows[:, :256].contiguous().view(torch.float8_e4m3fn),
            f"{name}scale": rows[:, 256:].contiguous().view(torch.float8_e8m0fnu),
        }
        save_file(tensors, tmp_path / f"{table.layer}.safetensors")
        names |= dict.fromkeys(tensors, f"{table.layer}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    monkeypatch.setenv(f"{ENGINE_PREFIX}VERIFY", "1")
    monkeypatch.setenv(f"{ENGINE_PREFIX}VERIFY_CHECKPOINT", str(tmp_path))
    said = r"^(?!.*layer 1:).*layer 14: row \d+ of token \d \(request \d, posi"
    with engine_of(ranks, runner_module, size=2, rank=1) as engine, pytest.raises(FingerprintError, match=said):
        engine.begin(prompts(5))
    assert engine.made.worker.counts.differences == 4


def test_which_way_rows_come_follows_from_the_graphs(ranks, engine):
    modes, compiled = engine.ours.CUDAGraphMode, engine.ours.CompilationMode
    for graphs, v2, whole in (("FULL", True, True), ("FULL_DECODE_ONLY", True, True), ("PIECEWISE", True, False)):
        group = ranks(1)
        group.compilation.cudagraph_mode, group.vllm_config.use_v2_model_runner = modes[graphs], v2
        group.make()
        worker = group.made[0].worker
        assert (worker.whole, worker.staging is None) == (whole, whole)
    for change, said in (
        ({"use_v2_model_runner": False}, "with the V1 model runner: start vLLM without VLLM_USE_V2_MODEL_RUNNER=0, or"),
        ({"parallel_config": SimpleNamespace(prefill_context_parallel_size=2)}, "with prefill context parallelism"),
    ):
        group = ranks(1)
        group.compilation.cudagraph_mode, group.vllm_config.use_v2_model_runner = modes.FULL_AND_PIECEWISE, True
        vars(group.vllm_config).update(change)
        with pytest.raises(RuntimeError, match=said):
            group.make()
    group.compilation.mode = compiled.VLLM_COMPILE
    with pytest.raises(RuntimeError, match="without VLLM_USE_BREAKABLE_CUDAGRAPH=0"):
        group.make()


def test_spans_of_images_break_n_grams_as_the_engine_has_them(ranks, runner_module, interpreted, spec):
    image, text = [129264] * 3, list(range(300, 309))
    whole = [*text[:4], *image, *text[4:]]
    chunks = [Moment(added=[(0, whole, 0)], chunks=[(0, 0, whole[:6], 0)], sampled=[[]])]
    chunks += [Moment(chunks=[(0, 6, whole[6:], 0)], sampled=[[11]]), Moment(chunks=[(0, 12, [11], 0)], sampled=[[12]])]
    with engine_of(ranks, runner_module) as engine:
        for moment in chunks:
            engine.begin(moment)
            assert_right(engine, spec)
            engine.end(moment)
