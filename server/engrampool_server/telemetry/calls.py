"""Calls over gRPC, counted and timed. Apart from metrics.py: a loader, which answers none, starts without gRPC."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from engrampool_server.telemetry.counts import Count, Times
from engrampool_server.telemetry.metrics import Metrics


class CallMetrics(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Counts and times every call of every service under the names that gRPC dashboards know.

    open: calls that a handler began and whose end is not on its way to the caller yet.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.open = 0
        # gRPC asks at every call, and finding a metric by its labels is dear beside a small lookup.
        self._wrapped: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Wrap the method's handler, once; an unknown method has none."""
        name = handler_call_details.method
        if name not in self._wrapped:
            handler = await continuation(handler_call_details)
            if handler is None:
                return handler  # and is not remembered: whoever calls may invent names without end
            self._wrapped[name] = self._wrap(handler, name)
        return self._wrapped[name]

    def _wrap(self, handler: grpc.RpcMethodHandler, name: str) -> grpc.RpcMethodHandler:
        service, _, method = name.lstrip("/").partition("/")
        streams_in, streams_out = handler.request_streaming, handler.response_streaming
        kind = {
            (False, False): "unary",
            (False, True): "server_stream",
            (True, False): "client_stream",
            (True, True): "bidi_stream",
        }[streams_in, streams_out]
        call = (kind, service, method)
        if streams_in and streams_out:
            return grpc.stream_stream_rpc_method_handler(
                self._streaming(handler.stream_stream, call, True),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if streams_out:
            return grpc.unary_stream_rpc_method_handler(
                self._streaming(handler.unary_stream, call, False),
                handler.request_deserializer,
                handler.response_serializer,
            )
        if streams_in:
            return handler
        return grpc.unary_unary_rpc_method_handler(
            self._unary(handler.unary_unary, call), handler.request_deserializer, handler.response_serializer
        )

    def _unary(self, behaviour: Callable[..., Awaitable[Any]], call: tuple[str, ...]) -> Callable[..., Awaitable[Any]]:
        started, received, sent, handling = self._children(call)

        def ended(seconds: float, code: grpc.StatusCode) -> None:
            self.open -= 1
            handling.observe(seconds)
            if code is grpc.StatusCode.OK:
                sent.inc()
            self._metrics.handled.labels(*call, code.name).inc()

        async def wrapped(request: Any, context: grpc.aio.ServicerContext) -> Any:
            begin = time.perf_counter()
            self.open += 1
            started.inc()
            received.inc()
            code = grpc.StatusCode.OK
            try:
                return await behaviour(request, context)
            except BaseException as error:
                code = _code_of(context, error)
                raise
            finally:
                # Once the answer is on its way: the caller need not wait for our book-keeping.
                seconds = time.perf_counter() - begin
                context.add_done_callback(lambda _: ended(seconds, code))

        return wrapped

    def _streaming(
        self, behaviour: Callable[..., AsyncIterator[Any]], call: tuple[str, ...], streams_in: bool
    ) -> Callable[..., AsyncIterator[Any]]:
        started, received, sent, handling = self._children(call)

        async def counted(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
            async for request in requests:
                received.inc()
                yield request

        def closed(_: object) -> None:
            self.open -= 1

        async def wrapped(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            begin = time.perf_counter()
            self.open += 1
            context.add_done_callback(closed)
            started.inc()
            if streams_in:
                request = counted(request)
            else:
                received.inc()
            code = grpc.StatusCode.OK
            try:
                async for response in behaviour(request, context):
                    sent.inc()
                    yield response
            except BaseException as error:
                code = _code_of(context, error)
                raise
            finally:
                handling.observe(time.perf_counter() - begin)
                self._metrics.handled.labels(*call, code.name).inc()

        return wrapped

    def _children(self, call: tuple[str, ...]) -> tuple[Count, Count, Count, Times]:
        m = self._metrics
        return m.started.labels(*call), m.received.labels(*call), m.sent.labels(*call), m.handling.labels(*call)


def _code_of(context: grpc.aio.ServicerContext, error: BaseException) -> grpc.StatusCode:
    """The code a failed call ends with: CANCELLED, the one set, or UNKNOWN, gRPC's answer to a stray exception."""
    # A stream whose caller went away while a message was being sent is closed, not cancelled.
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return grpc.StatusCode.CANCELLED
    code = context.code()
    if isinstance(code, int):
        code = next((c for c in grpc.StatusCode if c.value[0] == code), grpc.StatusCode.UNKNOWN)
    return grpc.StatusCode.UNKNOWN if code in (None, grpc.StatusCode.OK) else code
