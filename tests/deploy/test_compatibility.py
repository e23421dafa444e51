"""The last release beside this tree: each client asks the other server by every lane, and each reads all files."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from engrampool_client.testing import serve_process
from engrampool_proto.hashing import TokenBatch
from installed import Installed, build, install
from server_fixtures import SPEC, expected, pack

ROOT = Path(__file__).parents[2]
# There is no release yet. With this commit the lane took the frames that it has today; from there on fields and calls
# were added to what goes over the wire, and nothing there came to mean something else. docs/COMPATIBILITY.md says so.
FIRST = "5fa6e58"
TOKENS = list(range(3, 60))
LANES = {
    "grpc": {"direct": "off", "attach": "off"},
    "direct": {"attach": "off"},
    "attached": {},
    "direct, hashed there": {"attach": "off", "hashing": "server"},
}
ASK = f"""
import hashlib
import json
import sys
from engrampool_client import Client
said = {{}}
for name, settings in {LANES!r}.items():
    with Client(sys.argv[1], timeout_s=60, connect_timeout_s=60, **settings) as pool:
        rows = pool.lookup({TOKENS!r})
        digests = {{layer: hashlib.sha256(one.tobytes()).hexdigest() for layer, one in rows.items()}}
        said[name] = [pool.status()["lane"], digests]
print(json.dumps(said))
"""


def git(*words: str) -> bytes | None:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True)
    return None if done.returncode else done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Of the last release before this commit."""
    release = (git("describe", "--tags", "--abbrev=0", "--match=v*", "HEAD^") or FIRST.encode()).decode().strip()
    archive = git("archive", release)
    if archive is None:
        pytest.skip(f"{release} is not here to be built: run in a clone with all commits")
    tree = tmp_path_factory.mktemp("release")
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        opened.extractall(tree, filter="data")
    return build("wheel", tree)


@pytest.fixture(scope="module")
def release(wheel, tmp_path_factory) -> Installed:
    return install(tmp_path_factory.mktemp("server-of-release"), wheel, "server")


@pytest.fixture(scope="module")
def client_of_release(wheel, tmp_path_factory) -> Installed:
    """Without numba, as nothing is compiled in it then."""
    return install(tmp_path_factory.mktemp("client-of-release"), wheel)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("models") / "small")


def as_it_should_be() -> dict[str, list[object]]:
    """By way: the lane that it is to be, and the digest of each layer's rows."""
    ids = SPEC.hash(TokenBatch.of(np.array(TOKENS, np.int32)))
    rows = {str(layer): hashlib.sha256(expected(layer, one.ravel())).hexdigest() for layer, one in ids.items()}
    return {name: [name.partition(",")[0], rows] for name in LANES}


def test_a_client_of_the_release_asks_a_server_of_this_tree(client_of_release, small, tmp_path):
    with serve_process(small, memory=f"file:{tmp_path}") as server:
        done = client_of_release.run("python", "-c", ASK, server.address)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == as_it_should_be()


@pytest.mark.slow  # its kernels have to be compiled
def test_a_client_of_this_tree_asks_a_server_of_the_release(release, small, tmp_path):
    with release.serving(small, f"--memory=file:{tmp_path}") as address:
        done = subprocess.run([sys.executable, "-c", ASK, address], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == as_it_should_be()


def test_each_reads_what_the_other_has_packed(release, small, tmp_path):
    done = release.run("engrampool", "verify", str(small))
    assert done.returncode == 0, done.stderr
    done = release.run("engrampool", "synth", "--like=qwen-ple", "--vocab-size=1000", "--out=packed", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    here = [sys.executable, "-m", "engrampool_proto", "verify", str(tmp_path / "packed")]
    done = subprocess.run(here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
