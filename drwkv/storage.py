"""Files by name in a folder or under an S3 prefix, behind one interface, each there whole or not at all.

    storage = open_storage("s3://bucket/prefix")   # or a folder
    storage.write("manifest.json", data)

Here are the interface and the folder; s3.py is the other half, imported when first asked for. What stands in the
files is their writers' business.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from drwkv.files import sync

S3_SCHEME = "s3://"
TEMPORARY = ".tmp"  # folder for files that are not whole yet
_FOLDER_ATTEMPTS = 5  # to write a file into a folder that others tidy up meanwhile


class StorageError(ValueError):
    """What a user can mend: no such bucket, access denied, no space left; one line that names the place."""


class NoSpaceError(StorageError):
    """The disk that is written to is full."""


class UnavailableError(StorageError):
    """The store does not answer, or only with errors; it may do so again later."""


class DamagedError(StorageError):
    """What the store holds is not what its own checksum says, however often it is read."""


class Storage(Protocol):
    """Names are relative, with `/` between their parts. FileNotFoundError where a name that is read is not there."""

    path: str  # the folder or s3://bucket/prefix, as the user gave it, without a slash at its end

    def where(self, name: str) -> str:
        """The whole path of a name, for people."""

    def read(self, name: str) -> bytes:
        """The whole file; checked against the store's checksum where it has one."""

    def read_range(self, name: str, start: int, size: int) -> bytes:
        """Bytes [start, start + size), fewer where the file ends before. What was read is the caller's to check."""

    def size(self, name: str) -> int:
        """Bytes of the file."""

    def exists(self, name: str) -> bool:
        """Whether the file is there."""

    def names(self, prefix: str = "", *, settled: bool = True) -> list[str]:
        """All files whose names start with `prefix`, sorted; no temporary ones.

        settled False: others write or remove such files meanwhile; those that were there all the time are right.
        """

    def write(self, name: str, data: bytes) -> None:
        """Write the file whole, over what was there."""

    def write_new(self, name: str, data: bytes) -> bool:
        """Write the file unless it is there already; whether it holds `data` now.

        Of any number of writers at once with different data, one gets True.
        """

    def upload(self, name: str, file: Path) -> None:
        """Put a local file in place whole, over what was there; `file` is moved, not copied."""

    def download(self, name: str, file: Path) -> None:
        """Copy to a local file, whole; checked against the store's checksum where it has one."""

    def remove(self, name: str) -> None:
        """Take the file away; no error if it is not there."""

    def clean_up(self) -> None:
        """Take away what killed writers left half done; for when nobody writes here any more."""


@functools.lru_cache(maxsize=64)
def _open_storage(path: str, process: int) -> Storage:
    if path.startswith(S3_SCHEME):
        from drwkv.s3 import S3Storage  # boto3 takes a moment, and most runs are local

        return S3Storage(path)
    return FolderStorage(path)


def open_storage(path: str | os.PathLike[str]) -> Storage:
    """The storage at a folder or `s3://bucket/prefix`; nothing is read or made yet.

    ValueError for a scheme that is neither.
    """
    path = os.fspath(path)
    if "://" in path and not path.startswith(S3_SCHEME):
        raise ValueError(f"{path}: only folders and s3://bucket/prefix can be opened")
    scheme, rest = (S3_SCHEME, path[len(S3_SCHEME) :]) if is_remote(path) else ("", path)
    return _open_storage(scheme + (rest.rstrip("/") or ("" if scheme else "/")), os.getpid())


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path lies on S3."""
    return os.fspath(path).startswith(S3_SCHEME)


def split_path(path: str | os.PathLike[str]) -> tuple[str, str]:
    """(folder or prefix, name) of one file's path."""
    folder, _, name = os.fspath(path).rpartition("/")
    return folder or ("/" if os.fspath(path).startswith("/") else "."), name


class FolderStorage:
    """A folder of this machine or of a file system that several share."""

    def __init__(self, path: str) -> None:
        self.path = path

    def where(self, name: str) -> str:
        return os.path.join(self.path, name)

    def read(self, name: str) -> bytes:
        return Path(self.where(name)).read_bytes()

    def read_range(self, name: str, start: int, size: int) -> bytes:
        file = os.open(self.where(name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(file, size, start)
        finally:
            os.close(file)

    def size(self, name: str) -> int:
        return os.stat(self.where(name)).st_size

    def exists(self, name: str) -> bool:
        return os.path.exists(self.where(name))

    def names(self, prefix: str = "", *, settled: bool = True) -> list[str]:
        found = []
        top = str(PurePosixPath(prefix).parent) if "/" in prefix else ""
        for folder, folders, files in os.walk(os.path.join(self.path, top), followlinks=True):
            folders[:] = [name for name in folders if name != TEMPORARY and not _leads_back(folder, name)]
            relative = os.path.relpath(folder, self.path)
            found += [os.path.normpath(os.path.join(relative, name)) for name in files]
        return sorted(name for name in found if name.startswith(prefix))

    def write(self, name: str, data: bytes) -> None:
        self._write(name, data)

    def write_new(self, name: str, data: bytes) -> bool:
        while True:
            with contextlib.suppress(FileExistsError):
                if not self.exists(name):
                    self._write(name, data, new=True)
                    return True
            with contextlib.suppress(FileNotFoundError):  # somebody has just removed it
                return self.read(name) == data

    def upload(self, name: str, file: Path) -> None:
        target = Path(self.where(name))
        with no_space_is_named(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            if os.stat(file).st_dev == os.stat(target.parent).st_dev:
                with open(file, "rb") as stream:
                    os.fsync(stream.fileno())
                os.replace(file, target)
                sync(target.parent)
                return
            with open(file, "rb") as stream, self._whole(name) as whole:
                shutil.copyfileobj(stream, whole, 1 << 24)
            file.unlink()

    def download(self, name: str, file: Path) -> None:
        shutil.copyfile(self.where(name), file)

    def remove(self, name: str) -> None:
        Path(self.where(name)).unlink(missing_ok=True)

    def clean_up(self) -> None:
        shutil.rmtree(os.path.join(self.path, TEMPORARY), ignore_errors=True)

    def temporary(self, name: str) -> Path:
        """A path of this process and thread alone, on the folder's own file system; its folder exists."""
        owner = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
        path = Path(self.path) / TEMPORARY / f"{name.replace('/', '_')}.{owner}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _write(self, name: str, data: bytes, *, new: bool = False) -> None:
        for attempts_left in reversed(range(_FOLDER_ATTEMPTS)):
            try:
                with self._whole(name, new=new) as file:
                    file.write(data)
                return
            except FileNotFoundError:  # somebody has just removed the folder
                if not attempts_left:
                    raise

    @contextlib.contextmanager
    def _whole(self, name: str, *, new: bool = False) -> Iterator[IO[bytes]]:
        target = Path(self.where(name))
        with no_space_is_named(str(target)):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.temporary(name)
            try:
                with open(temporary, "wb") as file:
                    yield file
                    file.flush()
                    os.fsync(file.fileno())
                if new:
                    os.link(temporary, target)
                else:
                    os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            sync(target.parent)


def _leads_back(folder: str, name: str) -> bool:
    """Whether a link goes to a folder that holds it, and walking it would never end."""
    path = os.path.join(folder, name)
    return os.path.islink(path) and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(path))


@contextlib.contextmanager
def no_space_is_named(where: str) -> Iterator[None]:
    """Turn a full disk, met while writing `where`, into a NoSpaceError that says so."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"{where}: cannot be written: {error.strerror}; free some space and run the same command again"
            ) from None
        raise
