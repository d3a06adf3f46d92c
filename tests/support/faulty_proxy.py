"""An HTTP proxy on loopback that breaks what passes, for tests of those who must survive it.

    with FaultyProxy(server.endpoint, Fault(rate=0.05)) as proxy:
        ...  # use proxy.endpoint in place of the server's
    assert proxy.counts[Kind.TRUNCATED] >= 20

It forwards all bytes as they are, `Host` included, so that signatures stay right: 100-continue, chunked bodies, ranges
and the server's own errors come through. Whether and how the n-th request is broken is a function of the
seed, n and the request. It runs on a thread of its own; it knows HTTP/1.1 and S3's form of an error, no more of S3.
"""

from __future__ import annotations

import asyncio
import enum
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from http_stream import Head, Piece, cut, pieces, send

END_OF_BODY_SEC = 0.1  # for which the rest of a request is waited for behind its answer
UNKNOWN_BYTES = 64  # of a chunked body, in which its bit is flipped

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Kind(enum.StrEnum):
    """What can happen to a request; the first three never reach the server, the next two are lost on the way back."""

    ERROR = "500 InternalError"
    SLOW_DOWN = "503 SlowDown"
    RESET = "connection reset"
    ERROR_AFTER = "500 InternalError, though the server did it"
    RESET_AFTER = "connection reset, though the server did it"  # in the middle of its body, if it has one
    TRUNCATED = "body cut short"  # of what Content-Length says, then the connection is closed
    FLIPPED_DOWN = "bit flipped in the response"
    FLIPPED_UP = "bit flipped in the request"


BEFORE = {Kind.ERROR, Kind.SLOW_DOWN, Kind.RESET}


@dataclass(frozen=True)
class Fault:
    """Strikes a share of the requests; of its kinds, those that a request can suffer are equally likely."""

    rate: float  # of the requests that match
    kinds: tuple[Kind, ...] = tuple(Kind)
    match: str = ""  # regular expression searched for in "METHOD /bucket/key?query"
    at_most: int | None = None  # times, None is for ever


class FaultyProxy:
    """A context that listens while it is open; of its `faults`, which may be replaced at any time, the first strikes.

    `requests` lists every request as "METHOD /bucket/key?query", `struck` the broken ones with what happened.
    """

    def __init__(self, upstream: str, *faults: Fault, seed: int = 0) -> None:
        self.upstream = urlsplit(upstream)
        self.faults = faults
        self.seed = seed
        self.endpoint = ""
        self.requests: list[str] = []
        self.struck: list[tuple[Kind, str]] = []
        self._times: Counter[Fault] = Counter()
        self._bug: str | None = None
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._run()), name="faulty-proxy", daemon=True
        )
        self._listening = threading.Event()

    @property
    def counts(self) -> Counter[Kind]:
        """How often each kind has struck."""
        return Counter(kind for kind, _ in self.struck)

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        assert self._listening.wait(10), "the proxy does not listen"
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert self._bug is None, f"the proxy itself is broken: {self._bug}"

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        self.endpoint = f"http://{host}:{port}"
        self._listening.set()
        await self._stop.wait()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self, (reader, writer))
        try:
            while await connection.exchange():
                pass
        except (ConnectionError, EOFError):
            pass  # the client or the server went away
        except asyncio.CancelledError:
            pass  # the proxy is closed
        except Exception as error:
            self._bug = repr(error)
            raise
        finally:
            connection.close()

    def _draw(self, request: Head) -> tuple[Kind | None, random.Random]:
        """What is to happen to the next request, and the random numbers that say where."""
        numbers = random.Random(f"{self.seed} {len(self.requests)}")
        self.requests.append(request.line)
        for fault in self.faults:
            strikes = numbers.random() < fault.rate and re.search(fault.match, request.line)
            kinds = [kind for kind in fault.kinds if _can_suffer(request, kind)]
            if strikes and kinds and self._times[fault] != fault.at_most:
                self._times[fault] += 1
                return numbers.choice(kinds), numbers
        return None, numbers


