"""vLLM's model state with rows of the pool, for graphs of whole forwards: rows are there before a forward begins.

`vllm_engram.py` puts it into the engine. Of the V2 model runner's hooks these are the last that run Python in every
forward: `prepare_inputs`, right before it; `add_request`, when its prompt comes; `AsyncOutput`, when ids are sampled.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.models.deepseek_v41.common.mm_preprocess import IMAGE_SENTINEL_BASE_ID

from engrampool_client.client import Client
from engrampool_client.integrations.forwards.agreement import Agree
from engrampool_client.integrations.forwards.checkpoint import CheckpointTable
from engrampool_client.integrations.forwards.counts import EngineCounts
from engrampool_client.integrations.forwards.history import Histories, Ids, Numbers
from engrampool_client.integrations.forwards.settings import EngineSettings
from engrampool_client.integrations.forwards.supply import Supply
from engrampool_client.integrations.forwards.torch_landing import TorchLanding
from engrampool_client.integrations.forwards.verify import Verifier


class Feeder:
    """Has the rows of each of a worker's forwards be in `supply.landed` before it begins.

    tables: the layers' tables. hashes: the engine's own hashing, to compare with.
    """

    def __init__(
        self,
        vllm_config: Any,
        client: Client,
        tables: list[Any],
        hashes: Any,
        device: torch.device,
        *,
        timeout_s: float,
        agree: Agree | None,
        counts: EngineCounts,
        settings: EngineSettings,
    ) -> None:
        scheduler = vllm_config.scheduler_config
        requests, tokens = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
        drafts = vllm_config.num_speculative_tokens
        # What is sampled last, and drafts beyond it, may be more than a request can have.
        longest = vllm_config.model_config.max_model_len + drafts + 1
        self._histories = Histories(
            requests, longest, hashes.lookback_depth, IMAGE_SENTINEL_BASE_ID, compiled=client.compiled
        )
        self._numbers: dict[str, int] = {}
        self._host, self._drafts = _Host(tokens, requests, device, drafts > 0), drafts > 0
        columns = tables[0].columns
        shape = {
            table.layer: (columns.stop - columns.start, table.dim + table.dim // table.block_size) for table in tables
        }
        layers = [table.layer for table in tables]
        self._verifier, self._hashes = None, hashes
        if settings.verify:
            directory = settings.verify_checkpoint
            table = None if directory is None else CheckpointTable(directory, tuple(layers))
            self._verifier = Verifier(client.spec, columns, self._histories, counts, table)
        self.supply = Supply(
            client,
            TorchLanding(layers, shape, tokens, device),
            self._histories,
            timeout_s=timeout_s,
            agree=agree,
            counts=counts,
            ahead_tokens=tokens if settings.ahead_tokens is None else settings.ahead_tokens,
            # A token that is sampled beside drafts is run together with the next ones, which are not known yet.
            early_decode=settings.early_decode and drafts == 0,
            verifier=self._verifier,
        )

    def add(self, number: int, request: Any) -> None:
        """A request has come, perhaps one that goes on after its place was taken from it."""
        self._numbers[request.req_id] = number
        self.supply.add(number, request.prefill_token_ids, request.num_computed_tokens)

    def remove(self, request: str) -> None:
        """A request has ended, or its place is taken from it."""
        number = self._numbers.pop(request, None)
        if number is not None:
            self.supply.remove(number)

    def sampled(self, output: Any) -> None:
        """Ids were sampled after the last forward; `output` has them copied to the host."""

        def arrived() -> tuple[Any, Any]:
            output.copy_event.synchronize()
            return output.sampled_token_ids, output.num_sampled_tokens_np

        self.supply.sampled(arrived)

    def forward(self, batch: Any, inputs: Mapping[str, Any]) -> None:
        """A forward is next. inputs: what the model is given of the batch.

        Returns once its rows are there. Raises what the forward failed with, on every rank.
        """
        if batch.req_ids[0] not in self._numbers or self.supply.is_quiet:
            self.supply.dummy(batch.num_tokens_after_padding)
            return
        try:
            chunks = self._chunks(batch)
            if self._verifier is not None:
                self._verifier.ids(*chunks, self._engines_own(batch, inputs))
            self.supply.start(*chunks)
        except BaseException as error:
            self.supply.failed(batch.num_tokens, error)
        self.supply.wait(batch.num_tokens_after_padding)

    def _chunks(self, batch: Any) -> tuple[Numbers, Numbers, Numbers]:
        """Which tokens of which requests the forward has. Those that the device alone knows are learned."""
        requests, tokens = batch.num_reqs, batch.num_tokens
        numbers, starts, counts = (
            given[:requests].astype(np.int64)
            for given in (batch.idx_mapping_np, batch.num_computed_tokens_np, batch.num_scheduled_tokens)
        )
        # What prompts have is known.
        sampled = starts + counts > batch.prefill_len_np[:requests] if batch.has_prefill else None
        if sampled is None or sampled.any():
            ids, positions, edges = self._host.read(batch)
            if self._drafts:  # rejected ones shift a request, and the host knows only how far at most
                bounds = edges[: requests + 1].astype(np.int64)
                starts, counts, tokens = positions[bounds[:-1]], bounds[1:] - bounds[:-1], bounds[-1]
            if sampled is None:
                self.supply.learn(numbers, starts, counts, ids[:tokens])
            else:
                which = np.flatnonzero(sampled)
                learned = ids[:tokens][sampled.repeat(counts)]
                self.supply.learn(numbers[which], starts[which], counts[which], learned)
        return numbers, starts, counts

    def _engines_own(self, batch: Any, inputs: Mapping[str, Any]) -> dict[int, Ids]:
        """The row ids that the engine will hash."""
        ids, lookback = batch.input_ids[: batch.num_tokens], inputs["lookback_token_ids"]
        rows = self._hashes(
            ids,
            batch.positions[: batch.num_tokens],
            batch.query_start_loc[: batch.num_reqs + 1],
            ids == IMAGE_SENTINEL_BASE_ID,
            lookback,
            lookback == IMAGE_SENTINEL_BASE_ID,
            None,
            None,
        )
        found = rows.cpu().numpy()
        return {layer: found[:, at] for at, layer in enumerate(self._hashes.layout.layer_ids)}


class _Host:
    """What of a forward is on the device alone, copied to the host.

    places: whether positions are to be, and where requests begin, beside ids.
    """

    def __init__(self, tokens: int, requests: int, device: torch.device, places: bool) -> None:
        self._event: Any = torch.cuda.Event() if device.type == "cuda" else None
        kinds = ((tokens, torch.int32), (tokens, torch.int64), (requests + 1, torch.int32))
        pinned = self._event is not None
        self._memory = [torch.zeros(size, dtype=kind, device="cpu", pin_memory=pinned) for size, kind in kinds]
        self._arrays = [memory.numpy() for memory in self._memory]
        self._places = places

    def read(self, batch: Any) -> list[npt.NDArray[Any]]:
        """Token ids, positions, and where requests begin: the same memory each time, which is longer than the batch."""
        given = [batch.input_ids]
        if self._places:
            given += batch.positions, batch.query_start_loc[: batch.num_reqs + 1]
        for memory, one in zip(self._memory, given, strict=False):
            memory[: len(one)].copy_(one, non_blocking=True)
        if self._event is not None:
            self._event.record()
            self._event.synchronize()
        return self._arrays


def with_rows(base: type, feeder_of: Any) -> type:
    """The engine's model state `base`, with rows. feeder_of: makes a `Feeder` of its config and device."""

    class PooledModelState(base):
        def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
            super().__init__(vllm_config, model, encoder_cache, device)
            self.feeder: Feeder = feeder_of(vllm_config, device)

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            super().add_request(req_index, new_req_data)
            self.feeder.add(req_index, new_req_data)

        def remove_request(self, req_id: str) -> None:
            super().remove_request(req_id)
            self.feeder.remove(req_id)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
            inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
            self.feeder.forward(input_batch, inputs)
            return inputs

        def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
            inputs: dict[str, Any] = super().prepare_dummy_inputs(num_reqs, num_tokens)
            self.feeder.supply.dummy(num_tokens)
            return inputs

    return PooledModelState
