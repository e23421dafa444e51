"""A model on several servers, each shard twice, while servers are killed, come back and are replaced."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from engrampool_client.testing import ServerProcess, serve_process
from engrampool_proto.builders import blueprint
from server_fixtures import lasting_address
from small_model import CONFIG, TOKENIZER, write_model

SHARDS, REPLICAS = 4, 2
LOAD = Path(__file__).with_name("cluster_client.py")


class Load:
    """A client in a process of its own, as it last said how it goes."""

    def __init__(self, seed: int, addresses: list[str]) -> None:
        command = [sys.executable, str(LOAD), str(seed), *addresses]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.said: dict[str, Any] = {"lookups": 0, "away": None}
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            with self._changed:
                self.said = json.loads(line)
                self._changed.notify_all()
        with self._changed:
            self.said = {**self.said, "ended": True}
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[dict[str, Any]], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: "ended" in self.said or condition(self.said), 60), self.said
            assert "ended" not in self.said

    def go_on(self, lookups: int = 5) -> None:
        """Wait until it has made so many more, with nobody away."""
        until = self.said["lookups"] + lookups
        self.wait_for(lambda said: said["lookups"] >= until and said["away"] == [])

    def end(self) -> dict[str, Any]:
        self.process.stdin.close()
        assert self.process.wait(60) == 0
        self._reader.join()
        self.process.stdout.close()
        return self.said


@contextmanager
def loads(addresses: list[str]) -> Iterator[list[Load]]:
    running = [Load(seed, addresses) for seed in (0, 1)]
    try:
        yield running
    finally:
        for load in running:
            load.process.kill()
            load.process.wait()


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "small", blueprint(CONFIG, TOKENIZER).spec)


@pytest.mark.timeout(300)
def test_no_step_fails_and_no_byte_is_wrong_while_one_replica_of_each_shard_is_up(packed):
    with ExitStack() as stack:
        servers: dict[str, tuple[ServerProcess, int]] = {}

        def start(shard: int, listen: str) -> str:
            settings = {"shard": f"{shard}/{SHARDS}", "listen": listen, "workers": 1, "metrics": "off"}
            server = stack.enter_context(serve_process(packed, **settings))
            servers[server.address] = server, shard
            return server.address

        for shard in range(SHARDS):
            for _ in range(REPLICAS):
                start(shard, lasting_address())
        addresses = list(servers)
        running = stack.enter_context(loads(addresses))
        for load in running:
            load.go_on()
        # One replica of each shard is killed and comes back, the other is told to replace its workers.
        for killed, rolled in zip(addresses[::2], addresses[1::2], strict=True):
            server, shard = servers[killed]
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
            for load in running:
                until = load.said["lookups"] + 10
                load.wait_for(lambda said, until=until: said["lookups"] >= until)
            start(shard, killed)
            for load in running:
                load.go_on()
            servers[rolled][0].process.send_signal(signal.SIGHUP)
            servers[rolled][0].wait_for("rolled")
            for load in running:
                load.go_on()
        # Both replicas at once, of different shards.
        for address in (addresses[1], addresses[2]):
            servers[address][0].process.kill()
            servers[address][0].process.wait()
        for load in running:
            until = load.said["lookups"] + 20
            load.wait_for(lambda said, until=until: said["lookups"] >= until)
        for load in running:
            said = load.end()
            assert said["failed"] == []
            assert said["wrong"] == 0
            assert said["lookups"] > 100
