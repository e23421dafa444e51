"""vLLM's model state with rows: its own runner's code makes each forward's batch, whose rows layers then read.

Forwards are made up (`engine_schedule`): chunks, prefix hits, preempted and resumed requests, rejected drafts. What
runs is what the engine runs before and after a forward, in its order, and of the forward the Engram layers' reading.
"""

import json
import threading
from contextlib import contextmanager, nullcontext
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

from vllm_ranks import MAX_REQUESTS, MAX_TOKENS, bits, stock_layers  # noqa: E402  (needs torch)

LIMIT_S = 60
CPU = torch.device("cpu")


class Event:
    """As CUDA's, of a GPU that comes to it when `reached` is set: at once, unless a test says otherwise."""

    at_once = True

    def __init__(self, **_):
        self.reached = threading.Event()
        if self.at_once:
            self.reached.set()

    def record(self, *_):
        pass

    def synchronize(self):
        assert self.reached.wait(LIMIT_S)


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


class Engine:
    """vLLM's V2 runner, as far as requests and batches go, with our model state and the layers of one rank."""

    def __init__(self, made, ranks, runner_module, drafts=0):
        from vllm.models.deepseek_v41.nvidia.model_state import DeepseekV41ModelState
        from vllm.v1.worker.gpu.input_batch import InputBuffers
        from vllm.v1.worker.gpu.model_states import init_model_state
        from vllm.v1.worker.gpu.states import RequestState

        self.made, self.module, self.drafts = made, runner_module, drafts
        self.config = ranks.vllm_config
        self.config.num_speculative_tokens = drafts
        self.config.cache_config = SimpleNamespace()
        self.config.lora_config = None
        self.config.model_config = SimpleNamespace(
            max_model_len=400,
            uses_mrope=False,
            enable_prompt_embeds=False,
            get_inputs_embeds_size=lambda: 8,
            dtype=torch.bfloat16,
            rswa_window=None,
        )
        model = SimpleNamespace(token_lookback_depth=3, get_model_state_cls=lambda: DeepseekV41ModelState)
        self.runner = runner = object.__new__(runner_module.GPUModelRunner)
        runner.device, runner.max_num_reqs, runner.max_num_tokens = CPU, MAX_REQUESTS, MAX_TOKENS
        runner.input_buffers = InputBuffers(MAX_REQUESTS, MAX_TOKENS, CPU)
        runner.req_states = RequestState(MAX_REQUESTS, 400, MAX_TOKENS, drafts, 129280, CPU)
        runner.model_config, runner.decode_query_len = self.config.model_config, drafts + 1
        runner.model_state = init_model_state(self.config, model, None, CPU)
        for name in ("pooling_runner", "pp_handler", "encoder_cache", "prompt_logprobs_worker", "adaptive_verification",
                     "sampler", "fast_prefill", "pcp_manager", "kv_block_zeroer"):  # fmt: skip
            setattr(runner, name, None)
        runner.is_last_pp_rank, runner.use_pp = False, False
        runner.lora_state = SimpleNamespace(remove_request=lambda *_: None, add_request=lambda *_: None)
        runner.block_tables = SimpleNamespace(append_block_ids=lambda *_, **__: None)
        self.events, self.expected, self.ids = [], {}, {}

    @property
    def state(self):
        return self.runner.model_state

    def begin(self, moment):
        """From what the scheduler says to the moment at which the graph would run; gives the batch."""
        from vllm.v1.core.sched.output import NewRequestData

        runner, half = self.runner, len(moment.removed) // 2
        gone, added = [f"r{number}" for number in moment.removed], {number for number, _, _ in moment.added}
        for number in (*moment.removed, *added):
            self.expected.pop(number, None)
        new = [
            NewRequestData(
                f"r{number}", tokens, [], None, None, ([],), computed, None, prefill_token_ids=tokens,
            )
            for number, tokens, computed in moment.added
        ]  # fmt: skip
        going = [(number, start) for number, start, _, _ in moment.chunks if number not in added]
        drafts = {f"r{number}": [-1] * tried for number, _, _, tried in moment.chunks if tried}
        scheduled = SimpleNamespace(
            finished_req_ids=set(gone[:half]),
            preempted_req_ids=set(gone[half:]),
            scheduled_new_reqs=new,
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[f"r{number}" for number, _ in going],
                # Before it knows what was rejected, the scheduler takes all drafts for accepted.
                num_computed_tokens=[self.expected.get(number, start) for number, start in going],
                new_block_ids=[None] * len(going),
            ),
            num_scheduled_tokens={f"r{number}": len(tokens) for number, _, tokens, _ in moment.chunks},
            total_num_scheduled_tokens=sum(len(tokens) for _, _, tokens, _ in moment.chunks),
            scheduled_spec_decode_tokens=drafts,
            new_block_ids_to_zero=None,
            kv_cache_block_copies=None,
            has_structured_output_requests=False,
        )
        runner.finish_requests(scheduled)
        runner.add_requests(scheduled)
        runner.update_requests(scheduled)
        for number, _, tokens, tried in moment.chunks:
            if tried:
                index = runner.req_states.req_id_to_index[f"r{number}"]
                runner.req_states.draft_tokens[index, :tried] = torch.tensor(tokens[-tried:])
        batch_state, _ = runner.gather_batch_req_state(scheduled, False)
        padded = min(MAX_TOKENS, batch_state.num_tokens + 3)
        self.batch = runner.prepare_inputs(scheduled, batch_state, SimpleNamespace(num_tokens=padded, num_reqs=None), 0)
        self.inputs = runner.model_state.prepare_inputs(self.batch, runner.req_states)
        return self.batch

    def read(self):
        """What the layers read in the forward's graph."""
        return [layer._ready_rows(self.batch.num_tokens_after_padding) for layer in self.made.layers]

    def hashed(self):
        """The engine's own row ids of the batch: int32 [T, layers, columns]."""
        batch, lookback = self.batch, self.inputs["lookback_token_ids"]
        ids = batch.input_ids[: batch.num_tokens]
        return self.made.state(
            ids, batch.positions[: batch.num_tokens], batch.query_start_loc[: batch.num_reqs + 1], ids == 129264,
            lookback, lookback == 129264, None, None,
        )  # fmt: skip

    def end(self, moment):
        """From the forward's end on: what was sampled is copied to the host, and the requests' state is brought up."""
        from vllm.v1.worker.gpu.async_utils import AsyncOutput

        by_id = {f"r{chunk[0]}": (chunk, ids) for chunk, ids in zip(moment.chunks, moment.sampled, strict=True)}
        sampled = torch.zeros((self.batch.num_reqs, self.drafts + 1), dtype=torch.int64)
        counts, rejected = [], []
        for at, name in enumerate(self.batch.req_ids):
            (number, start, tokens, tried), ids = by_id[name]
            sampled[at, : len(ids)] = torch.tensor(ids)
            counts.append(len(ids))
            rejected.append(tried - len(ids) + 1 if tried else 0)
            self.expected[number] = start + len(tokens)
        num_sampled, num_rejected = torch.tensor(counts, dtype=torch.int32), torch.tensor(rejected, dtype=torch.int32)
        self.output = AsyncOutput(
            SimpleNamespace(prompt_logprobs_dict={}, prompt_token_id_logprobs_dict={}),
            SimpleNamespace(
                sampled_token_ids=sampled, logprobs_tensors=None, num_nans=None, sampling_mask_tensors=None
            ),
            num_sampled,
            None,
            SimpleNamespace(wait_stream=lambda _: None),
            False,
            None,
        )
        self.runner.postprocess_sampled(
            self.batch.idx_mapping, sampled, num_sampled, num_rejected, self.batch.query_start_loc
        )
        return self.output


