"""Non-finite steps never reach the weights; signals end a run with a checkpoint; one rank's error stops all."""

from __future__ import annotations

import json
import math
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from poisoned import poisoned
from processes import Applications, Group, audit, losses, metrics

from drwkv.training.checkpoint import latest, read_full, read_scalars
from drwkv.training.health import Health, HealthConfig, NonFiniteRun
from drwkv.training.monitor import StepRecord

SMALL = [
    "--config", "configs/digits.yaml", "run.batch_size=16", "model.options.hidden_size=32", "model.options.depth=3",
    "run.audit=true", "monitor.progress=false", "monitor.grid_every_steps=0", "checkpoint.every_steps=1000",
]  # fmt: skip


def arguments(digits: Path, folder: Path, steps: int, *more: str) -> list[str]:
    return [
        *SMALL,
        f"data.paths=[{digits / 'train'}]",
        f"run.folder={folder}",
        f"run.total_steps={steps}",
        *more,
    ]


def test_a_nan_on_one_rank_leaves_the_step_out_on_all(
    applications: Applications, digits: Path, tmp_path: Path
) -> None:
    applications.run("-c", poisoned("{3, 4}"), *arguments(digits, tmp_path, 8), world_size=2)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if line["skipped"]] == [3, 4]
    checkpoint = latest(tmp_path / "checkpoints")
    assert checkpoint is not None
    scalars = read_scalars(checkpoint)
    assert (scalars["step"], scalars["n"], scalars["updates"]) == (8, 128, 6)
    assert scalars["skipped"] == [[48, 80]]
    for prefix in ("model", "ema", "exp_avg", "exp_avg_sq"):
        assert all(torch.isfinite(t).all() for t in read_full(checkpoint, prefix).values()), prefix


def test_a_left_out_step_changes_neither_weights_nor_averages(
    applications: Applications, digits: Path, tmp_path: Path
) -> None:
    applications.run("train_dist.py", *arguments(digits, tmp_path / "three", 3))
    applications.run("-c", poisoned("{3}"), *arguments(digits, tmp_path / "four", 4))
    three, four = latest(tmp_path / "three" / "checkpoints"), latest(tmp_path / "four" / "checkpoints")
    assert three is not None and four is not None
    for prefix in ("model", "ema", "exp_avg", "exp_avg_sq"):
        a, b = read_full(three, prefix), read_full(four, prefix)
        assert all(torch.equal(a[name], b[name]) for name in a), prefix


def test_a_long_row_of_nans_sends_the_run_back_and_past_the_window(
    applications: Applications, digits: Path, tmp_path: Path
) -> None:
    bad = "{6, 7, 8}"
    finished = applications.run(
        "-c", poisoned(bad),
        *arguments(digits, tmp_path, 12, "checkpoint.every_steps=4", "health.max_nonfinite_in_row=3"), world_size=2,
    )  # fmt: skip
    # Step 8 was saved twice, once in the row of NaNs and once after it: the second is the one that stands.
    scalars = read_scalars(tmp_path / "checkpoints" / "step_00000008")
    assert (scalars["updates"], scalars["skipped"]) == (6, [[96, 160]])
    assert "went back from step 10 to step 4; samples 96 to 160 are skipped" in finished.output
    checkpoint = latest(tmp_path / "checkpoints")
    assert checkpoint is not None
    scalars = read_scalars(checkpoint)
    assert (scalars["step"], scalars["n"], scalars["updates"]) == (12, 192, 8)
    assert scalars["skipped"] == [[96, 160]]
    assert [line["step"] for line in metrics(tmp_path)] == list(range(12))
    applied = [n for _, n, _, _ in audit(tmp_path)]
    assert applied == [*range(96), *range(160, 192)]


@pytest.mark.proof
def test_a_second_row_of_nans_does_not_bring_back_the_first_window(
    applications: Applications, digits: Path, tmp_path: Path
) -> None:
    applications.run("train_dist.py", *arguments(digits, tmp_path, 4), world_size=2)
    applications.run(
        "-c", poisoned("{0, 1, 5, 6}"), *arguments(digits, tmp_path, 16, "health.max_nonfinite_in_row=2"),
        world_size=2,
    )  # fmt: skip
    checkpoint = latest(tmp_path / "checkpoints")
    assert checkpoint is not None
    scalars = read_scalars(checkpoint)
    assert (scalars["step"], scalars["updates"]) == (16, 10)
    assert scalars["skipped"] == [[64, 112], [144, 192]]
    assert [n for _, n, _, _ in audit(tmp_path)] == [*range(64), *range(112, 144), *range(192, 256)]


