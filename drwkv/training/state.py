"""All that changes in a run, in one place: weights, moments, EMA and counters. How it is stored: checkpoint.py."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from drwkv.parallel.engine import Engine
from drwkv.training.checkpoint import Checkpoints, read_scalars
from drwkv.training.ema import Ema
from drwkv.training.health import NonFiniteRun
from drwkv.training.monitor import StepRecord

log = logging.getLogger("drwkv")
FORMAT = 1
# What runs did before these keys of their identity existed: a checkpoint without them means these values.
BEFORE_THEY_WERE_KEYS = {
    "objective.weight": "none",
    "objective.min_snr_gamma": 5.0,
    "objective.vlb_weight": 1.0,
}


@dataclass
class TrainState:
    """The state of a run.

    Attributes:
        step: batches taken so far, skipped ones included.
        n: samples consumed so far; the whole state of the data stream.
        skipped: windows [n0, n1) of samples that were consumed and not applied, rising.
        identity: what must not change while the run goes on, by config key.
    """

    engine: Engine
    ema: Ema
    identity: dict[str, Any]
    step: int = 0
    n: int = 0
    skipped: list[tuple[int, int]] = field(default_factory=list)

    def tensors(self, kinds: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """Every tensor of the state, or those of some kinds, under one layout for all engines.

        model.*, ema.*, exp_avg.*, exp_avg_sq.*, and ema_WIDTH.* of each power-function average. Collective.
        """
        wanted = None if kinds is None else set(kinds)
        found: dict[str, torch.Tensor] = {}
        for kind, name, part in self._parts():
            if wanted is None or kind in wanted:
                found[f"{kind}.{name}"] = self.engine.whole(name, part)
        return found

    def _parts(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """(kind, name, this rank's part) of all that `tensors` gives."""
        for name, part in self.engine.parts.items():
            yield "model", name, part.detach()
            for kind, parts in self.ema.kinds.items():
                yield kind, name, parts[name]
            for kind, moment in self.engine.moments(name).items():
                yield kind, name, moment

    def num_bytes(self, num_params: int) -> int:
        """Bytes of all tensors of the state of a model of so many parameters; all are float32."""
        return 4 * num_params * len({kind for kind, _, _ in self._parts()})

    def scalars(self) -> dict[str, Any]:
        """Everything else, as JSON takes it. Reads the count of applied updates from the device."""
        return {
            **self.snapshot_scalars(),
            "n": self.n,
            "skipped": self.skipped,
            "identity": self.identity,
        }

    def snapshot_scalars(self) -> dict[str, Any]:
        """What tells when and of which widths the power-function averages are."""
        return {
            "format": FORMAT,
            "step": self.step,
            "updates": self.engine.updates,
            "widths": self.ema.widths,
        }

    def load(self, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]) -> None:
        """Take over what `tensors` returned, loaded into in place, and what `scalars` did. Collective."""
        for kind, name, part in self._parts():
            self.engine.take(name, part, tensors[f"{kind}.{name}"])
        self.step, self.n = int(scalars["step"]), int(scalars["n"])
        self.skipped = [(int(a), int(b)) for a, b in scalars["skipped"]]
        self.engine.updates = int(scalars["updates"])
        self.engine.refresh()

    def note(self, record: StepRecord, loss: float, skipped: bool) -> None:
        """List the batch of a step that the device left out."""
        if skipped:
            self.list_skipped(record.n, record.n + record.num_samples)

    def list_skipped(self, n0: int, n1: int) -> None:
        """List the samples [n0, n1) as consumed and not applied; joins windows that touch."""
        joined: list[tuple[int, int]] = []
        for a, b in sorted([*self.skipped, (n0, n1)]):
            if joined and a <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(b, joined[-1][1]))
            else:
                joined.append((a, b))
        self.skipped = joined

    def list_all_skipped(self, windows: Iterable[Sequence[int]]) -> None:
        """List windows that the config asks to pass over, of samples yet to come."""
        for n0, n1 in windows:
            if n1 > self.n:
                self.list_skipped(max(n0, self.n), n1)

    def is_skipped(self, batch_size: int) -> bool:
        """Whether the next batch touches a window that is skipped."""
        n0, n1 = self.n, self.n + batch_size
        return any(a < n1 and n0 < b for a, b in self.skipped)

    def leave_out(self, batch_size: int) -> None:
        """List the next batch whole as skipped and pass over it."""
        self.list_skipped(self.n, self.n + batch_size)
        self.advance(batch_size)

    def advance(self, batch_size: int) -> None:
        """Count one batch as consumed."""
        self.step, self.n = self.step + 1, self.n + batch_size


def resume(state: TrainState, checkpoints: Checkpoints, *, at_most_n: int | None = None) -> bool:
    """Load the newest whole checkpoint into `state`, if there is one (with n <= `at_most_n`). Collective.

    Raises ValueError if it belongs to a run of another meaning, or to another model.
    """
    found = checkpoints.newest(at_most_n)
    if found is None:
        return False
    saved = read_scalars(found)
    if saved.get("format") != FORMAT:
        raise ValueError(
            f"{found}: has format {saved.get('format')!r}, and this version reads {FORMAT} alone"
        )
    check_identity(saved["identity"], state.identity, where=str(found))
    check_widths(saved.get("widths", []), state.ema.widths, where=str(found))
    tensors = state.tensors()
    state.load(tensors, checkpoints.restore(found, tensors))
    log.info("continuing from %s: step %d, sample %d", found, state.step, state.n)
    return True


def go_back(state: TrainState, checkpoints: Checkpoints, bad_n: int) -> None:
    """Return to the newest checkpoint from before sample `bad_n`, and list all from there to now as skipped.

    Raises NonFiniteRun if there is none. Collective.
    """
    step, n, known = state.step, state.n, list(state.skipped)
    checkpoints.finish()
    if not resume(state, checkpoints, at_most_n=bad_n):
        raise NonFiniteRun(
            f"step {step}: not finite since sample {bad_n}, and there is no checkpoint from before"
        )
    checkpoints.discard_after(state.step)
    for window in [*known, (bad_n, n)]:
        state.list_skipped(*window)
    log.warning("went back from step %d to step %d; samples %d to %d are skipped", step, state.step, bad_n, n)


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """ValueError for the first key that changes the meaning of the run and differs from the checkpoint's."""
    saved, now = {**BEFORE_THEY_WERE_KEYS, **saved}, {**BEFORE_THEY_WERE_KEYS, **now}
    for key in sorted(saved.keys() | now.keys()):
        if saved.get(key) != now.get(key):
            raise ValueError(
                f"{where}: {key} was {saved.get(key)!r} and is {now.get(key)!r} now, which would change the run's "
                "meaning: set it back, or give another run.folder"
            )


def check_widths(saved: Sequence[float], now: Sequence[float], where: str) -> None:
    """ValueError if power-function averages were to begin or end in mid-run: they weigh all updates from the first."""
    if sorted(saved) != sorted(now):
        raise ValueError(
            f"{where}: ema.widths was {list(saved)} and is {list(now)} now, and such averages cannot begin in "
            "mid-run: set it back, or give another run.folder"
        )
