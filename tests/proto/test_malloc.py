"""Freed memory stays with the process once malloc is pinned, and goes back to the system where it is not."""

import subprocess
import sys

import pytest

PROBE = """
import ctypes, sys
from engrampool_proto.malloc import pin_malloc

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

if sys.argv[1] == "pinned":
    assert pin_malloc()
for _ in range(3):
    block = bytearray(100 << 20)
    del block
print(resident_mib())
"""


@pytest.mark.parametrize(("how", "kept"), [("pinned", True), ("plain", False)])
def test_memory_of_a_large_block_after_its_end(how, kept):
    done = subprocess.run([sys.executable, "-c", PROBE, how], capture_output=True, text=True, check=True)
    assert (float(done.stdout) > 100) is kept
