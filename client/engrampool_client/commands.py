"""The client's subcommands of `engrampool`.

Each imports what it needs when it runs, so that help and mistakes are answered at once.
"""

import json
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engrampool_client import private_files
from engrampool_client.config import ENVIRONMENT_PREFIX, check_credentials
from engrampool_proto.errors import BatchError, EngrampoolError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from engrampool_client.client import Client
    from engrampool_client.config import Hashing
    from engrampool_client.lookup.delivery import Rows
    from engrampool_proto.spec import ModelSpec

# Of rows that are asked for at once.
_PIECE_BYTES = 64 << 20
_PATH = click.Path(path_type=Path)
_TOKENS = click.option("--tokens", required=True, type=_PATH, help="int32 [T] as .npy: one sequence from its start.")
_OUT = click.option("--out", required=True, type=_PATH, help="The .npz to write.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON.")


def _read_targets(context: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    """What `Client` takes as its target, else a usage error."""
    from engrampool_client.pool.discovery import Servers

    try:
        Servers(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error
    return value


# Whom a command asks: every command takes the same, as often as there are servers.
SERVERS = click.option(
    "--server",
    "target",
    multiple=True,
    required=True,
    metavar="HOST:PORT|URL",
    callback=_read_targets,
    help="A server's address, or what stands for several; give it again for more.",
)


def credential_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a click command that dials servers with what a client trusts and shows: settings of `Client`.

    What cannot be is a usage error.
    """

    @wraps(command)
    def checked(**given: Any) -> Any:
        try:
            check_credentials(*(given[name] for name in ("tls_ca", "tls_cert", "tls_key", "tls_name", "token")))
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        return command(**given)

    options = (
        ("--tls-ca", _PATH, "Authorities as PEM: reach servers over TLS, with certificates of theirs."),
        ("--tls-cert", _PATH, "This client's certificate as PEM, if servers ask for one,"),
        ("--tls-key", _PATH, "with its key."),
        ("--tls-name", str, "The name that servers' certificates have, if it is not the host."),
        ("--token", str, "TOKEN, or file:PATH of a file that holds it, which other users of this machine do not see."),
    )
    for flag, kind, text in reversed(options):
        variable = ENVIRONMENT_PREFIX + flag[2:].replace("-", "_").upper()
        checked = click.option(flag, type=kind, envvar=variable, show_envvar=True, help=text)(checked)
    return checked


@click.command()
@SERVERS
@click.option("--model", "name", help="The model's name, if the server holds several.")
@click.option("--version", help="The model's version, if the server holds several.")
@click.option("--hashing", type=click.Choice(["local", "server"]), default="local", show_default=True)
@click.option("--config", type=_PATH, help="Your config.json: refuse a server whose tables do not fit it.")
@click.option("--tokenizer", type=_PATH, help="Your tokenizer.json, compared likewise.")
@click.option("--timeout-s", type=click.FloatRange(min=0, min_open=True), default=60.0, show_default=True)
@_TOKENS
@_OUT
@_JSON
@credential_options
def lookup(
    target: tuple[str, ...],
    name: str | None,
    version: str | None,
    hashing: "Hashing",
    config: Path | None,
    tokenizer: Path | None,
    timeout_s: float,
    tokens: Path,
    out: Path,
    as_json: bool,
    **credentials: Any,
) -> None:
    """Fetch the rows of a token sequence: uint8 [T, heads, row_bytes], one array a layer, named layer_L.

    A long one is asked for in pieces that the server takes; --timeout-s is of each.
    """
    from engrampool_client.client import Client

    ids = read_tokens(tokens)
    private_files.check_replaceable(out)
    settings = {"config": config, "tokenizer": tokenizer, "timeout_s": timeout_s, "connect_timeout_s": timeout_s}
    settings |= credentials
    # To import numba takes longer than all of this.
    with Client(target, name, version, hashing=hashing, compiled="off", **settings) as pool:  # type: ignore[arg-type]
        begin = time.perf_counter()
        fetched, server_us = _in_pieces(pool, ids)
        summary = {
            "model": pool.spec.name,
            "version": pool.version,
            "seconds": round(time.perf_counter() - begin, 6),
            "server_us": server_us,
        }
    rows = {f"layer_{layer}": array for layer, array in fetched.items()}
    _write(out, rows)
    _report({**summary, **_shapes(ids, rows), "out": str(out)}, as_json)


def _in_pieces(pool: "Client", tokens: "npt.NDArray[np.int32]") -> "tuple[dict[int, Rows], dict[str, int] | None]":
    """The rows of a sequence [T], by layer, asked for in as many lookups as the server's limits demand.

    Gives the server's times in all, too; None if it was not asked. Raises what lookups raise.
    """
    import numpy as np

    spec, served = pool.spec, pool.served
    heads, nbytes = (
        sum(table.heads for table in spec.tables),
        sum(table.heads * table.row_bytes for table in spec.tables),
    )
    count = max(1, min(served.max_rows // heads, served.max_answer_bytes // nbytes, _PIECE_BYTES // nbytes))
    shapes = {table.layer: (len(tokens), table.heads, table.row_bytes) for table in spec.tables}
    rows = {layer: np.empty(shape, np.uint8) for layer, shape in shapes.items()}
    # Before the start of the sequence there is none, -1.
    before = np.concatenate([np.full(spec.lookback, -1, np.int32), tokens])
    server_us: Counter[str] = Counter()
    while True:
        begun_by = pool.version, pool.version_changes["followed"]
        for start in range(0, max(1, len(tokens)), count):
            piece = tokens[start : start + count]
            lookback = before[start : start + spec.lookback][None, ::-1]
            out = {layer: array[start : start + count] for layer, array in rows.items()}
            step = pool.prefetch(piece, lookback=lookback, out=out)
            step.wait()
            server_us.update({} if step.times is None else vars(step.times))
        # Another version may have been made active meanwhile, and no file mixes two.
        if begun_by == (pool.version, pool.version_changes["followed"]):
            return rows, dict(server_us) or None


@click.command()
@click.option("--model", "directory", type=_PATH, help="A packed model.")
@click.option("--config", type=_PATH, help="Or the model's config.json,")
@click.option("--tokenizer", type=_PATH, help="with its tokenizer.json where the model hashes through one,")
@click.option(
    "--eos-token-id", type=click.IntRange(min=0), help="and the token that ends a text where the config lists several."
)
@_TOKENS
@_OUT
@_JSON
def rows(
    directory: Path | None,
    config: Path | None,
    tokenizer: Path | None,
    eos_token_id: int | None,
    tokens: Path,
    out: Path,
    as_json: bool,
) -> None:
    """Hash a token sequence, without a table or a server: row ids [T, heads], one array a layer, named layer_L."""
    if (directory is None) == (config is None):
        raise click.UsageError("give either --model, or --config with --tokenizer")
    if directory is not None and (tokenizer is not None or eos_token_id is not None):
        raise click.UsageError("--tokenizer and --eos-token-id go with --config; a packed model has both in it")
    from engrampool_proto.builders import blueprint, load_config
    from engrampool_proto.hashing import TokenBatch

    if config is not None:
        spec = blueprint(load_config(config), tokenizer, eos_token_id=eos_token_id).spec
    else:
        assert directory is not None
        spec = _packed_spec(directory)
    ids = read_tokens(tokens)
    hashed = {f"layer_{layer}": array for layer, array in spec.hash(TokenBatch.of(ids)).items()}
    _write(out, hashed)
    _report({"model": spec.name, "spec_digest": spec.digest, **_shapes(ids, hashed), "out": str(out)}, as_json)


def _packed_spec(directory: Path) -> "ModelSpec":
    """Only the specification: hashing needs no table, so the table files need not be there."""
    from engrampool_proto.spec import ModelSpec

    manifest = directory / "manifest.json"
    try:
        return ModelSpec.from_json(json.loads(manifest.read_bytes())["spec"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, EngrampoolError):
            raise
        raise EngrampoolError(f"{manifest} cannot be read as a packed model's manifest: {error}") from error


def read_tokens(path: Path) -> "npt.NDArray[np.int32]":
    """One sequence of token ids, [T], from a .npy file of integers. Raises BatchError."""
    import numpy as np

    from engrampool_proto.hashing import exactly

    try:
        tokens = np.load(path, allow_pickle=False)
    except OSError as error:
        raise BatchError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise BatchError(f"{path} is no .npy file: {error}") from error
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1:
        found = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, np.ndarray) else "an archive"
        raise BatchError(f"{path} must hold int32 [T]; it holds {found}")
    return exactly(str(path), tokens, np.int32)


def _write(path: Path, arrays: "dict[str, npt.NDArray[Any]]") -> None:
    """All or nothing: a full disk leaves no half file under the name asked for. Rows and row ids tell n-grams."""
    import numpy as np

    private_files.check_replaceable(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with private_files.create(partial) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # the stub fears an array called allow_pickle
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _shapes(tokens: "npt.NDArray[np.int32]", arrays: "dict[str, npt.NDArray[Any]]") -> dict[str, Any]:
    shapes = {name: {"shape": list(array.shape), "dtype": array.dtype.name} for name, array in arrays.items()}
    return {"tokens": len(tokens), "arrays": shapes}


def _report(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(summary))
        return
    arrays = ", ".join(f"{name} {a['dtype']} {a['shape']}" for name, a in summary["arrays"].items())
    click.echo(f"{summary['out']}: {arrays}")
