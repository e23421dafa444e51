"""How the product's own files are laid out: rooms of a size that one sees over, whose doors are their public names."""

import ast
import gc
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_FILES, MAX_LINES = 14, 450
PACKAGES = [ROOT / side / f"engrampool_{side}" for side in ("proto", "server", "client")]
FILES = [path for package in PACKAGES for path in sorted(package.rglob("*.py")) if "_pb2" not in path.name]
# Underscored names of libraries that offer no other way, by file.
OF_LIBRARIES = {
    "client/engrampool_client/integrations/vllm_qwen4.py": {
        "_lookup_nvfp4_ple_embedding_kernel",
        "_reduce_etp_embeddings",
    },
    "server/engrampool_server/telemetry/counts.py": {"_buckets", "_upper_bounds"},
    "server/engrampool_server/telemetry/metrics_files.py": {"_read_all_values"},
}
# Documented, for all its name.
DOCUMENTED = {"_exit"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(tree: ast.Module) -> set[str]:
    """Every name that a module gives to something of its own."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
            case ast.Attribute(value=ast.Name("self" | "cls"), ctx=ast.Store()):
                names.add(node.attr)
    return names


def parsed(source: str) -> ast.Module:
    """The module of a source. Python 3.11 may fail (SystemError) where a collection runs meanwhile."""
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        gc.enable()


def reached_into(source: str) -> Iterator[tuple[str, str]]:
    """(name, where) of each underscored name that a module takes from another one."""
    tree = parsed(source)
    own = defined(tree) | DOCUMENTED
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom():
                for one in node.names:
                    if is_private(one.name):
                        yield one.name, f"line {node.lineno}: {ast.unparse(node)}"
            case ast.Attribute():
                if is_private(node.attr) and node.attr not in own:
                    yield node.attr, f"line {node.lineno}: {ast.unparse(node)}"


def test_no_module_takes_an_underscored_name_of_another_one() -> None:
    found = []
    for path in FILES:
        file = str(path.relative_to(ROOT))
        taken = reached_into(path.read_text())
        found += [f"{file}, {where}" for name, where in taken if name not in OF_LIBRARIES.get(file, ())]
    assert found == []


def test_an_underscored_name_of_another_module_is_found_however_it_is_taken() -> None:
    source = """
from m import _inner
import m
class Own(m.Base):
    _at: int
    def __init__(self, other):
        self._mine = other._theirs
        m._helper(self._mine, self._at, other._mine)
        self._inherited()
    def close(self):
        _, self._mine = os._exit, self.__dict__
"""
    assert sorted(name for name, _ in reached_into(source)) == ["_helper", "_inherited", "_inner", "_theirs"]


def test_a_file_is_short_enough_to_be_read_at_once() -> None:
    too_long = {str(path.relative_to(ROOT)) for path in FILES if len(path.read_text().splitlines()) > MAX_LINES}
    assert too_long == set()


def test_a_folder_has_no_more_files_than_one_sees_at_once() -> None:
    folders = {path.parent for path in FILES}
    assert {str(one.relative_to(ROOT)) for one in folders if len(list(one.glob("*.py"))) > MAX_FILES} == set()
