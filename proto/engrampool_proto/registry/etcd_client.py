"""An etcd, over HTTP: its endpoints are asked in turn, and each mistake of theirs is a RegistryError.

What its keys mean is etcd.py's.
"""

import base64
import json
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qs

from engrampool_proto.errors import EngrampoolError, how_to_install
from engrampool_proto.security.pem import PemError, PemFiles

if TYPE_CHECKING:
    from etcd3gw.client import Etcd3Client
    from etcd3gw.exceptions import Etcd3Exception

# A watch that lost its other end is silent, as is one with nothing to say: so often the registry is asked.
PROBE_S = 3.0
# How soon a watch notices that it is to stop.
_STOP_S = 0.5
# At most so much of a watch's message is read at a time.
_MESSAGE_BYTES = 1 << 16
# The latter over TLS.
SCHEMES = ("etcd://", "etcds://")
_DEFAULT_PREFIX = "engrampool"
_URL = re.compile(
    r"(?P<scheme>etcds?://)(?P<endpoints>[^/?]+)(?:/(?P<prefix>[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*))?/?"
    r"(?:\?(?P<query>[^?#]+))?"
)
_FORM = "etcd://HOST:PORT[,HOST:PORT...][/PREFIX], or etcds://... with [?ca=FILE[&cert=FILE&key=FILE]] at its end"
_ENDPOINT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):(?P<port>[0-9]{1,5})")
_NO_ETCD = "is no etcd, or not its port for clients"
# Of what some other server says.
_SHOWN_CHARS = 80

_T = TypeVar("_T")


class RegistryError(EngrampoolError):
    """The registry does not answer, or not as an etcd does. The text names it, and what each endpoint said."""


@dataclass(frozen=True)
class Contents:
    """All keys below the root at one moment. values, revisions: {key: bytes}, {key: the revision that wrote it}.

    revision: the etcd's. cluster: its id, which is another for another etcd.
    """

    values: Mapping[str, bytes]
    revisions: Mapping[str, int]
    revision: int
    cluster: str

    @property
    def mark(self) -> tuple[int, int]:
        """Another whenever a key was written or deleted."""
        return max(self.revisions.values(), default=0), len(self.revisions)


