"""docs/TIERS.md says what follows from the presets."""

import subprocess
import sys
from pathlib import Path

from engrampool_proto.tiers.tier import Tier, preset_names

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_table_and_the_picture_that_are_calculated(tmp_path):
    drawn = tmp_path / "tiers.svg"
    command = [sys.executable, ROOT / "bench" / "tiers.py", "--table", "--plot", drawn]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    page = (ROOT / "docs" / "TIERS.md").read_text()
    assert len(done.stdout.splitlines()) == 2 + len(preset_names())
    assert done.stdout in page
    assert drawn.read_text() == (ROOT / "docs" / "tiers.svg").read_text()


def test_the_page_has_every_preset_with_its_figures():
    page = (ROOT / "docs" / "TIERS.md").read_text()
    for name in preset_names():
        tier = Tier.of(name)
        group = f"{tier.group_bytes} B" if tier.group_bytes else "a request"
        latency, bandwidth = tier.latency_ns / 1e3, tier.bytes_per_s / 1e9
        assert f"| `{name}` | {tier.kind} | {latency:g} µs | {group} | {bandwidth:g} GB/s |" in page
