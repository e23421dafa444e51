"""What the contract's files promise each other: stubs as generated, lint, and imports that point one way."""

import ast
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTO = ROOT / "proto"
SOURCES = {side: ROOT / side / f"engrampool_{side}" for side in ("proto", "server", "client")}
FORBIDDEN = {
    "proto": {"engrampool_server", "engrampool_client"},
    "server": {"engrampool_client"},
    "client": {"engrampool_server"},
}
# The client's fake backend runs a real server, which it imports when asked to.
LATE_IMPORTS = {("client", "testing")}


def test_the_stubs_are_what_the_proto_file_gives(tmp_path):
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    source = "engrampool_proto/v1/pool.proto"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(PROTO), *outputs, source]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=120)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*_pb2*")}
    committed = {path.relative_to(PROTO): path.read_bytes() for path in PROTO.rglob("*_pb2*.py*") if path.is_file()}
    committed = {path: data for path, data in committed.items() if "__pycache__" not in path.parts}
    assert len(made) == 3
    assert made == committed, "the stubs are stale: run `make stubs`"


def test_buf_finds_nothing_to_say(tmp_path):
    buf = Path(sysconfig.get_path("scripts")) / "buf"
    # A cache of its own and a proxy that is not there: the lint needs no network.
    environment = {**os.environ, "BUF_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}
    done = subprocess.run([buf, "lint"], cwd=PROTO, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def imports(tree: ast.AST, module: str) -> list[tuple[str, bool]]:
    """(top-level package, whether it is imported when the module is) of every import in a module."""
    found = []

    def visit(node: ast.AST, at_import: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively, which this test cannot follow"
            found.append((node.module or "", at_import))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found.extend((arg.value, at_import) for arg in node.args if isinstance(arg, ast.Constant))
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, at_import and not inside)

    visit(tree, True)
    return [(name.split(".")[0], at_import) for name, at_import in found]


@pytest.mark.parametrize("side", SOURCES)
def test_dependencies_point_one_way(side):
    files = sorted(SOURCES[side].rglob("*.py"))
    assert files
    wrong = []
    for path in files:
        module = path.relative_to(SOURCES[side]).with_suffix("").parts
        for name, at_import in imports(ast.parse(path.read_text(encoding="utf-8")), str(path)):
            late_is_fine = (side, module[0]) in LATE_IMPORTS and not at_import
            if name in FORBIDDEN[side] and not late_is_fine:
                wrong.append(f"{'.'.join(module)} imports {name}")
    assert wrong == []


def test_the_walk_sees_every_kind_of_import():
    source = """
import a.b, c as d
from e.f import g
if x:
    import h
class K:
    import i
    async def m(self):
        import j
def f():
    from k import l
    importlib.import_module("m.n")
"""
    top, late = ["a", "c", "e", "h", "i"], ["j", "k", "m"]
    assert imports(ast.parse(source), "x") == [*((n, True) for n in top), *((n, False) for n in late)]


def test_the_bare_contract_imports_without_what_only_servers_have():
    blocked = "uvloop tokenizers tqdm safetensors prometheus_client torch engrampool_server engrampool_client"
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked.split()!r}))
import engrampool_proto.builders, engrampool_proto.cli, engrampool_proto.spec, engrampool_proto.synthetic
import engrampool_proto.wire, engrampool_proto.v1.pool_pb2_grpc
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
