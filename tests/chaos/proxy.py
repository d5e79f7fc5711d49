"""A TCP proxy between a worker and a server, which fails in the ways in which networks fail."""

import asyncio
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, Literal

Mode = Literal["pass", "delay", "reset", "black_hole", "cut_replies"]

CHUNK: Final = 65536  # bytes
DELAY_SECONDS: Final = 0.3  # of each chunk, on average
POLL_SECONDS: Final = 0.05


class Proxy:
    """Forwards connections to a port of 127.0.0.1; `mode` says how badly, and may change at any time.

    pass         as it should be
    delay        every chunk comes late
    reset        connections are reset, new ones too
    black_hole   nothing comes through, and nothing is said
    cut_replies  requests come through, the server does its work, and the connection is reset before its answer
                 (of a share of `cut_share`); `cuts` counts them
    """

    def __init__(self, target_port: int) -> None:
        self.mode: Mode = "pass"
        self.cut_share = 1.0
        self.cuts = 0
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._random = random.Random(target_port)

    @contextmanager
    def running(self) -> Iterator["Proxy"]:
        """Serve in a thread of its own."""
        thread = threading.Thread(target=self._serve, name=f"proxy-{self.port}", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connection, sock=self._listener))
        self._loop.run_forever()
        server.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _connection(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        if self.mode == "reset":
            _reset(to_client)
            return
        try:
            server, to_server = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            _reset(to_client)
            return
        pumps = [
            asyncio.create_task(self._pump(client, to_server, reply=False)),
            asyncio.create_task(self._pump(server, to_client, reply=True)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            pass  # the proxy stops
        finally:
            _reset(to_client)
            _reset(to_server)
            for pump in pumps:
                pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, reply: bool) -> None:
        with suppress(OSError):
            while chunk := await source.read(CHUNK):
                while self.mode == "black_hole":
                    await asyncio.sleep(POLL_SECONDS)
                if self.mode == "reset":
                    return
                if self.mode == "cut_replies" and reply and self._random.random() < self.cut_share:
                    self.cuts += 1
                    return
                if self.mode == "delay":
                    await asyncio.sleep(self._random.random() * 2 * DELAY_SECONDS)
                sink.write(chunk)
                await sink.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close without a goodbye."""
    writer.transport.abort()
