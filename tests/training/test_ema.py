"""Power-function averages: the update is the profile, resumed is unbroken, and other widths come out of the stored."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import Applications

import train_dist
from drwkv import convert
from drwkv.compose import load
from drwkv.config import TrainConfig
from drwkv.models import create
from drwkv.parallel import ParallelConfig, World, session, wrap
from drwkv.training import ema_snapshots, optimizer
from drwkv.training.checkpoint import (
    CheckpointConfig,
    latest,
    read_full,
    read_scalars,
    whole_checkpoints,
)
from drwkv.training.ema import Ema, kind_of
from drwkv.training.ema_snapshots import ReconstructConfig, Snapshots, reconstruct, stored
from drwkv.training.objective import Objective
from drwkv.training.optimizer import OptimizerConfig
from drwkv.training.power_ema import WIDEST, Profile, exponent, fit, sigma_rel
from drwkv.training.state import TrainState
from drwkv.training.trained import open_trained

SMALL = [
    "--config", "configs/digits.yaml", "run.batch_size=8", "model.options.hidden_size=32", "model.options.depth=3",
    "monitor.progress=false", "monitor.grid_every_steps=0", "monitor.tensorboard_every_steps=0",
    "checkpoint.every_steps=0",
]  # fmt: skip
WIDTHS = "ema.widths=[0.05,0.1]"
STEPS, EVERY, OTHERS = 200, 10, [0.03, 0.07, 0.13, 0.2]
Weights = dict[str, torch.Tensor]


def distance(a: Weights, b: Weights) -> float:
    """L2 norm of the difference of all weights."""
    assert a.keys() == b.keys() and a
    return sum((a[name].double() - b[name].double()).square().sum().item() for name in a) ** 0.5


def norm(a: Weights) -> float:
    return distance(a, {name: torch.zeros_like(tensor) for name, tensor in a.items()})


def test_widths_and_exponents_are_those_of_the_paper() -> None:
    assert exponent(0.05) == pytest.approx(16.97, abs=5e-3)
    assert exponent(0.10) == pytest.approx(6.94, abs=5e-3)
    for width in (0.001, 0.015, 0.05, 0.1, 0.2, 0.28, WIDEST):
        assert sigma_rel(exponent(width)) == pytest.approx(width, rel=1e-12)
        # What a width is: the standard deviation of the profile.
        tau = (np.arange(1_000_000) + 0.5) / 1_000_000
        profile = tau ** exponent(width) / np.sum(tau ** exponent(width))
        mean = np.sum(profile * tau)
        assert np.sqrt(np.sum(profile * (tau - mean) ** 2)) == pytest.approx(width, rel=1e-5)


@pytest.fixture
def world() -> Iterator[World]:
    with session() as alone:
        yield alone
        gc.collect()


def small_state(world: World, widths: list[float]) -> TrainState:
    model = create("DRWKV", input_size=8, in_channels=1, num_classes=3, patch_size=2, hidden_size=12, depth=3)
    make = partial(optimizer.build, config=OptimizerConfig())
    engine = wrap(model, make, ParallelConfig(engine="ddp"), world)
    return TrainState(engine, Ema(engine, widths), identity={})


def take_step(state: TrainState, *, skipped: bool) -> None:
    """One step of the optimizer along a random gradient, and of the averages, as train_dist.py takes it."""
    for part in state.engine.parts.values():
        part.grad = torch.randn_like(part) * (float("nan") if skipped else 1.0)
    found_inf = torch.tensor(float(skipped))
    state.engine.step(1e-1, found_inf)
    state.ema.update(0.9, found_inf)
    state.advance(1)


def copied(parts: Weights) -> Weights:
    return {name: part.detach().clone() for name, part in parts.items()}


def test_the_running_average_is_the_mean_of_all_weights_by_the_power_of_time(world: World) -> None:
    """By brute force in float64, to float32's rounding; skipped steps, the first one too, change none."""
    widths, history = [0.01, 0.05, 0.1, 0.25, 0.288], []
    state = small_state(world, widths)
    for step in range(60):
        before = {kind: copied(parts) for kind, parts in state.ema.kinds.items()}
        skipped = step in (0, 1, 7, 30, 31, 59)
        take_step(state, skipped=skipped)
        if skipped:
            for kind, parts in state.ema.kinds.items():
                assert all(torch.equal(parts[name], before[kind][name]) for name in parts), (step, kind)
        else:
            history.append(copied(state.engine.parts))
    t = len(history)
    assert state.engine.updates == t == 54
    for width in widths:
        power = exponent(width) + 1
        shares = [((i + 1) ** power - i**power) / t**power for i in range(t)]
        assert sum(shares) == pytest.approx(1)
        expected = {
            name: torch.stack([weights[name].double() * s for weights, s in zip(history, shares, strict=True)]).sum(0)
            for name in history[0]
        }  # fmt: skip
        assert distance(state.ema.kinds[kind_of(width)], expected) <= 1e-6 * norm(expected), width


