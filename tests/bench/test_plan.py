"""bench/plan.py measures what `engrampool plan` takes, and holds plans against servers under a load."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from engrampool_server.commands.plan import plan

PLAN = Path(__file__).parents[2] / "bench" / "plan.py"
QUICK = ["--vocab-size=500", "--rounds=1", "--share=0.1", "--data=data"]
COMMAND = [sys.executable, PLAN, *QUICK, "--check", "--calibrate=here.json"]


def test_what_is_measured_is_what_a_plan_takes_and_it_foretells_the_bytes_of_a_load(data):
    done = subprocess.run(COMMAND, cwd=data, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr  # 1: processor time on a busy machine
    costs, *found = map(json.loads, done.stdout.splitlines())
    assert json.loads((data / "here.json").read_text()) == costs
    assert min(costs.values()) > 0
    assert [one["shards"] for one in found] == [1, 2]
    for one in found:
        assert one["gb_per_s"] == pytest.approx(one["planned_gb_per_s"], rel=0.01)
        assert min(one["cores"], one["planned_cores"]) > 0
        assert done.returncode == (max(one["off"] for one in found) > 0.25)

    packed = next((data / "data").glob("*/packed"))
    load = ("--prefill-tokens-s", "1e5", "--calibration", str(data / "here.json"))
    assert "processors: " in CliRunner().invoke(plan, [str(packed), *load]).output
