"""The proxy that breaks S3's answers, proved with a plain client of the real server that tries nothing twice."""

from __future__ import annotations

import http.client
import http.server
import io
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import ClientError, ConnectionClosedError, HTTPClientError, ResponseStreamingError
from faulty_proxy import BEFORE, Fault, FaultyProxy, Kind
from s3_server import S3Server

DATA = os.urandom(200_000)
MIB = 1 << 20
RESET = (ConnectionClosedError, HTTPClientError, ResponseStreamingError)


@dataclass
class Behind:
    """A bucket as seen through the proxy."""

    proxy: FaultyProxy
    client: Any
    bucket: str

    def put(self, key: str, data: bytes = DATA, **options: Any) -> Any:
        return self.client.put_object(Bucket=self.bucket, Key=key, Body=data, **options)

    def get(self, key: str, **options: Any) -> bytes:
        return self.client.get_object(Bucket=self.bucket, Key=key, **options)["Body"].read()


@pytest.fixture
def behind(s3: S3Server, faulty_s3: tuple[S3Server, FaultyProxy]) -> Behind:
    server, proxy = faulty_s3
    return Behind(proxy, server.client(), s3.bucket())


def _always(*kinds: Kind, match: str = "") -> tuple[Fault]:
    return (Fault(1.0, kinds, match),)


def _code(call: Callable[[], object]) -> str:
    with pytest.raises(ClientError) as caught:
        call()
    return caught.value.response["Error"]["Code"]


def test_without_faults_every_kind_of_request_comes_through_unchanged(s3: S3Server, behind: Behind):
    behind.put("plain")  # with Expect: 100-continue
    assert behind.get("plain") == DATA
    assert behind.get("plain", Range="bytes=1000-1999") == DATA[1000:2000]
    assert behind.client.head_object(Bucket=behind.bucket, Key="plain")["ContentLength"] == len(DATA)
    behind.put("empty", b"")
    assert behind.get("empty") == b""
    large = os.urandom(12 * MIB)
    parts = TransferConfig(multipart_threshold=5 * MIB, multipart_chunksize=5 * MIB)
    behind.client.upload_fileobj(io.BytesIO(large), behind.bucket, "parts", Config=parts)
    assert s3.client().get_object(Bucket=behind.bucket, Key="parts")["Body"].read() == large
    assert any("uploads" in line for line in behind.proxy.requests)
    back = io.BytesIO()
    behind.client.download_fileobj(behind.bucket, "parts", back, Config=parts)
    assert back.getvalue() == large
    listed = behind.client.list_objects_v2(Bucket=behind.bucket)["Contents"]
    assert [entry["Key"] for entry in listed] == ["empty", "parts", "plain"]
    behind.client.delete_object(Bucket=behind.bucket, Key="empty")  # 204
    assert not behind.proxy.struck


class _Echo(http.server.BaseHTTPRequestHandler):
    """Answers a chunked body with the same in other chunks; the gateway takes none without a Content-Length."""

    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for data in (body[:999], body[999:]):
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.write(b"0\r\nx-trailer: last\r\n\r\n")

    do_POST = do_PUT

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_chunked_bodies_come_through_and_are_cut_and_flipped_like_others():
    def exchange(kind: Kind | None) -> bytes:
        proxy.faults = _always(kind) if kind else ()
        connection = http.client.HTTPConnection(urlsplit(proxy.endpoint).netloc)
        pieces = (DATA[i : i + 70_000] for i in range(0, len(DATA), 70_000))
        connection.request("POST", "/", pieces, {"Transfer-Encoding": "chunked"}, encode_chunked=True)
        return connection.getresponse().read()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Echo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with FaultyProxy(f"http://127.0.0.1:{server.server_port}") as proxy:
            assert exchange(None) == DATA
            assert _flipped_bits(exchange(Kind.FLIPPED_UP)) == 1
            assert _flipped_bits(exchange(Kind.FLIPPED_DOWN)) == 1
            with pytest.raises(http.client.IncompleteRead):
                exchange(Kind.TRUNCATED)
            with pytest.raises(OSError):
                exchange(Kind.RESET)
            with pytest.raises(OSError):
                exchange(Kind.RESET_AFTER)
            assert len(proxy.struck) == 5
        server.shutdown()


def test_the_servers_own_errors_come_through_unharmed(behind: Behind):
    behind.proxy.faults = _always(*set(Kind) - BEFORE)
    assert _code(lambda: behind.get("nothing")) == "NoSuchKey"
    assert _code(lambda: behind.client.head_object(Bucket=behind.bucket, Key="nothing")) == "404"
    behind.proxy.faults = ()
    behind.put("there")
    behind.proxy.faults = _always(Kind.ERROR_AFTER, Kind.RESET_AFTER)
    assert _code(lambda: behind.put("there", IfNoneMatch="*")) == "PreconditionFailed"
    assert not behind.proxy.struck


@pytest.mark.parametrize("kind", [Kind.ERROR, Kind.SLOW_DOWN, Kind.ERROR_AFTER])
def test_an_error_has_s3s_form_and_tells_nothing_of_what_the_server_did(
    kind: Kind, s3: S3Server, behind: Behind
):
    behind.proxy.faults = _always(kind)
    assert _code(lambda: behind.put("key")) in kind
    assert _code(lambda: behind.client.list_objects_v2(Bucket=behind.bucket)) in kind
    assert _code(lambda: behind.client.head_object(Bucket=behind.bucket, Key="x")) in (kind[:3], "404")
    assert ("Contents" in s3.client().list_objects_v2(Bucket=behind.bucket)) == (kind is Kind.ERROR_AFTER)
    assert behind.proxy.counts[kind] >= 2
    behind.proxy.faults = ()
    behind.put("key")  # the same client goes on


