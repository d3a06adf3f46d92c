"""One run folder has one run at a time; a dead one's is taken over at once."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from processes import Applications

from drwkv.parallel import World, session
from drwkv.training.run_lock import LOCK, RunLock


def foreign(folder: Path, **changes: object) -> Path:
    """The lock of a run on another machine."""
    lock = folder / LOCK
    owner = {
        "machine": "another",
        "pid": 7,
        "started": 1,
        "host": "node7",
        "worker": "w",
        "job": "41",
        "beat": 0,
    }
    lock.write_text(json.dumps(owner | changes))
    return lock


@pytest.fixture
def world():
    with session() as world:
        yield world


def test_a_folder_in_use_is_refused_and_names_its_holder(
    applications: Applications, digits: Path, tmp_path: Path, world: World
) -> None:
    with RunLock(tmp_path, 0.6, world):
        line = applications.refused(
            "train_dist.py", "--config", "configs/digits.yaml", f"run.folder={tmp_path}", "health.lock_sec=0.6",
            f"data.paths=[{digits / 'train'}]",
        )  # fmt: skip
    assert f"{tmp_path} is in use by process" in line and "give another run.folder" in line
    assert not (tmp_path / LOCK).exists()


def test_a_lock_without_a_sign_of_life_is_taken_over_after_a_while(tmp_path: Path, world: World) -> None:
    foreign(tmp_path)
    begin = time.monotonic()
    with RunLock(tmp_path, 0.5, world) as lock:
        assert time.monotonic() - begin > 0.5
        assert json.loads((tmp_path / LOCK).read_text())["worker"] != "w" and lock.lost() is None


def test_a_job_that_is_queued_again_takes_its_own_lock_at_once(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    foreign(tmp_path, restarts="0")
    begin = time.monotonic()
    with RunLock(tmp_path, 60.0, world):
        assert time.monotonic() - begin < 5


def test_a_second_run_in_the_same_job_is_refused(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    with RunLock(tmp_path, 0.5, world), pytest.raises(ValueError, match="is in use by job 41, process"):
        RunLock(tmp_path, 0.5, world).__enter__()


def test_a_run_whose_lock_was_taken_over_hears_of_it_and_leaves_it_alone(
    tmp_path: Path, world: World
) -> None:
    with RunLock(tmp_path, 0.4, world) as lock:
        foreign(tmp_path)
        end = time.monotonic() + 10
        while (lost := lock.lost()) is None and time.monotonic() < end:
            time.sleep(0.02)
        assert "job 41, process 7 on node7" in str(lost)
    assert json.loads((tmp_path / LOCK).read_text())["worker"] == "w"
