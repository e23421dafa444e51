"""SGLang's plugin: with ENGRAMPOOL_CLIENT_TARGET set, DeepSeek-V4.1 and Qwen4 take their rows from the pool.

docs/INTEGRATION_SGLANG.md says how to use it. Here is what SGLang loads and whether it may be used with this SGLang;
`sglang_engram.py` and `sglang_qwen4.py` have what then stands in the engine.
"""

import os
import sys
from importlib import import_module, metadata

from engrampool_client.config import ENVIRONMENT_PREFIX, from_environment
from engrampool_client.integrations import engine
from engrampool_client.integrations.forwards.settings import ENGINE_PREFIX, EngineSettings

# What was written for, and run with.
VERSION = "0.5.23"
_OURS = "engrampool_client.integrations.sglang_engram"
_QWEN4 = "sglang.srt.models.qwen4_exp"
_ENGRAM = "sglang.srt.layers.engram"
_STAGER = "sglang.srt.layers.engram_staging:EngramRowStager"
_GRAPHS = "sglang.srt.model_executor.model_runner_components.cuda_graph_setup"
_BREAKABLE = "sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph"
# Functions that are replaced, called or relied on, and their parameters.
PARAMETERS = {
    f"{_ENGRAM}:EngramEmbedding.__init__": "self num_embeddings dim layer_id column_bounds",
    f"{_ENGRAM}:EngramEmbedding.forward": "self indices forward_batch cp_all_tokens",
    f"{_ENGRAM}:EngramEmbedding.dequant_staged": "self rows scales copied hash_shape",
    f"{_ENGRAM}:EngramEmbedding.new_rows": "self indices",
    f"{_ENGRAM}:EngramEmbedding._load_rows": "self param loaded_weight",
    f"{_ENGRAM}:EngramEmbedding.finish_load": "self label",
    f"{_ENGRAM}:Engram.__init__": "self config layer_id layout quant_config prefix image_token_id",
    f"{_ENGRAM}:Engram.forward": "self x hash_ids forward_batch input_ids cp_all_tokens",
    f"{_ENGRAM}:Engram.embed_rows": "self hash_ids forward_batch cp_all_tokens",
    f"{_ENGRAM}:EngramHasher.__init__": "self layout tokenizer pad_id compressed_vocab_size",
    f"{_ENGRAM}:EngramHasher.forward": "self input_ids forward_batch",
    f"{_ENGRAM}:EngramHasher.hash_windows": "self tokens blocked",
    f"{_ENGRAM}:compute_engram_hash_ids": "tokens blocked pad_id token_map multipliers primes offsets",
    f"{_ENGRAM}:shard_range": "num_embeddings column_bounds tp_rank tp_size",
    f"{_ENGRAM}:engram_gather": "weight_ptr scale_ptr ids out dim block_size row_lo row_hi sort_ids",
    f"{_STAGER}.from_model": "model hasher device",
    f"{_STAGER}.stage": "self batch",
    f"{_STAGER}._windows": "self batch",
    f"{_QWEN4}:Qwen4ExpPinnedHostEmbedding.__init__": "self embedding backend table_dir",
    f"{_QWEN4}:Qwen4ExpPinnedHostEmbedding.allocate_output": "self shape device",
    f"{_QWEN4}:Qwen4ExpPinnedHostEmbedding.gather": "self input_ids out",
    f"{_QWEN4}:Qwen4ExpPinnedHostEmbedding.reduce": "self output",
    f"{_QWEN4}:Qwen4ExpPinnedHostEmbedding.forward": "self input_ids",
    f"{_QWEN4}:Qwen4ExpNGramEmbedding.__init__": "self config embedding_dim ple_layer_index quant_config prefix",
    f"{_QWEN4}:Qwen4ExpNGramEmbedding.compute_ngram_ids": "self batch",
    f"{_QWEN4}:Qwen4ExpNGramEmbedding.forward": "self batch forward_batch",
    f"{_QWEN4}:Qwen4ExpPLELayer.start_prefetch": "self batch forward_batch",
    f"{_QWEN4}:Qwen4ExpPLELayer.forward": "self hidden_states forward_batch batch",
    f"{_QWEN4}:Qwen4ExpModel.__init__": "self config quant_config prefix is_nextn",
    f"{_QWEN4}:Qwen4ExpForConditionalGeneration.load_weights": "self weights",
    f"{_QWEN4}:_prepare_ple_batch": "input_ids forward_batch ngram_size ngram_eos_token_id",
    f"{_GRAPHS}:capture_cuda_graphs": "model_runner capture_decode_cuda_graph finalize defer_distributed_setup",
    f"{_GRAPHS}:capture_prefill_graph": "model_runner eager_runner force_for_draft_worker",
    f"{_GRAPHS}:capture_decode_graph": "model_runner",
    f"{_BREAKABLE}.breakable_cuda_graph:eager_on_graph": "fn capture_stub enable",
    f"{_BREAKABLE}.context:is_in_breakable_cuda_graph": "",
    "sglang.srt.model_executor.cuda_graph_config:check_cuda_graph_backend": "phase backend",
    "sglang.srt.model_executor.runner.base_runner:BaseRunner._dummy_run": (
        "self batch_size run_ctx forward_mode_override buffers extend_num_tokens_per_req"
    ),
    "sglang.srt.managers.scheduler:Scheduler.run_batch": "self batch pp_proxy_tensors",
    "sglang.srt.managers.scheduler:Scheduler.release_host_resources": "self",
    "sglang.srt.model_executor.encoder_swa_replay:replay_len": "prefix_len",
    "sglang.srt.plugins.hook_registry:HookRegistry.register": "target hook hook_type source",
    "sglang.srt.plugins.hook_registry:HookRegistry.apply_hooks": "",
}


def register() -> None:
    """What SGLang calls in each of its processes. Nothing without ENGRAMPOOL_CLIENT_TARGET, nor the second time.

    Ends the process, with a text that says why, for a SGLang that this was not written for, or a variable that is
    wrong. SGLang would only log an exception, and go on with tables of its own.
    """
    if not os.environ.get(f"{ENVIRONMENT_PREFIX}TARGET") or _OURS in sys.modules:
        return
    try:
        from_environment(os.environ)
        check_settings(EngineSettings.of(os.environ))
        check_version(metadata.version("sglang"))
        check_parameters()
        import_module(_OURS).install(import_module(f"{__package__}.sglang_qwen4").HOOKS)
    except Exception as error:
        raise SystemExit(f"engrampool: {error}") from error


def check_settings(settings: EngineSettings) -> None:
    """Raise ValueError, which names the variable, for a setting that nothing here goes by."""
    if not settings.early_decode:
        raise ValueError(f"{ENGINE_PREFIX}EARLY_DECODE is for vLLM, and does nothing with SGLang: unset it")


def check_version(found: str) -> None:
    """Raise RuntimeError for another SGLang than the one that this was written for, in whatever build."""
    engine.check_version("SGLang", VERSION, found)


def check_parameters() -> None:
    """Raise RuntimeError if functions of SGLang are not those that this was written for."""
    engine.check_parameters("SGLang", VERSION, PARAMETERS)
