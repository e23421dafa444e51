"""OpenSSL's own calls, of the library that Python's ssl goes by: compiled loops cannot ask that module for bytes.

The library is loaded when the first context is made. docs/SECURITY.md says which settings that takes.
"""

import ctypes
from functools import lru_cache
from typing import Any

from engrampool_proto.errors import EngrampoolError
from engrampool_proto.security.pem import Pem, PemError

WANT_READ, WANT_WRITE, SYSCALL, ZERO_RETURN = 2, 3, 5, 6
_TLS_1_3 = 0x0304
# Of SSL_CTX_ctrl and SSL_ctrl, which are macros' insides.
_SET_MODE, _SET_READ_AHEAD, _SET_SESSION_CACHE, _SET_SERVER_NAME, _ADD_CHAIN, _SET_MIN_VERSION = 33, 41, 44, 55, 89, 123
# A call takes some of what it is given, and may be given it from elsewhere the next time.
_PARTIAL_WRITE, _MOVING_BUFFER = 1, 2
# The end without OpenSSL's own word for it is the end: frames say how long they are, so none is taken for whole.
_IGNORE_UNEXPECTED_EOF = 1 << 7
_VERIFY_PEER, _FAIL_WITHOUT_PEER = 1, 2
# As gRPC goes by its authorities: one of them is trusted, whoever signed it.
_TRUSTED_FIRST, _PARTIAL_CHAIN = 0x8000, 0x80000
# Of answers: so much is sent, and received, in one call of the system's, where a record is 16 KiB.
_AT_ONCE_BYTES = 128 << 10
_SET_BUFFER, _OF_WRITES, FLUSH = 117, 1, 11

_PTR, _INT, _LONG, _TEXT = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_char_p
_CALLS: dict[str, tuple[Any, ...]] = {  # what each returns, and takes
    "TLS_server_method": (_PTR,),
    "TLS_client_method": (_PTR,),
    "SSL_CTX_new": (_PTR, _PTR),
    "SSL_CTX_free": (None, _PTR),
    "SSL_CTX_ctrl": (_LONG, _PTR, _INT, _LONG, _PTR),
    "SSL_CTX_set_options": (ctypes.c_uint64, _PTR, ctypes.c_uint64),
    "SSL_CTX_set_default_read_buffer_len": (None, _PTR, ctypes.c_size_t),
    "SSL_CTX_set_num_tickets": (_INT, _PTR, ctypes.c_size_t),
    "SSL_CTX_set_verify": (None, _PTR, _INT, _PTR),
    "SSL_CTX_get_cert_store": (_PTR, _PTR),
    "SSL_CTX_use_certificate": (_INT, _PTR, _PTR),
    "SSL_CTX_use_PrivateKey": (_INT, _PTR, _PTR),
    "X509_STORE_add_cert": (_INT, _PTR, _PTR),
    "X509_STORE_set_flags": (_INT, _PTR, ctypes.c_ulong),
    "X509_free": (None, _PTR),
    "EVP_PKEY_free": (None, _PTR),
    "BIO_new_mem_buf": (_PTR, _TEXT, _INT),
    "BIO_free": (_INT, _PTR),
    "PEM_read_bio_X509": (_PTR, _PTR, _PTR, _PTR, _TEXT),
    "PEM_read_bio_PrivateKey": (_PTR, _PTR, _PTR, _PTR, _TEXT),
    "SSL_new": (_PTR, _PTR),
    "SSL_free": (None, _PTR),
    "SSL_set_fd": (_INT, _PTR, _INT),
    "SSL_get_rbio": (_PTR, _PTR),
    "SSL_get_wbio": (_PTR, _PTR),
    "SSL_set0_wbio": (None, _PTR, _PTR),
    "BIO_f_buffer": (_PTR,),
    "BIO_new": (_PTR, _PTR),
    "BIO_up_ref": (_INT, _PTR),
    "BIO_push": (_PTR, _PTR, _PTR),
    "BIO_int_ctrl": (_LONG, _PTR, _INT, _LONG, _INT),
    "BIO_ctrl": (_LONG, _PTR, _INT, _LONG, _PTR),
    "SSL_ctrl": (_LONG, _PTR, _INT, _LONG, _PTR),
    "SSL_set1_host": (_INT, _PTR, _TEXT),
    "SSL_get0_param": (_PTR, _PTR),
    "X509_VERIFY_PARAM_set1_ip_asc": (_INT, _PTR, _TEXT),
    "SSL_set_accept_state": (None, _PTR),
    "SSL_set_connect_state": (None, _PTR),
    "SSL_do_handshake": (_INT, _PTR),
    "SSL_read": (_INT, _PTR, _PTR, _INT),
    "SSL_peek": (_INT, _PTR, _PTR, _INT),
    "SSL_write": (_INT, _PTR, _PTR, _INT),
    "SSL_has_pending": (_INT, _PTR),
    "SSL_rstate_string": (_TEXT, _PTR),
    "SSL_get_error": (_INT, _PTR, _INT),
    "SSL_get_verify_result": (_LONG, _PTR),
    "X509_verify_cert_error_string": (_TEXT, _LONG),
    "ERR_clear_error": (None,),
    "ERR_get_error": (ctypes.c_ulong,),
    "ERR_reason_error_string": (_TEXT, ctypes.c_ulong),
}


