"""What makes one rank act differently, agreed on by all ranks before anyone acts: errors, signals, non-finite steps.

Nothing here saves or stops by itself: the loop asks, and acts on the same answer on every rank.
"""

from __future__ import annotations

import logging
import math
import signal
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from drwkv.command import MISTAKE, Ended
from drwkv.data.loader import InterruptedRead
from drwkv.parallel.distributed import World
from drwkv.training.monitor import StepRecord
from drwkv.training.time_limit import TIME_LIMIT, TimeLimit

if TYPE_CHECKING:
    from drwkv.training.run_lock import RunLock
    from drwkv.training.watch import Watch

log = logging.getLogger("drwkv")
T = TypeVar("T")


# Exit codes, the same on every rank, beside command.py's.
NON_FINITE = 3
STALLED = 75  # EX_TEMPFAIL of sysexits.h: the same command again may well succeed

SPIKE_WINDOW = 200  # steps whose losses say what is usual
LEAST_WINDOW = 50  # of them, before anything is called a spike
NORMAL_MAD = 1.4826  # standard deviations of a normal distribution in its median absolute deviation


@dataclass
class HealthConfig:
    """How much goes wrong before a run goes back, or stops."""

    max_nonfinite_in_row: int = 10  # skipped steps in a row that send the run back to its last checkpoint
    max_rollbacks: int = 3  # times that a run goes back before it stops
    # A loss so many deviations above the median of the last 200 is told; 0: none is
    spike_deviations: float = 10.0
    max_spikes_in_row: int = 0  # such steps in a row that send the run back, too; 0: they are told alone
    heartbeat_sec: float = 5.0  # time between signs of life of each rank, and between writings of status.json
    # Standing still for so long ends the run; None: a little less than parallel.timeout_sec; 0: never
    stall_sec: float | None = None
    lost_sec: float = 60.0  # a rank without a sign of life for so long is taken for gone, which ends the run
    lock_sec: float = 60.0  # a run folder whose run gave no sign of life for so long may be taken over
    # How long this job lasts, from its start; None: what SLURM allows it, if it is one of its
    max_hours: float | None = None
    grace_sec: float = 300.0  # time before the end of the job when the run saves and asks to be queued again


class PeerFailure(Ended):
    """Another rank failed; the message names it and says what it said. With that rank's exit code."""


class NonFiniteRun(Ended):
    """Losses or gradients stayed non-finite, or losses high, after every allowed return to a checkpoint."""

    def __init__(self, message: str) -> None:
        super().__init__(message, NON_FINITE)


def exit_code(error: BaseException) -> int:
    """What a process ends with that raises this."""
    if isinstance(error, Ended):
        return error.exit_code
    return MISTAKE if isinstance(error, (ValueError, OSError)) else 1


class Signals:
    """Notes SIGTERM, SIGUSR1 and SIGUSR2 instead of dying of them; the handlers of before come back at the end."""

    NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number


