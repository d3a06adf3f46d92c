"""A profile on demand: of the steps and ranks that are asked for, and of nothing else."""

from __future__ import annotations

import gzip
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from processes import Applications, metrics

from drwkv.compose import load
from drwkv.config import TrainConfig, check_train
from drwkv.parallel import session
from drwkv.training.profiling import ProfileConfig, StepProfiler


def test_a_run_writes_a_trace_and_a_table_of_the_steps_asked_for(
    applications: Applications, digits: Path, tmp_path: Path
) -> None:
    applications.run(
        "train_dist.py", "--config", "configs/digits.yaml", f"run.folder={tmp_path}", "run.total_steps=5",
        f"data.paths=[{digits / 'train'}]", "monitor.progress=false", "monitor.grid_every_steps=0",
        "monitor.tensorboard_every_steps=0", "monitor.peak_tflops=0", "model.options.hidden_size=16",
        "model.options.depth=3", "run.batch_size=16", "profile.steps=[2,3]",
    )  # fmt: skip
    with gzip.open(tmp_path / "profile" / "rank_0_steps_2_3.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("aten::_fused_adamw_") == 2, "an optimizer step for each of the two"
    assert "[memory]" in names
    table = (tmp_path / "profile" / "rank_0_steps_2_3.txt").read_text().splitlines()
    assert len(table) == 12 and table[0].startswith("| operation ")
    assert "mfu" not in metrics(tmp_path)[0]


def profiled(tmp_path: Path, config: ProfileConfig, steps: int) -> list[str]:
    with session() as world:
        profiler = StepProfiler(config, tmp_path, world, nullcontext)
        for step in range(steps):
            profiler.before(step)
            assert torch.autograd.profiler._is_profiler_enabled == (config.steps == [1, 9] and step >= 1)
            torch.ones(2) @ torch.ones(2)
        profiler.close()
    return sorted(path.name for path in tmp_path.glob("profile/*"))


def test_a_run_that_ends_before_the_last_step_writes_what_there_is(tmp_path: Path) -> None:
    assert profiled(tmp_path, ProfileConfig([1, 9]), 4) == [
        "rank_0_steps_1_3.json.gz",
        "rank_0_steps_1_3.txt",
    ]


@pytest.mark.parametrize("config", [ProfileConfig(), ProfileConfig([1, 8], ranks=[3]), ProfileConfig([7, 9])])
def test_nothing_runs_or_is_written_unless_asked_for(tmp_path: Path, config: ProfileConfig) -> None:
    assert profiled(tmp_path, config, 4) == []


@pytest.mark.needs("gpu")
def test_on_a_gpu_there_is_a_table_of_kernels_and_a_picture_of_memory(tmp_path: Path) -> None:
    with session() as world:
        profiler = StepProfiler(ProfileConfig([0, 0]), tmp_path, world, nullcontext)
        profiler.before(0)
        x = torch.randn(512, 512, device=world.device)
        (x @ x).sum()
        profiler.before(1)
    assert (tmp_path / "profile" / "rank_0_steps_0_0.txt").read_text().startswith("| kernel ")
    assert (tmp_path / "profile" / "rank_0_steps_0_0.pickle").stat().st_size > 0


@pytest.mark.parametrize("steps", ["[5]", "[7,5]", "[-1,5]", "[1,2,3]"])
def test_steps_that_are_no_span_are_refused(steps: str) -> None:
    with pytest.raises(ValueError, match=r"'profile.steps'.*first and the last"):
        check_train(load(TrainConfig, [f"profile.steps={steps}"]))