class EtcdClient:
    """The keys of one etcd below a root. Thread-safe; connects with the first call.

    url: etcd://HOST:PORT[,HOST:PORT...][/PREFIX], of one etcd's endpoints, which are tried in turn; the prefix, by
        default `engrampool`, is the root. etcds:// over TLS, with ?ca=FILE of authorities other than public ones, and
        &cert=FILE&key=FILE for an etcd that asks for a certificate.
    timeout_s: how long to wait for an endpoint to take a connection, and to answer.

    Raises ValueError for another URL; what asks the etcd raises RegistryError.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self._endpoints, prefix, self._tls = split_url(url)
        self._url, self._root = url, f"/{prefix}/"
        self._timeout_s = timeout_s
        self._clients: list[Etcd3Client] = []
        # Of the endpoint to be asked first.
        self._index = 0
        self._answered = float("-inf")

    @property
    def age_s(self) -> float:
        """Seconds since the etcd answered; inf before it ever did."""
        return time.monotonic() - self._answered

    def read(self) -> Contents:
        """What there is now."""
        return self._each(self._contents)

    def grant(self, ttl_s: int) -> int:
        """A new lease, which ends unless it is kept for so long."""
        return self._each(lambda client: int(_post(client, "/lease/grant", {"TTL": ttl_s})["ID"]))

    def keep(self, lease: int) -> bool:
        """Whether the lease goes on, for as long again; False if it ended."""
        answer = self._each(
            lambda client: int(_post(client, "/lease/keepalive", {"ID": lease})["result"].get("TTL", 0))
        )
        return answer > 0

    def revoke(self, lease: int) -> None:
        """End a lease, and delete what was written under it."""
        self._each(lambda client: _post(client, "/lease/revoke", {"ID": lease}))

    def commit(self, compare: list[dict[str, Any]], writes: Mapping[str, bytes | None], lease: int = 0) -> bool:
        """Whether all that is compared was so, and so everything is written, under a lease; None deletes."""
        success = [
            {"request_delete_range": {"key": self._b64(key)}}
            if value is None
            else {"request_put": {"key": self._b64(key), "value": _b64(value), "lease": lease}}
            for key, value in writes.items()
        ]
        body = {"compare": compare, "success": success}
        return bool(self._each(lambda client: _post(client, "/kv/txn", body)).get("succeeded"))

    def unchanged(self, contents: Contents, keys: Iterable[str]) -> list[dict[str, Any]]:
        """To compare: that these keys are as they were found, or missing as they were."""
        return [self._compare(key, "EQUAL", contents.revisions.get(key, 0)) for key in keys]

    def none_since(self, contents: Contents, folder: str) -> dict[str, Any]:
        """To compare: that nothing in a folder was written since, whatever was deleted."""
        compare = self._compare(folder, "LESS", contents.revision + 1)
        return {**compare, "range_end": self._b64(folder[:-1] + "0")}

    def _compare(self, key: str, result: str, revision: int) -> dict[str, Any]:
        return {"key": self._b64(key), "target": "MOD", "result": result, "mod_revision": revision}

    def _b64(self, key: str) -> str:
        return _b64(f"{self._root}{key}".encode(errors="surrogateescape"))

    def watch(self) -> "Watch":
        """A watch of all keys, to be closed."""
        return self._each(self._watch)

    @property
    def _below(self) -> dict[str, str]:
        """The range of all keys of this pool."""
        return {"key": self._b64(""), "range_end": _b64(f"{self._root[:-1]}0".encode())}

    def _contents(self, client: "Etcd3Client") -> Contents:
        answer = _post(client, "/kv/range", self._below)
        values: dict[str, bytes] = {}
        revisions: dict[str, int] = {}
        for item in answer.get("kvs", ()):
            key = base64.b64decode(item["key"]).decode(errors="surrogateescape")[len(self._root) :]
            values[key] = base64.b64decode(item.get("value", ""))
            revisions[key] = int(item["mod_revision"])
        header = answer["header"]
        return Contents(values, revisions, int(header["revision"]), str(header.get("cluster_id", "")))

    def _newer(self, mark: tuple[int, int] | None, client: "Etcd3Client") -> Contents | None:
        if mark is not None:
            newest = {"limit": 1, "sort_target": "MOD", "sort_order": "DESCEND", "keys_only": True}
            answer = _post(client, "/kv/range", {**self._below, **newest})
            found = max((int(item["mod_revision"]) for item in answer.get("kvs", ())), default=0)
            if mark == (found, int(answer.get("count", 0))):
                return None
        return self._contents(client)

    def _watch(self, client: "Etcd3Client") -> "Watch":
        return Watch(self, client)

    def _each(self, action: Callable[["Etcd3Client"], _T]) -> _T:
        """What the first endpoint answers that does, from the one on that did last."""
        problems = []
        clients = self.connected()
        first = self._index
        for step in range(len(clients)):
            try:
                return self._ask(clients[(first + step) % len(clients)], action)
            except RegistryError as error:
                problems.append(str(error))
        raise RegistryError(f"the registry {self._url} cannot be asked: {'; '.join(problems)}")

    def _ask(self, client: "Etcd3Client", action: Callable[["Etcd3Client"], _T]) -> _T:
        with self._trouble(client):
            answer = action(client)
        self._answered = time.monotonic()
        return answer

    @contextmanager
    def _trouble(self, client: "Etcd3Client") -> Iterator[None]:
        """Whatever an endpoint does wrong within raises RegistryError, and has the next endpoint asked first."""
        from etcd3gw import exceptions

        try:
            yield
        except (exceptions.Etcd3Exception, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            clients = self.connected()
            if clients[self._index] is client:
                self._index = (self._index + 1) % len(clients)
            if isinstance(error, exceptions.ConnectionTimeoutError):
                what = f"does not answer within {self._timeout_s:g} s"
            elif isinstance(error, exceptions.ConnectionFailedError):
                what = _unreached(error)
            elif isinstance(error, exceptions.Etcd3Exception):
                what = _refused(error)
            # What `requests` says of an answer that is no JSON is both.
            elif isinstance(error, OSError) and not isinstance(error, ValueError):
                what = "broke the connection off"
            else:
                what = f"answers otherwise than etcd 3.4 or later does: {error!r:.200}"
            raise RegistryError(f"{client.host}:{client.port} {what}") from error

    def connected(self) -> "list[Etcd3Client]":
        """A client for each endpoint. Raises RegistryError only if `etcd3gw` is missing, or a file of the URL's is."""
        if not self._clients:
            require_etcd3gw(self._url)
            from etcd3gw.client import Etcd3Client
            from requests import Session

            if self._tls is not None:
                try:
                    self._tls.read()
                except PemError as error:
                    raise RegistryError(f"the registry {self._url} cannot be asked: {error}") from error
            clients = []
            for host, port in self._endpoints:
                session = Session()
                # As servers are reached: without a proxy that the environment names.
                session.trust_env = False
                protocol = "http"
                if self._tls is not None:  # files that are read again with each connection
                    protocol, session.verify = "https", True if self._tls.ca is None else str(self._tls.ca)
                    if self._tls.cert is not None:
                        session.cert = (str(self._tls.cert), str(self._tls.key))
                clients.append(Etcd3Client(host, port, protocol, None, None, None, self._timeout_s, "/v3/", session))
            self._clients = clients
        return self._clients


