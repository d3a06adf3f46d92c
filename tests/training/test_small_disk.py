"""A run whose disk is full ends in one line with its older checkpoints whole, and goes on when there is space."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT
from small_disk import on_small_disk

# The disk takes two saves and not three; what is on it goes with the namespace, so all is asked in there.
SCRIPT = """
"$@"; echo "ended with $?"
ls "$0/run/checkpoints"
mount -o remount,size=64m "$0"
"$@"; echo "ended with $?"
ls "$0/run/checkpoints"
grep -c "continuing from .*step_00000004: step 4" "$0/run/log.txt"
"""


@pytest.mark.timeout(120)
def test_a_full_disk_ends_the_run_in_one_line_and_the_same_command_goes_on_when_there_is_space(
    digits: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    train = [
        sys.executable, "train_dist.py", "--config", "configs/digits.yaml", f"run.folder={disk / 'run'}",
        "run.total_steps=6", f"data.paths=[{digits / 'train'}]", "run.batch_size=48", "checkpoint.every_steps=2",
        "monitor.grid_every_steps=0", "monitor.tensorboard_every_steps=0", "monitor.progress=false",
        "model.options.hidden_size=32", "model.options.depth=3",
    ]  # fmt: skip
    command = on_small_disk(disk, "sh", "-c", SCRIPT, str(disk), *train, size="3500k")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.split("\n") == [
        "ended with 2", "step_00000002", "step_00000004",
        "ended with 0", "step_00000002", "step_00000004", "step_00000006", "1", "",
    ], done.stdout + done.stderr  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"checkpoint in {disk / 'run' / 'checkpoints'} could not be saved: rank 0: " in errors[0]
    assert "No space left on device; free some space and run the same command again" in errors[0]
