"""What `engrampool top` shows: one frame, of two looks at the same pool and at clients' metrics. Needs `rich`."""

import time
from collections.abc import Callable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from engrampool_client.watch.pool import ServerLook, alarms, versions
from engrampool_client.watch.samples import Between, Samples

_NONE = "-"
_HOPS = ("client", "network", "queue", "gather", "send")
_LOOKUP = "engrampool_lookup"
# The least time between two looks that a rate is made of.
_LEAST_S = 1e-3


class Screen:
    """Frames, each of the looks that it is given and of those before."""

    def __init__(self) -> None:
        self._servers: dict[str, Between] = {}
        self._clients: dict[str, Between] = {}

    def frame(
        self, looks: Sequence[ServerLook], clients: Mapping[str, Samples | str], trouble: str | None = None
    ) -> RenderableType:
        """A frame. clients: by address, what each showed, or why it did not. trouble: as of `Watch`."""
        self._servers = _joined(self._servers, {look.address: look.samples for look in looks if look.error is None})
        seen = {address: samples for address, samples in clients.items() if isinstance(samples, Samples)}
        self._clients = _joined(self._clients, seen)
        wrong = alarms(looks, trouble) + [
            f"client {address} shows nothing: {why}" for address, why in clients.items() if isinstance(why, str)
        ]
        wrong += [
            f"{address} refuses {count / between.seconds:.1f} lookups/s: {reason}"
            for address, between in self._servers.items()
            if between.seconds > _LEAST_S
            for reason, count in between.grew("engrampool_refused_total", "reason").items()
            if count
        ]
        parts: list[RenderableType] = [self._head(looks), self._server_table(looks), self._layer_table()]
        if clients:
            parts += [self._wait_table(), self._hop_table()]
        parts.append(_alarms(wrong))
        return Group(*parts)

    def _head(self, looks: Sequence[ServerLook]) -> Text:
        serving = sum(look.serving for look in looks)
        held = ", ".join(
            f"{one['model']} {one['version'][:8]}{' (active)' if one['active'] else ''}" for one in versions(looks)
        )
        rows, nbytes = (
            _total(self._servers, lambda one, name=name: one.rate(f"{_LOOKUP}_{name}_total"))  # type: ignore[misc]
            for name in ("rows", "bytes")
        )
        text = f"engrampool  {time.strftime('%H:%M:%S')}  {serving} of {len(looks)} servers serve  "
        tiers = sorted({look.emulates for look in looks if look.emulates})
        text += f"EMULATED: {', '.join(tiers)}  " if tiers else ""
        text += f"{_count(rows)} rows/s  {_gigabytes(nbytes)} GB/s  {held or 'nothing is held'}"
        return Text(text, style="bold")

    def _server_table(self, looks: Sequence[ServerLook]) -> Table:
        names = ("server", "shard", "workers", "rows/s", "GB/s", "lookups/s", "p50", "p99", "queue", "gather", "send")
        table = _table("servers; times in ms, of a lookup on the server", *names, "trip", "in flight", "CPUs", "memory")
        for look in looks:
            between = self._servers.get(look.address, Between(Samples(), Samples()))
            shards = sorted({look.shard(model.name, model.version) for model in look.held})
            total, queue, gather = (
                between.mean_s(f"{_LOOKUP}{part}_seconds").get("") for part in ("", "_queue", "_gather")
            )
            send = None if total is None else max(0.0, total - (queue or 0.0) - (gather or 0.0))
            samples = look.samples
            table.add_row(
                look.address,
                "no answer" if look.error else ", ".join(shards) or "loading",
                _count(samples.sum("engrampool_workers")),
                _count(between.rate(f"{_LOOKUP}_rows_total")),
                _gigabytes(between.rate(f"{_LOOKUP}_bytes_total")),
                _count(between.rate(f"{_LOOKUP}_seconds_count")),
                *(_ms(between.quantile_s(f"{_LOOKUP}_seconds", q).get("")) for q in (0.5, 0.99)),
                *map(_ms, (queue, gather, send, look.round_trip_s)),
                _mib(samples.sum("engrampool_in_flight_bytes")),
                _figure(between.rate("process_cpu_seconds_total"), "{:.2f}"),
                _mib(samples.sum("process_resident_memory_bytes")),
            )
        return table

    def _layer_table(self) -> Table:
        table = _table("layers, of all servers", "layer", "rows/s", "GB/s")
        rows, nbytes = ({}, {})  # type: tuple[dict[str, float], dict[str, float]]
        for between in self._servers.values():
            if between.seconds > _LEAST_S:
                for sums, name in ((rows, "rows"), (nbytes, "bytes")):
                    for layer, count in between.grew(f"{_LOOKUP}_{name}_total", "layer").items():
                        sums[layer] = sums.get(layer, 0.0) + count / between.seconds
        for layer in sorted(rows, key=_number):
            table.add_row(layer, _count(rows[layer]), _gigabytes(nbytes.get(layer)))
        return table

    def _wait_table(self) -> Table:
        table = _table("clients: what layers wait, in ms", "client", "layer", "p50", "p99", "waited", "masked/s")
        name = "engrampool_client_wait_seconds"
        for address, between in self._clients.items():
            median, high = (between.quantile_s(name, q, "layer") for q in (0.5, 0.99))
            for layer in sorted(between.after.by(f"{name}_count", "layer"), key=_number):
                table.add_row(
                    address,
                    layer,
                    _ms(median.get(layer)),
                    _ms(high.get(layer)),
                    _figure(between.rate(f"{name}_sum", layer=layer), "{:.1%}"),
                    _figure(between.rate("engrampool_client_masked_tokens_total", layer=layer), "{:.1f}"),
                )
        return table

    def _hop_table(self) -> Table:
        names = ("client", "steps/s", "failed/s", *_HOPS, "from the wire", "cache hits")
        table = _table("clients: where lookups' time goes, mean ms of each hop", *names)
        for address, between in self._clients.items():
            hops = between.mean_s("engrampool_client_hop_seconds", "hop")
            by_source = between.grew("engrampool_client_rows_bytes_total", "source")
            hits, misses = (
                sum(between.grew(f"engrampool_client_cache_{kind}_total", "").values()) for kind in ("hits", "misses")
            )
            table.add_row(
                address,
                _count(between.rate("engrampool_client_steps_total")),
                _figure(between.rate("engrampool_client_steps_total", outcome="failed"), "{:.1f}"),
                *(_ms(hops.get(hop)) for hop in _HOPS),
                _share(by_source.get("wire", 0.0), sum(by_source.values())),
                _share(hits, hits + misses),
            )
        return table


