"""Where compiled kernels are kept, and who needs a compiler at all."""

import os
import subprocess
import sys
from pathlib import Path

from engrampool_client.testing import serve_process
from server_fixtures import RawPool, expected, pack, rows_of, version_of

# Numba looks for a writable directory in several places. None is left here, as in a read-only container without a home.
NOWHERE = {"NUMBA_CACHE_DIR": "/proc/nowhere", "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}


def python(code: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environ}, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_server_that_can_keep_no_kernels_compiles_them_says_so_and_serves(tmp_path):
    directory = pack(tmp_path / "small")
    with serve_process(directory, environ=NOWHERE, workers=1) as server:
        event = server.wait_for("kernels-not-kept")
        assert event["level"] == "warning"
        assert "no locator available" in event["reason"]
        with RawPool(server.address, version_of(directory)) as pool:
            answer = rows_of(pool.lookup(pool.by_ids((2, [5, 0]), (9, [4099])), timeout=30))
    assert answer == {2: expected(2, [5, 0]), 9: expected(9, [4099])}


def test_kernels_are_compiled_once_and_then_read(tmp_path):
    count = (
        "import engrampool_server.tables; from engrampool_server import gather, hasher, jit\n"
        "every = [*vars(gather).values(), *vars(hasher).values()]\n"
        "kernels = [k for k in every if 'nogil' in getattr(k, 'targetoptions', ())]\n"
        "print(sum(sum(k.stats.cache_hits.values()) for k in kernels),"
        " sum(sum(k.stats.cache_misses.values()) for k in kernels), jit.not_kept())"
    )
    hits, misses, not_kept = python(count, NUMBA_CACHE_DIR=str(tmp_path)).split()
    assert (hits, not_kept) == ("0", "None")
    assert int(misses) > 0
    assert python(count, NUMBA_CACHE_DIR=str(tmp_path)).split() == [misses, "0", "None"]


def test_clients_and_the_command_line_need_no_compiler():
    modules = "engrampool_client, engrampool_client.commands, engrampool_proto.cli"
    python(f"import sys; sys.modules.update(numba=None, llvmlite=None); import {modules}")


def test_the_commands_on_files_need_no_compiler(tmp_path: Path):
    directory = pack(tmp_path / "small")
    code = "import sys; sys.modules.update(numba=None, llvmlite=None); from engrampool_proto.cli import main; "
    assert "small" in python(f"{code} sys.argv[1:] = ['inspect', {str(directory)!r}]; main()")
