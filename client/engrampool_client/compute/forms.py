"""The form by numpy, which is the specification of the compiled one, and which of the two a client takes."""

import logging
import os
from collections.abc import Iterable
from functools import cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engrampool_client.config import Compiled
from engrampool_proto.errors import EngrampoolError
from engrampool_proto.hashing import TokenBatch
from engrampool_proto.spec import ModelSpec, RowIds, TableSpec

Keys = npt.NDArray[np.int64]

_log = logging.getLogger("engrampool")
_DISABLED = "NUMBA_DISABLE_JIT is set (or disable_jit in .numba_config.yaml), so that numba compiles nothing"


class Hashing(Protocol):
    """From the tokens of one model to keys and row ids; `Hasher` in engrampool_proto.kernels has it compiled."""

    def rows(self, batch: TokenBatch, layers: Iterable[int]) -> dict[int, RowIds]:
        """As `ModelSpec.hash`: layer -> row ids [T, heads]. Raises BatchError."""

    def keys(self, batch: TokenBatch, layers: Iterable[int]) -> dict[int, Keys]:
        """As `HashFamily.keys`: layer -> int64 [groups, T]. Raises BatchError."""

    def rows_of(self, table: TableSpec, columns: slice, keys: Keys, out: npt.NDArray[Any]) -> None:
        """As `HashFamily.rows_of`, of a table of the model. out: C-contiguous."""


class _NumpyHashing:
    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    def rows(self, batch: TokenBatch, layers: Iterable[int]) -> dict[int, RowIds]:
        return self._spec.hash(batch, layers)

    def keys(self, batch: TokenBatch, layers: Iterable[int]) -> dict[int, Keys]:
        spec = self._spec
        batch.check_tokens(spec.vocab_size, spec.lookback)
        windows = batch.windows(spec.lookback, None if spec.token_map is None else spec.token_map.ids)
        return {layer: spec.table(layer).hash.keys(windows) for layer in layers}

    def rows_of(self, table: TableSpec, columns: slice, keys: Keys, out: npt.NDArray[Any]) -> None:
        table.hash.rows_of(columns, keys, table.head_offsets, out)


class Form:
    """What is computed, by numpy. compiled: whether it is by kernels. why: it is this form, for people."""

    compiled = False

    def __init__(self, why: str) -> None:
        self.why = why

    def hashing(self, spec: ModelSpec) -> Hashing:
        """Of one model, to be kept: what it needs is laid out once."""
        return _NumpyHashing(spec)


NUMPY = Form('compiled="off"')


def choose(setting: Compiled) -> Form:
    """What a client with this setting computes by, said in the log. Raises ValueError for "on" where that cannot be."""
    form = _form(setting)
    _log.info("a client computes by %s: %s", "compiled kernels" if form.compiled else "numpy", form.why)
    return form


@cache
def _form(setting: Compiled) -> Form:
    if setting == "off":
        return NUMPY
    try:
        return _compiled(must=setting == "on")
    except ImportError as error:
        reason = f"numba cannot be imported ({error}); pip install '.[fast]' brings it"
    except Exception as error:  # whatever numba raises, of a file that is damaged for one
        reason = str(error) or repr(error)
    if setting == "on":
        raise ValueError(f'compiled="on" cannot be: {reason}')
    return Form(reason)


def _compiled(must: bool) -> Form:
    """Raises what numba does, and EngrampoolError where it compiles nothing.

    must: also where compiled kernels cannot be kept, so that each start compiles them, for many seconds; else
    EngrampoolError is raised there.
    """
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):  # before numba is imported for nothing
        raise EngrampoolError(_DISABLED)
    # Before our kernels: they leave the settings alone in a process that has numba already, and this one is a host's.
    import numba

    if numba.config.DISABLE_JIT:
        raise EngrampoolError(_DISABLED)
    from engrampool_proto.kernels import jit

    if not must:
        jit.require_cache()
    from engrampool_client.compute.compiled import CompiledForm

    reason = jit.not_kept()
    if reason is not None and not must:
        raise EngrampoolError(f"compiled kernels cannot be kept ({reason})")
    kept = "" if reason is None else f", whose kernels cannot be kept and are compiled at each start ({reason})"
    return CompiledForm(f"numba {numba.__version__}{kept}")
