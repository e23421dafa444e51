"""The subcommands for packed models, patches and segments; each only reads its options and says what was done.

Each imports what it needs when it runs, so that help and mistakes are answered at once.
"""

import json
from pathlib import Path
from typing import Any

import click

from engrampool_server.files.sources import Location, parse_location, redact

# Of synth.CONFIGS, and of table_writer.
_FAMILIES = ("deepseek-v4.1", "engram-demo", "qwen-ple", "longcat", "gemma-ple")
_FILE_MIB = 2048

_PATH = click.Path(path_type=Path)


class _LocationType(click.ParamType):  # type: ignore[type-arg]  # not generic in every version
    name = "directory or URL"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Location:
        try:
            return parse_location(value)
        except ValueError as error:
            self.fail(f"{redact(repr(value))} is {error}", param, context)


_packed = click.argument("directory", type=_LocationType(), metavar="DIR|URL")

_out = click.option("--out", type=_PATH, required=True, help="Directory to write; must not exist.")
_name = click.option("--name", help="The model's name; its family's by default.")
_quiet = click.option("--quiet", is_flag=True, help="No progress bar.")
_file_mib = click.option(
    "--file-mib",
    type=click.IntRange(min=1),
    default=_FILE_MIB,
    show_default=True,
    help="Largest size of a table file, in MiB.",
)


@click.command()
@click.option("--checkpoint", type=_PATH, required=True, help="Directory with config.json and safetensors files.")
@_out
@_name
@click.option(
    "--eos-token-id", type=click.IntRange(min=0), help="The token that ends a text, where config.json lists several."
)
@_file_mib
@_quiet
def pack(checkpoint: Path, out: Path, name: str | None, eos_token_id: int | None, file_mib: int, quiet: bool) -> None:
    """Pack the Engram tables of a Hugging Face checkpoint into files that `serve` loads.

    A run that was interrupted goes on where it stopped when it is started again.
    """
    from engrampool_server.files.pack import pack as pack_checkpoint

    version = pack_checkpoint(checkpoint, out, name, eos_token_id=eos_token_id, file_bytes=file_mib << 20, quiet=quiet)
    click.echo(f"packed {out}, version {version}")


@click.command()
@click.option("--like", type=click.Choice(_FAMILIES), required=True, help="Model family.")
@click.option(
    "--vocab-size",
    type=click.IntRange(min=2),
    required=True,
    help="The family's (n-gram) vocabulary size: about the rows of one head.",
)
@click.option("--tokenizer", type=_PATH, help="tokenizer.json for the DeepSeek families; identity map without.")
@click.option("--out", type=_PATH, help="Directory to write; must not exist.")
@click.option(
    "--checkpoint-out",
    type=str,
    is_flag=False,
    flag_value="",
    metavar="[DIR]",
    help="Write a Hugging Face checkpoint instead, for `pack`: to DIR, or to --out.",
)
@_name
@_file_mib
@_quiet
def synth(
    like: str,
    vocab_size: int,
    tokenizer: Path | None,
    out: Path | None,
    checkpoint_out: str | None,
    name: str | None,
    file_mib: int,
    quiet: bool,
) -> None:
    """Write tables of a real model's shape and any size, whose rows can be computed again.

    docs/FORMAT.md has the function; `engrampool_proto.synthetic` computes it.
    """
    from engrampool_server.files.synth import synth as write_synthetic
    from engrampool_server.files.synth_checkpoint import synth_checkpoint

    if out is not None and checkpoint_out:
        raise click.UsageError(f"two directories to write, {out} and {checkpoint_out}; give one")
    out = Path(checkpoint_out) if checkpoint_out else out
    if out is None:
        raise click.UsageError("give --out DIR, or --checkpoint-out DIR")
    if checkpoint_out is not None:
        synth_checkpoint(like, vocab_size, out, tokenizer, name, quiet=quiet)
        click.echo(f"wrote the checkpoint {out}")
        return
    version = write_synthetic(like, vocab_size, out, tokenizer, name, file_bytes=file_mib << 20, quiet=quiet)
    click.echo(f"wrote {out}, version {version}")


@click.command()
@click.argument("base", type=_LocationType())
@click.argument("new", type=_LocationType())
@_out
@_quiet
def patch(base: Location, new: Location, out: Path, quiet: bool) -> None:
    """Write the rows of the packed model NEW that differ from BASE, both directories or URLs, as a patch of BASE.

    A server that holds BASE serves NEW's rows by it in little more memory; `publish` it to a registry.
    """
    from engrampool_server.files.patches.patch import patch as make_patch

    version = make_patch(base, new, out, quiet=quiet)
    click.echo(f"wrote {out}, version {version}")


@click.command()
@_packed
@click.option("--json", "as_json", is_flag=True, help="As one JSON object.")
def inspect(directory: Location, as_json: bool) -> None:
    """Say what the packed model or patch at a directory or URL is. Checks manifest and files, reads no rows."""
    from engrampool_server.files.patches.patch_files import open_any
    from engrampool_server.files.verify import summary, summary_text

    with open_any(directory) as model:
        click.echo(json.dumps(summary(model)) if as_json else summary_text(model))


@click.command()
@_packed
@_quiet
def verify(directory: Location, quiet: bool) -> None:
    """Read every block of the packed model or patch at a directory or URL and check it; names each that is damaged."""
    from engrampool_server.files.patches.patch_files import open_any
    from engrampool_server.files.table_files import TableFileError
    from engrampool_server.files.verify import damaged_blocks
    from engrampool_server.telemetry.progress import byte_progress

    with open_any(directory) as model:
        with byte_progress("verifying", model.nbytes, quiet=quiet) as bar:
            errors = damaged_blocks(model, bar.update)
        for error in errors:
            click.echo(str(error), err=True)
        blocks = len(model.checks())
        if errors:
            raise TableFileError(f"{directory}: {len(errors)} of {blocks} blocks are damaged; do not serve it")
        click.echo(f"{directory} is whole: {blocks} blocks, version {model.version}")


@click.command()
@click.option(
    "--memory",
    "kinds",
    multiple=True,
    default=("shm", "hugetlb"),
    show_default=True,
    help="Where to look: shm, hugetlb or file:DIR, as in `serve`; may repeat.",
)
@click.option("--free", "free_unused", is_flag=True, help="Free those that no server uses.")
def segments(kinds: tuple[str, ...], free_unused: bool) -> None:
    """List the tables that lie in memory for the next start of a server, of this user only."""
    from engrampool_server.config import ServerConfig
    from engrampool_server.memory.preflight import format_bytes
    from engrampool_server.memory.segments import find_backing, free, survey

    for kind in kinds:
        memory = ServerConfig(models=(Path(),), memory=kind).memory
        backing = find_backing(memory)
        for found in survey(backing) if backing else ():
            freed = backing is not None and free_unused and not found.in_use and free(backing, found, "asked for")
            state = "freed" if freed else "in use" if found.in_use else "unused"
            one = found.identity
            what = f"{one.model} layer {one.layer} rows {one.row_start} .. {one.row_stop - 1}" if one else "partial"
            version = one.version if one else "-"
            click.echo(f"{found.path}  {format_bytes(found.nbytes, up=True)}  {state}  {what}  version {version}")
