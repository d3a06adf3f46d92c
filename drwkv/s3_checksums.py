"""Whether what S3 gave, or took, is what was meant: lengths, the crc32c that we store beside each object, and ETags.

Requests, and what is tried again, are s3.py's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c

CRC_KEY = "crc32c"  # of the object's metadata
READ_BYTES = 8 << 20


class DamagedTransferError(Exception):
    """Bytes that are not what was sent; tried again, and only then a StorageError."""


def check_length(data: bytes, expected: int) -> None:
    """DamagedTransferError unless so many bytes came."""
    if len(data) != expected:
        raise DamagedTransferError(f"{len(data)} of {expected} bytes came")


def check_whole(answer: dict[str, Any], crc: int, md5: Callable[[], str]) -> None:
    """Hold a whole object against its metadata's crc32c, or against the ETag of a plain PUT."""
    expected = answer.get("Metadata", {}).get(CRC_KEY)
    if expected is not None:
        if f"{crc:08x}" != expected:
            raise DamagedTransferError(f"crc32c is {crc:08x}, expected {expected}")
    elif _is_md5(answer) and answer["ETag"].strip('"') != (found := md5()):
        raise DamagedTransferError(f"MD5 is {found}, expected {answer['ETag']}")


def check_etag(answer: dict[str, Any], md5: str) -> None:
    """Hold the ETag of what was written against its MD5, on stores whose ETag is that."""
    etag = str(answer.get("ETag", "")).strip('"')
    if ("-" in md5) == ("-" in etag) and len(etag) == len(md5) and _is_md5(answer, etag) and etag != md5:
        raise DamagedTransferError(f"the store has MD5 {etag}, sent was {md5}")


def _is_md5(answer: dict[str, Any], etag: str | None = None) -> bool:
    etag = str(answer.get("ETag", "")).strip('"') if etag is None else etag.partition("-")[0]
    encrypted = answer.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in answer
    return not encrypted and len(etag) == 32 and all(c in "0123456789abcdef" for c in etag)


def crc_of_file(path: Path) -> int:
    """The crc32c of a file."""
    crc = google_crc32c.Checksum()
    with open(path, "rb") as file:
        for data in iter(lambda: file.read(READ_BYTES), b""):
            crc.update(data)
    return int.from_bytes(crc.digest(), "big")


def md5_of_file(path: Path) -> str:
    """The MD5 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()
