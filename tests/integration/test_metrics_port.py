"""What the metrics port answers: metrics, that a server lives, that it answers lookups, and nothing else."""

import os
import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from engrampool_client.testing import serve_process
from server_fixtures import LIMIT_S, eventually, pack, running

# Every read of a block opens a pipe first, and so waits until somebody opened its other end.
SLOW_DISK = """
import os
from engrampool_server.files.table_files import PackedModel
read_block = PackedModel.read_block
def slow(self, block, out):
    os.close(os.open(os.environ["TEST_GATE"], os.O_RDONLY))
    return read_block(self, block, out)
PackedModel.read_block = slow
"""
OTHERS = ("/", "/metrics/", "/metricsx", "/health", "/healthz/x", "/favicon.ico", "/../metrics")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("port") / "small")


def get(address: str, path: str, method: str = "GET") -> tuple[int, str]:
    request = urllib.request.Request(f"http://{address}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=LIMIT_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_paths_mean_what_they_say_while_loading_serving_and_draining(packed, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    search = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    environ = {"PYTHONPATH": search, "TEST_GATE": str(gate)}
    # Whoever is stopped is left in peace.
    patient = {"worker_timeout_s": 600, "drain_s": 600}
    with serve_process(packed, environ=environ, ready=False, workers=1, **patient) as server:
        address = server.wait_for("listening")["metrics"]
        assert get(address, "/healthz") == (200, "alive\n")
        assert get(address, "/readyz") == (503, "not serving\n")
        assert "engrampool_serving 0" in get(address, "/metrics")[1]
        for path in OTHERS:
            assert get(address, path) == (404, "there are /metrics, /status, /healthz and /readyz\n")
        through = os.open(gate, os.O_RDWR)  # opened for both, so that opening waits for nobody
        server.wait_for("serving")
        os.close(through)
        assert get(address, "/readyz") == (200, "serving\n")
        assert "engrampool_serving 1.0" in get(address, "/metrics")[1]
        assert get(address, "/readyz?verbose=1")[0] == 200
        assert get(address, "/readyz", "HEAD") == (200, "")
        assert get(address, "/readyz", "POST")[0] == 405
        assert {get(address, path)[0] for path in OTHERS} == {404}
        # One that does not go: the others wait for it.
        os.kill(server.worker_pids()[0], signal.SIGSTOP)
        server.process.terminate()
        server.wait_for("stopping")
        eventually(lambda: get(address, "/readyz") == (503, "not serving\n"), "it is shown")
        assert get(address, "/healthz") == (200, "alive\n")
        os.kill(server.worker_pids()[0], signal.SIGCONT)
        assert server.process.wait(LIMIT_S) == 0


def test_a_server_without_a_worker_is_not_ready(packed, tmp_path):
    code = """
import os
from engrampool_server.processes import supervisor
answer = supervisor.answer
def fail(config, shared, link, *, serving):
    if serving and os.path.exists(os.environ["TEST_FLAG"]):
        os._exit(3)
    answer(config, shared, link, serving=serving)
supervisor.answer = fail
"""
    (tmp_path / "sitecustomize.py").write_text(code)
    flag = tmp_path / "flag"
    search = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    with serve_process(packed, workers=1, environ={"PYTHONPATH": search, "TEST_FLAG": str(flag)}) as server:
        address = server.metrics_address
        assert get(address, "/readyz")[0] == 200
        flag.touch()
        os.kill(server.worker_pids()[0], signal.SIGKILL)
        server.wait_for("worker-died")
        assert get(address, "/readyz")[0] == 503
        flag.unlink()
        eventually(lambda: get(address, "/readyz")[0] == 200, "another worker came")


def test_the_metrics_port_listens_on_ipv6_too(packed):
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6: run where /proc/net/if_inet6 lists an address")
    with running(packed, metrics="[::1]:0") as run:
        assert get(run.metrics_address, "/readyz")[0] == 200
