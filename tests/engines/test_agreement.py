"""Ranks that are processes, with a real group (gloo) and real servers: whatever one of them meets, all end alike."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import pytest

from engrampool_client.testing import serve_process
from small_model import write_model

pytest.importorskip("torch", reason="PyTorch is not installed; `make test-engines` installs it")
# Of a forward, in seconds: what the ranks of the test wait for a server that is silent.
TIMEOUT_S = 1.0


@contextmanager
def ranks(way, size, tmp_path, servers, policy, together=None):
    """Processes that run a forward each for what `run` writes to them; way, together: as rank_process.py has them."""
    with ExitStack() as stack:
        made = []
        for rank, server in enumerate(servers):
            command = [
                sys.executable,
                "-m",
                "rank_process",
                *map(str, (way, rank, size, together or size, tmp_path / "store", server, policy, TIMEOUT_S)),
            ]
            environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)
            stack.callback(_end, process)
            made.append(process)
        assert [_read(one) for one in made] == ["ready"] * size

        def run(*lines):
            for process, line in zip(made, lines or ["go"] * size, strict=True):
                process.stdin.write(f"{line}\n")
                process.stdin.flush()
            return [_read(one) for one in made]

        yield run


def _read(process):
    line = process.stdout.readline()
    return json.loads(line) if line else None


def _end(process):
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory, spec):
    return write_model(tmp_path_factory.mktemp("ranks") / "model", spec)


@pytest.mark.parametrize("policy", ["raise", "mask"])
@pytest.mark.parametrize(("way", "size"), [("before", 2), ("before", 4), ("in", 2)])
def test_one_ranks_silent_server_is_the_outcome_of_all(tmp_path, model, server, way, size, policy):
    with (
        serve_process(model) as other,
        ranks(way, size, tmp_path, [other.address, *[server.address] * (size - 1)], policy) as run,
    ):
        assert run() == [{"valid": True, "masked": False, "zeros": False}] * size
        with other.frozen():
            found = run()
            if policy == "mask":
                assert found == [{"valid": False, "masked": True, "zeros": True}] * size
            else:
                assert found[0]["error"] == "DeadlineError"
                assert {one["error"] for one in found[1:]} == {"PoolError"}
                assert all("another rank of this group" in one["text"] for one in found[1:])
        while not all(one.get("valid") for one in run()):  # until it is awake, which the test's own limit bounds
            pass


@pytest.mark.parametrize(
    ("way", "error", "text"), [("before", "RuntimeError", "told to fail"), ("in", "BatchError", "row id 1073741824")]
)
def test_a_rank_that_fails_before_it_asks_leaves_nobody_waiting(tmp_path, server, way, error, text):
    with ranks(way, 2, tmp_path, [server.address] * 2, "mask") as run:
        one, other = run("go", "fail")
        assert (one["error"], other["error"]) == ("PoolError", error)
        assert text in other["text"]
        assert [one["valid"] for one in run()] == [True, True]


@pytest.mark.parametrize("way", ["before", "in"])
def test_a_rank_that_dies_is_an_error_of_the_others(tmp_path, server, way):
    with ranks(way, 2, tmp_path, [server.address] * 2, "mask") as run:
        one, dead = run("go", "die")
        assert dead is None
        assert "error" in one, "it does not wait for a vote that never comes"


@pytest.mark.parametrize("way", ["before", "in"])
def test_data_parallel_ranks_wait_for_nobody_but_their_own_group(tmp_path, model, server, way):
    """Two groups of two: one is idle while the other works, or has a server that is silent, and the other way round."""
    well = {"valid": True, "masked": False, "zeros": False}
    with (
        serve_process(model) as other,
        ranks(way, 4, tmp_path, [other.address, *[server.address] * 3], "raise", together=2) as run,
    ):
        for _ in range(3):
            assert run("go", "go", "dummy", "dummy") == [well, well, "dummy", "dummy"]
            assert run("dummy", "dummy", "go", "go") == ["dummy", "dummy", well, well]
        with other.frozen():
            found = run("go", "go", "dummy", "dummy")
            assert [one["error"] for one in found[:2]] == ["DeadlineError", "PoolError"]
            assert found[2:] == ["dummy", "dummy"]
            assert run("dummy", "dummy", "go", "go") == ["dummy", "dummy", well, well]
            assert run("go", "go", "go", "go")[2:] == [well, well]
        assert run("dummy", "dummy", "go", "go")[2:] == [well, well]