class _Connection:
    """One client's connection and the one that belongs to it at the server; both are kept alive."""

    def __init__(self, proxy: FaultyProxy, client: Streams) -> None:
        self.proxy = proxy
        self.reader, self.writer = client
        self.server: Streams | None = None

    def close(self) -> None:
        self.writer.close()
        if self.server:
            self.server[1].close()

    async def exchange(self) -> bool:
        """One request and its answer; whether the connection can carry another."""
        request = await Head.read(self.reader)
        if request is None:
            return False
        kind, numbers = self.proxy._draw(request)
        if kind in BEFORE:
            return await self._refuse(request, kind)
        if self.server is None or self.server[0].at_eof():
            self.server = await asyncio.open_connection(
                self.proxy.upstream.hostname, self.proxy.upstream.port
            )
        body = pieces(request, self.reader, request.has_body)
        if kind is Kind.FLIPPED_UP:
            body = self._flipped(body, request, kind, request, numbers)
        # The answer may come before the body is sent, and with 100-continue it does.
        sending = asyncio.create_task(send(self.server[1], request.raw, body))
        sending.add_done_callback(self._end_half_sent)
        try:
            keep_alive = await self._answer(request, sending, kind, numbers)
            await asyncio.wait([sending], timeout=END_OF_BODY_SEC)
            return keep_alive and sending.done()
        finally:
            sending.cancel()

    def _end_half_sent(self, sending: asyncio.Task[None]) -> None:
        """A client that went away in the middle of its body is gone for the server too."""
        if (sending.cancelled() or sending.exception()) and self.server:
            self.server[1].close()

    async def _answer(
        self, request: Head, sending: asyncio.Task[None], kind: Kind | None, numbers: random.Random
    ) -> bool:
        assert self.server is not None
        while (answer := await Head.read(self.server[0])) and answer.status < 200:
            await send(self.writer, answer.raw)
        if answer is None:
            raise ConnectionResetError("the server closed the connection")
        has_body = request.method != "HEAD" and answer.status not in (204, 304) and answer.length != 0
        body = pieces(answer, self.server[0], has_body)
        if answer.status < 300:
            half = (answer.length or 0) // 2
            if kind is Kind.ERROR_AFTER:
                async for _ in body:
                    pass
                await sending
                return await self._say(request, kind, keep_alive=True)
            if kind is Kind.RESET_AFTER:
                if has_body:
                    await send(self.writer, answer.raw, cut(body, half))
                return self._reset(request, kind)
            if kind is Kind.TRUNCATED and has_body:
                self._note(request, kind)
                await send(self.writer, answer.raw, cut(body, half))
                return False
            if kind is Kind.FLIPPED_DOWN:
                body = self._flipped(body, answer, kind, request, numbers)
        await send(self.writer, answer.raw, body)
        return "close" not in (answer.fields.get("connection"), request.fields.get("connection"))

    async def _refuse(self, request: Head, kind: Kind) -> bool:
        if kind is Kind.RESET:
            return self._reset(request, kind)
        waits = "expect" in request.fields  # for leave to send its body, which it then does not
        if not waits:
            async for _ in pieces(request, self.reader, request.has_body):
                pass
        return await self._say(request, kind, keep_alive=not waits)

    async def _say(self, request: Head, kind: Kind, *, keep_alive: bool) -> bool:
        """Answer with an error in S3's form."""
        status, code = ("503", "SlowDown") if kind is Kind.SLOW_DOWN else ("500", "InternalError")
        xml = (
            f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code>'
            "<Message>The proxy says so</Message></Error>"
        )
        head = (
            f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(xml)}\r\n"
            f"Connection: {'keep-alive' if keep_alive else 'close'}\r\n\r\n"
        )
        self._note(request, kind)
        await send(self.writer, (head + (xml if request.method != "HEAD" else "")).encode())
        return keep_alive

    def _reset(self, request: Head, kind: Kind) -> bool:
        """Close with RST in place of FIN."""
        self._note(request, kind)
        endpoint = self.writer.get_extra_info("socket")
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        return False

    async def _flipped(
        self, body: AsyncIterator[Piece], head: Head, kind: Kind, request: Head, numbers: random.Random
    ) -> AsyncIterator[Piece]:
        """The same body with one bit of its payload flipped; `head` says how long it is."""
        at, bit = numbers.randrange(head.length or UNKNOWN_BYTES), 1 << numbers.randrange(8)
        async for data, is_payload in body:
            if is_payload and 0 <= at < len(data):
                self._note(request, kind)
                data = data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]
            at -= len(data) if is_payload else 0
            yield data, is_payload

    def _note(self, request: Head, kind: Kind) -> None:
        self.proxy.struck.append((kind, request.line))


def _can_suffer(request: Head, kind: Kind) -> bool:
    if kind in (Kind.TRUNCATED, Kind.FLIPPED_DOWN):
        return request.method in ("GET", "POST")  # the others' answers have no body
    return kind is not Kind.FLIPPED_UP or request.has_body
