"""Ranks that put a known state into an engine and save it, or load it into another: `python engine_states.py JOB.json`.

The job: {"save": [engine, ...], "load": {engine: [saved, ...]}, "folder"}. Each engine of `save` writes folder/ENGINE;
each of `load` reads those that it names, and rank 0 writes what it holds afterwards, whole, as
folder/LOADER-SAVED.safetensors. An engine is `name` or `name*replicas`.
"""

from __future__ import annotations

import gc
import json
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from drwkv.models import create
from drwkv.parallel import Engine, ParallelConfig, World, session, wrap
from drwkv.rng import Purpose, normal
from drwkv.training import optimizer
from drwkv.training.checkpoint import CheckpointConfig, Checkpoints
from drwkv.training.ema import Ema
from drwkv.training.optimizer import OptimizerConfig
from drwkv.training.state import TrainState, resume

STEP, UPDATES = 7, 5


def build(engine: str, world: World) -> TrainState:
    """A state of a tiny model under an engine; the model's own parameters are zero."""
    name, _, replicas = engine.partition("*")
    model = create("DRWKV", input_size=8, in_channels=1, num_classes=3, patch_size=2, hidden_size=12, depth=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    config = ParallelConfig(engine=name, replicas=int(replicas or 1))  # type: ignore[arg-type]
    built: Engine = wrap(model, partial(optimizer.build, config=OptimizerConfig()), config, world)
    return TrainState(built, Ema(built, [0.05]), identity={})


def known(name: str, shape: torch.Size) -> torch.Tensor:
    """What the tensor of that name in a checkpoint is to hold: a function of the name."""
    seed = sum(ord(letter) * 31**i for i, letter in enumerate(name)) % 2**32
    return normal(seed, Purpose.NOISE, torch.zeros(1, dtype=torch.int64), tuple(shape))[0]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().contiguous()


def save(engine: str, folder: Path, world: World) -> None:
    state = build(engine, world)
    tensors = state.tensors()
    for name, tensor in tensors.items():
        value = known(name, tensor.shape)
        if isinstance(tensor, DTensor):
            value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
        tensor.copy_(value)
    scalars = {"step": STEP, "n": 10 * STEP, "skipped": [], "updates": UPDATES}
    state.load(tensors, scalars)
    checkpoints = Checkpoints(folder / engine, CheckpointConfig(), world)
    checkpoints.save(STEP, state.tensors(), state.scalars(), wait=True)


def load(engine: str, saved: str, folder: Path, world: World) -> None:
    state = build(engine, world)
    assert resume(state, Checkpoints(folder / saved, CheckpointConfig(), world))
    assert (state.step, state.n, state.engine.updates) == (STEP, 10 * STEP, UPDATES)
    found = {name: whole(tensor) for name, tensor in state.tensors().items()}
    # What computes must be the loaded weights too.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    state.engine.module.eval()
    with torch.no_grad():
        found["output"] = whole(state.engine.module(x, torch.tensor([3, 500]), torch.tensor([0, 2])))
    if world.is_first:
        save_file(found, folder / f"{engine}-{saved}.safetensors")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(job["folder"])
    with session(timeout_sec=120.0) as world:
        for engine in job["save"]:
            save(engine, folder, world)
            gc.collect()
        for engine, names in job["load"].items():
            for saved in names:
                load(engine, saved, folder, world)
                gc.collect()


if __name__ == "__main__":
    main()
