"""The benchmark's harness runs from end to end, tells wrong bytes, and leaves nothing behind."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "bench" / "run.py"
SYSTEMS = ("engrampool-grpc", "raw-socket", "numpy-take", "hurried-grpc")
KEYS = {"system", "tokens", "layers", "rows", "p50_ms", "p99_ms", "gb_per_s", "server_cpu_s_per_gb", "ids", "repeats"}


def command(*words: str) -> list[str]:
    fixed = ["--vocab-size=500", "--pool-tokens=64", "--tokens=1,64", "--rounds=1", "--studies=batches"]
    return [sys.executable, str(RUN), *fixed, "--data=data", "--json=records.json", *words]


def run(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    words = command("--seconds=0.001", *words)
    return subprocess.run(words, cwd=directory, capture_output=True, text=True, check=False)


def test_every_system_is_measured(data):
    done = run(data, f"--systems={','.join(SYSTEMS)}")
    assert done.returncode == 0, done.stderr
    records = json.loads((data / "records.json").read_text())
    cases = {(record["system"], record["tokens"], record["ids"]) for record in records}
    assert cases == {(system, tokens, ids) for system in SYSTEMS for tokens in (1, 64) for ids in ("uniform", "text")}
    for record in records:
        assert record.keys() >= KEYS
        assert (record["layers"], record["rows"], record["repeats"]) == (2, 48 * record["tokens"], 1)
        assert record["p99_ms"] >= record["p50_ms"] > 0
        assert record["gb_per_s"] > 0
        assert (record["server_cpu_s_per_gb"] is None) == (record["system"] == "numpy-take")
    assert "| 64 | hurried-grpc |" in done.stdout
    assert "| engrampool-grpc, 64 tokens: tokens/s > 1 x hurried-grpc |" in done.stdout


def test_wrong_bytes_fail_the_run(data):
    done = run(data, "--systems=numpy-take")
    assert done.returncode == 0, done.stderr
    kept = {table: table.read_bytes() for table in data.glob("data/*/tables/14/shard_000.bin")}
    try:
        for table, rows in kept.items():
            table.write_bytes(bytes(len(rows)))
        done = run(data, "--systems=numpy-take")
    finally:
        for table, rows in kept.items():
            table.write_bytes(rows)
    assert done.returncode == 1
    assert "wrong bytes in layer 14" in done.stderr
    records = json.loads((data / "records.json").read_text())
    assert all(record["p50_ms"] is None and "wrong bytes" in record["skipped"] for record in records)


def test_unknown_names_are_refused(data):
    done = run(data, "--systems=cassandra")
    assert done.returncode == 2
    assert "no such systems: cassandra" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_however_it_ends_its_processes_end(data, number):
    words = command("--seconds=100", "--systems=raw-socket,hurried-grpc")
    with subprocess.Popen(words, cwd=data, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            assert any("round 1 of 1" in line for line in process.stderr)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            watched = [os.pidfd_open(int(child)) for child in children]
        finally:
            process.send_signal(number)
    assert len(watched) >= 2
    for descriptor in watched:
        with os.fdopen(descriptor) as child:
            assert select.select([child], [], [], 30)[0], "a child outlived the run"
