"""What makes one rank act differently, agreed on by all ranks before anyone acts: errors, signals, non-finite steps.

Nothing here saves or stops by itself: the loop asks, and acts on the same answer on every rank.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

from drwkv.data.loader import InterruptedRead
from drwkv.parallel.distributed import World
from drwkv.training.monitor import StepRecord

log = logging.getLogger("drwkv")
T = TypeVar("T")


@dataclass
class HealthConfig:
    """How much goes wrong before a run goes back, or stops."""

    max_nonfinite_in_row: int = 10  # skipped steps in a row that send the run back to its last checkpoint
    max_rollbacks: int = 3  # times that a run goes back before it stops


class PeerFailure(RuntimeError):
    """Another rank failed; the message names it and says what it said."""


class NonFiniteRun(RuntimeError):
    """Losses or gradients stayed non-finite after every allowed return to a checkpoint."""


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

    def __init__(self, config: HealthConfig, world: World, signals: Signals) -> None:
        self._config, self._world, self._signals = config, world, signals
        self._error: BaseException | None = None
        self._row: list[tuple[int, int]] = []  # (step, n) of the skipped steps in a row so far
        self.rollbacks = 0

    def guard(self, work: Callable[[], T]) -> T | None:
        """Run what may fail on this rank alone; its error is raised by `agree`, when all ranks know.

        None too where a signal has cut the wait for data short; that is for `agree` to say.
        """
        try:
            return work()
        except InterruptedRead:
            assert self._signals.received, "only a signal interrupts the reading"
            return None
        except Exception as error:
            self.note_error(error)
            return None

    def is_stopping(self) -> bool:
        """Whether a signal has asked this rank to stop: no time to wait for data."""
        return bool(self._signals.received)

    def note_error(self, error: BaseException | None) -> None:
        """Remember an error of this rank for the next `agree`; None is no error."""
        self._error = self._error or error

    def agree(self) -> str | None:
        """The name of the signal that ends the run, on every rank if on any; None to go on. Collective.

        Raises this rank's own error, or PeerFailure naming the first rank that failed.
        """
        failed, stop = self._world.agree_max([float(self._error is not None), float(self._signals.received)])
        if failed:
            said = self._world.gather(
                None if self._error is None else f"{type(self._error).__name__}: {self._error}"
            )
            if self._error is not None:
                raise self._error
            rank, message = next((rank, text) for rank, text in enumerate(said) if text is not None)
            raise PeerFailure(f"rank {rank} stopped the run: {message}")
        return signal.Signals(int(stop)).name if stop else None

    def note(self, record: StepRecord, skipped: bool) -> None:
        """Count a step as applied or skipped; in order, the same on every rank."""
        if not skipped:
            self._row.clear()
            return
        self._row.append((record.step, record.n))
        log.warning(
            "step %d: loss or gradient is not finite; the step was left out (%d in a row, %d send the run back)",
            record.step, len(self._row), self._config.max_nonfinite_in_row,
        )  # fmt: skip

    def must_go_back(self) -> int | None:
        """First sample of a row of skipped steps that has grown too long, else None.

        Raises NonFiniteRun, with the step, once the run has gone back as often as allowed.
        """
        if len(self._row) < self._config.max_nonfinite_in_row:
            return None
        step, n = self._row[0]
        if self.rollbacks >= self._config.max_rollbacks:
            raise NonFiniteRun(
                f"steps {step} to {self._row[-1][0]} were not finite after {self.rollbacks} returns to a checkpoint: "
                "lower optimizer.lr or look at the data there"
            )
        return n

    def gone_back(self) -> None:
        """Count a return to a checkpoint; the row of skipped steps belongs to the history that was left."""
        self.rollbacks += 1
        self._row.clear()

    @property
    def in_bad_row(self) -> bool:
        """Whether the last step heard of was skipped: no time to save a state to come back to."""
        return bool(self._row)
