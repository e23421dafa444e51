"""`engrampool synth --checkpoint-out`: the synthetic rows as a Hugging Face checkpoint, for `pack` to read."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from engrampool_proto.builders import Part, find_builder
from engrampool_proto.builders.stored import STORED_DTYPES
from engrampool_proto.errors import SpecError
from engrampool_proto.spec import Segment, TableSpec
from engrampool_server.files.checkpoint import INDEX_NAME
from engrampool_server.files.safetensors_header import encode_header
from engrampool_server.files.staging import Staging, staging
from engrampool_server.files.synth import SYNTHETIC_SCALE, fill_rows, synthetic_model
from engrampool_server.files.table_writer import BLOCK_BYTES, write_at
from engrampool_server.telemetry.progress import byte_progress

_PREFIX = "model."


def synth_checkpoint(
    like: str, size: int, out: Path, tokenizer: Path | None = None, name: str | None = None, *, quiet: bool = True
) -> None:
    """Write the checkpoint that `pack` makes the same packed model of as `synth` writes (see `synthetic_model`).

    Every tensor gets a file of its own. An interrupted run leaves nothing at `out`, and the next one starts over.

    Raises SpecError, also where the family needs a tokenizer and none is given; OutputError if `out` cannot be written.
    """
    model = synthetic_model(like, size, tokenizer, name)
    builder = find_builder(model.config)
    if tokenizer is None and builder is not None and builder.needs_tokenizer:
        raise SpecError(f"a {like} checkpoint holds a tokenizer.json, which is hashed through: give one (--tokenizer)")
    tensors = [tensor for parts in model.blueprint.parts.values() for part in parts for tensor in part.tensors.values()]
    scales = [name for names in model.blueprint.scales.values() for name in names]
    tensors += scales
    files = {
        tensor: f"model-{number:05}-of-{len(tensors):05}.safetensors" for number, tensor in enumerate(tensors, start=1)
    }
    source = {"rows": "synthetic checkpoint", "model": model.spec.digest}
    with staging(out, source) as stage, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        stage.require_space(model.spec.nbytes + (64 << 20))
        with byte_progress("writing", model.spec.nbytes, quiet=quiet) as bar:
            for table in model.spec.tables:
                start = 0
                for part in model.blueprint.parts[table.layer]:
                    _write_part(stage, pool, table, start, part, files, bar.update)
                    start += part.num_rows
        for tensor in scales:
            header, _ = encode_header([(_PREFIX + tensor, "F32", ())])
            stage.write(files[tensor], header + np.array(SYNTHETIC_SCALE, "<f4").tobytes())
        if tokenizer is not None:
            stage.write("tokenizer.json", tokenizer.read_bytes())
        stage.write("config.json", json.dumps(model.config, indent=2).encode())
        weight_map = {_PREFIX + tensor: file for tensor, file in files.items()}
        index = {"metadata": {"total_size": model.spec.nbytes + 4 * len(scales)}}
        stage.write(INDEX_NAME, json.dumps({**index, "weight_map": weight_map}, indent=2).encode())
        stage.publish()


def _write_part(
    stage: Staging,
    pool: ThreadPoolExecutor,
    table: TableSpec,
    first: int,
    part: Part,
    files: dict[str, str],
    progress: Callable[[int], object],
) -> None:
    """Write the rows first .. first + part.num_rows, each segment into its tensor's file."""
    with ExitStack() as stack:
        outputs: list[tuple[Segment, int, int]] = []  # segment, descriptor, where its data begins
        for segment in table.row_format.segments:
            tensor = part.tensors[segment.name]
            dtype = STORED_DTYPES[segment.dtype][0]
            header, (placed,) = encode_header([(_PREFIX + tensor, dtype, (part.num_rows, segment.length))])
            path = stage.directory / files[tensor]
            descriptor = stack.enter_context(path.open("wb", buffering=0)).fileno()
            write_at(descriptor, memoryview(header), 0)
            outputs.append((segment, descriptor, placed.offset))
        step = max(1, BLOCK_BYTES // table.row_bytes)

        def write_block(at: int) -> int:
            rows = np.empty((min(step, part.num_rows - at), table.row_bytes), np.uint8)
            fill_rows(table, first + at, rows)
            for segment, descriptor, offset in outputs:
                values = np.ascontiguousarray(rows[:, table.row_format.slice_of(segment.name)])
                write_at(descriptor, values.data.cast("B"), offset + at * segment.nbytes)
            return rows.nbytes

        for nbytes in pool.map(write_block, range(0, part.num_rows, step)):
            progress(nbytes)
        for _, descriptor, _ in outputs:
            os.fsync(descriptor)
