"""Which rank is slow, and why: how long each waited for data, and how long each worked on its steps.

Every rank times itself, and now and then one small reduction on the CPU brings all times to all. A rank that is slow
makes every other wait in the collectives, so the time from step to step is the same on all and tells nothing; what is
compared is the wait for data, and the time in which the rank's own thread worked: its share of the step on a CPU, the
launching of kernels on a GPU (that one GPU is slower than the others is told at the start, by their matmul peaks).
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from drwkv.parallel.distributed import World

log = logging.getLogger("drwkv")
T = TypeVar("T")

MORE_WAIT = 0.1  # of its time, that a rank waits for data beyond the median
MORE_WORK = 1.5  # times the median
LESS_PEAK = 0.6  # of the median
LOOKS_IN_ROW = 3  # that agree before a rank is named


class Stragglers:
    """Times this rank, and every so many steps compares all ranks. `numbers` is for the monitor."""

    def __init__(self, world: World, every_steps: int) -> None:
        self._world, self._every = world, every_steps
        self._row: Counter[tuple[str, int]] = Counter()  # looks in a row at which a rank was found slow
        self._begin()

    def _begin(self) -> None:
        self._waited = self._worked = 0.0
        self._steps, self._since = 0, time.perf_counter()

    def fetch(self, read: Callable[[], T]) -> T:
        """What `read` gives, timed."""
        begin = time.perf_counter()
        try:
            return read()
        finally:
            self._waited += time.perf_counter() - begin

    @contextmanager
    def working(self) -> Iterator[None]:
        """A step belongs inside. What the thread sleeps in a collective is not counted."""
        begin = time.thread_time()
        yield
        self._worked += time.thread_time() - begin
        self._steps += 1

    def compare(self) -> dict[str, float]:
        """After a step: now and then numbers of all ranks, else nothing. Collective when it is due."""
        if not self._every or self._steps < self._every:
            return {}
        wait = self._waited / (time.perf_counter() - self._since)
        times = of_all_ranks(self._world, [wait, self._worked / self._steps])
        self._begin()
        waits, works = [list(column) for column in zip(*times, strict=True)]
        self._warn(waits, works)
        slowest = max(range(len(waits)), key=waits.__getitem__)
        return {
            "data_wait": statistics.fmean(waits),
            "data_wait_max": waits[slowest],
            "data_wait_max_rank": float(slowest),
            "work_max_over_median": max(works) / max(statistics.median_low(works), 1e-9),
        }

    def _warn(self, waits: list[float], works: list[float]) -> None:
        """Say in words which rank has been slow at the last looks, once for as long as it stays so."""
        found = slow_ranks(waits, works)
        self._row = Counter({key: self._row[key] + 1 for key in found})
        for key, words in found.items():
            if self._row[key] == LOOKS_IN_ROW:
                log.warning("%s", words)


def slow_ranks(waits: list[float], works: list[float]) -> dict[tuple[str, int], str]:
    """(what, rank) -> a sentence; `waits` are shares of time, `works` seconds a step, both by rank."""
    usual_wait, usual_work = statistics.median_low(waits), statistics.median_low(works)
    found = {}
    for rank, (wait, work) in enumerate(zip(waits, works, strict=True)):
        if wait > usual_wait + MORE_WAIT:
            found["wait", rank] = (
                f"rank {rank} waited {wait:.0%} of its time for data; the median is {usual_wait:.0%}"
            )
        if work > MORE_WORK * usual_work:
            found["work", rank] = (
                f"rank {rank} worked {work:.3g} s on each of its steps; the median is {usual_work:.3g} s"
            )
    return found


def of_all_ranks(world: World, values: list[float]) -> list[list[float]]:
    """Each rank's `values`, by rank, on every rank. Collective: one reduction on the CPU."""
    width = len(values)
    slots = [float("-inf")] * (world.size * width)
    slots[world.rank * width : (world.rank + 1) * width] = values
    together = world.agree_max(slots)
    return [together[i : i + width] for i in range(0, len(together), width)]


def warn_of_slow_devices(peaks: list[float]) -> None:
    """Name the ranks whose matmul peak, in FLOP/s, is far below the median."""
    usual = statistics.median_high(peaks)
    for rank, peak in enumerate(peaks):
        if peak < LESS_PEAK * usual:
            log.warning(
                "rank %d: its matmuls reach %.3g TFLOP/s; the median is %.3g TFLOP/s, and all wait for the slowest",
                rank, peak / 1e12, usual / 1e12,
            )  # fmt: skip