def _joined(before: Mapping[str, Between], now: Mapping[str, Samples]) -> dict[str, Between]:
    """Each process's last two readings. A server reads seldom: the same one once more says nothing new."""
    found = {}
    for address, samples in now.items():
        last = before.get(address)
        if last is None:
            found[address] = Between(samples, samples)
        else:
            found[address] = last if samples.unix_s <= last.after.unix_s else Between(last.after, samples)
    return found


def _total(servers: Mapping[str, Between], rate: Callable[[Between], float | None]) -> float | None:
    found = [one for between in servers.values() if (one := rate(between)) is not None]
    return sum(found) if found else None


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim", min_width=len(title))
    for at, name in enumerate(columns):
        table.add_column(name, justify="left" if at == 0 else "right", no_wrap=True)
    return table


def _alarms(wrong: Sequence[str]) -> RenderableType:
    if not wrong:
        return Text("no alarms", style="green")
    return Text("\n".join(f"! {text}" for text in wrong), style="bold red")


def _number(layer: str) -> tuple[bool, int, str]:
    return not layer.isdigit(), int(layer) if layer.isdigit() else 0, layer


def _figure(value: float | None, form: str) -> str:
    return _NONE if value is None else form.format(value)


def _count(value: float | None) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value is not None and value >= 10 * size:
            return f"{value / size:.1f}{unit}"
    return _figure(value, "{:.0f}")


def _gigabytes(nbytes: float | None) -> str:
    return _figure(None if nbytes is None else nbytes / 1e9, "{:.3f}")


def _mib(nbytes: float | None) -> str:
    return _figure(None if nbytes is None else nbytes / (1 << 20), "{:.0f} MiB")


def _ms(seconds: float | None) -> str:
    return _figure(None if seconds is None else seconds * 1e3, "{:.3f}")


def _share(part: float, whole: float) -> str:
    return _NONE if whole <= 0 else f"{part / whole:.0%}"