class NoOpensslError(EngrampoolError, OSError):
    """There is no OpenSSL here that can be called; the text says what is missing."""


@lru_cache(maxsize=1)
def library() -> Any:
    """OpenSSL, with the calls of `_CALLS`. Raises NoOpensslError."""
    import _ssl  # a Python without TLS has none

    # Whoever has OpenSSL within Python itself may have one beside it.
    for name in (getattr(_ssl, "__file__", None), "libssl.so.3"):
        try:
            found = ctypes.CDLL(name)
            for call, (returns, *takes) in _CALLS.items():
                function = getattr(found, call)
                function.restype, function.argtypes = returns, takes
        except (OSError, AttributeError):
            continue
        return found
    raise NoOpensslError(
        "TLS on the direct lane needs OpenSSL as a shared library (libssl.so.3), which this Python does not have; "
        "install it, or do without: lane_tls = none of the server, or direct = off of either side"
    )


def address_of(call: str) -> int:
    """Where the code of a call is."""
    return ctypes.cast(getattr(library(), call), ctypes.c_void_p).value or 0


def reason(ssl: int | None = None) -> str:
    """Why the last call failed in this thread, for people. ssl: of a handshake, whose certificate it may be."""
    calls = library()
    if ssl is not None and (verdict := calls.SSL_get_verify_result(ssl)):
        return f"the certificate is refused: {calls.X509_verify_cert_error_string(verdict).decode()}"
    said = calls.ERR_reason_error_string(calls.ERR_get_error())
    return "the other side closed the connection" if said is None else str(said.decode())


