"""The page of the first pool is followed as it stands, block by block, until its expressions name the slow shard."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from network import NotPermittedError, network
from prometheus_process import require, until
from server_fixtures import lacking

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/FIRST_POOL.md").read_text(encoding="utf-8")
# The first one installs, which the tests' own environment has been.
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)[1:]
# Of a lookup: what its command may not lack, and what is said without.
REFUSED = {"--token file:worker-token": "(UNAUTHENTICATED)", "--tls-ca authority.pem": "tls_ca"}
OVER = "all of it has run"


class Shell:
    """A bash that is typed into; it ends with the first command that fails."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def type(self, block: str) -> str:
        """What a block prints, once all of it but what it leaves in the background is over."""
        self._process.stdin.write(f"{block}\necho {OVER}\n")
        self._process.stdin.flush()
        said = []
        for line in self._process.stdout:
            if line.endswith(f"{OVER}\n"):  # curl's last line has no end
                return "".join([*said, line.removesuffix(f"{OVER}\n")])
            said.append(line)
        pytest.fail(f"{block}\nfailed:\n{''.join(said)}")


@contextmanager
def shell(prefix: Sequence[str], directory: Path) -> Iterator[Shell]:
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [*prefix, "bash", "-eu"]
    with subprocess.Popen(command, cwd=directory, env=environ, start_new_session=True, **pipes) as process:
        try:
            yield Shell(process)
        finally:  # whatever a failure left running
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def expression(title: str) -> str:
    """Of a panel, for all models and of a minute, as text without spaces."""
    panels = json.loads((ROOT / "deploy/grafana/dashboards/shard.json").read_text())["panels"]
    (panel,) = [panel for panel in panels if panel["title"] == title]
    (target,) = panel["targets"]
    return re.sub(r"\{[^}]*\}|\s", "", target["expr"].replace("$__rate_interval", "1m"))


def samples(printed: str) -> dict[str, float]:
    """What `promtool query instant` prints: labels as it shows them, and their values."""
    return {labels: float(value) for labels, value in re.findall(r"^(.*) => (\S+) @\[", printed, re.MULTILINE)}


def one_stands_out(found: dict[str, float], *labels: str) -> bool:
    """One sample is three times as high as any other, and has these labels."""
    ordered = sorted(found.items(), key=lambda one: -one[1])
    return len(ordered) > 1 and ordered[0][1] > 3 * ordered[1][1] and all(one in ordered[0][0] for one in labels)


def test_the_page_leads_to_the_slow_shard(tmp_path):
    require("prometheus")
    for program in ("bash", "curl", "openssl"):
        if shutil.which(program) is None:
            lacking(f"{program} is not installed (Debian: apt-get install {program})")
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    until_found: dict[str, Callable[[dict[str, float]], bool]] = {
        "up": lambda found: sorted(found.values()) == [1, 1, 1],
        expression("Answer by shard"): lambda found: one_stands_out(found, 'shard="1/2"'),
        expression("Hops by server"): lambda found: one_stands_out(found, 'server="localhost:50061"', 'hop="gather"'),
        expression("Lookup p99 by server"): lambda found: one_stands_out(found, 'instance="localhost:9474"'),
    }
    try:
        # Ports are those of the page, on a host of its own.
        with network(1) as (host,), shell(host.prefix, tmp_path) as bash:
            for block in BLOCKS:
                query = re.match(r"promtool query instant \S+ '([^']*)'", block)
                if query is None:
                    printed = bash.type(block)
                    if "engrampool lookup" in block:
                        assert printed == "rows.npz: layer_1 uint8 [4, 24, 264], layer_14 uint8 [4, 24, 264]\n"
                        for option, said in REFUSED.items():
                            assert said in bash.type(f"! {{\n{block.replace(option, '')}}}")
                    continue
                wanted = until_found.pop(re.sub(r"\s", "", query[1]))
                query = f"{{\n{block}}} || true"
                # The worker may have to compile its kernels first.
                until(lambda query=query, wanted=wanted: wanted(samples(bash.type(query))), block, timeout_s=240)
    except NotPermittedError as error:
        lacking(f"no network of namespaces: {error}")
    assert until_found == {}, "the page asks for less than was to be found"