def test_snapshots_are_all_kept_and_those_of_a_history_that_was_left_are_removed(
    world: World, tmp_path: Path
) -> None:
    config = load(TrainConfig, [WIDTHS, "ema.snapshot_every_steps=2", "checkpoint.keep_last=1"])
    state = small_state(world, config.ema.widths)
    snapshots = Snapshots(tmp_path, config, world, step=0)
    for _ in range(8):
        take_step(state, skipped=False)
        if snapshots.due(state.step):
            snapshots.save(state)
    snapshots.rewind(6)  # the save of step 8 is under way
    assert [read_scalars(path)["step"] for path in whole_checkpoints(tmp_path / "ema_snapshots")] == [2, 4, 6]
    Snapshots(tmp_path, config, world, step=5)  # a resume
    assert sorted(p.name for p in (tmp_path / "ema_snapshots").iterdir()) == [
        "step_00000002",
        "step_00000004",
    ]
    assert [(s.updates, s.widths) for s in stored(tmp_path, CheckpointConfig())] == [
        (2, (0.05, 0.1)),
        (4, (0.05, 0.1)),
    ]


def test_the_error_of_a_snapshot_is_heard_of(world: World, tmp_path: Path) -> None:
    config = load(TrainConfig, [WIDTHS, "ema.snapshot_every_steps=1"])
    state = small_state(world, config.ema.widths)
    snapshots = Snapshots(tmp_path, config, world, step=0)
    (tmp_path / "ema_snapshots" / "step_00000001.tmp").write_text("in the way")
    take_step(state, skipped=False)
    snapshots.save(state)
    with pytest.raises(OSError, match=r"ema_snapshots could not be saved"):
        snapshots.finish()


def train_here(folder: Path, digits: Path, steps: int, *more: str) -> None:
    """A run of the digits by one process, this one."""
    given = [f"run.folder={folder}", f"data.paths=[{digits / 'train'}]", f"run.total_steps={steps}", *more]
    train_dist.train(load(TrainConfig, [*SMALL, "parallel.engine=ddp", *given]))


