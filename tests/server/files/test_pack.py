"""Packing: the rows of the checkpoint, in bounded memory, and whole or not at all."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engrampool_server.files.checkpoint import CheckpointError
from engrampool_server.files.pack import pack
from engrampool_server.files.staging import OutputError
from engrampool_server.files.synth import synth
from engrampool_server.files.synth_checkpoint import synth_checkpoint
from engrampool_server.files.table_files import PackedModel, TableFileError

# For each line, n and arguments: runs `engrampool`, kills it with signal 9 in place of the n-th call that changes what
# is on disk, and says its exit code. Each run is a process of its own, forked off one that has read all modules.
KILLED_AT = """
import json, os, signal, sys, threading
import engrampool_server.commands.files
from engrampool_proto.cli import main
lock = threading.Lock()

def counting(call):
    def counted(*args, **kwargs):
        global left
        with lock:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return counted

for line in sys.stdin:
    left, *arguments = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        for name in ("pwrite", "fsync", "replace", "rename", "unlink", "mkdir"):
            setattr(os, name, counting(getattr(os, name)))
        sys.argv[1:] = arguments
        main()
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
RunKilled = Callable[[int, Path, Path], int]


@pytest.fixture(scope="module")
def run_killed() -> Iterator[RunKilled]:
    """Packs a checkpoint; gives the exit code, -9 if it was killed at that call."""
    command = [sys.executable, "-c", KILLED_AT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as runs:

        def run(at_call: int, source: Path, out: Path) -> int:
            line = [at_call, "pack", "--checkpoint", str(source), "--out", str(out), "--file-mib", "1", "--quiet"]
            print(json.dumps(line), file=runs.stdin, flush=True)
            return int(runs.stdout.readline())

        yield run
        runs.stdin.close()
        assert runs.wait(60) == 0


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_a_packed_checkpoint_is_the_model_packed_directly(
    family: str, sizes: dict[str, int], tokenizer: Path, small_tokenizer: Path, tmp_path: Path
) -> None:
    source, direct, out = tmp_path / "checkpoint", tmp_path / "direct", tmp_path / "out"
    using = tokenizer if family == "deepseek-v4.1" else small_tokenizer
    synth_checkpoint(family, sizes[family], source, using)
    before = contents(source)
    expected = synth(family, sizes[family], direct, using, file_bytes=200_000, block_bytes=30_000)
    assert pack(source, out, file_bytes=200_000, block_bytes=30_000) == expected
    assert contents(out) == contents(direct)
    assert contents(source) == before


def test_the_name_is_part_of_the_version(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    source = checkpoint("gemma-ple")
    assert pack(source, tmp_path / "a", "a") != pack(source, tmp_path / "b", "b")
    with PackedModel.open(tmp_path / "a") as model:
        assert model.spec.name == "a"


def test_a_failing_source_leaves_no_output_and_is_not_touched(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    source = checkpoint("longcat")
    victim = max(source.glob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    before = contents(source)
    with pytest.raises(CheckpointError, match=victim.name):
        pack(source, tmp_path / "out")
    assert contents(source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_checkpoint_that_changed_is_not_mixed_into_a_half_packed_model(
    checkpoint: Callable[[str], Path], tmp_path: Path, run_killed: RunKilled
) -> None:
    source, out = checkpoint("gemma-ple"), tmp_path / "out"
    assert run_killed(9, source, out) == -signal.SIGKILL
    assert (tmp_path / "out.partial").is_dir()
    victim = next(source.glob("*.safetensors"))
    os.utime(victim, (1, 1))
    with pytest.raises(OutputError, match="its checkpoint files differs"):
        pack(source, out, file_bytes=1 << 20)


def test_a_killed_run_leaves_nothing_that_opens_and_the_next_goes_on(tmp_path: Path, run_killed: RunKilled) -> None:
    source, out = tmp_path / "checkpoint", tmp_path / "out"
    synth_checkpoint("longcat", 3000, source)  # 18 MiB: five files of a block each
    pack(source, tmp_path / "undisturbed", file_bytes=1 << 20)
    expected = contents(tmp_path / "undisturbed")
    assert len(expected) == 6
    pick = random.Random(20260901)
    kills = 0
    # A file takes six such calls, so that some runs finish a file and some none.
    while run_killed(pick.randrange(1, 16), source, out) == -signal.SIGKILL and not out.exists():
        kills += 1
        assert kills < 100, "no run gets any further than the one before"
        with pytest.raises(TableFileError):
            PackedModel.open(out)
    assert kills > 3
    assert contents(out) == expected
    assert not (tmp_path / "out.partial").exists()


def test_a_run_may_be_killed_anywhere(checkpoint: Callable[[str], Path], tmp_path: Path, run_killed: RunKilled) -> None:
    """At each of the calls that change the disk, the last ones included."""
    source = checkpoint("gemma-ple")
    pack(source, tmp_path / "undisturbed", file_bytes=1 << 20)
    expected = contents(tmp_path / "undisturbed")
    for at_call in range(1, 100):
        out = tmp_path / f"out-{at_call}"
        if run_killed(at_call, source, out) == 0:
            break
        if not out.exists():
            for left in (out, out.with_name(f"{out.name}.partial")):
                with pytest.raises(TableFileError):
                    PackedModel.open(left)
            pack(source, out, file_bytes=1 << 20)
        found = contents(out)
        found.pop("journal.json", None)  # what a run leaves that is killed just after the rename
        assert found == expected
    assert 14 < at_call < 25


def test_a_run_goes_on_at_the_first_unfinished_file(tmp_path: Path, run_killed: RunKilled) -> None:
    source, out = tmp_path / "checkpoint", tmp_path / "out"
    synth_checkpoint("longcat", 3000, source)
    assert run_killed(14, source, out) == -signal.SIGKILL
    partial = tmp_path / "out.partial"
    first = next(partial.glob("*-00001-of-*.safetensors"))
    identity = first.stat().st_ino, first.stat().st_mtime_ns
    pack(source, out, file_bytes=1 << 20)
    kept = (out / first.name).stat()
    assert (kept.st_ino, kept.st_mtime_ns) == identity


def test_memory_stays_bounded(tmp_path: Path, small_tokenizer: Path) -> None:
    source, out = tmp_path / "checkpoint", tmp_path / "out"
    synth_checkpoint("deepseek-v4.1", 25_000, source, small_tokenizer)  # 300 MiB
    # The peak of this program's own memory: what wait4 reports counts the memory of the process that started it, too.
    program = (
        "import sys; from engrampool_server.commands.files import pack; pack(sys.argv[1:], standalone_mode=False); "
        + ("print([line for line in open('/proc/self/status') if line.startswith('VmHWM:')][0])")
    )
    options = ["--checkpoint", str(source), "--out", str(out), "--quiet"]
    done = subprocess.run([sys.executable, "-c", program, *options], capture_output=True, text=True, check=True)
    peak_bytes = int(done.stdout.split("VmHWM:")[1].split()[0]) * 1024
    nbytes = sum(path.stat().st_size for path in out.iterdir())
    for directory in (source, out):  # not for pytest to keep
        shutil.rmtree(directory)
    assert nbytes > 300 << 20
    assert peak_bytes < nbytes
    print(f"peak {peak_bytes / 2**20:.0f} MiB for {nbytes / 2**20:.0f} MiB")
