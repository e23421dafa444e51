"""Reads table rows out of a Hugging Face style checkpoint: config.json, tokenizer.json and safetensors files."""

import json
import os
import re
import threading
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate, count
from math import isfinite, prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_proto.builders import Blueprint, Part, Stored, blueprint, load_config
from engrampool_proto.builders.blueprint import spare_rows
from engrampool_proto.builders.stored import STORED_DTYPES
from engrampool_proto.errors import EngrampoolError, SpecError
from engrampool_proto.lfs import ADVICE, is_pointer
from engrampool_proto.spec import ModelSpec, Segment, TableSpec
from engrampool_server.files.safetensors_header import HeaderError, Tensor, read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_NUMBERED = re.compile(r"(.*-)(\d+)-of-(\d+)\.safetensors")


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

    def all(self) -> bytes:
        """All of the bytes, for a tensor of a few numbers."""
        raw = bytearray(self.tensor.nbytes)
        self.read(0, memoryview(raw))
        return bytes(raw)


@dataclass(frozen=True)
class _Column:
    """One segment of all rows of a table: `tensors[i]` holds those of `parts[i]`, which begin with row `starts[i]`."""

    where: slice
    starts: list[int]
    parts: tuple[Part, ...]
    tensors: list[_StoredTensor]

    def read(self, start: int, out: npt.NDArray[np.uint8]) -> None:
        """Fill `out`, uint8 [n, segment bytes], C-contiguous, with rows start .. start + n."""
        row, stop = start, start + len(out)
        part = bisect_right(self.starts, start) - 1
        while row < stop:
            stored, first = self.tensors[part], self.starts[part]
            count = min(stop, first + self.parts[part].num_rows) - row
            stored.read((row - first) * out.shape[1], out[row - start : row - start + count].data.cast("B"))
            row, part = row + count, part + 1


class Checkpoint:
    """An open checkpoint whose tensors fit the model that its config.json describes.

    spec: the model, scales included. source: JSON types that change when the files do.
    `open` it in a `with`; `read_rows` may be called from several threads until it is closed.
    """

    def __init__(self, directory: Path, name: str | None, eos_token_id: int | None, stack: ExitStack) -> None:
        self._stack = stack
        config = _config(directory)
        files = _Files(directory, stack)
        plan = _blueprint(directory, config, name, eos_token_id, files)
        wanted = [tensor for parts in plan.parts.values() for part in parts for tensor in part.tensors.values()]
        stored = {tensor: files.tensor(tensor) for tensor in wanted}
        scales = {layer: _one_scale([files.tensor(name) for name in names]) for layer, names in plan.scales.items()}
        for tensor, constants in plan.constants.items():
            _compare(files.tensor(tensor), constants)
        self.spec: ModelSpec = with_scales(plan.spec, scales)
        self._columns = {
            table.layer: [_column(table, segment, plan, stored) for segment in table.row_format.segments]
            for table in self.spec.tables
        }
        read = {tensor.path: os.fstat(tensor.descriptor) for tensor in stored.values()}
        self.source: dict[str, Any] = {
            "checkpoint files": [[path.name, s.st_size, s.st_mtime_ns] for path, s in sorted(read.items())]
        }
        self._scratch = threading.local()

    @classmethod
    def open(cls, directory: Path, name: str | None = None, eos_token_id: int | None = None) -> "Checkpoint":
        """Read config, tokenizer and headers, and find every tensor; reads no rows.

        name: the model's name; its family's by default. eos_token_id: which one, where config.json lists several.
        Raises CheckpointError naming the tensor or file, what was expected and what was found.
        """
        with ExitStack() as stack:
            checkpoint = cls(directory, name, eos_token_id, stack)
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


def _config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no directory; give the one that holds the model's config.json")
    try:
        return load_config(directory / "config.json")
    except SpecError as error:
        raise CheckpointError(f"{directory}: {error}") from error


def _blueprint(
    directory: Path, config: Mapping[str, Any], name: str | None, eos_token_id: int | None, files: "_Files"
) -> Blueprint:
    tokenizer = directory / "tokenizer.json"
    try:
        return blueprint(
            config,
            tokenizer if tokenizer.is_file() else None,
            name,
            eos_token_id=eos_token_id,
            stored=Stored(files, files.describe),
        )
    except SpecError as error:
        raise CheckpointError(f"{directory}: {error}") from error


def _column(table: TableSpec, segment: Segment, plan: Blueprint, stored: Mapping[str, _StoredTensor]) -> _Column:
    parts = plan.parts[table.layer]
    tensors = [stored[part.tensors[segment.name]] for part in parts]
    for part, found in zip(parts, tensors, strict=True):
        dtypes, shape = STORED_DTYPES[segment.dtype], found.tensor.shape
        width = (segment.length,) if shape[1:] or segment.length > 1 else ()  # one number a row may be [n] or [n, 1]
        fits = shape[1:] == width and 0 <= prod(shape[:1]) - part.num_rows <= spare_rows(table)
        if found.tensor.dtype not in dtypes or not fits:
            raise CheckpointError(
                f"{found.path}: {found.tensor.name} must be {' or '.join(dtypes)} {[part.num_rows, *width]}, as "
                f"config.json says; it is {found.tensor.dtype} {list(shape)}"
            )
    starts = list(accumulate((part.num_rows for part in parts[:-1]), initial=0))
    return _Column(table.row_format.slice_of(segment.name), starts, parts, tensors)


