"""What a checkpoint holds, as its headers say."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

from engrampool_proto.errors import SpecError

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


@dataclass(frozen=True)
class StoredTensor:
    """name: in full. dtype: as the header has it, "BF16" for instance."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """The tensors of a checkpoint.

    names: of all of them. describe: dtype and shape of one of them; called for few. words: `find` knows only names with
    one of these in it; all names by default. A large model has 300 000 tensors, a few of them tables.
    """

    names: Collection[str]
    describe: Callable[[str], tuple[str, tuple[int, ...]]]
    words: Sequence[str] = ("",)

    @cached_property
    def _by_suffix(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.names:
            if any(word in name for word in self.words):
                starts = [0, *(at + 1 for at, letter in enumerate(name) if letter == ".")]
                for start in starts:
                    found.setdefault(name[start:], []).append(name)
        return found

    def find(self, *suffixes: str) -> StoredTensor | None:
        """The first of these names that is there, under any prefix that ends at a dot.

        Raises SpecError if it is there under two.
        """
        for suffix in suffixes:
            names = self._by_suffix.get(suffix, [])
            if len(names) > 1:
                raise SpecError(f"the checkpoint has two tensors {suffix}: {names[0]} and {names[1]}")
            if names:
                return StoredTensor(names[0], *self.describe(names[0]))
        return None

    def need(self, choices: Sequence[Sequence[str]]) -> list[StoredTensor]:
        """For each choice of names the tensor that is there. Raises SpecError naming the first that is not."""
        found = [self.find(*names) for names in choices]
        missing = [names[0] for names, tensor in zip(choices, found, strict=True) if tensor is None]
        if missing:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise SpecError(f"the checkpoint has no tensor {missing[0]} under any prefix{others}; config.json needs it")
        return [tensor for tensor in found if tensor is not None]
