"""Where compiled kernels are kept, and who needs a compiler at all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import llvmlite.binding
import numpy as np
import pytest

import engrampool_proto
from engrampool_client.testing import serve_process
from engrampool_proto.kernels import entries, hasher, hot_rows, jit
from server_fixtures import RawPool, expected, pack, rows_of, version_of

# Numba looks for a writable directory in several places. None is left here, as in a read-only container without a home.
NOWHERE = {"NUMBA_CACHE_DIR": "/proc/nowhere", "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}


def python(code: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environ}, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_server_that_can_keep_no_kernels_compiles_them_says_so_and_serves(tmp_path):
    directory = pack(tmp_path / "small")
    # Without optimization the compiler takes less time.
    environ = {**NOWHERE, "NUMBA_OPT": "0"}
    with serve_process(directory, environ=environ, workers=1, ready=False) as server:
        address = server.wait_for("serving", timeout_s=300)["listen"]  # a compiler is at work before
        event = server.wait_for("kernels-not-kept")
        assert event["level"] == "warning"
        assert "no locator available" in event["reason"]
        with RawPool(address, version_of(directory)) as pool:
            answer = rows_of(pool.lookup(pool.by_ids((2, [5, 0]), (9, [4099])), timeout=60))
    assert answer == {2: expected(2, [5, 0]), 9: expected(9, [4099])}


def test_every_kernel_is_read_by_the_next_who_starts():
    count = (
        "from engrampool_proto.kernels import gather, hasher, jit\n"
        "every = [*vars(gather).values(), *vars(hasher).values()]\n"
        "kernels = [k for k in every if 'nogil' in getattr(k, 'targetoptions', ())]\n"
        "print(sum(sum(k.stats.cache_hits.values()) for k in kernels),"
        " sum(sum(k.stats.cache_misses.values()) for k in kernels), jit.not_kept())"
    )
    hits, misses, not_kept = python(count).split()  # some may have been compiled before
    assert not_kept == "None"
    assert int(hits) + int(misses) > 0
    assert python(count).split() == [str(int(hits) + int(misses)), "0", "None"]


def test_clients_and_the_command_line_need_no_compiler():
    modules = "engrampool_client, engrampool_client.commands, engrampool_proto.cli"
    python(f"import sys; sys.modules.update(numba=None, llvmlite=None); import {modules}")


def test_the_commands_on_files_need_no_compiler(tmp_path: Path):
    directory = pack(tmp_path / "small")
    code = "import sys; sys.modules.update(numba=None, llvmlite=None); from engrampool_proto.cli import main; "
    assert "small" in python(f"{code} sys.argv[1:] = ['inspect', {str(directory)!r}]; main()")


class Installed:
    """A copy of `package` in a directory; a test may damage it."""

    def __init__(self, directory: Path, package: Path) -> None:
        self.package = directory / "engrampool_proto"
        shutil.copytree(package, self.package, ignore=shutil.ignore_patterns("__pycache__"))
        self.kernels = self.package / "kernels"
        self.source = self.kernels / "small.py"
        self.elsewhere = directory / "elsewhere"

    def run(self, code: str, **environ: str) -> list[str]:
        """What code of this package prints, with NUMBA_CACHE_DIR at `elsewhere`."""
        path = os.pathsep.join([str(self.package.parent), *sys.path])
        return python(code, PYTHONPATH=path, NUMBA_CACHE_DIR=str(self.elsewhere), **environ).split()

    def start(self, **environ: str) -> tuple[str, str, str]:
        """How many kernels were read, how many were compiled, and why they are not kept."""
        code = (
            "from engrampool_proto.kernels import jit, small; k = small.add_one; assert k(1) == 2; "
            "reason = jit.not_kept(); print(sum(k.stats.cache_hits.values()), sum(k.stats.cache_misses.values()), "
            "reason and reason.split(':')[0])"
        )
        return tuple(self.run(code, **environ))

    @property
    def kept_elsewhere(self) -> list[Path]:
        return list(self.elsewhere.rglob("*.nbi"))


@pytest.fixture(scope="module")
def compiled_ahead(tmp_path_factory) -> Path:
    """The package with one kernel more, which is compiled ahead; not to be changed."""
    package = tmp_path_factory.mktemp("ahead") / "engrampool_proto"
    ignored = shutil.ignore_patterns("__pycache__", "compiled")
    shutil.copytree(Path(engrampool_proto.__file__).parent, package, ignore=ignored)
    (package / "kernels" / "small.py").write_text(
        "from numba import types\n"
        "from engrampool_proto.kernels.jit import kernel\n\n"
        "@kernel(types.int64(types.int64))\n"
        "def add_one(x):\n    return x + 1\n"
    )
    (package / "kernels" / "compiled" / jit.level()).mkdir(parents=True)
    python("import engrampool_proto.kernels.small", PYTHONPATH=os.pathsep.join([str(package.parent), *sys.path]))
    return package


@pytest.fixture
def installed(tmp_path: Path, compiled_ahead: Path) -> Installed:
    return Installed(tmp_path, compiled_ahead)


def test_kernels_that_were_compiled_ahead_are_read_also_after_copying(installed):
    os.utime(installed.source, (0, 0.5))  # as layers of images keep no fractions
    assert installed.start() == ("1", "0", "None")
    assert not installed.elsewhere.exists()


def test_kernels_of_other_sources_are_compiled_again(installed):
    installed.source.write_text(installed.source.read_text() + "# changed\n")
    assert installed.start() == ("0", "1", "None")


@pytest.mark.parametrize(("other", "ahead"), [("kernels/gather.py", True), ("frames.py", False)])
def test_kernels_are_compiled_again_where_what_they_call_is_another(installed, other, ahead):
    if not ahead:
        shutil.rmtree(installed.kernels / "compiled")
        installed.start()
    assert installed.start() == ("1", "0", "None")
    path = installed.package / other
    path.write_text(path.read_text() + "# changed\n")
    assert installed.start() == ("0", "1", "None")
    assert installed.start() == ("1", "0", "None")


@pytest.mark.skipif(jit.level() == "generic", reason="this processor is of no other level than generic")
def test_kernels_of_another_level_are_not_read(installed):
    assert installed.start(NUMBA_CPU_NAME="generic") == ("0", "1", "None")
    assert installed.kept_elsewhere


def test_damaged_kernels_that_were_compiled_ahead_are_compiled_and_kept_elsewhere(installed):
    for path in (installed.kernels / "compiled").rglob("*.nb?"):
        path.write_bytes(b"")
    assert installed.start() == ("0", "1", "None")
    assert installed.start() == ("1", "0", "None")
    assert installed.kept_elsewhere


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_damaged_kernels_are_compiled_and_the_server_says_so(installed, kind):
    shutil.rmtree(installed.kernels / "compiled")
    assert installed.start() == ("0", "1", "None")
    for path in installed.elsewhere.rglob(f"*.{kind}"):
        path.write_bytes(path.read_bytes()[:10])
    assert installed.start()[2] in ("UnpicklingError", "EOFError")


V2 = dict.fromkeys(["cx16", "popcnt", "sahf", "sse3", "sse4.1", "sse4.2", "ssse3"], True)
V3 = V2 | dict.fromkeys(["avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"], True)
V4 = V3 | dict.fromkeys(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"], True)


@pytest.mark.parametrize(
    ("machine", "features", "level"),
    [
        ("x86_64", {}, "generic"),
        ("x86_64", V2, "x86-64-v2"),
        ("x86_64", V3, "x86-64-v3"),
        ("x86_64", V4, "x86-64-v4"),
        # A hypervisor may hide any of them.
        ("x86_64", V4 | {"avx2": False}, "x86-64-v2"),
        ("x86_64", V3 | {"sse3": False}, "generic"),
        ("aarch64", V3, "generic"),
    ],
)
def test_the_level_is_one_of_which_nothing_is_missing(monkeypatch, machine, features, level):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(llvmlite.binding, "get_host_cpu_features", lambda: features)
    assert jit.level() == level


def test_a_few_items_keep_the_gil_and_more_let_others_have_it(monkeypatch):
    def asked(items: int) -> int:
        keys, first, inverse = np.zeros((1, items), np.int64), np.empty(items, np.int64), np.empty(items, np.int64)
        return entries.distinct(keys, np.empty(0, np.bool_), np.uint64(3), first, np.empty(1, np.int64), inverse)

    for kernel in (entries.distinct, entries.place, hot_rows.find, hot_rows.put, hasher.xor_mix, hasher.xor_mix_keys):
        assert (kernel.targetoptions["nogil"], kernel.held.targetoptions["nogil"]) == (True, False)
    held, sizes = entries.distinct.held, []
    monkeypatch.setattr(entries.distinct, "held", lambda *given: sizes.append(given[0].size) or held(*given))
    assert [asked(items) for items in (1, jit.FEW, jit.FEW + 1)] == [1, 1, 1]
    assert sizes == [1, jit.FEW]
