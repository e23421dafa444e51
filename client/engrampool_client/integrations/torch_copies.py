"""Rows of steps in lasting memory of the host, and their copies to the device that a PyTorch model runs on.

torch.py is what users import.
"""

import atexit
import ctypes
import math
import threading
import weakref
from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from engrampool_client import forks
from engrampool_client.lookup.step import Step

_WORD = 0xFFFFFFFF  # words count round
# Words that GPUs may wait for: one may look at its word when the pool is gone already, so they are kept for good.
_words: list[torch.Tensor] = []


class Cpu:
    """In the place of a GPU, where layers run on the CPU: whatever is asked for is done at once."""

    pinned = False

    def room(self, shape: Iterable[int]) -> torch.Tensor:
        """Memory for rows, uint8."""
        return torch.empty(tuple(shape), dtype=torch.uint8)

    def copy(self, host: torch.Tensor, rows: torch.Tensor) -> Any:
        """Copy; gives what `read` is to wait for."""
        rows.copy_(host)

    def read(self, rows: torch.Tensor, copied: Any) -> None:
        """The caller goes on to read `rows`."""

    def mark(self) -> Any:
        """What has a `synchronize` that waits for all copies so far; None where there is nothing to wait for."""

    def wait_word(self, word: torch.Tensor, turn: int) -> None:
        """Have later copies wait for the word. Raises ValueError."""
        raise ValueError("device_waits needs a GPU: on the CPU it is the host that waits")


class Gpu:
    """Copies to a GPU, on a stream of their own. As `Cpu`; any thread may ask for them."""

    pinned = True

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def room(self, shape: Iterable[int]) -> torch.Tensor:
        """Memory for rows, uint8, which is the stream's own until `read`."""
        with torch.cuda.stream(self._stream):
            return torch.empty(tuple(shape), dtype=torch.uint8, device=self._device)

    def copy(self, host: torch.Tensor, rows: torch.Tensor) -> Any:
        """Have them copied; gives the event after which they are there."""
        with torch.cuda.stream(self._stream):
            rows.copy_(host, non_blocking=True)
            return self._stream.record_event()

    def read(self, rows: torch.Tensor, copied: Any) -> None:
        """Have the caller's stream wait for the copy."""
        reader = torch.cuda.current_stream(self._device)
        reader.wait_event(copied)
        rows.record_stream(reader)  # it was allocated on the other stream

    def mark(self) -> Any:
        """An event after all copies so far."""
        return self._stream.record_event()

    def wait_word(self, word: torch.Tensor, turn: int) -> None:
        """Have later copies wait, on the GPU, until the word has come to `turn`. Raises OSError, RuntimeError."""
        with torch.cuda.stream(self._stream):
            self._stream.record_event()  # which makes the device's context this thread's, as the driver's call needs
            wait_value(self._stream.cuda_stream, word.data_ptr(), turn)


def wait_value(stream: int, address: int, value: int) -> None:
    """Have what is later on a CUDA stream wait until the 32-bit word there is `value` or later, counted round.

    address: in pinned memory. Raises OSError without a driver, RuntimeError for what the driver says.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    there = ctypes.c_uint64()
    failed = driver.cuMemHostGetDevicePointer_v2(ctypes.byref(there), ctypes.c_void_p(address), ctypes.c_uint(0))
    if not failed:
        at_least = ctypes.c_uint(0)  # CU_STREAM_WAIT_VALUE_GEQ
        failed = driver.cuStreamWaitValue32_v2(ctypes.c_void_p(stream), there, ctypes.c_uint32(value & _WORD), at_least)
    if failed:
        raise RuntimeError(f"a stream cannot be had wait for a word of memory: error {failed} of the CUDA driver")


class Staging:
    """Host memory that steps take turns in: one buffer a layer, as large as the largest step so far.

    copies: CUDA events of the copies out of it; what is copied must not be overwritten before.
    """

    def __init__(self, pinned: bool, waited_for: Iterable[int] = ()) -> None:
        """waited_for: layers that get a word, which the GPU waits for."""
        self.copies: list[Any] = []
        self._pinned = pinned
        self._buffers: dict[int, torch.Tensor] = {}
        self._user: weakref.ref[Copies] | None = None
        self._turns = dict.fromkeys(waited_for, 0)
        self._words: dict[int, torch.Tensor] = {}
        if self._turns:
            words = torch.zeros(len(self._turns), dtype=torch.int32, pin_memory=pinned)
            _words.append(words)
            self._words = {layer: words[at : at + 1] for at, layer in enumerate(self._turns)}

    @property
    def free(self) -> bool:
        """Whether no step has it."""
        user = None if self._user is None else self._user()
        return user is None or user.over

    def use(self, user: "Copies") -> None:
        """A step has it, until its copies are over, or nobody refers to them."""
        self._user = weakref.ref(user)

    def arrays(self, shapes: Mapping[int, tuple[int, ...]]) -> dict[int, torch.Tensor]:
        """Uint8 tensors of these shapes, once nobody reads what was there."""
        for copied in self.copies:
            copied.synchronize()
        self.copies.clear()
        arrays = {}
        for layer, shape in shapes.items():
            size = math.prod(shape)
            if layer not in self._buffers or self._buffers[layer].numel() < size:
                self._buffers[layer] = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
            arrays[layer] = self._buffers[layer][:size].view(shape)
        return arrays

    def forget(self) -> None:
        """Take other memory from now on: somebody may still write here."""
        self._buffers.clear()

    def next_turn(self, layer: int) -> int:
        """What the layer's word is to come to next."""
        self._turns[layer] += 1
        return self._turns[layer]

    def word(self, layer: int) -> torch.Tensor:
        """The layer's word: int32 [1]."""
        return self._words[layer]

    def raise_word(self, layer: int, turn: int) -> None:
        """Let the GPU go on."""
        self._words[layer].numpy().view(np.uint32)[0] = turn & _WORD


