"""Our packages as they are given away: built of a tree, installed in virtual environments of their own."""

import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement


def build(target: str, tree: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target]
    subprocess.run(command, cwd=tree, check=True, stdout=subprocess.DEVNULL)
    (built,) = (tree / "dist").iterdir()
    return built


def requirements(name: str, extras: set[str]) -> set[str]:
    """The distributions that pip would install for `name[extras]`, and for what these require."""
    found: set[str] = set()
    asked: set[tuple[str, str]] = set()
    wanted = [(name, extra) for extra in ("", *extras)]
    while wanted:
        one = wanted.pop()
        if one in asked:
            continue
        asked.add(one)
        for text in metadata.requires(one[0]) or ():
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": one[1]}):
                found.add(needed.name)
                wanted += [(needed.name, extra) for extra in ("", *needed.extras)]
    return found


@dataclass(frozen=True)
class Installed:
    """A virtual environment that has the wheel, and what it says that it requires, and nothing else."""

    directory: Path

    @property
    def site(self) -> Path:
        """Where packages are."""
        return Path(sysconfig.get_path("purelib", "venv", {"base": str(self.directory)}))

    @property
    def environ(self) -> dict[str, str]:
        """Of its programs, so that they find nothing by another way."""
        return {"PATH": f"{self.directory / 'bin'}:/usr/bin:/bin", "HOME": str(self.directory)}

    def start(self, program: str, *words: str, cwd: Path | None = None) -> "subprocess.Popen[str]":
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [str(self.directory / "bin" / program), *words]
        return subprocess.Popen(command, env=self.environ, cwd=cwd or self.directory, **pipes)

    def run(self, program: str, *words: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        with self.start(program, *words, cwd=cwd) as process:
            stdout, stderr = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    @contextmanager
    def serving(self, model: Path, *words: str) -> Iterator[str]:
        """The address of its server."""
        words = ("serve", "--model", str(model), "--listen=127.0.0.1:0", "--metrics=127.0.0.1:0", "--workers=1", *words)
        with self.start("engrampool", *words) as process:
            try:
                said: list[str] = []
                while not (match := re.search(r'"event": "serving".*"listen": "([^"]+)"', "".join(said[-1:]))):
                    said.append(process.stderr.readline())
                    assert said[-1], f"it ended: {said}"
                yield match[1]
            finally:
                process.terminate()
                process.communicate()
        assert process.returncode == 0


def install(directory: Path, wheel: Path, *extras: str) -> Installed:
    """By pip, but for what the wheel requires: that is linked from here, as there may be no network."""
    venv.create(directory, symlinks=True)
    installed = Installed(directory)
    command = [sys.executable, "-m", "pip", "--python", str(directory / "bin/python"), "install", "--quiet"]
    subprocess.run([*command, "--no-index", "--no-deps", str(wheel)], check=True, timeout=300)
    for name in requirements("engrampool", set(extras)):
        for file in metadata.files(name) or ():
            if file.parts[0] != "..":  # programs, of which none is needed
                (installed.site / file).parent.mkdir(parents=True, exist_ok=True)
                (installed.site / file).unlink(missing_ok=True)
                (installed.site / file).symlink_to(file.locate())
    return installed
