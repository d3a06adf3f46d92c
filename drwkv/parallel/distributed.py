"""Rank, world, device, process groups and the few collectives that the applications use.

How a model is wrapped for many ranks is in engine.py, ddp.py and fsdp.py.
"""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from drwkv.cpu import keep_freed_memory

PATIENCE = 6  # times the timeout of collectives, for what is slow by nature: a save, a look at many samples


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, the device it computes on, and a group for background saves."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    background: dist.ProcessGroup  # gloo; collectives of the thread that saves, apart from those of the loop
    board: dist.Store  # small texts by key that every rank reads, over a connection of its own

    @property
    def is_first(self) -> bool:
        """True on the one rank that writes what is written once."""
        return self.rank == 0

    def agree_max(self, values: list[float]) -> list[float]:
        """The elementwise maximum over all ranks, on the CPU so that no GPU stream is touched. Collective."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` in place over all ranks, on its own device. Collective."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """One small Python object of each rank, in the order of ranks, on every rank. Collective."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's `value` on every rank. Collective."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks. Collective."""
        self.agree_max([0.0])


@contextmanager
def session(*, timeout_sec: float = 600.0, cpu_threads: int | None = None) -> Iterator[World]:
    """The process groups of one run: from torchrun's or submitit's environment, or one process without a launcher.

    With a GPU the groups are `cpu:gloo,cuda:nccl`, so that flags and background saves never wait for the GPU.
    `timeout_sec` bounds every collective; `cpu_threads` None keeps torch's own choice.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cpu_threads is not None:
        torch.set_num_threads(cpu_threads)
    if torch.cuda.is_available():
        # Some launchers show each process its own GPU alone.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        keep_freed_memory()
    timeout = datetime.timedelta(seconds=timeout_sec)
    store: Any
    if "RANK" in os.environ:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
    else:
        store, rank, size = dist.HashStore(), 0, 1
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    # What is saved behind the loop may take its time on one rank, while others wait for it.
    background = dist.new_group(backend="gloo", timeout=PATIENCE * timeout)
    try:
        yield World(rank, size, local_rank, device, background, store.clone())
    except BaseException:
        if (
            device.type == "cuda"
        ):  # to be destroyed, NCCL would wait for ranks that may be in a collective for ever
            dist.distributed_c10d._abort_process_group()
        raise
    finally:
        # A device mesh that outlives its process group aborts the process at exit: drop what is unreachable first.
        del background
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()
