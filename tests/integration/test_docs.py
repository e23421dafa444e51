"""What the pages of docs/ say of the code is so."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_nothing_tells_to_install_a_name_that_we_do_not_have_on_a_registry():
    # Somebody else could publish a package of that name. An extra that names others of ours is resolved in the tree.
    sources = [path for folder in ("proto", "server", "client", "examples", "deploy") for path in walk(ROOT / folder)]
    for path in [*PAGES, ROOT / "Dockerfile", ROOT / "Makefile", *sources]:
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not re.search(r"pip3? install[^`]*[ '\"]engrampool['\"]?(\s|$|`)", line), f"{path}: {line}"
            assert "engrampool[" not in line, f"{path}: {line}"


def walk(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.suffix in {".py", ".yaml", ".yml", ".json", ".sh"}]
