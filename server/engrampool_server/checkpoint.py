"""Reads table rows out of a Hugging Face style checkpoint: config.json, tokenizer.json and safetensors files."""

import json
import os
import threading
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate
from math import isfinite, prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_proto.builders import Blueprint, blueprint, load_config
from engrampool_proto.errors import EngrampoolError, SpecError
from engrampool_proto.spec import ModelSpec, Segment, TableSpec
from engrampool_server.safetensors_header import HeaderError, Tensor, read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# What a segment's dtype is called in a header. Some writers know no E8M0 and store its bytes as they are.
STORED_DTYPES = {
    "uint8": ("U8",),
    "int8": ("I8",),
    "float8_e4m3fn": ("F8_E4M3",),
    "float8_e5m2": ("F8_E5M2",),
    "float8_e8m0fnu": ("F8_E8M0", "U8"),
    "float4_e2m1fn_x2": ("U8",),
    "bfloat16": ("BF16",),
    "float16": ("F16",),
    "float32": ("F32",),
}


class CheckpointError(EngrampoolError):
    """A checkpoint lacks a tensor, holds another one than expected, or cannot be read; the text names it."""


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor, and the open file that it lies in."""

    path: Path
    descriptor: int
    tensor: Tensor

    def read(self, offset: int, out: memoryview) -> None:
        """Fill `out` with the tensor's bytes from `offset` on."""
        while out:
            try:
                count = os.preadv(self.descriptor, [out], self.tensor.offset + offset)
            except OSError as error:
                raise CheckpointError(f"{self.path}: {self.tensor.name} cannot be read: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(f"{self.path} became shorter while {self.tensor.name} was read from it")
            out, offset = out[count:], offset + count


@dataclass(frozen=True)
class _Column:
    """One segment of all rows of a table: `tensors[i]` begins with row `starts[i]`."""

    where: slice
    starts: list[int]
    tensors: list[_StoredTensor]

    def read(self, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out`, uint8 [n, segment bytes], C-contiguous, with rows start .. start + n."""
        row, stop = start, start + len(out)
        part = bisect_right(self.starts, start) - 1
        while row < stop:
            stored, first = self.tensors[part], self.starts[part]
            count = min(stop, first + stored.tensor.shape[0]) - row
            stored.read((row - first) * out.shape[1], out[row - start : row - start + count].data.cast("B"))
            row, part = row + count, part + 1


class Checkpoint:
    """An open checkpoint whose tensors fit the model that its config.json describes.

    spec: the model, scales included. source: JSON types that change when the files do.
    `open` it in a `with`; `read_rows` may be called from several threads until it is closed.
    """

    def __init__(self, directory: Path, name: str | None, stack: ExitStack) -> None:
        self._stack = stack
        plan = _blueprint(directory, name)
        wanted = [suffix for parts in plan.parts.values() for part in parts for suffix in part.tensors.values()]
        stored = _find(directory, [*wanted, *plan.scales.values()], stack)
        scales = {layer: _scalar(stored[suffix]) for layer, suffix in plan.scales.items()}
        self.spec: ModelSpec = with_scales(plan.spec, scales)
        self._columns = {
            table.layer: [_column(table, segment, plan, stored) for segment in table.row_format.segments]
            for table in self.spec.tables
        }
        files = {tensor.path: os.fstat(tensor.descriptor) for tensor in stored.values()}
        self.source: dict[str, Any] = {
            "checkpoint files": [[path.name, s.st_size, s.st_mtime_ns] for path, s in sorted(files.items())]
        }
        self._scratch = threading.local()

    @classmethod
    def open(cls, directory: Path, name: str | None = None) -> "Checkpoint":
        """Read config, tokenizer and headers, and find every tensor; reads no rows.

        name: the model's name; its family's by default.
        Raises CheckpointError naming the tensor or file, what was expected and what was found.
        """
        with ExitStack() as stack:
            checkpoint = cls(directory, name, stack)
            checkpoint._stack = stack.pop_all()
        return checkpoint

    def read_rows(self, table: TableSpec, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out`, uint8 [n, row_bytes], C-contiguous, with rows start .. start + n of `table`.

        Raises CheckpointError if a file cannot be read.
        """
        for column in self._columns[table.layer]:
            width = column.where.stop - column.where.start
            if width == table.row_bytes:
                column.read(start, out)
                continue
            segment = self._buffer(len(out) * width).reshape(len(out), width)
            column.read(start, segment)
            out[:, column.where] = segment

    def _buffer(self, nbytes: int) -> npt.NDArray[np.uint8]:
        buffer: npt.NDArray[np.uint8] | None = getattr(self._scratch, "buffer", None)
        if buffer is None or len(buffer) < nbytes:
            buffer = self._scratch.buffer = np.empty(nbytes, np.uint8)
        return buffer[:nbytes]

    def close(self) -> None:
        """Close the files. A second call does nothing."""
        self._stack.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def with_scales(spec: ModelSpec, scales: Mapping[int, float]) -> ModelSpec:
    """The specification with the tables' scales filled in, {layer: scale}."""
    return replace(spec, tables=tuple(replace(t, scale=scales.get(t.layer, t.scale)) for t in spec.tables))


def _blueprint(directory: Path, name: str | None) -> Blueprint:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; give the one that holds the model's config.json")
    tokenizer = directory / "tokenizer.json"
    try:
        return blueprint(load_config(directory / "config.json"), tokenizer if tokenizer.is_file() else None, name)
    except SpecError as error:
        raise CheckpointError(f"{directory}: {error}") from error


def _column(table: TableSpec, segment: Segment, plan: Blueprint, stored: Mapping[str, _StoredTensor]) -> _Column:
    parts = plan.parts[table.layer]
    tensors = [stored[part.tensors[segment.name]] for part in parts]
    for part, found in zip(parts, tensors, strict=True):
        dtypes, shape = STORED_DTYPES[segment.dtype], (part.num_rows, segment.length)
        if found.tensor.dtype not in dtypes or found.tensor.shape != shape:
            raise CheckpointError(
                f"{found.path}: {found.tensor.name} must be {' or '.join(dtypes)} {list(shape)}, as config.json says; "
                f"it is {found.tensor.dtype} {list(found.tensor.shape)}"
            )
    starts = list(accumulate((part.num_rows for part in parts[:-1]), initial=0))
    return _Column(table.row_format.slice_of(segment.name), starts, tensors)


def _scalar(stored: _StoredTensor) -> float:
    tensor = stored.tensor
    if tensor.dtype not in ("F32", "BF16") or prod(tensor.shape) != 1:
        raise CheckpointError(
            f"{stored.path}: {tensor.name} must be one F32 or BF16 number; it is {tensor.dtype} {list(tensor.shape)}"
        )
    raw = bytearray(tensor.nbytes)
    stored.read(0, memoryview(raw))
    # A bfloat16 is the upper half of a float32.
    value = float(np.frombuffer(bytes(raw).rjust(4, b"\0"), "<f4")[0])
    if not isfinite(value):
        raise CheckpointError(f"{stored.path}: {tensor.name} must be a finite scale; it is {value}")
    return value


def _find(directory: Path, suffixes: Iterable[str], stack: ExitStack) -> dict[str, _StoredTensor]:
    """Each suffix's tensor, found under any prefix that ends at a dot."""
    files = _tensor_files(directory)
    names: dict[str, str | None] = dict.fromkeys(suffixes)
    for name in files:
        start = 0
        while True:
            suffix = name[start:]
            if suffix in names:
                first = names[suffix]
                if first is not None:
                    raise CheckpointError(f"{directory} has two tensors {suffix}: {first} and {name}")
                names[suffix] = name
            start = name.find(".", start) + 1
            if not start:
                break
    missing = [suffix for suffix, name in names.items() if name is None]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{directory} has no tensor {missing[0]} under any prefix{others}; config.json needs it")
    opened: dict[str, tuple[int, dict[str, Tensor]]] = {}
    stored = {}
    for suffix, full_name in names.items():
        assert full_name is not None
        path = directory / files[full_name]
        if path.name not in opened:
            opened[path.name] = _open(path, full_name, stack)
        descriptor, tensors = opened[path.name]
        if full_name not in tensors:
            raise CheckpointError(f"{path} does not hold {full_name}, although {INDEX_NAME} says so")
        stored[suffix] = _StoredTensor(path, descriptor, tensors[full_name])
    return stored


def _tensor_files(directory: Path) -> dict[str, str]:
    """File name of every tensor, by tensor name."""
    index, single = directory / INDEX_NAME, directory / SINGLE_NAME
    if index.exists():
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{index} cannot be read as an index of tensors: {error!r}") from error
        if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
            raise CheckpointError(f"{index}: weight_map must give each tensor the name of a file beside it")
        return files
    if not single.exists():
        raise CheckpointError(f"{directory} has neither {INDEX_NAME} nor {SINGLE_NAME}")
    with ExitStack() as stack:
        return dict.fromkeys(_open(single, "every tensor", stack)[1], SINGLE_NAME)


def _open(path: Path, wanted: str, stack: ExitStack) -> tuple[int, dict[str, Tensor]]:
    try:
        descriptor = stack.enter_context(path.open("rb", buffering=0)).fileno()
        return descriptor, read_header(descriptor)
    except OSError as error:
        raise CheckpointError(f"{path}, which should hold {wanted}, cannot be opened: {error.strerror}") from error
    except HeaderError as error:
        raise CheckpointError(f"{path} {error}; download it again") from error
