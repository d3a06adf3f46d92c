"""A profile of some steps on demand: a trace to look at, a table of the ten largest operations, and who held memory.

    python train_dist.py ... 'profile.steps=[20, 25]'

writes into RUN/profile/, for each rank that is asked for: `rank_0_steps_20_25.json.gz` (chrome://tracing or
ui.perfetto.dev), `.txt` (the table) and, on a GPU, `.pickle` (for pytorch.org/memory_viz; on a CPU the trace holds
what was allocated). Without `profile.steps` nothing of this runs. Speed over a whole run is speed.py's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from drwkv.kernels.bench.report import markdown_table
from drwkv.parallel.distributed import World

log = logging.getLogger("drwkv")
ROWS, MOST_LETTERS = 10, 80  # of the table, and of a name in it
MOST_MEMORY_EVENTS = 200_000  # that are kept of allocations on a GPU


@dataclass
class ProfileConfig:
    """Which steps are profiled, and on which ranks."""

    # First and last optimizer step, e.g. [20, 25]; empty: none
    steps: list[int] = field(default_factory=list)
    # Those that write a profile; one that the run does not have is passed over
    ranks: list[int] = field(default_factory=lambda: [0])


class StepProfiler:
    """Starts before the first step that is asked for and writes before the step after the last one, or at the end."""

    def __init__(
        self,
        config: ProfileConfig,
        folder: Path,
        world: World,
        aside: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """`aside`: a context for work that belongs to no step's time (`Monitor.aside`)."""
        self._steps = tuple(config.steps) if world.rank in config.ranks else ()
        self._folder, self._world, self._aside = folder / "profile", world, aside
        self._running: profile | None = None
        self._last = 0

    def before(self, step: int) -> None:
        """Start or end a profile; called before each step."""
        if not self._steps:
            return
        first, last = self._steps
        if self._running is not None and step > last:
            self.close()
        elif self._running is None and first <= step <= last:
            with self._aside():
                self._start()
        self._last = step

    def close(self) -> None:
        """Write what runs, if anything: waits for the device."""
        if self._running is not None:
            with self._aside():
                self._write(self._running)
            self._running, self._steps = None, ()

    @property
    def _on_gpu(self) -> bool:
        return self._world.device.type == "cuda"

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MOST_MEMORY_EVENTS)
        self._running = profile(activities=activities, record_shapes=True, profile_memory=not self._on_gpu)
        self._running.start()

    def _write(self, running: profile) -> None:
        first, last = self._steps
        self._folder.mkdir(parents=True, exist_ok=True)
        name = self._folder / f"rank_{self._world.rank}_steps_{first}_{min(last, self._last)}"
        if self._on_gpu:
            torch.cuda.synchronize(self._world.device)
        running.stop()
        running.export_chrome_trace(f"{name}.json.gz")
        Path(f"{name}.txt").write_text(largest_operations(running, on_gpu=self._on_gpu) + "\n")
        if self._on_gpu:
            torch.cuda.memory._dump_snapshot(f"{name}.pickle")
            torch.cuda.memory._record_memory_history(enabled=None)
        log.info("profile of steps %d to %d: %s.txt, .json.gz", first, min(last, self._last), name)


def largest_operations(profiled: profile, *, on_gpu: bool) -> str:
    """The kernels of a GPU, or the operations of a CPU, that took most time themselves, as a table."""
    events = [event for event in profiled.key_averages() if not getattr(event, "is_user_annotation", False)]
    if on_gpu:
        took = {
            e.key: (e.self_device_time_total, e.count) for e in events if e.device_type == DeviceType.CUDA
        }
    else:
        took = {e.key: (e.self_cpu_time_total, e.count) for e in events}
    total_us = max(1.0, sum(us for us, _ in took.values()))
    largest = sorted(took.items(), key=lambda item: -item[1][0])[:ROWS]
    rows = [
        [name[:MOST_LETTERS], f"{us / 1e3:.2f}", f"{us / total_us:.1%}", f"{calls:,}"]
        for name, (us, calls) in largest
    ]
    return markdown_table(("kernel" if on_gpu else "operation", "ms", "share", "calls"), rows)
