"""The site of the pages: mkdocs makes it, every link leads somewhere, and it has its search and its pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    # Strict: a link or an anchor that leads nowhere fails it.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environ = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_page_is_there_and_can_be_searched(site):
    found = {entry["location"] for entry in json.loads((site / "search/search_index.json").read_text())["docs"]}
    pages = {f"docs/{path.stem}/" for path in (ROOT / "docs").glob("*.md")}
    assert pages | {"", "bench/RESULTS/", "CHANGELOG/"} <= found
    assert all((site / page / "index.html").is_file() for page in pages)
    menu = (ROOT / "mkdocs.yml").read_text()
    assert all(f"- {page.rstrip('/')}.md" in menu for page in pages)


def test_files_that_pages_link_to_are_the_repositorys(site):
    for path in ("docs/architecture.svg", "proto/engrampool_proto/v1/pool.proto", "deploy/compose.yaml"):
        assert (site / path).read_bytes() == (ROOT / path).read_bytes()


def test_a_page_loads_nothing_from_elsewhere(site):
    page = (site / "docs/CONCEPTS/index.html").read_text()
    assert '<script src="http' not in page
    assert "fonts.googleapis" not in page
