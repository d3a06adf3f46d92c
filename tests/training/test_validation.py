"""Validation: one number for one set of weights, on any ranks and engine, of samples that are never trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import Applications, audit, losses
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drwkv.compose import load
from drwkv.config import TrainConfig, check_train
from drwkv.data.loader import Batch, open_data
from drwkv.diffusion.gaussian import GaussianProcess
from drwkv.models import create
from drwkv.storage import open_storage
from drwkv.training.objective import Objective, ObjectiveConfig
from drwkv.training.validation import Bank, ValidationConfig, open_bank, timesteps

STEPS, EVERY = 200, 50
SMALL = [
    "--config", "configs/digits.yaml", "monitor.progress=false", "monitor.grid_every_steps=0",
    "checkpoint.every_steps=0", "run.batch_size=32", "validation.num_samples=400", "data.select.held_out=0.3",
    "model.options={patch_size: 2, hidden_size: 32, depth: 3, drop_path_rate: 0.1}", "ema.decay=0.9",
]  # fmt: skip
# Ways to measure one checkpoint, by the number of ranks: those that give the same bits, and what else they change.
ALIKE = {
    1: {
        "ddp": ["parallel.engine=ddp"],
        "another seed, batch, labels": ["run.seed=5", "run.batch_size=40", "run.label_drop=0.9"],
        "another order": ["data.streams=8", "data.window=16", "data.workers=0"],
    },
    2: {"ddp": ["parallel.engine=ddp"], "zero3": ["parallel.engine=zero3"]},
    3: {"fsdp": ["parallel.engine=fsdp"]},
}  # fmt: skip
LAST_DIGITS, MORE = (0.0, 1e-6), (1e-5, 5e-2)  # how far the means may move, and must
MOVED = {
    1: {
        "a short tail": (["validation.micro_batch=64"], LAST_DIGITS),
        "one micro-batch": (["validation.micro_batch=1000"], LAST_DIGITS),
        "another bank": (["validation.seed=1"], (1e-2, 2.0)),
        "bf16": (["parallel.precision=bf16"], MORE),
    },
    2: {"bf16 under zero2": (["parallel.precision=bf16", "parallel.engine=zero2"], MORE)},
    3: {},
}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of validation.jsonl, but for the time that they took."""
    lines = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds") > 0 for line in lines)
    return lines


def by_weights(folder: Path, weights: str) -> list[dict[str, Any]]:
    return [line for line in lines_of(folder) if line["weights"] == weights]


def means_of(line: dict[str, Any]) -> np.ndarray:
    """All means of a line, in one row."""
    rows = [line, *line["bins"]]
    return np.array([row[name] for row in rows for name in ("loss", "mse", "vb")])


