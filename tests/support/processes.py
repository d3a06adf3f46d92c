"""Start the applications as real processes, as a launcher would, and look at what they leave behind.

A pytest plugin (see pyproject.toml): its fixture `applications` is what tests use.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from preloaded import Fork, Preloaded

ROOT = Path(__file__).parents[2]


@dataclass
class Finished:
    """What a group of processes ended with."""

    codes: list[int]
    output: str

    def __post_init__(self) -> None:
        self.lines = self.output.splitlines()


@dataclass
class Group:
    """Processes of one run, one a rank, in one process group, so that one signal kills all."""

    processes: list[Fork]
    log: Path

    def wait(self, timeout_sec: float = 300.0) -> Finished:
        """Wait for all of them."""
        try:
            codes = [process.wait(timeout_sec) for process in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return Finished(codes, self.log.read_text())

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the whole group."""
        for process in self.processes:
            if process.poll() is None:
                os.kill(process.pid, number)

    def running(self) -> bool:
        """Whether any process still runs."""
        return any(process.poll() is None for process in self.processes)


@dataclass
class Applications:
    """Starts commands in this checkout with this interpreter; everything is killed at the end of the test session."""

    folder: Path
    groups: list[Group] = field(default_factory=list)
    _preloaded: list[Preloaded] = field(default_factory=list)

    def start(self, *arguments: str, world_size: int = 1, cwd: Path = ROOT) -> Group:
        """`python ARGUMENTS` on `world_size` ranks, with the environment that torchrun would give."""
        if not self._preloaded:
            self._preloaded = [Preloaded(ROOT) for _ in range(2)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = self.folder / f"group_{len(self.groups):04d}.txt"
        log.touch()
        processes = []
        for rank in range(world_size):
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            environment["CUDA_VISIBLE_DEVICES"] = ""  # ranks are many, GPUs may be one
            if world_size > 1:
                environment |= {
                    "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
            origin = self._preloaded[(len(self.groups) + rank) % len(self._preloaded)]
            processes.append(origin.start(list(arguments), cwd=cwd, environment=environment, log=log))
        self.groups.append(Group(processes, log))
        return self.groups[-1]

    def close(self) -> None:
        """Kill what still runs."""
        for group in self.groups:
            group.kill()
        for origin in self._preloaded:
            origin.close()

    def run(self, *arguments: str, world_size: int = 1, timeout_sec: float = 300.0) -> Finished:
        """Start and wait; fails the test, with the output, unless every rank exits with 0."""
        finished = self.start(*arguments, world_size=world_size).wait(timeout_sec)
        assert finished.codes == [0] * world_size, (
            f"{arguments} ended with {finished.codes}:\n{finished.output}"
        )
        return finished

    def refused(self, *arguments: str) -> str:
        """Run one process that must end with exit code 2 and one line of error; returns that line."""
        finished = self.start(*arguments).wait()
        assert finished.codes == [2], f"{arguments} ended with {finished.codes}:\n{finished.output}"
        assert "Traceback" not in finished.output, finished.output
        errors = [line for line in finished.lines if line.startswith("error: ")]
        assert len(errors) == 1 and finished.lines[-1] == errors[0], finished.output
        return errors[0]


def metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    """The loss of each step of a run."""
    lines = metrics(folder)
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return [line["loss"] for line in lines]


def audit(folder: Path) -> list[tuple[int, int, int, str]]:
    """(step, n, sample id, hash of x_t) of all ranks of a run, by step and n."""
    rows = []
    for path in sorted((folder / "audit").glob("rank_*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows.append((row["step"], row["n"], row["id"], row["x_t"]))
    return sorted(rows)


@pytest.fixture(scope="session")
def applications(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Applications]:
    """A starter of processes; those that still run at the end are killed."""
    started = Applications(tmp_path_factory.mktemp("processes"))
    yield started
    started.close()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the shard sets `train` and `test` of the digits."""
    folder = tmp_path_factory.mktemp("digits")
    subprocess.run(
        [sys.executable, "-m", "data_prep.digits", str(folder)], cwd=ROOT, check=True, capture_output=True
    )
    return folder
