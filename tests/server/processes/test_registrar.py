"""The registrar by itself: what it does where the registry is silent, and its file of what was published last."""

import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engrampool_proto.registry.etcd import Published
from engrampool_server.config import ConfigError
from engrampool_server.processes.pool_view import PoolView
from engrampool_server.processes.registrar import Cache
from engrampool_server.processes.reports import Report
from server_fixtures import LIMIT_S, Events, lasting_address

URL = "etcd://127.0.0.1:2379"
PUBLISHED = [
    Published("m", "a", "/models/ä", None, "d", {1: 10}),
    Published("m", "b", "s3://bucket/b", "a", "d", {1: 10}),
]
KNOWN = PoolView(
    {("m", one.version): one for one in PUBLISHED}, {("m", "a"): {"7": 0}, ("m", "b"): {"8": 3}}, {"m": "b"}
)


@pytest.fixture
def events():
    events = Events()
    logger = logging.getLogger("engrampool")
    logger.addHandler(events)
    yield events
    logger.removeHandler(events)


def test_the_cache_gives_back_what_was_written_last_for_the_same_registry(tmp_path, events):
    cache = Cache(tmp_path / "published.json", URL)
    assert cache.read() is None
    for known in (KNOWN, PoolView(), PoolView({("m", "a"): PUBLISHED[0]}, {("m", "a"): {"7": 0}})):
        cache.write(known)
        assert cache.read() == known
    assert [path.name for path in tmp_path.iterdir()] == ["published.json"]
    assert Cache(tmp_path / "published.json", "etcd://other:2379").read() is None
    assert events.lines == []


def test_a_cache_of_an_earlier_release_is_read(tmp_path):
    path = tmp_path / "published.json"
    records = [[one.model, one.version, one.to_json().decode()] for one in PUBLISHED]
    path.write_text(json.dumps({"registry": URL, "published": records}))
    known = Cache(path, URL).read()
    assert known.published == KNOWN.published
    assert known.active == {}


def test_a_cache_knows_how_long_ago_the_registry_answered(tmp_path):
    cache = Cache(tmp_path / "published.json", URL)
    assert cache.age_s == 0
    cache.touch()  # which makes no file
    assert not list(tmp_path.iterdir())
    cache.write(KNOWN)
    os.utime(tmp_path / "published.json", (0, 0))
    assert cache.age_s > 1e9
    cache.touch()
    assert cache.age_s < 1e9


@pytest.mark.parametrize(
    "damage", [b"", b"{}", b"[]", b"\xff", b'{"registry": "%s", "published": [["m", "a", "{}"]]}' % URL.encode()]
)
def test_a_cache_that_is_of_no_use_is_logged(tmp_path, events, damage):
    path = tmp_path / "published.json"
    path.write_bytes(damage)
    assert Cache(path, URL).read() is None
    assert [fields["path"] for fields in events.of("registry-cache")] == [str(path)]


def test_a_cache_that_cannot_be_written_is_logged(tmp_path, events):
    Cache(tmp_path / "missing" / "published.json", URL).write(KNOWN)
    assert "cannot be written" in events.of("registry-cache")[0]["error"]


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path.with_name("other"))])
@pytest.mark.parametrize("name", ["published.json", "published.json.draft"])
def test_a_cache_takes_the_place_of_nothing_but_a_regular_file(tmp_path, make, name):
    path = tmp_path / "published.json"
    Cache(path, URL).check()  # it need not be there
    make(tmp_path / name)
    before = (tmp_path / name).lstat()
    with pytest.raises(ConfigError, match=f"registry_cache: {tmp_path / name} is there, and is no regular file"):
        Cache(path, URL).check()
    assert (tmp_path / name).lstat() == before


def test_a_start_whose_cache_is_no_regular_file_is_refused(tmp_path):
    path = tmp_path / "published.json"
    os.mkfifo(path)
    command = [sys.executable, "-m", "engrampool_proto", "serve", "--registry", f"etcd://{lasting_address()}"]
    command += ["--memory", "shm", "--listen", "127.0.0.1:0", "--metrics", "off", "--registry-cache", str(path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert ended.returncode == 1
    assert f"registry_cache: {path} is there, and is no regular file; name another file" in ended.stderr
    assert path.is_fifo()


def test_a_cache_that_is_a_file_may_be_replaced(tmp_path):
    Cache(tmp_path / "published.json", URL).write(KNOWN)
    Cache(tmp_path / "published.json", URL).check()


REGISTRAR = """
import socket, sys
from pathlib import Path
from engrampool_server.processes import registrar
from engrampool_server.processes.pool_view import PoolView
from engrampool_server.telemetry.metrics import Metrics
from engrampool_server.processes.reports import Reporter
registrar.PATIENCE_S = 0.2
url, path, is_first = sys.argv[1:]
theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
cache, reporter = registrar.Cache(Path(path), url), Reporter(-1, 1, 0.05)
known = None if is_first == "first" else PoolView()
registrar.register(url, cache, "127.0.0.1:1", ours, Metrics(), reporter, known=known)
"""


@pytest.mark.parametrize("is_first", [True, False])
def test_only_a_start_goes_by_the_cache_and_only_once_the_registry_was_silent(tmp_path: Path, is_first: bool):
    url, path = f"etcd://{lasting_address()}", tmp_path / "published.json"
    Cache(path, url).write(KNOWN)
    command = [sys.executable, "-c", REGISTRAR, url, str(path), "first" if is_first else "again"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert json.loads(process.stdout.readline()) == {"ready": True}
        if is_first:
            said = next(line for line in process.stdout if line.strip())
            assert Report.of(said.encode().rstrip()) == Report(known=KNOWN)
        # Signs of life for longer than its patience.
        assert [process.stdout.readline() for _ in range(10)] == ["\n"] * 10
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 0
