"""What is given away: the sources as an archive and the wheel, built as `python -m build` would, and tried alone."""

import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from engrampool_proto import __version__
from installed import Installed, build, install
from server_fixtures import expected, lacking, pack

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> tuple[Path, set[str]]:
    """The archive of the sources, and the names of the repository's files."""
    if find_spec("hatchling") is None:
        lacking("hatchling is not installed: pip install -e '.[dev]'")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout, nothing to compare with: run in a clone")
    # Of what is in the repository alone, whatever else lies about here.
    names = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    tree = tmp_path_factory.mktemp("tree")
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    return build("sdist", tree), names


@pytest.fixture(scope="module")
def wheel(archive, tmp_path_factory) -> Path:
    """Built of the archive, so that whoever has only that can build it."""
    directory = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive[0]) as opened:
        opened.extractall(directory, filter="data")
    (tree,) = directory.iterdir()
    return build("wheel", tree)


@pytest.fixture(scope="module")
def memory_node(wheel, place, tmp_path_factory) -> Installed:
    """With kernels that were compiled ahead, as the image has them: the compiler takes half a minute."""
    installed = install(tmp_path_factory.mktemp("memory-node"), wheel, "server")
    compiled = "engrampool_proto/kernels/compiled"
    shutil.copytree(place.packages / "proto" / compiled, installed.site / compiled)
    return installed


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory) -> Installed:
    return install(tmp_path_factory.mktemp("bare"), wheel)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def address(memory_node, small) -> Iterator[str]:
    """Of an installed server."""
    with memory_node.serving(small) as address:
        yield address


def test_the_source_archive_holds_every_file_of_the_repository(archive):
    path, names = archive
    with tarfile.open(path) as opened:
        held = {member.name.partition("/")[2] for member in opened.getmembers()}
    assert held - {"PKG-INFO"} == names


def test_what_is_installed_is_what_was_built(wheel, memory_node, bare):
    assert wheel.name.startswith(f"engrampool-{__version__}-")
    for installed in (memory_node, bare):
        assert installed.run("engrampool", "--version").stdout == f"engrampool, version {__version__}\n"
        found = installed.run("python", "-c", "import engrampool_proto; print(engrampool_proto.__file__)").stdout
        assert Path(found).is_relative_to(installed.directory)


def test_an_installed_server_answers_an_installed_client(memory_node, bare, small, address, tmp_path):
    np.save(tmp_path / "tokens.npy", np.array([11, 12, 13, 14], np.int32))
    words = ("--tokens", "tokens.npy", "--out")
    rows = bare.run("engrampool", "lookup", "--server", address, *words, "rows.npz", cwd=tmp_path)
    assert rows.returncode == 0, rows.stderr
    ids = memory_node.run("engrampool", "rows", "--model", str(small), *words, "ids.npz", cwd=tmp_path)
    assert ids.returncode == 0, ids.stderr
    with np.load(tmp_path / "rows.npz") as answered, np.load(tmp_path / "ids.npz") as hashed:
        assert answered.keys() == hashed.keys() == {"layer_2", "layer_9"}
        for layer in (2, 9):
            assert answered[f"layer_{layer}"].tobytes() == expected(layer, hashed[f"layer_{layer}"].ravel())


def test_a_client_alone_says_what_a_server_takes(bare, small):
    done = bare.run("engrampool", "serve", "--model", str(small))
    assert done.returncode == 1
    assert "pip install '.[server]'" in done.stderr
