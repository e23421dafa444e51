"""What stands in a server's way from outside, and is named: limits of its process, files that it may not read."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from server_fixtures import LIMIT_S, RawPool, eventually, expected, lacking, pack, rows_of, version_of

SERVE = [sys.executable, "-m", "engrampool_proto", "serve", "--listen=127.0.0.1:0", "--metrics=off", "--workers=1"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("limits") / "small")


def fails(*command: str, **how) -> str:
    """The one line that a server which cannot start ends with."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **how)
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("engrampool: ")
    return done.stderr.splitlines()[-1]


def limited(flags: str) -> list[str]:
    """Words before a command that has these limits. Not by preexec_fn: gRPC's handlers of forks would run before it."""
    return ["sh", "-c", f'ulimit {flags} && exec "$@"', "sh"]


@pytest.mark.parametrize(("mib", "available"), [(700, "700.0 MiB"), (1200, "1.1 GiB")])
def test_too_little_address_space_is_named_before_anything_is_loaded(packed, mib, available):
    said = fails(*limited(f"-v {mib << 10}"), *SERVE, f"--model={packed}")
    assert re.search(rf"address space: \d\.\d GiB needed, {available} available, short by .*ulimit -v unlimited", said)


def test_address_space_in_which_no_library_can_be_loaded_is_named(packed):
    said = fails(*limited(f"-v {300 << 10}"), *SERVE, f"--model={packed}")
    assert "this process may have 300 MiB of address space only" in said


def test_a_soft_limit_on_address_space_is_raised(packed):
    # It comes as far as to its models, of which there are none.
    said = fails(*limited(f"-S -v {700 << 10}"), *SERVE, f"--model={packed / 'absent'}")
    assert "is no packed model" in said


def test_kernels_that_would_not_be_compiled_are_named(packed):
    said = fails(*SERVE, f"--model={packed}", env={**os.environ, "NUMBA_DISABLE_JIT": "1"})
    assert "NUMBA_DISABLE_JIT is set" in said
    assert said.endswith("unset it")


def test_a_limit_on_the_size_of_files_is_named(packed):
    said = fails(*limited("-f 2048"), *SERVE, f"--model={packed}")  # of 512 bytes
    assert said.endswith("(this process may have files of 1024 KiB only: ulimit -f unlimited)")


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_server_without_standard_error_serves(packed, tmp_path, closed):
    path = tmp_path / "pool.sock"
    command = [word if word != "--listen=127.0.0.1:0" else f"--listen=unix:{path}" for word in SERVE]
    shell = f'exec "$@" {closed}'
    with subprocess.Popen(["sh", "-c", shell, "sh", *command, f"--model={packed}"]) as process:
        try:
            with RawPool(f"unix:{path}", version_of(packed)) as pool:
                eventually(lambda: process.poll() is not None or path.exists(), "it listens, or ended")
                # The lobby, which leaves in the workers' favour, may answer first.
                answer = eventually(lambda: tried(pool), "it answers")
            assert rows_of(answer) == {2: expected(2, [5, 6])}
            process.terminate()
            assert process.wait(LIMIT_S) == 0
        finally:
            process.kill()


def tried(pool: RawPool):
    try:
        return pool.lookup(pool.by_ids((2, [5, 6])), timeout=LIMIT_S)
    except grpc.RpcError:
        return None


@pytest.fixture
def powerless() -> list[str]:
    """Words before a command that may read no more than its files' modes say, though it be root's."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        lacking("no program `setpriv` (util-linux): install it, or run as another user than root")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


@pytest.mark.parametrize("part", ["manifest.json", "layer_2-00001-of-00001.safetensors", "."])
def test_files_that_may_not_be_read_are_named_with_the_user(packed, powerless, tmp_path, part):
    directory = tmp_path / "small"
    shutil.copytree(packed, directory)
    (directory / part).chmod(0)
    said = fails(*powerless, *SERVE, f"--model={directory}")
    (directory / part).chmod(0o700)
    assert str(directory / ("manifest.json" if part == "." else part)) in said
    assert f"Permission denied: user {os.geteuid()} may not read it" in said
    assert "pack the model again" not in said
