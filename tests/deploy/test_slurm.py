"""The recipe for Slurm, run by Slurm's own daemons: a pool by shards, a job that finds it, and how both end."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from network import NotPermittedError
from prometheus_process import until
from server_fixtures import expected, lacking, pack
from slurm import Slurm, running_slurm

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "deploy/slurm"
ENGINE = """
import sys
import numpy as np
from engrampool_client import Client
with Client.from_environment() as pool:
    ids = np.arange(100, dtype=np.uint32).reshape(-1, 2)
    rows = pool.lookup_rows({9: ids})[9]
np.savez(sys.argv[1], ids=ids, rows=rows)
"""


@pytest.mark.parametrize("script", sorted(RECIPE.iterdir()), ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, script], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    try:
        with running_slurm(tmp_path_factory.mktemp("slurm"), environ) as running:
            yield running
    except NotPermittedError as error:
        lacking(f"no network of namespaces: {error}")


def submit(slurm: Slurm, directory: Path, *words: str | Path) -> str:
    """The job's number. Its output is in a file of that number."""
    done = slurm.run("sbatch", "--parsable", "--output=%j.log", *words, cwd=directory)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def wait_for(slurm: Slurm, directory: Path, job: str, state: str) -> None:
    over = ("CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "TIMEOUT")
    found = until(lambda: (now := slurm.state(job)) in over and now, f"job {job} ends")
    assert found == state, (directory / f"{job}.log").read_text()


def test_an_engines_job_finds_the_pool_and_the_pool_ends_when_told(slurm, model, tmp_path):
    (tmp_path / "engine.py").write_text(ENGINE)
    pool = submit(slurm, tmp_path, "--nodes=2", RECIPE / "pool.sbatch", model)
    words = ("--nodes=1", f"--dependency=after:{pool}", RECIPE / "engines.sbatch", pool)
    engines = submit(slurm, tmp_path, *words, "python", "engine.py", "rows.npz")
    wait_for(slurm, tmp_path, engines, "COMPLETED")
    addresses = tmp_path / f"engrampool-{pool}.addresses"
    assert addresses.read_text() == "node0:50051 node1:50052\n"
    with np.load(tmp_path / "rows.npz") as found:
        assert found["rows"].tobytes() == expected(9, found["ids"].ravel())
    # As Slurm does before a job's time is over.
    assert slurm.run("scancel", "--batch", "--signal=TERM", pool).returncode == 0
    wait_for(slurm, tmp_path, pool, "COMPLETED")
    assert not addresses.exists()
    assert (tmp_path / f"{pool}.log").read_text().count('"event": "stopped"') == 2


@pytest.mark.parametrize(
    ("words", "step", "state"),
    [((), "", "CANCELLED"), (("--signal=KILL",), ".1", "FAILED")],
    ids=["is cancelled", "loses its servers"],
)
def test_a_pool_leaves_no_address_that(slurm, model, tmp_path, words, step, state):
    pool = submit(slurm, tmp_path, "--nodes=2", RECIPE / "pool.sbatch", model)
    addresses = tmp_path / f"engrampool-{pool}.addresses"
    until(addresses.exists, "the pool serves")
    assert slurm.run("scancel", *words, pool + step).returncode == 0
    wait_for(slurm, tmp_path, pool, state)
    until(lambda: not addresses.exists(), "its addresses are gone")


def test_a_job_beside_a_pool_that_does_not_come_up_ends(slurm, tmp_path):
    pool = submit(slurm, tmp_path, "--nodes=2", RECIPE / "pool.sbatch", tmp_path / "no-model")
    engines = submit(slurm, tmp_path, f"--dependency=after:{pool}", RECIPE / "engines.sbatch", pool, "true")
    wait_for(slurm, tmp_path, pool, "FAILED")
    wait_for(slurm, tmp_path, engines, "FAILED")
    assert "no-model" in (tmp_path / f"{pool}.log").read_text()
    assert f"job {pool} has ended" in (tmp_path / f"{engines}.log").read_text()
