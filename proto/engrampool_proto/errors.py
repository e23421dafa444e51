"""The errors that the contract itself can raise; server and client derive theirs from `EngrampoolError`."""


class EngrampoolError(Exception):
    """Base of every error that engrampool raises on purpose. The text says what was wrong and what to do."""


class SpecError(EngrampoolError, ValueError):
    """A model specification, config.json or tokenizer.json cannot be what it claims to be."""


class BatchError(EngrampoolError, ValueError):
    """A batch of tokens or row ids was refused: wrong dtype or shape, boundaries not ascending, an id out of range.

    The caller must change the call.
    """


class WireError(EngrampoolError, ValueError):
    """Message bytes are truncated, malformed or not the message they should be."""


def how_to_install(extra: str) -> str:
    """For error texts: what to type to get the packages of an extra. No registry has ours under its bare name."""
    return f"pip install '.[{extra}]' in engrampool's source directory, or a wheel built there with [{extra}]"