class Health:
    """Collects what goes wrong on this rank, and turns it into what all ranks do next, once a step."""

    def __init__(
        self, config: HealthConfig, world: World, signals: Signals, watch: Watch, lock: RunLock
    ) -> None:
        self._config, self._world = config, world
        self._signals, self._watch, self._lock = signals, watch, lock
        self._limit = TimeLimit(config.max_hours, config.grace_sec, world)
        self._error: BaseException | None = None
        self._row: list[tuple[int, int]] = []  # (step, n) of the skipped steps in a row so far
        self._spikes: list[tuple[int, int]] = []  # and of those with too high a loss
        self._usual: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self.rollbacks = 0

    def at(self, step: int, phase: str) -> None:
        """Say where the loop is, for the watch over all ranks."""
        self._watch.at(step, phase)

    def end(self, state: str, reason: str | None = None) -> None:
        """Say how the run ended, in `status.json`."""
        self._watch.end(state, reason)

    def guard(self, work: Callable[[], T]) -> T | None:
        """Run what may fail on this rank alone; its error is raised by `agree`, when all ranks know.

        None too where a signal or the time has cut the wait for data short; that is for `agree` to say.
        """
        try:
            return work()
        except InterruptedRead:
            assert self.is_stopping(), "only a signal and the time interrupt the reading"
            return None
        except Exception as error:
            self.note_error(error)
            return None

    def is_stopping(self) -> bool:
        """Whether a signal or the job's time asks this rank to stop: no time to wait for data."""
        return bool(self._signals.received) or self._limit.is_near()

    def note_error(self, error: BaseException | None) -> None:
        """Remember an error of this rank for the next `agree`; None is no error."""
        self._error = self._error or error

    def agree(self) -> str | None:
        """The signal, or TIME_LIMIT, that ends the run, on every rank if on any; None to go on. Collective.

        Raises this rank's own error, or PeerFailure naming the first rank that failed.
        """
        self.note_error(self._lock.lost())
        own = [float(self._error is not None), float(self._signals.received), float(self._limit.is_near())]
        failed, stop, is_late = self._world.agree_max(own)
        if failed:
            error = self._error
            said = self._world.gather(error and (f"{type(error).__name__}: {error}", exit_code(error)))
            if error is not None:
                raise error
            rank, (message, code) = next((rank, told) for rank, told in enumerate(said) if told is not None)
            raise PeerFailure(f"rank {rank} stopped the run: {message}", code)
        if stop:
            return signal.Signals(int(stop)).name
        return TIME_LIMIT if is_late else None

    def note(self, record: StepRecord, loss: float, skipped: bool) -> None:
        """Count a step as applied, skipped, or of too high a loss; in order, the same on every rank."""
        self._watch.note(record, loss, skipped)
        if skipped:
            self._row.append((record.step, record.n))
            log.warning(
                "step %d: loss or gradient is not finite; the step was left out (%d in a row, %d send the run back)",
                record.step, len(self._row), self._config.max_nonfinite_in_row,
            )  # fmt: skip
            return
        self._row.clear()
        most_times, times = self._config.spike_deviations, self._deviations(loss)
        if not most_times or times <= most_times:
            self._spikes.clear()
            self._usual.append(loss)
            return
        self._spikes.append((record.step, record.n))
        most = self._config.max_spikes_in_row
        log.warning(
            "step %d: loss %.4g is %.0f deviations above the median of the last %d steps, %.4g (%d in a row%s)",
            record.step, loss, times, len(self._usual), statistics.median(self._usual), len(self._spikes),
            f", {most} send the run back" if most else "",
        )  # fmt: skip
        if not most:
            # A run that has gone to another level is told of for a while, not for ever.
            self._usual.append(loss)

    def _deviations(self, loss: float) -> float:
        """How many standard deviations a loss lies above the usual, robustly; 0 while there is no usual."""
        if len(self._usual) < LEAST_WINDOW:
            return 0.0
        median = statistics.median(self._usual)
        spread = NORMAL_MAD * statistics.median(abs(one - median) for one in self._usual)
        return (loss - median) / spread if spread > 0 else math.inf if loss > median else 0.0

    def must_go_back(self) -> int | None:
        """First sample of a row of skipped or high steps that has grown too long, else None.

        Raises NonFiniteRun, with the step, once the run has gone back as often as allowed.
        """
        most_high = self._config.max_spikes_in_row
        if len(self._row) >= self._config.max_nonfinite_in_row:
            row, what = self._row, "were not finite"
        elif most_high and len(self._spikes) >= most_high:
            row, what = self._spikes, "had too high a loss"
        else:
            return None
        step, n = row[0]
        if self.rollbacks >= self._config.max_rollbacks:
            raise NonFiniteRun(
                f"steps {step} to {row[-1][0]} {what} after {self.rollbacks} returns to a checkpoint: "
                "lower optimizer.lr or look at the data there"
            )
        return n

    def gone_back(self) -> None:
        """Count a return to a checkpoint; the row of bad steps belongs to the history that was left."""
        self.rollbacks += 1
        self._row.clear()
        self._spikes.clear()

    @property
    def in_bad_row(self) -> bool:
        """Whether the last step heard of was skipped or high: no time to save a state to come back to."""
        return bool(self._row) or (self._config.max_spikes_in_row > 0 and bool(self._spikes))
