"""A client of HTTP/1.1 that can do what clients should not: go away in the middle, or read slowly."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping
from typing import Any


class Reply:
    """An answer whose head was read. `chunks` yields the body; `complete` says whether all of it came."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.status, self.headers, self.complete = 0, dict[str, str](), False

    async def head(self) -> None:
        first, *rest = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest if line)}

    async def chunks(self) -> AsyncIterator[bytes]:
        if "content-length" in self.headers:
            yield await self._reader.readexactly(int(self.headers["content-length"]))
        else:
            while size := int(await self._reader.readuntil(b"\r\n"), 16):
                yield (await self._reader.readexactly(size + 2))[:-2]
            await self._reader.readexactly(2)
        self.complete = True

    async def body(self) -> bytes:
        return b"".join([chunk async for chunk in self.chunks()])

    def leave(self) -> None:
        """Close the connection at once, whatever is still to come."""
        self._writer.transport.abort()


async def post(port: int, path: str, body: Mapping[str, Any], *, receive_buffer: int | None = None) -> Reply:
    """Send a request; nothing of the answer is read. `receive_buffer`: bytes that the kernel takes before we do."""
    connection = socket.socket()
    connection.setblocking(False)
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=receive_buffer or 2**16)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return Reply(reader, writer)
