"""What both clients share of how they connect and call."""

import time

from engrampool_client.errors import UnavailableError
from engrampool_proto.wire import SERVICE

METHOD = f"/{SERVICE}/"
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Channels of equal options would share one connection, and several connections are asked for on purpose.
    ("grpc.use_local_subchannel_pool", 1),
    # A worker that restarts is back in less than gRPC's own second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5000),
)
# Answers above this size come as a stream: it is faster from here on (bench/transport.py), and the first layer's rows
# do not wait for the last layer's.
STREAM_ABOVE_BYTES = 2 << 20
# Answers above this size are split where there are several connections.
SPLIT_ABOVE_BYTES = 4 << 20
# How soon to ask again a server that answers "loading".
RETRY_LOADING_S = 0.2
# Pauses between the tries of a lookup whose connection broke.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.2


def check_settings(
    hashing: str, timeout_s: float, connect_timeout_s: float, max_steps: int, retry_s: float, connections: int = 1
) -> None:
    """Raise ValueError naming the setting that is out of its range."""
    if hashing not in ("local", "server"):
        raise ValueError(f"hashing must be 'local' or 'server', not {hashing!r}")
    if timeout_s <= 0 or connect_timeout_s <= 0:
        raise ValueError(f"timeouts must be positive; they are {timeout_s} and {connect_timeout_s} s")
    if max_steps < 1 or connections < 1:
        raise ValueError(f"max_steps and connections must be at least 1; they are {max_steps} and {connections}")
    if retry_s < 0:
        raise ValueError(f"retry_s must be 0 or more; it is {retry_s}")


class Retries:
    """When to ask again after the connection broke: for `retry_s` from the first failure on, until a lookup succeeds.

    So a restarted worker costs a lookup a moment, and a server that stays away costs the later lookups nothing.
    """

    def __init__(self, retry_s: float) -> None:
        self._retry_s = retry_s
        self._failing_since: float | None = None

    def succeeded(self) -> None:
        """Note that a lookup was answered."""
        self._failing_since = None

    def pause_s(self, error: Exception, attempt: int) -> float | None:
        """Seconds to wait before trying again after the failure number `attempt` (from 0 on), None not to."""
        # A server that answered, if only "loading", is not a broken connection.
        if not isinstance(error, UnavailableError) or error.reason is not None:
            return None
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0**attempt)
        return pause_s if now + pause_s - self._failing_since < self._retry_s else None
