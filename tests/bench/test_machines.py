"""What is measured on other machines than this one starts here, and says what it lacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"


def test_clients_side_by_side_are_measured(data):
    words = [
        "--vocab-size=500",
        "--pool-tokens=64",
        "--data=data",
        "--json=found.json",
        "--seconds=0.001",
        "--tokens=1",
    ]
    words += ["--systems=raw-socket,engrampool-direct", "--workers=1", "--clients=2"]
    command = [sys.executable, str(BENCH / "many_cores.py"), *words]
    done = subprocess.run(command, cwd=data, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = json.loads((data / "found.json").read_text())
    asked = [record for record in records if record["system"] != "gather"]
    assert [(r["system"], r["workers"], r["clients"]) for r in asked] == [
        ("raw-socket", None, 2),
        ("engrampool-direct", 1, 2),
    ]
    assert all(record["calls"] >= 6 and record["gb_per_s"] > 0 for record in asked)
    assert records[len(asked)]["threads"] == 1
    assert f"{len(os.sched_getaffinity(0))} cores" in done.stdout


def test_without_a_gpu_it_is_said():
    command = [sys.executable, str(BENCH / "gpu_forward.py")]
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "this is measured on a GPU: " in done.stderr
