"""What a builder makes of a config.json, and how builders read one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engrampool_proto.errors import SpecError
from engrampool_proto.spec import ModelSpec
from engrampool_proto.token_map import TokenMap

# Far above every model, and small enough that a mistyped config is refused instead of searched primes for.
MAX_NGRAM = 32
MAX_HEADS_PER_NGRAM = 256
_INT32 = 2**31 - 1


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


def integer(config: Mapping[str, Any], key: str, default: int | None = None, low: int = 0, high: int = _INT32) -> int:
    """`config[key]`, an integer in `low` .. `high`; absent or null, `default`. Raises SpecError naming the key."""
    value = default if config.get(key) is None else config[key]
    if type(value) is not int or not low <= value <= high:
        raise SpecError(f"config.json: {key} must be an integer in {low} .. {high}; it is {value!r}")
    return value


def integers(config: Mapping[str, Any], key: str, high: int = _INT32) -> list[int]:
    """`config[key]`, a list of integers in 0 .. `high`, at least one. Raises SpecError naming the key."""
    value = config.get(key)
    if not isinstance(value, list) or not value or not all(type(v) is int and 0 <= v <= high for v in value):
        raise SpecError(f"config.json: {key} must be a list of integers in 0 .. {high}; it is {value!r}")
    return value


def float_dtype(config: Mapping[str, Any], default: str) -> str:
    """The dtype that the config says unquantised weights have. Raises SpecError for one that rows cannot have."""
    key = "dtype" if config.get("torch_dtype") is None else "torch_dtype"
    value = default if config.get(key) is None else config[key]
    if value not in ("bfloat16", "float16", "float32"):
        raise SpecError(f"config.json: {key} must be bfloat16, float16 or float32; it is {value!r}")
    return str(value)
