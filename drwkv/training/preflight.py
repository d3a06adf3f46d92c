"""Looked at on all ranks before a run begins: the same code and config, a folder that all share, and room to save.

Each finding is one line that names the rank and what to do. What a config allows is checked in drwkv/config.py.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from drwkv.parallel import ParallelConfig, World
from drwkv.storage import is_remote
from drwkv.training.run_folder import commit, versions

log = logging.getLogger("drwkv")
REDUCED_BYTES = 16 << 20
ROUNDS = 3
# Bytes of a parameter in the CPU's memory: float32 weight, two moments and average; with `all` its gradient too.
ON_HOST = {"optimizer": 16, "all": 20}


def check_alike(config: Any, world: World) -> None:
    """ValueError unless all ranks have the same commit, versions and resolved config. Collective."""
    own = {"commit": commit(), "python": platform.python_version(), **versions(), **_flat(asdict(config))}
    said = world.gather(own)
    for rank, theirs in enumerate(said):
        for key in sorted(said[0].keys() | theirs.keys()):
            if theirs.get(key) != said[0].get(key):
                raise ValueError(
                    f"rank {rank} has {key} {theirs.get(key)!r} and rank 0 has {said[0].get(key)!r}: "
                    "start all ranks from the same checkout, environment and command"
                )


def check_folder(folder: Path, world: World) -> None:
    """ValueError on all ranks unless each can write into `folder` and all see the same one. Collective."""
    own = folder / f".preflight_{world.rank:05d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own.write_text("seen by rank 0")
        problem = None
    except OSError as error:
        problem = f"rank {world.rank} cannot write there: {error}"
    problems = [text for text in world.gather(problem) if text is not None]
    if world.is_first and not problems:
        unseen = [rank for rank in range(world.size) if not (folder / f".preflight_{rank:05d}").exists()]
        problems = [f"rank 0 does not see what rank {rank} writes there" for rank in unseen[:1]]
    problems = world.from_first(problems)
    if problem is None:
        own.unlink()
    if problems:
        raise ValueError(
            f"run.folder {folder}: {problems[0]}; give a folder that all nodes share and may write to"
        )


def check_room(folder: Path | str, num_bytes: int, num_checkpoints: int, world: World) -> None:
    """OSError on all ranks unless the disk of `folder` has room for so many checkpoints of `num_bytes`. Collective.

    What lies on S3 has no limit that could be asked for.
    """
    if is_remote(folder):
        return
    needed = num_checkpoints * num_bytes
    free = world.from_first(shutil.disk_usage(folder).free if world.is_first else None)
    if free < needed:
        raise OSError(
            f"{folder}: {free / 2**30:.3g} GiB are free, and {num_checkpoints} checkpoints need {needed / 2**30:.3g}: "
            "free some space, or give another folder"
        )


def check_offload(config: ParallelConfig, num_params: int, world: World) -> None:
    """ValueError unless what `parallel.offload` puts into this node's memory fits: a rank's share. Collective."""
    if config.offload == "none":
        return
    per_param = ON_HOST[config.offload]
    num_bytes = per_param * num_params * config.replicas // world.size
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = _available_memory()
    lacks = free is not None and num_bytes * ranks_here > free
    [any_lacks] = world.agree_max([float(lacks)])
    if any_lacks:
        where = f"{ranks_here} ranks of this node" if lacks else "the ranks of another node"
        raise ValueError(
            f"config key 'parallel.offload': {where} need {num_bytes * ranks_here / 2**30:.1f} GiB of its memory"
            + (f" and {(free or 0) / 2**30:.1f} are free" if lacks else " and that has less")
            + ": give offload=none, or more nodes"
        )


def time_all_reduce(world: World) -> None:
    """Log how long the ranks take to add up 16 MiB, on the device that they compute on. Collective."""
    if world.size == 1:
        return
    tensor = torch.zeros(REDUCED_BYTES // 4, device=world.device)
    seconds = []
    for _ in range(ROUNDS):
        world.barrier()
        begin = time.perf_counter()
        world.sum_(tensor)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    [slowest] = world.agree_max([min(seconds)])
    log.info(
        "all-reduce of 16 MiB over %d ranks: %.1f ms, %.2f GB/s",
        world.size, 1e3 * slowest, REDUCED_BYTES / slowest / 1e9,
    )  # fmt: skip


def _available_memory() -> int | None:
    """Bytes that this machine can still give; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found
