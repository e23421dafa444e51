"""Which form a client computes by: kernels where they can be had, else numpy, and it says why."""

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import engrampool_proto
from engrampool_client import AsyncClient, Client
from engrampool_client.compute.forms import choose

SAY = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from engrampool_client.compute.forms import choose
for setting in sys.argv[1:]:
    try:
        print(choose(setting).compiled)
    except ValueError as error:
        print(f"ValueError: {error}")
"""
# As test_jit.py: no directory that kernels could be kept in.
NOWHERE = {"NUMBA_CACHE_DIR": "/proc/nowhere", "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}


def said(*settings: str, before: str = "", **environ: str) -> list[str]:
    """What a process of its own says that chooses by these settings, one after the other."""
    words = [sys.executable, "-c", before + SAY, *settings]
    done = subprocess.run(words, env={**os.environ, **environ}, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_kernels_are_taken_where_numba_is_and_it_is_said(caplog):
    with caplog.at_level("INFO", "engrampool"):
        assert choose("auto").compiled
        assert not choose("off").compiled
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("a client computes by compiled kernels: numba ")
    assert caplog.messages[1] == 'a client computes by numpy: compiled="off"'


def test_without_numba_numpy_does_it_and_who_insists_is_refused():
    without = "import sys; sys.modules.update(numba=None, llvmlite=None)\n"
    first, second, third = said("auto", "on", before=without)
    assert first.startswith("a client computes by numpy: numba cannot be imported (")
    assert first.endswith("); pip install '.[fast]' brings it")
    assert second == "False"
    assert third.startswith('ValueError: compiled="on" cannot be: numba cannot be imported (')


def test_where_numba_compiles_nothing_it_is_not_imported():
    report = "import atexit, sys; atexit.register(lambda: print('numba' in sys.modules))\n"
    first, second, third, imported = said("auto", "on", before=report, NUMBA_DISABLE_JIT="1")
    assert first.startswith("a client computes by numpy: NUMBA_DISABLE_JIT is set")
    assert (second, imported) == ("False", "False")
    assert third.startswith('ValueError: compiled="on" cannot be: NUMBA_DISABLE_JIT is set')


def test_off_imports_no_numba():
    report = "import atexit, sys; atexit.register(lambda: print('numba' in sys.modules))\n"
    assert said("off", before=report) == ['a client computes by numpy: compiled="off"', "False", "False"]


def test_where_kernels_cannot_be_kept_numpy_does_it_and_nothing_is_compiled():
    report = "import atexit, sys; atexit.register(lambda: print('engrampool_proto.kernels.hasher' in sys.modules))\n"
    first, second, compiled = said("auto", before=report, **NOWHERE)
    assert first.startswith("a client computes by numpy: compiled kernels cannot be kept (")
    assert "no locator available" in first
    assert (second, compiled) == ("False", "False")


def test_damaged_kernels_fail_no_client(tmp_path: Path):
    choose("on")  # so that there are some, which are copied here
    shutil.copytree(Path(engrampool_proto.__file__).parent, tmp_path / "engrampool_proto")
    environ = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    assert said("auto", **environ)[-1] == "True"
    for damaged in tmp_path.rglob("*.nbi"):  # a client loads but some of them
        damaged.write_bytes(damaged.read_bytes()[:10])
    first, second = said("auto", **environ)
    assert first.startswith("a client computes by numpy: compiled kernels cannot be kept (")
    assert second == "False"


def test_the_settings_of_the_hosts_numba_are_left_alone(tmp_path: Path):
    before = "import os; was = dict(os.environ)\n"
    after = "import atexit; atexit.register(lambda: print(was == dict(os.environ)))\n"
    assert said("auto", before=before + after)[-1] == "True"


@pytest.mark.parametrize("setting", ["auto", "off", "on"])
def test_a_client_says_which_it_is_and_gives_the_same_rows(server, setting):
    tokens = np.arange(300, dtype=np.int32)
    with Client(server, compiled=setting) as client, Client(server, compiled="off") as other:
        assert client.compiled is (setting != "off")
        status = client.status()
        assert status["compiled"] is client.compiled
        assert status["why_not_compiled"] == ('compiled="off"' if setting == "off" else None)
        found, wanted = client.lookup(tokens), other.lookup(tokens)
        assert all(np.array_equal(found[layer], rows) for layer, rows in wanted.items())


def test_the_client_of_asyncio_says_it_too(server):
    async def compiled(setting: str) -> bool:
        async with AsyncClient(server, compiled=setting) as client:
            return client.compiled

    assert asyncio.run(compiled("on")) is True
    assert asyncio.run(compiled("off")) is False


def test_a_setting_that_there_is_not_is_refused(server):
    with pytest.raises(ValueError, match="compiled must be 'auto' or 'off' or 'on', not 'yes'"):
        Client(server, compiled="yes")
