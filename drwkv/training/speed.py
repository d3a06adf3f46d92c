"""How fast a run is: images a second, and the share of the devices' matmul peak that goes into the model (MFU).

The model's arithmetic is drwkv.models.cost's; the peak is measured here, by matrix products that fill the device. The
share of a run's time that its steps took is goodput.py's, who among the ranks is slow is stragglers.py's.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch
from torch import nn

from drwkv.models.cost import cost
from drwkv.parallel.distributed import World
from drwkv.training.stragglers import of_all_ranks, warn_of_slow_devices

FLOP_PER_MAC = 6  # in training: a multiply and an add, forward and, for weights and inputs, backward
GPU_SIZE, CPU_SIZE = 8192, 1024  # rows of square matrices
GPU_SEC, CPU_SEC = 1.0, 0.2  # about so long is measured
GPU_LAUNCHES = 10  # timed together


@dataclass(frozen=True)
class Speed:
    """What turns samples and seconds into numbers that can be compared between machines."""

    flop_per_image: float = 0.0  # in training; what checkpointing computes again is not counted
    # FLOP/s of matmuls of all ranks together, by the slowest one; 0: not known, no MFU
    peak_flops: float = 0.0

    def numbers(self, num_samples: int, seconds: float) -> dict[str, float]:
        """images_per_sec, and mfu where the peak is known, of a step that took so long."""
        found = {"images_per_sec": num_samples / seconds}
        if self.peak_flops:
            found["mfu"] = found["images_per_sec"] * self.flop_per_image / self.peak_flops
        return found


def speed_of(model: nn.Module, precision: str, peak_tflops: float | None, world: World) -> Speed:
    """The yardstick of a run at `precision` (of `ParallelConfig`); peak_tflops as in `MonitorConfig`. Collective."""
    if peak_tflops is None:
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        world.barrier()  # ranks that share a CPU share its peak: all measure at once
        peaks = [peak for (peak,) in of_all_ranks(world, [matmul_flops(world.device, dtype)])]
        if world.device.type == "cuda":  # on a CPU other programs decide
            warn_of_slow_devices(peaks)
        peak = min(peaks)
    else:
        peak = peak_tflops * 1e12
    return Speed(training_flop(model), peak * world.size)


def training_flop(model: nn.Module) -> float:
    """FLOP of one image forward and backward."""
    return FLOP_PER_MAC * float(cost(model).num_macs)


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of large matrix products on this device, measured once a process: about a second, less on a CPU."""
    is_float32 = dtype == torch.float32
    return _matmul_flops(
        device, dtype, is_float32 and torch.backends.cuda.matmul.allow_tf32, torch.get_num_threads()
    )


@functools.cache
def _matmul_flops(device: torch.device, dtype: torch.dtype, tf32: bool, num_threads: int) -> float:
    on_gpu = device.type == "cuda"
    size, budget_sec = (GPU_SIZE, GPU_SEC) if on_gpu else (CPU_SIZE, CPU_SEC)
    # Random numbers of its own: products of equal numbers take less power on a GPU, and so are faster.
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def seconds() -> float:
        if not on_gpu:
            begin = time.perf_counter()
            torch.mm(a, b, out=out)
            return time.perf_counter() - begin
        begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin_event.record()
        for _ in range(GPU_LAUNCHES):
            torch.mm(a, b, out=out)
        end_event.record()
        end_event.synchronize()
        return begin_event.elapsed_time(end_event) / 1e3 / GPU_LAUNCHES

    seconds()  # chooses an algorithm
    best, end = float("inf"), time.perf_counter() + budget_sec
    while best == float("inf") or time.perf_counter() < end:
        best = min(best, seconds())
    return 2.0 * size**3 / best