def _one_scale(tensors: Sequence[_StoredTensor]) -> float:
    values = [_scalar(tensor) for tensor in tensors]
    for tensor, value in zip(tensors, values, strict=True):
        if value != values[0]:
            raise CheckpointError(
                f"{tensor.path}: {tensor.tensor.name} is {value}, {tensors[0].tensor.name} is {values[0]}; "
                "a table has one scale"
            )
    return values[0]


def _scalar(stored: _StoredTensor) -> float:
    tensor = stored.tensor
    if tensor.dtype not in ("F32", "BF16") or prod(tensor.shape) != 1:
        raise CheckpointError(
            f"{stored.path}: {tensor.name} must be one F32 or BF16 number; it is {tensor.dtype} {list(tensor.shape)}"
        )
    # A bfloat16 is the upper half of a float32.
    value = float(np.frombuffer(stored.all().rjust(4, b"\0"), "<f4")[0])
    if not isfinite(value):
        raise CheckpointError(f"{stored.path}: {tensor.name} must be a finite scale; it is {value}")
    return value


def _compare(stored: _StoredTensor, constants: tuple[int, ...]) -> None:
    """Refuse a checkpoint whose own constants of the hash are not those that rows will be looked up by."""
    tensor, dtypes = stored.tensor, {"I64": "<i8", "I32": "<i4"}
    if tensor.dtype not in dtypes or prod(tensor.shape) != len(constants):
        raise CheckpointError(
            f"{stored.path}: {tensor.name} must be {len(constants)} integers, I64 or I32, as config.json says; it is "
            f"{tensor.dtype} {list(tensor.shape)}"
        )
    found = tuple(np.frombuffer(stored.all(), dtypes[tensor.dtype]).tolist())
    if found != constants:
        raise CheckpointError(
            f"{stored.path}: {tensor.name} is {list(found)}, config.json gives {list(constants)}; one of them is not "
            "the model's, and rows would be looked up in the wrong places"
        )


class _Files(Mapping[str, str]):
    """File name of every tensor of a directory, by tensor name. A header is read when one of its tensors is asked for.

    Raises CheckpointError for files that are not there, or not whole.
    """

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory, self._stack = directory, stack
        self._opened: dict[str, tuple[int, dict[str, Tensor]]] = {}
        index = directory / INDEX_NAME
        self._names = _weight_map(index) if index.exists() else self._all_names()

    def _all_names(self) -> dict[str, str]:
        single = self._directory / SINGLE_NAME
        files = sorted(path.name for path in self._directory.glob("*.safetensors"))
        if single.exists():
            files = [single.name]
        if not files:
            raise CheckpointError(f"{self._directory} has neither {INDEX_NAME} nor {SINGLE_NAME}, nor parts of it")
        _check_numbers(self._directory, files)
        names: dict[str, str] = {}
        for file in files:
            for name in self._open(file, "tensors")[1]:
                if name in names:
                    raise CheckpointError(
                        f"{self._directory} has the tensor {name} twice, in {names[name]} and in {file}, and no "
                        f"{INDEX_NAME} that says which counts"
                    )
                names[name] = file
        return names

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of a tensor."""
        tensor = self.tensor(name).tensor
        return tensor.dtype, tensor.shape

    def tensor(self, name: str) -> _StoredTensor:
        """A tensor, with its file opened."""
        path = self._directory / self._names[name]
        descriptor, tensors = self._open(path.name, name)
        if name not in tensors:
            raise CheckpointError(f"{path} does not hold {name}, although {INDEX_NAME} says so")
        return _StoredTensor(path, descriptor, tensors[name])

    def _open(self, file: str, wanted: str) -> tuple[int, dict[str, Tensor]]:
        if file not in self._opened:
            path = self._directory / file
            try:
                descriptor = self._stack.enter_context(path.open("rb", buffering=0)).fileno()
                self._opened[file] = descriptor, read_header(descriptor)
            except OSError as error:
                raise CheckpointError(
                    f"{path}, which should hold {wanted}, cannot be opened: {error.strerror}"
                ) from error
            except HeaderError as error:
                raise CheckpointError(f"{path} {error}; download it again") from error
        return self._opened[file]

    def __getitem__(self, name: str) -> str:
        return self._names[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        raw = index.read_bytes()
        if is_pointer(raw):
            raise CheckpointError(f"{index} {ADVICE}")
        files = json.loads(raw)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index} cannot be read as an index of tensors: {error!r}") from error
    if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
        raise CheckpointError(f"{index}: weight_map must give each tensor the name of a file beside it")
    return files


def _check_numbers(directory: Path, files: Sequence[str]) -> None:
    """Without an index, a file that is missing is told by the numbers of the others."""
    groups: dict[tuple[str, str], dict[int, str]] = {}
    for file, numbered in zip(files, map(_NUMBERED.fullmatch, files), strict=True):
        if numbered is not None:
            before, number, of = numbered.groups()
            groups.setdefault((before, of), {})[int(number)] = file
    for (before, of), there in groups.items():
        first = 0 if 0 in there else 1  # some count from 0
        missing = next(number for number in count(first) if number not in there)
        if missing < first + int(of):
            name = f"{before}{missing:0{len(of)}}-of-{of}.safetensors"
            raise CheckpointError(f"{directory} has no {name}, and no {INDEX_NAME} that says it is not needed")
