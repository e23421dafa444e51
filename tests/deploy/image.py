"""The image as buildah builds it, and a server in it, as `make test-image` runs them; `make test` does not.

It takes minutes, root, and the network: for Debian's packages, and for wheels, which this machine's pip fetches.
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from certificates import Authority, write_callers
from engrampool_client.testing import ServerProcess, serve_process
from network import Host, network
from server_fixtures import expected, pack

ROOT = Path(__file__).parents[2]
# Of what the image adds to its base.
MOST_BYTES = 350_000_000
NAME = "localhost/engrampool"
# The first test waits for the build.
pytestmark = pytest.mark.timeout(1800)


def run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, **options)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


@dataclass(frozen=True)
class Buildah:
    """Its images and containers lie in a directory of their own."""

    directory: Path

    def run(self, *words: str | Path) -> str:
        storage = ("--root", self.directory / "storage", "--runroot", self.directory / "run")
        environ = {**os.environ, "BUILDAH_ISOLATION": "chroot"}  # the one that needs no container runtime
        return run("buildah", *storage, *words, env=environ).strip()

    def root(self, image: str) -> Path:
        """The files of a new container of an image."""
        return Path(self.run("mount", self.run("from", image)))


@pytest.fixture(scope="session")
def buildah(tmp_path_factory) -> Iterator[Buildah]:
    assert os.geteuid() == 0, "needs root"
    for program in ("buildah", "debootstrap"):
        assert shutil.which(program), f"{program} is not installed (Debian: apt-get install {program})"
    made = Buildah(tmp_path_factory.mktemp("buildah"))
    try:
        yield made
    finally:
        made.run("umount", "--all")
        made.run("rm", "--all")
        shutil.rmtree(made.directory)


@pytest.fixture(scope="session")
def base(buildah, tmp_path_factory) -> str:
    """An image as python:3.11-slim, of Debian's own packages, where there may be no registry; else BASE names one."""
    if named := os.environ.get("BASE"):
        return named
    root = tmp_path_factory.mktemp("base") / "root"
    wanted = "--include=python3,python3-venv,ca-certificates"
    run("debootstrap", "--variant=minbase", wanted, "bookworm", root)
    container = buildah.run("from", "scratch")
    buildah.run("add", container, root, "/")
    buildah.run("commit", "--rm", container, "localhost/base")
    shutil.rmtree(root)
    return "localhost/base"


@pytest.fixture(scope="session")
def image(buildah, base, tmp_path_factory) -> dict[str, Any]:
    """What the built image says of itself: its configuration."""
    wheels = tmp_path_factory.mktemp("wheels")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", wheels]
    wanted = ("hatchling", ".[server,sources,etcd]")
    run(*download, "--only-binary=:all:", "--python-version=3.11", *wanted, cwd=ROOT)
    # However this machine's pip comes by them, the one in the build needs to know nothing of it.
    config = tmp_path_factory.mktemp("pip") / "pip.conf"
    config.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    volumes = (f"--volume={wheels}:/wheels:ro", f"--volume={config}:/etc/pip.conf:ro")
    buildah.run("build", "--format=docker", f"--build-arg=BASE={base}", *volumes, f"--tag={NAME}", ROOT)
    shutil.rmtree(wheels)
    return json.loads(buildah.run("inspect", "--type=image", NAME))["Docker"]["config"]


@pytest.fixture(scope="session")
def root(buildah, image) -> Path:
    return buildah.root(NAME)


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    """The image's ports are free there."""
    with network(1) as (made,):
        yield made


