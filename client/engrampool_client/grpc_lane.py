"""Lookups over gRPC, for the blocking client."""

import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import grpc
import grpc.experimental

from engrampool_client.delivery import Delivery
from engrampool_client.errors import DeadlineError, ProtocolError, UnavailableError, from_rpc
from engrampool_client.exchange import Exchange
from engrampool_client.served import DESCRIBE
from engrampool_client.settings import CHANNEL_OPTIONS, METHOD, RETRY_LOADING_S, STREAM_ABOVE_BYTES
from engrampool_proto.v1 import pool_pb2

# The thread that reads a stream also drives its connection: without this gRPC hands every message from one to another.
_OPTIONS = (*CHANNEL_OPTIONS, (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1))

_T = TypeVar("_T")
# What to call, where what it gives and raises belongs, and what is released then; None to end.
_Calls = queue.SimpleQueue[tuple[Callable[[], Any], list[Any], threading.Lock] | None]


class GrpcLane:
    """One connection to a server. Thread-safe."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._channel = grpc.insecure_channel(target, _OPTIONS)
        self._helper = _Helper()
        self._lookup = self._channel.unary_unary(METHOD + "Lookup")
        self._lookup_stream = self._channel.unary_stream(METHOD + "LookupStream")

    def describe(self, timeout_s: float, request: bytes = DESCRIBE) -> bytes:
        """The bytes of a DescribeResponse, waiting for a server that does not listen yet or is still loading.

        request: the bytes of a DescribeRequest, by default for all that there is.
        Raises UnavailableError after `timeout_s`, and other PoolErrors.
        """
        describe = self._channel.unary_unary(METHOD + "Describe")
        deadline = time.monotonic() + timeout_s
        pause = threading.Event()
        while True:
            remaining = deadline - time.monotonic()
            try:
                # wait_for_ready also waits for a server that is not listening yet.
                call = partial(describe, request, timeout=max(0.0, remaining), wait_for_ready=True)
                answer: bytes = self._off_main(call)
                return answer
            except grpc.RpcError as rpc_error:
                error = from_rpc(rpc_error, self.target)
                loading = isinstance(error, UnavailableError) and error.reason == "loading"
                if not loading and not isinstance(error, DeadlineError):
                    raise error from rpc_error
                if deadline - time.monotonic() <= RETRY_LOADING_S:
                    text = f"no server at {self.target} was ready within {timeout_s:.3g} s: {error}"
                    raise UnavailableError(text, error.reason) from rpc_error
            pause.wait(RETRY_LOADING_S)

    def open_direct(self, timeout_s: float) -> pool_pb2.OpenDirectResponse:
        """Ask for a way into the direct lane. Raises PoolError."""
        call = self._channel.unary_unary(METHOD + "OpenDirect")
        try:
            request = pool_pb2.OpenDirectRequest().SerializeToString()
            answer: bytes = self._off_main(partial(call, request, timeout=timeout_s))
        except grpc.RpcError as error:
            raise from_rpc(error, self.target) from error
        try:
            return pool_pb2.OpenDirectResponse.FromString(answer)
        except Exception as error:  # the runtime's DecodeError has no stable home across protobuf versions
            raise ProtocolError(f"OpenDirect was answered with something else: {error}") from error

    def attach(self, model: str, version: str, timeout_s: float) -> pool_pb2.AttachResponse:
        """Ask where the tables of `model` can be mapped. Raises PoolError."""
        call = self._channel.unary_unary(METHOD + "Attach")
        request = pool_pb2.AttachRequest(model=model, version=version)
        try:
            answer: bytes = self._off_main(partial(call, request.SerializeToString(), timeout=timeout_s))
        except grpc.RpcError as error:
            raise from_rpc(error, self.target) from error
        try:
            return pool_pb2.AttachResponse.FromString(answer)
        except Exception as error:  # the runtime's DecodeError has no stable home across protobuf versions
            raise ProtocolError(f"Attach was answered with something else: {error}") from error

    def fetch(self, exchange: Exchange, timeout_s: float, delivery: Delivery) -> None:
        """Ask, and take the whole answer in; `delivery` is told of layers as they complete.

        Raises what the call fails with. Whatever it is once the lookup was given up, the delivery knows better.
        """
        self._off_main(partial(self._fetch, exchange, timeout_s, delivery))

    def _fetch(self, exchange: Exchange, timeout_s: float, delivery: Delivery) -> None:
        try:
            if exchange.answer_bytes <= STREAM_ABOVE_BYTES:
                # In this thread alone: half the time of a call that can be cancelled. It is short, and a step that is
                # given up meanwhile does not wait for it.
                _take(exchange, self._lookup(exchange.request, timeout=timeout_s), delivery)
            else:
                stream = self._lookup_stream(exchange.request, timeout=timeout_s)
                delivery.on_cancel(stream.cancel)
                for message in stream:
                    _take(exchange, message, delivery)
        except grpc.RpcError as error:
            raise from_rpc(error, self.target) from error
        exchange.finish()

    def _off_main(self, call: Callable[[], _T]) -> _T:
        """Make a call, in a thread in which Ctrl-C cannot come."""
        if threading.current_thread() is not threading.main_thread():
            return call()
        return self._helper.make(call)

    def close(self) -> None:
        """End the connection, and every call on it."""
        self._channel.close()
        self._helper.close()


class _Helper:
    """A thread that makes the main thread's calls.

    Ctrl-C is raised in the main thread, between any two lines of Python, and gRPC's are no exception: it may leave a
    lock of the channel's taken, and every other call on that channel, and its end, would wait for ever.
    """

    def __init__(self) -> None:
        self._calls: _Calls = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def make(self, call: Callable[[], _T]) -> _T:
        """Have it made, and wait for what it gives or raises."""
        if self._thread is None:
            self._thread = threading.Thread(target=_make_all, args=(self._calls,), name="engrampool-call", daemon=True)
            self._thread.start()
        made, outcome = threading.Lock(), list[Any]()
        made.acquire()
        self._calls.put((call, outcome, made))
        try:
            made.acquire()  # a lock of the system's own: nothing is left half way in here
        except BaseException:
            self.close()  # it is busy with what nobody waits for; the next call has another
            raise
        given, error = outcome
        if error is not None:
            raise error
        return cast(_T, given)

    def close(self) -> None:
        """Have the thread end after the call that it is making."""
        self._calls.put(None)
        self._calls, self._thread = queue.SimpleQueue(), None


def _make_all(calls: "_Calls") -> None:
    while (one := calls.get()) is not None:
        call, outcome, made = one
        try:
            outcome += call(), None
        except BaseException as error:
            outcome += None, error
        made.release()
        del one, call, outcome, made  # they hold on to a whole lookup


def _take(exchange: Exchange, message: bytes, delivery: Delivery) -> None:
    if exchange.owned:
        complete = exchange.add(message)
    else:
        with delivery.writing():
            complete = exchange.add(message)
    delivery.arrived(exchange.whole(complete))
