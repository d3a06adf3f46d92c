"""A rank that stands still or is lost ends the run on every rank; one line names it, and status.json says so."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
from processes import Applications, Group

from drwkv.parallel import session
from drwkv.training.board import Place, blame
from drwkv.training.health import STALLED, HealthConfig, PeerFailure
from drwkv.training.watch import Watch

BEAT = ["health.heartbeat_sec=0.3"]


def arguments(digits: Path, folder: Path, steps: int, *more: str) -> list[str]:
    return [
        "--config", "configs/digits.yaml", f"data.paths=[{digits / 'train'}]", f"run.folder={folder}",
        f"run.total_steps={steps}", "run.batch_size=16", "model.options.hidden_size=32", "model.options.depth=3",
        "monitor.progress=false", "monitor.grid_every_steps=0", "checkpoint.every_steps=1000", *BEAT, *more,
    ]  # fmt: skip


# Rank 1 takes a nap at step 4, outside of any collective.
SLEEPER = """
import os, time, train_dist
from drwkv.training.objective import Objective
from drwkv import command
plain, calls = Objective.inputs, [0]
def take_a_nap(self, batch):
    calls[0] += 1
    if calls[0] == 5 and os.environ["RANK"] == "1":
        time.sleep(600)
    return plain(self, batch)
Objective.inputs = take_a_nap
command.run(train_dist.main)
"""

# Rank 1 fails inside of a step, where nobody listens.
BREAKER = SLEEPER.replace("time.sleep(600)", "raise RuntimeError('out of memory')")


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


def wait_for_steps(group: Group, folder: Path, steps: int) -> None:
    lines = folder / "metrics.jsonl"
    while group.running():
        if lines.exists() and len(lines.read_text().splitlines()) >= steps:
            return
        time.sleep(0.02)
    raise AssertionError(group.wait().output)


def test_a_rank_that_stands_still_is_named_and_all_exit(
    applications: Applications, digits: Path, tmp_path: Path
) -> None:
    group = applications.start(
        "-c", SLEEPER, *arguments(digits, tmp_path, 50, "health.stall_sec=4"), world_size=2
    )
    finished = group.wait(120)
    assert finished.codes == [75, 75], finished.output
    said = status(tmp_path)
    assert said["state"] == "stalled" and said["reason"].startswith("rank 1 at step 4, training"), said
    assert "behind all others; the others wait at step" in said["reason"]
    assert said["reason"] in finished.output
    stacks = {path.name: path.read_text() for path in (tmp_path / "stalls").iterdir()}
    assert len(stacks) == 2
    assert "take_a_nap" in stacks["step_00000004_rank_00001.txt"]


def test_an_error_in_the_middle_of_a_step_is_told_by_all_ranks(
    applications: Applications, digits: Path, tmp_path: Path
) -> None:
    finished = applications.start("-c", BREAKER, *arguments(digits, tmp_path, 50), world_size=2).wait(120)
    assert finished.codes == [1, 1], finished.output
    assert any(
        line.endswith("rank 1 stopped the run: RuntimeError: out of memory") for line in finished.lines
    )
    assert status(tmp_path)["state"] == "failed"
    assert status(tmp_path)["reason"] == "rank 1 stopped the run: RuntimeError: out of memory"


@pytest.mark.parametrize(("lost", "left"), [(1, 0), pytest.param(0, 1, marks=pytest.mark.proof)])
def test_a_rank_that_is_killed_is_named_by_the_others(
    applications: Applications, digits: Path, tmp_path: Path, lost: int, left: int
) -> None:
    group = applications.start("train_dist.py", *arguments(digits, tmp_path, 100_000), world_size=2)
    wait_for_steps(group, tmp_path, 5)
    assert status(tmp_path)["state"] == "running"
    group.processes[lost].send_signal(signal.SIGKILL)
    finished = group.wait(120)
    assert finished.codes[lost] == -signal.SIGKILL and finished.codes[left] == 1, finished.output
    errors = [line for line in finished.lines if line.startswith("error")]
    # Rank 0 holds what keeps the ranks together where no launcher does.
    gone = "rank 1 is gone, last seen at step" if lost == 1 else "rank 0, or its launcher"
    assert len(errors) == 1 and gone in errors[0], finished.output
    assert "Traceback" not in finished.output


HANGING = """
import sys, time
from pathlib import Path
from drwkv.parallel import session
from drwkv.training.board import Board
from drwkv.training.health import HealthConfig
from drwkv.training.watch import Watch
Board.failed = lambda self: time.sleep(600)
config = HealthConfig(heartbeat_sec=0.1, lost_sec=1, stall_sec=1)
with session() as world, Watch(Path(sys.argv[1]), config, world, timeout_sec=60):
    time.sleep(600)