@dataclass(frozen=True)
class Place:
    """Where the image's programs run: its files, read-only; its user, without any right; its environment and more."""

    root: Path
    host: Host
    config: dict[str, Any]
    environment: dict[str, str]
    mounts: dict[str, Path]

    def prefix(self, *words: str) -> list[str]:
        """Words that run these, whatever words come after them."""
        lines = [f"mount --bind {self.root} {self.root}"]
        for path, source in self.mounts.items():
            (self.root / path[1:]).mkdir(exist_ok=True)  # as a runtime does
            lines.append(f"mount --bind -o ro {source} {self.root}{path}")
        lines.append(f"touch {self.root}/etc/hosts && mount --bind -o ro /etc/hosts {self.root}/etc/hosts")
        lines += [f"mount -t proc none {self.root}/proc", f"mount --rbind /dev {self.root}/dev"]
        lines.append(f"mount -o remount,ro,bind {self.root} && ! touch {self.root}/opt/engrampool/new 2>&-")
        uid, gid = self.config["User"].split(":")
        confined = (
            f"setpriv --reuid {uid} --regid {gid} --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs"
        )
        environment = [*self.config["Env"], *(f"{name}={value}" for name, value in self.environment.items())]
        lines.append(f"exec chroot {self.root} {confined} env -i HOME=/ {shlex.join([*environment, *words])}")
        return [*self.host.prefix, "unshare", "--mount", "sh", "-euc", "\n".join(lines), "sh"]


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def place(root, host, image, model, authority, tmp_path_factory) -> Place:
    secrets = tmp_path_factory.mktemp("secrets")
    for name, file in authority.of_server().items():
        shutil.copy(file, secrets / name)
    write_callers(secrets / "callers.toml", {"name": "reader", "token": "a-token"})
    for one in secrets.iterdir():
        shutil.chown(one, 10001, 10001)
    environment = {
        "ENGRAMPOOL_TLS_CERT": "/secrets/tls_cert",
        "ENGRAMPOOL_TLS_KEY": "/secrets/tls_key",
        "ENGRAMPOOL_TOKENS": "/secrets/callers.toml",
        "ENGRAMPOOL_DIRECT": "off",
    }
    secrets.chmod(0o755)
    return Place(root, host, image, environment, {"/model": model, "/secrets": secrets})


@pytest.fixture(scope="session")
def server(place, image) -> Iterator[ServerProcess]:
    prefix = place.prefix(*image["Entrypoint"], *image["Cmd"])
    with serve_process(ready=False, prefix=prefix) as running:
        running.wait_for("serving")
        yield running
        running.process.terminate()
        assert running.process.wait(60) == 0


def nbytes(root: Path) -> int:
    return sum(path.lstat().st_size for path in root.rglob("*") if not path.is_dir())


def test_it_is_no_larger_than_it_has_to_be(buildah, base, root, capsys):
    added = nbytes(root) - nbytes(buildah.root(base))
    with capsys.disabled():
        print(f"\nthe image adds {added / 1e6:.0f} MB to its base")
    assert added <= MOST_BYTES


def test_it_has_kernels_for_every_level_of_processor(root):
    (compiled,) = root.glob("opt/engrampool/lib/python3*/site-packages/engrampool_proto/kernels/compiled")
    levels = {"x86-64-v2", "x86-64-v3", "x86-64-v4", "generic"} if platform.machine() == "x86_64" else {"generic"}
    assert {path.name for path in compiled.iterdir()} == levels
    assert all(any(path.iterdir()) for path in compiled.iterdir())


def test_no_file_of_it_belongs_to_its_user(root, image):
    assert image["User"] == "10001:10001"
    owned = [
        path for path in (root / "opt/engrampool").rglob("*") if 10001 in (path.lstat().st_uid, path.lstat().st_gid)
    ]
    assert owned == []


def test_the_libraries_in_it_load_without_what_was_left_out(place):
    words = '{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 7}, "unk_token": "a"}}'
    code = "import etcd3gw, obstore, tokenizers, uvloop; uvloop.new_event_loop().close(); "
    code += f"print(tokenizers.Tokenizer.from_str({words!r}).encode('a').ids, type(obstore.store.MemoryStore()))"
    assert run(*place.prefix("python", "-c", code)).startswith("[7] ")


def test_its_server_answers_over_tls_from_kernels_that_it_has(server, host, authority, model, tmp_path):
    assert server.said("kernels-not-kept") == []  # else they were compiled as it started
    np.save(tmp_path / "tokens.npy", np.array([11, 12, 13, 14], np.int32))
    program = (sys.executable, "-m", "engrampool_proto")
    words = ("--server", "127.0.0.1:50051", "--tls-ca", authority.ca, "--tokens", tmp_path / "tokens.npy")
    refused = subprocess.run(
        [*host.prefix, *program, "lookup", *words, "--out", tmp_path / "none.npz"], capture_output=True, text=True
    )
    assert "(UNAUTHENTICATED)" in refused.stderr
    run(*host.prefix, *program, "lookup", *words, "--token=a-token", "--out", tmp_path / "rows.npz")
    run(*program, "rows", "--model", model, "--tokens", tmp_path / "tokens.npy", "--out", tmp_path / "ids.npz")
    with np.load(tmp_path / "rows.npz") as answered, np.load(tmp_path / "ids.npz") as hashed:
        assert answered.keys() == hashed.keys() == {"layer_2", "layer_9"}
        for layer in (2, 9):
            assert answered[f"layer_{layer}"].tobytes() == expected(layer, hashed[f"layer_{layer}"].ravel())


def test_its_health_check_finds_the_server_well(server, place, image):
    kind, *words = image["Healthcheck"]["Test"]
    assert kind == "CMD"
    assert run(*place.prefix(*words)) == ""
