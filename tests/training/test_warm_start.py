"""A new run from the weights of another: the same outputs at first, on larger inputs too, and steps of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from image_trees import write_image_folder
from processes import Applications, audit, losses
from small_vae import save_small_vae
from torch import nn

import train_dist
from data_prep.encode import EncodeConfig, encode
from drwkv.compose import load
from drwkv.config import TrainConfig
from drwkv.convert import save_weights
from drwkv.diffusion.gaussian import GaussianConfig
from drwkv.models import create
from drwkv.models.layers import resize_positions
from drwkv.training.checkpoint import MARK, latest, read_full, read_scalars
from drwkv.training.trained import open_trained

SMALL = [
    "model.name=DRWKV", "model.in_channels=4", "model.num_classes=5", "run.batch_size=8", "optimizer.lr=1e-3",
    "model.options={patch_size: 2, hidden_size: 32, depth: 3}", "data.flip=true", "checkpoint.every_steps=0",
    "monitor.progress=false", "monitor.tensorboard_every_steps=0", "ema.decay=0.9",
]  # fmt: skip
# Too little to move a weight, so that the first weights are found in the checkpoint
STILL = "optimizer.lr=1e-30"
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Side -> shard set of latents of the same 50 images, of side 4 and 8, with those of the mirrored images."""
    place = tmp_path_factory.mktemp("latents")
    write_image_folder(place / "images", 50, num_classes=5, seed=2)
    vae = save_small_vae(place / "vae")
    for side in (4, 8):
        source, out = str(place / "images"), str(place / str(side))
        encode(EncodeConfig(source=source, vae=str(vae), out=out, resolution=4 * side, batch=16, workers=0))
    return {side: place / str(side) for side in (4, 8)}


def arguments(latents: dict[int, Path], folder: Path, side: int, *more: str) -> list[str]:
    of_side = [f"data.paths=[{latents[side]}]", f"model.input_size=[{side},{side}]", f"run.folder={folder}"]
    return [*SMALL, *of_side, "run.total_steps=2", *more]


