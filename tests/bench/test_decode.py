"""bench/decode.py measures every system, and tells wrong bytes."""

import json
import subprocess
import sys
from pathlib import Path

DECODE = Path(__file__).parents[2] / "bench" / "decode.py"
SYSTEMS = ["grpc", "direct", "attached", "raw", "raw-spin", "take"]
PREFILL = 513  # the smallest
PARTS = ("prefetch_", "first_layer_", "")


def run(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    fixed = [
        "--vocab-size=500",
        "--pool-tokens=64",
        "--rounds=1",
        "--seconds=0.001",
        "--data=data",
        "--json=found.json",
    ]
    command = [sys.executable, str(DECODE), *fixed, *words]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)


def test_every_system_is_measured(data):
    done = run(data, f"--tokens=1,{PREFILL}", "--pauses-ms=1")
    assert done.returncode == 0, done.stderr
    records = json.loads((data / "found.json").read_text())
    ways = [(tokens, 1, thread) for tokens in (1, PREFILL) for thread in ("idle", "busy")]
    cases = [(record["tokens"], record["pause_ms"], record["thread"], record["system"]) for record in records]
    assert cases == [(*way, system) for way in ways for system in SYSTEMS]
    for record in records:
        assert (record["study"], record["rows"], record["repeats"]) == ("decode", 48 * record["tokens"], 1)
        assert 0 < record["prefetch_p50_ms"] <= record["first_layer_p50_ms"] <= record["p50_ms"]
        for part in PARTS:
            assert record[f"{part}p50_ms"] <= record[f"{part}p99_ms"]
            assert record[f"{part}to_raw"] > 0
        assert record["gb_per_s"] > 0
        assert (record["server_cpu_s_per_gb"] is None) == (record["system"] == "take")
        assert (
            f"| {record['tokens']} | {record['pause_ms']:g} | {record['thread']} | {record['system']} |" in done.stdout
        )
        if record["system"] == "raw":
            assert (record["prefetch_to_raw"], record["to_raw"]) == (1, 1)


def test_a_cache_is_measured_by_name(data):
    done = run(data, "--tokens=8", "--pauses-ms=1", "--threads=idle", "--systems=direct,cached,half")
    assert done.returncode == 0, done.stderr
    records = json.loads((data / "found.json").read_text())
    assert [record["system"] for record in records] == ["direct", "cached", "half"]
    for record in records:
        assert 0 < record["prefetch_p50_ms"] <= record["first_layer_p50_ms"] <= record["p50_ms"]
        assert record["calls"] > 0


def test_wrong_bytes_fail_the_run(data):
    done = run(data, "--tokens=1", "--threads=idle", "--systems=take")
    assert done.returncode == 0, done.stderr
    (table,) = data.glob("data/*/tables/14/shard_000.bin")
    rows = table.read_bytes()
    try:
        table.write_bytes(bytes(len(rows)))
        done = run(data, "--tokens=1", "--systems=grpc")
    finally:
        table.write_bytes(rows)
    assert done.returncode == 1
    assert "grpc: wrong bytes in layer 14 of 1 tokens" in done.stderr


def test_unknown_names_are_refused(data):
    done = run(data, "--systems=redis")
    assert done.returncode == 2
    assert "no such systems: redis" in done.stderr
