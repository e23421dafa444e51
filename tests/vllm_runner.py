"""vLLM's V2 runner with our model state: as far as requests and batches go, and of a forward the Engram layers."""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch

from engine_schedule import Moment
from engrampool_proto.synthetic import synthetic_rows
from vllm_ranks import MAX_REQUESTS, MAX_TOKENS, bits

LIMIT_S = 60


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


class Engine:
    """vLLM's V2 runner, as far as requests and batches go, with our model state and the layers of one rank."""

    def __init__(self, made, ranks, runner_module, drafts=0):
        from vllm.models.deepseek_v41.nvidia.model_state import DeepseekV41ModelState
        from vllm.v1.worker.gpu.input_batch import InputBuffers
        from vllm.v1.worker.gpu.model_states import init_model_state
        from vllm.v1.worker.gpu.states import RequestState

        self.made, self.module, self.drafts, self.device = made, runner_module, drafts, ranks.device
        self._copies = (
            torch.cuda.Stream() if self.device.type == "cuda" else SimpleNamespace(wait_stream=lambda _: None)
        )
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
        runner.device, runner.max_num_reqs, runner.max_num_tokens = self.device, MAX_REQUESTS, MAX_TOKENS
        runner.input_buffers = InputBuffers(MAX_REQUESTS, MAX_TOKENS, self.device)
        runner.req_states = RequestState(MAX_REQUESTS, 400, MAX_TOKENS, drafts, 129280, self.device)
        runner.model_config, runner.decode_query_len = self.config.model_config, drafts + 1
        runner.model_state = init_model_state(self.config, model, None, self.device)
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

    def _on_device(self, values, dtype):
        """As what the device has computed: nobody waits for it."""
        made = torch.as_tensor(values, dtype=dtype)
        return made if self.device.type == "cpu" else made.pin_memory().to(self.device, non_blocking=True)

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
                runner.req_states.draft_tokens[index, :tried] = self._on_device(tokens[-tried:], torch.int64)
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
        sampled = np.zeros((self.batch.num_reqs, self.drafts + 1), np.int64)
        counts, rejected = [], []
        for at, name in enumerate(self.batch.req_ids):
            (number, start, tokens, tried), ids = by_id[name]
            sampled[at, : len(ids)] = ids
            counts.append(len(ids))
            rejected.append(tried - len(ids) + 1 if tried else 0)
            self.expected[number] = start + len(tokens)
        sampled = self._on_device(sampled, torch.int64)
        num_sampled, num_rejected = (self._on_device(one, torch.int32) for one in (counts, rejected))
        self.output = AsyncOutput(
            SimpleNamespace(prompt_logprobs_dict={}, prompt_token_id_logprobs_dict={}),
            SimpleNamespace(
                sampled_token_ids=sampled, logprobs_tensors=None, num_nans=None, sampling_mask_tensors=None
            ),
            num_sampled,
            torch.cuda.current_stream() if self.device.type == "cuda" else None,
            self._copies,
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
    ids = engine.hashed().cpu().numpy()
    for at, read in enumerate(engine.read()):
        np.testing.assert_array_equal(bits(exact(spec, at, ids[:, at])), bits(read[: len(ids)]))
