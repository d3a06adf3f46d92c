"""How long cases take: `measure_all`. On a GPU the median of 10 launches, on a CPU the least of some runs.

A CPU is shared with other programs, which only ever add time; so the cases are gone through in rounds, and the least
counts. The forward records its graph, as in training. Beside each case a copy of its least bytes is timed: what the
memory gives at that moment. Cases are defined in `cases.py`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from drwkv.kernels.autotune import launch_ms
from drwkv.kernels.bench.cases import ATTENTION, Case, Plan, build

MIN_RUNS, MAX_RUNS = 3, 50  # of one thing on a CPU, beside one to warm up
SLOW_SEC = 1.0  # what takes longer runs once a round, warm or not
VERY_SLOW_SEC = 5.0  # forward and backward; what takes longer is in the first round alone
LIMIT_SEC = 20.0  # attention that would take longer is left out


@dataclass(frozen=True)
class Direction:
    """A forward or a backward: its time, the least bytes that it can move, and the time to copy so many."""

    ms: float
    num_bytes: int
    copy_ms: float

    @property
    def gb_per_s(self) -> float:
        return self.num_bytes / self.ms / 1e6

    @property
    def of_copy(self) -> float:
        """Share of the bandwidth that a copy reaches."""
        return self.copy_ms / self.ms


@dataclass(frozen=True)
class Result:
    """What one case took."""

    case: Case
    forward: Direction
    backward: Direction

    @property
    def both_ms(self) -> float:
        return self.forward.ms + self.backward.ms


Results = dict[Case, Result]


def measure_all(plan: Plan, device: torch.device) -> Results:
    """Every case of the plan in its order, but attention that would take too long."""
    results: Results = {}
    rounds = 1 if device.type == "cuda" else plan.rounds
    for turn, case in itertools.product(range(rounds), plan.cases(device)):
        last = results.get(case)
        if turn == 0 and attention_ms(case, results) < LIMIT_SEC * 1e3:
            results[case] = measure(case, device, plan.budget_sec)
        elif last is not None and last.both_ms < VERY_SLOW_SEC * 1e3:
            results[case] = _least(last, measure(case, device, plan.budget_sec))
    return results


def attention_ms(case: Case, results: Results) -> float:
    """Forward and backward of attention as a shorter case with as many tokens foretells it; 0 for all else."""
    B, T, C = case.shape
    shorter = [
        result.both_ms * T / t
        for (b, t, c), result in ((other.shape, result) for other, result in results.items())
        if case.operator == result.case.operator == ATTENTION and (b * t, c) == (B * T, C) and t < T
    ]
    return shorter[-1] if shorter else 0.0


def measure(case: Case, device: torch.device, budget_sec: float) -> Result:
    """One case, forward and backward each by itself; on a CPU with about so many seconds for each."""
    call = build(case, device)
    outputs = call.function(*call.inputs)

    def forward() -> None:
        call.function(*call.inputs)

    def backward() -> None:
        torch.autograd.grad(outputs, call.inputs, call.grads, retain_graph=True)

    def direction(run: Callable[[], object], num_bytes: int) -> Direction:
        floats = num_bytes // 8  # 4 bytes each, read and written
        source, target = torch.zeros(floats, device=device), torch.zeros(floats, device=device)
        ms = time_ms(run, device, budget_sec)
        return Direction(ms, num_bytes, time_ms(lambda: target.copy_(source), device, budget_sec / 4))

    return Result(case, direction(forward, call.forward_bytes), direction(backward, call.backward_bytes))


def _least(one: Result, other: Result) -> Result:
    def least(a: Direction, b: Direction) -> Direction:
        return Direction(min(a.ms, b.ms), a.num_bytes, min(a.copy_ms, b.copy_ms))

    return Result(one.case, least(one.forward, other.forward), least(one.backward, other.backward))


def time_ms(run: Callable[[], object], device: torch.device, budget_sec: float) -> float:
    """Milliseconds of `run`: on a GPU as `launch_ms` tells them, on a CPU the least of about budget_sec of runs."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return launch_ms(run)

    def once() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    first, runs = once(), list[float]()
    if first > SLOW_SEC:
        return first * 1e3
    while len(runs) < MIN_RUNS or (sum(runs) < budget_sec and len(runs) < MAX_RUNS):
        runs.append(once())
    return min(runs) * 1e3
