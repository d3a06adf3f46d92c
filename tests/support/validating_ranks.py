"""Ranks that take a run's checkpoint and validate it in several ways: `python validating_ranks.py JOB.json`.

The job: {"arguments": of train_dist.py, "variants": {name: more arguments}, "out": folder}. Each variant loads the
newest checkpoint of the run, whatever its identity, and rank 0 writes out/NAME/validation.jsonl.
"""

from __future__ import annotations

import gc
import json
import sys
from functools import partial
from pathlib import Path

from drwkv.compose import load
from drwkv.config import TrainConfig, check_train
from drwkv.data.loader import open_data
from drwkv.diffusion.gaussian import GaussianProcess
from drwkv.models.config import from_config
from drwkv.parallel import World, session, wrap
from drwkv.training import optimizer
from drwkv.training.checkpoint import Checkpoints, read_scalars
from drwkv.training.ema import Ema
from drwkv.training.monitor import Monitor, MonitorConfig
from drwkv.training.objective import Objective
from drwkv.training.state import TrainState, resume
from drwkv.training.validation import Validation, open_bank


def validate(config: TrainConfig, out: Path, world: World) -> None:
    check_train(config)
    data = open_data(config.data, seed=config.run.seed)
    model, process = (
        from_config(config.model, seed=config.run.seed),
        GaussianProcess(**vars(config.diffusion)),
    )
    bank = open_bank(config.validation, data, config.model, process.num_timesteps)
    objective = Objective(
        process, model, data.manifest, config.objective,
        seed=config.run.seed, label_drop=config.run.label_drop, device=world.device,
    )  # fmt: skip
    engine = wrap(model, partial(optimizer.build, config=config.optimizer), config.parallel, world)
    checkpoints = Checkpoints(Path(config.run.folder) / "checkpoints", config.checkpoint, world)
    newest = checkpoints.newest()
    assert newest is not None
    state = TrainState(engine, Ema(engine), read_scalars(newest)["identity"])
    assert resume(state, checkpoints)
    if world.is_first:
        out.mkdir(parents=True)
    shown = MonitorConfig(tensorboard_every_steps=0, progress=False)
    world.barrier()
    monitor = Monitor(out, shown, world, total_steps=state.step, step=state.step, on_record=[])
    validation = Validation(config.validation, bank, objective, state, monitor, out)
    validation.read(lambda: False)
    validation.measure()
    monitor.close()


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    with session(timeout_sec=120.0) as world:
        for name, more in job["variants"].items():
            validate(load(TrainConfig, [*job["arguments"], *more]), Path(job["out"]) / name, world)
            gc.collect()


if __name__ == "__main__":
    main()
