"""Where checkpoints lie: `step_N` in a folder or under an S3 prefix, behind one interface. The mark is the commit.

In a folder: files into `step_N.tmp`, the folder renamed to `step_N`, then the mark COMPLETE. On S3, without rename:
objects `step_N/FILE`, then the mark. What has no mark is no checkpoint. The mark lists all files with size and crc32c.
Here are the interface and the folder; checkpoint_s3.py is the other half. What stands in the files is
checkpoint_files.py's, when they are written checkpoint.py's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import google_crc32c

from drwkv.files import sync
from drwkv.storage import is_remote, no_space_is_named

log = logging.getLogger("drwkv")
Place = Path | str  # of a checkpoint, or of a folder of them: a path, or s3://bucket/prefix as text
MARK = "COMPLETE"
SCALARS = "state.json"
DAMAGED = "damaged_"  # begin of the name of a checkpoint that is kept to be looked at
READ_BYTES = 16 << 20


@dataclass(frozen=True)
class Written:
    """One file as it was written."""

    num_bytes: int
    crc32c: str  # of all bytes, in hexadecimal


class Store(Protocol):
    """Checkpoints by their names, `step_N`. Raises OSError or StorageError."""

    is_remote: bool  # whether files must be fetched before they can be read

    def place(self, name: str) -> Place:
        """Where a checkpoint lies, for people and for `open_place`."""

    def whole(self) -> list[str]:
        """Those that are marked and have every file at its size, oldest first."""

    def is_whole(self, name: str) -> bool:
        """Whether `whole` would list it."""

    def damaged(self) -> list[str]:
        """Those that were set aside."""

    def read(self, name: str, file: str) -> bytes:
        """One small file of a checkpoint."""

    def clean_up(self) -> None:
        """Take away what killed saves left, and set aside what is marked and not whole; for one process, while none
        saves.
        """

    def set_aside(self, name: str) -> None:
        """Keep a damaged checkpoint to be looked at, where `whole` does not see it."""

    def remove(self, name: str) -> None:
        """Take a checkpoint away, its mark first."""

    def writing(self, name: str, num_bytes: int) -> contextlib.AbstractContextManager[Path]:
        """The folder on this machine into which this process writes `num_bytes` of a new checkpoint."""

    def put(self, name: str, file: Path) -> None:
        """Bring a file that was written there to its place."""

    def commit(self, name: str, scalars: bytes, files: Mapping[str, Written]) -> None:
        """Write state.json and the mark, once every process has put its `files`; for one process alone."""

    def abandon(self, name: str) -> None:
        """Give back the space of a save that failed, as far as that is quickly done."""

    def files(self, name: str) -> list[str]:
        """The files that the mark lists."""

    def fetch(self, name: str, files: Iterable[str]) -> list[str]:
        """Have files of a checkpoint on this machine, until `release`; returns what is damaged of them."""

    def local(self, name: str) -> Path | None:
        """The folder in which the files lie on this machine; None for a process that fetched none."""

    def release(self) -> None:
        """Remove what was fetched."""


def open_store(path: Place, temporary: str | None = None) -> Store:
    """The checkpoints in a folder or under `s3://bucket/prefix`; `temporary` is where files wait on their way to S3."""
    if is_remote(path):
        from drwkv.training.checkpoint_s3 import S3Store  # boto3 takes a moment, and most runs are local

        return S3Store(str(path), temporary)
    return FolderStore(Path(path))


def open_place(checkpoint: Place) -> tuple[Store, str]:
    """The store that a checkpoint lies in, and its name there."""
    if is_remote(checkpoint):
        prefix, _, name = str(checkpoint).rstrip("/").rpartition("/")
        return open_store(prefix), name
    return open_store(Path(checkpoint).parent), Path(checkpoint).name


def step_of(checkpoint: Place) -> int:
    """The number of optimizer steps that a checkpoint's name says."""
    return int(str(checkpoint).rstrip("/").rpartition("/")[2].removeprefix("step_").split(".")[0])


