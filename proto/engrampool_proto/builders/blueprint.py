"""What a builder makes of a config.json, and how builders read one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engrampool_proto.builders.stored import Stored
from engrampool_proto.errors import SpecError
from engrampool_proto.spec import ModelSpec, TableSpec
from engrampool_proto.token_map import TokenMap

# Far above every model, and small enough that a mistyped config is refused instead of searched primes for.
MAX_NGRAM = 32
MAX_HEADS_PER_NGRAM = 256
_INT32 = 2**31 - 1
# Engines pad a table so that it splits evenly; nothing is known to need more.
_PADDING_ROWS = 4096


@dataclass(frozen=True)
class Part:
    """`num_rows` consecutive rows of a table as a checkpoint holds them.

    tensors: segment name -> tensor name [num_rows or a few more, segment length].
    """

    num_rows: int
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class Blueprint:
    """spec: the resolved specification, before a checkpoint was seen.

    parts: layer -> its rows in the checkpoint, in order; together they are the table.
    scales: layer -> names of scalar tensors that hold one and the same number, to become `TableSpec.scale`; layers
        without any are left out.
    constants: tensor name -> the integers of the hash that it must hold if the checkpoint has it.
    rows_stated: whether the config tells the row format for certain; else it is a guess until tensors were seen.

    Names are in full where the checkpoint was seen, else to be found under any prefix.
    """

    spec: ModelSpec
    parts: Mapping[int, tuple[Part, ...]]
    scales: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    constants: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    rows_stated: bool = False


@dataclass(frozen=True)
class Builder:
    """One model family.

    keys: the config keys that tell it; any of these sets. words: one of them is in the name of each of its tensors.
    build(config, token_map, name, stored): derives the rest; stored: the checkpoint's tensors, None where only the
    config is there.
    """

    name: str
    keys: tuple[tuple[str, ...], ...]
    words: tuple[str, ...]
    needs_tokenizer: bool
    build: Callable[[Mapping[str, Any], TokenMap | None, str, Stored | None], Blueprint]

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Whether `config` has the keys."""
        return any(all(config.get(key) is not None for key in keys) for keys in self.keys)


def spare_rows(table: TableSpec) -> int:
    """Rows that may follow the last head's without making the config doubtful: padding, less than another head."""
    return max(_PADDING_ROWS, min(table.hash.head_rows()) - 1)


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


def end_of_text(config: Mapping[str, Any]) -> int:
    """`config["eos_token_id"]`, the one token id that ends a look-back. Raises SpecError, for a list of several too."""
    listed = config.get("eos_token_id")
    if isinstance(listed, list) and len(listed) > 1:
        raise SpecError(
            f"config.json: eos_token_id is a list, {listed}, and the hash knows one token that ends a text: say which "
            "the model was trained with, as `engrampool pack --eos-token-id ID`"
        )
    one = {"eos_token_id": listed[0] if isinstance(listed, list) and listed else listed}
    return integer(one, "eos_token_id", high=integer(config, "vocab_size", low=1) - 1)


def float_dtype(config: Mapping[str, Any], default: str) -> str:
    """The dtype that the config says unquantised weights have. Raises SpecError for one that rows cannot have."""
    key = "dtype" if config.get("torch_dtype") is None else "torch_dtype"
    value = default if config.get(key) is None else config[key]
    if value not in ("bfloat16", "float16", "float32"):
        raise SpecError(f"config.json: {key} must be bfloat16, float16 or float32; it is {value!r}")
    return str(value)