@pytest.fixture(scope="module")
def train(latents: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """train(side, *overrides) -> the folder of a run on latents of that side, in this process."""

    def run(side: int, *more: str, folder: Path | None = None) -> Path:
        place = folder or tmp_path_factory.mktemp("run") / "run"
        train_dist.train(load(TrainConfig, arguments(latents, place, side, *more)))
        return place

    return run


@pytest.fixture(scope="module")
def source(train: Run) -> Path:
    """A run on latents of 4x4 whose average differs from its weights."""
    return train(4, "run.total_steps=4")


def end(folder: Path) -> Path:
    checkpoint = latest(folder / "checkpoints")
    assert checkpoint is not None
    return checkpoint


def outputs(model: nn.Module, side: int) -> torch.Tensor:
    x = torch.randn(3, 4, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(x, torch.tensor([3.0, 500.0, 999.0]), torch.tensor([0, 4, 5]))


@pytest.mark.parametrize("which", ["ema", "model"])
def test_weights_and_average_start_from_the_chosen_set_and_everything_else_anew(
    train: Run, source: Path, which: str
) -> None:
    run = train(4, f"run.start_from={source}", f"run.start_weights={which}", STILL)
    expected = read_full(end(source), which)
    for prefix in ("model", "ema"):
        found = read_full(end(run), prefix)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), prefix
    assert torch.equal(
        outputs(open_trained(str(run), "ema").model, 4), outputs(open_trained(str(source), which).model, 4)
    )
    scalars = read_scalars(end(run))
    assert (scalars["step"], scalars["n"], scalars["updates"]) == (2, 16, 2)
    other = read_full(end(source), "model" if which == "ema" else "ema")
    assert not all(torch.equal(other[name], expected[name]) for name in expected)


def test_on_inputs_twice_as_large_it_gives_what_the_old_model_gives_there(train: Run, source: Path) -> None:
    run = train(8, f"run.start_from={source}", STILL)
    old, new = open_trained(str(source), "ema").model, open_trained(str(run), "model").model
    before, after = old.pos_embed.unflatten(1, (2, 2))[0], new.pos_embed.unflatten(1, (4, 4))[0]
    assert torch.equal(new.pos_embed, resize_positions(old.pos_embed, (2, 2), (4, 4)))
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        distances = (before - after[3 * row, 3 * column]).norm(dim=-1).flatten()
        assert distances.argmin() == 2 * row + column
    for name, parameter in new.named_parameters():
        assert name == "pos_embed" or torch.equal(parameter, old.get_parameter(name)), name
    assert torch.equal(outputs(new, 8), outputs(old, 8))


def test_a_run_says_where_its_weights_came_from(train: Run, source: Path) -> None:
    run = train(8, f"run.start_from={source}")
    (start,) = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    mark = hashlib.sha256((end(source) / MARK).read_bytes()).hexdigest()
    manifest = json.loads((source / "data.json").read_text())
    assert start["start_from"] == {
        "path": str(end(source)), "weights": "ema", "sha256": mark, "input_size": [4, 4],
        "vae_hash": manifest["vae_hash"], "process": asdict(GaussianConfig()),
    }  # fmt: skip
    assert "trained for another process" not in (run / "log.txt").read_text()
    other = train(8, f"run.start_from={source}", "diffusion.beta_end=0.03")
    said = "first weights: trained for another process, GaussianConfig(num_timesteps=1000, beta_start=0.0001, beta_end"
    assert f"{said}=0.02" in (other / "log.txt").read_text()
    assert f"start_from: {source}" in (run / "config.yaml").read_text()


def test_a_run_with_checkpoints_of_its_own_goes_on_from_them_whatever_it_started_from(
    train: Run, source: Path, tmp_path: Path
) -> None:
    unbroken = train(8, f"run.start_from={source}", "run.total_steps=4")
    train(8, f"run.start_from={source}", folder=tmp_path / "run")
    train(8, "run.start_from=/nowhere/at/all", "run.total_steps=4", folder=tmp_path / "run")
    assert losses(tmp_path / "run") == losses(unbroken)
    a, b = read_full(end(unbroken), "ema"), read_full(end(tmp_path / "run"), "ema")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "run.start_from=/nowhere/at/all is left aside" in (tmp_path / "run" / "log.txt").read_text()
    assert json.loads((tmp_path / "run" / "starts.jsonl").read_text().splitlines()[1])["start_from"] is None


def test_files_of_weights_start_a_run_too(train: Run, source: Path, tmp_path: Path) -> None:
    trained = open_trained(str(source), "ema").model
    weights = trained.state_dict()
    save_weights(tmp_path / "a.safetensors", weights, trained.config)  # type: ignore[arg-type]
    torch.save({"ema": weights, "model": read_full(end(source), "model")}, tmp_path / "a.pt")
    checkpoint = train(8, f"run.start_from={end(source)}")
    for name in ("a.safetensors", "a.pt"):
        run = train(8, f"run.start_from={tmp_path / name}")
        assert losses(run) == losses(checkpoint), name
        (line,) = (run / "starts.jsonl").read_text().splitlines()
        assert (
            json.loads(line)["start_from"]["sha256"]
            == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        )


@pytest.mark.proof
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_two_processes_that_shard_the_model_start_from_the_same_weights(
    applications: Applications,
    latents: dict[int, Path],
    train: Run,
    source: Path,
    tmp_path: Path,
    engine: str,
) -> None:
    given = [f"run.start_from={source}", "run.audit=true"]
    one = train(8, *given, "parallel.engine=ddp")
    two = tmp_path / "run"
    applications.run(
        "train_dist.py", *arguments(latents, two, 8, *given, f"parallel.engine={engine}"), world_size=2
    )
    a, b = torch.tensor(losses(one)), torch.tensor(losses(two))
    assert ((a - b).abs() / a).max() <= 1e-5
    assert audit(one) == audit(two)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "model.options={patch_size: 2, hidden_size: 16, depth: 3}",
            r"tensors differ, the first is pos_embed, \(1, 16, 32\) there and \(1, 16, 16\) in this config",
        ),
        (
            "model.num_classes=null",
            r" 1 of \d+ tensors differ, the first is label_emb.*, \(6, 32\) there and missing",
        ),
        ("model.options={patch_size: 2, hidden_size: 32, depth: 5}", r"missing there and \("),
        ("model.options={patch_size: 2, hidden_size: 32, depth: 3, skip: add}", "tensors differ"),
        ("run.start_from=/nowhere/at/all", "run.start_from /nowhere/at/all: no such file or folder"),
        ("run.start_from=configs", "run.start_from configs: holds no whole checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_and_nothing_is_written(
    train: Run, source: Path, tmp_path: Path, override: str, words: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        train(8, f"run.start_from={source}", override, folder=tmp_path / "run")
    assert "run.start_from" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_label_table_of_other_classes_and_settings_without_tensors_are_refused(tmp_path: Path) -> None:
    from drwkv.training.warm_start import take

    def model(**changed: object) -> nn.Module:
        given = dict(
            input_size=4, in_channels=1, num_classes=5, patch_size=2, hidden_size=8, depth=3, skip="add"
        )
        return create("DRWKV", **(given | changed))  # type: ignore[arg-type]

    for changed, words in (
        (
            {"num_classes": 7},
            r" 1 of \d+ tensors differ, the first is label_emb.*\(6, 8\) there and \(8, 8\)",
        ),
        ({"skip": "none"}, "skip is 'add' there and 'none' in this config"),
    ):
        taker = model(**changed)
        before = {name: parameter.clone() for name, parameter in taker.named_parameters()}
        with pytest.raises(ValueError, match=f"here holds another model:.*{words}"):
            take(taker, model(seed=1), where="here")
        assert all(torch.equal(parameter, before[name]) for name, parameter in taker.named_parameters())


def test_a_damaged_checkpoint_starts_no_run(train: Run, tmp_path: Path) -> None:
    source = train(4)
    path = next(end(source).glob("ema-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"'run.start_from': .* is damaged: .* has crc32c"):
        train(8, f"run.start_from={source}", folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
