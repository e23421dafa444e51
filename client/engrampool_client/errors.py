"""Every error a client raises, each saying who must act. All derive from EngrampoolError.

EngrampoolError
+- BatchError, SpecError        the caller's arrays, config or tokenizer are wrong (from the contract)
+- CacheFileError               a file of cached rows is missing, damaged or another model's: delete it, save it again
+- RecordError                 a recording cannot be made or read, or is another model's: make it again
+- PoolError
   +- UnavailableError          the server is down, unreachable or still loading: try again, or another
   |  +- TlsError              no trust: a certificate, or one side speaks TLS and the other does not
   +- UnauthenticatedError     the server does not know this client: give it a token or certificate that is good
   +- ForbiddenError           it knows the client, which may not do that: another role
   +- DeadlineError             no answer in time (also a TimeoutError)
   +- OverloadedError           the server has too much in flight: send less, or later
   +- RejectedError             the server refused the request: change it
   +- UnknownModelError         no such model there
   +- UnknownVersionError       the version this client was made for is not held any more: connect again
   +- FingerprintError          the server's tables were made for another tokenizer, hash or layout: do not use them
   +- ProtocolError             the answer is not what the contract says: a bug, or not an engrampool server
   +- StepCancelledError        the step was cancelled here
   +- ForkedError               the client is another process's: make one in each process, after the fork
"""

from collections.abc import Sequence

import grpc

from engrampool_proto.errors import BatchError, EngrampoolError, SpecError
from engrampool_proto.wire import REASON_KEY


class PoolError(EngrampoolError):
    """Base of what goes wrong between client and server. reason: the server's name for it, or None.

    number: of the request that it came of, as the server's log has it, and the text in hexadecimal; 0 if of none.
    """

    number = 0

    def __init__(self, text: str, reason: str | None = None) -> None:
        super().__init__(text)
        self.reason = reason

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text} [request {self.number:016x}]" if self.number else text


class CacheFileError(EngrampoolError):
    """A file of cached rows cannot be used; the text says what is wrong with it and what to do."""


class RecordError(EngrampoolError):
    """A recording of row ids cannot be made or read, is damaged, or of another model."""


class UnavailableError(PoolError):
    """The server cannot be reached, or is still loading its tables."""


class TlsError(UnavailableError):
    """No connection is made, as one side does not trust the other, or only one speaks TLS; the text says which."""


class UnauthenticatedError(PoolError):
    """The server answers callers that it knows only: the token or certificate is missing, unknown or revoked."""


class ForbiddenError(PoolError):
    """The server knows the caller, and its roles do not allow the call."""


class DeadlineError(PoolError, TimeoutError):
    """No answer within the time allowed."""


class OverloadedError(PoolError):
    """The server refused because too many bytes are in flight there."""


class RejectedError(PoolError):
    """The server refused the request as it is; the text says what to change."""


class UnknownModelError(PoolError):
    """The server does not hold the model; the text names those it holds."""


class UnknownVersionError(PoolError):
    """The server does not hold the version asked for; the text names those it holds."""


class FingerprintError(PoolError):
    """The served tables differ from what this client's config and tokenizer demand. differences: a line a field."""

    def __init__(self, differences: Sequence[str]) -> None:
        self.differences = tuple(differences)
        lines = "; ".join(self.differences)
        super().__init__(f"this client's model and the served one differ, rows would be wrong without a sign: {lines}")


class ProtocolError(PoolError):
    """The server's answer breaks the contract."""


class StepCancelledError(PoolError):
    """The step was cancelled before its rows were there."""


class ForkedError(PoolError):
    """The client was made before this process was forked: its connections, and what is on them, are the parent's."""


_BY_CODE: dict[grpc.StatusCode, type[PoolError]] = {
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.INVALID_ARGUMENT: RejectedError,
    grpc.StatusCode.NOT_FOUND: UnknownModelError,
    grpc.StatusCode.FAILED_PRECONDITION: UnknownVersionError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: ForbiddenError,
    # Whoever cancels here has ended the step before gRPC says so; otherwise it is a server that is closing.
    grpc.StatusCode.CANCELLED: UnavailableError,
}


