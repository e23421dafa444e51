"""What both clients share of how they connect and call."""

from engrampool_proto.wire import SERVICE

METHOD = f"/{SERVICE}/"
CHANNEL_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
# Answers above this size come as a stream, so that the first layer's rows do not wait for the last layer's.
STREAM_ABOVE_BYTES = 1 << 20
# How soon to ask again a server that answers "loading".
RETRY_LOADING_S = 0.2


def check_settings(hashing: str, timeout_s: float, connect_timeout_s: float, max_steps: int) -> None:
    """Raise ValueError naming the setting that is out of its range."""
    if hashing not in ("local", "server"):
        raise ValueError(f"hashing must be 'local' or 'server', not {hashing!r}")
    if timeout_s <= 0 or connect_timeout_s <= 0:
        raise ValueError(f"timeouts must be positive; they are {timeout_s} and {connect_timeout_s} s")
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1; it is {max_steps}")