@contextmanager
def engine_of(ranks, runner_module, drafts=0, size=1, rank=0, **settings):
    group = ranks(size, **settings)
    group.compilation.cudagraph_mode = group.engine.ours.CUDAGraphMode.FULL_AND_PIECEWISE
    group.vllm_config.use_v2_model_runner = True
    group.make()
    with group.at(rank) as made:
        yield Engine(made, group, runner_module, drafts)


def exact(spec, at, ids, columns=slice(None)):
    """The numbers of rows, [T, columns, 256]."""
    table, ids = spec.tables[at], ids[:, columns]
    rows = torch.from_numpy(synthetic_rows(table, ids.reshape(-1).astype(np.uint64)))
    values = rows[:, :256].view(torch.float8_e4m3fn).double().unflatten(-1, (8, 32))
    numbers = (values * torch.exp2(rows[:, 256:].double() - 127).unsqueeze(-1)).bfloat16()
    return numbers.reshape(*ids.shape, 256)


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


def prompts(*lengths, seed=0):
    """A step in which requests of these prompts are added, and run whole."""
    random, moment = np.random.default_rng(seed), Moment()
    for number, length in enumerate(lengths):
        tokens = random.integers(0, 1000, length).tolist()
        moment.added.append((number, tokens, 0))
        moment.chunks.append((number, 0, tokens, 0))
        moment.sampled.append([int(random.integers(0, 1000))])
    return moment


def after(moment):
    """The step after it: a token of each request."""
    chunks = [
        (number, start + len(tokens), ids, 0)
        for (number, start, tokens, _), ids in zip(moment.chunks, moment.sampled, strict=True)
    ]
    return Moment(chunks=chunks, sampled=[[7]] * len(chunks))


def assert_right(engine, spec):
    ids = engine.hashed().numpy()
    for at, read in enumerate(engine.read()):
        np.testing.assert_array_equal(bits(exact(spec, at, ids[:, at])), bits(read[: len(ids)]))


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
