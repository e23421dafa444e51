"""Compiling kernels with numba: when their module is imported, to run without the GIL, kept on disk where possible.

`python -m engrampool_proto.kernels.jit` compiles all of them ahead, for each level of processor, into the installed
package: whoever can read it starts without a compiler's seconds, from a read-only file system and as any user.
"""

import hashlib
import os
import pkgutil
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TypeVar

import llvmlite.binding
from numba import config, njit, types
from numba.core.caching import FunctionCache, InTreeCacheLocator
from numba.core.registry import CPUDispatcher

from engrampool_proto.errors import EngrampoolError
from engrampool_proto.kernels import NUMBA_IS_OTHERS

Kernel = TypeVar("Kernel", bound=Callable[..., Any])

# Items of a small batch, whatever they are: to hash, find or copy them takes a fraction of a millisecond.
FEW = 1024
AHEAD = Path(__file__).with_name("compiled")
# As LLVM calls them, the best first, and what each has beyond the next. Everything else is "generic".
_X86_LEVELS = {
    "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl",
    "x86-64-v3": "avx avx2 bmi bmi2 f16c fma lzcnt movbe",
    "x86-64-v2": "cx16 popcnt sahf sse3 sse4.1 sse4.2 ssse3",
}
_LOCATORS = "NUMBA_CACHE_LOCATOR_CLASSES"
_OURS = "engrampool_proto.kernels.jit.AheadCacheLocator"

# What a kernel may be made of, where numba looks at its own file only: other kernels, and how frames are laid out.
_FILES = (*sorted(AHEAD.parent.glob("*.py")), AHEAD.parent.with_name("frames.py"))
_SOURCES = hashlib.sha256(b"".join(file.read_bytes() for file in _FILES)).hexdigest()

_not_kept: dict[str, str] = {}
_reads_ahead = False


class AheadCacheLocator(InTreeCacheLocator):  # type: ignore[misc]
    """Where numba finds what was compiled ahead. numba's own locators read only from where they could write."""

    def __init__(self, py_func: Any, py_file: str) -> None:
        super().__init__(py_func, py_file)
        self._source = Path(py_file)
        self._cache_path = str(AHEAD / config.CPU_NAME)

    def ensure_cache_path(self) -> None:
        """Nothing: it is there, and may be read-only."""

    def get_source_stamp(self) -> str:
        """Of the file's bytes, as installing, copying and image layers change its time."""
        return hashlib.sha256(self._source.read_bytes()).hexdigest()

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> Self | None:
        """Always, as whoever names this class has seen to it that there is something."""
        return cls(py_func, py_file)


class _Cache(FunctionCache):  # type: ignore[misc]
    """numba's, for which a kernel is another one also by `nogil`, and where what it calls elsewhere has changed."""

    nogil = True

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        return (*super()._index_key(sig, codegen), _SOURCES, self.nogil)


class _Dispatcher(CPUDispatcher):  # type: ignore[misc]
    def enable_caching(self) -> None:
        """As numba does."""
        self._cache = _Cache(self.py_func)
        self._cache.nogil = self.targetoptions["nogil"]


class _BySize(_Dispatcher):
    """Lets others have the GIL, but for a few items of one argument: `held` is the same, and keeps it."""

    held: Any
    counted: int

    def __call__(self, *arguments: Any) -> Any:
        few = arguments[self.counted].size <= FEW
        return self.held(*arguments) if few else super().__call__(*arguments)