# How gRPC begins to say that there is no connection, and why that is, for people.
_NO_GRPC = ("Failed parsing HTTP/2", "Trying to connect an http1.x server")
_NO_CONNECTION = {
    "Connection refused": "the connection was refused, as nothing listens there",
    "errors resolving": "the host's name is not known",
    "DNS resolution failed": "the host's name is not known",
    "No such file or directory": "there is no such socket",
    **dict.fromkeys(_NO_GRPC, "something answers there that does not speak gRPC, or only over TLS"),
    # As it is being connected to; of a connection that was there nothing is before it.
    ": Socket closed": "something there closes the connection at once; it may not speak gRPC, or only over TLS",
}


# How gRPC says why a handshake failed; what that means, and the reason that programs go by.
_NO_TRUST = {
    "certificate has expired": ("the server's certificate has expired: it needs another one", "certificate-expired"),
    "certificate is not yet valid": ("the server's certificate is not valid yet: look at both clocks", "not-yet-valid"),
    "Hostname Verification Check failed": (
        "the server's certificate is for another host: reach it by a name in its certificate, or set tls_name",
        "wrong-host",
    ),
    "CERTIFICATE_VERIFY_FAILED": (
        "the server's certificate is of no authority in tls_ca: give the file of the authority that signed it",
        "unknown-authority",
    ),
    "WRONG_VERSION_NUMBER": (
        "it does not speak TLS, and this client does: leave tls_ca away, or give the server tls_cert and tls_key",
        "no-tls",
    ),
    "andshake failed": ("the TLS handshake failed", "handshake"),
    "security handshaker": ("the TLS handshake failed, perhaps for what tls_ca holds", "handshake"),
}


def from_rpc(error: grpc.RpcError, target: str) -> PoolError:
    """The typed error for a failed call to `target`."""
    reason = next((str(value) for key, value in error.trailing_metadata() or () if key == REASON_KEY), None)
    return from_status(error.code(), reason, error.details(), target)


def from_status(code: grpc.StatusCode, reason: str | None, text: str | None, target: str) -> PoolError:
    """The typed error for what `target` answered."""
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolError(f"{target} is no engrampool server: {text}", reason)
    if code is grpc.StatusCode.UNAVAILABLE and reason is None:
        for sign, (means, named) in _NO_TRUST.items():
            if sign in (text or ""):
                return TlsError(f"{target}: {means}: {text} ({code.name})", named)
        why = next((why for sign, why in _NO_CONNECTION.items() if sign in (text or "")), None)
        text = text if why is None else f"{why}: {text}"
    kind = _BY_CODE.get(code, PoolError)
    if kind is OverloadedError and reason is None:
        kind = RejectedError  # gRPC's own: the message is larger than the server takes, and always will be
    if kind is UnknownVersionError and reason not in (None, "unknown-version"):
        kind = RejectedError  # such as "partial-model": the version is there, what is asked for is not
    return kind(f"{target}: {text} ({code.name})", reason)


def together(errors: Sequence[EngrampoolError]) -> type[PoolError]:
    """What it is that no server can be asked: of no trust on all sides that, else that they are unavailable."""
    kinds = {type(error) for error in errors}
    one = kinds.pop() if len(kinds) == 1 else UnavailableError
    return one if issubclass(one, TlsError | UnauthenticatedError | ForbiddenError) else UnavailableError


def is_no_grpc(error: PoolError) -> bool:
    """Whether something answered that is no server of gRPC."""
    return isinstance(error, UnavailableError) and any(sign in str(error) for sign in _NO_GRPC)


__all__ = [
    "BatchError",
    "CacheFileError",
    "DeadlineError",
    "EngrampoolError",
    "FingerprintError",
    "ForbiddenError",
    "ForkedError",
    "OverloadedError",
    "PoolError",
    "ProtocolError",
    "RecordError",
    "RejectedError",
    "SpecError",
    "StepCancelledError",
    "TlsError",
    "UnauthenticatedError",
    "UnavailableError",
    "UnknownModelError",
    "UnknownVersionError",
]
