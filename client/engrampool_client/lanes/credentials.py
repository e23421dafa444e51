"""What a client trusts of servers and shows to them: files, read again when they change, and channels by them."""

import logging
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

import grpc

from engrampool_client.config import TOKEN, ClientConfig
from engrampool_client.errors import TlsError
from engrampool_client.lanes.dial import OPEN_TIMEOUT_S, address_of, host_of
from engrampool_proto.security.openssl import Context
from engrampool_proto.security.pem import Pem, PemError, PemFiles
from engrampool_proto.security.reread import Reread
from engrampool_proto.security.small_file import read_small
from engrampool_proto.security.tls_socket import TlsSocket

# How often files are looked at, by calls that are made anyway.
_LOOK_S = 1.0
# How long a call waits for that, where it takes more than its microseconds.
_PATIENCE_S = 0.1
_log = logging.getLogger("engrampool")

Options = tuple[tuple[str, str | int], ...]


class Credentials:
    """Those of one client. Thread-safe. Raises PemError, and ValueError for a file that holds no token.

    metadata: that says with a call who makes it, None without a token.
    """

    def __init__(self, config: ClientConfig) -> None:
        self._name = config.tls_name
        self._context: tuple[Pem, Context] | None = None  # of the direct lane, and by what it was made
        self._pem: Reread[Pem] | None = None
        self._token: Reread[str] | str | None = config.token
        if config.tls_ca is not None:
            ca, cert, key = (
                None if path is None else Path(path) for path in (config.tls_ca, config.tls_cert, config.tls_key)
            )
            self._files = PemFiles(ca, cert, key)
            self._pem = Reread(self._files.paths, self._files.read, _damaged)
        if config.token is not None and config.token.startswith("file:"):
            path = Path(config.token.removeprefix("file:"))
            self._token = Reread([path], lambda: _read_token(path), _damaged)
        self._reread = [one for one in (self._pem, self._token) if isinstance(one, Reread)]
        self._again_s = time.monotonic() + _LOOK_S
        self._starting = threading.RLock()
        self._looker: threading.Thread | None = None
        self._patient_until = 0.0

    @property
    def metadata(self) -> tuple[tuple[str, str]] | None:
        """See above."""
        token = self._token.value if isinstance(self._token, Reread) else self._token
        return None if token is None else (("authorization", f"Bearer {token}"),)

    @property
    def shown(self) -> tuple[object, object]:
        """Another one once the files say something else: connections that were made by an older one are replaced."""
        pem = None if self._pem is None else self._pem.value
        return pem, self.metadata

    def look(self) -> None:
        """Read again what has changed, at most once a second. Of a disk that hangs the last good ones stay."""
        now = time.monotonic()
        with self._starting:
            looks = self._looker is not None and self._looker.is_alive()
            if self._reread and now >= self._again_s and not looks:
                self._again_s, self._patient_until = now + _LOOK_S, now + _PATIENCE_S
                # Whoever asks has a deadline, and a disk has none.
                looker = threading.Thread(target=self._look, name="engrampool-credentials", daemon=True)
                with suppress(RuntimeError):  # the system gives none now
                    looker.start()
                    self._looker = looker
        # Also one that another caller began: as a lane is lost, its lookup and whoever opens it again ask at one time.
        if self._looker is not None:
            self._looker.join(max(0.0, self._patient_until - now))

    def _look(self) -> None:
        for one in self._reread:
            one.look()

    def channel(self, target: str, options: Options) -> grpc.Channel:
        """A channel by what the files say now."""
        if self._pem is None:
            return grpc.insecure_channel(target, options)
        pem = self._pem.value
        if self._name is not None:
            options = (*options, ("grpc.ssl_target_name_override", self._name))
        return grpc.secure_channel(target, grpc.ssl_channel_credentials(pem.ca, pem.key, pem.cert), options)

    @property
    def tls(self) -> bool:
        """Whether connections are inside TLS."""
        return self._pem is not None

    def secure(self, plain: socket.socket, target: str) -> socket.socket:
        """A connection of the direct lane inside TLS, by what the files say now, to whom gRPC takes for the same.

        plain: closed if this fails. It takes OPEN_TIMEOUT_S at most. Raises OSError.
        """
        try:
            if self._pem is None:
                raise OSError(f"{target}: its direct lane speaks TLS, and this client does not: give the client tls_ca")
            pem, made = self._pem.value, self._context
            if made is None or made[0] is not pem:
                made = self._context = pem, Context(pem, server=False)
            secured = TlsSocket(plain, made[1], self._name or host_of(target))
        except PemError as error:
            plain.close()
            raise OSError(str(error)) from error
        except BaseException:
            plain.close()
            raise
        try:
            secured.handshake(time.monotonic() + OPEN_TIMEOUT_S)
        except BaseException:
            secured.close()
            raise
        return secured

    def diagnose(self, target: str) -> TlsError | None:
        """Why a server that ended the connection did so, if it can be told from a handshake of our own; None if not.

        A server on a Unix socket is not asked. It takes a second at most for each of its steps.
        """
        import ssl

        address = address_of(target)
        if address is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_alpn_protocols(["h2"])
        # What is wrong with its certificate gRPC says itself. To one that nobody trusts nothing is shown.
        context.check_hostname = False
        if self._pem is None:
            context.verify_mode = ssl.CERT_NONE
        shown = self._pem is not None and self._files.cert is not None
        shook = False
        try:
            if self._pem is not None:
                context.load_verify_locations(self._files.ca)
            if shown:
                context.load_cert_chain(str(self._files.cert), self._files.key)
            with (
                socket.create_connection(address, OPEN_TIMEOUT_S) as plain,
                context.wrap_socket(plain, server_hostname=self._name or address[0]) as secured,
            ):
                if self._pem is None:
                    text = "it speaks TLS, and this client does not: give the client tls_ca"
                    return TlsError(f"{target}: {text}", "tls-wanted")
                # In TLS 1.3 a client's certificate is looked at after the handshake; who takes it says hello.
                shook = True
                if secured.recv(1):
                    return None
        except OSError as error:
            if not shook or isinstance(error, TimeoutError):
                return None
        if shown:
            text = (
                "it does not take this client's certificate (tls_cert), which may have expired, or be of an authority "
                "that the server does not trust (its tls_client_ca)"
            )
            return TlsError(f"{target}: {text}", "certificate-refused")
        text = "it asks clients for a certificate, and this one shows none: give the client tls_cert and tls_key"
        return TlsError(f"{target}: {text}", "certificate-wanted")


def _read_token(path: Path) -> str:
    try:
        token = read_small(path).decode("ascii").strip()
    except (OSError, ValueError) as error:
        raise PemError(f"token: {path} cannot be read: {error}") from error
    if not TOKEN.fullmatch(token):
        raise PemError(f"token: {path} must hold one token, printable ASCII without spaces")
    return token


def _damaged(error: Exception) -> None:
    _log.warning("the last good credentials stay: %s", error)
