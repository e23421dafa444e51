"""The `engrampool` program: what it lists, how it ends, and what it says when it fails."""

import subprocess
import sys
import sysconfig
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest

from engrampool_proto import __version__, cli
from engrampool_proto.errors import EngrampoolError, SpecError, how_to_install

PROGRAM = Path(sysconfig.get_path("scripts")) / "engrampool"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, timeout=120)


def test_help_lists_the_commands():
    done = run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    listed = {line.split()[0] for line in done.stdout.split("Commands:")[1].splitlines() if line.strip()}
    assert {"serve", "pack", "synth", "inspect", "verify", "lookup", "rows"} <= listed


def test_an_unknown_command_is_a_usage_error():
    done = run("serv")
    assert (done.returncode, done.stdout) == (2, "")
    assert "No such command 'serv'" in done.stderr


def test_the_module_is_the_program():
    done = subprocess.run([sys.executable, "-m", "engrampool_proto", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"engrampool, version {__version__}\n")


def ending(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["engrampool", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


@pytest.fixture
def command(monkeypatch):
    """Makes `engrampool it` a command that does what the test says."""

    def install(callback) -> None:
        made = click.Command("it", callback=callback, params=[click.Option(["--count"], type=int)])
        monkeypatch.setattr(sys.modules[__name__], "it", made, raising=False)
        point = EntryPoint("it", f"{__name__}:it", "engrampool.commands")
        monkeypatch.setattr(cli, "entry_points", lambda group: [point] if group == "engrampool.commands" else [])

    return install


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (EngrampoolError("no such table"), "engrampool: no such table"),
        (SpecError("two\n  lines,\tone message\n"), "engrampool: two lines, one message"),
        (FileNotFoundError(2, "No such file or directory", "x.safetensors"), "engrampool: [Errno 2] No such file"),
        (MemoryError(), "engrampool: MemoryError"),
        (click.ClickException("broken"), "engrampool: broken"),
        (KeyboardInterrupt(), "engrampool: interrupted"),
        (click.Abort(), "engrampool: interrupted"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(monkeypatch, capsys, command, error, line):
    def fail(count):
        raise error

    command(fail)
    assert ending(monkeypatch, "it") == 1
    out, err = capsys.readouterr()
    assert out == ""
    # click ends the line on which a terminal shows ^C.
    err = err.removeprefix("\n") if isinstance(error, KeyboardInterrupt) else err
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_a_mistake_of_ours_is_not_hidden(monkeypatch, command):
    def fail(count):
        raise RuntimeError("a bug")

    command(fail)
    monkeypatch.setattr(sys, "argv", ["engrampool", "it"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (1, 1), ("text", 0)])
def test_a_command_may_give_its_exit_code(monkeypatch, capsys, command, result, code):
    command(lambda count: result)
    assert ending(monkeypatch, "it", "--count", "3") == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("arguments", [("it", "--count", "x"), ("it", "--nothing"), ("it", "more")])
def test_wrong_arguments_are_a_usage_error(monkeypatch, capsys, command, arguments):
    command(lambda count: None)
    assert ending(monkeypatch, *arguments) == 2
    assert "engrampool it [OPTIONS]" in capsys.readouterr().err


def test_a_command_whose_packages_are_missing_says_which(monkeypatch, capsys):
    point = EntryPoint("serve", "not_installed.commands:serve", "engrampool.commands")
    monkeypatch.setattr(cli, "entry_points", lambda group: [point])
    assert ending(monkeypatch, "serve", "--port", "1", "x") == 1
    err = capsys.readouterr().err
    assert err == f"engrampool: serve needs the package 'not_installed': {how_to_install('server')}\n"
    assert ending(monkeypatch, "--help") == 0
    assert "serve" in capsys.readouterr().out


def test_a_command_that_misses_a_package_when_it_runs_says_which(monkeypatch, capsys, command):
    def needy(count):
        import not_installed.at_all  # noqa: F401

    command(needy)
    assert ending(monkeypatch, "it") == 1
    assert capsys.readouterr().err.startswith("engrampool: it needs the package 'not_installed': pip install ")


def test_a_module_of_ours_that_is_missing_is_not_hidden(monkeypatch, command):
    def wrong(count):
        import engrampool_proto.no_such_module  # noqa: F401

    command(wrong)
    monkeypatch.setattr(sys, "argv", ["engrampool", "it"])
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        cli.main()
