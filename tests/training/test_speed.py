"""Speed as it is told: MFU against a peak that is measured, goodput from what the run's files say."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import torch
from processes import ROOT, Applications, metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drwkv.models.config import ModelConfig, from_config
from drwkv.models.cost import cost
from drwkv.parallel import session
from drwkv.training.goodput import STALL, Goodput
from drwkv.training.monitor import Monitor, MonitorConfig, StepRecord
from drwkv.training.speed import Speed, matmul_flops, speed_of

MODEL = ModelConfig("DRWKV", [8, 8], 1, options={"patch_size": 2, "hidden_size": 32, "depth": 3})
CPU = torch.device("cpu")


def test_mfu_is_six_multiply_adds_an_image_over_the_peak_of_all_ranks() -> None:
    model = from_config(MODEL, seed=0)
    with session() as world:
        speed = speed_of(model, "fp32", 0.5, world)
        assert speed_of(model, "fp32", 0.0, world).numbers(64, 0.1) == {"images_per_sec": pytest.approx(640)}
    num_macs = cost(model).num_macs
    assert speed.numbers(64, 0.1)["mfu"] == pytest.approx(640 * 6 * num_macs / 0.5e12)
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name)
    assert num_macs > 0.5 * 16 * weights, "each weight of the blocks is met once by nearly each of 16 tokens"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_measured_peak_is_reached_by_a_large_product_and_measured_once(dtype: torch.dtype) -> None:
    peak, size = matmul_flops(CPU, dtype), 1024
    a, b = torch.rand(size, size).to(dtype), torch.rand(size, size).to(dtype)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - begin)
    assert 0.4 < 2 * size**3 / best / peak < 2.5, "of two short measurements on a machine that others use too"
    begin = time.perf_counter()
    assert matmul_flops(CPU, dtype) == peak
    assert time.perf_counter() - begin < 0.01


@pytest.mark.needs("gpu")
def test_a_gpu_does_bfloat16_products_several_times_as_fast_as_exact_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    gpu = torch.device("cuda", 0)
    assert matmul_flops(gpu, torch.bfloat16) > 2 * matmul_flops(gpu, torch.float32) > 2e12


def step(number: int, seconds: float, skipped: bool = False) -> dict:
    return {"step": number, "seconds": seconds, "skipped": skipped}


def test_goodput_is_the_share_of_time_in_steps_that_count() -> None:
    steps = [step(i, 2.0) for i in range(40)] + [step(40, 2.0, skipped=True)]
    found = Goodput([{"time": 1000.0, "step": 0}], steps)
    assert found.share(now=1100.0) == pytest.approx(0.8)
    found.add(2.0)
    assert found.share(now=1100.0) == pytest.approx(0.82)
    assert found.words(now=1100.0).startswith("goodput 0.82: 41 steps took 82 s of the 100 s since ")


def test_a_stall_and_the_compiling_first_step_count_with_a_few_times_the_median_of_their_start() -> None:
    starts = [{"time": 0.0, "step": 0}, {"time": 500.0, "step": 7}, {"time": 600.0, "step": 3}]
    slow = [
        step(i, 10.0) for i in range(3)
    ]  # of the first start, whose later steps are gone, as are the second's
    fast = [step(3, 60.0), *(step(i, 1.0) for i in range(4, 20)), step(20, 45.0)]
    found = Goodput(starts, [*slow, *fast])
    assert found.step_sec == pytest.approx(3 * 10.0 + 2 * STALL + 16)
    assert found.num_steps == 21


def test_a_grid_or_a_save_between_steps_is_in_no_step_and_lowers_the_goodput(tmp_path: Path) -> None:
    config, zero = MonitorConfig(tensorboard_every_steps=2, progress=False), torch.zeros(())
    aside_sec = 0.0
    with session() as world:
        begin = time.perf_counter()
        monitor = Monitor(
            tmp_path, config, world, total_steps=4, step=0, on_record=[], speed=Speed(1e6, 1e9)
        )  # fmt: skip
        for number in range(4):
            time.sleep(0.1)
            monitor.record(StepRecord(number, 8 * number, 8, 1e-3, zero, zero, zero))
            if number < 3:
                monitor.flush()
                aside = time.perf_counter()
                with monitor.aside():
                    time.sleep(0.2)
                aside_sec += time.perf_counter() - aside
        wall_sec = time.perf_counter() - begin
        monitor.close()
    lines = metrics(tmp_path)
    assert sum(line["seconds"] for line in lines) == pytest.approx(wall_sec - aside_sec, abs=0.1)
    assert [line["mfu"] for line in lines] == pytest.approx([line["images_per_sec"] * 1e-3 for line in lines])
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in shown.Scalars("train/mfu")] == [1, 3]
    assert 0.1 < shown.Scalars("train/goodput")[-1].value < 0.9


def test_a_run_tells_its_goodput_over_both_of_its_starts(
    applications: Applications, digits: Path, tmp_path: Path
) -> None:
    arguments = [
        "--config", "configs/digits.yaml", f"run.folder={tmp_path / 'run'}", f"data.paths=[{digits / 'train'}]",
        "monitor.progress=false", "monitor.grid_every_steps=0", "monitor.tensorboard_every_steps=0",
        "monitor.ranks_every_steps=4", "model.options.hidden_size=16", "model.options.depth=3", "run.batch_size=16",
    ]  # fmt: skip
    job = tmp_path / "job.json"
    job.write_text(json.dumps([[*arguments, f"run.total_steps={steps}"] for steps in (4, 8)]))
    output = applications.run(str(ROOT / "tests/support/training_runs.py"), str(job)).output
    assert re.findall(r"goodput 0\.\d\d: (\d) steps took ", output) == ["4", "8"]
    lines = metrics(tmp_path / "run")
    assert all(0 < line["mfu"] < 1 for line in lines)
    assert [line["step"] for line in lines if "data_wait" in line] == [3, 7]
    assert all(0 <= line["data_wait"] <= 1 for line in lines if "data_wait" in line)
