"""`engrampool plan`: what the servers of a sharded model hold and need, before there is any of them."""

import json
from pathlib import Path
from typing import get_args

import click

from engrampool_proto.sharding import MAX_SHARDS, ShardBy, cut
from engrampool_server.files.sources import parse_location, redact
from engrampool_server.setting_kinds import KIB, TIB, Size


@click.command()
@click.argument("model", type=str, metavar="DIR|URL")
@click.option("--shards", type=click.IntRange(1, MAX_SHARDS), help="How many parts; 1 by default.")
@click.option(
    "--shard-by",
    type=click.Choice(get_args(ShardBy)),
    default="head",
    show_default=True,
    help="Where the model is cut, as in `serve`.",
)
@click.option(
    "--placement", type=click.Path(path_type=Path), help="Instead: the parts that this file names, as in `serve`."
)
@click.option("--replicas", type=click.IntRange(min=1), default=1, show_default=True, help="Servers of each part.")
@click.option("--workers", type=click.IntRange(1, 1024), default=4, show_default=True, help="Of each, as in `serve`.")
@click.option("--max-in-flight-bytes", type=str, default="1GiB", show_default=True, help="Likewise.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object, which has a placement to edit.")
def plan(
    model: str,
    shards: int | None,
    shard_by: ShardBy,
    placement: Path | None,
    replicas: int,
    workers: int,
    max_in_flight_bytes: str,
    as_json: bool,
) -> None:
    """Say what each server of a sharded model holds, and the memory that it needs.

    The model is a packed one, or a checkpoint's directory, of which config.json (and tokenizer.json) suffice: no tables
    are needed.
    """
    if placement is not None and shards is not None:
        raise click.UsageError("--placement names the shards; give it or --shards")
    try:
        location = parse_location(model)
    except ValueError as error:
        raise click.UsageError(f"{redact(repr(model))} is {error}") from error
    size = Size(KIB, TIB)
    try:
        answer_bytes = size.parse(max_in_flight_bytes)
    except ValueError as error:
        raise click.UsageError(f"--max-in-flight-bytes {max_in_flight_bytes!r}: allowed: {size.allowed}") from error
    # Not before: they bring numpy, which help does without.
    from engrampool_server.memory.placement import read_placement
    from engrampool_server.memory.shard_plan import ShardPlan, spec_of

    spec = spec_of(location)
    if placement is not None:
        how, parts = f"--placement {placement}", read_placement(placement, spec)
    else:
        count = shards or 1
        how = f"--shard-by {shard_by}"
        parts = {f"{at}/{count}": part for at, part in enumerate(cut(spec, count, shard_by))}
    planned = ShardPlan(spec, parts, how, replicas, workers, answer_bytes)
    click.echo(json.dumps(planned.to_json()) if as_json else str(planned))
