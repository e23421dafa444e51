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
from engrampool_proto.spec import RowFormat, Segment

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
    _check_rows(client, [("float8_e4m3fn", dim), ("float8_e8m0fnu", dim // BLOCK)])


def check_ngram_served(client: Client, embeddings: Mapping[int, Any], segments: Sequence[tuple[str, int]]) -> None:
    """Refuse a server that does not serve what Qwen4's n-gram embeddings hash and read.

    embeddings: layer, counted from 1 -> the engine's own module, with the constants that it hashes by.
    segments: of a row, the type and length of each. Raises FingerprintError; RuntimeError for too large a table.
    """
    heads = {layer: one.ngram_heads_vocab_sizes.tolist() for layer, one in embeddings.items()}
    multipliers = {layer: one.layer_multipliers.tolist() for layer, one in embeddings.items()}
    (eos,) = {one.eos_token_id for one in embeddings.values()}
    row_bytes = RowFormat(tuple(Segment(str(at), *segment) for at, segment in enumerate(segments))).row_bytes
    client.check_layout(heads, row_bytes, None, multipliers, fill=eos, stop=eos)
    _check_rows(client, list(segments))
    for layer, one in embeddings.items():
        table, offsets = client.spec.table(layer), one.ngram_heads_offsets.tolist()
        if offsets != table.head_offsets.tolist():
            raise FingerprintError(
                [f"{table.name}: heads begin at {offsets} here, {table.head_offsets.tolist()} there"]
            )
        if table.num_rows > 1 << 31:
            raise RuntimeError(f"{table.name} has {table.num_rows} rows, and row ids are int32 here: at most 2^31")


def check_scale(client: Client, layer: int, scale: Any) -> None:
    """Refuse a server of a table with another scale than the checkpoint's. scale: the engine's own, one number.

    Where the server states none, nothing is compared. Raises FingerprintError.
    """
    here, there = scale.item(), client.spec.table(layer).scale
    if there is not None and scale.new_tensor(there).item() != here:  # rounded as the engine keeps it
        raise FingerprintError([f"layer_{layer}: the table's scale is {here} here, {there} there"])


def ngram_layer(config: Any, index: int) -> int:
    """The layer, counted from 1, of one of Qwen4's n-gram embeddings, which the engines count from 0."""
    return int(sorted(set(config.ple_layer_ids))[index])


def columns_of(heads: int, rank: int, ranks: int) -> slice:
    """Of the row ids, those that one of several ranks asks for. Raises RuntimeError for more ranks than columns."""
    if ranks > heads:
        raise RuntimeError(f"{ranks} tensor-parallel ranks cannot share {heads} columns: at most one a column")
    return slice(heads * rank // ranks, heads * (rank + 1) // ranks)


def _check_rows(client: Client, expected: Sequence[tuple[str, int]]) -> None:
    for table in client.spec.tables:
        found = [(one.dtype, one.length) for one in table.row_format.segments]
        if found != expected:
            raise FingerprintError([f"{table.name}: rows of {expected} here, {found} there"])
