"""The subcommands of `engrampool` for versions in a registry: publish, activate, rollback, retire, and see."""

import json
import threading
from pathlib import Path
from typing import Any

import click

from engrampool_proto.registry.etcd import Active, NotHeldError, Published, Registry, State, VersionError
from engrampool_server.files.sources import Location, parse_location, redact

# As git's short names: so many digits are seldom those of two versions.
_LEAST_DIGITS = 6


class _RegistryType(click.ParamType):  # type: ignore[type-arg]  # not generic in every version
    name = "registry"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Registry:
        try:
            return Registry(value)
        except ValueError as error:
            self.fail(str(error), param, context)


def _location(context: click.Context, param: click.Parameter, value: str) -> Location:
    try:
        location = parse_location(value)
    except ValueError as error:
        raise click.BadParameter(f"{redact(repr(value))} is {error}") from error
    return location.absolute() if isinstance(location, Path) else location


_registry = click.option(
    "--registry",
    type=_RegistryType(),
    required=True,
    envvar="ENGRAMPOOL_REGISTRY",
    show_envvar=True,
    metavar="URL",
    help="etcd://HOST:PORT[,HOST:PORT...][/PREFIX]; etcds://...[?ca=FILE[&cert=FILE&key=FILE]] over TLS.",
)
_partial = click.option("--partial", is_flag=True, help="Even if servers with the active version do not hold this one.")
_wait = click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(min=0),
    default=600,
    show_default=True,
    help="Seconds to wait for servers to hold it.",
)
_model = click.argument("model")
_version = click.argument("version")


@click.command()
@click.argument("location", callback=_location, metavar="DIR|URL")
@_registry
@click.option("--activate", "then_activate", is_flag=True, help="Then wait until it can be active, and make it so.")
@_wait
def publish(location: Location, registry: Registry, then_activate: bool, wait_s: float) -> None:
    """Have every server of a pool load the packed model or patch at a directory or URL.

    Servers read it from there, so a directory must be at the same place on each. Clients go on with the active version.
    """
    # Not before: they bring numpy, which help does without.
    from engrampool_server.files.patches.patch_files import PatchFiles, open_any

    with open_any(location) as files:
        spec, version = files.spec, files.version
        base = files.base_version if isinstance(files, PatchFiles) else None
    rows = {table.layer: table.num_rows for table in spec.tables}
    if then_activate:  # what could never be active is not to be loaded for nothing
        registry.read().check_spec(spec.name, version, spec.digest)
    registry.publish(Published(spec.name, version, str(location), base, spec.digest, rows))
    click.echo(f"published {spec.name} {version}")
    if then_activate:
        _say(_activated(registry, spec.name, version, False, wait_s))


@click.command()
@_model
@_version
@_registry
@_partial
@_wait
def activate(model: str, version: str, registry: Registry, partial: bool, wait_s: float) -> None:
    """Have clients read VERSION of MODEL, as soon as servers hold all of it: they follow without a restart."""
    _say(_activated(registry, model, _full(registry.read(), model, version), partial, wait_s))


@click.command()
@_model
@_registry
def rollback(model: str, registry: Registry) -> None:
    """Have clients read the version of MODEL again that was active before."""
    _say(registry.rollback(model))


@click.command()
@_model
@_version
@_registry
def retire(model: str, version: str, registry: Registry) -> None:
    """Have servers give VERSION of MODEL up; it must not be active."""
    version = _full(registry.read(), model, version)
    registry.retire(model, version)
    click.echo(f"retired {model} {version}")


@click.command()
@_registry
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def versions(registry: Registry, as_json: bool) -> None:
    """Say which versions a pool has: published, active, previous, and who holds them."""
    found = overview(registry.read())
    click.echo(json.dumps(found) if as_json else overview_text(found))


