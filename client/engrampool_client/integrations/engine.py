"""What every engine's plugin checks: that this is the engine it was written for, and that its tables are served."""

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_client.client import Client
from engrampool_client.config import ENVIRONMENT_PREFIX
from engrampool_client.errors import FingerprintError

# Values of a row that share a scale.
BLOCK = 32


def check_version(engine: str, version: str, found: str) -> None:
    """Raise RuntimeError for another version of an engine than the one written for, in whatever build (+cu130)."""
    if found.partition("+")[0] != version:
        raise RuntimeError(
            f"engrampool takes the place of parts of {engine} {version}, and this is {engine} {found}: install "
            f"{engine.lower()}=={version} or an engrampool for this one, or unset {ENVIRONMENT_PREFIX}TARGET to do "
            "without the pool"
        )


def check_parameters(engine: str, version: str, names: Mapping[str, str]) -> None:
    """Raise RuntimeError if functions of an engine are not those written for. names: "module:path" -> parameters."""
    changed = []
    for name, parameters in names.items():
        module, _, path = name.partition(":")
        try:
            function: Any = import_module(module)
            for part in path.split("."):
                function = getattr(function, part)
            found = " ".join(inspect.signature(function).parameters)
        except (ImportError, AttributeError) as error:
            found = str(error)
        if found != parameters:
            changed.append(f"{name}({parameters.replace(' ', ', ')}) is now: {found}")
    if changed:
        raise RuntimeError(
            f"this {engine} calls itself {version}, but has been changed where engrampool takes its place: "
            f"{'; '.join(changed)}. Install an unchanged {engine.lower()}=={version}, or unset "
            f"{ENVIRONMENT_PREFIX}TARGET"
        )


def check_served(
    client: Client,
    heads: Mapping[int, Sequence[int]],
    dim: int,
    token_map: npt.NDArray[np.integer[Any]],
    multipliers: Mapping[int, Sequence[int]],
    fill: int,
) -> None:
    """Refuse a server that does not serve what an engine hashes and reads. Raises FingerprintError.

    heads, token_map, multipliers, fill: as `Client.check_layout` has them. dim: the numbers of a row.
    """
    client.check_layout(heads, dim + dim // BLOCK, token_map, multipliers, fill)
    expected = [("float8_e4m3fn", dim), ("float8_e8m0fnu", dim // BLOCK)]
    for table in client.spec.tables:
        found = [(one.dtype, one.length) for one in table.row_format.segments]
        if found != expected:
            raise FingerprintError([f"{table.name}: rows of {expected} here, {found} there"])
