"""A batch size that changes at named steps: every sample once, by any ranks, restarts and returns to a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from poisoned import poisoned
from processes import Applications, audit, losses, metrics

import train_dist
from drwkv.compose import load
from drwkv.config import TrainConfig, check_ranks, check_train
from drwkv.training.batches import Batches
from drwkv.training.checkpoint import latest, read_full, read_scalars
from drwkv.training.memory import predict

STEPS = 12
STAGES = "run.batch_stages=[{from_step: 4, batch_size: 13}, {from_step: 9, batch_size: 16}]"
SIZES = [9] * 4 + [13] * 5 + [16] * 3
OTHER_STAGES = "run.batch_stages=[{from_step: 3, batch_size: 13}, {from_step: 7, batch_size: 6}]"


def arguments(digits: Path, folder: Path, *more: str) -> list[str]:
    return [
        "--config", "configs/digits.yaml", f"run.folder={folder}", f"run.total_steps={STEPS}", "run.audit=true",
        f"data.paths=[{digits / 'train'}]", "run.batch_size=9", STAGES, "checkpoint.every_steps=0",
        "monitor.progress=false", "monitor.grid_every_steps=0", "monitor.tensorboard_every_steps=0",
        "model.options={patch_size: 2, hidden_size: 32, depth: 3, drop_path_rate: 0.1}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(applications: Applications, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `one`, of one process; `two`, of two; `broken`, stopped at steps 6 and 9; `changed`, in its stages."""
    place = tmp_path_factory.mktemp("stages")
    for name, *starts in (("one", ()), ("changed", ("run.total_steps=6",), (OTHER_STAGES,))):
        for more in starts:
            train_dist.train(load(TrainConfig, arguments(digits, place / name, *more)))
    parts = [arguments(digits, place / "broken", f"run.total_steps={steps}") for steps in (6, 9, STEPS)]
    (place / "job.json").write_text(json.dumps([arguments(digits, place / "two"), *parts]))
    applications.run("tests/support/training_runs.py", str(place / "job.json"), world_size=2)
    return place


def counted(folder: Path) -> list[tuple[int, int]]:
    """(step, n) of every sample that was trained on."""
    return [(step, n) for step, n, _, _ in audit(folder)]


def of_sizes(sizes: list[int]) -> list[tuple[int, int]]:
    """(step, n) of every sample of batches of these sizes."""
    steps = [step for step, size in enumerate(sizes) for _ in range(size)]
    return list(zip(steps, range(sum(sizes)), strict=True))


def test_every_sample_is_trained_on_once_in_batches_of_the_sizes_asked_for(runs: Path) -> None:
    assert counted(runs / "one") == of_sizes(SIZES)
    assert [line["num_samples"] for line in metrics(runs / "one")] == SIZES


def test_two_processes_train_the_same_stages_as_one(runs: Path) -> None:
    one, two = torch.tensor(losses(runs / "one")), torch.tensor(losses(runs / "two"))
    assert ((one - two).abs() / one).max() <= 1e-5
    assert audit(runs / "one") == audit(runs / "two")


def test_a_run_stopped_inside_stages_and_at_their_edges_continues_bit_for_bit(runs: Path) -> None:
    assert losses(runs / "two") == losses(runs / "broken")
    assert audit(runs / "two") == audit(runs / "broken")
    ends = [latest(runs / name / "checkpoints") for name in ("two", "broken")]
    assert ends[0] is not None and ends[1] is not None
    assert read_scalars(ends[0])["n"] == read_scalars(ends[1])["n"] == sum(SIZES)
    for prefix in ("model", "ema", "exp_avg", "exp_avg_sq"):
        a, b = (read_full(end, prefix) for end in ends if end)
        assert a and all(torch.equal(a[name], b[name]) for name in a), prefix


def test_stages_may_change_between_starts_and_no_sample_is_lost_or_doubled(runs: Path) -> None:
    sizes = SIZES[:6] + [13] + [6] * 5
    assert counted(runs / "changed") == of_sizes(sizes)
    by_n = {n: (sample, x_t) for _, n, sample, x_t in audit(runs / "one")}
    assert all(by_n[n] == (sample, x_t) for _, n, sample, x_t in audit(runs / "changed"))


def test_a_return_over_the_edge_of_a_stage_skips_the_window_and_nothing_else(
    applications: Applications, digits: Path, tmp_path: Path
) -> None:
    stages = "run.batch_stages=[{from_step: 6, batch_size: 12}, {from_step: 10, batch_size: 16}]"
    given = ["run.batch_size=8", stages, "checkpoint.every_steps=4", "health.max_nonfinite_in_row=3"]
    finished = applications.run(
        "-c", poisoned("{5, 6, 7}"), *arguments(digits, tmp_path, *given), world_size=2
    )
    assert "went back from step 9 to step 4; samples 40 to 84 are skipped" in finished.output
    checkpoint = latest(tmp_path / "checkpoints")
    assert checkpoint is not None
    scalars = read_scalars(checkpoint)
    assert (scalars["step"], scalars["n"], scalars["updates"]) == (STEPS, 128, 8)
    assert scalars["skipped"] == [[40, 84]]
    everything = of_sizes([8] * 6 + [12] * 4 + [16] * 2)
    assert counted(tmp_path) == [(step, n) for step, n in everything if not 40 <= n < 84]
    assert [line["num_samples"] for line in metrics(tmp_path)] == [8] * 6 + [12] * 4 + [16] * 2


def test_batches_are_opened_anew_only_where_the_size_or_the_place_changes() -> None:
    opened = []

    def open_at(batch_size: int, n: int):
        opened.append((batch_size, n))
        while True:
            yield (n, batch_size)
            n += batch_size

    batches = Batches(open_at)  # type: ignore[arg-type]
    asked = [(0, 8), (8, 8), (16, 12), (28, 12), (8, 8), (16, 8), (24, 8)]
    assert [batches.next(n, size) for n, size in asked] == asked  # type: ignore[comparison-overlap]
    assert opened == [(8, 0), (12, 16), (8, 8)]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ("[{from_step: 5, batch_size: 8}, {from_step: 5, batch_size: 9}]", "'run.batch_stages': [5, 5]"),
        ("[{from_step: 0, batch_size: 8}]", "'run.batch_stages.from_step': 0"),
        ("[{from_step: 5, batch_size: 0}]", "'run.batch_stages.batch_size': 0"),
        ("[{from_step: 5, batch_size: 3}]", "'run.batch_stages.batch_size': 3 is not possible: 2 processes"),
    ],
)
def test_stages_that_cannot_be_are_refused_before_a_run(stages: str, words: str) -> None:
    config = load(TrainConfig, [f"run.batch_stages={stages}", "run.accumulate=2"])
    with pytest.raises(ValueError, match=".") as caught:
        check_train(config)
        check_ranks(config, 2)
    assert words in str(caught.value)


def test_memory_is_that_of_the_largest_batch() -> None:
    small = ["model.name=DRWKV", "model.options={patch_size: 4, hidden_size: 16, depth: 1}"]
    stages = "run.batch_stages=[{from_step: 5, batch_size: 8}, {from_step: 9, batch_size: 2}]"
    grows = predict(load(TrainConfig, [*small, "run.batch_size=4", stages]), 1)
    assert grows == predict(load(TrainConfig, [*small, "run.batch_size=8"]), 1)
    assert grows.activations > predict(load(TrainConfig, [*small, "run.batch_size=4"]), 1).activations
