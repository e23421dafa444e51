"""The token map ("compressed tokenizer") of DeepSeek's Engram: token ids that read alike share one id."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from engrampool_proto.errors import EngrampoolError, SpecError, how_to_install
from engrampool_proto.lfs import ADVICE, is_pointer


@dataclass(frozen=True, eq=False)
class TokenMap:
    """ids: int32 [vocab_size]; ids[token] is the token's id in the compressed vocabulary of `size` entries.

    Raises SpecError unless the ids are exactly 0 .. size - 1, as every map in order of first appearance is.
    """

    ids: npt.NDArray[np.int32]

    def __post_init__(self) -> None:
        if self.ids.dtype != np.int32 or self.ids.ndim != 1 or not len(self.ids):
            raise SpecError(f"a token map is int32 [vocab_size]; this is {self.ids.dtype} {list(self.ids.shape)}")
        # The size is compared first: a damaged id of 2**31 - 1 must not make an array as large.
        if self.size > len(self.ids) or not np.array_equal(np.unique(self.ids), np.arange(self.size)):
            raise SpecError(f"a token map uses every id from 0 to its largest; this one skips some below {self.size}")
        self.ids.flags.writeable = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenMap) and np.array_equal(self.ids, other.ids)

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def vocab_size(self) -> int:
        """Token ids that it maps."""
        return len(self.ids)

    @cached_property
    def size(self) -> int:
        """Entries of the compressed vocabulary."""
        return int(np.max(self.ids)) + 1

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of the ids as little-endian int32, 32 hexadecimal digits."""
        return xxhash.xxh3_128_hexdigest(self.ids.astype("<i4").tobytes())

    def to_json(self) -> dict[str, Any]:
        """Digest and size in the clear, the ids as base64 of little-endian int32."""
        ids = base64.b64encode(self.ids.astype("<i4").tobytes()).decode()
        return {"digest": self.digest, "vocab_size": self.vocab_size, "size": self.size, "ids": ids}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> "TokenMap":
        """Inverse of `to_json`. Raises SpecError if the ids are not what the digest and the sizes were taken of."""
        try:
            raw = base64.b64decode(document["ids"], validate=True)
            ids = np.frombuffer(raw, "<i4").astype(np.int32)
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(f"unreadable token map: {error!r}") from error
        token_map = cls(ids)
        for name, found in token_map.to_json().items():
            if document.get(name) != found:
                shown = "other bytes" if name == "ids" else repr(found)
                raise SpecError(f"token map is damaged: its {name} is {shown}, not {document.get(name)!r:.40}")
        return token_map

    @classmethod
    def from_tokenizer(cls, path: Path) -> "TokenMap":
        """Build the map of a tokenizer.json, as deepseek-ai/Engram's `CompressedTokenizer` does.

        Each id is decoded alone, special tokens kept. Text with U+FFFD (a piece of a character) is keyed by the raw
        vocabulary token; other text by its NFKC, NFD, accent-free, lower-case form with runs of white space made one
        space and the ends stripped, or by itself if nothing is left. Ids are given in order of first appearance.

        Raises SpecError if the file cannot be read as a tokenizer or skips an id, EngrampoolError if `tokenizers` is
        not installed.
        """
        try:
            from tokenizers import Regex, Tokenizer, normalizers
        except ImportError as error:
            raise EngrampoolError(
                f"reading a tokenizer.json needs the 'tokenizers' package: {how_to_install('tokenizer')}"
            ) from error
        try:
            raw = path.read_bytes()
            if is_pointer(raw):
                raise SpecError(f"{path} {ADVICE}")
            tokenizer = Tokenizer.from_str(raw.decode("utf-8-sig"))
        except Exception as error:  # `tokenizers` raises plain Exception for a bad file
            if isinstance(error, SpecError):
                raise
            raise SpecError(f"{path} cannot be read as a tokenizer.json: {error}") from error
        # A private-use character holds the place of a lone space, which stripping would make empty.
        placeholder = "\ue000"
        normalizer = normalizers.Sequence(
            [
                normalizers.NFKC(),
                normalizers.NFD(),
                normalizers.StripAccents(),
                normalizers.Lowercase(),
                normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
                normalizers.Replace(Regex(r"^ $"), placeholder),
                normalizers.Strip(),
                normalizers.Replace(placeholder, " "),
            ]
        )
        vocab_size = _count_ids(path, tokenizer.get_vocab(with_added_tokens=True))
        texts = tokenizer.decode_batch([[token] for token in range(vocab_size)], skip_special_tokens=False)
        new_ids: dict[str, int] = {}
        ids = np.empty(vocab_size, np.int32)
        for token, text in enumerate(texts):
            if "\ufffd" in text:
                key = tokenizer.id_to_token(token)
                if key is None:
                    raise SpecError(f"{path} has no token {token}, although it counts {vocab_size}")
            else:
                key = normalizer.normalize_str(text) or text
            ids[token] = new_ids.setdefault(key, len(new_ids))
        return cls(ids)


def _count_ids(path: Path, vocabulary: Mapping[str, int]) -> int:
    """How many token ids there are. Raises SpecError naming what is wrong unless each is one token's, from 0 on."""
    tokens: dict[int, str] = {}
    for token, number in vocabulary.items():
        if number in tokens:
            raise SpecError(f"{path} gives two tokens the id {number}: {tokens[number]!r} and {token!r}")
        tokens[number] = token
    if not tokens:
        raise SpecError(f"{path} has no tokens")
    missing = sorted(set(range(max(tokens))) - tokens.keys())
    if missing:
        named = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise SpecError(
            f"{path} has tokens up to the id {max(tokens)}, and none with the id {named}; a token map needs one for "
            "every id. Give those ids the placeholders that the model was trained with"
        )
    return len(tokens)
