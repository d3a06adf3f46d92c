"""Ranks that count what an engine holds after a backward: `python engine_bytes.py MODEL SIZE OUT ENGINE...`.

Rank 0 writes {engine: bytes of the fullest rank} to OUT: the storage of every tensor that Python can reach when all
gradients are there, weights, gradients and moments, the engine's own buffers included.
"""

from __future__ import annotations

import gc
import json
import sys
from functools import partial
from pathlib import Path

import torch

from drwkv.models import create
from drwkv.parallel import ParallelConfig, World, session, wrap
from drwkv.training import optimizer
from drwkv.training.optimizer import OptimizerConfig


def held_bytes() -> int:
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
            local = getattr(thing, "_local_tensor", thing)
            storage = local.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            if local.grad is not None:
                grad = getattr(local.grad, "_local_tensor", local.grad).untyped_storage()
                storages[grad.data_ptr()] = grad.nbytes()
    return sum(storages.values())


def measure(engine: str, name: str, size: int, world: World) -> int:
    model = create(name, input_size=size, in_channels=4, num_classes=10)
    build = partial(optimizer.build, config=OptimizerConfig())
    wrapped = wrap(model, build, ParallelConfig(engine=engine), world)  # type: ignore[arg-type]
    del model
    with wrapped.micro_step(last=True):
        x, t, y = torch.randn(1, 4, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        loss = wrapped.module(x, t, y).square().mean()
        wrapped.backward(loss)
    del x, t, y, loss
    gc.collect()
    held = held_bytes()
    return int(world.agree_max([float(held)])[0])


def main() -> None:
    name, size, out, *engines = sys.argv[1:]
    with session(timeout_sec=300.0) as world:
        before = held_bytes()
        found = {}
        for engine in engines:
            found[engine] = measure(engine, name, int(size), world) - before
            gc.collect()
        if world.is_first:
            Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
