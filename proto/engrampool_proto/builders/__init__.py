"""From a model's config.json to its specification and to where its rows lie in a Hugging Face checkpoint.

One file a model family. Each offers a `Builder`; `blueprint` picks the one whose config keys are there.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from engrampool_proto.builders.blueprint import Blueprint, Builder, Part
from engrampool_proto.builders.deepseek import DEEPSEEK_V41, ENGRAM_DEMO
from engrampool_proto.builders.gemma_ple import GEMMA_PLE
from engrampool_proto.builders.longcat import LONGCAT
from engrampool_proto.builders.qwen_ple import QWEN_PLE
from engrampool_proto.builders.stored import Stored
from engrampool_proto.errors import SpecError
from engrampool_proto.lfs import ADVICE, is_pointer
from engrampool_proto.token_map import TokenMap

BUILDERS: tuple[Builder, ...] = (DEEPSEEK_V41, ENGRAM_DEMO, QWEN_PLE, LONGCAT, GEMMA_PLE)


def load_config(path: Path) -> dict[str, Any]:
    """Read a config.json; where the model's own part lies under `text_config`, that part. Raises SpecError."""
    try:
        raw = path.read_bytes()
        if is_pointer(raw):
            raise SpecError(f"{path} {ADVICE}")
        config = json.loads(raw)  # of bytes, so that a byte order mark is one
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"{path} cannot be read as a config.json: {error}") from error
    if not isinstance(config, dict):
        raise SpecError(f"{path} is not a JSON object")
    text = config.get("text_config")
    if isinstance(text, dict) and (find_builder(text) or find_builder(config) is None):
        # What stands at the top (eos_token_id, say) holds unless the text part says otherwise.
        return {**config, **{key: value for key, value in text.items() if value is not None}}
    return config


def find_builder(config: Mapping[str, Any]) -> Builder | None:
    """The builder whose keys `config` has, or None."""
    return next((builder for builder in BUILDERS if builder.fits(config)), None)


def blueprint(
    config: Mapping[str, Any],
    tokenizer: Path | None = None,
    name: str | None = None,
    *,
    eos_token_id: int | None = None,
    stored: Stored | None = None,
) -> Blueprint:
    """Derive the specification of the model that `config` (see `load_config`) describes.

    tokenizer: its tokenizer.json, which DeepSeek's Engram hashes through; not read for other families.
    name: the model's name; the family's by default.
    eos_token_id: which one of the config's ends a text, where it has a list of them.
    stored: the checkpoint's tensors, which say how rows are stored; without them it is what the config says.

    Raises SpecError if no family fits, the tokenizer is missing or contradicts the config, a value is impossible, or
    tensors are not there.
    """
    builder = find_builder(config)
    if builder is None:
        known = "; ".join(f"{b.name}: {' or '.join(', '.join(keys) for keys in b.keys)}" for b in BUILDERS)
        raise SpecError(f"config.json describes no model that engrampool knows; looked for the keys of {known}")
    if eos_token_id is not None:
        config = {**config, "eos_token_id": _one_of(config.get("eos_token_id"), eos_token_id)}
    token_map = None
    if builder.needs_tokenizer:
        if tokenizer is None:
            raise SpecError(f"a {builder.name} model hashes compressed token ids: its tokenizer.json is needed")
        token_map = TokenMap.from_tokenizer(tokenizer)
    among = None if stored is None else replace(stored, words=builder.words)
    made = builder.build(config, token_map, name or builder.name, among)
    if among is None:
        return made
    found = [(among.find(name), values) for name, values in made.constants.items()]
    return replace(made, constants={tensor.name: values for tensor, values in found if tensor is not None})


def _one_of(stated: Any, chosen: int) -> int:
    """The choice, unless the config rules it out. Raises SpecError."""
    if stated is not None and chosen not in (stated if isinstance(stated, list) else [stated]):
        raise SpecError(f"config.json says eos_token_id {stated!r}, which {chosen} is none of")
    return chosen


__all__ = ["BUILDERS", "Blueprint", "Builder", "Part", "Stored", "blueprint", "find_builder", "load_config"]
