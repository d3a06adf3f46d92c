"""How a state's tensors become files: copied aside on each rank, then written as safetensors behind the loop's back.

torch.distributed.checkpoint runs the save and gathers its outcome; the staging and the writer of files are ours. Its
own copy every replica on every rank, and build each file in memory first, holding Python's lock, which stalls the loop
for as long. A file holds one kind of tensors (`model.`, `ema.`, ...) of one rank, as KIND-RANK.safetensors, with the
offsets of the parts in its header, where DCP's reader looks for them. None is a pickle, as DCP's own metadata is.
Where the files go is checkpoint_store.py's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from drwkv.training.checkpoint_store import Store, Written

CHUNK_BYTES = 4 << 20  # written and summed at once; Python's lock is held for no longer
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip


def kind_of(name: str) -> str:
    """The first part of a tensor's name, by which files are parted: `ema` of `ema.blocks.0.weight`."""
    return name.partition(".")[0]


def files_of(kind: str, files: Iterable[str]) -> list[str]:
    """Those of a checkpoint's files that may hold tensors of a kind."""
    found = [file for file in files if file.endswith(".safetensors")]
    return [file for file in found if file.startswith(f"{kind}-")] or found


class Staging:
    """Copies of what this rank will write, in CPU memory that is used again for every save (pinned for a GPU)."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._layout: Any = None  # of the tensors that the rest was made for
        self._items: list[WriteItem] = []
        self._copies: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def copy(self, tensors: Mapping[str, torch.Tensor]) -> Staged:
        """Copy this rank's share of `tensors`; the same names, shapes and placements on every rank.

        From a GPU the copies are only queued, ahead of all that the loop queues later: see `Staged.wait`. The copies
        of the call before are overwritten.
        """
        layout = [(name, tensor.shape, tensor.dtype, _placement(tensor)) for name, tensor in tensors.items()]
        if layout != self._layout:
            mine = {name: tensors[name] for name in self._share(tensors)}
            self._items = create_default_local_save_plan(mine, True).items
            self._copies = {name: _buffer(_local(tensor)) for name, tensor in mine.items()}
            self._layout = layout
        on_gpu = False
        for name, copy in self._copies.items():
            local = _local(tensors[name])
            copy.copy_(local, non_blocking=True)
            on_gpu |= local.is_cuda
        copied = torch.cuda.Event() if on_gpu else None
        if copied is not None:
            copied.record()
        return Staged(self._items, self._copies, copied)

    def _share(self, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """The names of which this rank writes all, or its shard; each replica falls to one rank."""
        loads, mine = [0] * self._size, []
        for index, (name, tensor) in enumerate(tensors.items()):
            if isinstance(tensor, DTensor):
                mesh, place = tensor.device_mesh, tensor.device_mesh.get_coordinate()
                copies = [dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate()]
                if place is not None and all(place[dim] == index % mesh.size(dim) for dim in copies):
                    mine.append(name)
                continue
            owner = min(range(self._size), key=loads.__getitem__)
            loads[owner] += tensor.numel() * tensor.element_size()
            if owner == self._rank:
                mine.append(name)
        return mine


@dataclass(frozen=True)
class Staged:
    """What one rank writes in one save."""

    items: list[WriteItem]
    tensors: dict[str, torch.Tensor]
    copied: torch.cuda.Event | None

    @property
    def num_bytes(self) -> int:
        """Of all tensors; their files are a header longer."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def wait(self) -> None:
        """Return when the copies hold the values; for another thread than the loop's."""
        if self.copied is not None:
            self.copied.synchronize()


