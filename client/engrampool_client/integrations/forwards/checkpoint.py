"""Rows of Engram tables as a checkpoint in this machine's files has them, to compare others with. Needs safetensors."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from engrampool_client.errors import SpecError

# DeepSeek-V4.1's names, whatever stands before them.
_NAME = re.compile(r"(?:^|\.)layers\.(\d+)\.engram\.embed\.(weight|scale)$")


class CheckpointTable:
    """Reads single rows: values, then scales, as the pool has them. Raises SpecError if a table is not there."""

    def __init__(self, directory: str | Path, layers: tuple[int, ...]) -> None:
        index = Path(directory) / "model.safetensors.index.json"
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError) as error:
            raise SpecError(f"the checkpoint to compare rows with has no index that can be read: {error}") from error
        self._slices = {}
        for name, file in names.items():
            found = _NAME.search(name)
            if found and int(found[1]) in layers:
                tensors: Any = safe_open(index.parent / file, framework="pt")
                self._slices[int(found[1]), found[2]] = tensors.get_slice(name)
        missing = [layer for layer in layers if not {(layer, "weight"), (layer, "scale")} <= self._slices.keys()]
        if missing:
            raise SpecError(f"the checkpoint to compare rows with has no Engram tables of the layers {missing}")

    def __call__(self, layer: int, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Rows by id: uint8 [ids, row_bytes]."""
        parts = []
        for part in ("weight", "scale"):
            one = self._slices[layer, part]
            parts.append(torch.cat([one[int(row) : int(row) + 1].view(torch.uint8) for row in ids]))
        rows: npt.NDArray[np.uint8] = torch.cat(parts, 1).numpy()
        return rows
