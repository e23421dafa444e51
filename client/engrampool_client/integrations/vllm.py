"""vLLM's plugin: with ENGRAMPOOL_CLIENT_TARGET set, DeepSeek-V4.1 and Qwen4 take their rows from the pool.

docs/INTEGRATION_VLLM.md says how to use it. Here is what vLLM loads and whether it may be used with this vLLM;
`vllm_engram.py` and `vllm_qwen4.py` have what then stands in the engine.
"""

import os
from importlib import import_module, metadata

from engrampool_client.config import ENVIRONMENT_PREFIX, from_environment
from engrampool_client.integrations import engine
from engrampool_client.integrations.forwards.settings import EngineSettings

# What was written for, and run with.
VERSION = "0.33.0"
_ENGRAM = "vllm.models.deepseek_v41.common.engram"
_TABLES = "vllm.models.qwen4_exp.common.ngram_embedding"
_NGRAMS = "vllm.models.qwen4_exp.nvidia.ngram_embedding:Qwen4ExpNGramEmbedding"
# Functions that are replaced, called or relied on, and their parameters.
PARAMETERS = {
    f"{_ENGRAM}:ParallelEngramEmbedding.__init__": (
        "self num_embeddings dim head_sizes block_size cpu_offload dp_shared_memory use_thp"
    ),
    f"{_ENGRAM}:ParallelEngramEmbedding._allocate_weights": "self",
    f"{_ENGRAM}:ParallelEngramEmbedding._storage": "self",
    f"{_ENGRAM}:ParallelEngramEmbedding.lookup": "self indices out background",
    f"{_ENGRAM}:Engram._create_embedding": "self layout layer_hash_index",
    f"{_ENGRAM}:Engram._init_staging": "self max_tokens head_dim",
    f"{_ENGRAM}:Engram.prepare_embeddings": "self hash_ids",
    f"{_ENGRAM}:Engram._ready_rows": "self num_tokens",
    f"{_ENGRAM}:Engram.embed": "self hash_ids",
    f"{_ENGRAM}:EngramLayout.__init__": "self config",
    f"{_ENGRAM}:NgramHashState.__init__": "self vllm_config layout swa_cache_module",
    f"{_TABLES}:Qwen4ExpPLEEmbedding.__init__": (
        "self num_embeddings embedding_dim params_dtype padding_size prefix embedding_method num_ngram_heads "
        "max_total_tokens data_parallel_rank reduce_results"
    ),
    f"{_TABLES}:Qwen4ExpPLEPinnedHostEmbedding.allocate_embedding_weight": "self num_embeddings embedding_dim dtype",
    f"{_TABLES}:Qwen4ExpPLEPinnedHostEmbedding.start_prefetch": "self ngram_ids",
    f"{_TABLES}:Qwen4ExpPLEPinnedHostEmbedding.finalize_prefetch": "self total_tokens",
    f"{_TABLES}:Qwen4ExpPLEPinnedHostEmbedding._lookup": "self input_ids output",
    f"{_TABLES}:Qwen4ExpPLEPinnedHostEmbedding._reduce_etp_embeddings": "self embeddings",
    f"{_TABLES}:Qwen4ExpPLEEmbeddingMethod.lookup_dtype": "self layer",
    f"{_TABLES}:PLEVocabParallelEmbedding.weight_loader": "self param loaded_weight checkpoint_start",
    f"{_NGRAMS}.__init__": (
        "self config embedding_dim ple_dense_layer_id max_total_tokens data_parallel_rank prefix quant_config "
        "params_dtype use_sequence_parallel"
    ),
    f"{_NGRAMS}.start_prefetch": "self input_ids query_start_loc ngram_context",
    f"{_NGRAMS}.forward": "self hidden_states input_ids query_start_loc ngram_context",
    f"{_NGRAMS}.load_weights": "self weights",
    "vllm.compilation.breakable_cudagraph:eager_break_during_capture": "fn",
    "vllm.v1.worker.gpu.model_states:resolve_model_state_cls": "vllm_config model",
    "vllm.v1.worker.gpu.model_states.interface:ModelState.__init__": "self vllm_config model encoder_cache device",
    "vllm.v1.worker.gpu.model_states.interface:ModelState.add_request": "self req_index new_req_data",
    "vllm.v1.worker.gpu.model_states.interface:ModelState.remove_request": "self req_id",
    "vllm.v1.worker.gpu.model_states.interface:ModelState.prepare_inputs": "self input_batch req_states",
    "vllm.v1.worker.gpu.model_states.interface:ModelState.prepare_dummy_inputs": "self num_reqs num_tokens",
    "vllm.v1.worker.gpu.async_utils:AsyncOutput.__init__": (
        "self model_runner_output sampler_output num_sampled_tokens main_stream copy_stream check_ep_fault "
        "pending_aux_output"
    ),
    "vllm.v1.worker.gpu_worker:Worker.determine_available_memory": "self",
    "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model": "self",
    "vllm.v1.worker.gpu_worker:Worker.execute_dummy_batch": "self",
    "vllm.v1.worker.gpu_worker:Worker.shutdown": "self",
}


def register() -> None:
    """What vLLM calls in each of its processes, perhaps more than once. Nothing without ENGRAMPOOL_CLIENT_TARGET.

    Raises RuntimeError for a vLLM that this was not written for, ValueError that names a variable that is wrong.
    """
    if not os.environ.get(f"{ENVIRONMENT_PREFIX}TARGET"):
        return
    from_environment(os.environ)
    EngineSettings.of(os.environ)
    check_version(metadata.version("vllm"))
    for model in ("engram", "qwen4"):
        import_module(f"engrampool_client.integrations.vllm_{model}").install()


def check_version(found: str) -> None:
    """Raise RuntimeError for another vLLM than the one that this was written for, in whatever build (+cu130)."""
    engine.check_version("vLLM", VERSION, found)


def check_parameters(names: dict[str, str] | None = None) -> None:
    """Raise RuntimeError if functions of vLLM are not those that this was written for."""
    engine.check_parameters("vLLM", VERSION, PARAMETERS if names is None else names)
