"""What the pages of docs/ say of the code is so."""

import ast
import re
import runpy
from pathlib import Path

from grpc import StatusCode

import engrampool_client
from engrampool_client import errors
from engrampool_proto.errors import EngrampoolError

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


def table(page: str, header: str) -> list[list[str]]:
    """The rows of every table of a page that begins with this column, cell by cell."""
    rows, reading = [], False
    for line in (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines():
        if line.startswith(f"| {header} |"):
            reading = True
        elif not line.startswith("|"):
            reading = False
        elif reading and not line.startswith("| ---"):
            rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def test_every_error_that_a_client_raises_is_on_the_page_of_errors():
    listed = {name for name, *_ in table("ERRORS.md", "exception")}
    assert listed == {f"`{name}`" for name in errors.__all__} | {"`RegistryError`", "`PemError`"}
    own = {name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, EngrampoolError)}
    assert own == set(errors.__all__)
    assert own <= set(engrampool_client.__all__)


def test_every_error_that_a_server_or_a_command_ends_with_is_on_the_page_of_errors():
    page = (ROOT / "docs/ERRORS.md").read_text(encoding="utf-8")
    listed = {name for name, *_ in table("ERRORS.md", "error")}
    assert all(len(row) == 3 and all(row) for row in table("ERRORS.md", "error"))
    bases = {
        node.name: {ast.unparse(base) for base in node.bases}
        for folder in ("proto", "server", "client")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    ours, found = {"EngrampoolError"}, {"EngrampoolError"}
    while found:
        found = {name for name, of in bases.items() if of & ours} - ours
        ours |= found
    public = {name for name in ours if not name.startswith("_")}
    missing = {name for name in public if f"`{name}`" not in page}
    assert not missing, f"docs/ERRORS.md does not say who acts on {sorted(missing)}"
    # And the page names none that is gone.
    named = set(re.findall(r"`(\w+Error)`", page))
    assert named <= public
    assert listed <= {f"`{name}`" for name in public}


def test_every_status_becomes_the_error_that_the_page_says():
    rows = [(status.strip("`"), error.strip("`"), when) for status, error, when in table("ERRORS.md", "status")]
    said = {(status, error) for status, error, _ in rows}
    reasons = (None, "overloaded", "unknown-version", "partial-model")
    become = {
        code.name: {type(errors.from_status(code, why, "", "")).__name__ for why in reasons} for code in StatusCode
    }
    others = {"OK", "UNKNOWN", "ABORTED", "OUT_OF_RANGE", "INTERNAL", "DATA_LOSS", "ALREADY_EXISTS"}
    assert {(name, one) for name, kinds in become.items() if name not in others for one in kinds} == said - {
        ("any other", "PoolError")
    }
    assert all(become[name] == {"PoolError"} for name in others)


def test_every_thread_of_the_client_is_on_the_page_of_processes():
    page = (ROOT / "docs/PROCESSES.md").read_text(encoding="utf-8")
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "client/engrampool_client").rglob("*.py")]
    named = {name for source in sources for name in re.findall(r'"(engrampool-[a-z]+)"', source)}
    assert "engrampool-deadlines" in named
    assert not {name for name in named if f"`{name}`" not in page}


def test_the_picture_of_the_house_and_its_tables_are_what_the_code_makes_of_them():
    script = runpy.run_path(str(ROOT / "docs/architecture.py"))
    page = (ROOT / "docs/ARCHITECTURE.md").read_text(encoding="utf-8")
    stale = "run `python docs/architecture.py`"
    assert (ROOT / "docs/architecture.svg").read_text(encoding="utf-8") == script["picture"](ROOT), stale
    assert page == script["page"](page, ROOT), stale


def test_the_page_of_metrics_is_what_the_registries_make_of_it():
    script = runpy.run_path(str(ROOT / "docs/metrics.py"))
    page = (ROOT / "docs/METRICS.md").read_text(encoding="utf-8")
    assert page == script["page"](page), "run `python docs/metrics.py`"
    named = set(re.findall(r"`((?:engrampool|process|grpc_server)_\w+)[`{]", page))
    there = {row[0] for rows in script["TABLES"].values() for row in rows()}
    assert named <= there


def test_every_file_class_and_method_on_the_page_of_the_house_is_there():
    page = (ROOT / "docs/ARCHITECTURE.md").read_text(encoding="utf-8")
    there = {"None"}
    for room in ("proto", "server", "client"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef | ast.FunctionDef):
                    there.add(node.name)
                    inside = [one for one in ast.walk(node) if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
                    there |= {f"{node.name}.{one.name}" for one in inside}
    for name in re.findall(r"`([A-Z]\w*[a-z]\w*(?:\.\w+)?)`", page):
        assert name in there, name
    for room, rest in re.findall(r"`(proto|server|client)/((?!engrampool_)[\w/.]+)`", page):
        assert (ROOT / room / f"engrampool_{room}" / rest).exists(), f"{room}/{rest}"


def test_every_anchor_is_a_heading():
    for page in PAGES:
        for link, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
            if link.startswith("http"):
                continue
            linked = page.parent / link if link else page
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name} links to {link}#{anchor}"


def test_no_sentence_opens_with_what_or_whose():
    # As a subject it has the reader wait for the verb. Headers of tables, and questions, are no sentences of that kind.
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for paragraph in re.split(r"\n\s*(?:\n|- |\* |\d+\. )", text):
            for sentence in re.split(r"(?<=[.!?:]) +", " ".join(paragraph.split()).lstrip("*-> ")):
                opens = re.match(r"\**(What|Whose)\b", sentence)
                assert not opens or sentence.endswith("?"), f"{page.name}: {sentence}"
