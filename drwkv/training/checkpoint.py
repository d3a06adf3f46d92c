"""Checkpoints: tensors by torch.distributed.checkpoint as safetensors, scalars as JSON, whole or not there at all.

Order of a save: files into `step_N.tmp`, every file reopened, folder renamed to `step_N`, mark `COMPLETE` written.
A folder without its mark is not a checkpoint. Nothing here is a pickle: DCP's own metadata file is one, so its
safetensors storage is used, which keeps offsets in the files' headers and takes tensors alone.
What is saved is said in state.py.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from drwkv.files import sync
from drwkv.parallel.distributed import World
from drwkv.training.monitor import every

log = logging.getLogger("drwkv")
MARK = "COMPLETE"
SCALARS = "state.json"
DAMAGED = "damaged_"  # begin of the name of a checkpoint that is kept to be looked at
READ_BYTES = 16 << 20


@dataclass
class CheckpointConfig:
    """When to save, and what to keep."""

    every_steps: int = 1000  # steps between saves; 0: none; the end of the run is always saved
    keep_last: int = 3  # newest checkpoints to keep, at least 1
    keep_every_steps: int = 0  # also keep those whose step is a multiple of this; 0: none
    asynchronous: bool = True  # write in the background while training goes on


def whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder` that were marked whole and still have every file at its size, oldest first."""
    return sorted((p for p in folder.glob("step_*") if _is_whole(p)), key=step_of)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, None if there is none."""
    found = whole_checkpoints(folder)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps that a checkpoint's name says."""
    return int(checkpoint.name.removeprefix("step_").split(".")[0])


def read_scalars(checkpoint: Path) -> dict[str, Any]:
    """What `state.json` holds."""
    return json.loads((checkpoint / SCALARS).read_text())


def shapes(checkpoint: Path) -> dict[str, torch.Size]:
    """Name -> global shape of every tensor in a checkpoint."""
    metadata = HuggingFaceStorageReader(str(checkpoint)).read_metadata()
    found = metadata.state_dict_metadata
    return {name: tensor.size for name, tensor in found.items() if isinstance(tensor, TensorStorageMetadata)}