def split_url(url: str) -> tuple[list[tuple[str, int]], str, PemFiles | None]:
    """The endpoints, of (host, port), and the prefix of an etcd's URL; and its files for TLS, None for plain HTTP.

    Raises ValueError for another one. No file is read.
    """
    match = _URL.fullmatch(url)
    endpoints = [_ENDPOINT.fullmatch(text) for text in match["endpoints"].split(",")] if match else []
    if not match or not all(found and 0 < int(found["port"]) < 65_536 for found in endpoints):
        raise ValueError(f"not {_FORM}: {url!r}")
    found = [(one["host"].strip("[]"), int(one["port"])) for one in endpoints if one]
    named = parse_qs(match["query"] or "", keep_blank_values=True)
    one_each = all(len(paths) == 1 and paths[0] for paths in named.values()) and ("cert" in named) == ("key" in named)
    if not one_each or named.keys() - {"ca", "cert", "key"} or (named and match["scheme"] != SCHEMES[1]):
        raise ValueError(f"not {_FORM}: {url!r}")
    ca, cert, key = (Path(named[name][0]) if name in named else None for name in ("ca", "cert", "key"))
    tls = PemFiles(ca, cert, key, ("ca", "cert", "key")) if match["scheme"] == SCHEMES[1] else None
    return found, match["prefix"] or _DEFAULT_PREFIX, tls


def require_etcd3gw(url: str) -> None:
    """Raise RegistryError where the package is missing that the registry `url` is asked through."""
    if find_spec("etcd3gw") is None:
        raise RegistryError(f"the registry {url} needs the package 'etcd3gw': {how_to_install('etcd')}")


class Watch:
    """A request that one endpoint answers bit by bit, whenever a key is written or deleted.

    Opening it raises what `requests` does, or ValueError.
    """

    def __init__(self, etcd: EtcdClient, client: "Etcd3Client") -> None:
        self._etcd, self._client = etcd, client
        body = {"create_request": etcd._below}
        self._response = client.session.post(client.get_url("/watch"), json=body, stream=True, timeout=etcd._timeout_s)
        self._lines: Iterator[bytes] = self._response.iter_lines(_MESSAGE_BYTES)
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def newer(self, mark: tuple[int, int] | None) -> Contents | None:
        """What there is, asked of the same endpoint, unless its mark is this one. Raises RegistryError."""
        return self._etcd._ask(self._client, partial(self._etcd._newer, mark))

    def wait(self, stop: threading.Event) -> None:
        """Return when something came, or may have, when `stop` is set, or after a while. Raises RegistryError.

        Of several messages that came together all but one stay here. What they tell of is older than anything asked
        of etcd from now on.
        """
        ready = select.poll()
        end = time.monotonic() + PROBE_S
        with self._etcd._trouble(self._client):
            ready.register(self._response.raw.fileno(), select.POLLIN)
            while not stop.is_set() and time.monotonic() < end:
                if ready.poll(_STOP_S * 1000):
                    self._read()
                    return

    def _read(self) -> None:
        line = next(self._lines, None)
        if line is None:
            raise ConnectionError("the watch ended")
        answer = json.loads(line)
        if "error" in answer or answer["result"].get("canceled"):
            # As when etcd stops.
            raise ConnectionError(f"the watch was cancelled: {line!r:.200}")

    def close(self) -> None:
        """Give the connection up."""
        self._response.close()


def _post(client: "Etcd3Client", path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    answer = client.post(client.get_url(path), json=body)
    if not isinstance(answer, dict):
        raise TypeError(f"not an object: {answer!r:.80}")
    return answer


def _unreached(error: Exception) -> str:
    """Why nothing came of a connection, as well as that is known."""
    import ssl
    from http.client import BadStatusLine

    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
        if isinstance(cause, socket.gaierror):
            return f"is no host that is known here: {cause.strerror}"
        if isinstance(cause, ssl.SSLError):
            return f"makes no TLS connection that can be trusted: {getattr(cause, 'verify_message', None) or cause}"
        if isinstance(cause, BadStatusLine) and not isinstance(cause, OSError):
            return f"{_NO_ETCD}: it does not speak HTTP/1.1, but {cause!r:.{_SHOWN_CHARS}}"
    return "takes no connection"


def _refused(error: "Etcd3Exception") -> str:
    """What an endpoint answered instead of doing what it was asked."""
    text = error.detail_text or ""
    try:
        answer = json.loads(text)
        said = str(answer.get("error") or answer["message"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{_NO_ETCD}: it answers {text.strip() or repr(error)!r:.{_SHOWN_CHARS}}"
    if "database space exceeded" in said:
        said += "; compact and defragment it, then `etcdctl alarm disarm`"
    return f"refuses: {said}"


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
