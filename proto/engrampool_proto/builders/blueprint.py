"""What a builder makes of a config.json, and how builders read one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engrampool_proto.errors import SpecError
from engrampool_proto.spec import ModelSpec
from engrampool_proto.token_map import TokenMap


@dataclass(frozen=True)
class Part:
    """`num_rows` consecutive rows of a table as a checkpoint holds them.

    tensors: segment name -> tensor name [num_rows, segment length], to be found under any prefix.
    """

    num_rows: int
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class Blueprint:
    """spec: the resolved specification, before a checkpoint was seen.

    parts: layer -> its rows in the checkpoint, in order; together they are the table.
    scales: layer -> name of a scalar tensor to become `TableSpec.scale`; layers without one are left out.
    """

    spec: ModelSpec
    parts: Mapping[int, tuple[Part, ...]]
    scales: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Builder:
    """One model family. `keys` are the config keys that tell it; `build(config, token_map, name)` derives the rest."""

    name: str
    keys: tuple[str, ...]
    needs_tokenizer: bool
    build: Callable[[Mapping[str, Any], TokenMap | None, str], Blueprint]


def integer(config: Mapping[str, Any], key: str, default: int | None = None, low: int = 0) -> int:
    """`config[key]`, an integer of at least `low`. Raises SpecError naming the key."""
    value = config.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise SpecError(f"config.json: {key} must be an integer of at least {low}; it is {value!r}")
    return value


def integers(config: Mapping[str, Any], key: str) -> list[int]:
    """`config[key]`, a list of non-negative integers, at least one. Raises SpecError naming the key."""
    value = config.get(key)
    if not isinstance(value, list) or not value or not all(type(v) is int and v >= 0 for v in value):
        raise SpecError(f"config.json: {key} must be a list of integers; it is {value!r}")
    return value


def float_dtype(config: Mapping[str, Any], default: str) -> str:
    """The dtype that the config says unquantised weights have. Raises SpecError for one that rows cannot have."""
    value = config.get("torch_dtype") or config.get("dtype") or default
    if value not in ("bfloat16", "float16", "float32"):
        raise SpecError(f"config.json: torch_dtype must be bfloat16, float16 or float32; it is {value!r}")
    return str(value)
