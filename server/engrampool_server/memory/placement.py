"""What part of a model a server is to hold, by its settings."""

import json
from pathlib import Path

from engrampool_proto.errors import EngrampoolError, SpecError
from engrampool_proto.sharding import Part, cut, is_shard_name, parse_shard, placed, whole
from engrampool_proto.spec import ModelSpec
from engrampool_server.config import ServerConfig


class ShardError(EngrampoolError):
    """A placement cannot be read, or has no shard of the name that was asked for."""


def part_of(spec: ModelSpec, config: ServerConfig) -> Part:
    """The rows of a model that a server of these settings holds.

    Raises ShardError for a placement that is unreadable or has no such shard, SpecError for one that does not fit the
    model, and for more shards than the model can be cut into.
    """
    if config.shard == "all":
        return whole(spec)
    if not is_shard_name(config.shard):
        index, count = parse_shard(config.shard)
        return cut(spec, count, config.shard_by)[index]
    file = Path(config.placement)
    parts = read_placement(file, spec)
    if config.shard not in parts:
        raise ShardError(f"{file} has no shard {config.shard} of {spec.name}; it has {', '.join(parts)}")
    return parts[config.shard]


def read_placement(file: Path, spec: ModelSpec) -> dict[str, Part]:
    """The parts of a model by name; docs/OPERATIONS.md has the form. Raises ShardError, SpecError."""
    try:
        return placed(json.loads(file.read_bytes()), spec)
    except OSError as error:
        raise ShardError(f"cannot read {file}: {error.strerror}") from error
    except SpecError as error:
        raise SpecError(f"{file}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{file} is not JSON: {error}") from error
