"""Checkpoints on S3: the store of checkpoint_store.py whose commit is the mark, the last object that is written.

Files wait in a folder of the node on their way there and back. A checkpoint that is found damaged stays where it is and
has its mark COMPLETE turned into DAMAGED, until its step is saved again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from drwkv.s3 import S3Storage
from drwkv.scratch import Scratch
from drwkv.storage import DamagedError, no_space_is_named
from drwkv.training.checkpoint_store import MARK, SCALARS, Written, check_sizes, crc_of, mark_of, step_of

log = logging.getLogger("drwkv")
SET_ASIDE = "DAMAGED"  # the mark of a checkpoint that is kept to be looked at


class S3Store:
    """Checkpoints under `s3://bucket/prefix`; `temporary` is where files wait, None: the system's temporary folder."""

    is_remote = True

    def __init__(self, path: str, temporary: str | None) -> None:
        self._storage = S3Storage(path)
        self.path, self._temporary = self._storage.path, temporary
        self._fetched: Scratch | None = None

    def place(self, name: str) -> str:
        return f"{self.path}/{name}"

    def whole(self) -> list[str]:
        return [name for name, sizes in self._steps().items() if self._is_whole(name, sizes)]

    def is_whole(self, name: str) -> bool:
        return self._is_whole(name, self._steps(name).get(name, {}))

    def damaged(self) -> list[str]:
        return [name for name, sizes in self._steps().items() if SET_ASIDE in sizes and MARK not in sizes]

    def read(self, name: str, file: str) -> bytes:
        return self._storage.read(f"{name}/{file}")

    def clean_up(self) -> None:
        self._storage.clean_up()
        for name, sizes in self._steps().items():
            if self._is_whole(name, sizes):
                continue
            if MARK in sizes:
                log.warning("checkpoint %s is damaged: its mark is now %s", self.place(name), SET_ASIDE)
                self.set_aside(name)
            elif SET_ASIDE not in sizes:
                log.warning("checkpoint %s was never finished: removed", self.place(name))
                self._remove_files(name, sizes)

    def set_aside(self, name: str) -> None:
        self._storage.write(f"{name}/{SET_ASIDE}", json.dumps({"set_aside_at": time.time()}).encode())
        self._storage.remove(f"{name}/{MARK}")

    def remove(self, name: str) -> None:
        self._storage.remove(f"{name}/{MARK}")
        self._remove_files(name, self._steps(name).get(name, {}))

    @contextlib.contextmanager
    def writing(self, name: str, num_bytes: int) -> Iterator[Path]:
        scratch = Scratch(self._temporary)
        try:
            scratch.require_free(num_bytes, key="checkpoint.temporary")
            with no_space_is_named(str(scratch.path)):
                yield scratch.path
        finally:
            scratch.close()

    def put(self, name: str, file: Path) -> None:
        self._storage.upload(f"{name}/{file.name}", file)

    def commit(self, name: str, scalars: bytes, files: Mapping[str, Written]) -> None:
        mark = mark_of(scalars, files)
        found = self._steps(name).get(name, {})
        # A damaged checkpoint that was set aside, or a save by more ranks, may have left others of this step.
        self._remove_files(name, found.keys() - files.keys())
        self._storage.write(f"{name}/{SCALARS}", scalars)
        found = {file: size for file, size in found.items() if file in files} | {SCALARS: len(scalars)}
        check_sizes(self.place(name), found, mark)
        self._storage.write(f"{name}/{MARK}", json.dumps(mark, indent=1).encode())

    def abandon(self, name: str) -> None:
        """A store that has just failed is not asked for more: the next start takes away what has no mark."""

    def files(self, name: str) -> list[str]:
        return sorted(self._mark(name)["files"])

    def fetch(self, name: str, files: Iterable[str]) -> list[str]:
        self.release()
        self._fetched = Scratch(self._temporary)
        problems = []
        try:
            mark = self._mark(name)
            files = list(files)
            self._fetched.require_free(
                sum(mark["files"][file] for file in files), key="checkpoint.temporary, or TMPDIR,"
            )
            for file in files:
                target = self._fetched.path / file
                self._storage.download(f"{name}/{file}", target)
                if (crc := crc_of(target)) != mark["crc32c"][file]:
                    problems.append(f"{file} has crc32c {crc}, saved was {mark['crc32c'][file]}")
        except (FileNotFoundError, DamagedError) as error:
            problems.append(str(error))
        return problems

    def local(self, name: str) -> Path | None:
        return self._fetched.path if self._fetched else None

    def release(self) -> None:
        if self._fetched is not None:
            self._fetched.close()
            self._fetched = None

    def _mark(self, name: str) -> dict[str, Any]:
        return json.loads(self.read(name, MARK))

    def _steps(self, name: str = "step_") -> dict[str, dict[str, int]]:
        """Name -> file -> bytes, of all checkpoints, whole or not, oldest first."""
        found: dict[str, dict[str, int]] = {}
        for key, size in self._storage.sizes(name).items():
            step, _, file = key.partition("/")
            if file and step.removeprefix("step_").isdecimal():
                found.setdefault(step, {})[file] = size
        return dict(sorted(found.items(), key=lambda item: step_of(item[0])))

    def _is_whole(self, name: str, sizes: Mapping[str, int]) -> bool:
        if MARK not in sizes:
            return False
        try:
            return all(sizes.get(file) == size for file, size in self._mark(name)["files"].items())
        except FileNotFoundError:
            return False
        except (
            DamagedError,
            json.JSONDecodeError,
            UnicodeDecodeError,
            AttributeError,
            TypeError,
            KeyError,
        ) as error:
            log.warning("checkpoint %s: its mark is not readable (%s): not whole", self.place(name), error)
            return False

    def _remove_files(self, name: str, files: Iterable[str]) -> None:
        for file in files:
            self._storage.remove(f"{name}/{file}")
