"""The `engrampool` program: finds its subcommands by entry point, so that it imports neither server nor client."""

import ast
import errno
import importlib
import os
import resource
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import click

from engrampool_proto import __version__
from engrampool_proto.errors import EngrampoolError, how_to_install

_GROUP = "engrampool.commands"


class _Commands(click.Group):
    """Loads a subcommand when it is asked for. `--help` lists all and loads none: some take seconds to import."""

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

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:  # commands import what they need when they run
            if (error.name or "engrampool").startswith("engrampool"):
                raise  # a mistake of ours
            raise EngrampoolError(f"{ctx.invoked_subcommand} {_hint(error)}") from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        found = sorted(self._found().items())
        limit = formatter.width - 6 - max((len(name) for name, _ in found), default=0)  # as click has it
        with formatter.section("Commands"):
            formatter.write_dl([(name, _summary(point, limit)) for name, point in found])


def _summary(point: EntryPoint, limit: int) -> str:
    """The first sentence of a command's docstring, read from its source; "" where there is none to be read."""
    about = _docstrings(point.module).get(point.attr)
    return click.Command(point.name, help=about).get_short_help_str(limit)


@cache
def _docstrings(module: str) -> dict[str, str | None]:
    """Of the functions of a module, by name."""
    package, _, inner = module.partition(".")
    found = find_spec(package)  # which imports nothing, as it is of a package at the top
    for folder in (found and found.submodule_search_locations) or ():
        source = Path(folder, *inner.split(".")).with_suffix(".py")
        if source.is_file():
            functions = (one for one in ast.parse(source.read_bytes()).body if isinstance(one, ast.FunctionDef))
            return {one.name: ast.get_docstring(one) for one in functions}
    return {}


def _unavailable(name: str, error: ModuleNotFoundError) -> click.Command:
    """Stands in for a command whose packages are not installed; says which."""
    hint = _hint(error)

    def fail(**_: object) -> NoReturn:
        raise EngrampoolError(f"{name} {hint}")

    settings = {"ignore_unknown_options": True}
    arguments: list[click.Parameter] = [click.Argument(["arguments"], nargs=-1)]
    return click.Command(name, callback=fail, params=arguments, help=f"({hint})", context_settings=settings)


def _hint(error: ModuleNotFoundError) -> str:
    return f"needs the package {error.name!r}: {how_to_install('server')}"


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="engrampool")
def engrampool() -> None:
    """A memory server for language models: Engram tables in pooled DRAM, rows over gRPC."""


def main() -> NoReturn:
    """Run the program. Exit codes: 0 done, 2 usage, 1 anything else, with one line on standard error."""
    _fill_standard_streams()
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
        _fail(f"{error}{_file_size_hint(error.__cause__)}")
    except (OSError, MemoryError, ImportError) as error:
        if isinstance(error, ImportError) and (error.name or "").startswith("engrampool"):
            raise  # a mistake of ours
        _fail(f"{str(error) or type(error).__name__}{_file_size_hint(error) or _address_space_hint()}")
    except SystemError as error:  # of a library that had no memory for its start, and says nothing of that
        if not (hint := _address_space_hint()):
            raise
        _fail(f"{error}{hint}")
    sys.exit(code if isinstance(code, int) else 0)


def _fill_standard_streams() -> None:
    """Where one of them is closed, nobody is heard or told; else the next file that is opened would be in its place."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))  # noqa: SIM115


def _file_size_hint(error: BaseException | None) -> str:
    """Where that is limited, the limit is also one of memory that processes share."""
    if not isinstance(error, OSError) or error.errno != errno.EFBIG:
        return ""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return f" (this process may have files of {limit >> 10} KiB only: ulimit -f unlimited)"


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
