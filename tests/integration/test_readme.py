"""What the README promises is run as written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from engrampool_client.testing import serve_process
from engrampool_proto.builders import blueprint
from small_model import CONFIG, TOKENIZER, write_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "v41", blueprint(CONFIG, TOKENIZER).spec)


def test_the_client_example_runs_as_written(packed):
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(examples) == 1
    with serve_process(packed) as server:
        # Only the port differs: a fixed one may be taken.
        example = examples[0].replace("127.0.0.1:50051", server.address)
        assert example != examples[0]
        done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"\(4, 24, 264\) layer 1 waited \d+\.\d\d ms, the server took ServerTimes\(", done.stdout)


def test_the_client_pages_step_runs_as_written(packed):
    example = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "CLIENT.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    with serve_process(packed) as server:
        example = example.replace("127.0.0.1:50051", server.address)
        done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ServerTimes(" in done.stdout


def test_every_command_and_option_shown_exists():
    shown = re.findall(
        r"engrampool (\w+)((?: +[^\s#`]+)*)", "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    )
    assert {name for name, _ in shown} == {"pack", "inspect", "verify", "serve", "rows", "lookup", "doctor", "plan"}
    for name, arguments in shown:
        text = subprocess.run(
            [sys.executable, "-m", "engrampool_proto", name, "--help"], capture_output=True, text=True, check=True
        ).stdout
        for option in re.findall(r"--[\w-]+", arguments):
            assert f"{option} " in text, f"engrampool {name} has no {option}"


def test_every_link_leads_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name} links to {link}"
