"""`engrampool doctor`: are the rows there when the layers want them, on this machine, with this traffic?

It plays a stream of lookups against the clock of your model (replay.py), says for each layer whether its rows come in
time, and tries what might change that (diagnosis.py). docs/CLIENT.md says how each number is obtained.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engrampool_client.commands import SERVERS, credential_options, read_tokens
from engrampool_proto.errors import BatchError, SpecError

if TYPE_CHECKING:
    from engrampool_client.config import Connections
    from engrampool_client.doctor.diagnosis import Phase, Report, Verdict
    from engrampool_client.doctor.replay import Clock

EXPOSED = 3
_YOUNG = "lookups were still making the process larger, which costs time and ends: see docs/CLIENT.md"


def print_report(report: "Report") -> None:
    """For people."""
    from engrampool_client.doctor.cache_sizes import WORTH, best_size
    from engrampool_client.status import lines

    status = report.status
    click.echo(f"{report.model} {report.version} on {status['target']}; lookups go over: {status['lane']}")
    for line in lines(status):
        click.echo(f"  {line}")
    why = status["why_not_compiled"]
    click.echo(f"  the client computes by {'compiled kernels' if why is None else f'numpy: {why}'}")
    at = f"p{report.percentile:g}"
    for phase in report.phases:
        click.echo(f"\n{_title(phase)}")
        for verdict in phase.verdicts:
            click.echo(f"  layer {verdict.layer:3} at {_ms(verdict.start_s)}: {_verdict(verdict, at)}")
        click.echo(f"  a lookup, p50 / {at} of each part:")
        for name, (median, high) in phase.split.items():
            click.echo(f"    {name:16} {_ms(median)} / {_ms(high)}")
        click.echo(f"    {'client CPU':16} {_ms(phase.client_cpu_s)} on average")
        click.echo(f"  rows: {_rows(phase)}")
        if not phase.settled:
            click.echo(
                "  lookups were still making the process larger, which they may not do for long: see docs/CLIENT.md"
            )
        if phase.forwards * (100 - report.percentile) < 100:
            click.echo(
                f"  {at} of {phase.forwards} forwards is the slowest of them: give a longer stream, or more time"
            )
    if report.round_trip_s is not None:
        click.echo(f"\na lookup of one row: {_ms(report.round_trip_s)} on the wire and in the client, p50")
    if report.cache:
        click.echo("\na cache of   would have   and save, of the bytes that deduplication leaves")
        for size in report.cache:
            saved = ", ".join(f"{name} {share:.0%}" for name, share in size.saved.items())
            click.echo(f"  {size.nbytes >> 20:5} MiB    {size.hits:6.0%}       {saved}")
        if all(best_size(report.cache, phase.name) is None for phase in report.phases):
            click.echo(f"  a cache does not pay on this traffic: none saves {WORTH:.0%}")
    for tried in report.tried:
        click.echo(f"\n{tried.phase.name} with {tried.trial.name}, {tried.phase.forwards} forwards:")
        whole = tried.phase.split.get("whole")
        for verdict in tried.phase.verdicts:
            click.echo(f"  layer {verdict.layer:3} at {_ms(verdict.start_s)}: {_verdict(verdict, at)}")
        if whole is not None:
            click.echo(f"  a lookup, p50 / {at}: {_ms(whole[0])} / {_ms(whole[1])}; rows: {_rows(tried.phase)}")
        if not tried.phase.settled:
            click.echo(f"  {_YOUNG}")
    click.echo()
    for note in report.notes:
        click.echo(f"note: {note}")
    if report.emulated is not None:
        click.echo(f"emulated, not measured on such hardware: {report.emulated}")
    for phase in report.phases:
        if phase.hidden:
            click.echo(f"{phase.name}: hidden")
        else:
            remedies = report.remedies(phase.name)
            click.echo(f"{phase.name}: exposed; hidden with: {', or '.join(remedies) or 'none of those tried'}")


def _title(phase: "Phase") -> str:
    return f"{phase.name}: {phase.forwards} forwards of {phase.num_tokens} tokens, {phase.forward_s * 1e3:.1f} ms each"


def _rows(phase: "Phase") -> str:
    total = sum(phase.bytes.values())
    sources = ", ".join(f"{name} {count / total:.0%}" for name, count in phase.bytes.items() if count)
    return f"{total / 1e6:.2f} MB a forward, by source: {sources or 'none came'}"


def _verdict(verdict: "Verdict", at: str) -> str:
    masked = f"; {verdict.masked_tokens} tokens went without their rows" if verdict.masked_tokens else ""
    return f"{_margin(verdict.margin_s)} at {at} ({_margin(verdict.p50_s)} at p50){masked}"


def _margin(seconds: float) -> str:
    ms = f"{abs(seconds) * 1e3:.2f} ms"
    return f"hidden, margin {ms}" if seconds >= 0 else f"exposed by {ms}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:8.2f} ms"


# --- the command


def _heads(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    start, _, stop = value.partition(":")
    try:
        return int(start), int(stop)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not A:B") from None


def _connections(context: click.Context, parameter: click.Parameter, value: str) -> "Connections":
    if value == "auto":
        return "auto"
    if value.isdecimal() and int(value):
        return int(value)
    raise click.BadParameter(f"{value!r} is neither auto nor 1 or more")


def _clocks(
    layers: int | None,
    layer_ms: Path | None,
    prefill: tuple[int, float | None],
    decode: tuple[int, float | None],
) -> "dict[str, Clock]":
    """By phase. Raises click.UsageError, BatchError for a file that is none."""
    from engrampool_client.doctor.replay import Clock

    sizes = {"prefill": prefill, "decode": decode}
    clocks = {}
    if layer_ms is not None:
        if layers is not None or prefill[1] is not None or decode[1] is not None:
            raise click.UsageError("--layer-ms says it all: leave out --layers, --prefill-ms and --decode-ms")
        for name, times in _read_layer_ms(layer_ms).items():
            clocks[name] = Clock(tuple(ms / 1e3 for ms in times), sizes[name][0], scales=name == "prefill")
        return clocks
    for name, (num_tokens, total_ms) in sizes.items():
        if total_ms is not None:
            if layers is None:
                raise click.UsageError("give --layers, the number of the model's layers")
            clocks[name] = Clock.even(total_ms / 1e3, layers, num_tokens, scales=name == "prefill")
    if not clocks:
        raise click.UsageError("give --prefill-ms or --decode-ms or both, with --layers; or --layer-ms")
    return clocks


def _read_layer_ms(path: Path) -> dict[str, list[float]]:
    try:
        found = json.loads(path.read_bytes())
        phases = {name: [float(ms) for ms in found[name]] for name in ("prefill", "decode") if name in found}
        if not phases or not all(times and min(times) >= 0 and sum(times) < 1e9 for times in phases.values()):
            raise ValueError("neither phase has times")
    except OSError as error:
        raise BatchError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BatchError(
            f'{path} must be JSON like {{"prefill": [5.0, ...], "decode": [0.3, ...]}}, either phase or both, the '
            f"milliseconds of each layer from layer 0 on ({error})"
        ) from error
    return phases


_PATH = click.Path(path_type=Path)
_MS = click.FloatRange(min=0)
_SWITCH = click.Choice(["auto", "off"])


@click.command()
@SERVERS
@click.option("--model", help="The model's name, if the server holds several.")
@click.option("--version", help="The model's version, if the server holds several.")
@click.option("--tokens", multiple=True, type=_PATH, help="int32 [T] as .npy: one sequence from its start. Repeatable.")
@click.option("--record", type=_PATH, help="Or a stream that Client(record=FILE) wrote.")
@click.option("--layers", type=click.IntRange(min=1), help="Layers of the model, which share a forward's time evenly.")
@click.option("--prefill-tokens", type=click.IntRange(min=1), default=8192, show_default=True, help="Of one chunk.")
@click.option("--prefill-ms", type=_MS, help="A whole forward of one chunk takes so long.")
@click.option("--decode-batch", type=click.IntRange(min=1), default=64, show_default=True, help="Tokens of one step.")
@click.option("--decode-ms", type=_MS, help="A whole forward of one decode step takes so long.")
@click.option("--layer-ms", type=_PATH, help="Or a JSON file of each layer's milliseconds, by phase.")
@click.option("--percentile", type=click.FloatRange(50, 100), default=99.0, show_default=True, help="Of the verdict.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True)
@click.option("--cache-bytes", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--warm", type=_PATH, help="A file that Client.save_cache wrote.")
@click.option("--heads", callback=_heads, metavar="A:B", help="Only these columns, as a tensor-parallel rank asks for.")
@click.option("--no-dedupe", is_flag=True, help="Ask for every token's rows.")
@click.option("--attach", type=_SWITCH, default="auto", show_default=True)
@click.option(
    "--emulate", metavar="NAME|FILE", help="Rows come from attached memory no sooner than from this tier: a look ahead."
)
@click.option("--direct", type=_SWITCH, default="auto", show_default=True)
@click.option("--connections", callback=_connections, default="auto", show_default=True, metavar="N|auto")
@click.option("--on-failure", type=click.Choice(["raise", "mask"]), default="raise", show_default=True)
@click.option("--timeout-s", type=click.FloatRange(min=0, min_open=True), default=10.0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@credential_options
def doctor(
    tokens: tuple[Path, ...],
    record: Path | None,
    layers: int | None,
    prefill_tokens: int,
    prefill_ms: float | None,
    decode_batch: int,
    decode_ms: float | None,
    layer_ms: Path | None,
    percentile: float,
    seconds: float,
    no_dedupe: bool,
    as_json: bool,
    **settings: Any,
) -> int:
    """Play your traffic against your model's clock: which layers wait for their rows, and what would change that.

    Run it where the model runs. Exit codes: 0 every layer is hidden, 3 some layer is exposed, 1 and 2 errors.
    """
    from engrampool_client.client import Client
    from engrampool_client.doctor.diagnosis import Doctor
    from engrampool_client.doctor.record import Recording
    from engrampool_client.doctor.replay import Text, phases_of_recording, phases_of_text
    from engrampool_client.errors import RecordError
    from engrampool_proto.hashing import TokenBatch

    if bool(tokens) == (record is not None):
        raise click.UsageError("give either --tokens or --record")
    if settings["emulate"] is not None and settings["attach"] == "off":
        raise click.UsageError("--emulate is of attached memory: leave out --attach off")
    clocks = _clocks(layers, layer_ms, (prefill_tokens, prefill_ms), (decode_batch, decode_ms))
    recording = None if record is None else Recording(record)
    sequences = [(path, read_tokens(path)) for path in tokens]
    settings["dedupe"] = not no_dedupe
    settings["connect_timeout_s"] = settings["timeout_s"]
    with Client(**settings) as client:  # the stream is made for what the server holds
        spec = client.spec
        settings |= {"model": spec.name, "version": client.version}
    for name, clock in clocks.items():
        if spec.layers[-1] >= len(clock.layer_s):
            raise SpecError(f"{spec.name} has rows for layer {spec.layers[-1]}; {name} has {len(clock.layer_s)} layers")
    if recording is not None:
        phases = phases_of_recording(recording, spec, settings["heads"], clocks)
        if not phases:
            raise RecordError(f"{record} holds no lookup")
    else:
        for path, ids in sequences:
            try:
                TokenBatch.of(ids).check_tokens(spec.vocab_size, spec.lookback)
            except BatchError as error:
                raise BatchError(f"{path}: {error}") from error
        sizes = {name: clock.num_tokens for name, clock in clocks.items()}
        text = Text.of([ids for _, ids in sequences])
        phases = phases_of_text(text, spec.lookback, sizes.get("prefill"), sizes.get("decode"))
    report = Doctor(settings, clocks, phases, percentile, seconds).examine()
    if as_json:
        click.echo(json.dumps(report.to_json()))
    else:
        print_report(report)
    return 0 if report.hidden else EXPOSED
