"""The program answers at once: help and mistakes load no kernel and no gRPC, and each command only what it needs.

By the modules that a process has at its end, as times depend on the machine.
"""

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

import engrampool_client
from engrampool_proto.cli import engrampool
from engrampool_server.commands import files as commands
from engrampool_server.files.synth import CONFIGS
from engrampool_server.files.table_writer import FILE_BYTES
from server_fixtures import pack, serve_thread

KERNEL_FILES = ("gather", "hasher", "entries", "hot_rows")
# Each takes a fifth of a second or more, kernels far more where they are not compiled yet.
KERNELS = {"numba", "llvmlite", *(f"engrampool_proto.kernels.{name}" for name in KERNEL_FILES)}
NETWORK = {"grpc", "google.protobuf", "uvloop", "prometheus_client", "etcd3gw", "requests", "obstore", "ray"}
ARRAYS = {"numpy", "tokenizers", "tqdm"}
NAMES = {point.name for point in entry_points(group="engrampool.commands")}

RUN = """
import json, sys
from engrampool_proto.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["engrampool", *words]
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, (words, ended.code)
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def modules_after(*runs: list[str]) -> set[str]:
    """What one process has imported that was the program with each of these words, one after the other."""
    words = [sys.executable, "-c", RUN, json.dumps(runs)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_the_list_of_commands_imports_none():
    loaded = modules_after(["--help"], ["--version"])
    ours = {name for name in loaded if name.startswith(("engrampool_server", "engrampool_client"))}
    assert not ours | loaded & (KERNELS | NETWORK | ARRAYS)


def test_the_list_says_of_each_command_what_its_help_does():
    listed = CliRunner().invoke(engrampool, ["--help"]).output.split("Commands:\n")[1].splitlines()
    assert {line.split()[0] for line in listed} == NAMES
    context = click.Context(engrampool)
    for line in listed:
        name, summary = line.split(maxsplit=1)
        about = engrampool.get_command(context, name).get_short_help_str(limit=1000).removesuffix(".")
        assert summary
        assert about.startswith(summary.removesuffix(".").removesuffix(".."))


def test_help_of_a_command_imports_no_kernel_no_network_and_no_arrays():
    assert not modules_after(*([name, "--help"] for name in sorted(NAMES))) & (KERNELS | NETWORK | ARRAYS)


def test_print_config_imports_no_kernel_no_network_and_no_arrays():
    assert not modules_after(["serve", "--model", "x", "--print-config"]) & (KERNELS | NETWORK | ARRAYS)


def test_rows_of_a_config_imports_no_kernel_and_no_network(tmp_path: Path):
    config, tokens = tmp_path / "config.json", tmp_path / "tokens.npy"
    config.write_text(json.dumps(CONFIGS["qwen-ple"](500)))
    np.save(tokens, np.arange(4, dtype=np.int32))
    words = ["rows", "--config", str(config), "--tokens", str(tokens), "--out", str(tmp_path / "rows.npz")]
    assert not modules_after(words) & (KERNELS | NETWORK)


def test_a_lookup_imports_no_kernel(tmp_path: Path):
    tokens = tmp_path / "tokens.npy"
    np.save(tokens, np.arange(4, dtype=np.int32))
    with serve_thread(pack(tmp_path / "small")) as address:
        words = ["lookup", "--server", address, "--tokens", str(tokens), "--out", str(tmp_path / "rows.npz")]
        loaded = modules_after(words)
    assert "grpc" in loaded
    assert not loaded & KERNELS


def test_the_options_of_file_commands_are_those_of_what_they_call():
    assert tuple(CONFIGS) == commands._FAMILIES
    assert commands._FILE_MIB == FILE_BYTES >> 20


def test_the_client_is_imported_when_it_is_first_asked_for():
    say = "print('grpc' in sys.modules)"
    code = f"import sys, engrampool_client; {say}; engrampool_client.Client; {say}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.parametrize("name", engrampool_client.__all__)
def test_every_name_of_the_client_is_there(name):
    assert getattr(engrampool_client, name) is not None
    assert name in dir(engrampool_client)


def test_a_name_that_the_client_has_not_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Cleint'"):
        engrampool_client.Cleint  # noqa: B018
