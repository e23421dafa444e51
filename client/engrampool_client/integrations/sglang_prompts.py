"""Rows of SGLang's prompts: of a batch's chunks, and before their batch is made of what waits and of what comes next.

`sglang_engram.py` puts it into the engine. All of a prompt's tokens are on the host from the moment when the request
comes, so that the pool is asked for by tokens, and the client hashes them in threads of its own.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.engram import MM_PAD_SHIFT_VALUE
from sglang.srt.model_executor.encoder_swa_replay import replay_len
from sglang.srt.runtime_context import get_schedule

from engrampool_client.client import Client
from engrampool_client.config import ClientConfig, from_environment
from engrampool_client.integrations.forwards.agreement import Agree
from engrampool_client.integrations.forwards.counts import EngineCounts
from engrampool_client.integrations.forwards.history import Histories, Ids
from engrampool_client.integrations.forwards.settings import EngineSettings
from engrampool_client.integrations.forwards.supply import Supply
from engrampool_client.integrations.forwards.torch_landing import TorchLanding
from engrampool_client.integrations.forwards.verify import Table, Verifier

# Requests whose tokens are kept at most: those of a forward, and those that wait.
_REQUESTS = 1024
# Of the scheduler's queue, so many from its head on are looked at.
_WAITING = 64
# Of a request whose cached prefix is not known yet, so many tokens are fetched at most, as they may be for nothing.
_UNMATCHED = 1024

# A chunk of a request: the engine's own object, and the positions start .. stop of its tokens.
Chunk = tuple[Any, int, int]


def chunks_of(batch: Any) -> list[Chunk] | None:
    """An extend batch's chunks in their order, as the forward runs them; None unless all tokens are on the host."""
    resets = batch.encoder_swa_reset or []
    found = []
    for at, (request, prefix, extend) in enumerate(zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True)):
        # What is run again of a prefix stands in front.
        start = prefix - (replay_len(prefix) if at < len(resets) and resets[at] else 0)
        if prefix + extend > len(request.full_untruncated_fill_ids):
            return None
        if start < prefix + extend:
            found.append((request, start, prefix + extend))
    return found or None


@dataclass(eq=False)
class _Held:
    """A request whose tokens are kept. request: kept, too, so that no other one has its id.

    position: where its next forward begins, as far as it is known. asked: from where on, and how many at most, its
    tokens were all asked for.
    """

    request: Any
    number: int
    position: int = 0
    asked: tuple[int, int | None] | None = None


