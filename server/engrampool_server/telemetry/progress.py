"""The progress bar of commands that move bytes."""

from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm


def byte_progress(action: str, total_bytes: int, done_bytes: int = 0, quiet: bool = False) -> "tqdm[NoReturn]":
    """A bar on standard error that counts bytes; none where that is no terminal. `update` it from one thread."""
    from tqdm import tqdm  # a server, which imports this module too, shows no bar

    return tqdm(
        desc=action,
        total=total_bytes,
        initial=done_bytes,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=True if quiet else None,  # None: off unless standard error is a terminal
    )
