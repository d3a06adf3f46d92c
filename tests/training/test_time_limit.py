"""A job's time limit ends the run in time, saved, with a request to be queued again."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
from processes import Applications

from drwkv.training.checkpoint import latest, step_of
from drwkv.training.time_limit import parse_time_left, seconds_left


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1-02:03:04", 93784),
        ("2:03:04", 7384),
        ("3:04", 184),
        ("59", 59),
        ("UNLIMITED", math.inf),
        ("", math.inf),
    ],
)
def test_time_left_is_read_as_squeue_prints_it(text: str, seconds: float) -> None:
    assert parse_time_left(text) == seconds


def test_the_end_of_the_job_is_taken_from_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert seconds_left() == math.inf
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 100))
    assert 98 < seconds_left() <= 100


def test_a_run_saves_and_asks_to_be_queued_again_before_its_time_is_over(
    applications: Applications, digits: Path, tmp_path: Path
) -> None:
    begin = time.monotonic()
    finished = applications.run(
        "train_dist.py", "--config", "configs/digits.yaml", f"data.paths=[{digits / 'train'}]",
        f"run.folder={tmp_path}", "run.total_steps=100000", "model.options.hidden_size=32", "model.options.depth=3",
        "monitor.progress=false", "monitor.grid_every_steps=0", "checkpoint.every_steps=0",
        f"health.max_hours={8 / 3600}", "health.grace_sec=1", world_size=2,
    )  # fmt: skip
    assert time.monotonic() - begin < 60
    assert "this job ends in 8 s; the run saves 1 s before" in finished.output
    request = json.loads((tmp_path / "requeue").read_text())
    assert request["reason"] == "TIME_LIMIT"
    newest = latest(tmp_path / "checkpoints")
    assert newest is not None and step_of(newest) == request["step"] > 0
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("requeue", "TIME_LIMIT")