class FolderStore:
    """Checkpoints in a folder that all processes see."""

    is_remote = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def place(self, name: str) -> Path:
        return self.path / name

    def whole(self) -> list[str]:
        return sorted((p.name for p in self.path.glob("step_*") if self.is_whole(p.name)), key=step_of)

    def is_whole(self, name: str) -> bool:
        folder = self.path / name
        try:
            sizes = self._mark(name)["files"]
            return all((folder / file).stat().st_size == size for file, size in sizes.items())
        except FileNotFoundError:
            return False
        except (ValueError, AttributeError, TypeError, KeyError, OSError) as error:
            log.warning("checkpoint %s: its mark is not readable (%s): taken as not whole", folder, error)
            return False

    def damaged(self) -> list[str]:
        return sorted(path.name for path in self.path.glob(f"{DAMAGED}*"))

    def read(self, name: str, file: str) -> bytes:
        return (self.path / name / file).read_bytes()

    def clean_up(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in [p for p in self.path.glob("step_*") if not self.is_whole(p.name)]:
            if (leftover / MARK).exists():
                log.warning("checkpoint %s is damaged: set aside as damaged_%s", leftover, leftover.name)
                self.set_aside(leftover.name)
            else:
                log.warning("checkpoint %s was never finished: removed", leftover)
                shutil.rmtree(leftover)

    def set_aside(self, name: str) -> None:
        os.replace(self.path / name, self.path / f"{DAMAGED}{time.time_ns()}_{name}")

    def remove(self, name: str) -> None:
        (self.path / name / MARK).unlink()
        shutil.rmtree(self.path / name)

    @contextlib.contextmanager
    def writing(self, name: str, num_bytes: int) -> Iterator[Path]:
        folder = self.path / f"{name}.tmp"
        with no_space_is_named(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            yield folder

    def put(self, name: str, file: Path) -> None:
        with no_space_is_named(str(file)):
            sync(file)

    def commit(self, name: str, scalars: bytes, files: Mapping[str, Written]) -> None:
        temporary, final = self.path / f"{name}.tmp", self.path / name
        with no_space_is_named(str(temporary)):
            (temporary / SCALARS).write_bytes(scalars)
            sync(temporary / SCALARS)
            found = {path.name: path.stat().st_size for path in temporary.iterdir()}
            check_sizes(str(temporary), found, mark := mark_of(scalars, files))
            if final.exists():
                self.set_aside(name)  # it is not whole, or this save would not be
            os.rename(temporary, final)
            new_mark = final / f"{MARK}.tmp"
            new_mark.write_text(json.dumps(mark, indent=1))
            sync(new_mark)
            os.rename(new_mark, final / MARK)
            sync(final)
            sync(self.path)

    def abandon(self, name: str) -> None:
        shutil.rmtree(self.path / f"{name}.tmp", ignore_errors=True)

    def files(self, name: str) -> list[str]:
        return sorted(self._mark(name)["files"])

    def fetch(self, name: str, files: Iterable[str]) -> list[str]:
        problems = []
        try:
            checksums = self._mark(name).get("crc32c", {})
            for file in files:
                if file in checksums and (crc := crc_of(self.path / name / file)) != checksums[file]:
                    problems.append(f"{file} has crc32c {crc}, saved was {checksums[file]}")
        except OSError as error:
            problems.append(str(error))
        return problems

    def local(self, name: str) -> Path:
        return self.path / name

    def release(self) -> None:
        pass

    def _mark(self, name: str) -> dict[str, Any]:
        return json.loads(self.read(name, MARK))


def mark_of(scalars: bytes, files: Mapping[str, Written]) -> dict[str, Any]:
    """What the mark of a checkpoint says: all its files, state.json among them."""
    crc = f"{google_crc32c.value(scalars):08x}"
    all_files = {**files, SCALARS: Written(len(scalars), crc)}
    return {
        "files": {name: all_files[name].num_bytes for name in sorted(all_files)},
        "crc32c": {name: all_files[name].crc32c for name in sorted(all_files)},
        "saved_at": time.time(),
    }


def check_sizes(where: str, found: Mapping[str, int], mark: Mapping[str, Any]) -> None:
    """OSError unless what lies there is what the mark is to list."""
    if found != mark["files"]:
        odd = sorted(dict(found.items() ^ mark["files"].items()))[0]
        raise OSError(
            f"{where}/{odd} has {found.get(odd)} bytes, written were {mark['files'].get(odd)}: not marked whole"
        )


def crc_of(path: Path) -> str:
    """crc32c of a file's bytes, in hexadecimal."""
    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            checksum.update(data)
    return checksum.digest().hex()