def kernel(*signatures: Any, nogil: bool = True, counted: int | None = None) -> Callable[[Kernel], Kernel]:
    """Compile a function for each of `signatures` at once, so that no request waits for a compiler.

    nogil: let others have the GIL meanwhile. Where a thread of Python is busy it takes milliseconds to get it back, so
    what never waits, and takes microseconds, keeps it.
    counted: the argument, an array, that says how much there is to do: of FEW items the GIL is kept.
    What was compiled ahead is read. Else what is compiled is kept in NUMBA_CACHE_DIR, else beside the source, else in
    the user's cache directory. Where none can be written it is compiled at each start; `not_kept` tells.
    """

    def compile_now(function: Kernel) -> Kernel:
        if config.DISABLE_JIT:
            return function
        # As `njit` makes it, but for the cache.
        options = {"nopython": True, "nogil": nogil, "boundscheck": None}
        compiled = (_Dispatcher if counted is None else _BySize)(function, targetoptions=options)
        forms = [compiled]
        if counted is not None:
            compiled.held = _Dispatcher(function, targetoptions={**options, "nogil": False})
            compiled.counted = counted
            forms.append(compiled.held)
        try:
            for form in forms:
                form.enable_caching()
                for signature in signatures:
                    form.compile(signature)
                form.disable_compile()
        except Exception as error:  # no directory to write to, no space left in it, damaged files, whatever they hold
            if _reads_ahead:
                _leave_ahead()
                return compile_now(function)
            _not_kept[function.__name__] = f"{type(error).__name__}: {error}".replace(os.linesep, " ")
            compiled = njit(list(signatures), nogil=nogil)(function)
        kept: Kernel = compiled
        return kept

    return compile_now


def require_compiler() -> None:
    """Raise EngrampoolError where kernels are not compiled: as Python they are slow, and overflow otherwise."""
    if config.DISABLE_JIT:
        raise EngrampoolError(
            "numba compiles nothing, since NUMBA_DISABLE_JIT is set (or disable_jit in .numba_config.yaml), and the "
            "server cannot do without; unset it"
        )


def require_cache() -> None:
    """Raise EngrampoolError where compiled kernels can be kept nowhere, before any is compiled."""
    try:
        FunctionCache(require_cache)
    except RuntimeError as error:
        raise EngrampoolError(f"compiled kernels cannot be kept ({error})") from error


def not_kept() -> str | None:
    """Why compiled kernels could not be kept on disk; None where all were."""
    return next(iter(_not_kept.values()), None)


def view(dtype: Any, ndim: int = 1, layout: str = "C") -> Any:
    """The type of an array that is only read. It may be writable, and lie at any address, as views of messages do."""
    return types.Array(dtype, ndim, layout, readonly=True, aligned=False)


def level() -> str:
    """The best level that this processor, and what lets us have of it, is of."""
    if platform.machine() != "x86_64":
        return "generic"
    features = llvmlite.binding.get_host_cpu_features()
    best = "generic"
    for name, needed in reversed(_X86_LEVELS.items()):
        if not all(features.get(feature, False) for feature in needed.split()):
            break
        best = name
    return best


def compile_ahead(*levels: str) -> None:
    """Compile every kernel for these levels, all by default, into AHEAD.

    Raises subprocess.CalledProcessError where that fails, after a message of its own.
    """
    x86 = _X86_LEVELS if platform.machine() == "x86_64" else ()
    modules = ", ".join(f"engrampool_proto.kernels.{one.name}" for one in pkgutil.iter_modules([str(AHEAD.parent)]))
    code = f"import sys, {modules}; sys.exit(engrampool_proto.kernels.jit.not_kept())"
    for name in levels or (*x86, "generic"):
        (AHEAD / name).mkdir(parents=True, exist_ok=True)
        environ = {**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": "", _LOCATORS: _OURS}
        subprocess.run([sys.executable, "-c", code], env=environ, check=True)  # noqa: S603


def _use_ahead() -> None:
    """Read what was compiled ahead for this processor, unless somebody told numba otherwise, or uses it already."""
    global _reads_ahead
    if NUMBA_IS_OTHERS:
        return
    name = os.environ.get("NUMBA_CPU_NAME") or level()
    if (AHEAD / name).is_dir() and not {"NUMBA_CPU_FEATURES", _LOCATORS} & os.environ.keys():
        # In the environment, as numba reads all of it again whenever something there has changed.
        os.environ |= {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": "", _LOCATORS: _OURS}
        config.reload_config()
        _reads_ahead = True


def _leave_ahead() -> None:
    """Look where numba does by itself: what was compiled ahead is of other sources or another numba, or damaged."""
    global _reads_ahead
    del os.environ[_LOCATORS]
    config.reload_config()
    _reads_ahead = False


if __name__ == "__main__":
    compile_ahead(*sys.argv[1:])
else:
    _use_ahead()