"""


def test_a_store_that_does_not_answer_ends_the_process_with_its_stacks(
    applications: Applications, tmp_path: Path
) -> None:
    finished = applications.start("-c", HANGING, str(tmp_path)).wait(60)
    assert finished.codes == [1]
    assert "Timeout (0:00:02)!" in finished.output and "in _run" in finished.output


def test_a_rank_that_hears_of_a_stall_by_its_collective_calls_it_one_too(tmp_path: Path) -> None:
    """Another rank may leave first, and break the collective that this one waits in."""
    config = HealthConfig(heartbeat_sec=0.1)
    with pytest.raises(PeerFailure), session() as world, Watch(tmp_path, config, world, timeout_sec=60):
        raise PeerFailure("rank 1 stands still", STALLED)
    assert status(tmp_path)["state"] == "stalled" and status(tmp_path)["reason"] == "rank 1 stands still"


def test_a_start_that_is_refused_leaves_what_the_run_before_it_has_reached(tmp_path: Path) -> None:
    """A finished run stays finished, and one that goes on is not at step 0 while it sets up."""
    config = HealthConfig(heartbeat_sec=0.1)
    for state in ("finished", "running"):
        said = {"state": state, "step": 400, "last_step": 399, "n": 6400, "loss": 0.25, "phase": "ended"}
        (tmp_path / "status.json").write_text(json.dumps(said))
        with pytest.raises(ValueError), session() as world, Watch(tmp_path, config, world, timeout_sec=60):
            time.sleep(0.5)
            raise ValueError("another model")
        found = status(tmp_path)
        if state == "finished":
            assert found == said
        else:
            assert (found["state"], found["reason"]) == ("failed", "another model")
            assert (found["step"], found["last_step"], found["loss"]) == (400, 399, 0.25)


# Rank 1 does not beat any more, as if its machine were gone, and all wait for it.
SILENT = SLEEPER.replace(
    "        time.sleep(600)",
    """        from drwkv.training.watch import Watch
        Watch._beat = lambda self: time.sleep(600)
        time.sleep(600)""",
)


def test_a_rank_without_a_sign_of_life_is_named_long_before_a_collective_gives_up(
    applications: Applications, digits: Path, tmp_path: Path
) -> None:
    group = applications.start(
        "-c", SILENT, *arguments(digits, tmp_path, 50, "health.lost_sec=3"), world_size=2
    )
    assert group.processes[0].wait(60) == 1
    group.kill()
    assert status(tmp_path)["state"] == "failed"
    assert re.match(r"rank 1 is gone, last seen at step [0-4], ", status(tmp_path)["reason"])


def place(moves: int, beat: int = 3) -> Place:
    return Place(moves, step=moves // 3, phase="training", collectives=7, beat=beat, host="node", pid=moves)


@pytest.mark.parametrize(
    ("places", "silent", "words"),
    [
        ([place(9), place(9), place(6)], set(), ["rank 2 at step 2", "behind all others", "wait at step 3"]),
        ([place(9), place(9)], set(), ["all 2 ranks stand still since 60 s at step 3, training"]),
        ([place(9), place(6), place(6)], {0}, ["rank 0 at step 3", "without a sign of life"]),
        ([place(3)] * 20 + [place(9)], set(), ["rank 7 at", "and 12 more stand still"]),
    ],
)
def test_blame_falls_on_those_who_hold_up_the_others(
    places: list[Place], silent: set[int], words: list[str]
) -> None:
    text = blame(places, silent, 60.0)
    assert all(word in text for word in words), text
