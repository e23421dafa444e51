"""What is on the site that mkdocs makes: the pages, and every file of the repository that they link to.

mkdocs looks in one folder, and links of the pages lead out of it. So each file has the path on the site that it has
in the repository.
"""

import os.path
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def linked(page: str) -> set[str]:
    """Paths of the files in the repository that a page links to."""
    targets = {link for link in _LINK.findall((ROOT / page).read_text(encoding="utf-8")) if "://" not in link}
    paths = {os.path.normpath(os.path.join(os.path.dirname(page), target)) for target in targets}  # noqa: PTH118, PTH120
    return {path for path in paths if (ROOT / path).is_file()}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """As mkdocs calls it: what it found in docs/ gives way to the pages, and to what they link to."""
    pages = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    pages |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    paths = pages.union(*map(linked, pages))
    paths = paths.union(*(linked(path) for path in paths if path.endswith(".md")))
    of_theme = [file for file in files if file.src_dir != config.docs_dir]
    return Files([*of_theme, *(File.generated(config, path, abs_src_path=str(ROOT / path)) for path in sorted(paths))])