def read_full(checkpoint: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Every tensor under `prefix.`, whole, on the CPU, by its name without the prefix. One process, no collectives."""
    found = {name: size for name, size in shapes(checkpoint).items() if name.startswith(f"{prefix}.")}
    tensors = {name: torch.empty(size) for name, size in found.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="torch.distributed is disabled"
        )  # one process is what is meant
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}


def damage(checkpoint: Path, world: World) -> list[str]:
    """What is wrong with this rank's share of a checkpoint's files, by their checksums."""
    try:
        checksums = json.loads((checkpoint / MARK).read_text()).get("crc32c", {})
        mine = sorted(checksums)[world.rank :: world.size]
        found = {name: _crc32c(checkpoint / name) for name in mine}
    except OSError as error:
        return [str(error)]
    return [
        f"{name} has crc32c {crc}, saved was {checksums[name]}"
        for name, crc in found.items()
        if crc != checksums[name]
    ]


class Checkpoints:
    """The checkpoints of one run, in `folder`."""

    def __init__(self, folder: Path, config: CheckpointConfig, world: World) -> None:
        self.folder, self._config, self._world = folder, config, world
        self._writing: Future[Any] | None = None
        self._committed: Future[None] | None = None
        if world.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in [p for p in folder.glob("step_*") if not _is_whole(p)]:
                if (leftover / MARK).exists():
                    log.warning("checkpoint %s is damaged: set aside as damaged_%s", leftover, leftover.name)
                    _set_aside(leftover)
                else:
                    log.warning("checkpoint %s was never finished: removed", leftover)
                    shutil.rmtree(leftover)
        world.barrier()

    def due(self, step: int) -> bool:
        """Whether the state after `step` steps is to be saved."""
        return every(step, self._config.every_steps)

    def save(
        self, step: int, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any], *, wait: bool
    ) -> None:
        """Save the state after `step` steps; returns once it is staged, or whole if `wait`. Collective.

        Raises the error of this rank's previous save, if it had one.
        """
        self.finish()
        final, temporary = self.folder / f"step_{step:08d}", self.folder / f"step_{step:08d}.tmp"
        if self._world.is_first and not _is_whole(final):
            log.info("checkpoint step %d: writing to %s", step, temporary)
        if self._world.from_first(_is_whole(final)):
            return
        self._world.barrier()
        expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        writing = dcp.async_save(
            dict(tensors),
            storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
            process_group=self._world.background,
        )
        assert isinstance(writing, Future)
        self._writing = writing
        if self._world.is_first:
            text = json.dumps(dict(scalars), indent=1)
            self._committed = Future()
            writing.add_done_callback(lambda done: self._commit(done, temporary, final, expected, text))
        if wait or not self._config.asynchronous:
            self.finish()
            self._world.barrier()

    def newest(self, at_most_n: int | None = None) -> Path | None:
        """The newest whole checkpoint (from at most sample `at_most_n`) whose bytes are those saved. Collective.

        One that is damaged is set aside, and the one before is taken. Raises ValueError where none is left of them.
        """
        while (found := self._newest_marked(at_most_n)) is not None:
            said = self._world.gather(damage(found, self._world))
            problems = [problem for of_rank in said for problem in of_rank]
            if not problems:
                return found
            if self._world.is_first:
                log.error("checkpoint %s is damaged: %s; the one before is taken", found, problems[0])
                _set_aside(found)
            self._world.barrier()
        damaged = sorted(self.folder.glob(f"{DAMAGED}*")) if self._world.is_first else []
        name = self._world.from_first(damaged[-1].name if damaged else None)
        if name is not None and at_most_n is None:
            raise ValueError(
                f"{self.folder}: {name} is damaged and there is no whole checkpoint before it: "
                "restore one from a copy, or delete it to begin anew"
            )
        return None

    def _newest_marked(self, at_most_n: int | None) -> Path | None:
        """As rank 0 sees the folder, by marks and sizes alone."""
        found = whole_checkpoints(self.folder) if self._world.is_first else []
        kept = [c for c in found if at_most_n is None or read_scalars(c)["n"] <= at_most_n]
        return self._world.from_first(kept[-1] if kept else None)

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: they belong to a history that the run has left. Collective."""
        if self._world.is_first:
            for checkpoint in whole_checkpoints(self.folder):
                if step_of(checkpoint) > step:
                    _remove(checkpoint)
        self._world.barrier()

    def failure(self) -> OSError | None:
        """The error of a save that has ended on this rank, without waiting for one under way."""
        for future in (self._writing, self._committed):
            if future is not None and future.done() and (error := future.exception()) is not None:
                return OSError(f"checkpoint in {self.folder} could not be saved: {error}")
        return None

    def finish(self) -> None:
        """Wait for the save under way. Raises OSError on every rank if it failed on any. Collective."""
        for future in (self._writing, self._committed):
            if future is not None:
                future.exception()
        said = self._world.gather(None if (error := self.failure()) is None else str(error))
        self._writing = self._committed = None
        if failed := [f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None]:
            raise OSError(failed[0])

    def restore(self, checkpoint: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Load `checkpoint` in place into `tensors`, sharded in whatever way; returns the scalars. Collective.

        Raises ValueError where names or shapes differ from what was saved.
        """
        found, wanted = shapes(checkpoint), {name: t.shape for name, t in tensors.items()}
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise ValueError(
                    f"{checkpoint}: holds another model: {name} is {_shape(found.get(name))} there and "
                    f"{_shape(wanted.get(name))} in this config; give the config that it was trained with, "
                    "or another run.folder"
                )
        dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(checkpoint)))
        return read_scalars(checkpoint)

    def _commit(
        self, done: Future[Any], temporary: Path, final: Path, expected: dict[str, tuple[int, ...]], text: str
    ) -> None:
        assert self._committed is not None
        try:
            done.result()
            (temporary / SCALARS).write_text(text)
            _check_files(temporary, expected)
            sync(temporary / SCALARS)
            os.rename(temporary, final)
            sizes = {p.name: p.stat().st_size for p in sorted(final.iterdir())}
            checksums = {name: _crc32c(final / name) for name in sizes}
            mark = final / f"{MARK}.tmp"
            mark.write_text(
                json.dumps({"files": sizes, "crc32c": checksums, "saved_at": time.time()}, indent=1)
            )
            sync(mark)
            os.rename(mark, final / MARK)
            sync(final)
            sync(self.folder)
            log.info("checkpoint step %d: marked whole", step_of(final))
            self._prune()
        except BaseException as error:  # handed to the loop, which tells all ranks and raises it
            self._committed.set_exception(error)
        else:
            self._committed.set_result(None)

    def _prune(self) -> None:
        """Remove what the config does not keep; the newest always stays."""
        found = whole_checkpoints(self.folder)
        interval = self._config.keep_every_steps
        for checkpoint in found[: -max(1, self._config.keep_last)]:
            if interval and step_of(checkpoint) % interval == 0:
                continue
            try:
                _remove(checkpoint)
            except OSError as error:  # the new checkpoint is whole all the same
                log.warning("checkpoint %s could not be removed: %s", checkpoint, error)


def _set_aside(checkpoint: Path) -> None:
    os.replace(checkpoint, checkpoint.with_name(f"{DAMAGED}{time.time_ns()}_{checkpoint.name}"))


def _crc32c(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    checksum = google_crc32c.Checksum()
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            checksum.update(data)
    return checksum.digest().hex()


def _remove(checkpoint: Path) -> None:
    (checkpoint / MARK).unlink()
    shutil.rmtree(checkpoint)


def _is_whole(checkpoint: Path) -> bool:
    try:
        files = json.loads((checkpoint / MARK).read_text())["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except FileNotFoundError:
        return False
    except (json.JSONDecodeError, KeyError, OSError) as error:
        log.warning("checkpoint %s: its mark is not readable (%s): taken as not whole", checkpoint, error)
        return False


def _check_files(folder: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Reopen every file: its header must parse, and all parts of each tensor must add up to the whole."""
    elements = dict.fromkeys(expected, 0)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # not a dict
                    elements[name] += math.prod(file.get_slice(name).get_shape())
        except (SafetensorError, KeyError) as error:
            raise OSError(f"checkpoint file {path} cannot be read back: {error}") from error
    short = [name for name, shape in expected.items() if elements[name] != math.prod(shape)]
    if short:
        raise OSError(
            f"checkpoint {folder}: {len(short)} tensors were not written whole, the first is {short[0]}"
        )


def _shape(size: torch.Size | None) -> str:
    return "missing" if size is None else str(tuple(size))