class Copies:
    """One step's rows on their way from its memory of the host to where the layers read them. Thread-safe.

    A copy is issued by the layer that asks for it, or when the layer is settled, whichever is first; or all of them at
    once, each to wait on the GPU for a word, which is raised when the layer is settled or, at the latest, by `end`.
    Nobody who holds the lock waits for another thread.

    over: whether the step's memory may be the next one's.
    """

    def __init__(self, device: Cpu | Gpu, staging: Staging) -> None:
        self.over = False
        self._device, self._staging = device, staging
        self._host: dict[int, torch.Tensor] = {}
        # Whoever collects garbage within may be within already.
        self._lock = threading.RLock()
        self._issued: dict[int, tuple[torch.Tensor, Any]] = {}
        self._awaited: dict[int, int] = {}
        self._issuing = self._stopped = False
        self._begun = 0  # copies
        self._ending: Container[int] | None = None
        staging.use(self)
        forks.watch(self)

    def arrays(self, shapes: Mapping[int, tuple[int, ...]]) -> dict[int, torch.Tensor]:
        """The step's memory of the host: uint8 tensors of these shapes, once nobody reads what was there."""
        self._host = self._staging.arrays(shapes)
        return dict(self._host)

    def issue(self, layer: int) -> tuple[torch.Tensor, Any] | None:
        """A layer's rows on the device, and when they are there; None after `end`."""
        with self._lock:
            if layer not in self._issued and not self._stopped:
                try:
                    self._issuing = True
                    rows = self._device.room(self._host[layer].shape)
                    self._issue(layer, rows)
                finally:
                    self._issuing = False
                    if self._ending is not None:
                        self.end(self._ending)
            return self._issued.get(layer)

    def issue_all(self) -> None:
        """Issue every copy now: each begins, on the GPU, when its layer is settled. `settled` must hear of that."""
        with self._lock:
            # All of it before the first of them waits: to allocate may wait for the GPU.
            rooms = {layer: self._device.room(host.shape) for layer, host in self._host.items()}
            _waited_for.add(self)
            for layer, rows in rooms.items():
                turn = self._awaited[layer] = self._staging.next_turn(layer)
                self._device.wait_word(self._staging.word(layer), turn)
                self._issue(layer, rows)

    def read(self, layer: int) -> torch.Tensor | None:
        """A layer's rows, which the caller's stream reads when they are there; None after `end`."""
        issued = self.issue(layer)
        if issued is None:
            return None
        self._device.read(*issued)
        return issued[0]

    def settled(self, step: Step, layer: int) -> None:
        """To be called back by the client's step."""
        came = layer in step.delivery.rows
        with self._lock:
            if layer in self._awaited:
                self._raise(layer, came)
            elif came:
                self.issue(layer)

    def end(self, came: Container[int]) -> None:
        """The step has ended, and nobody writes rows any more. Once more does no harm.

        came: layers that have theirs.
        """
        with self._lock:
            self._stopped = True
            if self._issuing:  # this thread, which collected garbage within
                self._ending = came
                return
            if self.over:
                return
            for layer in list(self._awaited):
                self._raise(layer, layer in came)
            if self._begun > len(self._issued) and (copied := self._device.mark()) is not None:
                self._staging.copies.append(copied)  # Ctrl-C came between the beginning of a copy and its event
            self._issued.clear()
            self.over = True

    def let_go(self) -> None:
        """As the process ends: whatever the GPU waits for, it waits no more."""
        for layer, turn in list(self._awaited.items()):
            self._staging.raise_word(layer, turn)

    def forget(self) -> None:
        """There is no step: what was to be one may still have rows written to where they were to be."""
        self._staging.forget()
        self.over = True

    def leave_to_parent(self) -> None:
        """In the child of a fork: the GPU, pinned memory and words are the parent's."""
        self._lock = threading.RLock()  # the old one may be another thread's for ever
        self._awaited.clear()
        self._stopped = self.over = True

    def _issue(self, layer: int, rows: torch.Tensor) -> None:
        self._begun += 1
        copied = self._device.copy(self._host[layer], rows)
        if copied is not None:
            self._staging.copies.append(copied)
        self._issued[layer] = rows, copied

    def _raise(self, layer: int, came: bool) -> None:
        """With the lock. In this order: Ctrl-C may come between any two."""
        if not came:
            self._host[layer].numpy().fill(0)  # by numpy: torch refuses it here if `start` was in inference mode
        self._staging.raise_word(layer, self._awaited[layer])
        del self._awaited[layer]


_waited_for: "weakref.WeakSet[Copies]" = weakref.WeakSet()


def _let_go() -> None:
    for copies in list(_waited_for):
        copies.let_go()


atexit.register(_let_go)
