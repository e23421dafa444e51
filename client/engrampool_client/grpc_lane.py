"""Lookups over gRPC, for the blocking client."""

import threading
import time

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


class GrpcLane:
    """One connection to a server. Thread-safe."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._given_up: list[grpc.Channel] = []
        self._connect()

    def _connect(self) -> None:
        self._channel = grpc.insecure_channel(self.target, _OPTIONS)
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
                answer: bytes = describe(request, timeout=max(0.0, remaining), wait_for_ready=True)
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
            answer: bytes = call(pool_pb2.OpenDirectRequest().SerializeToString(), timeout=timeout_s)
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
            answer: bytes = call(request.SerializeToString(), timeout=timeout_s)
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
        except KeyboardInterrupt:
            # It may have come while gRPC held a lock of the channel's, and then every other call on it, and its end,
            # waits for ever: it is not used any more, nor closed.
            self._given_up.append(self._channel)
            self._connect()
            raise
        exchange.finish()

    def close(self) -> None:
        """End the connection, and every call on it."""
        self._channel.close()


def _take(exchange: Exchange, message: bytes, delivery: Delivery) -> None:
    if exchange.owned:
        complete = exchange.add(message)
    else:
        with delivery.writing():
            complete = exchange.add(message)
    delivery.arrived(exchange.whole(complete))
