"""`engrampool up` and `engrampool down`: the servers of a model, run by a cluster that there is already."""

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import click

from engrampool_proto.errors import EngrampoolError, how_to_install
from engrampool_proto.sharding import MAX_SHARDS, cut
from engrampool_server.config import load_config
from engrampool_server.files.sources import parse_location, redact

# As many as `plan` reckons with. The default of `serve`, one for each CPU, is another on each node.
_WORKERS = "4"
# What `up` decides for each server. The log says where it serves.
_OURS = ("models", "listen", "shard", "placement", "log_level")

_RAY_ADDRESS = click.option(
    "--ray-address",
    default="auto",
    show_default=True,
    help="As `ray.init` takes it; auto: this machine's.",
)


@click.command()
@click.option("--on", type=click.Choice(["ray"]), required=True, expose_value=False, help="What runs the servers.")
@click.option("--model", required=True, metavar="DIR|URL", help="The packed model, at the same place for every node.")
@click.option("--shards", type=click.IntRange(1, MAX_SHARDS), default=1, show_default=True, help="How many parts.")
@click.option(
    "--replicas", type=click.IntRange(min=1), default=1, show_default=True, help="Servers of each, on different nodes."
)
@click.option("--name", help="What clients ask for: ray:///NAME; the model's name by default.")
@click.option("--set", "assigned", multiple=True, metavar="NAME=VALUE", help="A setting of `serve`; may repeat.")
@click.option(
    "--resource",
    "asked",
    multiple=True,
    metavar="NAME=AMOUNT",
    help="What each server takes of a node, beside its memory, or memory=BYTES instead of what it needs; may repeat.",
)
@click.option("--registry", metavar="URL", help="Short for --set registry=URL.")
@click.option(
    "--timeout-s",
    type=click.FloatRange(min=0, min_open=True),
    default=3600.0,
    show_default=True,
    help="How long to wait until all serve.",
)
@_RAY_ADDRESS
def up(
    model: str,
    shards: int,
    replicas: int,
    name: str | None,
    assigned: tuple[str, ...],
    asked: tuple[str, ...],
    registry: str | None,
    timeout_s: float,
    ray_address: str,
) -> None:
    """Have a cluster run the servers of a sharded model, and wait until they serve.

    Again with the same arguments, it starts what is missing.
    """
    on_ray = _on_ray()
    if name is not None and "/" in name:
        raise click.UsageError(f"--name {name!r}: a name has no slash")
    settings = {"workers": _WORKERS, **_pairs("--set", assigned)}
    if registry is not None:
        settings["registry"] = registry
    for setting in _OURS:
        if setting in settings:
            raise click.UsageError(f"--set {setting}: `up` decides that for each server")
    try:
        location = parse_location(model)
    except ValueError as error:
        raise click.UsageError(f"{redact(repr(model))} is {error}") from error
    location = location.absolute() if isinstance(location, Path) else location
    config = load_config({**settings, "models": (location,), "shard": f"0/{shards}"}, {}, None).config
    # Not before: they bring numpy, which help does without.
    from engrampool_server.memory.shard_plan import ShardPlan, spec_of

    spec = spec_of(location)
    parts = {f"{at}/{shards}": part for at, part in enumerate(cut(spec, shards, config.shard_by))}
    needs = ShardPlan(spec, parts, "", replicas, config.workers, config.max_in_flight_bytes).needs
    amounts = _amounts(asked)
    resources = {shard: {"memory": need.memory_bytes, **amounts} for shard, need in needs.items()}
    deployment = on_ray.Deployment(name or spec.name, str(location), replicas, resources, settings)
    with on_ray.connected(ray_address):
        on_ray.up(deployment, timeout_s, click.echo)
    click.echo(f"serving {spec.name}: ray:///{deployment.name}" + (f", {registry}" if registry else ""))


@click.command()
@click.argument("name")
@click.option(
    "--timeout-s",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="How long servers may let lookups end, before they are killed.",
)
@_RAY_ADDRESS
def down(name: str, timeout_s: float, ray_address: str) -> None:
    """Stop all servers that `up` started under a name, and give back what they took of the cluster."""
    on_ray = _on_ray()
    with on_ray.connected(ray_address):
        click.echo(f"stopped {on_ray.down(name, timeout_s)} servers of {name}")


def _on_ray() -> ModuleType:
    try:
        from engrampool_server.commands import on_ray
    except ModuleNotFoundError as error:
        raise EngrampoolError(f"the package {error.name!r} is not installed: {how_to_install('ray')}") from error
    return on_ray


def _amounts(asked: Iterable[str]) -> dict[str, float]:
    try:
        amounts = {name: float(amount) for name, amount in _pairs("--resource", asked).items()}
    except ValueError as error:
        raise click.UsageError(f"--resource takes NAME=AMOUNT, a number: {error}") from error
    wrong = [name for name, amount in amounts.items() if not 0 < amount < float("inf")]
    if wrong:
        raise click.UsageError(f"--resource {wrong[0]}: more than 0")
    return amounts


def _pairs(flag: str, texts: Iterable[str]) -> dict[str, str]:
    """What NAME=VALUE says, by name."""
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals or name in pairs:
            raise click.UsageError(f"{flag} {text!r}: NAME=VALUE, each name once")
        pairs[name] = value
    return pairs