def alone(config: HealthConfig) -> Health:
    """The health of a run that nobody watches."""
    world = SimpleNamespace(is_first=True, from_first=lambda value: value)
    watch = SimpleNamespace(note=lambda *_: None)
    return Health(config, world, SimpleNamespace(received=0), watch, SimpleNamespace())  # type: ignore[arg-type]


def test_a_run_that_stays_non_finite_stops_and_names_the_steps() -> None:
    health = alone(HealthConfig(max_nonfinite_in_row=2, max_rollbacks=1))
    zero = torch.zeros(())
    record = [StepRecord(step, 16 * step, 16, 0.1, zero, zero, zero) for step in range(8)]
    health.note(record[0], 1.0, True)
    assert health.must_go_back() is None
    health.note(record[1], 1.0, False)
    for step in (2, 3):
        health.note(record[step], 1.0, True)
    assert health.must_go_back() == 32
    health.gone_back()
    for step in (4, 5):
        health.note(record[step], 1.0, True)
    with pytest.raises(NonFiniteRun, match="steps 4 to 5"):
        health.must_go_back()


def wait_for_steps(group: Group, folder: Path, steps: int) -> None:
    while group.running():
        if (folder / "metrics.jsonl").exists() and len(
            (folder / "metrics.jsonl").read_text().splitlines()
        ) >= steps:
            return
        time.sleep(0.01)
    raise AssertionError(group.wait().output)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.proof) for n in (signal.SIGUSR1, signal.SIGUSR2))],
)
def test_a_signal_to_one_rank_ends_the_step_saves_and_asks_to_be_queued_again(
    applications: Applications, digits: Path, tmp_path: Path, number: signal.Signals
) -> None:
    group = applications.start("train_dist.py", *arguments(digits, tmp_path, 100_000), world_size=2)
    wait_for_steps(group, tmp_path, 5)
    group.processes[1].send_signal(number)
    finished = group.wait(60)
    assert finished.codes == [0, 0], finished.output
    request = json.loads((tmp_path / "requeue").read_text())
    assert request["reason"] == number.name
    step = request["step"]
    checkpoint = latest(tmp_path / "checkpoints")
    assert checkpoint is not None and read_scalars(checkpoint)["step"] == step == len(losses(tmp_path))
    applications.run("train_dist.py", *arguments(digits, tmp_path, step + 3), world_size=2)
    assert len(losses(tmp_path)) == step + 3
    assert not (tmp_path / "requeue").exists()


def test_an_error_on_one_rank_stops_every_rank_with_its_words(
    applications: Applications, digits: Path, tmp_path: Path
) -> None:
    program = """
import os, itertools, train_dist
from drwkv.data.loader import Data
from drwkv import command
plain = Data.batches
def batches(self, *args, **kwargs):
    for i, batch in enumerate(plain(self, *args, **kwargs)):
        if i == 3 and os.environ["RANK"] == "1":
            raise ValueError("shard 7 is gone")
        yield batch
Data.batches = batches
command.run(train_dist.main)
"""
    finished = applications.start("-c", program, *arguments(digits, tmp_path, 50), world_size=2).wait(60)
    assert finished.codes == [2, 2] and "Traceback" not in finished.output, finished.output
    assert "error (rank 1): shard 7 is gone" in finished.output
    assert "rank 1 stopped the run: ValueError: shard 7 is gone" in finished.output
    assert len(losses(tmp_path)) <= 3


def test_a_loss_far_above_the_usual_is_told_and_a_row_of_them_sends_the_run_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("WARNING", "drwkv")
    zero, dice = torch.zeros(()), random.Random(0)
    health = alone(HealthConfig(spike_deviations=10.0, max_spikes_in_row=3, max_rollbacks=1))

    def note(step: int, loss: float) -> None:
        health.note(StepRecord(step, 16 * step, 16, 0.1, zero, zero, zero), loss, False)

    for step in range(100):
        note(step, dice.gauss(1.0, 0.1))
    assert not caplog.records
    for step in (100, 101):
        note(step, 5.0)
        assert health.must_go_back() is None
    note(102, 1.1)
    assert not health.in_bad_row
    assert (
        "step 101: loss 5 is " in caplog.text and "deviations above the median of the last 100" in caplog.text
    )
    for step in (103, 104, 105):
        assert health.must_go_back() is None
        note(step, 5.0)
    assert health.in_bad_row and health.must_go_back() == 103 * 16
    health.gone_back()
    assert health.must_go_back() is None
    for step in (106, 107, 108):
        note(step, math.inf)
    with pytest.raises(NonFiniteRun, match="steps 106 to 108 had too high a loss after 1 returns"):
        health.must_go_back()
