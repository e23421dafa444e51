"""What an engine's adapter is set by, beside its client: variables of the environment."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Self

# Before the names of settings, in capitals. Those of the client have a prefix of their own.
ENGINE_PREFIX = "ENGRAMPOOL_ENGINE_"


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """The settings of one worker's adapter. Raises ValueError for one that is out of its range."""

    verify: bool = False
    """Compare row ids with the engine's own in every forward, and rows with those of `verify_checkpoint`."""

    verify_checkpoint: str | None = None
    """A directory with the model's checkpoint, tables included, rows of which are compared, too."""

    metrics_port: int | None = None
    """Prometheus is answered on this port plus the worker's rank; None: nowhere."""

    ahead_tokens: int | None = None
    """Of a prompt, so many tokens' rows are fetched before their forward at most; None: as many as a forward has."""

    early_decode: bool = True
    """Ask for a sampled token's rows when its copy has come to the host, before its forward is prepared."""

    def __post_init__(self) -> None:
        if self.metrics_port is not None and not 0 < self.metrics_port < 1 << 16:
            raise ValueError("a port is 1 .. 65535")
        if self.ahead_tokens is not None and self.ahead_tokens < 0:
            raise ValueError("it must be 0 or more")

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Self:
        """As variables have them; what is empty counts as not set. Raises ValueError that names the variable."""
        kinds = {setting.name: setting.type for setting in fields(cls)}
        found: dict[str, object] = {}
        for variable, text in environ.items():
            if not variable.startswith(ENGINE_PREFIX) or not text:
                continue
            name = variable.removeprefix(ENGINE_PREFIX).lower()
            if name not in kinds or variable != ENGINE_PREFIX + name.upper():
                close = get_close_matches(name, kinds, 1)
                meant = f"; {ENGINE_PREFIX}{close[0].upper()} was meant, perhaps" if close else ""
                raise ValueError(f"{variable}: an engine's adapter has no such setting{meant}")
            try:
                found[name] = _value(kinds[name], text)
                cls(**{name: found[name]})  # type: ignore[arg-type]
            except ValueError as error:
                raise ValueError(f"{variable}={text!r} is not allowed: {error}") from error
        return cls(**found)  # type: ignore[arg-type]


def _value(kind: object, text: str) -> object:
    if kind is bool:
        flags = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in flags:
            raise ValueError("it must be true or false")
        return flags[text.lower()]
    return text if kind == str | None else int(text)
