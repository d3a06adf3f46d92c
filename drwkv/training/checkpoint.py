"""When checkpoints are saved, which are kept, and how the newest that is sound is found and read.

A save copies the state aside, and a thread of its own does the rest: checkpoint_files.py writes the tensors as
safetensors, checkpoint_store.py puts them into a folder or on S3 and marks them whole, last of all. What is saved is
said in state.py.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from drwkv.parallel.distributed import World
from drwkv.storage import StorageError
from drwkv.training.checkpoint_files import ShardWriter, Staged, StagedPlanner, Staging, files_of
from drwkv.training.checkpoint_store import MARK, SCALARS, Place, open_place, open_store, step_of
from drwkv.training.monitor import every

__all__ = ["MARK", "SCALARS", "CheckpointConfig", "Checkpoints", "Place", "folder_of", "latest", "read_full",
           "read_scalars", "shapes", "step_of", "whole_checkpoints"]  # fmt: skip

log = logging.getLogger("drwkv")
T = TypeVar("T")
Tensors = Mapping[str, torch.Tensor]
# All saves of a process, in the order in which the loop began them: that is the same on every rank, and so is the order
# of their collectives.
_SAVES = ThreadPoolExecutor(max_workers=1, thread_name_prefix="drwkv-save")


@dataclass
class CheckpointConfig:
    """When to save, where to, and what to keep."""

    every_steps: int = 1000  # steps between saves; 0: none; the end of the run is always saved
    keep_last: int = 3  # newest checkpoints to keep, at least 1
    keep_every_steps: int = 0  # also keep those whose step is a multiple of this; 0: none
    asynchronous: bool = True  # write in the background while training goes on
    # A folder or s3://bucket/prefix, of this run alone; None: checkpoints in run.folder
    folder: str | None = None
    temporary: str | None = None  # S3: folder of each node where files wait on their way; None: the system's


def folder_of(run_folder: Path, config: CheckpointConfig) -> Place:
    """Where the checkpoints of a run lie."""
    return config.folder or run_folder / "checkpoints"


def whole_checkpoints(folder: Place) -> list[Place]:
    """The checkpoints in `folder` that were marked whole and still have every file at its size, oldest first."""
    store = open_store(folder)
    return [store.place(name) for name in store.whole()]


def latest(folder: Place) -> Place | None:
    """The newest whole checkpoint in `folder`, None if there is none."""
    found = whole_checkpoints(folder)
    return found[-1] if found else None


def read_scalars(checkpoint: Place) -> dict[str, Any]:
    """What `state.json` holds."""
    store, name = open_place(checkpoint)
    return json.loads(store.read(name, SCALARS))


def shapes(checkpoint: Place) -> dict[str, torch.Size]:
    """Name -> global shape of every tensor in a checkpoint."""
    with _local(checkpoint, None) as folder:
        return _shapes(folder)


def read_full(checkpoint: Place, prefix: str) -> dict[str, torch.Tensor]:
    """Every tensor under `prefix.`, whole, on the CPU, by its name without the prefix. One process, no collectives.

    Raises ValueError where the bytes are not those that were saved.
    """
    with _local(checkpoint, prefix) as folder, warnings.catch_warnings():
        found = {name: size for name, size in _shapes(folder).items() if name.startswith(f"{prefix}.")}
        tensors = {name: torch.empty(size) for name, size in found.items()}
        # One process is what is meant
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items()}


@contextlib.contextmanager
def _local(checkpoint: Place, prefix: str | None) -> Iterator[Path]:
    """A folder of this machine with the files of a checkpoint, those for one kind of tensors alone if it is named."""
    store, name = open_place(checkpoint)
    try:
        files = store.files(name)
        if problems := store.fetch(name, files if prefix is None else files_of(prefix, files)):
            raise ValueError(f"checkpoint {checkpoint} is damaged: {problems[0]}; give an earlier one")
        folder = store.local(name)
        assert folder is not None
        yield folder
    finally:
        store.release()


def _shapes(folder: Path) -> dict[str, torch.Size]:
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: tensor.size for name, tensor in found.items() if isinstance(tensor, TensorStorageMetadata)}


class Checkpoints:
    """The checkpoints of one run, in `folder` or under `s3://bucket/prefix`. All methods but `due` and `failure` are
    collective.
    """

    def __init__(self, folder: Place, config: CheckpointConfig, world: World) -> None:
        self.folder, self._config, self._world = folder, config, world
        self._store = open_store(folder, config.temporary)
        self._staging = Staging(world.rank, world.size)
        self._writing: Future[None] | None = None
        self._on_first(self._store.clean_up)

    @property
    def num_to_come(self) -> int:
        """Checkpoints that the folder must have room for: the next one, and until it is full the one after it."""
        full = self._on_first(lambda: len(self._store.whole()) >= max(1, self._config.keep_last))
        return 1 if full else 2

    def due(self, step: int) -> bool:
        """Whether the state after `step` steps is to be saved."""
        return every(step, self._config.every_steps)

    def save(
        self, step: int, tensors: Tensors | Callable[[], Tensors], scalars: Mapping[str, Any], *, wait: bool
    ) -> None:
        """Save the state after `step` steps; returns once it is staged, or whole if `wait`.

        Raises OSError if the previous save failed. `tensors` may be what makes them, if that takes its time.
        """
        begun = time.monotonic()
        self.finish()
        made = tensors() if callable(tensors) else tensors
        staged = self._staging.copy(made)
        sizes = {name: tuple(tensor.shape) for name, tensor in made.items()}
        text = json.dumps(dict(scalars), indent=1).encode()
        stalled_sec = time.monotonic() - begun
        self._writing = _SAVES.submit(
            self._write, f"step_{step:08d}", staged, sizes, text, begun, stalled_sec
        )
        if wait or not self._config.asynchronous:
            del made, tensors
            self.finish()
            self._world.barrier()

    def _write(
        self, name: str, staged: Staged, sizes: dict[str, tuple[int, ...]], scalars: bytes, begun: float,
        stalled_sec: float,
    ) -> None:  # fmt: skip
        """The part of a save that is not the loop's."""
        first, group = self._world.is_first, self._world.background
        if self._world.device.type == "cuda":
            torch.cuda.set_device(self._world.device)  # of this thread; else it makes a context on GPU 0
        known: list[Any] = [None]
        if first:
            try:
                known = [self._store.is_whole(name)]
            except (OSError, StorageError) as error:
                known = [error]
        dist.broadcast_object_list(known, src=0, group=group)
        if isinstance(known[0], Exception):
            raise known[0]
        if known[0]:
            return
        step = step_of(name)
        if first:
            log.info("checkpoint step %d: writing to %s", step, self._store.place(name))
        staged.wait()
        writer = ShardWriter(self._store, name, staged, rank=self._world.rank, shapes=sizes, scalars=scalars)
        try:
            dcp.save({}, storage_writer=writer, planner=StagedPlanner(), process_group=group)
        except BaseException:
            if first:
                self._store.abandon(name)
            raise
        if first:
            log.info(
                "checkpoint step %d: marked whole; the loop stalled %.2f s, written in %.2f s",
                step, stalled_sec, time.monotonic() - begun,
            )  # fmt: skip
            self._prune()

    def newest(self, at_most_n: int | None = None) -> Place | None:
        """The newest whole checkpoint (from at most sample `at_most_n`) whose bytes are those saved.

        One that is damaged is set aside, and the one before is taken. Raises ValueError where none is left of them.
        """
        self._on_first(self._store.clean_up)  # what was harmed while the run went on
        while (name := self._on_first(lambda: self._newest_marked(at_most_n))) is not None:
            problems = self._fetch(name)
            if not problems:
                return self._store.place(name)
            if self._world.is_first:
                log.error(
                    "checkpoint %s is damaged: %s; the one before is taken",
                    self._store.place(name),
                    problems[0],
                )
            self._on_first(lambda name=name: self._store.set_aside(name))  # type: ignore[misc]
        damaged = self._on_first(self._store.damaged)
        if damaged and at_most_n is None:
            raise ValueError(
                f"{self.folder}: {damaged[-1]} is damaged and there is no whole checkpoint before it: "
                "restore one from a copy, or delete it to begin anew"
            )
        return None

    def _newest_marked(self, at_most_n: int | None) -> str | None:
        """By marks and sizes alone."""
        for name in reversed(self._store.whole()):
            try:
                if at_most_n is None or json.loads(self._store.read(name, SCALARS))["n"] <= at_most_n:
                    return name
            except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError):
                return name  # its checksum will tell
        return None

    def _fetch(self, name: str) -> list[str]:
        """Have a checkpoint on every node; what is wrong with it, by the checksums, on every rank."""
        world, problems, error = self._world, [], None
        try:
            turn, turns = (world.local_rank, 1) if self._store.is_remote else (world.rank, world.size)
            files = self._store.files(name)[turn::turns] if turn < turns else []
            problems = self._store.fetch(name, files) if files else []
        except StorageError as raised:
            error = raised
        except OSError as raised:
            problems = [str(raised)]
        said = world.gather((problems, error))
        for _, failed in said:
            if failed is not None:
                self._store.release()
                raise failed
        if found := [problem for of_rank, _ in said for problem in of_rank]:
            self._store.release()
            return found
        return []

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: they belong to a history that the run has left."""

        def remove() -> None:
            for name in self._store.whole():
                if step_of(name) > step:
                    self._store.remove(name)

        self._on_first(remove)

    def failure(self) -> OSError | None:
        """The error of a save that has ended on this rank, without waiting for one under way."""
        if self._writing is None or not self._writing.done() or (error := self._writing.exception()) is None:
            return None
        said = str(error)
        if isinstance(error, CheckpointException):
            rank, (cause, _) = sorted(error.failures.items())[0]
            said = f"rank {rank}: {cause}"
        return OSError(f"checkpoint in {self.folder} could not be saved: {said}")

    def finish(self) -> None:
        """Wait for the save under way. Raises OSError on every rank if it failed on any."""
        if self._writing is not None:
            self._writing.exception()
        said = self._world.gather(None if (error := self.failure()) is None else str(error))
        self._writing = None
        if failed := [text for text in said if text is not None]:
            raise OSError(failed[0])

    def restore(self, checkpoint: Place, tensors: Tensors) -> dict[str, Any]:
        """Load `checkpoint` in place into `tensors`, sharded in whatever way; returns the scalars.

        Raises ValueError where names or shapes differ from what was saved.
        """
        _, name = open_place(checkpoint)
        try:
            folder = self._folder_of_node(name)
            found, wanted = _shapes(folder), {name: t.shape for name, t in tensors.items()}
            for key in sorted(found.keys() | wanted.keys()):
                if found.get(key) != wanted.get(key):
                    raise ValueError(
                        f"{checkpoint}: holds another model: {key} is {_shape(found.get(key))} there and "
                        f"{_shape(wanted.get(key))} in this config; give the config that it was trained with, "
                        "or another run.folder"
                    )
            dcp.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(folder)))
            self._world.barrier()  # others of this node may still read
        finally:
            self._store.release()
        return read_scalars(checkpoint)

    def _folder_of_node(self, name: str) -> Path:
        """Where the files lie on this machine, which one process of each node fetches."""
        is_here = not self._store.is_remote or any(self._world.gather(self._store.local(name) is not None))
        if not is_here and (problems := self._fetch(name)):
            raise ValueError(f"checkpoint {self._store.place(name)} is damaged: {problems[0]}")
        mine = self._store.local(name)
        of_nodes = self._world.gather((socket.gethostname(), mine))
        return mine or next(folder for host, folder in of_nodes if host == socket.gethostname() and folder)

    def _prune(self) -> None:
        """Remove what the config does not keep; the newest always stays."""
        interval = self._config.keep_every_steps
        try:
            for name in self._store.whole()[: -max(1, self._config.keep_last)]:
                if not (interval and step_of(name) % interval == 0):
                    self._store.remove(name)
        except (OSError, StorageError) as error:  # the new checkpoint is whole all the same
            log.warning("checkpoints in %s: one could not be removed: %s", self.folder, error)

    def _on_first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, or raises there, on every rank."""
        outcome: tuple[T | None, Exception | None] = (None, None)
        if self._world.is_first:
            try:
                outcome = work(), None
            except (OSError, ValueError) as error:
                outcome = None, error
        value, raised = self._world.from_first(outcome)
        if raised is not None:
            raise raised
        return value


def _shape(size: torch.Size | None) -> str:
    return "missing" if size is None else str(tuple(size))
