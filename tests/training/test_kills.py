"""A run whose processes are killed again and again always goes on from a whole checkpoint, to the same end."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from processes import Applications, Group, audit, losses

from drwkv.training.checkpoint import MARK, latest, step_of

EVERY = 4
WHOLE = "marked whole"


def start(applications: Applications, digits: Path, folder: Path, steps: int) -> Group:
    return applications.start(
        "train_dist.py", "--config", "configs/digits.yaml", f"run.folder={folder}", f"run.total_steps={steps}",
        f"data.paths=[{digits / 'train'}]", "run.batch_size=32", "run.audit=true", "monitor.progress=false",
        "monitor.grid_every_steps=0", "monitor.tensorboard_every_steps=0", f"checkpoint.every_steps={EVERY}",
        "model.options.hidden_size=32", "model.options.depth=3", "checkpoint.keep_last=2", world_size=2,
    )  # fmt: skip


def words(folder: Path) -> str:
    log = folder / "log.txt"
    return log.read_text() if log.exists() else ""


def wait_for_save(folder: Path, group: Group, later: int) -> bool:
    """Wait until a save has files and no mark, after `later` more saves that ended; False if the run ends before."""
    done = words(folder).count(WHOLE) + later
    while group.running():
        if words(folder).count(WHOLE) >= done and unfinished(folder):
            return True
        time.sleep(0.001)
    return False


def unfinished(folder: Path) -> list[Path]:
    """What a kill left of a save: a temp folder, or a folder that has no mark yet."""
    return [path for path in (folder / "checkpoints").glob("step_*") if not (path / MARK).exists()]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("num_kills", [3, pytest.param(20, marks=pytest.mark.proof)])
def test_a_run_killed_many_times_ends_as_the_unbroken_run(
    applications: Applications, digits: Path, tmp_path: Path, num_kills: int
) -> None:
    steps = 12 * num_kills
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert start(applications, digits, unbroken, steps).wait().codes == [0, 0]
    dice = random.Random(0)
    kills, kills_in_save, from_checkpoint = 0, 0, 0
    while kills < num_kills:
        newest = latest(killed / "checkpoints")
        group = start(applications, digits, killed, steps)
        begun = words(killed).count("from step")
        while group.running() and words(killed).count("from step") == begun:
            time.sleep(0.01)
        if newest is not None:
            assert f"continuing from {newest}: step {step_of(newest)}" in words(killed).splitlines()[-3]
            from_checkpoint += 1
        if kills % 2 == 0:
            assert wait_for_save(killed, group, dice.randint(0, 1)), (
                "the run ended before it was killed often enough"
            )
            time.sleep(dice.uniform(0.0, 0.02))
        else:
            time.sleep(dice.uniform(0.0, 1.0))
        assert group.running(), "the run ended before it was killed often enough"
        group.kill()
        group.wait()
        kills, kills_in_save = kills + 1, kills_in_save + bool(unfinished(killed))
    finished = start(applications, digits, killed, steps).wait()
    assert finished.codes == [0, 0], finished.output
    assert kills_in_save >= num_kills // 4 and from_checkpoint >= num_kills // 2, (
        kills_in_save,
        from_checkpoint,
    )
    assert losses(killed) == losses(unbroken)
    assert audit(killed) == audit(unbroken)
