"""What a client is made with, beside whom it asks: every setting with its unit, its range and its meaning."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from numbers import Integral
from operator import index
from pathlib import Path
from typing import Any, Literal, Self, TypedDict

from engrampool_proto.tiers.tier import Tier

Hashing = Literal["local", "server"]
OnFailure = Literal["raise", "mask"]
Attach = Literal["auto", "off"]
Direct = Literal["auto", "off"]
Compiled = Literal["auto", "off", "on"]
Connections = int | Literal["auto"]

# Before the names of settings, in capitals, where a client's come from the environment.
ENVIRONMENT_PREFIX = "ENGRAMPOOL_CLIENT_"

# Settings of which none says anything by itself.
_TOGETHER = ("tls_cert", "tls_key", "tls_name")
# What a header of HTTP takes.
TOKEN = re.compile(r"[!-~]+")

# No wait is longer, whatever a caller asks for: the system counts some of them in milliseconds of 31 bits.
LONGEST_S = 1e6


class ClientSettings(TypedDict, total=False):
    """The fields of `ClientConfig`, as keywords."""

    config: str | Path | None
    tokenizer: str | Path | None
    hashing: Hashing
    heads: tuple[int, int] | None
    dedupe: bool
    cache_bytes: int
    warm: str | Path | None
    hint_bytes: int
    timeout_s: float
    on_failure: OnFailure
    breaker_failures: int
    retry_s: float
    slow_lookup_s: float
    trace: bool
    connect_timeout_s: float
    max_steps: int
    max_pending_bytes: int
    connections: Connections
    attach: Attach
    emulate: str | None
    direct: Direct
    spin_s: float
    compiled: Compiled
    keep_memory: bool
    record: str | Path | None
    tls_ca: str | Path | None
    tls_cert: str | Path | None
    tls_key: str | Path | None
    tls_name: str | None
    token: str | None


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """The settings of one client. Raises ValueError for one that is out of its range, TypeError for no number."""

    # --- this side's files

    config: str | Path | None = None
    """This side's config.json: if given, the served tables must fit it."""

    tokenizer: str | Path | None = None
    """This side's tokenizer.json, likewise."""

    # --- what is asked for

    hashing: Hashing = "local"
    """"local" sends row ids, "server" sends tokens, of which nothing is deduplicated or cached."""

    heads: tuple[int, int] | None = None
    """(start, stop): only these columns of every table, as a tensor-parallel rank needs; rows then have stop - start
    heads. None for all."""

    dedupe: bool = True
    """Ask for the rows of an n-gram once a lookup, however many tokens have it. With a cache that is always so."""

    cache_bytes: int = 0
    """Keep rows of so many bytes, index included, for later lookups; 0 keeps none. A version that is followed begins
    with an empty cache of its own, and for a moment there are two."""

    warm: str | Path | None = None
    """A file that `save_cache` wrote, mapped read-only and shared by all processes of a host that name it; of use until
    another version is followed."""

    hint_bytes: int = 8 << 20
    """Rows that hints may ask for at once, in bytes, 0 or more; a hint beyond that is dropped."""

    # --- when

    timeout_s: float = 10.0
    """A step's deadline in seconds, above 0, from `prefetch` on, unless it is given another; 1e6 s, some 11 days, at
    most."""

    on_failure: OnFailure = "raise"
    """"raise" what a lookup failed with where its rows are wanted; or "mask": give zeros for tokens whose rows are
    missing, and say by `Step.valid` which have theirs."""

    breaker_failures: int = 3
    """After so many lookups in a row that found the server unreachable or silent, lookups fail at once until a probe in
    the background is answered; 0 never."""

    retry_s: float = 1.0
    """How long, in seconds from the moment a connection broke, lookups go on asking. 0 never asks twice."""

    slow_lookup_s: float = 1.0
    """An answer of a server that takes longer, in seconds, is counted as slow, and told in the log with its number and
    the hop that took most of it, one a second at most; so is a wait in the client. 0 for none."""

    trace: bool = False
    """Make a span of OpenTelemetry of each step, with its requests and the servers' own times, by the process's tracer
    provider; needs the extra `otel`. docs/TRACING.md has what is in them."""

    connect_timeout_s: float = 10.0
    """How long servers are waited for, in seconds above 0, those that still load included. A registry, and an active
    version there, is waited for as long before; a silent one adds up to 2 s for each of its endpoints."""

    max_steps: int = 4
    """Prefetches worked on at once, 1 or more; further ones wait for a place, not their callers."""

    max_pending_bytes: int = 2 << 30
    """Rows of prefetches that have not ended, in bytes, 1 or more; `prefetch` raises OverloadedError beyond."""

    # --- how

    connections: Connections = "auto"
    """To the server, 1 or more; large lookups by row ids are split over them. "auto" takes as many as half of the cores
    that this process may use, 4 at most, over the direct lane, and one over gRPC."""

    attach: Attach = "auto"
    """"auto" reads the server's memory where it is this host's and the server allows it; "off" never."""

    emulate: str | None = None
    """A tier, by its name or a JSON file: rows are read from attached memory, and come no sooner than from the tier.
    Lookups fail where memory is not attached: another lane would tell nothing of it."""

    direct: Direct = "auto"
    """"auto" looks up over plain sockets where the server has a direct lane, and over gRPC where it has none or its
    port cannot be reached; "off" always over gRPC."""

    spin_s: float = 300e-6
    """Over the direct lane, how long, in seconds, `lookup` and `lookup_rows` look for the answer without sleeping,
    where answers come as soon as that: what waking up takes is saved, and a processor is busy meanwhile. 0 never."""

    compiled: Compiled = "auto"
    """"auto" hashes, deduplicates and looks into the cache by compiled kernels where numba is installed (extra `fast`),
    and by numpy where it is not, compiles nothing (NUMBA_DISABLE_JIT), or cannot keep what it compiled; "off" always by
    numpy; "on" raises ValueError where it cannot be by kernels. Either gives the same rows."""

    keep_memory: bool = False
    """Have the C library keep freed memory for the next answer. It is a setting of the whole process, which stays as
    large as it was at its peak, and whose threads all allocate from one arena from then on, for good: for large answers
    over gRPC, in a process whose other threads allocate little (see `engrampool_proto.malloc`)."""

    record: str | Path | None = None
    """A file to write the row ids of every lookup to, for `engrampool doctor`; made anew, mode 0600. N-grams can be
    worked out from them: treat it as you would the text."""

    # --- whom it trusts, and who it is

    tls_ca: str | Path | None = None
    """A file of authorities as PEM: servers are reached over TLS, and need a certificate of theirs. None: no TLS."""

    tls_cert: str | Path | None = None
    """This client's certificate as PEM, for servers that ask for one; with `tls_ca` and `tls_key`."""

    tls_key: str | Path | None = None
    """Its key as PEM, not encrypted. These three files are read again when they change."""

    tls_name: str | None = None
    """The name that servers' certificates have, where that is not the host that they are reached by, as of servers by
    address. By default that host; of one dns:///NAME:PORT, NAME."""

    token: str | None = field(default=None, repr=False)
    """What says to servers who the client is: the token, or file:PATH for one in a file, read again when it changes."""

    def __post_init__(self) -> None:
        check_credentials(self.tls_ca, self.tls_cert, self.tls_key, self.tls_name, self.token)
        plain = self.hashing == "server"
        connections = {} if self.connections == "auto" else {"connections": self.connections}
        check_settings(
            one_of={
                "hashing": (self.hashing, ("local", "server")),
                "on_failure": (self.on_failure, ("raise", "mask")),
                "attach": (self.attach, ("auto", "off")),
                "direct": (self.direct, ("auto", "off")),
                "compiled": (self.compiled, ("auto", "off", "on")),
            },
            whole={
                "max_steps": self.max_steps,
                "cache_bytes": self.cache_bytes,
                "breaker_failures": self.breaker_failures,
                **connections,
            },
            positive={
                "timeout_s": self.timeout_s,
                "connect_timeout_s": self.connect_timeout_s,
                "max_steps": self.max_steps,
                "max_pending_bytes": self.max_pending_bytes,
                **connections,
            },
            not_negative={
                "retry_s": self.retry_s,
                "slow_lookup_s": self.slow_lookup_s,
                "spin_s": self.spin_s,
                "cache_bytes": self.cache_bytes,
                "hint_bytes": self.hint_bytes,
                "breaker_failures": self.breaker_failures,
            },
            local_only={"heads": self.heads, "cache_bytes": self.cache_bytes, "warm": self.warm} if plain else {},
        )
        object.__setattr__(self, "heads", columns(self.heads))
        if self.emulate is not None:
            Tier.of(self.emulate)
            if self.attach == "off" or plain:
                raise ValueError("emulate is of attached memory: it needs attach='auto' and hashing='local'")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """One of keywords. Raises TypeError naming those that are no settings."""
        unknown = sorted(settings.keys() - ClientSettings.__annotations__.keys())
        if unknown:
            raise TypeError(f"a client has no setting {', '.join(unknown)}; see ClientConfig for those that there are")
        return cls(**settings)


