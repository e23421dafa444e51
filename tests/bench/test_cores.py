"""docs/SCALING.md says what follows from its figures."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_tables_that_are_calculated():
    command = [sys.executable, ROOT / "bench" / "cores.py", "--table"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    page = (ROOT / "docs" / "SCALING.md").read_text()
    first, second = done.stdout.strip().split("\n\n")
    assert len(first.splitlines()) == 2 + 2 * 2 * 3
    assert first in page
    assert second in page
