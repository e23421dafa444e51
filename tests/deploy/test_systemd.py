"""The unit for systemd: systemd accepts it, finds it shut in, and it lets the server do what it does."""

import re
import subprocess
import sys
from pathlib import Path

from engrampool_server.config import ServerConfig
from server_fixtures import lacking

UNIT = Path(__file__).parents[2] / "deploy/systemd/engrampool.service"


def setting(name: str) -> str:
    (value,) = re.findall(rf"^{name}=(.*)$", UNIT.read_text(), re.MULTILINE)
    return value


def analyze(tmp_path: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """`systemd-analyze` of the unit, whose program is one that is here."""
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/engrampool/bin/engrampool", sys.executable))
    try:
        return subprocess.run(
            ["systemd-analyze", "--no-pager", *words, str(unit)], capture_output=True, text=True, timeout=300
        )
    except FileNotFoundError:
        lacking("systemd-analyze is not installed (Debian: apt-get install systemd)")


def test_systemd_has_nothing_to_say(tmp_path):
    done = analyze(tmp_path, "verify", "--man=no")
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_misspelt_line_would_be_seen(tmp_path, monkeypatch):
    wrong = tmp_path / "wrong" / UNIT.name
    wrong.parent.mkdir()
    wrong.write_text(UNIT.read_text().replace("KillMode=", "KilMode="))
    monkeypatch.setattr(sys.modules[__name__], "UNIT", wrong)
    assert "KilMode" in analyze(tmp_path, "verify", "--man=no").stderr


def test_systemd_finds_it_shut_in(tmp_path):
    # Of 10, which is open: below 2 nothing is left but what a server needs, its network above all.
    done = analyze(tmp_path, "security", "--offline=yes", "--threshold=20")
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


def test_a_stop_waits_for_calls_and_leaves_the_tables():
    assert int(re.fullmatch(r"(\d+)s", setting("TimeoutStopSec"))[1]) > ServerConfig(models=(Path("/m"),)).drain_s + 5
    assert setting("KillMode") == "mixed"
    assert setting("RemoveIPC") == "false"
