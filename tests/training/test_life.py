"""A million steps in small: 400 steps through every mishap, on changing engines and ranks, end as an undisturbed run.

The undisturbed run passes over the samples that the other one had to skip; it meets nothing else.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from processes import Applications, Finished, Group, audit, metrics

from drwkv.training.checkpoint import latest, read_scalars

STEPS, BATCH = 400, 24
LIFE = str(Path(__file__).parents[1] / "support" / "life.py")
TOLERANCE = 1e-4  # of the loss, relative


@dataclass(frozen=True)
class Segment:
    """A stretch of the life: who runs, what befalls it, and what must be said of it."""

    engine: str
    world_size: int
    mishap: dict  # of support/life.py
    codes: set[int]  # what the processes may end with
    said: list[str]  # in the run's log, or on the screen
    # What this test does to the processes, once `act_at` steps are done
    act: Callable[[Group], None] | None = None
    act_at: int = 0
    keys: list[str] = field(default_factory=list)
    freezes: bool = False  # rank 1 has to be killed at the end


def send(number: signal.Signals, *ranks: int) -> Callable[[Group], None]:
    """Send a signal to these ranks, or to all."""

    def act(group: Group) -> None:
        for rank in ranks or range(len(group.processes)):
            group.processes[rank].send_signal(number)

    return act


KILL, STOP, TERM, USR1 = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGUSR1
NONE: dict = {"kind": "none"}
KILLED = {-9}

SEGMENTS = [
    Segment("ddp", 1, NONE, KILLED, [], send(KILL), 27),
    Segment("fsdp", 2, NONE, {-9, 1}, ["rank 1 is gone, last seen at step"], send(KILL, 1), 58),
    Segment("fsdp", 2, NONE, {0}, ["stopped by SIGTERM after step"], send(TERM, 1), 85),
    Segment(
        "zero3", 3, {"kind": "sleep", "rank": 2, "steps": [110]}, {75}, ["rank 2 at step 110, training", "stand"],
        keys=["health.stall_sec=6"],
    ),
    Segment(
        "zero3", 3, {"kind": "nan", "rank": 1, "steps": [125, 131]}, KILLED,
        ["step 125: loss or gradient is not finite", "step 131: loss"], send(KILL), 146,
    ),
    Segment(
        "fsdp", 4, {"kind": "nan", "rank": 3, "steps": [167, 168, 169]}, {0},
        ["went back from step", "stopped by SIGUSR1"], send(USR1, 2), 190,
    ),
    Segment("zero3", 4, {"kind": "disk", "rank": 2, "steps": [210]}, {2}, ["No space left on device"]),
    Segment("fsdp", 2, NONE, {-9, 1}, ["gone"], send(KILL, 0), 233),
    Segment("ddp", 2, {"kind": "data", "rank": 1, "steps": [256]}, {2}, ["shard 7 is gone"]),
    Segment("fsdp", 1, NONE, {0}, ["stopped by TIME_LIMIT"], keys=["health.max_hours=0.0008", "health.grace_sec=1"]),
    Segment(
        "fsdp", 2, NONE, {75, -9}, ["rank 1 at step", "without a sign of life"], send(STOP, 1), 300,
        keys=["health.stall_sec=6"], freezes=True,
    ),
    Segment("ddp", 3, NONE, KILLED, [], send(KILL), 345),
    Segment("fsdp", 2, NONE, {0}, ["is damaged", "the one before is taken"]),
]  # fmt: skip


def start(applications: Applications, digits: Path, folder: Path, segment: Segment) -> Group:
    return applications.start(
        LIFE, json.dumps(segment.mishap | {"batch_size": BATCH}), "--config", "configs/digits.yaml",
        f"run.folder={folder}", f"run.total_steps={STEPS}", f"run.batch_size={BATCH}", "run.audit=true",
        f"data.paths=[{digits / 'train'}]", "model.options.hidden_size=32", "model.options.depth=3",
        "model.options.drop_path_rate=0.1", "optimizer.lr=1e-3", "optimizer.stages=[{from_step: 400, lr: 1e-4}]",
        "monitor.progress=false", "monitor.grid_every_steps=0", "monitor.tensorboard_every_steps=0",
        "checkpoint.every_steps=10", "checkpoint.keep_last=2", "health.max_nonfinite_in_row=3",
        "health.heartbeat_sec=0.5", "parallel.timeout_sec=120", f"parallel.engine={segment.engine}", *segment.keys,
        world_size=segment.world_size,
    )  # fmt: skip


def num_steps(folder: Path) -> int:
    lines = folder / "metrics.jsonl"
    return len(lines.read_text().splitlines()) if lines.exists() else 0


def live(applications: Applications, digits: Path, folder: Path, segment: Segment) -> Finished:
    """Let one segment happen."""
    # A fast machine may be there before it starts: it is to have begun, too.
    act_at = max(segment.act_at, num_steps(folder) + 15)
    group = start(applications, digits, folder, segment)
    if segment.act is not None:
        while num_steps(folder) < act_at:
            assert group.running(), group.wait().output
            time.sleep(0.01)
        segment.act(group)
        if segment.freezes:  # a frozen process does not even die by itself
            for process in group.processes[:1]:
                process.wait(120)
            group.kill()
    return group.wait(240)


def flip_a_byte(checkpoint: Path) -> None:
    """Damage the newest checkpoint without changing a size."""
    file = max(checkpoint.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)


@pytest.mark.proof
@pytest.mark.timeout(2400)
def test_a_run_through_every_mishap_ends_as_an_undisturbed_one(
    applications: Applications, digits: Path, tmp_path: Path
) -> None:
    folder, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
    log = folder / "log.txt"
    for i, segment in enumerate(SEGMENTS):
        if i == len(SEGMENTS) - 1:
            newest = latest(folder / "checkpoints")
            assert newest is not None
            flip_a_byte(newest)
        before = len(log.read_text()) if log.exists() else 0
        finished = live(applications, digits, folder, segment)
        said = log.read_text()[before:] + finished.output
        assert set(finished.codes) <= segment.codes, (i, segment, finished.codes, said)
        assert all(words in said for words in segment.said), (i, segment, said)
        print(
            f"{i}: {segment.engine} on {segment.world_size}, {num_steps(folder)} steps, codes {finished.codes}"
        )

    checkpoint = latest(folder / "checkpoints")
    assert checkpoint is not None
    scalars = read_scalars(checkpoint)
    skipped = {n for n0, n1 in scalars["skipped"] for n in range(n0, n1)}
    assert scalars["n"] == STEPS * BATCH and 5 * BATCH <= len(skipped) <= 40 * BATCH, scalars
    assert scalars["updates"] == STEPS - len(skipped) // BATCH

    # Every sample was applied once, or is listed as skipped.
    rows = audit(folder)
    applied = [n for _, n, _, _ in rows if n not in skipped]
    assert len(applied) == len(set(applied)) and set(applied) | skipped == set(range(STEPS * BATCH))

    once = Segment("ddp", 1, NONE, {0}, [], keys=[f"run.skip={json.dumps(scalars['skipped'])}"])
    finished = live(applications, digits, undisturbed, once)
    assert finished.codes == [0], finished.output
    assert [row for row in rows if row[1] not in skipped] == audit(undisturbed)
    ours, theirs = metrics(folder), metrics(undisturbed)
    pairs = [(a["step"], a["loss"], b["loss"]) for a, b in zip(ours, theirs, strict=True) if not b["skipped"]]
    assert [a["skipped"] for a in ours] == [b["skipped"] for b in theirs]
    worst = max(abs(a - b) / b for _, a, b in pairs)
    print(f"{len(pairs)} steps applied, {len(skipped)} samples skipped; losses differ by at most {worst:.1e}")
    assert worst < TOLERANCE, worst
