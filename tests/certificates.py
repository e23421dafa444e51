"""Certificates and files of callers for tests, of an authority that nobody else trusts."""

import datetime
import hashlib
import ipaddress
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = datetime.timedelta(days=1)


class Authority:
    """Signs certificates, whose files lie in `directory`. ca: the file of its own."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._count = 0
        self.ca = directory / f"{name}.pem"
        self.ca.write_bytes(_pem(self._signed(self._name, self._key, (), (-_DAY, _DAY), is_ca=True)))

    def sign(
        self, common: str, hosts: Sequence[str] = (), valid: tuple[datetime.timedelta, datetime.timedelta] | None = None
    ) -> tuple[Path, Path]:
        """The files of another certificate and its key. hosts: names, addresses. valid: from when to when, from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
        self._count += 1
        cert, of_key = (self._directory / f"{common}-{self._count}.{kind}" for kind in ("pem", "key"))
        cert.write_bytes(_pem(self._signed(name, key, hosts, valid or (-_DAY, _DAY))))
        of_key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return cert, of_key

    def of_server(self, host: str = "127.0.0.1", **other: Any) -> dict[str, Path]:
        """The settings of a server that is reached by this host."""
        cert, key = self.sign("server", [host], **other)
        return {"tls_cert": cert, "tls_key": key}

    def _signed(
        self,
        name: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        hosts: Sequence[str],
        valid: tuple[datetime.timedelta, datetime.timedelta],
        is_ca: bool = False,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + valid[0])
            .not_valid_after(now + valid[1])
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName([_host(one) for one in hosts]), critical=False)
        return builder.sign(self._key, hashes.SHA256())


def yesterday() -> tuple[datetime.timedelta, datetime.timedelta]:
    """Of a certificate that has expired."""
    return -2 * _DAY, -_DAY


def write_callers(path: Path, *callers: dict[str, Any]) -> Path:
    """A file of `tokens`, put there at once. token, tokens: of a caller, instead of their digests."""
    lines = []
    for caller in callers:
        entry = {"roles": ["read"], **caller}
        tokens = [*entry.pop("tokens", ()), *([entry.pop("token")] if "token" in entry else [])]
        if tokens:
            entry["token_sha256"] = [digest(token) for token in tokens]
        lines += ["[[caller]]", *(f"{key} = {json.dumps(value)}" for key, value in entry.items())]
    return put(path, "\n".join(lines).encode())


def bearer(token: str | None) -> tuple[tuple[str, str], ...] | None:
    """The metadata of a call with a token."""
    return None if token is None else (("authorization", f"Bearer {token}"),)


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def put(path: Path, raw: bytes) -> Path:
    """Replace a file at once, as whoever deploys certificates does."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_bytes(raw)
    draft.replace(path)
    return path


def _host(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
