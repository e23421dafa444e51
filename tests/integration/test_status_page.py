"""The status page of a server's metrics port, in a real browser without any other network."""

import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from engrampool_client.testing import ServerProcess, serve_process
from server_fixtures import LIMIT_S, scrape
from small_model import small_spec, write_model

# Of the browser's own clock, which goes on as fast as the page lets it: several turns of the page.
_BUDGET_MS = 9000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    packed = write_model(tmp_path_factory.mktemp("page") / "small", small_spec())
    with serve_process(packed, shard="1/2", workers=1) as running:
        yield running


def browse(address: str, directory: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    command = [
        program,
        "--headless",
        "--no-sandbox",  # as root, in whatever container tests run in
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={directory / 'profile'}",
        f"--virtual-time-budget={_BUDGET_MS}",
        # Nothing but this machine's address can be asked.
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        *words,
        f"http://{address}/status",
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * LIMIT_S)


def test_it_is_one_page_that_may_ask_for_nothing_but_metrics(server):
    with urllib.request.urlopen(f"http://{server.metrics_address}/status", timeout=LIMIT_S) as response:
        page, headers = response.read().decode(), response.headers
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    # Names of namespaces are no addresses.
    assert set(re.findall(r"https?://[^\"' ]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=", page)
    assert "innerHTML" not in page
    request = urllib.request.Request(f"http://{server.metrics_address}/status", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(request, timeout=LIMIT_S)


def test_a_browser_shows_what_is_held_and_charts_of_what_runs(server, tmp_path):
    (model,) = (name for name in scrape(server.metrics_address) if name.startswith("engrampool_model_info"))
    version = re.search(r'version="(\w+)"', model)[1]
    done = browse(server.metrics_address, tmp_path, "--dump-dom")
    assert done.returncode == 0, done.stderr[-2000:]
    text = re.sub("<script>.*</script>", "", done.stdout, flags=re.DOTALL)
    assert "serves, 1 workers" in text
    assert version in text
    assert ">1/2<" in text
    assert "as of " in text
    for chart in ("rows a second", "a lookup, ms", "hops on this server", "refused a second"):
        assert f"<b>{chart}" in text, chart
    assert text.count("<polyline") >= 6
    assert "nothing to show from this server" not in text


def test_its_picture_is_drawn(server, tmp_path):
    picture = tmp_path / "page.png"
    done = browse(server.metrics_address, tmp_path, f"--screenshot={picture}", "--window-size=1200,1000")
    assert done.returncode == 0, done.stderr[-2000:]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000  # an empty page has some thousand bytes
