"""`engrampool serve`: its flags, which are the server's settings, and what it does before the server starts."""

import os
from collections.abc import Callable
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any, TypeVar

import click

from engrampool_proto.malloc import pin_malloc
from engrampool_server.config import FLAGS, SETTINGS, load_config, negative_flag, render
from engrampool_server.setting_kinds import Directories
from engrampool_server.telemetry import log

_Command = TypeVar("_Command", bound=Callable[..., Any] | click.Command)


def serve_options(command: _Command) -> _Command:
    """Decorate a click command with one option a setting, passed by field name, None (or ()) where not given."""
    for setting in reversed(list(SETTINGS.values())):
        kind, flag = setting.metadata["kind"], FLAGS[setting.name]
        takes_value: dict[str, Any] = {"type": str, "metavar": kind.metavar} if kind.metavar else {}
        command = click.option(
            flag if takes_value else f"{flag}/{negative_flag(flag)}",
            setting.name,
            default=None,
            multiple=isinstance(kind, Directories),
            help=f"{setting.metadata['help']} ({setting.metadata['allowed']}{_default_text(setting)})",
            **takes_value,
        )(command)
    return command


def _default_text(setting: Field[Any]) -> str:
    default = setting.default_factory() if setting.default_factory is not MISSING else setting.default
    return f"; default: {setting.metadata['kind'].toml(default)}"


@click.command()
@click.option("--config", "file", type=click.Path(dir_okay=False, path_type=Path), help="TOML file of settings.")
@click.option("--print-config", is_flag=True, help="Say what is in force and where it came from, and stop.")
@serve_options
def serve(file: Path | None, print_config: bool, **flags: Any) -> None:
    """Hold packed models in memory and answer lookups over gRPC.

    Every setting can also stand in the file (setting = value) or in the environment (ENGRAMPOOL_SETTING); a flag wins
    over the environment, which wins over the file.
    """
    resolved = load_config(flags, os.environ, file)
    if print_config:
        click.echo(render(resolved), nl=False)
        return
    # Not before: this compiles the kernels, where none are kept.
    from engrampool_server.serve import serve as run

    if resolved.config.pin_malloc:
        pin_malloc()
    log.configure(resolved.config.log_level)
    run(resolved.config)
