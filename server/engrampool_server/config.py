"""The server's settings, and where each came from: default < TOML file < environment < command-line flags."""

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

from engrampool_proto.errors import EngrampoolError
from engrampool_proto.sharding import ShardBy, is_shard_name
from engrampool_server.files.sources import Location, redact, split_locations
from engrampool_server.machine import usable_cores
from engrampool_server.setting_kinds import (
    GIB,
    KIB,
    MIB,
    TIB,
    Advertise,
    Boolean,
    Choice,
    ChoiceOrFile,
    Direct,
    Directories,
    Emulate,
    FileOrOff,
    Integer,
    Kind,
    Listen,
    Numa,
    RegistryOrOff,
    Seconds,
    Shard,
    Size,
    format_size,
    split_address,
)

__all__ = ["ConfigError", "ResolvedConfig", "ServerConfig", "load_config", "render", "split_address"]

ENVIRONMENT_PREFIX = "ENGRAMPOOL_"
# A client's settings, of which the server's environment may hold some.
_CLIENTS_PREFIX = "ENGRAMPOOL_CLIENT_"

LogLevel = Literal["debug", "info", "warning", "error"]
EventLoop = Literal["uvloop", "asyncio"]
Attach = Literal["off", "user", "group", "all"]
LaneTls = Literal["none", "off", "on"]

# Who listens on these answers on every address of the machine, and nobody can be told them.
_WILDCARDS = ("0.0.0.0", "[::]")  # noqa: S104

# Kubernetes gives every container variables for each Service of its namespace. Those of a Service called `engrampool`
# or `engrampool-...` have our prefix, and nobody set them, so they must not stop the server as unknown settings.
# Values are matched too, so that ENGRAMPOOL_LISTEN_PORT=50051 is still told to whoever meant ENGRAMPOOL_LISTEN.
_SERVICE_LINK = re.compile(
    r"""ENGRAMPOOL(_\w+)?_(
        SERVICE_HOST=.*
        | SERVICE_PORT(_\w+)?=[0-9]+
        | PORT(_[0-9]+_(TCP|UDP|SCTP))?=(tcp|udp|sctp)://.*
        | PORT_[0-9]+_(TCP|UDP|SCTP)_(PROTO|PORT|ADDR)=.*
    )""",
    re.VERBOSE,
)


class ConfigError(EngrampoolError, ValueError):
    """A setting is unknown, out of range, or contradicts another. The operator must change what the text names."""


