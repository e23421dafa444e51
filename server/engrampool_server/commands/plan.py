"""`engrampool plan`: what the servers of a sharded model hold and need, before there is any of them."""

import json
from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from click.core import ParameterSource

from engrampool_proto.sharding import MAX_SHARDS, ShardBy, cut
from engrampool_server.files.sources import parse_location, redact
from engrampool_server.setting_kinds import KIB, TIB, Size

if TYPE_CHECKING:
    from engrampool_server.memory.load_plan import LoadPlan
    from engrampool_server.memory.shard_plan import ShardPlan

_POSITIVE = click.FloatRange(min=0, min_open=True)
_SHARE = click.FloatRange(0, 1)


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
@click.option("--prefill-tokens-s", type=_POSITIVE, help="Load: tokens a second of all engines, in chunks.")
@click.option("--decode-tokens-s", type=_POSITIVE, help="Load: tokens a second of all engines, in steps.")
@click.option(
    "--chunk", type=click.IntRange(min=1), default=8192, show_default=True, help="Tokens of a prefill lookup."
)
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens of a decode step.")
@click.option("--asked-prefill", type=_SHARE, default=0.632, show_default=True, help="Share of rows left to ask for.")
@click.option("--asked-decode", type=_SHARE, default=0.994, show_default=True, help="Likewise; doctor tells yours.")
@click.option("--layers", type=click.IntRange(min=1), help="Of the model, for what its layers wait.")
@click.option("--prefill-ms", type=_POSITIVE, help="A forward of one chunk.")
@click.option("--decode-ms", type=_POSITIVE, help="A forward of one step.")
@click.option("--link", metavar="NAME|FILE", default="tcp-100g", show_default=True, help="Of a server: a tier.")
@click.option("--hosts", type=click.IntRange(min=1), default=1, show_default=True, help="Of engines.")
@click.option("--call-us", type=_POSITIVE, default=110.0, show_default=True, help="A server's processor, a lookup.")
@click.option("--s-per-gb", type=_POSITIVE, default=0.59, show_default=True, help="A server's processor, a GB of rows.")
@click.option(
    "--calibration",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="These two of your machine, a file that bench/plan.py writes; what is typed wins.",
)
@click.option("--price-gib", type=_POSITIVE, default=1.0, show_default=True, help="Of a GiB of memory, in any unit.")
@click.option("--price-server", type=click.FloatRange(min=0), default=0.0, show_default=True, help="Beside its memory.")
@click.option("--json", "as_json", is_flag=True, help="As one JSON object, which has a placement to edit.")
def plan(
    model: str,
    shards: int | None,
    shard_by: ShardBy,
    placement: Path | None,
    replicas: int,
    workers: int,
    max_in_flight_bytes: str,
    calibration: Path | None,
    as_json: bool,
    **load: Any,
) -> None:
    """Say what each server of a sharded model holds, and the memory that it needs; with a load, what that asks of them.

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
    if calibration is not None:
        typed = click.get_current_context().get_parameter_source
        measured = _read_calibration(calibration)
        load |= {name: value for name, value in measured.items() if typed(name) is ParameterSource.DEFAULT}
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
    document, text = planned.to_json(), str(planned)
    if load["prefill_tokens_s"] or load["decode_tokens_s"]:
        loaded = _load_plan(planned, load)
        document, text = document | {"load": loaded.to_json()}, f"{text}\n\n{loaded}"
    click.echo(json.dumps(document) if as_json else text)


def _read_calibration(path: Path) -> dict[str, float]:
    """call_us and s_per_gb. Raises UsageError for a file that has anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.UsageError(f"--calibration {path} cannot be read: {error}") from error
    names = {"call_us", "s_per_gb"}
    if not isinstance(found, dict) or found.keys() != names:
        raise click.UsageError(f"--calibration {path}: it must be a JSON object of call_us and s_per_gb; make it again")
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
            raise click.UsageError(f"--calibration {path}: {name} must be a number above 0; it is {value!r}")
    return {name: float(value) for name, value in found.items()}


def _load_plan(planned: "ShardPlan", load: Mapping[str, Any]) -> "LoadPlan":
    """Raises TierError."""
    from engrampool_proto.tiers.tier import Tier
    from engrampool_server.memory.load_plan import Costs, LoadPlan, Traffic

    traffic = {}
    for phase, size in (("prefill", "chunk"), ("decode", "batch")):
        if load[f"{phase}_tokens_s"]:
            forward_ms = load[f"{phase}_ms"]
            traffic[phase] = Traffic(
                tokens_per_s=load[f"{phase}_tokens_s"],
                batch=load[size],
                asked=load[f"asked_{phase}"],
                forward_s=None if forward_ms is None else forward_ms / 1e3,
            )
    return LoadPlan(
        spec=planned.spec,
        shards=len(planned.parts),
        replicas=planned.replicas,
        memory_bytes=planned.memory_bytes,
        traffic=traffic,
        link=Tier.of(load["link"]),
        layers=load["layers"],
        hosts=load["hosts"],
        costs=Costs(
            call_s=load["call_us"] / 1e6,
            s_per_gb=load["s_per_gb"],
            gib_price=load["price_gib"],
            server_price=load["price_server"],
        ),
    )
