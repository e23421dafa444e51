"""What the client brings into its host's process: no code of the server's, and no settings that nobody asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import engrampool_client

PACKAGE = Path(engrampool_client.__file__).parent
# Freed blocks go back to the system, and threads have arenas of their own, unless malloc was told otherwise.
PROBE = """
import sys
from engrampool_client import Client

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

with Client(sys.argv[1], **eval(sys.argv[2])) as client:
    client.lookup([1, 2, 3])
    before = resident_mib()
    block = bytearray(100 << 20)
    del block
    print(resident_mib() - before)
"""


@pytest.mark.parametrize(("settings", "kept"), [({}, False), ({"keep_memory": True}, True)])
def test_the_hosts_malloc_is_left_alone_unless_asked(server, settings, kept):
    words = [sys.executable, "-c", PROBE, server, repr(settings)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert (float(done.stdout) > 50) is kept


def test_nothing_of_the_server_is_imported():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update({one.name: path for one in node.names})
            elif isinstance(node, ast.ImportFrom):
                found[node.module or ""] = path
    assert "engrampool_proto.errors" in found
    assert not {name: path for name, path in found.items() if name.partition(".")[0] == "engrampool_server"}