class StagedPlanner(DefaultSavePlanner):
    """Plans nothing: `Staging` has shared the tensors out, and the writer counts whether the parts make the whole.

    The plans of all ranks on rank 0 would hold Python's lock there for seconds, and with it the loop.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return all_plans, Metadata({})


@dataclass(frozen=True)
class _Part:
    """What a rank tells rank 0 of one of its files."""

    written: Written
    elements: dict[str, int]  # of each tensor, as the reopened file says


class ShardWriter(StorageWriter):
    """Writes one checkpoint `name` into `store`: every rank what it has `staged`, then rank 0 `scalars` and the mark.

    `shapes` are those of all whole tensors: unless the parts make them up, nothing is marked. What any rank raises,
    `dcp.save` raises on all.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        staged: Staged,
        *,
        rank: int,
        shapes: Mapping[str, Sequence[int]],
        scalars: bytes,
    ) -> None:
        self._store, self._name, self._staged, self._rank = store, name, staged, rank
        self._shapes, self._scalars = shapes, scalars

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        by_kind: dict[str, list[WriteItem]] = {}
        for item in self._staged.items:
            by_kind.setdefault(kind_of(item.index.fqn), []).append(item)
        results = []
        tensors = self._staged.tensors
        with self._store.writing(self._name, self._staged.num_bytes) as folder:
            for kind, items in by_kind.items():
                path = folder / f"{kind}-{self._rank + 1:05d}.safetensors"
                parts = {item.index.fqn: (tensors[item.index.fqn], item.index.offset or ()) for item in items}
                written = write_safetensors(path, parts)
                part = _Part(written, _reopen(path))
                self._store.put(self._name, path)
                results.append(WriteResult(MetadataIndex(path.name), written.num_bytes, part))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        parts = {result.index.fqn: result.storage_data for of_rank in results for result in of_rank}
        _check_whole(
            str(self._store.place(self._name)), self._shapes, [part.elements for part in parts.values()]
        )
        self._store.commit(self._name, self._scalars, {file: part.written for file, part in parts.items()})

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def write_safetensors(path: Path, parts: Mapping[str, tuple[torch.Tensor, Sequence[int]]]) -> Written:
    """Write name -> (contiguous CPU tensor, its offset in the whole tensor) as DCP's safetensors reader takes them.

    The checksum is of the bytes in memory: what a disk makes of them is held against it.
    """
    header: dict[str, Any] = {
        "__metadata__": {
            "DCP_SHARDING_INFO": json.dumps(
                {name: {"saved_offsets": list(at)} for name, (_, at) in parts.items()}
            ),
            "DCP_VERSION": "1.0",
            "format": "pt",
        }
    }
    names = sorted(parts, key=lambda name: -parts[name][0].element_size())  # so that each is aligned
    end = 0
    for name in names:
        tensor = parts[name][0]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    checksum, num_bytes = google_crc32c.Checksum(), 0
    with path.open("wb") as file:
        pieces = [memoryview(len(text).to_bytes(8, "little") + text)]
        pieces += [memoryview(parts[name][0].reshape(-1).view(torch.uint8).numpy().data) for name in names]
        for piece in pieces:
            for start in range(0, len(piece), CHUNK_BYTES):
                chunk = bytes(piece[start : start + CHUNK_BYTES])
                checksum.update(chunk)
                file.write(chunk)
            num_bytes += len(piece)
    return Written(num_bytes, checksum.digest().hex())


def _reopen(path: Path) -> dict[str, int]:
    """Name -> number of elements of the tensors in a file; OSError if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # not a dict
    except SafetensorError as error:
        raise OSError(f"checkpoint file {path} cannot be read back: {error}") from error


def _check_whole(where: str, shapes: Mapping[str, Sequence[int]], parts: Iterable[Mapping[str, int]]) -> None:
    """OSError unless all parts of each tensor add up to the whole."""
    elements = dict.fromkeys(shapes, 0)
    for part in parts:
        for name, count in part.items():
            elements[name] += count
    short = [name for name, shape in shapes.items() if elements[name] != math.prod(shape)]
    if short:
        raise OSError(
            f"checkpoint {where}: {len(short)} tensors were not written whole, the first is {short[0]}"
        )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _placement(tensor: torch.Tensor) -> Any:
    return (tensor.placements, tensor.device_mesh) if isinstance(tensor, DTensor) else None


def _buffer(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
