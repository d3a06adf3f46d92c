"""Speed of a training step on this machine: `python -m drwkv.training.bench`, alone or under torchrun.

    python -m drwkv.training.bench            # on a GPU: H/2 at 512 px
    python -m drwkv.training.bench --tiny     # anywhere, in seconds
    python -m drwkv.training.bench --batch 32 64 --checkpoint none --compile true --json bench.json

A row a batch size, a mode of activation checkpointing, compiled or not: images a second, MFU against the matmul peak
that is measured first, and the most memory; then the ten largest kernels of the fastest row. Engine, objective and
optimizer are those of a run (train_dist.py's `_step`, which a test compares with the step here); the samples are
random moments in memory. One block is measured in drwkv/models/bench_block.py, operators in drwkv.kernels.bench.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from drwkv import command
from drwkv.config import check_parallel
from drwkv.data.loader import Batch
from drwkv.data.manifest import Manifest
from drwkv.diffusion.gaussian import GaussianProcess
from drwkv.kernels.bench.report import machine, markdown_table, versions
from drwkv.models.config import ModelConfig, from_config
from drwkv.parallel import ActivationConfig, Engine, ParallelConfig, World, session, wrap
from drwkv.training import optimizer
from drwkv.training.ema import Ema
from drwkv.training.objective import Objective, ObjectiveConfig
from drwkv.training.optimizer import OptimizerConfig
from drwkv.training.profiling import largest_operations
from drwkv.training.speed import Speed, speed_of

GIB = 1 << 30
HEAD = ("batch a rank", "checkpointing", "compiled", "images/s", "MFU", "TFLOP/s a rank", "memory GiB")
TINY = (
    "--model DRWKV-S/2 --depth 3 --input-size 8 --classes 10 --batch 1 8 --checkpoint none full --compile false "
    "--precision fp32 --steps 2"
)
WARM_STEPS = 3  # the first compiles, or chooses among kernels
OPTIMIZER = OptimizerConfig()


@dataclass(frozen=True)
class Plan:
    """What all rows share."""

    model: ModelConfig
    engine: str
    precision: str
    steps: int  # that are timed


@dataclass(frozen=True)
class Row:
    """One way to run the step, and what came of it; None: it did not fit into memory."""

    batch: int  # samples a rank and step
    checkpoint: str
    compiled: bool
    images_per_sec: float | None = None  # all ranks together
    mfu: float | None = None
    tflops: float | None = None  # a rank
    memory_gib: float | None = None  # most that tensors took on this rank's GPU; None on a CPU

    def cells(self) -> list[str]:
        told = [str(self.batch), self.checkpoint, "yes" if self.compiled else "no"]
        if self.images_per_sec is None or self.tflops is None:
            return [*told, "out of memory", "", "", ""]
        mfu = "" if self.mfu is None else f"{self.mfu:.3f}"
        memory = "" if self.memory_gib is None else f"{self.memory_gib:.1f}"
        return [*told, f"{self.images_per_sec:.1f}", mfu, f"{self.tflops:.3g}", memory]


class Step:
    """A training step on synthetic samples, ready to be taken again and again."""

    def __init__(self, plan: Plan, row: Row, world: World) -> None:
        torch._dynamo.reset()  # or what was compiled for another row would be made fit for both
        process = GaussianProcess()
        with world.device:  # initial values are drawn there, in no time
            model = from_config(plan.model, seed=0)
        config = ParallelConfig(
            engine=plan.engine,  # type: ignore[arg-type]
            precision=plan.precision,  # type: ignore[arg-type]
            activations=ActivationConfig(row.checkpoint),  # type: ignore[arg-type]
            compile=row.compiled,
        )
        self.objective = Objective(
            process,
            model,
            manifest_of(plan.model),
            ObjectiveConfig(),
            seed=0,
            label_drop=0.1,
            device=world.device,
        )
        self.engine: Engine = wrap(model, partial(optimizer.build, config=OPTIMIZER), config, world)
        self.ema = Ema(self.engine)
        self.batch = synthetic_batch(plan.model, row.batch, world)

    def take(self) -> torch.Tensor:
        """One step; the loss, still on the device."""
        engine, world = self.engine, self.engine.world
        inputs = self.objective.inputs(self.batch)
        with engine.micro_step(last=True):
            share = self.objective.losses(engine.module, inputs).sum() / (len(self.batch) * world.size)
            engine.backward(share)
        loss = world.sum_(share.detach())
        norm = engine.clip_grad_norm(OPTIMIZER.max_grad_norm)
        found_inf = 1.0 - (torch.isfinite(norm) & torch.isfinite(loss)).float()
        engine.step(OPTIMIZER.lr, found_inf)
        self.ema.update(0.9999, found_inf)
        return loss


def manifest_of(model: ModelConfig) -> Manifest:
    """The data that a model of latents is trained on."""
    channels, height, width = model.shape
    return Manifest(
        "moments", model.num_classes or 0, channels, height, width, 8 * height, "none", "float16", 0, 1,
        scale=0.18215, shift=0.0,
    )  # fmt: skip


def synthetic_batch(model: ModelConfig, size: int, world: World) -> Batch:
    """Random moments, in pinned memory where there is a GPU, as the loader gives them."""
    channels, height, width = model.shape
    generator = torch.Generator().manual_seed(world.rank)
    x = torch.randn(size, 2 * channels, height, width, generator=generator).to(torch.float16)
    n = torch.arange(size) + world.rank * size
    y = n % (model.num_classes or 1)
    if world.device.type == "cuda":
        n, x, y = n.pin_memory(), x.pin_memory(), y.pin_memory()
    return Batch(n, n, x, y)


def measure(plan: Plan, row: Row, speed: Speed, world: World) -> Row:
    """The row with its numbers: seconds from the first timed step to the end of the last on the slowest rank."""
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(world.device)
    try:
        seconds: float | None = _seconds(plan, row, world)
    except torch.OutOfMemoryError:
        seconds = None
    _free(on_gpu)  # here, where no error holds the tensors of its step any more
    if seconds is None:
        return row
    numbers = speed.numbers(row.batch * world.size, seconds)
    images = numbers["images_per_sec"]
    return Row(
        row.batch, row.checkpoint, row.compiled, images, numbers.get("mfu"),
        images * speed.flop_per_image / world.size / 1e12,
        torch.cuda.max_memory_allocated(world.device) / GIB if on_gpu else None,
    )  # fmt: skip


def _seconds(plan: Plan, row: Row, world: World) -> float:
    step = Step(plan, row, world)
    for _ in range(WARM_STEPS):
        step.take()
    _wait(world)
    begin = time.perf_counter()
    for _ in range(plan.steps):
        step.take()
    _wait(world)
    return (time.perf_counter() - begin) / plan.steps


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    world.barrier()


def _free(on_gpu: bool) -> None:
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()


def largest_kernels(plan: Plan, row: Row, world: World) -> str:
    """The table of where the time of a few steps of this row goes."""
    on_gpu = world.device.type == "cuda"
    step = Step(plan, row, world)
    for _ in range(WARM_STEPS):
        step.take()
    _wait(world)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        for _ in range(plan.steps):
            step.take()
        _wait(world)
    return largest_operations(recorded, on_gpu=on_gpu)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, and print it."""
    given = _parser().parse_args(arguments)
    if given.tiny:
        given = _parser().parse_args([*TINY.split(), *(arguments if arguments is not None else sys.argv[1:])])
    size = given.input_size
    model = ModelConfig(given.model, [size, size], 4, given.classes or None)
    if given.depth:
        model.options["depth"] = given.depth
    plan = Plan(model, given.engine, given.precision, given.steps)
    check_parallel(ParallelConfig(engine=plan.engine, precision=plan.precision))  # type: ignore[arg-type]
    rows = [
        Row(batch, checkpoint, compiled == "true")
        for batch, checkpoint, compiled in itertools.product(given.batch, given.checkpoint, given.compile)
    ]
    torch.backends.cuda.matmul.allow_tf32 = ParallelConfig().tf32
    with session(cpu_threads=given.threads) as world:
        with torch.device("meta"):
            shapes = from_config(model, seed=0)
        speed = speed_of(shapes, plan.precision, None, world)
        tell = print if world.is_first else (lambda *_, **__: None)
        peak = speed.peak_flops / world.size / 1e12
        tell(
            f"{machine(world.device)}, {world.size} ranks; {versions()}\n{model.name}, {size}x{size}x4, "
            f"{plan.engine}, {plan.precision}; matmuls reach {peak:.3g} TFLOP/s a rank\n"
        )
        found = []
        for row in rows:
            found.append(measure(plan, row, speed, world))
            tell(f"  {', '.join(filter(None, found[-1].cells()))}", file=sys.stderr, flush=True)
        tell(markdown_table(HEAD, [row.cells() for row in found]))
        fitting = [row for row in found if row.images_per_sec is not None]
        if fitting:
            best = max(fitting, key=lambda row: row.images_per_sec or 0.0)
            told = f"batch {best.batch}, checkpointing {best.checkpoint}, {'' if best.compiled else 'not '}compiled"
            tell(f"\n{told}:\n\n{largest_kernels(plan, best, world)}")
        if given.json and world.is_first:
            about = {
                "machine": machine(world.device),
                "versions": versions(),
                "ranks": world.size,
                "peak_tflops": peak,
            }
            given.json.write_text(
                json.dumps({**about, **asdict(plan), "rows": [asdict(row) for row in found]}, indent=1)
            )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m drwkv.training.bench", description="Speed of a training step on this machine."
    )
    parser.add_argument("--model", default="DRWKV-H/2", help="a model by name (DRWKV-H/2)")
    parser.add_argument("--depth", type=int, help="its blocks (as the name says)")
    parser.add_argument("--input-size", type=int, default=64, help="rows = columns of a latent (64: 512 px)")
    parser.add_argument("--classes", type=int, default=1000, help="labels; 0: unconditional (1000)")
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[16, 32, 64, 128], help="samples a rank (16 32 64 128)"
    )
    parser.add_argument(
        "--checkpoint", nargs="+", default=["none", "selective", "full"], choices=["none", "selective", "full"],
        help="modes of activation checkpointing (all)",
    )  # fmt: skip
    parser.add_argument(
        "--compile", nargs="+", default=["false", "true"], choices=["false", "true"], help="blocks compiled (both)"
    )  # fmt: skip
    parser.add_argument(
        "--engine", default="fsdp", choices=["ddp", "fsdp", "zero1", "zero2", "zero3"], help="(fsdp)"
    )
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16", "bf16_params"], help="(bf16)")
    parser.add_argument("--steps", type=int, default=10, help="that are timed, a row (10)")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's own choice)")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--json", type=Path, help="write the numbers into this file too")
    return parser


if __name__ == "__main__":
    command.run(main)
