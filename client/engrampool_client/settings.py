"""What both clients share of how they connect and call."""

from collections.abc import Mapping
from numbers import Integral
from typing import Any

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
    # How long a try to connect may take, by its old name.
    ("grpc.min_reconnect_backoff_ms", 5000),
    # A connection may be forgotten on the way without a word. While a call is under way, it is asked for a sign of life
    # so often, and given up without one; servers of ours take as many pings as anybody sends. The last of these is the
    # time that counts: gRPC 1.85 never looks at keepalive_timeout_ms. Rows on their way are ahead of the answer to a
    # ping, so it is long enough for the 4 MB that a system buffers on a link of 10 Mbit/s.
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_timeout_ms", 4000),
    ("grpc.http2.ping_timeout_ms", 4000),
    # A proxy that the environment names is for the way out, and no way to a pool.
    ("grpc.enable_http_proxy", 0),
)
# Answers above this size come as a stream: it is faster from here on (bench/transport.py), and the first layer's rows
# do not wait for the last layer's.
STREAM_ABOVE_BYTES = 2 << 20
# Answers above this size are split where there are several connections.
SPLIT_ABOVE_BYTES = 4 << 20
# No wait is longer, whatever a caller asks for: the system counts some of them in milliseconds of 31 bits.
LONGEST_S = 1e6
# How soon to ask again a server that answers "loading".
RETRY_LOADING_S = 0.2


def check_settings(
    one_of: Mapping[str, tuple[str, tuple[str, ...]]],
    whole: Mapping[str, int],
    positive: Mapping[str, float],
    not_negative: Mapping[str, float],
    local_only: Mapping[str, object],
) -> None:
    """Raise ValueError naming the setting that is out of its range, TypeError one that is no number.

    whole: those that count something. local_only: settings that cannot do anything where the server hashes.
    """
    for name, (value, allowed) in one_of.items():
        if value not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, not {value!r}")
    for name, count in whole.items():
        if not isinstance(count, Integral):
            raise ValueError(f"{name} must be an integer; it is {count!r}")
    for name, number in positive.items():
        check_positive(name, number)
    for name, number in not_negative.items():
        check_number(name, number)
        if not number >= 0:
            raise ValueError(f"{name} must be 0 or more; it is {number}")
    for name, given in local_only.items():
        if given:
            raise ValueError(f"{name} must be left out where the server hashes (hashing='server')")


def check_number(name: str, number: Any) -> None:
    """Raise TypeError for what cannot be compared with a number: text, an array, None."""
    try:
        bool(number > 0)
    except (TypeError, ValueError, ArithmeticError) as error:  # of an array, and of a decimal that is none
        raise TypeError(f"{name} must be a number; it is {number!r}") from error


def check_positive(name: str, number: Any) -> None:
    """Raise TypeError for what is no number, ValueError for one that is not above 0."""
    check_number(name, number)
    if not number > 0:
        raise ValueError(f"{name} must be positive; it is {number}")


def wait_limit_s(timeout_s: Any) -> float | None:
    """How long a caller waits, as a float that clocks take; None for no limit. Raises TypeError, ValueError."""
    if timeout_s is None:
        return None
    check_number("timeout_s", timeout_s)
    if timeout_s != timeout_s:  # of any kind of number
        raise ValueError("timeout_s must be a number of seconds; it is nan")
    return bounded_s(timeout_s)


def bounded_s(seconds: Any) -> float:
    """A number of any kind as a float that clocks take, within LONGEST_S."""
    try:
        return max(-LONGEST_S, min(float(seconds), LONGEST_S))
    except OverflowError:  # an integer that no float holds
        return LONGEST_S if seconds > 0 else -LONGEST_S
