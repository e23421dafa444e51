"""The `engrampool` program: finds its subcommands by entry point, so that it imports neither server nor client."""

import importlib
import resource
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import NoReturn

import click

from engrampool_proto import __version__
from engrampool_proto.errors import EngrampoolError

_GROUP = "engrampool.commands"


class _Commands(click.Group):
    """Loads a subcommand when it is asked for; `--help` lists all without importing the server's dependencies."""

    def _found(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=_GROUP)}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._found())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        point = self._found().get(cmd_name)
        if point is None:
            return None
        try:
            command = getattr(importlib.import_module(point.module), point.attr)
        except ModuleNotFoundError as error:
            return _unavailable(cmd_name, error)
        assert isinstance(command, click.Command)
        return command


def _unavailable(name: str, error: ModuleNotFoundError) -> click.Command:
    """Stands in for a command whose packages are not installed; says which."""
    hint = f"needs the package {error.name!r}: pip install 'engrampool[server]'"

    def fail(**_: object) -> NoReturn:
        raise EngrampoolError(f"{name} {hint}")

    settings = {"ignore_unknown_options": True}
    arguments: list[click.Parameter] = [click.Argument(["arguments"], nargs=-1)]
    return click.Command(name, callback=fail, params=arguments, help=f"({hint})", context_settings=settings)


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="engrampool")
def engrampool() -> None:
    """A memory server for language models: Engram tables in pooled DRAM, rows over gRPC."""


def main() -> NoReturn:
    """Run the program. Exit codes: 0 done, 2 usage, 1 anything else, with one line on standard error."""
    try:
        code = engrampool.main(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted")
    except click.ClickException as error:
        _fail(error.format_message())
    except EngrampoolError as error:
        _fail(str(error))
    except (OSError, MemoryError, ImportError) as error:
        _fail(f"{str(error) or type(error).__name__}{_address_space_hint()}")
    sys.exit(code if isinstance(code, int) else 0)


def _address_space_hint() -> str:
    """Where that is limited, libraries that cannot be loaded and memory that is not given say nothing of it."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return ""
    return f" (this process may have {limit >> 20} MiB of address space only: ulimit -v unlimited)"


def _fail(message: str) -> NoReturn:
    """One line, whatever the message held."""
    click.echo(f"engrampool: {' '.join(message.split())}", err=True)
    sys.exit(1)
