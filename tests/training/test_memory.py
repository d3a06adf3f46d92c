"""The forecast of memory: activations as a profiler measures them, states as the engines hold them."""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from drwkv.compose import load
from drwkv.config import TrainConfig, check_ranks, check_train
from drwkv.models.config import from_config
from drwkv.parallel.activations import checkpoint_blocks
from drwkv.training.activation_memory import GIB, within_budget
from drwkv.training.memory import predict

SMALL = [
    "model.name=DRWKV", "model.input_size=[16,16]", "model.in_channels=4", "model.num_classes=10",
    "model.options={patch_size: 2, hidden_size: 64, depth: 7}", "run.batch_size=4",
]  # fmt: skip
BASE = ["model.name=DRWKV-B/2", "model.input_size=[64,64]", "model.num_classes=1000", "run.batch_size=1"]
TRAINING_CONFIGS = [
    path
    for path in sorted(Path(__file__).parents[2].glob("configs/*.yaml"))
    if "train_dist.py" in path.read_text()
]
MODES = {
    "none": [],
    "full": ["parallel.activations.checkpoint=full"],
    "every second": ["parallel.activations.checkpoint=full", "parallel.activations.every=2"],
    "selective": ["parallel.activations.checkpoint=selective"],
}


def measured(config: TrainConfig) -> int:
    """The most bytes at once of one forward and backward on this CPU, beside weights and gradients."""
    model = from_config(config.model, seed=0)
    checkpoint_blocks(model.blocks_in_order(), config.parallel.activations)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    B, (channels, height, width) = config.run.batch_size, config.model.shape
    x, t, y = torch.randn(B, channels, height, width), torch.zeros(B), torch.zeros(B, dtype=torch.int64)
    model(x, t, y).square().mean().backward()  # what is made once is made here
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(x, t, y).square().mean().backward()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("mode", MODES)
def test_activations_are_as_a_profiler_measures_them(mode: str) -> None:
    config = load(TrainConfig, [*SMALL, *MODES[mode]])
    assert predict(config, 1).activations == pytest.approx(measured(config), rel=0.1)


def test_each_power_function_average_takes_as_much_as_the_fixed_one() -> None:
    found = predict(load(TrainConfig, [*SMALL, "ema.widths=[0.05,0.1]"]), 2)
    assert found.averages == 3 * found.moments // 2 > 0  # there are two moments


DEEP = [*SMALL[:4], "model.options={patch_size: 2, hidden_size: 64, depth: 11}", "run.batch_size=4"]


@pytest.mark.proof
def test_a_deep_model_is_foreseen_from_shallow_ones() -> None:
    for mode in ("none", "every second"):
        config = load(TrainConfig, [*DEEP, *MODES[mode]])
        assert predict(config, 1).activations == pytest.approx(measured(config), rel=0.1), mode


@pytest.mark.proof
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_a_budget_takes_as_few_blocks_as_keep_the_activations_within(mode: str) -> None:
    none, every = (load(TrainConfig, [*DEEP, *MODES[m]]) for m in ("none", mode))
    most, least = measured(none), measured(every)
    budget = (most + least) // 2
    config = load(TrainConfig, [*DEEP, *MODES[mode], f"parallel.activations.budget_gib={budget / GIB}"])
    parallel = within_budget(config, 1)
    blocks = parallel.activations.blocks
    assert blocks is not None and 1 < blocks < 11
    found = measured(replace(config, parallel=parallel))
    assert found <= budget
    assert predict(config, 1).activations == pytest.approx(found, rel=0.1)
    fewer = replace(parallel.activations, blocks=blocks - 2)
    assert measured(replace(config, parallel=replace(parallel, activations=fewer))) > budget


def test_a_budget_that_all_blocks_fit_takes_none_and_one_that_is_too_small_is_refused() -> None:
    full = MODES["full"]
    roomy = load(TrainConfig, [*SMALL, *full, "parallel.activations.budget_gib=1"])
    assert within_budget(roomy, 1).activations.blocks == 0
    tight = load(TrainConfig, [*SMALL, *full, "parallel.activations.budget_gib=0.001"])
    with pytest.raises(
        ValueError, match=r"budget_gib': 0.001 .* all 7 blocks .*micro-batch of 4 needs 0\.00\d+ GiB"
    ):
        within_budget(tight, 1)
    assert within_budget(load(TrainConfig, SMALL), 1).activations.blocks is None


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_full_checkpointing_takes_a_fifth_of_the_activations_at_1024_tokens() -> None:
    configs = {mode: load(TrainConfig, [*BASE, *MODES[mode]]) for mode in ("none", "full", "selective")}
    sizes = {mode: measured(config) for mode, config in configs.items()}
    assert 5 * sizes["full"] <= sizes["none"]
    assert 2 * sizes["selective"] <= sizes["none"]
    for mode, config in configs.items():
        assert predict(config, 1).activations == pytest.approx(sizes[mode], rel=0.1), mode


def stated(path: Path) -> tuple[TrainConfig, int, float]:
    """A config, and the ranks and GiB that its header names."""
    text = path.read_text()
    found = re.search(r"^# By the forecast, each of (\d+) ranks needs ([\d.]+) GiB", text, flags=re.MULTILINE)
    assert found, f"{path.name} does not say what the forecast of memory says"
    return load(TrainConfig, ["--config", str(path)]), int(found[1]), float(found[2])


@pytest.mark.parametrize("path", TRAINING_CONFIGS, ids=lambda path: path.stem)
def test_every_training_config_is_possible_on_the_ranks_that_its_command_starts(path: Path) -> None:
    config, ranks, _ = stated(path)
    check_train(config)
    check_ranks(config, ranks)
    (command,) = re.findall(r"^# Command: +(.*)$", path.read_text(), flags=re.MULTILINE)
    words = shlex.split(command)
    options = dict(itertools.pairwise(words))
    assert ranks == int(options.get("--nnodes", "1")) * int(options.get("--nproc-per-node", "1"))


@pytest.mark.proof
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", TRAINING_CONFIGS, ids=lambda path: path.stem)
def test_the_forecast_of_every_training_config_is_the_one_that_it_states(path: Path) -> None:
    config, ranks, gib = stated(path)
    assert predict(config, ranks).total / GIB == pytest.approx(gib, rel=0.02)
