"""Compiling kernels with numba: when their module is imported, to run without the GIL, kept on disk where possible."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

from numba import config, njit, types

from engrampool_proto.errors import EngrampoolError

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

_not_kept: dict[str, str] = {}


def kernel(*signatures: Any) -> Callable[[Kernel], Kernel]:
    """Compile a function for each of `signatures` at once, so that no request waits for a compiler.

    What was compiled is kept in NUMBA_CACHE_DIR, else beside the source, else in the user's cache directory. Where none
    can be written it is compiled at each start; `not_kept` tells.
    """

    def compile_now(function: Kernel) -> Kernel:
        try:
            compiled: Kernel = njit(list(signatures), nogil=True, cache=True)(function)
        except (RuntimeError, OSError) as error:  # no directory to write to; no space left in it
            _not_kept[function.__name__] = str(error).replace(os.linesep, " ")
            compiled = njit(list(signatures), nogil=True)(function)
        return compiled

    return compile_now


def require_compiler() -> None:
    """Raise EngrampoolError where kernels are not compiled: as Python they are slow, and overflow otherwise."""
    if config.DISABLE_JIT:
        raise EngrampoolError(
            "numba compiles nothing, since NUMBA_DISABLE_JIT is set (or disable_jit in .numba_config.yaml), and the "
            "server cannot do without; unset it"
        )


def not_kept() -> str | None:
    """Why compiled kernels could not be kept on disk; None where all were."""
    return next(iter(_not_kept.values()), None)


def view(dtype: Any, ndim: int = 1, layout: str = "C") -> Any:
    """The type of an array that is only read. It may be writable, and lie at any address, as views of messages do."""
    return types.Array(dtype, ndim, layout, readonly=True, aligned=False)