class Context:
    """What connections of one side have in common, TLS 1.3 only, without tickets to resume by. Thread-safe."""

    def __init__(self, pem: Pem, server: bool) -> None:
        """Raises PemError, NoOpensslError.

        pem: of a server its certificate, and the authorities of its clients' if they need one; of a client its
        authorities, and its certificate if it has one.
        """
        calls = library()
        self.server, self._free = server, calls.SSL_CTX_free
        self.pointer = calls.SSL_CTX_new(calls.TLS_server_method() if server else calls.TLS_client_method())
        if not self.pointer:
            raise NoOpensslError(f"OpenSSL makes no context: {reason()}")
        self._control(_SET_MIN_VERSION, _TLS_1_3)
        self._control(_SET_MODE, _PARTIAL_WRITE | _MOVING_BUFFER)
        self._control(_SET_READ_AHEAD, 1)
        self._control(_SET_SESSION_CACHE, 0)
        calls.SSL_CTX_set_options(self.pointer, _IGNORE_UNEXPECTED_EOF)
        calls.SSL_CTX_set_num_tickets(self.pointer, 0)
        if not server:
            calls.SSL_CTX_set_default_read_buffer_len(self.pointer, _AT_ONCE_BYTES)
        if pem.ca is not None:
            store = calls.SSL_CTX_get_cert_store(self.pointer)
            calls.X509_STORE_set_flags(store, _TRUSTED_FIRST | _PARTIAL_CHAIN)
            for one in _certificates(pem.ca):
                calls.X509_STORE_add_cert(store, one)
                calls.X509_free(one)
        if pem.ca is not None or not server:
            calls.SSL_CTX_set_verify(self.pointer, _VERIFY_PEER | _FAIL_WITHOUT_PEER, None)
        if pem.cert is not None and pem.key is not None:
            self._show(pem.cert, pem.key)

    def __del__(self) -> None:
        """Connections that are open keep what they need of it."""
        if getattr(self, "pointer", None):
            self._free(self.pointer)

    def _control(self, what: int, value: int, pointer: int | None = None) -> int:
        return int(library().SSL_CTX_ctrl(self.pointer, what, value, pointer))

    def _show(self, cert: bytes, key: bytes) -> None:
        calls = library()
        found = _certificates(cert)
        own, chain = (found[0] if found else None), found[1:]
        bio = calls.BIO_new_mem_buf(key, len(key))
        # With a password, as OpenSSL asks at the terminal for one that is not given.
        pair = calls.PEM_read_bio_PrivateKey(bio, None, None, b"")
        calls.BIO_free(bio)
        good = own and pair and calls.SSL_CTX_use_certificate(self.pointer, own) == 1
        good = good and calls.SSL_CTX_use_PrivateKey(self.pointer, pair) == 1
        for one in chain:
            good = good and self._control(_ADD_CHAIN, 1, one) == 1
        for one in found:
            calls.X509_free(one)
        calls.EVP_PKEY_free(pair)
        if not good:
            raise PemError(f"OpenSSL does not take a certificate and its key: {reason()}")


def new_ssl(context: Context, descriptor: int, host: str) -> int:
    """An SSL of that descriptor, before its handshake. A server's keeps records until FLUSH. Raises NoOpensslError.

    host: whose certificate a server must have, where the context is a client's.
    """
    calls = library()
    ssl = calls.SSL_new(context.pointer)
    if not ssl or calls.SSL_set_fd(ssl, descriptor) != 1:
        calls.SSL_free(ssl)
        raise NoOpensslError(f"OpenSSL makes no connection: {reason()}")
    if context.server:
        calls.SSL_set_accept_state(ssl)
        keeps, plain = calls.BIO_new(calls.BIO_f_buffer()), calls.SSL_get_rbio(ssl)
        if not keeps or calls.BIO_int_ctrl(keeps, _SET_BUFFER, _AT_ONCE_BYTES, _OF_WRITES) != 1:
            calls.BIO_free(keeps)
            calls.SSL_free(ssl)
            raise NoOpensslError(f"OpenSSL makes no connection: {reason()}")
        calls.BIO_up_ref(plain)
        calls.SSL_set0_wbio(ssl, calls.BIO_push(keeps, plain))
        return int(ssl)
    calls.SSL_set_connect_state(ssl)
    name = host.encode("idna" if not host.isascii() else "ascii")
    # An address is none that a server is told, nor a name.
    if calls.X509_VERIFY_PARAM_set1_ip_asc(calls.SSL_get0_param(ssl), name) != 1:
        calls.ERR_clear_error()
        calls.SSL_ctrl(ssl, _SET_SERVER_NAME, 0, ctypes.cast(_TEXT(name), ctypes.c_void_p))
        if not name or calls.SSL_set1_host(ssl, name) != 1:
            calls.SSL_free(ssl)
            raise NoOpensslError(f"{host!r} is no name that a certificate could have")
    return int(ssl)


def _certificates(pem: bytes) -> list[int]:
    """The X509 in it, each to be freed."""
    calls = library()
    bio, found = calls.BIO_new_mem_buf(pem, len(pem)), []
    while one := calls.PEM_read_bio_X509(bio, None, None, b""):
        found.append(int(one))
    calls.BIO_free(bio)
    calls.ERR_clear_error()  # the end of the text is one
    return found
