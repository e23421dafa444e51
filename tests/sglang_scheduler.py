"""SGLang's own scheduler, without a process, a model or a GPU: its queue, its batches, its cache of prefixes."""

from array import array
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch

# What a turn of the scheduler asks of its parts that are off here.
_OFF = (
    "dllm_config",
    "prefill_delayer",
    "min_free_slots_delayer",
    "lora_drainer",
    "hisparse_coordinator",
    "dynamic_chunk_sizer",
    "mm_receiver",
    "decode_offload_manager",
    "scripted_scheduler_hook",
    "forward_sleep_time",
    "priority_scheduling_preemption_threshold",
    "truncation_align_size",
    "max_queued_requests",
    "abort_on_priority_when_disabled",
    "_pending_chunked_abort_req",
    "chunked_req",
    "scheduler_stage_metrics",
    "external_corpus_manager",
    "draft_worker",
)
_FALSE = (
    "enable_hisparse",
    "enable_lora",
    "enable_hicache_storage",
    "enable_lmcache",
    "enable_hierarchical_cache",
    "enable_unified_cache_external_linker",
    "enable_priority_preemption",
    "enable_priority_scheduling",
    "is_hybrid_swa",
    "is_mixed_chunk",
    "require_mlp_sync",
    "enable_overlap",
    "enable_pdmux",
    "enable_skip_finishing_decode",
    "attn_dp_enabled",
    "enable_continuous_input_polling",
    "schedule_low_priority_values_first",
    "disable_radix_cache",
)


class Loop:
    """`Scheduler.event_loop_normal` over made-up requests: chunks, prefix hits, requests that are retracted or aborted.

    manager: what prepares batches. forward: is given each batch, and gives a token for each of its requests.
    """

    def __init__(self, manager, forward, *, kv_tokens, chunk, slots, longest, policy="fcfs", radix=True, mixed=False):
        from sglang.srt.disaggregation.utils import DisaggregationMode
        from sglang.srt.managers.schedule_batch import ScheduleBatch
        from sglang.srt.managers.schedule_policy import SchedulePolicy
        from sglang.srt.managers.scheduler import Scheduler
        from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
        from sglang.srt.mem_cache.cache_init_params import CacheInitParams
        from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
        from sglang.srt.mem_cache.radix_cache import RadixCache
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        self._forward = forward
        one = self.scheduler = Scheduler.__new__(Scheduler)
        for name in _OFF:
            setattr(one, name, None)
        for name in _FALSE:
            setattr(one, name, False)
        one.disable_radix_cache, one.is_mixed_chunk, one.is_generation = not radix, mixed, True
        one.device, one.page_size, one.forward_ct = "cpu", 1, 0
        pool = one.req_to_token_pool = ReqToTokenPool(slots, longest, "cpu", False)
        memory = one.token_to_kv_pool_allocator = TokenToKVPoolAllocator(
            kv_tokens, torch.bfloat16, "cpu", MagicMock(), False
        )
        one.tree_cache = RadixCache(
            CacheInitParams(disable=not radix, req_to_token_pool=pool, token_to_kv_pool_allocator=memory, page_size=1)
        )
        one.policy = SchedulePolicy(policy, one.tree_cache, False, False, False)
        one.waiting_queue, one.running_batch = [], ScheduleBatch(reqs=[], batch_is_full=False)
        one.last_batch = one.cur_batch_for_debug = None
        one.chunked_prefill_size, one.max_prefill_tokens, one.max_running_requests = chunk, 2 * chunk, slots
        one.max_prefill_bs = slots
        one.processed_tokens_counter = one.prefill_decode_interval = one._prefill_decode_interval_remaining = 0
        one.new_token_ratio_tracker = SimpleNamespace(current=0.01, decay_step=lambda: None)
        one.spec_algorithm, one.disaggregation_mode = SpeculativeAlgorithm.NONE, DisaggregationMode.NULL
        one.model_config = SimpleNamespace(vocab_size=129280, is_encoder_decoder=False)
        runner = SimpleNamespace(attn_backend=SimpleNamespace(), prefill_aware_swa=False)
        one.tp_worker = SimpleNamespace(model_runner=runner)
        one.grammar_manager = MagicMock()
        one.grammar_manager.has_waiting_grammars.return_value = False
        one.beam_coordinator = SimpleNamespace(pending_member_rows=lambda _: 0, retire_group=lambda _: None)
        one.dp_attn_adapter = SimpleNamespace(
            maybe_prepare_mlp_sync_batch=lambda batch, **_: batch, maybe_convert_decode_to_extend=lambda batch: batch
        )
        one.load_inquirer, one.profiler_manager = MagicMock(), MagicMock()
        one.load_inquirer._get_num_pending_tokens.return_value = 0
        one.metrics_reporter = MagicMock(enable_metrics=False)
        one.ngram_embedding_manager = manager
        one.future_map = SimpleNamespace(
            output_tokens_buf=torch.zeros(slots + 1, dtype=torch.int64), spec_algo=SpeculativeAlgorithm.NONE
        )
        one.model_worker = SimpleNamespace(forward_batch_generation=self._run)
        one.gracefully_exit = one._engine_paused = one._sched_idled = False
        one.on_idle = one.update_cache_from_scheduler = one.send_abort_output = lambda *_: None
        one._prefetch_kvcache = one._copy_auxiliary_output_to_cpu = lambda *_: None
        one._set_or_validate_priority = lambda _: True
        one._release_aborted_request = lambda _: None
        one.process_batch_result = self._process
        self.finished = []

    def request(self, name, tokens, most):
        """A request of these tokens, which is to get so many more."""
        from sglang.srt.managers.schedule_batch import Req
        from sglang.srt.sampling.sampling_params import SamplingParams

        params = SamplingParams(max_new_tokens=most, ignore_eos=True)
        params.normalize(None)
        return Req(name, "", array("q", tokens), params, vocab_size=129280)

    def run(self, ingest):
        """Turns of the loop until `ingest`, which is called at the begin of each with the scheduler, gives False."""
        one = self.scheduler

        def ingest_requests():
            one.gracefully_exit = ingest(one) is False

        one.ingest_requests, one.gracefully_exit = ingest_requests, False
        one.event_loop_normal()

    def _run(self, batch, **_):
        sampled = torch.as_tensor(self._forward(batch))
        self.scheduler.future_map.output_tokens_buf[batch.req_pool_indices] = sampled
        batch.input_ids = None
        return SimpleNamespace(has_sampled_token_ids=False, next_token_ids=sampled)

    def _process(self, batch, result):
        """What the engine's own does of requests that sample; the rest of it is of logits and streams."""
        from sglang.srt.mem_cache.common import checkpoint_kv_cache, release_kv_cache

        decoded = batch.reqs if batch.forward_mode.is_decode() else batch.decoding_reqs or ()
        for request, token in zip(batch.reqs, result.next_token_ids.tolist(), strict=True):
            if (request.finished() and request.inflight_middle_chunks <= 0) or request.is_retracted:
                continue
            if request.inflight_middle_chunks > 0:
                request.inflight_middle_chunks -= 1
                continue
            request.output_ids.append(token)
            request.update_finish_state()
            if request.finished():
                self.finished.append(request)
                release_kv_cache(request, self.scheduler.tree_cache, checkpoint=True)
            elif request not in decoded:
                checkpoint_kv_cache(request, self.scheduler.tree_cache)
