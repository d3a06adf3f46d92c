"""HTTP/1.1 messages as they pass: heads that are read and kept as they came, bodies as pieces with their framing.

For faulty_proxy.py, which says what is done to them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

PIECE_BYTES = 1 << 16

Piece = tuple[bytes, bool]  # bytes as they were read; whether they are payload, not framing


class Head:
    """First line and fields of a request or an answer."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        start, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
        self.method, self.target = start.split(" ")[:2]  # of an answer: the version and the status
        self.line = f"{self.method} {self.target}"
        pairs = (line.partition(":") for line in lines)
        self.fields = {name.lower(): value.strip().lower() for name, _, value in pairs}
        self.is_chunked = "chunked" in self.fields.get("transfer-encoding", "")
        self.length = int(self.fields["content-length"]) if "content-length" in self.fields else None

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> Head | None:
        """The next head, None where the other side has closed instead."""
        try:
            return cls(await reader.readuntil(b"\r\n\r\n"))
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return None

    @property
    def status(self) -> int:
        """Of an answer."""
        return int(self.target)

    @property
    def has_body(self) -> bool:
        """Of a request."""
        return self.is_chunked or bool(self.length)


async def pieces(head: Head, reader: asyncio.StreamReader, has_body: bool) -> AsyncIterator[Piece]:
    """The body behind a head as it comes, framing included."""
    if not has_body:
        return
    if not head.is_chunked:
        left = head.length  # None: until the other side closes
        while left is None or left > 0:
            data = await reader.read(PIECE_BYTES if left is None else min(PIECE_BYTES, left))
            if not data:
                if left:
                    raise ConnectionResetError("the sender stopped in the middle of a body")
                return
            left = None if left is None else left - len(data)
            yield data, True
        return
    while size := int((line := await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        yield line, False
        while size:
            data = await reader.readexactly(min(PIECE_BYTES, size))
            size -= len(data)
            yield data, True
        yield await reader.readexactly(2), False
    end = line
    while line != b"\r\n":  # trailers, then an empty line
        line = await reader.readuntil(b"\r\n")
        end += line
    yield end, False


async def cut(body: AsyncIterator[Piece], size: int) -> AsyncIterator[Piece]:
    """Of a body, `size` bytes of payload; the framing in front of more, so that it is seen to be cut."""
    async for data, is_payload in body:
        if not is_payload:
            yield data, False
        elif size:
            yield data[:size], True
            size -= len(data[:size])
        if is_payload and not size:
            return


async def send(writer: asyncio.StreamWriter, head: bytes, body: AsyncIterator[Piece] | None = None) -> None:
    """Pass on a head and the body behind it, no faster than the other side takes it."""
    writer.write(head)
    if body is not None:
        async for data, _ in body:
            writer.write(data)
            await writer.drain()
    await writer.drain()
