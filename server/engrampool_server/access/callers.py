"""The callers that a server knows: a TOML file of names, the digests of their tokens, their roles and their limits."""

import hashlib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engrampool_proto.errors import EngrampoolError
from engrampool_proto.security.small_file import read_small
from engrampool_server.setting_kinds import KIB, TIB, Integer, Size

# What a role allows: lookups and all that goes with them; what changes a server; reading its metrics.
READ, ADMIN, METRICS = "read", "admin", "metrics"
ROLES = (READ, ADMIN, METRICS)
# More than a pool has; each has a place in memory that all processes of a server share.
MOST_CALLERS = 512
_BEARER = "bearer "
# What `sha256sum` says of no token at all, as where its file was missing: each call without one would be that caller's.
_NO_TOKENS = frozenset(hashlib.sha256(text).hexdigest() for text in (b"", b"\n"))
_DIGEST = re.compile(r"[0-9a-fA-F]{64}")
_NAME = re.compile(r"[A-Za-z0-9_.:@/-]{1,64}")
_KEYS = ("name", "roles", "token_sha256", "certificate", "max_rows_per_s", "max_in_flight_bytes", "max_connections")
_ROWS, _BYTES, _CONNECTIONS = Integer(1, 1 << 40, "rows"), Size(KIB, TIB), Integer(1, 1 << 20, "connections")


class CallersFileError(EngrampoolError, ValueError):
    """The file of `tokens` cannot be read, or does not say what it must; the text says where and what to change."""


@dataclass(frozen=True)
class Caller:
    """One that is known, by one of its credentials.

    key: 32 bytes that stand for the credential, in tickets. max_*: its limits, 0 for none of its own.
    """

    name: str
    roles: frozenset[str]
    key: bytes = b""
    max_rows_per_s: int = 0
    max_in_flight_bytes: int = 0
    max_connections: int = 0


@dataclass(frozen=True)
class Callers:
    """By what they show: the SHA-256 of a token, a name in a certificate. by_key: all of them."""

    by_token: Mapping[bytes, Caller]
    by_certificate: Mapping[str, Caller]

    @property
    def names(self) -> frozenset[str]:
        """Of all callers."""
        return frozenset(caller.name for caller in (*self.by_token.values(), *self.by_certificate.values()))

    def of_token(self, token: bytes) -> Caller | None:
        """Whose token it is; nobody's where there is none."""
        if not token:
            return None
        return self.by_token.get(hashlib.sha256(token).digest())

    def of_certificate(self, names: Iterable[str]) -> Caller | None:
        """The caller that the first of a certificate's names stands for that is known."""
        return next((self.by_certificate[name] for name in names if name in self.by_certificate), None)

    def of_key(self, key: bytes) -> Caller | None:
        """The caller with the credential that a ticket was given for, while it is good."""
        found = self.by_token.get(key)
        if found is None:
            found = next((caller for caller in self.by_certificate.values() if caller.key == key), None)
        return found


def bearer(authorization: str) -> str:
    """The token in a header `Authorization: Bearer TOKEN`, "" for another one."""
    return authorization[len(_BEARER) :] if authorization[: len(_BEARER)].lower() == _BEARER else ""


def read_callers(path: Path) -> Callers:
    """The callers that a file names. Raises CallersFileError."""
    try:
        document = tomllib.loads(read_small(path).decode("utf-8-sig"))
    except OSError as error:
        raise CallersFileError(f"tokens: {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, or of brackets without end
        raise CallersFileError(f"tokens: {path} is not a TOML file: {error}") from error
    entries = document.pop("caller", None)
    if document or not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise CallersFileError(f"tokens: {path} must hold [[caller]] tables and nothing else; see docs/SECURITY.md")
    if len(entries) > MOST_CALLERS:
        raise CallersFileError(f"tokens: {path} names {len(entries)} callers, at most {MOST_CALLERS}")
    by_token: dict[bytes, Caller] = {}
    by_certificate: dict[str, Caller] = {}
    names = set()
    for number, entry in enumerate(entries, 1):
        try:
            caller, tokens, certificates = _caller(entry)
            if caller.name in names:
                raise ValueError(f"a second caller {caller.name!r}; give one several tokens instead")
            names.add(caller.name)
            for digest in tokens:
                if digest in by_token:
                    raise ValueError(f"{caller.name!r} has the token of {by_token[digest].name!r}")
                by_token[digest] = replace(caller, key=digest)
            for name in certificates:
                if name in by_certificate:
                    raise ValueError(f"{caller.name!r} has the certificate's name of {by_certificate[name].name!r}")
                by_certificate[name] = replace(caller, key=hashlib.sha256(b"certificate:" + name.encode()).digest())
        except ValueError as error:
            raise CallersFileError(f"tokens: {path}, [[caller]] number {number}: {error}") from error
    return Callers(by_token, by_certificate)


def _caller(entry: Mapping[str, Any]) -> tuple[Caller, list[bytes], list[str]]:
    """One of the file's, the digests of its tokens and its names in certificates. Raises ValueError."""
    unknown = sorted(entry.keys() - set(_KEYS))
    if unknown:
        raise ValueError(f"there is no key {unknown[0]!r}; there are {', '.join(_KEYS)}")
    name = entry.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name must be 1 to 64 letters, digits or any of _.:@/-; it is {name!r}")
    roles = _texts(entry, "roles")
    wrong = [role for role in roles if role not in ROLES]
    if wrong or not roles:
        raise ValueError(f"roles of {name!r} must be some of {', '.join(ROLES)}; they are {roles!r}")
    tokens, certificates = _texts(entry, "token_sha256"), _texts(entry, "certificate")
    if not all(_DIGEST.fullmatch(one) for one in tokens):
        # What was written there may be the token itself, and errors go to the log.
        raise ValueError(f"token_sha256 of {name!r} must be 64 hexadecimal digits, of `printf %s TOKEN | sha256sum`")
    if not _NO_TOKENS.isdisjoint(one.lower() for one in tokens):
        raise ValueError(f"token_sha256 of {name!r} is the digest of no token: the file that it was made of was empty")
    if not tokens and not certificates:
        raise ValueError(f"{name!r} has neither token_sha256 nor certificate, so nobody can be it")
    limits: dict[str, Any] = {}
    for key, kind in (("max_rows_per_s", _ROWS), ("max_in_flight_bytes", _BYTES), ("max_connections", _CONNECTIONS)):
        if key in entry:
            try:
                limits[key] = kind.parse(entry[key])
            except ValueError as error:
                raise ValueError(f"{key} of {name!r} must be {kind.allowed}; it is {entry[key]!r}") from error
    return Caller(name, frozenset(roles), **limits), [bytes.fromhex(one) for one in tokens], certificates


def _texts(entry: Mapping[str, Any], key: str) -> list[str]:
    """A text or a list of texts, none for what is not there. Raises ValueError."""
    value = entry.get(key, [])
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(one, str) and one for one in texts):
        raise ValueError(f"{key} must be a text, or a list of texts")
    return texts