@pytest.mark.parametrize("kind", [Kind.RESET, Kind.RESET_AFTER])
def test_a_reset_ends_the_connection_before_or_after_the_server_did_it(
    kind: Kind, s3: S3Server, behind: Behind
):
    behind.proxy.faults = _always(kind)
    with pytest.raises(RESET):
        behind.put("key")
    assert ("Contents" in s3.client().list_objects_v2(Bucket=behind.bucket)) == (kind is Kind.RESET_AFTER)
    s3.client().put_object(Bucket=behind.bucket, Key="key", Body=DATA)
    with pytest.raises(RESET):
        behind.get("key")
    assert behind.proxy.struck == [(kind, f"{method} /{behind.bucket}/key") for method in ("PUT", "GET")]


def test_a_reset_is_an_rst_in_the_middle_of_the_body(s3: S3Server, behind: Behind):
    behind.put("key")
    behind.proxy.faults = _always(Kind.RESET_AFTER)
    url = urlsplit(
        behind.client.generate_presigned_url("get_object", Params={"Bucket": behind.bucket, "Key": "key"})
    )
    with socket.create_connection((url.hostname, url.port)) as connection:
        connection.sendall(f"GET {url.path}?{url.query} HTTP/1.1\r\nHost: {url.netloc}\r\n\r\n".encode())
        received = 0
        with pytest.raises(ConnectionResetError):
            while piece := connection.recv(MIB):
                received += len(piece)
        assert received < len(DATA)


def test_a_truncated_body_ends_before_its_content_length(behind: Behind):
    behind.put("key")
    behind.proxy.faults = _always(Kind.TRUNCATED)
    url = behind.client.generate_presigned_url("get_object", Params={"Bucket": behind.bucket, "Key": "key"})
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("GET", url)
    answer = connection.getresponse()
    assert answer.headers["Content-Length"] == str(len(DATA))
    with pytest.raises(http.client.IncompleteRead) as caught:
        answer.read()
    assert caught.value.partial == DATA[: len(DATA) // 2]
    assert behind.proxy.counts == {Kind.TRUNCATED: 1}


def test_one_bit_of_a_response_is_flipped(behind: Behind):
    behind.put("key")
    behind.proxy.faults = _always(Kind.FLIPPED_DOWN)
    assert _flipped_bits(behind.get("key")) == 1
    assert behind.proxy.struck == [(Kind.FLIPPED_DOWN, f"GET /{behind.bucket}/key")]


def test_one_bit_of_a_request_is_flipped(s3: S3Server, behind: Behind):
    behind.proxy.faults = _always(Kind.FLIPPED_UP)
    assert _code(lambda: behind.put("key")) in (
        "XAmzContentSHA256Mismatch",
        "BadDigest",
        "SignatureDoesNotMatch",
    )
    url = behind.client.generate_presigned_url("put_object", Params={"Bucket": behind.bucket, "Key": "key"})
    connection = http.client.HTTPConnection(urlsplit(url).netloc)
    connection.request("PUT", url, body=DATA)  # its body is not signed
    assert connection.getresponse().status == 200
    stored = s3.client().get_object(Bucket=behind.bucket, Key="key")["Body"].read()
    assert _flipped_bits(stored) == 1
    assert behind.proxy.counts == {Kind.FLIPPED_UP: 2}


def test_faults_strike_only_what_they_match_and_only_so_often(behind: Behind):
    behind.proxy.faults = (Fault(1.0, (Kind.SLOW_DOWN,), match=r"^PUT .*manifest\.json", at_most=2),)
    behind.put("other")
    for _ in range(2):
        assert _code(lambda: behind.put("manifest.json")) == "SlowDown"
    behind.put("manifest.json")
    assert behind.get("manifest.json") == DATA


def test_what_is_struck_follows_from_the_seed_and_the_number_of_the_request(s3: S3Server):
    bucket = s3.bucket()

    def struck(seed: int) -> list[Kind]:
        with FaultyProxy(s3.endpoint, Fault(0.3), seed=seed) as proxy:
            address = urlsplit(proxy.endpoint)
            for _ in range(60):
                try:
                    connection = http.client.HTTPConnection(address.netloc)
                    connection.request("GET", f"/{bucket}/nothing")
                    connection.getresponse().read()
                except (OSError, http.client.HTTPException):
                    pass
                finally:
                    connection.close()
            return [kind for kind, _ in proxy.struck]

    assert struck(1) == struck(1) != struck(2)


def test_a_client_that_dies_in_its_upload_leaves_nothing_behind(s3: S3Server, behind: Behind):
    address = urlsplit(behind.proxy.endpoint)
    url = urlsplit(
        behind.client.generate_presigned_url("put_object", Params={"Bucket": behind.bucket, "Key": "half"})
    )
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = f"PUT {url.path}?{url.query} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: 200000\r\n\r\n"
        connection.sendall(head.encode() + DATA[:100_000])
        time.sleep(0.1)
    assert "Contents" not in s3.client().list_objects_v2(Bucket=behind.bucket)
    behind.put("whole")


def test_it_carries_a_thousand_requests_in_seconds(behind: Behind):
    behind.put("key", DATA[:1000])
    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(behind.get, ["key"] * 1000)) == {DATA[:1000]}
    assert time.monotonic() - started < 10


def _flipped_bits(data: bytes) -> int:
    assert len(data) == len(DATA)
    return (int.from_bytes(data, "big") ^ int.from_bytes(DATA, "big")).bit_count()
