"""A model's servers on a real Ray of five nodes, while a server and a node are killed under load."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster_load import loads
from engrampool_client.pool.ray_names import addresses
from engrampool_proto.builders import blueprint
from server_fixtures import LIMIT_S, eventually
from small_model import CONFIG, TOKENIZER, write_model

ray = pytest.importorskip("ray", reason="Ray is not installed; `make test-ray` installs it")
cluster_utils = pytest.importorskip("ray.cluster_utils")

# Ray leaves files and sockets for the collector, and announces its own changes.
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SHARDS, REPLICAS, NODES = 4, 2, 4
SERVERS = SHARDS * REPLICAS
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


def engrampool(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "engrampool_proto", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "small", blueprint(CONFIG, TOKENIZER).spec)


@pytest.fixture(scope="module")
def cluster(packed) -> Iterator[cluster_utils.Cluster]:
    """A head without room for a server, and nodes with room for three each: one may be lost."""
    planned = json.loads(engrampool("plan", str(packed), "--shards", str(SHARDS), "--workers", "1", "--json").stdout)
    room = 3 * max(shard["memory_bytes"] for shard in planned["shards"])
    head = {**NODE, "memory": 1 << 20, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(NODES):
                cluster.add_node(**NODE, memory=room, wait=False)
            cluster.wait_for_nodes()
            patch.setenv("RAY_ADDRESS", cluster.address)
            ray.init(log_to_driver=False, logging_level="ERROR")
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def server_processes(packed: Path) -> dict[int, str]:
    """The command of each process of a server of this model, workers included."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text().split("\0")
        except OSError:  # it ended meanwhile
            continue
        if str(packed) in command and "serve" in command:
            found[int(process.name)] = " ".join(command)
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def placed() -> dict[str, dict[int, str]]:
    """The node of each replica of each shard that has its place."""
    groups = ray.util.placement_group_table().values()
    return {group["name"]: group["bundles_to_node_id"] for group in groups if group["state"] == "CREATED"}


def address(server: str) -> str:
    return ray.get(ray.get_actor(server, "engrampool").address.remote(), timeout=LIMIT_S)


def test_servers_are_restarted_and_moved_while_no_lookup_fails(cluster, packed):
    up = ["up", "--on", "ray", "--model", str(packed), "--name", "pool", "--shards", str(SHARDS)]
    up += ["--replicas", str(REPLICAS), "--set", "workers=1", "--set", "metrics=off"]
    done = engrampool(*up)
    assert (done.returncode, done.stderr) == (0, "")
    told = dict(re.findall(r"^(pool/shard-\d/replica-\d) (\S+)$", done.stdout, re.MULTILINE))
    assert len(told) == SERVERS
    assert done.stdout.endswith(": ray:///pool\n")
    # What an actor is late to say is not there yet.
    eventually(lambda: addresses("pool") == sorted(told.values()), "all say where they serve")
    again = engrampool(*up)
    assert sorted(again.stdout.splitlines()) == sorted(done.stdout.splitlines())
    other = engrampool(*up, "--set", "drain_s=1")
    assert other.returncode == 1
    assert "`engrampool down pool` first" in other.stderr

    with loads(["ray:///pool"]) as running:
        for load in running:
            load.go_on()
        # A server dies: its actor does, too, and Ray starts both again.
        processes = server_processes(packed)
        killed = next(pid for pid in processes if parent(pid) not in processes)
        os.kill(killed, signal.SIGKILL)
        begun = time.monotonic()
        shard = re.search(r"--shard (\d)/", processes[killed])[1]
        there = {told[f"pool/shard-{shard}/replica-{replica}"] for replica in range(REPLICAS)}
        for load in running:
            load.wait_for(lambda said: len(set(said["open"]) - there) == SERVERS - 1)
            load.answered(5)
        print(f"a killed server served again after {time.monotonic() - begun:.1f} s")
        # A node dies with all that runs there.
        victim = next(node for node in cluster.worker_nodes if node.node_id == placed()["pool/shard-0"][1])
        lost = {
            address(f"{shard}/replica-{replica}")
            for shard, nodes in placed().items()
            for replica, node in nodes.items()
            if node == victim.node_id
        }
        cluster.remove_node(victim, allow_graceful=False)
        begun = time.monotonic()
        for load in running:
            load.wait_for(lambda said: len(said["open"]) == SERVERS and not lost & set(said["open"]))
            load.go_on()
        print(f"{len(lost)} servers of a killed node served elsewhere after {time.monotonic() - begun:.1f} s")
        assert len(placed()) == SHARDS
        for nodes in placed().values():
            assert len(set(nodes.values()) - {victim.node_id}) == REPLICAS
        for load in running:
            said = load.end()
            assert (said["failed"], said["wrong"]) == ({}, 0)

    done = engrampool("down", "pool")
    assert (done.returncode, done.stderr) == (0, "")
    # Of a node that was killed, and of actors, the system ends what is left, in its time.
    eventually(lambda: server_processes(packed) == {}, "all servers have ended")
    eventually(lambda: addresses("pool") == [], "nobody serves")
    assert engrampool("down", "pool").returncode == 1
