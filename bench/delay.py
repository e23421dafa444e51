"""A way to a server that answers late: `delay.py MS HOST:PORT...`.

Says a port for each address, {"ports": [...]}; whatever comes back from there arrives MS milliseconds later, at the
speed at which it came. Serves until its input ends.
"""

import asyncio
import json
import sys
from functools import partial

import uvloop

_CHUNK_BYTES = 1 << 20


async def main(delay_s: float, addresses: list[str]) -> None:
    """Serve."""
    servers = []
    for address in addresses:
        host, _, port = address.rpartition(":")
        servers.append(await asyncio.start_server(partial(_serve, delay_s, host, int(port)), "127.0.0.1", 0))
    print(json.dumps({"ports": [server.sockets[0].getsockname()[1] for server in servers]}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def _serve(
    delay_s: float, host: str, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    try:
        from_server, to_server = await asyncio.open_connection(host, port)
    except OSError:
        writer.close()
        return
    await asyncio.gather(_copy(reader, to_server, 0.0), _copy(from_server, writer, delay_s))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    loop = asyncio.get_running_loop()
    try:
        while data := await reader.read(_CHUNK_BYTES):
            if delay_s:
                loop.call_later(delay_s, writer.write, data)
            else:
                writer.write(data)
    except ConnectionError:
        pass  # as good as an end
    loop.call_later(delay_s, writer.close)


if __name__ == "__main__":
    uvloop.run(main(float(sys.argv[1]) / 1e3, sys.argv[2:]))