def overview(state: State) -> dict[str, Any]:
    """Servers and each model's versions, as JSON types. Of one that is held and not published, `missing` is None.

    `known`: the version that servers know as active, where the registry lost its record.
    """
    names = {(one.model, one.version) for one in state.published}
    names |= {(held.model, held.version) for member in state.members.values() for held in member.held}
    models: dict[str, Any] = {
        model: {
            "active": state.active[model].version if model in state.active else None,
            "previous": state.active[model].previous if model in state.active else None,
            "known": state.known_active(model),
            "versions": {},
        }
        for model in sorted({model for model, _ in names} | set(state.active))
    }
    for model, version in sorted(names):
        published = state.find(model, version)
        models[model]["versions"][version] = {
            "location": published.location if published else None,
            "base": published.base if published else None,
            "missing": state.uncovered(published) if published else None,
            "held": [member.address for member in state.holders(model, version)],
            "conflict": state.conflict(model, version),
            "failed": _failures(state, version),
        }
    return {"revision": state.revision, "servers": sorted(state.members), "models": models}


def overview_text(found: dict[str, Any]) -> str:
    """`overview` for people."""
    lines = [f"servers: {', '.join(found['servers']) or 'none'}"]
    for model, one in found["models"].items():
        lines.append(model)
        for version, about in one["versions"].items():
            roles = {"active": "active", "previous": "previous", "known": "active as servers know it: activate it"}
            role = next((f", {text}" for name, text in roles.items() if one[name] == version), "")
            patch = f", a patch of {about['base']}" if about["base"] else ""
            lines.append(f"  {version}{role}: {about['location'] or 'not published'}{patch}")
            lines.append(f"    held by {', '.join(about['held']) or 'no server'}")
            lines += [
                f"    no server holds rows {start}..{stop - 1} of layer {layer}"
                for layer, start, stop in about["missing"] or ()
            ]
            if about["conflict"]:
                lines.append(f"    {about['conflict']}")
            lines += [f"    {address} could not load it: {why}" for address, why in about["failed"].items()]
    return "\n".join(lines)


def _activated(registry: Registry, model: str, version: str, partial: bool, wait_s: float) -> Active:
    """Make a version active as soon as it can be; says what it waits for. Raises VersionError if it cannot in time."""
    stop = threading.Event()
    active: Active | None = None
    missing = ""

    def attempt(state: State) -> None:
        nonlocal active, missing
        try:
            active = registry.activate(model, version, partial=partial)
        except NotHeldError as error:
            failures = [f"{address} could not load it: {why}" for address, why in _failures(state, version).items()]
            if failures:
                raise VersionError(f"{error}; {'; '.join(failures)}") from error
            if wait_s and str(error) != missing:
                click.echo(f"waiting: {error}", err=True)
            missing = str(error)
        else:
            stop.set()

    # Asked once before it is followed: one that does not answer at all is not waited for.
    attempt(registry.read())
    if active is None and wait_s:
        timer = threading.Timer(wait_s, stop.set)
        timer.start()
        try:
            registry.follow(attempt, stop)
        finally:
            timer.cancel()
    if active is None:
        raise NotHeldError(f"{missing}; waited {wait_s:g} s")
    return active


def _failures(state: State, version: str) -> dict[str, str]:
    return {
        address: member.failed[version] for address, member in sorted(state.members.items()) if version in member.failed
    }


def _full(state: State, model: str, version: str) -> str:
    """The one version that begins so, published or held; of none, the text itself, which then nobody knows."""
    names = {(one.model, one.version) for one in state.published}
    names |= {(held.model, held.version) for member in state.members.values() for held in member.held}
    found = {name for of, name in names if of == model and name.startswith(version)}
    if version in found or not found:
        return version
    if len(version) < _LEAST_DIGITS or len(found) > 1:
        raise VersionError(
            f"{version} is not enough of a version of {model}: give {_LEAST_DIGITS} digits or more, which only one"
            f" begins with; it may be {' or '.join(sorted(found))}"
        )
    return found.pop()


def _say(active: Active) -> None:
    click.echo(f"{active.model} {active.version} is active, before it {active.previous or 'none was'}")