def from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    """What `Client` is to be made with, by keyword: its target, model, version and settings, as variables have them.

    ENGRAMPOOL_CLIENT_TARGET is needed, and may be several, separated by spaces; what is empty counts as not set. Raises
    ValueError that names the variable.
    """
    kinds = {setting.name: setting.type for setting in fields(ClientConfig)}
    names = ("target", "model", "version", *kinds)
    found: dict[str, Any] = {}
    for variable, text in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or not text:
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if name not in names or variable != ENVIRONMENT_PREFIX + name.upper():
            close = get_close_matches(name, names, 1)
            meant = f"; {ENVIRONMENT_PREFIX}{close[0].upper()} was meant, perhaps" if close else ""
            raise ValueError(f"{variable}: a client has no such setting{meant}")
        if name not in kinds:
            found[name] = text.split() if name == "target" else text
            continue
        try:
            found[name] = _of_text(kinds[name], text)
            if name not in _TOGETHER:
                ClientConfig.of({name: found[name]})
        except ValueError as error:
            shown = "..." if name == "token" else repr(text)
            raise ValueError(f"{variable}={shown} is not allowed: {error}") from error
    if not found.get("target"):
        raise ValueError(f"{ENVIRONMENT_PREFIX}TARGET must name the servers")
    return found