def test_a_run_that_goes_back_takes_its_snapshots_anew(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 6 to 8 are not finite: the run goes back to step 4, and their samples are left out."""
    plain, calls = Objective.losses, iter(range(100))

    def poisoned(*arguments: Any) -> torch.Tensor:
        return plain(*arguments) * (float("nan") if next(calls) in (6, 7, 8) else 1.0)

    monkeypatch.setattr(Objective, "losses", poisoned)
    keys = [WIDTHS, "ema.snapshot_every_steps=2", "checkpoint.every_steps=4", "health.max_nonfinite_in_row=3"]
    train_here(tmp_path, digits, 12, *keys)
    found = [read_scalars(path) for path in whole_checkpoints(tmp_path / "ema_snapshots")]
    assert [(s["step"], s["updates"]) for s in found] == [(2, 2), (4, 4), (6, 6), (8, 6), (10, 6), (12, 8)]
    log = (tmp_path / "log.txt").read_text()
    assert [log.count(f"ema_snapshots/step_{step:08d}\n") for step in (4, 6, 8)] == [1, 2, 2]
    assert [s.updates for s in stored(tmp_path, CheckpointConfig())] == [2, 4, 6, 8]


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[float, Weights]]:
    """A run of the digits with snapshots, and the averages of OTHERS, which it does not store, tracked along."""
    folder, tracked = tmp_path_factory.mktemp("run"), []

    class TrackingEma(Ema):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.others = Ema(arguments[0], OTHERS)
            tracked.append(self.others)

        def update(self, decay: float, found_inf: torch.Tensor) -> None:
            super().update(decay, found_inf)
            self.others.update(decay, found_inf)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dist, "Ema", TrackingEma)
        keys = [WIDTHS, f"ema.snapshot_every_steps={EVERY}", "diffusion.num_timesteps=500"]
        train_here(folder, digits, STEPS, *keys)
    return folder, {width: tracked[0].kinds[kind_of(width)] for width in OTHERS}


def opened(path: Path) -> Weights:
    return copied(dict(open_trained(str(path), "ema").model.named_parameters()))


@pytest.mark.parametrize("width", OTHERS)
def test_a_width_that_was_not_stored_comes_out_of_those_that_were(
    run: tuple[Path, dict[float, Weights]], tmp_path: Path, width: float
) -> None:
    """Its distance from the true average is a hundredth of that between the true one and the nearest stored."""
    folder, truth = run
    checkpoint = latest(folder / "checkpoints")
    assert checkpoint is not None
    reconstruct(ReconstructConfig(str(folder), width, str(tmp_path / "w.safetensors")))
    found = opened(tmp_path / "w.safetensors")
    error = distance(found, truth[width])
    apart = min(distance(read_full(checkpoint, kind_of(w)), truth[width]) for w in (0.05, 0.1))
    assert error <= 1e-2 * apart
    assert error <= 1e-3 * norm(truth[width])


def test_the_command_writes_what_sampling_and_conversion_open(
    run: tuple[Path, dict[float, Weights]], applications: Applications, tmp_path: Path
) -> None:
    folder, _ = run
    out, again = tmp_path / "w.safetensors", tmp_path / "again.safetensors"
    finished = applications.run(
        "-m", "drwkv.training.ema", str(folder), "width=0.1", f"out={out}", f"step={STEPS // 2}"
    )
    snapshot = folder / "ema_snapshots" / f"step_{STEPS // 2:08d}"
    stored_there = read_full(snapshot, kind_of(0.1))
    assert distance(opened(out), stored_there) <= 1e-6 * norm(stored_there)
    assert f"width 0.1 after step {STEPS // 2} ({STEPS // 2} updates)" in finished.output
    trained = open_trained(str(out), "ema")
    assert trained.process.num_timesteps == 500 and trained.num_classes == 10
    assert convert.main([str(out), str(again)]) == 0
    assert distance(opened(again), opened(out)) == 0
    assert open_trained(str(again), "ema").process == trained.process


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["width=0.001"], ["width 0.001", "off by 0.", "max_error is 0.05", "nearest width in reach is 0.0"]),
        (["width=0.285"], ["20 snapshots up to step 200", "nearest width in reach is 0.2"]),
        (["width=0.13", "max_error=1e-9"], ["max_error is 1e-09", "ema.snapshot_every_steps"]),
        (["width=0.1", "step=45"], ["'step': 45", "nearest are 30, 40, 50"]),
        (["width=0.3"], ["'width': 0.3", "0.2887"]),
        (["width=0.1", "out=w.pt"], ["'out': 'w.pt'", ".safetensors"]),
        (["widht=0.1"], ["'widht'", "'width'"]),
        (["width=0.1", "run=nowhere"], ["nowhere", "no run folder"]),
    ],
)
def test_what_the_snapshots_cannot_give_is_one_line_and_nothing_written(
    run: tuple[Path, dict[float, Weights]], tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    out = tmp_path / "w.safetensors"
    with pytest.raises((ValueError, OSError)) as caught:
        ema_snapshots.main([str(run[0]), f"out={out}", *arguments])
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), str(
        caught.value
    )
    assert not list(tmp_path.iterdir())


def test_coefficients_add_up_to_one_and_find_what_is_stored() -> None:
    profiles = [Profile(updates, width) for updates in (40, 80, 160) for width in (0.05, 0.1)]
    for width in (0.01, 0.07, 0.13, 0.25):
        coefficients, error = fit(profiles, Profile(160, width))
        assert sum(coefficients) == pytest.approx(1, abs=1e-12) and 1e-3 < error < 1
    coefficients, error = fit(profiles, Profile(160, 0.1))
    assert error < 1e-6
    np.testing.assert_allclose(coefficients, [0, 0, 0, 0, 0, 1], atol=1e-6)


@pytest.mark.parametrize("first", ["fsdp", pytest.param("zero3", marks=pytest.mark.proof)])
def test_averages_of_any_engine_ranks_and_restarts_are_those_of_the_unbroken_run(
    applications: Applications, digits: Path, tmp_path: Path, first: str
) -> None:
    """Resumed on the same ranks bit for bit; on other engines and ranks to 1e-5."""
    one, unbroken, resumed, changed = (tmp_path / name for name in ("one", "unbroken", "resumed", "changed"))
    keys = [WIDTHS, "ema.snapshot_every_steps=4", "optimizer.warmup_steps=0"]
    runs = [
        [*SMALL, *keys, f"data.paths=[{digits / 'train'}]", f"run.folder={folder}", f"run.total_steps={steps}", *more]
        for folder, steps, more in [
            (unbroken, 12, []), (resumed, 6, []), (resumed, 12, []),
            (changed, 5, [f"parallel.engine={first}"]), (changed, 9, ["parallel.engine=fsdp"]),
        ]
    ]  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(runs))
    applications.run("tests/support/training_runs.py", str(tmp_path / "job.json"), world_size=2)
    for folder in (one, changed):
        train_here(folder, digits, 12, *keys)
    for place in ("ema_snapshots/step_00000004", "ema_snapshots/step_00000008", "checkpoints/step_00000012"):
        for kind in map(kind_of, (0.05, 0.1)):
            expected, again = read_full(unbroken / place, kind), read_full(resumed / place, kind)
            assert all(torch.equal(expected[name], again[name]) for name in expected), (place, kind)
            for folder in (one, changed):
                apart = distance(read_full(folder / place, kind), expected)
                assert apart <= 1e-5 * norm(expected), (folder.name, place, kind)
    fixed = read_full(unbroken / "checkpoints/step_00000012", "ema")
    assert distance(fixed, expected) > 1e-3 * norm(expected)  # far more than what is allowed above


def test_widths_cannot_change_in_mid_run(run: tuple[Path, dict[float, Weights]], digits: Path) -> None:
    folder, _ = run
    said = r"ema\.widths was \[0\.05, 0\.1\] and is \[.*\] now, .* set it back"
    for widths in ("[0.05]", "[]", "[0.05,0.1,0.15]"):
        with pytest.raises(ValueError, match=said):
            train_here(folder, digits, STEPS + 1, f"ema.widths={widths}", "diffusion.num_timesteps=500")
