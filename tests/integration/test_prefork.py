"""Forks of the prepared process are what the program is that is started."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engrampool_client.testing import ServerProcess, serve_process
from prefork import PREFORK, Fork
from server_fixtures import LIMIT_S, eventually, pack

PROGRAM = [sys.executable, "-m", "engrampool_proto"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("prefork") / "small")


@pytest.mark.parametrize("words", [["--version"], ["serve", "--nonsense"], ["inspect", "absent"]], ids=" ".join)
def test_a_command_says_the_same_and_ends_alike(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fork, program = PREFORK.run([*PROGRAM, *words]), subprocess.run([*PROGRAM, *words], capture_output=True, text=True)
    assert (fork.returncode, fork.stdout, fork.stderr) == (program.returncode, program.stdout, program.stderr)


def test_what_a_sitecustomize_does_is_done_first_in_either(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("""
import os
from engrampool_server.files import table_files
def fail(directory):
    raise FileNotFoundError(f"{directory}: {os.environ['TEST_WORD']}")
table_files.PackedModel.open = staticmethod(fail)
""")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    environ = {**os.environ, "PYTHONPATH": path, "TEST_WORD": "so it was said"}
    words = [*PROGRAM, "inspect", "absent"]
    fork = PREFORK.run(words, environ=environ)
    program = subprocess.run(words, env=environ, capture_output=True, text=True)
    assert "so it was said" in fork.stderr
    assert (fork.returncode, fork.stdout, fork.stderr) == (program.returncode, program.stdout, program.stderr)
    assert "so it was said" not in PREFORK.run(words).stderr


def test_a_server_has_the_files_and_the_life_of_one_that_is_started(packed, monkeypatch):
    def files(server: ServerProcess) -> int:
        return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))

    with serve_process(packed, workers=1) as fork, serve_process(packed, workers=1) as other:
        assert isinstance(fork.process, Fork)
        monkeypatch.setattr(PREFORK, "is_on", False)
        with serve_process(packed, workers=1) as program:
            assert isinstance(program.process, subprocess.Popen)
            eventually(lambda: files(fork) == files(other) == files(program), "all have the same files")
        fork.process.send_signal(signal.SIGINT)
        assert fork.process.wait(LIMIT_S) == 0
        assert fork.wait_for("stopping")["reason"] == "SIGINT"
        with pytest.raises(subprocess.TimeoutExpired):
            other.process.wait(0.01)
        other.process.kill()
        assert other.process.wait(LIMIT_S) == -signal.SIGKILL
        other.wait_ended()


def test_another_environment_is_that_of_a_program(packed, monkeypatch):
    with serve_process(packed, environ={"ENGRAMPOOL_WORKERS": "1"}) as server:
        assert isinstance(server.process, subprocess.Popen)
        assert len(server.worker_pids()) == 1
    monkeypatch.setenv("ENGRAMPOOL_WORKERS", "x")
    assert "from environment ENGRAMPOOL_WORKERS" in PREFORK.run([*PROGRAM, "serve", "--model", str(packed)]).stderr
