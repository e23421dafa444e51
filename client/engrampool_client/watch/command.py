"""`engrampool status` and `engrampool top`: how a pool is, now or again and again, asked over gRPC alone.

docs/OPERATIONS.md says what they show.
"""

import json
import sys
import time
import urllib.request
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from engrampool_client.commands import SERVERS, credential_options
from engrampool_proto.errors import EngrampoolError, how_to_install

if TYPE_CHECKING:
    from engrampool_client.watch.pool import ServerLook
    from engrampool_client.watch.samples import Samples

ALARMED = 3
# Of a frame that goes to a file.
_WIDTH = 170
# The most of a client's metrics that is read.
_PAGE_BYTES = 16 << 20


_TIMEOUT = click.option(
    "--timeout-s",
    type=click.FloatRange(min=0, min_open=True),
    default=2.0,
    show_default=True,
    help="How long a server may take to answer.",
)


@click.command()
@SERVERS
@_TIMEOUT
@click.option("--json", "as_json", is_flag=True, help="Print all there is to know as JSON.")
@credential_options
def status(target: tuple[str, ...], timeout_s: float, as_json: bool, **credentials: Any) -> int:
    """Say once how a pool's servers are: versions, shards, workers, and what is wrong; exit code 3 if anything is."""
    from engrampool_client.config import ClientConfig
    from engrampool_client.watch.pool import Watch, alarms, server_json, versions

    with Watch(target, timeout_s, ClientConfig.of(credentials)) as watch:
        looks = watch.look()
        wrong = alarms(looks, watch.trouble)
    if as_json:
        told = {"servers": [server_json(look) for look in looks], "versions": versions(looks), "alarms": wrong}
        click.echo(json.dumps(told))
    else:
        for look in looks:
            click.echo(_line(look))
        for text in wrong:
            click.echo(f"! {text}")
    return ALARMED if wrong else 0


def _line(look: "ServerLook") -> str:
    if look.error is not None:
        return f"{look.address}: no answer"
    held = []
    for model in look.held:
        active = " (active)" if model.active else ""
        held.append(f"{model.name} {model.version}{active}, shard {look.shard(model.name, model.version)}")
    workers = look.samples.sum("engrampool_workers") or 0
    emulates = f"; emulates {look.emulates}, its times are not this machine's" if look.emulates else ""
    return f"{look.address}: {'; '.join(held) or 'loading'}; {workers:.0f} workers{emulates}"


@click.command()
@SERVERS
@click.option(
    "--client",
    "clients",
    multiple=True,
    metavar="HOST:PORT",
    help="Where a client shows its metrics over HTTP: its waits, hops and hits are shown, too. Give it again for more.",
)
@_TIMEOUT
@click.option("--interval-s", type=click.FloatRange(min=0.5), default=2.0, show_default=True)
@click.option("--count", type=click.IntRange(min=0), default=0, help="Frames to show; 0, the default, for no end.")
@credential_options
def top(
    target: tuple[str, ...],
    clients: tuple[str, ...],
    timeout_s: float,
    interval_s: float,
    count: int,
    **credentials: Any,
) -> None:
    """Show a pool as it runs: rows, latency by hop, workers, shards, versions, alarms; Ctrl-C ends it."""
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError as error:
        raise EngrampoolError(f"top needs the package 'rich': {how_to_install('top')}") from error
    from engrampool_client.config import ClientConfig
    from engrampool_client.watch.pool import Watch
    from engrampool_client.watch.screen import Screen

    console = Console() if sys.stdout.isatty() else Console(width=_WIDTH)
    screen, shown = Screen(), 0
    config = ClientConfig.of(credentials)
    with Watch(target, timeout_s, config) as watch, Live(console=console, screen=console.is_terminal) as live:
        try:
            while True:
                begin = time.monotonic()
                frame = screen.frame(watch.look(), _clients(clients, timeout_s), watch.trouble)
                shown += 1
                if console.is_terminal:
                    live.update(frame, refresh=True)
                else:
                    console.print(frame)
                if shown == count:
                    return
                time.sleep(max(0.0, interval_s - (time.monotonic() - begin)))
        except KeyboardInterrupt:
            return


def _clients(addresses: Sequence[str], timeout_s: float) -> "dict[str, Samples | str]":
    """What each shows, or why it does not."""
    if not addresses:
        return {}
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as error:
        raise EngrampoolError(f"--client needs the package 'prometheus-client': {how_to_install('top')}") from error
    from engrampool_client.watch.samples import Samples

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # as gRPC goes by none
    found: dict[str, Any] = {}
    for address in addresses:
        try:
            with opener.open(f"http://{address}/metrics", timeout=timeout_s) as response:
                text = response.read(_PAGE_BYTES).decode()
            families = list(text_string_to_metric_families(text))
        except (OSError, ValueError) as error:
            found[address] = str(error)
            continue
        samples = ((one.name, one.labels, one.value) for family in families for one in family.samples)
        found[address] = Samples.read(time.time(), samples)
    return found