def _about(kind: Kind, help_text: str, flag: str | None = None) -> dict[str, Any]:
    return {"kind": kind, "unit": kind.unit, "allowed": kind.allowed, "help": help_text, "flag": flag}


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How one server runs. Every field's metadata holds its `unit`, `allowed` range and `help`.

    Values may be given as a file or the environment gives them ("2GiB", "[::]:50051"); they are kept parsed.
    Raises ConfigError for a value out of its range or settings that contradict each other.
    """

    models: tuple[Location, ...] = field(
        default=(),
        metadata=_about(
            Directories(),
            "Directory or URL of a packed model, or directory of a checkpoint; repeat. None is needed with a registry.",
            flag="--model",
        ),
    )
    listen: str = field(
        default="127.0.0.1:50051",
        metadata=_about(
            Listen(may_be_unix=True),
            "Where lookups are answered; port 0 is any free one, a Unix socket is for clients on this machine.",
        ),
    )
    metrics: str = field(
        default="127.0.0.1:9464",
        metadata=_about(Listen(may_be_off=True), "Where Prometheus scrapes, over HTTP; port 0 is any free one."),
    )
    direct: str = field(
        default="auto",
        metadata=_about(
            Direct(),
            "Where the direct lane listens: lookups over plain sockets, for clients that gRPC let in. auto is any free"
            " port of the host of `listen`, or a Unix socket beside that of `listen`.",
        ),
    )
    direct_spin_s: float = field(
        default=0.0,
        metadata=_about(
            Seconds(0, 0.1),
            "How long, on the direct lane, a connection's next request is looked for without sleeping: a core is busy"
            " meanwhile.",
        ),
    )
    slow_lookup_s: float = field(
        default=1.0,
        metadata=_about(
            Seconds(0, 3600),
            "A lookup that takes longer here is counted as slow, and told in the log with the hop that took most of it,"
            " one a second and process at most; 0 for none.",
        ),
    )
    tls_cert: str = field(
        default="off",
        metadata=_about(
            FileOrOff(), "The server's certificate, and those between it and its authority, as PEM: TLS for lookups."
        ),
    )
    tls_key: str = field(default="off", metadata=_about(FileOrOff(), "The key of tls_cert, as PEM, not encrypted."))
    tls_client_ca: str = field(
        default="off",
        metadata=_about(FileOrOff(), "Authorities, as PEM: only clients with a certificate of theirs can connect."),
    )
    tls_metrics: bool = field(
        default=True, metadata=_about(Boolean(), "With tls_cert: the metrics port speaks HTTPS, by the same files.")
    )
    tokens: str = field(
        default="off",
        metadata=_about(FileOrOff(), "TOML file of callers, their roles and limits; nobody else is answered."),
    )
    lane_tls: LaneTls = field(
        default="on",
        metadata=_about(
            Choice(get_args(LaneTls)),
            "With tls_cert, the direct lane over TCP: on is inside TLS, by the same certificates; off is in the clear"
            " beside encrypted gRPC; none is no lane.",
        ),
    )
    registry: str = field(
        default="off",
        metadata=_about(
            RegistryOrOff(),
            "etcd that says which versions of which models are held here, besides `models`, as they come and go.",
        ),
    )
    join: bool = field(
        default=False,
        metadata=_about(
            Boolean(),
            f"Join the pool that {ENVIRONMENT_PREFIX}REGISTRY names; one named by flag or file is joined anyway.",
        ),
    )
    advertise: str = field(
        default="auto",
        metadata=_about(
            Advertise(), "Address at which the registry's clients reach this server; auto is that of `listen`."
        ),
    )
    registry_cache: str = field(
        default="off",
        metadata=_about(
            FileOrOff(), "File that keeps what the registry said last, for a start while the registry is away."
        ),
    )
    shard: str = field(
        default="all",
        metadata=_about(
            Shard(),
            "Which part of each model is held: the I-th, from 0, of N of about equal bytes, or one by its name.",
        ),
    )
    shard_by: ShardBy = field(
        default="head",
        metadata=_about(
            Choice(get_args(ShardBy)),
            "Where models are cut for I/N: between heads, at any row, between layers. One for all servers of a model.",
        ),
    )
    placement: str = field(
        default="off",
        metadata=_about(FileOrOff(), "JSON file that says which rows each named shard holds, instead of I/N."),
    )
    workers: int = field(
        default_factory=usable_cores,
        metadata=_about(Integer(1, 1024, "processes"), "Processes that answer lookups, all from one copy of the rows."),
    )
    worker_timeout_s: float = field(
        default=10.0,
        metadata=_about(Seconds(0.5, 3600), "How long a worker may give no sign of life before it is replaced."),
    )
    memory: str = field(
        default="anon",
        metadata=_about(
            ChoiceOrFile(("anon", "shm", "hugetlb")),
            "Where rows live: private memory with transparent huge pages advised; or, to outlive a restart, /dev/shm,"
            " reserved huge pages (with a hugetlbfs mounted), or files in a directory.",
        ),
    )
    attach: Attach = field(
        default="user",
        metadata=_about(
            Choice(get_args(Attach)),
            "Who on this machine may map the tables, and read rows without asking: this server's user, its group as"
            " well, or everybody. Needs memory that outlives a restart.",
        ),
    )
    emulate: str = field(
        default="off", metadata=_about(Emulate(), "Memory to emulate: rows come no sooner than they would from it.")
    )
    numa: str = field(
        default="off", metadata=_about(Numa(), "Nodes of memory that tables lie on; off leaves it to the system.")
    )
    lock_memory: bool = field(
        default=False, metadata=_about(Boolean(), "Lock tables in memory, so that they are never swapped out.")
    )
    pin_malloc: bool = field(
        default=True,
        metadata=_about(
            Boolean(), "Keep the memory of past answers for the next ones, instead of giving it back to the system."
        ),
    )
    load_threads: int = field(
        default_factory=lambda: min(4, usable_cores()),
        metadata=_about(Integer(1, 64, "threads"), "Threads that read tables at start."),
    )
    gather_threads: int = field(
        default=0,
        metadata=_about(
            Integer(0, 64, "threads"),
            "Threads of each worker that gather a stream's next rows while its last are sent; 0: the event loop does.",
        ),
    )
    max_rows_per_request: int = field(
        default=4_194_304, metadata=_about(Integer(1, 1 << 31, "rows"), "Rows that one lookup may ask for.")
    )
    max_answer_bytes: int = field(
        default=512 * MIB, metadata=_about(Size(KIB, TIB), "Bytes of rows that one lookup may ask for.")
    )
    max_in_flight_bytes: int = field(
        default=GIB,
        metadata=_about(
            Size(KIB, TIB),
            "Bytes of requests and answers in memory, beyond which lookups are refused; at least max_answer_bytes.",
        ),
    )
    stream_chunk_bytes: int = field(
        default=MIB, metadata=_about(Size(64 * KIB, 4 * MIB), "Bytes of rows in one message of a stream.")
    )
    drain_s: float = field(
        default=10.0, metadata=_about(Seconds(0, 3600), "How long lookups may still finish after SIGTERM.")
    )
    log_level: LogLevel = field(
        default="info", metadata=_about(Choice(get_args(LogLevel)), "The least severe messages that are logged.")
    )
    event_loop: EventLoop = field(
        default="uvloop", metadata=_about(Choice(get_args(EventLoop)), "What runs the server's coroutines.")
    )

    def __post_init__(self) -> None:
        for setting in fields(self):
            # The dataclass is frozen to its users; this is still its construction.
            object.__setattr__(self, setting.name, _parse(setting, getattr(self, setting.name)))
        if self.max_in_flight_bytes < self.max_answer_bytes:
            raise ConfigError(
                f"max_in_flight_bytes: {format_size(self.max_in_flight_bytes)} is below max_answer_bytes, "
                f"{format_size(self.max_answer_bytes)}, so the largest answer could never be sent; "
                "raise the one or lower the other"
            )
        if self.registry != "off":
            self._check_registry()
        elif self.join:
            raise ConfigError("join: no registry is named; give --registry URL, or leave --join away")
        elif not self.models:
            raise ConfigError(
                f"models: none given; use --model DIR, {ENVIRONMENT_PREFIX}MODELS, or `models` in the file; or say by "
                "--registry URL where they are published"
            )
        self._check_tls()
        named = is_shard_name(self.shard)
        if named and self.placement == "off":
            raise ConfigError(
                f"shard: {self.shard!r} is the name of a part in a placement; give --placement FILE, or I/N"
            )
        if not named and self.placement != "off":
            raise ConfigError(f"shard: {self.shard!r} is no name of a shard in {self.placement} (placement); give one")

    def _check_tls(self) -> None:
        if (self.tls_cert == "off") != (self.tls_key == "off"):
            given, missing = ("tls_cert", "tls_key") if self.tls_key == "off" else ("tls_key", "tls_cert")
            raise ConfigError(f"{given}: goes with {missing}, which is not given; a certificate needs its key")
        if self.tls_client_ca != "off" and self.tls_cert == "off":
            raise ConfigError("tls_client_ca: clients show certificates over TLS only; give tls_cert and tls_key")
        if self.direct not in ("auto", "off") and self.lane == "off":
            raise ConfigError(
                f'direct: {self.direct} has no lane beside TLS by lane_tls = "none"; set lane_tls = "on", or '
                'direct = "off"'
            )

    @property
    def lane(self) -> str:
        """As `direct`; beside TLS there is no lane over TCP where `lane_tls` says so."""
        where = self.listen if self.direct == "auto" else self.direct
        if self.tls_cert == "off" or self.lane_tls != "none" or where.startswith("unix:"):
            return self.direct
        return "off"

    def _check_registry(self) -> None:
        if self.memory == "anon":
            raise ConfigError(
                "memory: 'anon' is private, and with a registry another process loads a version while this one serves; "
                "set shm, hugetlb or file:DIR"
            )
        name = "listen" if self.advertise == "auto" else "advertise"
        address: str = getattr(self, name)
        if address.startswith("unix:") or split_address(address)[0] in _WILDCARDS:
            raise ConfigError(
                f"{name}: nobody can reach a server at {address}; set --advertise HOST:PORT, the address that clients "
                "of the registry are to be given"
            )


# By field name: the field, the environment variable, the flag.
SETTINGS: Mapping[str, Field[Any]] = {setting.name: setting for setting in fields(ServerConfig)}
_VARIABLES = {name: ENVIRONMENT_PREFIX + name.upper() for name in SETTINGS}
FLAGS = {name: one.metadata["flag"] or f"--{name.replace('_', '-')}" for name, one in SETTINGS.items()}


@dataclass(frozen=True)
class ResolvedConfig:
    """A configuration, and by field name where each value came from, such as `flag --listen` or `default`."""

    config: ServerConfig
    sources: Mapping[str, str]


def load_config(flags: Mapping[str, Any], environ: Mapping[str, str], file: Path | None) -> ResolvedConfig:
    """Resolve every setting: the flag if given, else the environment's value, else the file's, else the default.

    flags: what a command line gave, by field name; None is a flag not given.
    environ: all of it; ENGRAMPOOL_* is ours, and none of it that is empty; ENGRAMPOOL_CLIENT_* is a client's, and not
        looked at. ENGRAMPOOL_MODELS is separated as PATH is.
    file: TOML, one top-level key a field. Relative directories start at the working directory, as in flags.

    Raises ConfigError for an unknown name or a wrong value in any source, overridden or not, for settings that
    contradict each other, for neither models nor a registry, and for a file that cannot be read.
    The environment's registry counts only with `join`.
    """
    values: dict[str, Any] = {}
    sources = dict.fromkeys(SETTINGS, "default")
    before: tuple[Any, str] = "off", sources["registry"]
    for name, value, source in chain(_from_file(file), _from_environment(environ), _from_flags(flags)):
        if name == "registry" and source.startswith("environment"):
            before = values.get(name, "off"), sources[name]
        values[name] = _parse(SETTINGS[name], value, f" from {source}")
        sources[name] = source
    if sources["registry"].startswith("environment") and values["registry"] != "off" and not values.get("join"):
        # In a shell it is for commands such as `publish`: nobody joins a pool unasked.
        variable, values["registry"] = sources["registry"], before[0]
        sources["registry"] = f"{before[1]}, since {variable} counts only with --join"
        if before[0] == "off" and not values.get("models"):
            raise ConfigError(
                f"models: none given; use --model DIR, or --join to hold what is published in {_VARIABLES['registry']}"
            )
    return ResolvedConfig(ServerConfig(**values), sources)


def render(resolved: ResolvedConfig) -> str:
    """The settings as a TOML file for `load_config`, with the source and the range of each in a comment."""
    lines = []
    for name, setting in SETTINGS.items():
        value = setting.metadata["kind"].toml(getattr(resolved.config, name))
        comment = f"from {resolved.sources[name]}; allowed: {setting.metadata['allowed']}"
        # A file's name may hold what a TOML comment may not, such as a line break.
        lines.append(f"{name} = {value}  # {''.join(c if c.isprintable() else '?' for c in comment)}\n")
    return "".join(lines)


def _from_file(file: Path | None) -> Iterator[tuple[str, Any, str]]:
    if file is None:
        return
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise ConfigError(f"{file} is not a TOML file: {error}") from error
    for name, value in document.items():
        if name not in SETTINGS:
            raise _unknown(f"setting {name!r} in {file}", name, {key: key for key in SETTINGS})
        yield name, value, f"file {file}"


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, Any, str]]:
    for variable, value in environ.items():
        # Who has a file of variables, or a template, cannot leave one out; what is empty counts as not set.
        if not variable.startswith(ENVIRONMENT_PREFIX) or not value or _SERVICE_LINK.fullmatch(f"{variable}={value}"):
            continue
        if variable.startswith(_CLIENTS_PREFIX):
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if _VARIABLES.get(name) != variable:
            # Without its value, which may be a token, and errors go to the log.
            raise _unknown(f"environment variable {variable}", name, _VARIABLES)
        yield name, split_locations(value) if name == "models" else value, f"environment {variable}"


def _from_flags(flags: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    for name, value in flags.items():
        if name not in SETTINGS:
            raise _unknown(f"flag {name!r}", name, FLAGS)
        # click passes an option that may repeat as (), not None, where it is absent.
        if value is not None and value != ():
            yield name, value, f"flag {negative_flag(FLAGS[name]) if value is False else FLAGS[name]}"


def _parse(setting: Field[Any], value: Any, origin: str = "") -> Any:
    try:
        return setting.metadata["kind"].parse(value)
    except ValueError as error:
        allowed = setting.metadata["allowed"]
        given = redact(repr(value))
        raise ConfigError(f"{setting.name}: {given}{origin} is not allowed; allowed: {allowed}") from error


def _unknown(what: str, name: str, known: Mapping[str, str]) -> ConfigError:
    """The error for `what`; known: how a setting is called where `what` was found, by field name."""
    # An abbreviation is further from its name in letters than a misspelling is, and as easy to recognise.
    close = [one for one in known if one.startswith(name)] or get_close_matches(name, known, n=1)
    hint = f"did you mean {known[close[0]]}?" if close else f"known: {', '.join(known.values())}"
    return ConfigError(f"unknown {what}; {hint}")


def negative_flag(flag: str) -> str:
    """The flag that says no."""
    return f"--no-{flag[2:]}"