class Prompts:
    """Of one rank. To be used by the scheduler's thread alone.

    columns: of the row ids, this rank's. batch: of the engine's, which knows how many requests there may be, and how
    long; a forward may have as many tokens as its chunks have. hasher: the engine's, for what it hashes by. agree: how
    the ranks that have the same tokens come to one outcome. table: to compare rows with, if there is one.
    """

    def __init__(
        self,
        client: Client,
        layers: Sequence[int],
        columns: slice,
        device: torch.device,
        batch: Any,
        hasher: Any,
        agree: Agree | None,
        counts: EngineCounts,
        table: Table | None,
    ) -> None:
        settings, schedule = EngineSettings.of(os.environ), get_schedule()
        running, longest = batch.req_to_token_pool.req_to_token.shape
        requests, tokens = min(running + _WAITING, _REQUESTS), schedule.chunked_prefill_size or 0
        if tokens <= 0:
            tokens = schedule.max_prefill_tokens
        image = self._image = hasher.image_token_id
        self._depth, self._most = hasher.max_ngram_size - 1, tokens
        self._histories = Histories(requests, longest, self._depth, image, client.compiled)
        self._verifier = Verifier(client.spec, columns, self._histories, counts, table) if settings.verify else None
        shape = {layer: (columns.stop - columns.start, client.spec.table(layer).row_bytes) for layer in layers}
        self._landing = _ForwardLanding(layers, shape, tokens, device)
        self.supply = Supply(
            client,
            self._landing,
            self._histories,
            timeout_s=from_environment(os.environ).get("timeout_s", ClientConfig.timeout_s),
            agree=agree,
            counts=counts,
            ahead_tokens=tokens if settings.ahead_tokens is None else settings.ahead_tokens,
            early_decode=False,
            verifier=self._verifier,
        )
        self._held: dict[int, _Held] = {}
        # Those that were used last are used first: memory of the others is never touched.
        self._free = list(range(requests))[::-1]
        self._tokens = 0

    def fits(self, chunks: Sequence[Chunk]) -> bool:
        """Whether there is memory for a forward of these chunks."""
        self._let_go_of(held for held in self._held.values() if held.position >= self._histories.lengths[held.number])
        new = sum(id(request) not in self._held for request, _, _ in chunks)
        return new <= len(self._free) and sum(stop - start for _, start, stop in chunks) <= self._most

    def start(self, chunks: Sequence[Chunk], engines: Callable[[], Mapping[int, Ids]]) -> None:
        """A forward of these chunks, which `fits`, is next. engines: gives the row ids that the engine hashes itself.

        Raises what stops it, FingerprintError for other row ids among it; what rows fail with is raised by `rows`.
        """
        numbers = np.array([self._number(*chunk) for chunk in chunks])
        starts = np.array([start for _, start, _ in chunks])
        counts = np.array([stop for _, _, stop in chunks]) - starts
        if self._verifier is not None:
            self._verifier.ids(numbers, starts, counts, engines())
        self._tokens = int(counts.sum())
        self.supply.start(numbers, starts, counts, go_on=False)

    def rows(self, layer: int) -> torch.Tensor:
        """Wait for a layer's rows of the forward that was started last: uint8 [tokens, columns, row_bytes].

        On the device, or on their way there in the order of the stream that is current; zeros of tokens without any.
        Raises what the lookup failed with, on this rank or on another.
        """
        self._landing.make(layer, self._tokens)
        self.supply.wait_for(layer)
        return self._landing.take(layer)

    def look_ahead(self, going_on: Any | None, waiting: Iterable[Any], always_matched: bool) -> None:
        """A forward has its rows: ask for those of what comes next, and let go of requests that have gone.

        going_on: a request whose prompt is run in part. waiting: those that are to be run, in their order. Nothing of
        the engine's is changed. always_matched: whether it keeps no prefixes, so that none is found.
        """
        wanted = list(islice(waiting, _WAITING))
        stay = {id(request) for request in (going_on, *wanted)}
        self._let_go_of(held for key, held in self._held.items() if key not in stay)
        held = self._held.get(id(going_on))
        if held is not None:
            self._extend(held, held.position, None)
        for request in wanted:
            if not self.supply.has_room:
                break
            held = self._held.get(id(request))
            if held is None:
                if not self._free:
                    break
                tokens = request.origin_input_ids + request.output_ids
                held = self._hold(request, tokens, 0)
            known = always_matched or request.last_node is not None
            self._extend(held, request.num_matched_prefix_tokens, None if known else _UNMATCHED)

    def _extend(self, held: _Held, position: int, most: int | None) -> None:
        if held.asked != (position, most) and self.supply.extend(held.number, position, most):
            held.asked = position, most

    def _number(self, request: Any, start: int, stop: int) -> int:
        """What the request is kept under, with the tokens that the engine has of it now."""
        tokens, low = request.full_untruncated_fill_ids, max(0, start - self._depth)
        held = self._held.get(id(request))
        # It may have been asked for as another one, a request that was aborted say.
        if held is None or not self._histories.holds(held.number, low, self._ids(tokens[low:stop])):
            held = self._hold(request, tokens[low:], low)
        held.position = stop
        return held.number

    def _hold(self, request: Any, tokens: Any, first: int) -> _Held:
        """Keep a request's tokens from the position `first` on, in the place of what was kept of it."""
        held = self._held.get(id(request))
        if held is None:
            held = self._held[id(request)] = _Held(request, self._free.pop())
        held.asked = None
        self.supply.add(held.number, self._ids(tokens), None, first)
        return held

    def _let_go_of(self, all_held: Iterable[_Held]) -> None:
        for held in list(all_held):
            del self._held[id(held.request)]
            self.supply.remove(held.number)
            self._free.append(held.number)

    def _ids(self, tokens: Any) -> Ids:
        """Tokens as they are hashed: those of images are one. Without images theirs are refused as out of range."""
        ids = np.asarray(tokens, np.int64)
        image = MM_PAD_SHIFT_VALUE if self._image is None else self._image
        return np.where(ids >= MM_PAD_SHIFT_VALUE, image, ids).astype(np.int32)

    def release(self) -> None:
        """Give up what is under way, and leave the client to others."""
        self._held.clear()
        self.supply.release()


class _ForwardLanding(TorchLanding):
    """Rows in memory of the engine's allocator, for as long as a layer reads them: no graph has its address."""

    def __init__(
        self, layers: Sequence[int], row_shape: Mapping[int, tuple[int, int]], max_tokens: int, device: torch.device
    ) -> None:
        super().__init__(layers, row_shape, 0, device)
        self.max_tokens = max_tokens

    def make(self, layer: int, tokens: int) -> None:
        self.on_device[layer] = torch.empty((tokens, *self.row_shape[layer]), dtype=torch.uint8, device=self.device)

    def take(self, layer: int) -> torch.Tensor:
        return self.on_device.pop(layer)
