"""Files under an S3 prefix: the Storage of storage.py that trusts no answer it can check.

Endpoint, region and keys come from where boto3 looks: the environment (AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID, ...)
or ~/.aws/config. Two layers try again: boto3's adaptive mode, which also slows down when the server asks for it, and
`_attempts` here, with exponential backoff and full jitter, for what boto3 does not see: a body that is cut short, does
not have its checksum, or was damaged on its way up (Content-MD5 goes with every upload). Every object that is written
here carries its crc32c as metadata, and every whole object that is read is held against that, or against an ETag that
is an MD5. Ranges have no checksum of their own: whoever asks for one checks it.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import boto3
import botocore.config
import google_crc32c
import urllib3.exceptions
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)

from drwkv.s3_checksums import (
    CRC_KEY,
    DamagedTransferError,
    check_etag,
    check_length,
    check_whole,
    crc_of_file,
    md5_of_file,
)
from drwkv.storage import S3_SCHEME, DamagedError, StorageError, UnavailableError, no_space_is_named

log = logging.getLogger("drwkv")

PART_BYTES = 16 << 20  # of a ranged GET and of a multipart upload
MAX_PARTS = 10_000  # that S3 allows in one object
CONNECTIONS = 8  # parts of one object on their way at once
ATTEMPTS = 8  # of one request, beyond those that boto3 makes
BACKOFF_SEC, MAX_BACKOFF_SEC = 0.1, 20.0  # the n-th wait is uniform in [0, min(MAX, BACKOFF 2^n)]

# What a user must mend; all else is tried again.
_REFUSALS = {
    "NoSuchBucket": "there is no such bucket{at}: create it, or correct the path",
    "InvalidBucketName": "no name that a bucket can have: correct the path",
    "AccessDenied": "access denied{at}: the key in use has no right to {operation} here",
    "403": "access denied{at}: the key in use has no right to {operation} here, or is wrong",
    "InvalidAccessKeyId": "the key id is not known{at}: check AWS_ACCESS_KEY_ID or the profile",
    "SignatureDoesNotMatch": "the secret key is wrong{at}: check AWS_SECRET_ACCESS_KEY or the profile",
    "ExpiredToken": "the session's token has expired{at}: log in again",
    "InvalidToken": "the session's token is not valid{at}: log in again",
    "EntityTooLarge": "too large for this store{at}",
    "QuotaExceeded": "the quota is used up{at}: free some space and run the same command again",
    "PermanentRedirect": "the bucket is in another region{at}: set AWS_DEFAULT_REGION",
}  # fmt: skip
# Other answers of 4xx are refusals too, but for these, which time or another attempt may mend.
_PASSING = {"408", "409", "425", "429", "RequestTimeout", "SlowDown", "Throttling", "ThrottlingException",
            "TooManyRequests", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "OperationAborted",
            "ConditionalRequestConflict"}  # fmt: skip
_DAMAGED_ATTEMPTS = 3  # of what an upload damaged on its way may also look like: a wrong signature, bad XML
_MISSING = {"NoSuchKey", "404", "NotFound"}
_THERE_ALREADY = {"PreconditionFailed", "412"}

_BEFORE_THE_BODY = {"NoSuchBucket", "InvalidBucketName", "AccessDenied", "403", "InvalidAccessKeyId"}

T = TypeVar("T")


@functools.lru_cache(maxsize=1)
def _client(process: int) -> Any:
    """One client a process, safe from any thread; a fork makes its own, for sockets must not be shared."""
    config = botocore.config.Config(
        retries={"mode": "adaptive", "total_max_attempts": 4},
        connect_timeout=10,
        read_timeout=20,  # of silence; a part in the making is never silent for so long
        max_pool_connections=8 * CONNECTIONS,
        # Content-MD5 and our own checksum do this job, also on servers that ignore the newer headers.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.session.Session().client("s3", config=config)


class S3Storage:
    """The objects under `s3://bucket/prefix`; safe from any thread and after a fork."""

    def __init__(self, path: str) -> None:
        place = path.removeprefix(S3_SCHEME).rstrip("/")
        self.path = S3_SCHEME + place
        self.bucket, _, self._prefix = place.partition("/")
        if not self.bucket:
            raise ValueError(f"{path}: no bucket is named; give s3://bucket/prefix")

    def where(self, name: str) -> str:
        return f"{self.path}/{name}"

    def read(self, name: str) -> bytes:
        def get() -> bytes:
            answer = self._call("get_object", name)
            data: bytes = answer["Body"].read()
            check_length(data, answer["ContentLength"])
            check_whole(answer, google_crc32c.value(data), lambda: hashlib.md5(data).hexdigest())
            return data

        return self._attempts("read", name, get)

    def read_range(self, name: str, start: int, size: int) -> bytes:
        if size <= 0:
            return b""

        def get() -> bytes:
            try:
                answer = self._call("get_object", name, Range=f"bytes={start}-{start + size - 1}")
            except ClientError as error:
                if _code(error) in ("InvalidRange", "416"):
                    return b""
                raise
            data: bytes = answer["Body"].read()
            check_length(data, answer["ContentLength"])
            return data

        return self._attempts("read", name, get)

    def size(self, name: str) -> int:
        return int(self._head(name)["ContentLength"])

    def exists(self, name: str) -> bool:
        try:
            self._head(name)
        except FileNotFoundError:
            return False
        return True

    def names(self, prefix: str = "", *, settled: bool = True) -> list[str]:
        return sorted(self.sizes(prefix, settled=settled))

    def sizes(self, prefix: str = "", *, settled: bool = True) -> dict[str, int]:
        """Name -> bytes of all that `names` lists, in one request for a thousand."""

        # A list has no checksum: it is right when two are the same.
        def twice() -> dict[str, int]:
            first, second = self._list(prefix), self._list(prefix)
            if not settled:
                return {name: second[name] for name in first.keys() & second.keys()}
            if first != second:
                raise DamagedTransferError("two lists of the same prefix differ")
            return first

        return self._attempts("list", prefix, twice)

    def write(self, name: str, data: bytes) -> None:
        self._attempts("write", name, lambda: self._put(name, data))

    def write_new(self, name: str, data: bytes) -> bool:
        def put() -> bool:
            try:
                self._put(name, data, IfNoneMatch="*")
            except ClientError as error:
                if _code(error) not in _THERE_ALREADY:
                    raise
                # An attempt before this one, also one inside boto3, may have come through and lost its answer.
                try:
                    return self.read(name) == data
                except FileNotFoundError:
                    raise DamagedTransferError("it was there and is gone again") from None
            return True

        return self._attempts("write", name, put)

    def upload(self, name: str, file: Path) -> None:
        size = file.stat().st_size
        if size <= PART_BYTES:
            self.write(name, file.read_bytes())
        else:
            self._attempts("write", name, lambda: self._upload_parts(name, file, size))
        file.unlink()

    def download(self, name: str, file: Path) -> None:
        def fetch() -> None:
            head = self._head(name)
            size = int(head["ContentLength"])
            with no_space_is_named(str(file)), open(file, "wb") as target:
                target.truncate(size)
                for start, data in self.read_parts(name, size):
                    target.seek(start)
                    target.write(data)
            check_whole(head, crc_of_file(file), lambda: md5_of_file(file))

        self._attempts("read", name, fetch)

    def read_parts(self, name: str, size: int) -> Iterator[tuple[int, bytes]]:
        """(start, bytes) of the first `size` bytes in ranged GETs, some at once, in order."""

        def part(start: int) -> tuple[int, bytes]:
            data = self.read_range(name, start, min(PART_BYTES, size - start))
            if len(data) != min(PART_BYTES, size - start):
                raise DamagedTransferError(f"{len(data)} bytes at {start}, expected more")
            return start, data

        starts = range(0, size, PART_BYTES)
        pool = ThreadPoolExecutor(min(CONNECTIONS, max(len(starts), 1)), "drwkv-s3")
        try:
            # No more than twice the connections' parts wait in memory.
            waiting = [pool.submit(part, start) for start in starts[: 2 * CONNECTIONS]]
            for i in range(len(starts)):
                yield waiting.pop(0).result()
                if i + 2 * CONNECTIONS < len(starts):
                    waiting.append(pool.submit(part, starts[i + 2 * CONNECTIONS]))
        finally:
            pool.shutdown(cancel_futures=True)

    def remove(self, name: str) -> None:
        self._attempts("remove", name, lambda: self._call("delete_object", name))

    def _put(self, name: str, data: bytes, **condition: str) -> None:
        md5 = hashlib.md5(data)
        answer = self._call(
            "put_object",
            name,
            Body=data,
            ContentMD5=base64.b64encode(md5.digest()).decode(),
            Metadata={CRC_KEY: f"{google_crc32c.value(data):08x}"},
            **condition,
        )
        check_etag(answer, md5.hexdigest())

    def _upload_parts(self, name: str, file: Path, size: int) -> None:
        part_bytes = max(PART_BYTES, -(-size // MAX_PARTS))
        crc = {CRC_KEY: f"{crc_of_file(file):08x}"}
        upload = self._call("create_multipart_upload", name, Metadata=crc)["UploadId"]

        def put(start: int) -> tuple[int, str, bytes]:
            with open(file, "rb") as source:
                data = os.pread(source.fileno(), part_bytes, start)
            number, md5 = start // part_bytes + 1, hashlib.md5(data)
            content_md5 = base64.b64encode(md5.digest()).decode()

            def once() -> str:
                answer = self._call(
                    "upload_part", name, UploadId=upload, PartNumber=number, Body=data, ContentMD5=content_md5
                )
                check_etag(answer, md5.hexdigest())
                return str(answer["ETag"])

            # An upload whose id was damaged on its way to us is not known, and all of it begins again.
            return number, self._attempts("write", name, once, passed_on=("NoSuchUpload",)), md5.digest()

        try:
            with ThreadPoolExecutor(CONNECTIONS, "drwkv-s3") as pool:
                parts = list(pool.map(put, range(0, size, part_bytes)))
            listed = [{"PartNumber": number, "ETag": etag} for number, etag, _ in parts]
            self._call("complete_multipart_upload", name, UploadId=upload, MultipartUpload={"Parts": listed})
        except BaseException:
            self._abort(name, upload)
            raise
        # The answer to the completion is XML without a checksum: look at what is there.
        whole = hashlib.md5(b"".join(digest for _, _, digest in parts)).hexdigest()
        head = self._head(name)
        if int(head["ContentLength"]) != size or head["Metadata"].get(CRC_KEY) != crc[CRC_KEY]:
            raise DamagedTransferError(f"the object that was put together has {head['ContentLength']} bytes")
        check_etag(head, f"{whole}-{len(parts)}")

    def clean_up(self) -> None:
        top = f"{self._prefix}/" if self._prefix else ""
        pages = _client(os.getpid()).get_paginator("list_multipart_uploads")
        try:
            for page in pages.paginate(Bucket=self.bucket, Prefix=top):
                for upload in page.get("Uploads", ()):
                    self._abort(upload["Key"].removeprefix(top), upload["UploadId"])
        except (ClientError, BotoCoreError) as error:
            log.warning("%s: unfinished uploads could not be listed: %s", self.path, error)

    def _abort(self, name: str, upload: str) -> None:
        """Parts of a failed upload cost their space until they are given up; a failure here changes nothing."""
        try:
            self._call("abort_multipart_upload", name, UploadId=upload)
        except (ClientError, BotoCoreError) as error:
            log.warning("%s: parts of a failed upload could not be removed: %s", self.where(name), error)

    def _head(self, name: str) -> dict[str, Any]:
        def head() -> dict[str, Any]:
            try:
                answer: dict[str, Any] = self._call("head_object", name)
            except ClientError as error:
                if not (code := _code(error)).isdigit() or code.startswith("5"):
                    raise
                # Only the answer to a GET has a body that says what is wrong: the object, the bucket or the key.
                self._call("get_object", name, Range="bytes=0-0")
                raise DamagedTransferError(f"HEAD is answered by {code}, GET is not") from None
            return answer

        return self._attempts("read", name, head)

    def _list(self, prefix: str) -> dict[str, int]:
        top = f"{self._prefix}/" if self._prefix else ""
        pages = _client(os.getpid()).get_paginator("list_objects_v2")
        sizes = {
            entry["Key"]: int(entry["Size"])
            for page in pages.paginate(Bucket=self.bucket, Prefix=top + prefix)
            for entry in page.get("Contents", ())
        }
        # A name that ends in a slash is a folder of some browser's.
        return {key.removeprefix(top): size for key, size in sizes.items() if not key.endswith("/")}

    def _call(self, operation: str, name: str, **options: Any) -> Any:
        key = f"{self._prefix}/{name}" if self._prefix else name
        return getattr(_client(os.getpid()), operation)(Bucket=self.bucket, Key=key, **options)

    def _attempts(
        self, verb: str, name: str, request: Callable[[], T], *, passed_on: Sequence[str] = ()
    ) -> T:
        """Make the request until it succeeds or ATTEMPTS are used up, and say what is wrong in one line.

        FileNotFoundError for a name that is not there, StorageError for the rest; error codes in `passed_on` are
        for the caller's own attempts.
        """
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(random.uniform(0, min(MAX_BACKOFF_SEC, BACKOFF_SEC * 2**attempt)))
            try:
                return request()
            except ClientError as error:
                code = _code(error)
                if code in passed_on:
                    raise
                if code in _MISSING:
                    raise FileNotFoundError(f"{self.where(name)} is not there") from None
                problem = f"{code}: {error.response.get('Error', {}).get('Message', '')}"
                in_vain = code in _REFUSALS or (_status(error) // 100 == 4 and code not in _PASSING)
                maybe_damaged = verb == "write" and attempt + 1 < _DAMAGED_ATTEMPTS
                if in_vain and not (maybe_damaged and code not in _BEFORE_THE_BODY):
                    raise StorageError(self._refusal(verb, name, code, problem)) from None
            except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
                raise StorageError(
                    f"{self.where(name)}: no usable key ({error}): set AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY, or a profile"
                ) from None
            except ParamValidationError as error:
                raise StorageError(f"{self.where(name)}: {' '.join(str(error).split())}") from None
            except (BotoCoreError, urllib3.exceptions.HTTPError, DamagedTransferError, OSError) as error:
                if isinstance(error, (FileNotFoundError, PermissionError)):
                    raise
                if isinstance(error, DamagedTransferError) and verb == "read" and attempt + 1 == ATTEMPTS:
                    raise DamagedError(
                        f"{self.where(name)}: what came was damaged in {ATTEMPTS} attempts, the last time {error}; "
                        "if that goes on, the object itself is: restore it"
                    ) from None
                problem = f"{type(error).__name__}: {error}"
                if isinstance(error, EndpointConnectionError) and attempt >= 2:
                    break
            log.debug("%s: attempt %d to %s it failed: %s", self.where(name), attempt + 1, verb, problem)
        raise UnavailableError(
            f"{self.where(name)}: cannot {verb} it after {attempt + 1} attempts, the last ended with {problem}; "
            "run the same command again when the store answers"
        )

    def _refusal(self, verb: str, name: str, code: str, problem: str) -> str:
        at = f" at {_client(os.getpid()).meta.endpoint_url}"
        missing_bucket = code in ("NoSuchBucket", "InvalidBucketName")
        where = f"{S3_SCHEME}{self.bucket}" if missing_bucket else self.where(name)
        if code in _REFUSALS:
            return f"{where}: {_REFUSALS[code].format(at=at, operation=verb)}"
        return f"{where}: the store refuses to {verb} it{at}: {problem}"


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
