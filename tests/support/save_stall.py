"""How long a save holds the loop up, and the whole of it: `python save_stall.py JOB.json`, a process a rank.

The job: {"engines": [name, ...], "folder", "out", "tries", "hidden_size"}. Rank 0 writes to `out`, by engine, the best
of the tries in seconds, each the worst of the ranks: `stall` (until a save in the background returns), `gather` (the
part of it that makes the tensors), `pause` (longest hole in a loop of small work while the save goes on behind it) and
`synchronous` (a save that waits).
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import torch

from drwkv.models import create
from drwkv.parallel import ParallelConfig, World, session, wrap
from drwkv.training import optimizer
from drwkv.training.checkpoint import CheckpointConfig, Checkpoints
from drwkv.training.ema import Ema
from drwkv.training.optimizer import OptimizerConfig
from drwkv.training.state import TrainState

Seconds = dict[str, float]


def build(engine: str, hidden_size: int, world: World) -> TrainState:
    """The state of a model under an engine, as it is at the first step."""
    model = create(
        "DRWKV", input_size=16, in_channels=4, num_classes=10, patch_size=2, hidden_size=hidden_size, depth=13
    )
    config = ParallelConfig(engine=engine)  # type: ignore[arg-type]
    built = wrap(model, partial(optimizer.build, config=OptimizerConfig()), config, world)
    return TrainState(built, Ema(built), identity={})


def save(checkpoints: Checkpoints, state: TrainState, step: int, *, wait: bool) -> Seconds:
    """Save the state after `step` steps; the seconds of its parts, on this rank."""
    start = time.perf_counter()
    tensors = state.tensors()
    gathered = time.perf_counter()
    checkpoints.save(step, tensors, state.scalars(), wait=wait)
    end = time.perf_counter()
    return {"gather": gathered - start, "synchronous" if wait else "stall": end - start}


def longest_pause(checkpoints: Checkpoints) -> float:
    """Seconds of the longest hole in a loop of 1 ms of work a turn, until the save behind it has ended."""
    work, longest, last = torch.randn(64, 64), 0.0, time.perf_counter()
    while not checkpoints._writing.done():  # type: ignore[union-attr]
        work @ work
        time.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


def measure(engine: str, job: dict, world: World) -> Seconds:
    """The best of the tries, each as slow as its slowest rank; the first save, which makes its buffers, apart."""
    state = build(engine, job["hidden_size"], world)
    folder = Path(job["folder"]) / engine
    checkpoints = Checkpoints(folder, CheckpointConfig(keep_last=1), world)
    first = world.agree_max([save(checkpoints, state, 1, wait=True)["synchronous"]])[0]
    found: dict[str, list[float]] = {"first": [first]}
    for i in range(job["tries"]):
        world.barrier()
        seconds = save(checkpoints, state, 2 * i + 2, wait=False)
        seconds["pause"] = longest_pause(checkpoints)
        checkpoints.finish()
        world.barrier()
        seconds |= save(checkpoints, state, 2 * i + 3, wait=True)
        for name, worst in zip(seconds, world.agree_max(list(seconds.values())), strict=True):
            found.setdefault(name, []).append(worst)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors().values())
    if world.is_first:
        shutil.rmtree(folder)
    return {name: round(min(tries), 4) for name, tries in found.items()} | {"state_mb": round(size / 1e6)}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    with session(timeout_sec=120.0, cpu_threads=1) as world:
        found = {}
        for engine in job["engines"]:
            found[engine] = measure(engine, job, world)
            gc.collect()
        if world.is_first:
            Path(job["out"]).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