def _of_text(kind: Any, text: str) -> Any:
    """A setting's value, of the type that its field has. Raises ValueError."""
    if kind is bool:
        flags = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in flags:
            raise ValueError("it must be true or false")
        return flags[text.lower()]
    if kind in (int, float):
        return kind(text)
    if kind == Connections:
        return text if text == "auto" else int(text)
    return tuple(map(int, text.split(","))) if kind == ClientConfig.__annotations__["heads"] else text


def check_credentials(ca: Any, cert: Any, key: Any, name: Any, token: Any) -> None:
    """Raise ValueError for credentials that do not go together, or that cannot be; none of them is read."""
    if (cert is None) != (key is None):
        raise ValueError("tls_cert and tls_key go together: give both, or neither")
    alone = [one for one, value in (("tls_cert", cert), ("tls_name", name)) if value is not None and ca is None]
    if alone:
        raise ValueError(f"{alone[0]} needs tls_ca, without which there is no TLS")
    if token is not None and not (isinstance(token, str) and (token.startswith("file:") or TOKEN.fullmatch(token))):
        raise ValueError("token must be printable ASCII without spaces, or file:PATH of a file that holds it")


def columns(heads: Any, most: int | None = None) -> tuple[int, int] | None:
    """Heads as (start, stop), None for all. Raises ValueError unless they are two integers, start < stop <= most."""
    if heads is None:
        return None
    try:
        start, stop = map(index, heads)
    except (TypeError, ValueError):
        start = stop = -1
    if not 0 <= start < stop or (most is not None and stop > most):
        within = "" if most is None else f" within 0 .. {most}"
        raise ValueError(f"heads must be two integers (start, stop){within}, not empty; it is {heads!r}")
    return start, stop


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


def positive_s(name: str, seconds: Any) -> float:
    """As `bounded_s`. Raises ValueError for what is no time to wait."""
    check_positive(name, seconds)
    return bounded_s(seconds)
