"""Processes under what a container runtime imposes, made of namespaces, as there is no runtime where tests run.

The root holds the system's programs and libraries, this interpreter and a copy of our packages, all read-only, and what
is mounted. There is no seccomp filter and no limit of memory or processors, and the server is not process 1 of its own
namespace.
"""

import contextlib
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from engrampool_client.testing import ServerProcess, serve_process

ROOT = Path(__file__).parents[1]
# Once it has said something, its network is there. It ends with its input.
_HOLD = ["unshare", "--net", "sh", "-c", "ip link set lo up && echo && exec cat"]


class NotPermittedError(Exception):
    """This machine lets us make no namespaces; the text says what is missing."""


@dataclass(frozen=True)
class Container:
    """What a server is started in.

    environment: all of it. user: uid, gid; groups: further gids.
    mounts: by path, options of mount(8) that put something there: {"/model": "--bind -o ro /srv/model"}.
    shm_bytes: of /dev/shm, where nothing is mounted there. unlimited_memlock: else as it is here.
    """

    environment: Mapping[str, str]
    user: tuple[int, int]
    groups: tuple[int, ...] = ()
    mounts: Mapping[str, str] = field(default_factory=dict)
    shm_bytes: int = 64 << 20
    unlimited_memlock: bool = False


@dataclass(frozen=True)
class Containers:
    """Where containers can be started. packages: the folder that has ours, with proto, server and client in it.

    network: words before a command that is to run where the containers' loopback is.
    """

    packages: Path
    network: Sequence[str]
    directory: Path

    @property
    def python_path(self) -> str:
        """Of our packages."""
        return ":".join(str(self.packages / name) for name in ("proto", "server", "client"))

    def run(self, *words: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        """Run this interpreter in the containers' network, without their constraints."""
        path = f"{self.python_path}:{ROOT / 'tests'}"
        return subprocess.run(
            [*self.network, sys.executable, *words],
            env={**os.environ, "PYTHONPATH": path, **environ},
            capture_output=True,
            text=True,
            timeout=300,
        )

    @contextmanager
    def serving(self, container: Container) -> Iterator[ServerProcess]:
        """`engrampool serve` with no further words, as the image starts it, once it serves; then it has to stop."""
        prefix = [*self.network, "unshare", "--mount", "--ipc", "sh", "-euc", self._script(container), "sh"]
        with serve_process(ready=False, prefix=prefix) as server:
            server.wait_for("serving")
            yield server
            server.process.terminate()
            assert server.process.wait(60) == 0

    def _script(self, container: Container) -> str:
        """What becomes the server, given its command line, of which only the first four words are kept."""
        root = self.directory / "root"
        root.mkdir(exist_ok=True)
        lines = [f"mount -t tmpfs -o mode=755 none {root}"]

        def mount(path: str | Path, options: str) -> None:
            lines.append(f"mkdir -p {root}{path} && mount {options} {root}{path}")

        for name in ("usr", "bin", "sbin", "lib", "lib64", "etc", "sys"):
            path = Path("/", name)
            if path.is_symlink():
                lines.append(f"ln -s {path.readlink()} {root}/{name}")
            elif path.exists():
                mount(path, f"--rbind {path}")
        mount("/proc", "-t proc none")
        mount("/dev", "-t tmpfs -o mode=755 none")
        lines += [f"touch {root}/dev/{name} && mount --bind /dev/{name} {root}/dev/{name}" for name in _DEVICES]
        lines.append(f"mkdir -m 1777 -p {root}/tmp {root}/var/tmp")  # images have them, of use or not
        mounts = {"/dev/shm": f"-t tmpfs -o mode=1777,size={container.shm_bytes} none", **container.mounts}
        # As the last, since they may lie where something is mounted.
        ours = {str(one): f"--bind -o ro {one}" for one in sorted({sys.base_prefix, sys.prefix, str(self.packages)})}
        for path, options in {**mounts, **ours}.items():
            if not path.startswith("/usr/"):
                mount(path, options)
        lines.append(f"mount -o remount,ro {root} && mount -o remount,ro {root}/dev")
        uid, gid = container.user
        groups = f"--groups {','.join(map(str, container.groups))}" if container.groups else "--clear-groups"
        environment = {"HOME": "/", **container.environment, "PYTHONPATH": self.python_path}
        if container.unlimited_memlock:  # as far as this machine lets even root
            lines.append("prlimit --pid $$ --memlock=unlimited:unlimited || true")
        lines.append(
            f"exec chroot {root} "
            f"setpriv --reuid {uid} --regid {gid} {groups} --inh-caps=-all --bounding-set=-all --no-new-privs "
            f'env -i {shlex.join(f"{name}={value}" for name, value in environment.items())} "$1" "$2" "$3" "$4"'
        )
        return "\n".join(lines)


_DEVICES = ("null", "zero", "full", "random", "urandom")


@contextmanager
def containers(directory: Path, packages: Path) -> Iterator[Containers]:
    """A place for containers. Raises NotPermittedError.

    packages: where our packages are, with kernels compiled ahead for this processor. Whoever is the first makes it.
    """
    programs = ("ip", "mount", "nsenter", "prlimit", "setpriv", "unshare")
    missing = [name for name in programs if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        raise NotPermittedError(f"{', '.join(missing)} not installed" if missing else "needs root")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(_HOLD, **pipes) as holder, contextlib.ExitStack() as stack:
        stack.callback(holder.stdin.close)
        if not holder.stdout.readline():
            raise NotPermittedError(holder.stderr.read().decode().strip())
        place = Containers(packages, ("nsenter", f"--net=/proc/{holder.pid}/ns/net"), directory)
        done = subprocess.run(
            ["unshare", "--mount", "mount", "-t", "tmpfs", "none", directory],
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode:
            raise NotPermittedError(done.stderr.strip())
        _make(packages)
        yield place


def _make(packages: Path) -> None:
    """Copy our packages, with compiled kernels, and bytecode as pip makes it: none can be written in a container."""
    with packages.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process of tests compiles, others wait for it
        if packages.exists():
            return
        unfinished = packages.with_suffix(".unfinished")
        for name in ("proto", "server", "client"):
            shutil.copytree(ROOT / name, unfinished / name, ignore=shutil.ignore_patterns("__pycache__", "compiled"))
        code = "import compileall, sys; from engrampool_proto.kernels import jit; "
        code += "jit.compile_ahead(jit.level()); sys.exit(not compileall.compile_dir(sys.argv[1], quiet=1))"
        environ = {**os.environ, "PYTHONPATH": str(unfinished / "proto")}
        command = [sys.executable, "-c", code, str(unfinished)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        unfinished.rename(packages)
