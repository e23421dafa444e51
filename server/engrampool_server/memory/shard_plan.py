"""What the servers of a sharded model hold and need, before there is any of them."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engrampool_proto.builders import blueprint, load_config
from engrampool_proto.sharding import Part, is_shard_name, part_nbytes, placement_json
from engrampool_proto.spec import ModelSpec, TableSpec
from engrampool_server.files.checkpoint import Checkpoint, CheckpointError
from engrampool_server.files.raw_model import RawModel
from engrampool_server.files.sources import Location
from engrampool_server.files.table_files import PackedModel
from engrampool_server.memory.preflight import Need, format_bytes


@dataclass(frozen=True)
class ShardPlan:
    """What each of the servers of a model holds and needs.

    parts: by the value of `shard`. how: the other settings that make these parts, as flags of `serve`.
    replicas: servers of each part. workers, answer_bytes: settings of each server.
    """

    spec: ModelSpec
    parts: Mapping[str, Part]
    how: str
    replicas: int
    workers: int
    answer_bytes: int

    @cached_property
    def needs(self) -> dict[str, Need]:
        """By shard, what preflight would ask a machine for."""
        return {
            shard: Need(
                part_nbytes(self.spec, part),
                files=0,
                tables=len(part),
                answer_bytes=self.answer_bytes,
                workers=self.workers,
            )
            for shard, part in self.parts.items()
        }

    @property
    def memory_bytes(self) -> int:
        """Of all servers."""
        return sum(need.memory_bytes for need in self.needs.values()) * self.replicas

    def to_json(self) -> dict[str, Any]:
        """JSON types; bytes. `placement` is what `--placement` reads."""
        names = {shard: shard if is_shard_name(shard) else shard.replace("/", "-of-") for shard in self.parts}
        return {
            "model": self.spec.name,
            "nbytes": self.spec.nbytes,
            "serve": self.how,
            "replicas": self.replicas,
            "servers": len(self.parts) * self.replicas,
            "memory_bytes": self.memory_bytes,
            "shards": [
                {
                    "shard": shard,
                    "nbytes": need.table_bytes,
                    "memory_bytes": need.memory_bytes,
                    "tables": [
                        {"layer": layer, "row_start": rows.start, "row_stop": rows.stop}
                        for layer, rows in self.parts[shard].items()
                    ],
                }
                for shard, need in self.needs.items()
            ],
            "placement": placement_json(self.spec, {names[shard]: part for shard, part in self.parts.items()}),
        }

    def __str__(self) -> str:
        """A line for each shard, one for each of its tables, and what all of it comes to."""
        share = self.spec.nbytes / len(self.parts)
        lines = [f"{self.spec.name}: {format_bytes(self.spec.nbytes, up=True)} of rows; each server: serve {self.how}"]
        for shard, need in self.needs.items():
            lines.append(
                f"--shard {shard}: {format_bytes(need.table_bytes, up=True)} of rows, "
                f"{need.table_bytes / share:.3f} of an equal share; memory {format_bytes(need.memory_bytes, up=True)}"
            )
            lines += [
                f"    {table.name}: rows {rows.start} .. {rows.stop - 1}, {_heads(table, rows)}"
                for table, rows in ((self.spec.table(layer), rows) for layer, rows in self.parts[shard].items())
            ]
        beside = next(iter(self.needs.values()))
        lines.append(
            f"{len(self.parts)} shards x {self.replicas}: {len(self.parts) * self.replicas} servers, "
            f"{format_bytes(self.memory_bytes, up=True)} of memory in all"
        )
        lines.append(
            f"memory: the rows, {format_bytes(beside.working_bytes, up=True)} for {self.workers} workers and answers "
            "(max_in_flight_bytes), and page tables (none to speak of with memory = hugetlb)"
        )
        return "\n".join(lines)


def _heads(table: TableSpec, rows: range) -> str:
    """Which heads have rows among these."""
    starts = [int(start) for start in table.head_offsets]
    stops = [*starts[1:], table.num_rows]
    there = [at for at in range(len(starts)) if starts[at] < rows.stop and stops[at] > rows.start]
    split = starts[there[0]] < rows.start or stops[there[-1]] > rows.stop
    which = f"head {there[0]}" if len(there) == 1 else f"heads {there[0]} .. {there[-1]}"
    return f"{which} of {len(starts)}{', not all of their rows' if split else ''}"


def spec_of(location: Location) -> ModelSpec:
    """What a packed model, or a checkpoint of which there are config.json and tokenizer.json at least, consists of."""
    if RawModel.lies_in(location):
        tokenizer = location / "tokenizer.json"
        config = load_config(location / "config.json")
        listed = config.get("eos_token_id")
        eos = listed[0] if isinstance(listed, list) and listed else None  # what is held is the same with any
        with suppress(CheckpointError), Checkpoint.open(location, None, eos) as checkpoint:
            return checkpoint.spec  # its tensors tell how long rows are, where the config does not
        return blueprint(config, tokenizer if tokenizer.is_file() else None, eos_token_id=eos).spec
    with PackedModel.open(location) as packed:
        return packed.spec
