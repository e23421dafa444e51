"""Where tables lie on machines of several nodes: on this one's, and refused where it has none such.

What several nodes would do was run on none: their shares are made up here.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from engrampool_client.testing import ServerStartError, serve_process
from engrampool_server.memory import numa
from engrampool_server.memory.numa import NumaError, check, nodes_of
from server_fixtures import pack, scrape

# In a process of its own, as a policy stays: which policy and processors it has, and where memory it takes then lies.
PROBE = """
import ctypes, json, os, sys
import numpy as np
from engrampool_server.memory import numa
numa.place(sys.argv[1])
mode, mask = ctypes.c_int(), (ctypes.c_ulong * 16)()
call = {"x86_64": 239, "aarch64": 236}[os.uname().machine]
assert ctypes.CDLL(None, use_errno=True).syscall(call, ctypes.byref(mode), mask, ctypes.c_ulong(1024), None, 0) == 0
from engrampool_server.memory.memory import allocate
rows = allocate(8 << 20, "anon").reshape(-1, 256)
rows[:] = 1
start = f"{rows.ctypes.data:x}"
(line,) = [line for line in open("/proc/self/numa_maps") if line.startswith(start)] or [""]
print(json.dumps([mode.value, mask[0], sorted(os.sched_getaffinity(0)), numa.shares(rows), line.split()[1:2]]))
"""


def only_one_node() -> bool:
    return nodes_of("interleave") == (0,)


@pytest.mark.parametrize(("setting", "mode", "policy"), [("bind:0", 2, "bind:0"), ("interleave", 3, "interleave:0")])
def test_memory_lies_where_it_was_said_to(setting, mode, policy):
    if not only_one_node():
        pytest.skip("this machine has several nodes; the figures below are of one")
    done = subprocess.run([sys.executable, "-c", PROBE, setting], capture_output=True, text=True, check=True)
    found_mode, mask, cpus, found, said = json.loads(done.stdout)
    assert (found_mode, mask) == (mode, 1)
    assert cpus == sorted(os.sched_getaffinity(0))
    assert found == {"0": 1.0}
    assert said in ([policy], [])  # a mapping that the kernel joined with the one before has its line there


def test_a_server_shows_where_its_tables_lie(tmp_path):
    packed = pack(tmp_path / "small")
    with serve_process(packed, numa="local", memory=f"file:{tmp_path}", workers=1) as server:
        shares = {key: value for key, value in scrape(server.metrics_address).items() if "node_share" in key}
    assert shares == {f'engrampool_table_node_share{{layer="{layer}",model="small",node="0"}}': 1.0 for layer in (2, 9)}


def test_a_node_that_is_not_there_ends_the_start(tmp_path):
    packed = pack(tmp_path / "small")
    said = "numa = bind:7: no memory of node 7 may be used here; of node 0 it may"
    with pytest.raises(ServerStartError, match=said), serve_process(packed, numa="bind:7"):
        pass


def test_a_table_that_lies_elsewhere_is_refused_by_its_share():
    check("bind:0", "layer 2 of small", {0: 1.0})
    check("bind:0", "layer 2 of small", {})
    check("interleave", "layer 2 of small", {0: 0.5, 1: 0.5})
    with pytest.raises(NumaError, match=r"does not lie on node 0 \(25% on node 1\); where it was adopted"):
        check("bind:0", "layer 2 of small", {0: 0.75, 1: 0.25})


def test_local_is_refused_where_the_process_may_run_on_several_nodes(monkeypatch):
    monkeypatch.setattr(numa, "_allowed_nodes", lambda: (0, 1))
    monkeypatch.setattr(numa, "_cpus", lambda node: os.sched_getaffinity(0))
    with pytest.raises(NumaError, match="may run on nodes 0, 1, so nothing is local"):
        numa.place("local")


def test_a_node_without_a_processor_of_ours_is_refused(monkeypatch):
    monkeypatch.setattr(numa, "_cpus", lambda node: {100_000})
    with pytest.raises(NumaError, match="node 0 has no processor that this process may run on"):
        numa.place("bind:0")


def test_an_empty_table_lies_nowhere():
    assert numa.shares(np.zeros((0, 264), np.uint8)) == {}