@pytest.fixture(scope="module")
def arguments(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a run that holds out three tenths of the digits and measures on them."""
    folder = tmp_path_factory.mktemp("validated")
    return [
        *SMALL, f"run.folder={folder}", f"data.paths=[{digits / 'train'}]", f"run.total_steps={STEPS}",
        f"validation.every_steps={EVERY}", "run.audit=true",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(applications: Applications, arguments: list[str]) -> Path:
    """The folder of that run."""
    applications.run("train_dist.py", *arguments)
    return Path(load(TrainConfig, arguments).run.folder)


def bank_of(arguments: list[str], *more: str) -> Bank | None:
    config = load(TrainConfig, [*arguments, *more])
    check_train(config)
    training = open_data(config.data, seed=config.run.seed)
    return open_bank(config.validation, training, config.model, config.diffusion.num_timesteps)


def test_the_loss_falls_while_digits_are_learnt_and_is_highest_where_there_is_least_noise(
    trained: Path,
) -> None:
    """Noise is hard to tell from a picture at small t, and is all there is at large t."""
    lines = by_weights(trained, "ema")
    assert [line["step"] for line in lines] == list(range(EVERY, STEPS + 1, EVERY))
    assert [line["n"] for line in lines] == [32 * line["step"] for line in lines]
    first, last = lines[0], lines[-1]
    assert last["loss"] < 0.75 * first["loss"]  # found: 0.144 after 200 steps, 0.237 after 50
    assert all(
        after["loss"] < before["loss"] for before, after in zip(first["bins"], last["bins"], strict=True)
    )
    by_t = [row["mse"] for row in last["bins"]]
    assert by_t[0] > 2 * by_t[3] and by_t[3] > 2 * by_t[9]
    assert last["bins"][0]["vb"] > 10 * last["bins"][9]["vb"] > 0


def test_the_parts_make_up_the_whole(trained: Path) -> None:
    for line in lines_of(trained):
        assert [(row["t_from"], row["t_to"]) for row in line["bins"]] == [
            (t, t + 100) for t in range(0, 1000, 100)
        ]
        for name in ("loss", "mse", "vb"):
            assert line[name] == pytest.approx(np.mean([row[name] for row in line["bins"]]), rel=1e-12)
        assert line["loss"] == pytest.approx(line["mse"] + line["vb"], rel=1e-6)


def test_the_average_is_measured_beside_the_weights_and_is_the_better_of_the_two(trained: Path) -> None:
    raw, ema = by_weights(trained, "raw"), by_weights(trained, "ema")
    assert [line["step"] for line in raw] == [line["step"] for line in ema]
    # At first the average lags behind; once the loss is flat it is the smoother one.
    assert ema[0]["loss"] > raw[0]["loss"]
    assert ema[-1]["loss"] < raw[-1]["loss"]


def test_no_sample_that_is_measured_is_trained_on(trained: Path, arguments: list[str]) -> None:
    bank = bank_of(arguments)
    assert bank is not None
    seen = {sample_id for _, _, sample_id, _ in audit(trained)}
    assert len(set(bank.ids.tolist())) == 400 and len(seen) == 1004  # of 1438; 434 are held out
    assert not seen & set(bank.ids.tolist())


@pytest.mark.parametrize("world_size", [2, *(pytest.param(n, marks=pytest.mark.proof) for n in (1, 3))])
def test_one_checkpoint_gives_the_same_bits_on_any_ranks_and_under_any_engine(
    applications: Applications, trained: Path, arguments: list[str], tmp_path: Path, world_size: int
) -> None:
    """Another shape of forward moves the last digits alone; another bank or precision does more."""
    alike, moved = ALIKE[world_size], MOVED[world_size]
    variants = alike | {name: more for name, (more, _) in moved.items()}
    job = {"arguments": arguments, "variants": variants, "out": str(tmp_path)}
    (tmp_path / "job.json").write_text(json.dumps(job))
    applications.run("tests/support/validating_ranks.py", str(tmp_path / "job.json"), world_size=world_size)
    expected = lines_of(trained)[-2:]  # what the run itself, one process under FSDP2, has found
    assert [line["step"] for line in expected] == [STEPS, STEPS]
    for name in alike:
        assert lines_of(tmp_path / name) == expected, name
    means = means_of(expected[-1])
    for name, (_, (least, most)) in moved.items():
        worst = (np.abs(means_of(lines_of(tmp_path / name)[-1]) - means) / means).max()
        assert least <= worst <= most, f"{name}: {worst:.1e}"


@pytest.mark.parametrize(
    "engine", ["fsdp", *(pytest.param(e, marks=pytest.mark.proof) for e in ("ddp", "zero3"))]
)
def test_training_is_the_same_to_the_bit_with_validation_and_without(
    applications: Applications, digits: Path, tmp_path: Path, engine: str
) -> None:
    runs = [
        [*SMALL, f"run.folder={tmp_path / str(every)}", f"data.paths=[{digits / 'train'}]", "run.total_steps=4",
         f"parallel.engine={engine}", f"validation.every_steps={every}", "monitor.tensorboard_every_steps=0"]
        for every in (0, 2)
    ]  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(runs))
    applications.run("tests/support/training_runs.py", str(tmp_path / "job.json"), world_size=2)
    assert losses(tmp_path / "2") == losses(tmp_path / "0")
    assert [line["step"] for line in lines_of(tmp_path / "2")] == [2, 2, 4, 4]
    assert not (tmp_path / "0" / "validation.jsonl").exists()


def test_a_resumed_run_shows_each_validation_once(
    applications: Applications, digits: Path, tmp_path: Path
) -> None:
    run = [
        *SMALL, f"run.folder={tmp_path}", f"data.paths=[{digits / 'train'}]", "run.total_steps=9",
        "validation.every_steps=3", "checkpoint.every_steps=6", "monitor.tensorboard_every_steps=1",
        "validation.num_samples=50",
    ]  # fmt: skip
    applications.run("train_dist.py", *run)
    unbroken = lines_of(tmp_path)
    assert [line["step"] for line in unbroken] == [3, 3, 6, 6, 9, 9]
    # As if killed before the last checkpoint was whole: on from step 6, where a validation is due and was done.
    for file in sorted((tmp_path / "checkpoints" / "step_00000009").iterdir()):
        file.unlink()
    (tmp_path / "checkpoints" / "step_00000009").rmdir()
    finished = applications.run("train_dist.py", *run)
    assert "step 6, sample 192" in finished.output
    assert lines_of(tmp_path) == unbroken

    shown = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in shown.Tags()["scalars"] if tag.startswith("validation")]
    assert len(tags) == 2 * (3 + 10) and "validation/vb_raw" in tags
    ema = [line for line in unbroken if line["weights"] == "ema"]
    for tag, values in {
        "validation/loss_ema": [line["loss"] for line in ema],
        "validation_ema/t_900_1000": [line["bins"][9]["loss"] for line in ema],
    }.items():
        assert [event.step for event in shown.Scalars(tag)] == [3, 6, 9], tag
        assert [event.value for event in shown.Scalars(tag)] == pytest.approx(values, rel=1e-6), tag


def test_a_rank_that_cannot_read_its_part_stops_all_before_the_first_step(
    applications: Applications, digits: Path, tmp_path: Path
) -> None:
    program = """
import os, train_dist
from drwkv import command
from drwkv.training.validation import Bank
plain = Bank.read
def read(self, j):
    if os.environ["RANK"] == "1":
        raise ValueError("shard 7 is gone")
    return plain(self, j)
Bank.read = read
command.run(train_dist.main)
"""
    run = [
        *SMALL, f"run.folder={tmp_path}", f"data.paths=[{digits / 'train'}]", "run.total_steps=9",
        "validation.every_steps=3",
    ]  # fmt: skip
    finished = applications.start("-c", program, *run, world_size=2).wait(60)
    assert finished.codes == [2, 2], finished.output
    assert "error (rank 1): shard 7 is gone" in finished.output
    assert "rank 1 stopped the run: ValueError: shard 7 is gone" in finished.output
    assert losses(tmp_path) == [] and not (tmp_path / "validation.jsonl").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.select.held_out=0"], ["'validation.every_steps'", "validation.paths=[SET]"]),
        (["data.select.part=held_out"], ["'data.select.part'", "train on part=train"]),
        (["data.select.part=all"], ["'data.select.part'"]),
        (
            ["validation.num_samples=405"],
            ["'validation.num_samples'", "405", "multiple of validation.bins=10"],
        ),
        (["validation.num_samples=440"], ["440", "434 held-out samples", "give 430 or less"]),
        (["validation.bins=0"], ["'validation.bins'"]),
        (["validation.bins=1001", "validation.num_samples=1001"], ["'validation.bins'", "1000 or less"]),
        (["validation.micro_batch=0"], ["'validation.micro_batch'"]),
        (["validation.every_steps=-1"], ["'validation.every_steps'"]),
        (["validation.seed=-1"], ["'validation.seed'"]),
        (
            ["validation.paths=[TRAIN]"],
            ["'validation.paths'", "trained on", "take the set out of data.paths"],
        ),
        (["validation.paths=[TRAIN]", "data.select.held_out=0"], ["'validation.paths'", "trained on"]),
        (["validation.paths=[TEST]"], ["359 held-out samples", "give 350 or less"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(
    arguments: list[str], digits: Path, overrides: list[str], words: list[str]
) -> None:
    named = [
        o.replace("TRAIN", str(digits / "train")).replace("TEST", str(digits / "test")) for o in overrides
    ]
    with pytest.raises(ValueError, match=".") as caught:
        bank_of(arguments, *named)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_sets_of_their_own_and_mixed_sets_give_their_share(arguments: list[str], digits: Path) -> None:
    train, test = digits / "train", digits / "test"
    own = ["data.select.held_out=0", f"validation.paths=[{test}]", "validation.num_samples=350"]
    bank = bank_of(arguments, *own)
    assert bank is not None and len(set(bank.ids.tolist())) == 350 and bank.data.sets[0].path == str(test)
    mixed = bank_of(
        arguments, f"data.paths=[{train},{test}]", "data.weights=[3, 1]", "validation.num_samples=400"
    )
    assert mixed is not None and np.bincount(mixed.which).tolist() == [300, 100]
    assert bank_of(arguments, "validation.every_steps=0", "data.select.held_out=0") is None


def test_a_set_on_s3_is_read_through_the_cache_to_the_same_bank(
    arguments: list[str], digits: Path, tmp_path: Path, s3, use_s3
) -> None:
    use_s3(s3)
    place = f"s3://{s3.bucket()}/digits"
    source, target = open_storage(digits / "test"), open_storage(place)
    for name in source.names():
        target.write(name, source.read(name))
    own = ["data.select.held_out=0", "validation.num_samples=350", f"data.cache={tmp_path / 'cache'}"]
    banks = [bank_of(arguments, *own, f"validation.paths=[{path}]") for path in (digits / "test", place)]
    a, b = (bank.read(np.arange(350)) for bank in banks if bank is not None)
    assert torch.equal(a.sample_id, b.sample_id) and torch.equal(a.x, b.x) and torch.equal(a.y, b.y)
    assert len(list((tmp_path / "cache").rglob("*.tar*"))) >= 2


def test_the_held_out_part_is_measured_whole_however_training_limits_or_balances_its_own(
    arguments: list[str],
) -> None:
    plain = bank_of(arguments, "validation.num_samples=430")
    limited = bank_of(
        arguments, "validation.num_samples=430", "data.select.max_per_class=20", "data.select.balance=true"
    )
    assert plain is not None and limited is not None and np.array_equal(plain.ids, limited.ids)


@pytest.mark.parametrize(("num_samples", "bins"), [(1000, 10), (60, 3), (7000, 7), (5, 5)])
def test_every_range_of_t_has_as_many_samples_spread_evenly(num_samples: int, bins: int) -> None:
    bounds = [b * 1000 // bins for b in range(bins + 1)]
    config = ValidationConfig(num_samples=num_samples, bins=bins, seed=3)
    t = timesteps(config, bounds)
    assert np.array_equal(t, timesteps(config, bounds))
    assert not np.array_equal(t, timesteps(ValidationConfig(num_samples=num_samples, bins=bins), bounds))
    per_bin = num_samples // bins
    for b in range(bins):
        mine, width = np.sort(t[b::bins]), bounds[b + 1] - bounds[b]
        assert len(mine) == per_bin and bounds[b] <= mine[0] and mine[-1] < bounds[b + 1]
        # The i-th smallest lies in the i-th of per_bin equal pieces.
        pieces = bounds[b] + np.arange(per_bin + 1) * width / per_bin
        assert (np.floor(pieces[:-1]) <= mine).all() and (mine <= pieces[1:]).all()
        if per_bin >= 20:  # and it does not go up with j, which would tie t to the class in a sorted set
            assert abs(np.corrcoef(np.arange(per_bin), t[b::bins])[0, 1]) < 0.6


def test_the_noise_of_the_bank_is_none_that_is_trained_on_and_nothing_is_dropped(
    arguments: list[str],
) -> None:
    bank = bank_of(arguments)
    assert bank is not None
    model = create(
        "DRWKV", input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=32, depth=3,
        drop_path_rate=0.5,
    )  # fmt: skip
    objective = Objective(
        GaussianProcess(), model, bank.data.manifest, ObjectiveConfig(),
        seed=0, label_drop=0.9, device=torch.device("cpu"),
    )  # fmt: skip
    batch: Batch = bank.read(np.arange(400))
    t = torch.from_numpy(bank.t[:400])
    held_out, trained = objective.held_out_inputs(batch, t, seed=0), objective.inputs(batch)
    assert torch.equal(held_out.x0, trained.x0) and torch.equal(held_out.t, t)
    correlation = (held_out.eps * trained.eps).mean().item()
    assert abs(correlation) < 0.03 and abs(held_out.eps.std() - 1) < 0.02  # 25,600 numbers: 1 / 160 by chance
    assert trained.keep is not None and held_out.keep is None
    assert held_out.y is not None and torch.equal(held_out.y, batch.y)
    assert trained.y is not None and not torch.equal(trained.y, batch.y)
