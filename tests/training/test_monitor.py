"""What is shown of a run is true: above all the time of each step."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from processes import metrics

from drwkv.parallel import session
from drwkv.training.monitor import Monitor, MonitorConfig, StepRecord

SECONDS = 0.2


def test_every_step_has_its_own_time_the_last_too(tmp_path: Path) -> None:
    """Numbers are written a step late; the time is that from one step to the next all the same."""
    config, zero = MonitorConfig(tensorboard_every_steps=0, progress=False), torch.zeros(())
    with session() as world:
        monitor = Monitor(tmp_path, config, world, total_steps=3, step=0, on_record=[])
        for step in range(3):
            time.sleep(SECONDS)
            monitor.record(StepRecord(step, 8 * step, 8, 1e-3, zero, zero, zero))
        monitor.close()
    assert [line["seconds"] for line in metrics(tmp_path)] == pytest.approx([SECONDS] * 3, rel=0.25)
    assert [line["images_per_sec"] for line in metrics(tmp_path)] == pytest.approx(
        [8 / SECONDS] * 3, rel=0.25
    )
