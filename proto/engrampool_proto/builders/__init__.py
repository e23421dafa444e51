"""From a model's config.json to its specification and to where its rows lie in a Hugging Face checkpoint.

One file a model family. Each offers a `Builder`; `blueprint` picks the one whose config keys are there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engrampool_proto.builders.blueprint import Blueprint, Builder, Part
from engrampool_proto.builders.deepseek import DEEPSEEK_V41, ENGRAM_DEMO
from engrampool_proto.builders.gemma_ple import GEMMA_PLE
from engrampool_proto.builders.longcat import LONGCAT
from engrampool_proto.builders.qwen_ple import QWEN_PLE
from engrampool_proto.errors import SpecError
from engrampool_proto.token_map import TokenMap

BUILDERS: tuple[Builder, ...] = (DEEPSEEK_V41, ENGRAM_DEMO, QWEN_PLE, LONGCAT, GEMMA_PLE)


def load_config(path: Path) -> dict[str, Any]:
    """Read a config.json; where the model's own part lies under `text_config`, that part. Raises SpecError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"{path} cannot be read as a config.json: {error}") from error
    if not isinstance(config, dict):
        raise SpecError(f"{path} is not a JSON object")
    if find_builder(config) is None and isinstance(config.get("text_config"), dict):
        # What stands at the top (eos_token_id, say) holds unless the text part says otherwise.
        return {**config, **config["text_config"]}
    return config


def find_builder(config: Mapping[str, Any]) -> Builder | None:
    """The builder whose keys `config` has, or None."""
    return next((builder for builder in BUILDERS if all(config.get(key) is not None for key in builder.keys)), None)


def blueprint(config: Mapping[str, Any], tokenizer: Path | None = None, name: str | None = None) -> Blueprint:
    """Derive the specification of the model that `config` (see `load_config`) describes.

    tokenizer: its tokenizer.json, which DeepSeek's Engram hashes through; not read for other families.
    name: the model's name; the family's by default.

    Raises SpecError if no family fits, the tokenizer is missing or contradicts the config, or a value is impossible.
    """
    builder = find_builder(config)
    if builder is None:
        known = "; ".join(f"{b.name}: {', '.join(b.keys)}" for b in BUILDERS)
        raise SpecError(f"config.json describes no model that engrampool knows; looked for the keys of {known}")
    token_map = None
    if builder.needs_tokenizer:
        if tokenizer is None:
            raise SpecError(f"a {builder.name} model hashes compressed token ids: its tokenizer.json is needed")
        token_map = TokenMap.from_tokenizer(tokenizer)
    return builder.build(config, token_map, name or builder.name)


__all__ = ["BUILDERS", "Blueprint", "Builder", "Part", "blueprint", "find_builder", "load_config"]
