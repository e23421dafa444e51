"""`engrampool serve`."""

import os
from pathlib import Path
from typing import Any

import click

from engrampool_proto.malloc import pin_malloc
from engrampool_server.config import load_config, render, serve_options
from engrampool_server.telemetry import log


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
    from engrampool_server.processes.lifecycle import supervise

    if resolved.config.pin_malloc:
        pin_malloc()
    log.configure(resolved.config.log_level)
    supervise(resolved.config)
