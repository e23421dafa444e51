"""Rows on their way to an engine that hashes itself: from its row ids to memory that its layers read. Needs torch."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engrampool_client.client import Client
from engrampool_client.errors import PoolError
from engrampool_client.integrations.forwards.agreement import Agree, Vote
from engrampool_client.integrations.forwards.counts import EngineCounts
from engrampool_client.integrations.forwards.history import Flags
from engrampool_client.integrations.forwards.quiet import Quietable
from engrampool_client.integrations.forwards.verify import RowCheck
from engrampool_client.lookup.step import Step

# Forwards take turns in so many buffers: rows of one may be on their way to the device when the next one's come.
_TURNS = 2


class Staging(Quietable):
    """A model's rows, one forward at a time: `start` for each of its layers, then `rows` of each.

    layers: those that have rows. columns: row ids a token. max_tokens: of a forward at most.
    device: where row ids come from and rows go to. Of a GPU's ids a copy is issued where they are given, and a thread
        waits for it; rows land in pinned memory. Of the CPU's the lookup is begun where they are given.
    agree: how the ranks of a group come to one outcome in each layer; None where there is but one.
    check: compares some rows of each forward, if given.

    All layers of a forward are asked for at once, when the last one's ids came. A forward that is not finished, as its
    model failed, is given up by the next. Not thread-safe: a model runs one forward at a time.
    """

    def __init__(
        self,
        client: Client,
        layers: Sequence[int],
        columns: int,
        max_tokens: int,
        device: torch.device,
        agree: Agree | None = None,
        counts: EngineCounts | None = None,
        check: RowCheck | None = None,
    ) -> None:
        self.client, self.layers, self._agree, self._check = client, tuple(layers), agree, check
        self.counts = EngineCounts(self.layers) if counts is None else counts
        # Not one of the client's (`ready`): with that a lookup has its deadline, and its memory, from the beginning. A
        # GPU that is behind may come to the ids after that deadline, and reads that memory until then.
        self._thread = ThreadPoolExecutor(1, "engrampool-engine") if device.type == "cuda" else None
        pinned = self._thread is not None

        def memory(width: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            # An engine builds its model where its GPU is the default device.
            return torch.zeros((max_tokens, columns, *width), dtype=dtype, device="cpu", pin_memory=pinned)

        self._turns = [
            _Turn(
                {layer: memory((client.spec.table(layer).row_bytes,), torch.uint8) for layer in self.layers},
                {layer: memory((), torch.int32) for layer in self.layers},
                pinned,
            )
            for _ in range(_TURNS)
        ]
        self._forward: _Forward | None = None

    def start(self, layer: int, ids: torch.Tensor) -> None:
        """Give a layer's row ids, integers [tokens, columns]; -1 stands for no row. They may be overwritten from then.

        A copy of a GPU's is issued on the stream that is current.
        """
        forward, quiet = self._forward, self.is_quiet
        if forward is None or forward.asked or layer in forward.ids or forward.dummy != quiet:
            if forward is not None:
                forward.give_up()
            self._turns.append(self._turns.pop(0))
            forward = self._forward = _Forward(self.client, self._turns[0], quiet, self._agree)
            self.counts.dummies += quiet
        forward.put(layer, ids)
        if len(forward.ids) == len(self.layers):
            forward.ask(self._thread)

    def rows(self, layer: int) -> torch.Tensor | None:
        """Wait for a layer's rows, uint8 [tokens, columns, row_bytes] in memory of the host; None in a quiet forward.

        They are good until the next forward but one lands, or, once `copied` was told, until that copy has ended.
        Raises what the lookup failed with, on this rank or on another; PoolError for a layer whose ids were not given.
        """
        try:
            return self._rows(layer)
        except BaseException:
            self.counts.failed += 1
            if self._forward is not None and layer in self._forward.votes:
                self._forward.votes[layer].lost()
            raise

    def _rows(self, layer: int) -> torch.Tensor | None:
        forward = self._forward
        if forward is None or layer not in forward.ids:
            raise PoolError(f"no row ids of layer {layer} were given for this forward")
        if forward.dummy:
            return None
        if not forward.asked:
            forward.ask(self._thread)
        begin, tokens = time.perf_counter(), len(forward.ids[layer])
        valid = forward.votes[layer].settle(lambda flags: self._find(forward, layer, flags))[0]
        self.counts.waited(layer, time.perf_counter() - begin)
        self.counts.steps += layer == self.layers[0]
        self.counts.tokens += tokens if layer == self.layers[0] else 0
        if not valid.all():
            self.counts.masked[layer] += int((~valid).sum())
        return forward.rows(layer, valid)

    def _find(self, forward: "_Forward", layer: int, flags: Flags) -> None:
        forward.find(layer, flags)
        if self._check is not None:
            ids, rows = forward.ids[layer], self._turns[0].rows_array[layer]
            there = np.flatnonzero(flags[0] & (ids >= 0).all(axis=1))
            self._check.compare(layer, there, lambda chosen: (ids[chosen], rows[chosen]), "token {}".format)

    def copied(self) -> None:
        """Say that a copy of rows to the GPU was issued, on the stream that is current."""
        self._turns[0].copied.record()

    def close(self) -> None:
        """Give up what is under way, and close the client."""
        if self._forward is not None:
            self._forward.give_up()
            self._forward = None
        if self._thread is not None:
            self._thread.shutdown()
        self.client.close()


class _Turn:
    """What a forward's ids and rows lie in: tensors of max_tokens by layer, and the same memory as arrays.

    put, copied: of a GPU, when the ids came here, and when the last of the rows that were copied there were there.
    """

    def __init__(self, rows: dict[int, torch.Tensor], ids: dict[int, torch.Tensor], pinned: bool) -> None:
        self.rows, self.ids = rows, ids
        self.rows_array = {layer: one.numpy() for layer, one in rows.items()}
        self.ids_array = {layer: one.numpy() for layer, one in ids.items()}
        self.put: Any = torch.cuda.Event() if pinned else None
        self.copied: Any = torch.cuda.Event() if pinned else None


class _Forward:
    """One forward's lookup.

    ids: layer -> its row ids, once given; of a GPU's, once `_Turn.put` has come. votes: of layers whose rows are asked
    for.
    """

    def __init__(self, client: Client, turn: _Turn, dummy: bool, agree: Agree | None) -> None:
        self._client, self._turn, self.dummy, self._agree = client, turn, dummy, agree
        self.ids: dict[int, npt.NDArray[Any]] = {}
        self.votes: dict[int, Vote] = {}
        self.asked = False
        self._step: Future[Step] = Future()

    def put(self, layer: int, ids: torch.Tensor) -> None:
        """Have the ids copied to the host."""
        tokens = len(ids)
        place = self.ids[layer] = self._turn.ids_array[layer][:tokens]
        if self.dummy:
            return
        self.votes[layer] = Vote(1, tokens, self._agree)
        if ids.is_cuda:
            self._turn.ids[layer][:tokens].copy_(ids, non_blocking=True)
        else:
            place[...] = ids.numpy()  # PyTorch would share so little among threads, and wait for them

    def ask(self, thread: ThreadPoolExecutor | None) -> None:
        """Begin the lookup; what it fails with is raised by `find`."""
        self.asked = True
        if self.dummy:
            return
        try:
            if thread is None:
                self._step.set_result(self._begin())
            else:
                self._turn.put.record()
                self._step = thread.submit(self._begin_copied)
        except BaseException as error:
            self._step.set_exception(error)  # so that nobody waits for what was not begun
            if not isinstance(error, Exception):
                raise

    def _begin_copied(self) -> Step:
        self._turn.copied.synchronize()  # of the forward that had this turn before
        self._turn.put.synchronize()
        return self._begin()

    def _begin(self) -> Step:
        out = {layer: self._turn.rows_array[layer][: len(ids)] for layer, ids in self.ids.items()}
        return self._client.prefetch_rows(self.ids, out=out, absent=True)

    def find(self, layer: int, flags: Flags) -> None:
        """Wait for a layer's rows; set which tokens have theirs."""
        flags[0] = self._step.result().valid(layer)

    def rows(self, layer: int, valid: Flags) -> torch.Tensor:
        """A layer's rows, once they are there; zeros of tokens that are not valid."""
        if not valid.all():
            self._turn.rows_array[layer][: len(valid)][~valid] = 0
        return self._turn.rows[layer][: len(valid)]

    def give_up(self) -> None:
        """Nothing is written into the turn's memory any more once this returns."""
        if self.asked and not self._step.cancel() and self._step.exception() is None:
            self._step.result().cancel()
