"""Goodput: the share of a run's wall time, from its first start to now, that was spent in steps that count.

Steps that count are those in metrics.jsonl: what was rolled back or done again after a kill has been cut from it, and
what was left out as not finite took time for nothing. Saves, grids and set-up are in no step's seconds. A step that
took far longer than others of the same start (it compiled, or waited for data) counts with a few times their median.
"""

from __future__ import annotations

import time
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

MEDIAN_STEPS = 1000
STALL = 3.0  # a step counts with at most so many times the median of the steps of its start


class Goodput:
    """Counts the steps of the history that survives; made anew when that is cut back."""

    def __init__(self, starts: Iterable[Mapping[str, Any]], steps: Iterable[Mapping[str, Any]]) -> None:
        """The lines of starts.jsonl and of metrics.jsonl."""
        times, bounds = list[float](), list[int]()
        for start in starts:
            times.append(start["time"])
            while bounds and bounds[-1] >= start["step"]:
                bounds.pop()  # nothing is left of what that start did
            bounds.append(start["step"])
        self.since = times[0] if times else time.time()
        seconds = [array("d") for _ in bounds or [0]]
        for line in steps:
            if not line["skipped"]:
                seconds[max(0, bisect_right(bounds, line["step"]) - 1)].append(line["seconds"])
        *before, self._seconds = seconds
        # Of a long start the median is taken anew now and then alone.
        self._counted: float | None = None
        self._most = 0.0  # that a step counts with
        self._sec_before, self._steps_before = sum(map(_that_count, before)), sum(map(len, before))

    def add(self, seconds: float) -> None:
        """Count one more step of the start that goes on."""
        self._seconds.append(seconds)
        if self._counted is not None and len(self._seconds) % MEDIAN_STEPS:
            self._counted += min(seconds, self._most)
        else:
            self._counted = None

    @property
    def num_steps(self) -> int:
        return self._steps_before + len(self._seconds)

    @property
    def step_sec(self) -> float:
        """Seconds in steps that count."""
        if self._counted is None:
            found = _that_count(self._seconds)
            if len(self._seconds) < MEDIAN_STEPS:
                return self._sec_before + found
            self._counted, self._most = found, STALL * float(np.median(self._seconds))
        return self._sec_before + self._counted

    def share(self, now: float | None = None) -> float:
        """Goodput at `now` (a time of day in seconds; None: this moment)."""
        wall_sec = (time.time() if now is None else now) - self.since
        return self.step_sec / wall_sec if wall_sec > 0 else 0.0

    def words(self, now: float | None = None) -> str:
        """One sentence with the numbers that it is made of."""
        now = time.time() if now is None else now
        begin = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.since))
        return (
            f"goodput {self.share(now):.2f}: {self.num_steps:,} steps took {self.step_sec:,.0f} s of the "
            f"{now - self.since:,.0f} s since {begin}"
        )


def _that_count(seconds: array[float]) -> float:
    if not seconds:
        return 0.0
    values = np.frombuffer(seconds)
    total = float(np.minimum(values, STALL * np.median(values)).sum())
    del values  # an array that is looked at cannot grow
    return total
