"""Certificates and keys for TLS, as PEM files hold them: read, and checked before they are believed."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from engrampool_proto.errors import EngrampoolError
from engrampool_proto.security.small_file import read_small

if TYPE_CHECKING:
    import ssl


class PemError(EngrampoolError, ValueError):
    """A file of certificates or keys cannot be used; the text names it, and says what to do."""


@dataclass(frozen=True)
class Pem:
    """The bytes of PEM files, None for those that are not given. ca: certificates to trust."""

    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class PemFiles:
    """Where they are. cert, key: both or neither. names: of the three as settings, for errors."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    names: tuple[str, str, str] = ("tls_ca", "tls_cert", "tls_key")

    @property
    def paths(self) -> list[Path]:
        """Those that are given."""
        return [path for path in (self.ca, self.cert, self.key) if path is not None]

    def read(self) -> Pem:
        """All of them, which fit together. Raises PemError."""
        import ssl  # which a client without TLS does not need

        ca_name, cert_name, key_name = self.names
        ca, cert, key = (
            _bytes(name, path) for name, path in zip(self.names, (self.ca, self.cert, self.key), strict=True)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if ca is not None:
            try:
                context.load_verify_locations(cadata=ca.decode("ascii", "ignore"))
            except (ssl.SSLError, ValueError) as error:  # the latter of an empty file
                raise PemError(f"{ca_name}: {self.ca} holds no certificate as PEM ({error})") from error
        if cert is not None and key is not None:
            assert self.cert is not None
            assert self.key is not None
            try:
                context.load_cert_chain(self.cert, self.key, password=self._encrypted)
            except ssl.SSLError as error:
                raise PemError(
                    f"{cert_name}, {key_name}: {self.cert} and {self.key} are no certificate and its key as PEM, or "
                    f"not of one pair ({error})"
                ) from error
            # They were read twice, and are to be one pair.
            if (cert, key) != (_bytes(cert_name, self.cert), _bytes(key_name, self.key)):
                raise PemError(f"{cert_name}, {key_name}: {self.cert} or {self.key} changed while they were read")
        return Pem(ca, cert, key)

    def server_context(self) -> "ssl.SSLContext":
        """For a server of Python's that shows the certificate, and asks its clients for none. Raises PemError."""
        import ssl

        self.read()
        assert self.cert is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.cert, self.key, password=self._encrypted)
        except OSError as error:  # it changed just now
            raise PemError(f"{self.names[1]}: {self.cert} cannot be used: {error}") from error
        return context

    def _encrypted(self) -> NoReturn:
        raise PemError(f"{self.names[2]}: the key in {self.key} is encrypted; give one without a password")


def _bytes(name: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return read_small(path)
    except OSError as error:
        raise PemError(f"{name}: {path} cannot be read: {error.strerror or error}") from error
