"""The bench of the training step runs on a CPU and takes the trainer's own step, which never waits for the device."""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_dist
from drwkv.config import RunConfig, TrainConfig
from drwkv.models.config import ModelConfig
from drwkv.parallel import World, session
from drwkv.training import bench
from drwkv.training.bench import Plan, Row, Step
from drwkv.training.monitor import Audit, StepRecord
from drwkv.training.state import TrainState

MODEL = ModelConfig("DRWKV-S/2", [8, 8], 4, 10, options={"depth": 3, "hidden_size": 32})
BATCH = 3
aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
}
ON_CPU_ALONE = {("drwkv.py", "_check_inputs"), ("rng.py", "_fill")}  # look at values, if they are on a CPU


class Waits(TorchDispatchMode):
    """Where an operation's result, or its shape, is needed on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[tuple[str, str]] = set()
        self.num_operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_operations += 1
        if func in WAITS:
            ours = [frame for frame in traceback.extract_stack() if "/drwkv/" in frame.filename]
            self.places.add((Path(ours[-1].filename).name, ours[-1].name) if ours else ("?", "?"))
        return func(*args, **(kwargs or {}))


def a_step(world: World, checkpoint: str = "none", precision: str = "fp32") -> Step:
    return Step(Plan(MODEL, "fsdp", precision, 1), Row(BATCH, checkpoint, False), world)


def trainers_step(step: Step, world: World, tmp_path: Path) -> StepRecord:
    """train_dist's own step with the parts of `step`."""
    config = TrainConfig(run=RunConfig(batch_size=BATCH))
    state = TrainState(step.engine, step.ema, {})
    audit = Audit(tmp_path, world, enabled=False, step=0)
    return train_dist._step(config, state, step.objective, audit, [step.batch], BATCH)


def test_the_step_that_is_timed_is_the_trainers_to_the_bit(tmp_path: Path) -> None:
    with session() as world:
        timed, trained = a_step(world), a_step(world)
        losses = []
        for _ in range(2):
            losses.append(timed.take().item())
            assert trainers_step(trained, world, tmp_path).loss.item() == losses[-1]
        assert losses[0] != losses[1]
        for name, part in timed.engine.parts.items():
            assert torch.equal(part, trained.engine.parts[name]), name
            assert torch.equal(timed.ema.parts[name], trained.ema.parts[name]), name
        del timed, trained


@pytest.mark.parametrize(("checkpoint", "precision"), [("none", "fp32"), ("selective", "bf16")])
def test_nothing_in_a_step_is_looked_at_by_the_host(tmp_path: Path, checkpoint: str, precision: str) -> None:
    with session() as world:
        step = a_step(world, checkpoint, precision)
        trainers_step(step, world, tmp_path)  # makes the tables
        with Waits() as waits:
            trainers_step(step, world, tmp_path)
        del step
    assert waits.num_operations > 500
    assert waits.places <= ON_CPU_ALONE
    with Waits() as waits:
        bool(torch.ones(2).any())
    assert waits.places == {("?", "?")}, "the checker sees what waits"


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.needs("gpu")
@pytest.mark.parametrize("checkpoint", ["none", "full", "selective"])
def test_no_step_on_a_gpu_waits_for_it(tmp_path: Path, checkpoint: str) -> None:
    with session() as world:
        step = a_step(world, checkpoint, "bf16")
        trainers_step(step, world, tmp_path)
        with waiting_is_an_error():
            trainers_step(step, world, tmp_path)


def test_the_bench_prints_a_row_a_way_and_the_largest_operations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    assert bench.main(["--tiny", "--batch", "1", "2", "--steps", "1", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^\| [12] +\| +(?:none|full) \| +no \| +\d", printed, re.MULTILINE)) == 4
    assert "| operation " in printed and "aten::" in printed
    rows = json.loads(out.read_text())["rows"]
    assert [(row["batch"], row["checkpoint"]) for row in rows] == [
        (1, "none"), (1, "full"), (2, "none"), (2, "full")
    ]  # fmt: skip
    assert all(row["images_per_sec"] > 0 and 0 < row["mfu"] < 1 for row in rows)


def test_what_does_not_fit_into_memory_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(self: Step) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Step, "take", too_large)
    with session() as world:
        row = bench.measure(
            Plan(MODEL, "fsdp", "fp32", 1), Row(BATCH, "none", False), bench.Speed(1.0, 1.0), world
        )
    assert row.images_per_sec is None
    assert row.cells() == ["3", "none", "no", "out of memory", "", "", ""]
