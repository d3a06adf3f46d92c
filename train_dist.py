"""Train a model: `python train_dist.py --config configs/NAME.yaml key.sub=value ...`, the same under torchrun.

The same command again continues the run, on any number of ranks; a finished run says so. Here are the set-up and the
loop; every part of them stands in drwkv/.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from drwkv import command
from drwkv.compose import load
from drwkv.config import TrainConfig, check_ranks, check_train, identity
from drwkv.data.loader import Batch, Data, open_data
from drwkv.diffusion.gaussian import GaussianProcess
from drwkv.models.config import from_config
from drwkv.parallel import World, session, wrap
from drwkv.training import optimizer, preflight, run_folder, warm_start
from drwkv.training.activation_memory import within_budget
from drwkv.training.batches import Batches
from drwkv.training.checkpoint import Checkpoints, folder_of
from drwkv.training.ema import Ema, decay_at
from drwkv.training.ema_snapshots import Snapshots
from drwkv.training.health import Health
from drwkv.training.monitor import Audit, Monitor, StepRecord, every, logging_to
from drwkv.training.objective import Objective, check_variance
from drwkv.training.preview import Preview
from drwkv.training.profiling import StepProfiler
from drwkv.training.speed import speed_of
from drwkv.training.state import TrainState, go_back, resume
from drwkv.training.stragglers import Stragglers
from drwkv.training.supervision import supervised
from drwkv.training.validation import Bank, Validation, open_bank

log = logging.getLogger("drwkv")


def train(config: TrainConfig) -> None:
    """Run, or go on with, the training run that `config` describes, as one of the ranks that the launcher started.

    Raises ValueError or OSError for what the user can mend, before the config or a checkpoint is written.
    """
    check_train(config)
    parallel, folder = config.parallel, Path(config.run.folder)
    data = open_data(config.data, seed=config.run.seed)
    data.check_fits(config.model)
    model = from_config(config.model, seed=config.run.seed)
    process = GaussianProcess(**vars(config.diffusion))
    check_variance(model, process)
    bank = open_bank(config.validation, data, config.model, process.num_timesteps)
    with session(timeout_sec=parallel.timeout_sec, cpu_threads=parallel.cpu_threads) as world:
        check_ranks(config, world.size)
        preflight.check_alike(config, world)
        origin = warm_start.begin(model, config.run, config.checkpoint, world)
        preflight.check_folder(folder, world)
        with (
            logging_to(folder, world),
            supervised(config.health, folder, world, timeout_sec=parallel.timeout_sec) as health,
            contextlib.ExitStack() as at_end,
        ):
            run_folder.withdraw_requeue(folder, world)
            _train(config, model, process, data, bank, folder, world, health, at_end, origin)


def _train(
    config: TrainConfig, model: nn.Module, process: GaussianProcess, data: Data, bank: Bank | None,
    folder: Path, world: World, health: Health, at_end: contextlib.ExitStack, origin: warm_start.Origin | None,
) -> None:  # fmt: skip
    run = config.run

    # Set up.
    torch.backends.cuda.matmul.allow_tf32 = config.parallel.tf32
    speed = speed_of(model, config.parallel.precision, config.monitor.peak_tflops, world)
    objective = Objective(
        process, model, data.manifest, config.objective,
        seed=run.seed, label_drop=run.label_drop, device=world.device,
    )  # fmt: skip
    preview = Preview(process, config.monitor, config.model, data.manifest, seed=run.seed, world=world)
    num_params = sum(parameter.numel() for parameter in model.parameters())
    preflight.check_offload(config.parallel, num_params, world)
    parallel = within_budget(config, world.size)
    engine = wrap(model, partial(optimizer.build, config=config.optimizer), parallel, world)
    ema = Ema(engine, config.ema.widths)
    state = TrainState(engine, ema, identity(config, data.identity()))
    checkpoints = Checkpoints(folder_of(folder, config.checkpoint), config.checkpoint, world)
    resume(state, checkpoints)
    state.list_all_skipped(run.skip)
    if state.step >= run.total_steps:
        log.info("run %s is finished: %d of %d steps are done", folder, state.step, run.total_steps)
        health.end("finished")
        return
    preflight.check_room(checkpoints.folder, state.num_bytes(num_params), checkpoints.num_to_come, world)
    preflight.time_all_reduce(world)
    run_folder.begin(folder, config, data.manifest, world, step=state.step, origin=origin)
    snapshots = Snapshots(folder, config, world, step=state.step)
    audit = Audit(folder / "audit", world, enabled=run.audit, step=state.step)
    monitor = Monitor(
        folder, config.monitor, world, total_steps=run.total_steps, step=state.step,
        on_record=[state.note, health.note], speed=speed,
    )  # fmt: skip
    validation = Validation(config.validation, bank, objective, state, monitor, folder)
    health.guard(partial(validation.read, health.is_stopping))
    profiler = StepProfiler(config.profile, folder, world, monitor.aside)
    at_end.callback(profiler.close)
    ranks = Stragglers(world, config.monitor.ranks_every_steps)
    batches = Batches(
        partial(data.batches, world=world, accumulate=run.accumulate, interrupted=health.is_stopping)
    )
    at_end.callback(batches.close)  # whatever ends the run: its threads may wait for data

    # Train.
    stop_reason: str | None = None
    while state.step < run.total_steps:
        # Fetch, and hear from all ranks whether to go on.
        health.at(state.step, "waiting for data")
        profiler.before(state.step)
        batch_size = run.batch_size_at(state.step)
        is_skipped = state.is_skipped(batch_size)
        fetch = partial(ranks.fetch, partial(batches.next, state.n, batch_size))
        micro_batches = None if is_skipped else health.guard(fetch)
        health.note_error(checkpoints.failure() or snapshots.failure())
        health.at(state.step, "hearing from all ranks")
        if stop_reason := health.agree():
            break

        # Take the step and hear what became of the one before, or pass over what is skipped.
        health.at(state.step, "training")
        if is_skipped:
            state.leave_out(batch_size)
            monitor.left_out(state.step - 1, state.n - batch_size, batch_size)
        else:
            assert micro_batches is not None
            with ranks.working():
                record = _step(config, state, objective, audit, micro_batches, batch_size)
            monitor.record(record)
            monitor.beside(ranks.compare())
            state.advance(batch_size)

        # Go back over steps that were not finite.
        if (bad_n := health.must_go_back()) is not None:
            health.at(state.step, "going back")
            monitor.flush()
            go_back(state, checkpoints, bad_n)
            health.gone_back()
            monitor.rewind(state.step)
            validation.rewind(state.step)
            audit.rewind(state.step)
            snapshots.rewind(state.step)
            continue

        # Measure, save and show; what is saved has been measured, so that a resume misses nothing.
        if validation.due(state.step):
            health.at(state.step, "validating")
            with monitor.aside():
                validation.measure()
        if checkpoints.due(state.step):
            health.at(state.step, "saving")
            with monitor.aside():
                if not health.in_bad_row:
                    checkpoints.save(state.step, state.tensors, state.scalars(), wait=False)
        if snapshots.due(state.step):
            health.at(state.step, "saving")
            with monitor.aside():
                snapshots.save(state)
        if every(state.step, config.monitor.grid_every_steps):
            health.at(state.step, "drawing a grid")
            with monitor.aside():
                monitor.grid(state.step, preview.draw(engine, ema))

    # Save the end, or what a signal or the time has ended.
    health.at(state.step, "saving")
    batches.close()
    monitor.close()
    audit.close()
    checkpoints.save(state.step, state.tensors, state.scalars(), wait=True)
    snapshots.finish()
    monitor.tell_goodput()
    if stop_reason:
        run_folder.ask_requeue(folder, world, reason=stop_reason, step=state.step)
    health.end("requeue" if stop_reason else "finished", stop_reason)


def _step(
    config: TrainConfig, state: TrainState, objective: Objective, audit: Audit, micro_batches: Sequence[Batch],
    batch_size: int,
) -> StepRecord:  # fmt: skip
    """Forward, backward, optimizer and EMA on this rank's share of one global batch, without waiting for the device."""
    engine = state.engine

    # Add up the gradient of the mean loss over the global batch.
    loss = torch.zeros((), device=engine.world.device)
    for i, batch in enumerate(micro_batches):
        inputs = objective.inputs(batch)
        audit.write(state.step, batch.n, batch.sample_id, inputs.x_t)
        with engine.micro_step(last=i == len(micro_batches) - 1):
            share = objective.losses(engine.module, inputs).sum() / batch_size
            engine.backward(share)
        loss += share.detach()
    engine.world.sum_(loss)

    # Run optimizer and update the average, unless something is not finite.
    lr = optimizer.learning_rate(config.optimizer, state.step)
    norm = engine.clip_grad_norm(config.optimizer.max_grad_norm)
    found_inf = 1.0 - (torch.isfinite(norm) & torch.isfinite(loss)).float()
    engine.step(lr, found_inf)
    state.ema.update(decay_at(config.ema, state.step), found_inf)
    return StepRecord(state.step, state.n, batch_size, lr, loss, norm, found_inf)


def main(arguments: Sequence[str]) -> int:
    """The command line: returns the exit code."""
    train(load(TrainConfig, arguments))
    return 0


if __name__ == "__main__":
    command.run(main)
