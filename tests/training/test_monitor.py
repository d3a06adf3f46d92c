"""What is shown of a run is true: above all the time of each step."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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


def test_a_run_that_goes_on_keeps_the_grid_of_its_checkpoints_step_and_none_of_later_steps(
    tmp_path: Path,
) -> None:
    config = MonitorConfig(tensorboard_every_steps=1, progress=False)
    image_HWC = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)

    def in_tensorboard() -> list[int]:
        shown = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
        return [event.step for event in shown.Images("samples/ema")]

    with session() as world:
        killed = Monitor(tmp_path, config, world, total_steps=30, step=0, on_record=[])
        for step in (5, 10, 15):
            killed.grid(step, image_HWC + np.uint8(step))
        assert in_tensorboard() == [5, 10, 15]
        resumed = Monitor(tmp_path, config, world, total_steps=30, step=10, on_record=[])
        assert in_tensorboard() == [5, 10]
        kept = sorted((tmp_path / "grids").iterdir())
        assert [path.name for path in kept] == ["step_00000005.png", "step_00000010.png"]
        assert np.array_equal(np.asarray(Image.open(kept[1])), image_HWC + np.uint8(10))
        resumed.grid(15, image_HWC)
        resumed.rewind(5)
        assert in_tensorboard() == [5]
        resumed.close()
        killed.close()
