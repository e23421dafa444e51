"""What the README promises is run as written."""

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from engrampool_client.testing import serve_process
from prefork import PREFORK
from server_fixtures import serve_thread
from small_model import small_spec, write_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "v41", small_spec())


@pytest.fixture(scope="module")
def address(packed) -> Iterator[str]:
    with serve_thread(packed) as address:
        yield address


# Else a machine that is busy for a second would have lookups go over gRPC, and that be printed.
PATIENT = """
from engrampool_client.lanes import connection, dial, native
connection.OPEN_TIMEOUT_S = dial.OPEN_TIMEOUT_S = native.OPEN_TIMEOUT_S = 60.0
"""


@pytest.fixture
def run(address, tmp_path) -> Callable[[str], str]:
    """Runs an example, and gives what it prints. Only the port differs: a fixed one may be taken."""

    def run(example: str) -> str:
        assert "127.0.0.1:50051" in example
        script = tmp_path / "example.py"
        script.write_text(PATIENT + example.replace("127.0.0.1:50051", address))
        done = PREFORK.run([sys.executable, str(script)])
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


def test_the_client_examples_run_as_written(run):
    blocking, asynchronous = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    said = r"\(4, 24, 264\) layer 1 waited \d+\.\d\d ms, the server took ServerTimes\("
    assert re.match(said, run(blocking))
    assert run(asynchronous) == "(4, 24, 264) direct\n"


def test_the_client_pages_examples_run_as_written(run):
    page = (ROOT / "docs" / "CLIENT.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "ServerTimes(" in run(examples[0])
    (asynchronous,) = (example for example in examples if "asyncio.run" in example)
    run(asynchronous)


def test_the_steps_succeed_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    steps = README[README.index("## Step by step") : README.index("**Try it with your model's clock**")]
    lines = [line for block in re.findall(r"```sh\n(.*?)```", steps, re.DOTALL) for line in block.splitlines()]
    lines = [line for line in lines if not re.match(r"python3.11 -m venv|pip install", line)]
    program = {"engrampool": [sys.executable, "-m", "engrampool_proto"], "python": [sys.executable]}
    with ExitStack() as running:
        address = ""
        for line in lines:
            # As written, but for the size, to save time, and the ports, which may be taken.
            name, rest = line.replace("--vocab-size 20000", "--vocab-size 500").split(" ", 1)
            if rest.startswith("serve"):
                model = tmp_path / re.search(r"--model (\S+)", rest)[1]
                address = running.enter_context(serve_process(model)).address
                continue
            # As a shell reads it: there is no more to these lines than quotes and comments.
            words = shlex.split(rest.replace("127.0.0.1:50051", address), comments=True)
            done = PREFORK.run([*program[name], *words])
            assert (done.returncode, done.stderr) == (0, ""), line
    with np.load(tmp_path / "rows.npz") as rows, np.load(tmp_path / "ids.npz") as ids:
        assert {name: rows[name].shape for name in rows} == dict.fromkeys(("layer_1", "layer_14"), (4, 24, 264))
        assert {name: ids[name].shape for name in ids} == dict.fromkeys(("layer_1", "layer_14"), (4, 24))


def test_every_command_and_option_shown_exists():
    shown = re.findall(
        r"engrampool (\w+)((?: +[^\s#`]+)*)", "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    )
    used = "synth pack inspect verify serve rows lookup doctor plan publish rollback patch"
    assert {name for name, _ in shown} == set(used.split())
    help_of = {
        name: PREFORK.run([sys.executable, "-m", "engrampool_proto", name, "--help"]).stdout
        for name in {name for name, _ in shown}
    }
    for name, arguments in shown:
        for option in re.findall(r"--[\w-]+", arguments):
            assert f"{option} " in help_of[name], f"engrampool {name} has no {option}"


def test_every_link_leads_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name} links to {link}"
