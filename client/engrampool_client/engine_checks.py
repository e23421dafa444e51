"""Whether what is served is what the engine that runs here reads: its config and tokenizer, its layout, its row ids."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engrampool_client.compute.layout import Layout
from engrampool_client.errors import FingerprintError
from engrampool_proto.builders import blueprint, load_config
from engrampool_proto.builders.blueprint import spare_rows
from engrampool_proto.errors import BatchError, SpecError
from engrampool_proto.hashing import TokenBatch, exactly
from engrampool_proto.spec import ModelSpec, TableSpec
from engrampool_proto.token_map import TokenMap


def check_fingerprint(served: ModelSpec, config: str | Path | None, tokenizer: str | Path | None) -> None:
    """Refuse a server whose tables are not those of the model that runs here.

    config, tokenizer: this side's config.json and tokenizer.json; without a config nothing is compared.
    Raises FingerprintError listing the fields that differ, SpecError if the files cannot be read.
    """
    if config is None:
        if tokenizer is not None:
            raise SpecError("a tokenizer is compared through a config: give both")
        return
    stated = load_config(Path(config))
    listed = stated.get("eos_token_id")
    eos = None
    if isinstance(listed, list) and listed:
        stops = [getattr(table.hash, "stop", None) for table in served.tables]
        eos = next((one for one in listed if one in stops), listed[0])
    made = blueprint(stated, None if tokenizer is None else Path(tokenizer), served.name, eos_token_id=eos)
    ours = made.spec if made.rows_stated else _as_stored(made.spec, served)
    differences = ours.differences(served)
    if differences:
        raise FingerprintError(differences)


def _as_stored(ours: ModelSpec, served: ModelSpec) -> ModelSpec:
    """`ours` with rows stored as the served ones are, and with their padding, which a config does not tell."""

    def values(table: TableSpec) -> int:
        first = table.row_format.segments[0]
        return first.length * (2 if first.dtype == "float4_e2m1fn_x2" else 1)

    tables = []
    for table in ours.tables:
        theirs = served.table(table.layer) if table.layer in served.layers else table
        if values(table) == values(theirs):
            table = replace(table, row_format=theirs.row_format)
        if 0 <= theirs.num_rows - sum(table.hash.head_rows()) <= spare_rows(table):
            table = replace(table, num_rows=theirs.num_rows)
        tables.append(table)
    return replace(ours, tables=tuple(tables))


def check_layout(
    served: ModelSpec,
    head_sizes: Mapping[int, Sequence[int]],
    row_bytes: int,
    token_map: npt.ArrayLike | None,
    multipliers: Mapping[int, Sequence[int]] | None = None,
    fill: int | None = None,
    stop: int | None = None,
) -> None:
    """Refuse a server whose tables are not laid out as an engine says. Arguments and errors: `Client.check_layout`."""
    differences = []
    if sorted(head_sizes) != list(served.layers):
        differences.append(f"layers: {sorted(head_sizes)} here, {list(served.layers)} there")
    for layer in sorted(set(head_sizes) & set(served.layers)):
        table = served.table(layer)
        ours, theirs = list(head_sizes[layer]), list(table.hash.head_rows())
        if ours != theirs:
            where = next((at for at, two in enumerate(zip(ours, theirs, strict=False)) if two[0] != two[1]), None)
            what = (
                f"{len(ours)} heads here, {len(theirs)} there"
                if where is None
                else (f"rows of head {where}: {ours[where]} here, {theirs[where]} there")
            )
            differences.append(f"{table.name}: {what}")
        if row_bytes != table.row_bytes:
            differences.append(f"{table.name}: {row_bytes} bytes a row here, {table.row_bytes} there")
        if multipliers is not None:
            constants = {"multipliers": tuple(multipliers.get(layer, ())), "fill": fill, "stop": stop}
            for name, here in constants.items():
                there = getattr(table.hash, name, None)
                if here != there:
                    differences.append(f"{table.name}: {name} {here} here, {there} there")
    ours_map = None if token_map is None else TokenMap(exactly("token_map", token_map, np.int32))
    digests = [None if one is None else one.digest for one in (ours_map, served.token_map)]
    if digests[0] != digests[1]:
        differences.append(f"token map: digest {digests[0]} here, {digests[1]} there")
    if differences:
        raise FingerprintError(differences)


def check_row_ids(served: ModelSpec, layout: Layout, rows: Mapping[int, npt.NDArray[Any]], batch: TokenBatch) -> None:
    """Compare an engine's row ids of a batch with those that are hashed here. Arguments and errors: `Client.verify`."""
    differences = []
    for layer, ours in served.hash(batch, list(rows)).items():
        mine, theirs = ours[:, layout.columns(served.table(layer))], np.asarray(rows[layer])
        if theirs.dtype.kind not in "iu":
            raise BatchError(f"row ids of layer {layer} must be an integer array; they are {theirs.dtype.name}")
        if theirs.shape != mine.shape:
            differences.append(f"layer {layer}: row ids {list(mine.shape)} here, {list(theirs.shape)} there")
            continue
        where = np.argwhere(mine != theirs)
        if len(where):
            token, head = map(int, where[0])
            differences.append(
                f"layer {layer}: {len(where)} of {mine.size} row ids, the first of token {token}, head {head}: "
                f"{mine[token, head]} here, {theirs[token, head]} there"
            )
    if differences:
        raise FingerprintError(differences)
