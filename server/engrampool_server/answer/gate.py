"""Which calls over gRPC come to their handlers: those of callers that are known, and may. Health is everybody's."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextvars import ContextVar
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health_pb2

from engrampool_proto import wire
from engrampool_server.access.access import Access
from engrampool_server.access.callers import ADMIN, METRICS, READ, Caller, bearer
from engrampool_server.answer.lookups import Lookups, RefusedError

_HEALTH = f"/{health_pb2.DESCRIPTOR.services_by_name['Health'].full_name}/"
# What callers who read rows need. Whatever is not here is an administrator's.
_READS = frozenset(f"/{wire.SERVICE}/{name}" for name in ("Describe", "Lookup", "LookupStream", "OpenDirect", "Attach"))
_STATS = f"/{wire.SERVICE}/Stats"
_REFLECTION = "/grpc.reflection."
_HEADER = "authorization"
# So many tokens are known by their header, without their digest.
_MOST_KNOWN = 1024

_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


def caller() -> Caller | None:
    """Who makes the call that is being handled; None where everybody may."""
    return _caller.get()


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """The first interceptor: what it refuses is read no further than its headers, but for certificates' sake."""

    def __init__(self, access: Access, lookups: Lookups) -> None:
        self._access, self._lookups = access, lookups
        # Good headers, for as long as the callers are these.
        self._known: dict[str | bytes, Caller] = {}
        self._known_of: object = None

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """The method's handler for a caller who may call it, else one that refuses."""
        method = handler_call_details.method
        if self._access.is_open or method.startswith(_HEALTH):
            return await continuation(handler_call_details)
        role = READ if method in _READS or method.startswith(_REFLECTION) else METRICS if method == _STATS else ADMIN
        try:
            header = _header(handler_call_details.invocation_metadata)
            if header is not None:
                _caller.set(_allowed(self._of_header(header), role, method))
            elif not self._by_certificate:
                text = "this server answers callers with a token only; give the client one (its setting token)"
                raise RefusedError(grpc.StatusCode.UNAUTHENTICATED, "no-credentials", text)
        except RefusedError as error:
            return self._refusing(error)
        handler = await continuation(handler_call_details)
        if header is None and handler is not None:
            return self._checking(handler, role, method)
        return handler

    @property
    def _by_certificate(self) -> bool:
        tls = self._access.tls
        return tls is not None and tls.value.ca is not None

    def _of_header(self, header: str | bytes) -> Caller:
        """Raises RefusedError."""
        assert self._access.callers is not None
        callers = self._access.callers.value
        if callers is not self._known_of or len(self._known) > _MOST_KNOWN:
            self._known, self._known_of = {}, callers
        found = self._known.get(header)
        if found is None:
            text = header if isinstance(header, str) else header.decode("latin-1")
            found = callers.of_token(bearer(text).encode())
            if found is None:
                text = "the token is not one that this server knows, or no more: it may have been revoked; get another"
                raise RefusedError(grpc.StatusCode.UNAUTHENTICATED, "bad-token", text)
            self._known[header] = found
        return found

    def _of_certificate(self, context: grpc.aio.ServicerContext) -> Caller:
        """Raises RefusedError."""
        assert self._access.callers is not None
        shown = context.auth_context()
        # Whoever signs certificates with alternative names looks at these, and may let anybody choose a common name.
        named = next((shown[kind] for kind in _NAMES if shown.get(kind)), ())
        names = [name.decode("utf-8", "replace") for name in named]
        found = self._access.callers.value.of_certificate(names)
        if found is None:
            text = (
                f"no caller has the client's certificate, of {', '.join(names)[:200] or 'no name'}, and it showed no "
                "token; the file of tokens has to name one of these, or the client needs a token"
            )
            raise RefusedError(grpc.StatusCode.UNAUTHENTICATED, "unknown-certificate", text)
        return found

    def _refusing(self, error: RefusedError) -> grpc.RpcMethodHandler:
        async def refuse(requests: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
            await self._refuse(context, error)
            yield b""

        return grpc.stream_stream_rpc_method_handler(refuse)

    async def _refuse(self, context: grpc.aio.ServicerContext, error: RefusedError) -> NoReturn:
        code, reason = self._lookups.refused(error)
        await context.abort(code, str(error), ((wire.REASON_KEY, reason),))
        raise AssertionError("abort always raises")

    def _checking(self, handler: grpc.RpcMethodHandler, role: str, method: str) -> grpc.RpcMethodHandler:
        """The handler behind a look at the client's certificate, which is not seen any sooner."""

        async def check(context: grpc.aio.ServicerContext) -> None:
            try:
                _caller.set(_allowed(self._of_certificate(context), role, method))
            except RefusedError as error:
                await self._refuse(context, error)

        def unary(behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
            async def checked(request: Any, context: grpc.aio.ServicerContext) -> Any:
                await check(context)
                return await behaviour(request, context)

            return checked

        def streaming(behaviour: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
            async def checked(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
                await check(context)
                async for response in behaviour(request, context):
                    yield response

            return checked

        coding = handler.request_deserializer, handler.response_serializer
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(streaming(handler.stream_stream), *coding)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(streaming(handler.unary_stream), *coding)
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(unary(handler.stream_unary), *coding)
        return grpc.unary_unary_rpc_method_handler(unary(handler.unary_unary), *coding)


# Of a certificate: the second only where it has none of the first.
_NAMES = ("x509_subject_alternative_name", "x509_common_name")


def _header(metadata: Iterable[tuple[str, str | bytes]]) -> str | bytes | None:
    return next((value for key, value in metadata if key == _HEADER), None)


def _allowed(who: Caller, role: str, method: str) -> Caller:
    """The caller. Raises RefusedError if it has not the role."""
    if not (role in who.roles or (role == METRICS and ADMIN in who.roles)):
        text = f"{who.name} may not call {method.rpartition('/')[2]}: it needs the role {role}, and has"
        text = f"{text} {', '.join(sorted(who.roles))}; the file of tokens gives roles"
        raise RefusedError(grpc.StatusCode.PERMISSION_DENIED, "not-allowed", text)
    return who
