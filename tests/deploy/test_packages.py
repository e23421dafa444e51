"""What is given away: the sources as an archive, built as `python -m build` would."""

import shutil
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from server_fixtures import lacking

ROOT = Path(__file__).parents[2]


def test_the_source_archive_holds_every_file_of_the_repository(tmp_path: Path):
    if find_spec("hatchling") is None:
        lacking("hatchling is not installed: pip install -e '.[dev]'")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout, nothing to compare with: run in a clone")
    # Of what is in the repository alone, whatever else lies about here.
    names = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "sdist"], cwd=tmp_path, check=True)
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as opened:
        held = {member.name.partition("/")[2] for member in opened.getmembers()}
    assert held - {"PKG-INFO"} == names
