"""Where an engine's layers read rows, as PyTorch's tensors on its device. Needs torch."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class TorchLanding:
    """A `Landing` (areas.py). Of a GPU the host's memory is pinned, and copies go to the stream that is current.

    row_shape: layer -> (columns, bytes of a row).
    """

    def __init__(
        self,
        layers: Sequence[int],
        row_shape: Mapping[int, tuple[int, int]],
        max_tokens: int,
        device: torch.device,
    ) -> None:
        self.layers, self.row_shape, self.max_tokens = tuple(layers), row_shape, max_tokens
        self.device, self._pinned = device, device.type == "cuda"
        self.on_device = {
            layer: torch.zeros((max_tokens, *row_shape[layer]), dtype=torch.uint8, device=device) for layer in layers
        }
        self._host: dict[int, torch.Tensor] = {}

    def memory(self, tokens: int) -> dict[int, npt.NDArray[np.uint8]]:
        """Memory of the host for rows of so many tokens, by layer."""
        for layer in self.layers:
            # An engine builds its model where its GPU is the default device.
            self._host[layer] = torch.zeros(
                (tokens, *self.row_shape[layer]), dtype=torch.uint8, device="cpu", pin_memory=self._pinned
            )
        return {layer: tensor.numpy() for layer, tensor in self._host.items()}

    def event(self) -> Any:
        """CUDA's, or one for copies that have ended when they are issued."""
        return torch.cuda.Event() if self._pinned else _Ended()

    def copy(self, layer: int, source: int, target: int, tokens: int) -> None:
        """Issue a copy of rows."""
        rows = self._host[layer][source : source + tokens]
        self.on_device[layer][target : target + tokens].copy_(rows, non_blocking=True)

    def clear(self, layer: int, tokens: npt.NDArray[np.integer[Any]] | slice) -> None:
        """Make rows zeros, after the copies that were issued."""
        if isinstance(tokens, slice):
            self.on_device[layer][tokens].zero_()
        else:
            self.on_device[layer].index_fill_(0, torch.from_numpy(tokens).to(self.device), 0)

    def landed(self, layer: int) -> torch.Tensor:
        """What the layer reads."""
        return self.on_device[layer]


class _Ended:
    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True
