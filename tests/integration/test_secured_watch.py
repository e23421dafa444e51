"""`engrampool status`, `top` and the page /status beside TLS and tokens: who sees them, what others are told."""

import json
import os
import shutil
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from certificates import Authority, put, write_callers
from engrampool_client.testing import ServerProcess, serve_process
from engrampool_server.telemetry import exporter
from server_fixtures import LIMIT_S, eventually, pack, version_of

CALLERS = {
    "watcher": ["read", "metrics"],
    "operator": ["read", "admin"],
    "reader": ["read"],
    "prometheus": ["metrics"],
    "admin": ["admin"],
}


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def server(packed, authority, tmp_path_factory) -> Iterator[ServerProcess]:
    entries = [{"name": name, "token": f"of-{name}", "roles": roles} for name, roles in CALLERS.items()]
    callers = write_callers(tmp_path_factory.mktemp("server") / "callers.toml", *entries)
    with serve_process(packed, workers=1, **authority.of_server(), tokens=callers) as process:
        yield process


def run(command: str, server, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    program = [sys.executable, "-m", "engrampool_proto", command, "--server", server.address, "--timeout-s", "60"]
    environ = {**os.environ, **variables}
    return subprocess.run([*program, *words], env=environ, capture_output=True, text=True, timeout=LIMIT_S)


def credentials(authority, tmp_path, name: str) -> dict[str, str]:
    token = put(tmp_path / "token", f"of-{name}\n".encode())
    return {"ENGRAMPOOL_CLIENT_TLS_CA": str(authority.ca), "ENGRAMPOOL_CLIENT_TOKEN": f"file:{token}"}


@pytest.mark.parametrize("by", ["flags", "variables"])
@pytest.mark.parametrize("name", ["watcher", "operator"])
def test_status_and_top_show_a_pool_to_who_may_see_it(server, packed, authority, tmp_path, name, by):
    variables = credentials(authority, tmp_path, name)
    flags = []
    if by == "flags":
        flags = ["--tls-ca", variables["ENGRAMPOOL_CLIENT_TLS_CA"], "--token", variables["ENGRAMPOOL_CLIENT_TOKEN"]]
        variables = {}
    done = run("status", server, *flags, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"small {version_of(packed)}" in done.stdout
    done = run("top", server, "--count", "1", *flags, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 of 1 servers serve" in done.stdout
    assert "no alarms" in done.stdout


@pytest.mark.parametrize(
    ("shown", "said"),
    [
        ("nothing", "it speaks TLS, and this client does not: give the client tls_ca"),
        ("no token", "this server answers callers with a token only"),
        ("nobody", "the token is not one that this server knows"),
        ("reader", "reader may not call Stats: it needs the role metrics, and has read"),
        ("prometheus", "prometheus may not call Describe: it needs the role read, and has metrics"),
        ("admin", "admin may not call Describe: it needs the role read, and has admin"),
    ],
)
def test_others_are_told_what_they_lack(server, authority, tmp_path, shown, said):
    variables = {} if shown == "nothing" else credentials(authority, tmp_path, shown)
    if shown == "no token":
        del variables["ENGRAMPOOL_CLIENT_TOKEN"]
    done = run("status", server, **variables)
    assert (done.returncode, done.stderr) == (3, "")
    assert f"{server.address}: no answer" in done.stdout
    assert said in done.stdout
    assert "of-" not in done.stdout  # tokens
    shown_once = run("top", server, "--count", "1", **variables).stdout
    assert "0 of 1 servers serve" in shown_once
    assert said in " ".join(shown_once.split())


def test_files_that_cannot_be_are_one_line(server, tmp_path):
    for command in ("status", "top"):
        done = run(command, server, "--token", f"file:{tmp_path / 'nowhere'}")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("engrampool: token: ")
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        *((one, ("--token", "secret words"), "token must be") for one in ("status", "top", "lookup", "doctor")),
        ("status", ("--tls-cert", "cert.pem", "--tls-ca", "ca.pem"), "tls_cert and tls_key go together"),
        ("status", ("--tls-name", "pool.svc"), "tls_name needs tls_ca"),
    ],
)
def test_credentials_that_cannot_be_are_mistakes_of_usage(command, words, said, tmp_path):
    needed = {"lookup": ("--tokens", "t.npy", "--out", "o.npz"), "doctor": ("--tokens", "t.npy")}
    program = [sys.executable, "-m", "engrampool_proto", command, "--server", "127.0.0.1:1"]
    done = subprocess.run([*program, *needed.get(command, ()), *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "secret" not in done.stderr
    assert "Traceback" not in done.stderr


# --- the page


class Browser:
    """A page in a real browser, driven by its protocol for developers: lines of JSON over two pipes."""

    def __init__(self, to: Any, back: Any) -> None:
        self._to, self._back, self._number = to, back, 0
        self._session: dict[str, str] = {}

    def open(self, url: str) -> None:
        target = self._call("Target.createTarget", url=url)["targetId"]
        self._session = {"sessionId": self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def value(self, expression: str) -> Any:
        """Of JavaScript, in the page."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        call = {"id": self._number, "method": method, "params": params, **self._session}
        self._to.write(json.dumps(call).encode() + b"\0")
        self._to.flush()
        while True:  # past events
            line = bytearray()
            while (byte := self._back.read(1)) != b"\0":
                assert byte, "the browser ended"
                line += byte
            said = json.loads(line)
            if said.get("id") == self._number:
                assert "error" not in said, said
                return said["result"]


@contextmanager
def browser(directory: Path) -> Iterator[Browser]:
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    for_it, to = os.pipe()
    back, of_it = os.pipe()
    words = [
        program,
        "--headless",
        "--no-sandbox",  # as root, in whatever container tests run in
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--ignore-certificate-errors",  # the authority is of this test alone
        "--remote-debugging-pipe",
        f"--user-data-dir={directory / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ]
    # The browser has its pipes by numbers.
    script = f"import os, sys; os.dup2({for_it}, 3); os.dup2({of_it}, 4); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words],
        pass_fds=(for_it, of_it),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(for_it)
    os.close(of_it)
    try:
        with os.fdopen(to, "wb") as writer, os.fdopen(back, "rb") as reader:
            yield Browser(writer, reader)
    finally:
        process.kill()
        process.wait()


def test_the_page_shows_who_has_no_token_nothing_of_the_server(server, authority):
    context = ssl.create_default_context(cafile=str(authority.ca))
    url = f"https://{server.metrics_address}/status"
    with urllib.request.urlopen(url, timeout=LIMIT_S, context=context) as response:
        page = response.read().decode()
    assert page == (Path(exporter.__file__).with_name("status.html")).read_text()


def test_the_page_asks_for_a_token_and_shows_what_it_opens(server, packed, tmp_path):
    with browser(tmp_path) as page:
        page.open(f"https://{server.metrics_address}/status")
        said = 'document.getElementById("said")?.textContent ?? ""'
        eventually(lambda: "it wants a token" in page.value(said))
        assert page.value('document.getElementById("ask").hidden') is False
        assert version_of(packed) not in page.value("document.body.innerText")
        for token, answer in (("of-reader", "it does not take this token"), ("of-prometheus", "as of ")):
            page.value(f'document.getElementById("token").value = "{token}"')
            eventually(lambda answer=answer: answer in page.value(said))
        assert version_of(packed) in page.value("document.body.innerText")
        # It stays with the page.
        assert page.value("document.cookie + localStorage.length + sessionStorage.length + location.href") == (
            f"00https://{server.metrics_address}/status"
        )
