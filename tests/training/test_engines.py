"""Every engine trains the same run, and what one saves another loads, on any number of processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from engine_states import known
from processes import Applications, losses
from safetensors.torch import load_file

from drwkv.models import create
from drwkv.training.checkpoint import latest, read_full

STEPS, BATCH = 50, 48
ENGINES = {  # name -> its keys; the names in FEW are proved by every run of the tests
    "ddp": ["parallel.engine=ddp"],
    "zero3": ["parallel.engine=zero3"],
    "zero3, selective checkpointing": ["parallel.engine=zero3", "parallel.activations.checkpoint=selective"],
    "fsdp in two micro-batches": ["parallel.engine=fsdp", "run.accumulate=2"],
    "full checkpointing": ["parallel.engine=fsdp", "parallel.activations.checkpoint=full"],
    "zero1": ["parallel.engine=zero1"],
    "fsdp": ["parallel.engine=fsdp"],
    "fsdp, freed after forward": ["parallel.reshard_after_forward=true", "parallel.blocks_per_unit=1"],
    "fsdp, on the CPU": ["parallel.engine=fsdp", "parallel.offload=all"],
    "selective checkpointing": ["parallel.engine=fsdp", "parallel.activations.checkpoint=selective"],
    "every second block": [
        "parallel.engine=ddp", "parallel.activations.checkpoint=full", "parallel.activations.every=2"
    ],
    "zero2": ["parallel.engine=zero2"],
    "zero2 in two micro-batches": ["parallel.engine=zero2", "run.accumulate=2"],
    "zero2, selective checkpointing": ["parallel.engine=zero2", "parallel.activations.checkpoint=selective"],
    "ddp, selective checkpointing": ["parallel.engine=ddp", "parallel.activations.checkpoint=selective"],
    "zero2, optimizer on the CPU": ["parallel.engine=zero2", "parallel.offload=optimizer"],
    "zero3, optimizer on the CPU": ["parallel.engine=zero3", "parallel.offload=optimizer"],
    "zero3 with checkpointing": ["parallel.engine=zero3", "parallel.activations.checkpoint=full"],
}  # fmt: skip
FEW = list(ENGINES)[:4]
COMPILED = {
    "compiled": ["parallel.engine=fsdp", "parallel.compile=true"],
    "compiled, full": ["parallel.compile=true", "parallel.activations.checkpoint=full"],
    "compiled, selective": ["parallel.compile=true", "parallel.activations.checkpoint=selective"],
    "compiled zero2": ["parallel.engine=zero2", "parallel.compile=true"],
}
WITH_A_GRID = ["monitor.grid_every_steps=50", "monitor.grid_columns=1", "monitor.grid_sampler.steps=2"]
HALF = {
    "fsdp, bf16 weights": ["parallel.engine=fsdp", "parallel.precision=bf16_params", *WITH_A_GRID],
    "zero2, bf16 weights": ["parallel.engine=zero2", "parallel.precision=bf16_params", *WITH_A_GRID],
    "ddp, bf16 autocast": ["parallel.engine=ddp", "parallel.precision=bf16"],
    "fsdp, bf16 autocast": ["parallel.engine=fsdp", "parallel.precision=bf16"],
    "zero1, bf16 weights": ["parallel.engine=zero1", "parallel.precision=bf16_params"],
    "zero3, bf16 weights": ["parallel.engine=zero3", "parallel.precision=bf16_params"],
    "zero1, bf16 autocast": ["parallel.engine=zero1", "parallel.precision=bf16"],
    "zero3, bf16 autocast": ["parallel.engine=zero3", "parallel.precision=bf16"],
}
# Who loads what which other engine has saved.
FEW_LOADS = {"ddp": ["zero3"], "zero1": ["fsdp"]}
ALL = ["ddp", "fsdp", "fsdp*2", "zero1", "zero2", "zero3"]
PROOF = (pytest.mark.proof, pytest.mark.timeout(900))
Train = Callable[..., dict[str, Path]]


@pytest.fixture(scope="module")
def train(applications: Applications, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """train(engines, world_size) -> the folder of each engine's run of the digits, trained in the same processes."""

    def run(engines: Mapping[str, list[str]], *, world_size: int) -> dict[str, Path]:
        place = tmp_path_factory.mktemp("runs")
        folders = {name: place / str(number) for number, name in enumerate(engines)}
        runs = [
            [
                "--config", "configs/digits.yaml", f"run.folder={folders[name]}", f"run.total_steps={STEPS}",
                f"data.paths=[{digits / 'train'}]", f"run.batch_size={BATCH}", "checkpoint.every_steps=0",
                "monitor.progress=false", "monitor.grid_every_steps=0", "monitor.tensorboard_every_steps=0",
                "model.options={patch_size: 2, hidden_size: 32, depth: 3, drop_path_rate: 0.1}", *engines[name],
            ]
            for name in engines
        ]  # fmt: skip
        (place / "job.json").write_text(json.dumps(runs))
        applications.run("tests/support/training_runs.py", str(place / "job.json"), world_size=world_size)
        return folders

    return run


@pytest.fixture(scope="module")
def golden(root: Path) -> torch.Tensor:
    """The loss of each step, of one process that holds the whole model."""
    lines = (root / "tests/golden/engine_losses.txt").read_text().splitlines()
    return torch.tensor([float(line.split()[1]) for line in lines if not line.startswith("#")])


def average(folder: Path) -> torch.Tensor:
    """All weights of the final average, in one row."""
    checkpoint = latest(folder / "checkpoints")
    assert checkpoint is not None
    return torch.cat([tensor.flatten() for _, tensor in sorted(read_full(checkpoint, "ema").items())])


def assert_the_same_run(folders: Mapping[str, Path], reference: Path, golden: torch.Tensor) -> None:
    expected, weights = torch.tensor(losses(reference)), average(reference)
    assert ((expected - golden).abs() / golden).max() <= 1e-3  # another CPU rounds otherwise
    for name, folder in folders.items():
        found = torch.tensor(losses(folder))
        worst = ((found - expected).abs() / expected).max().item()
        assert worst <= 1e-5, f"{name}: losses differ by {worst:.1e}"
        distance = (average(folder) - weights).norm() / weights.norm()
        assert distance <= 1e-5, f"{name}: averages differ by {distance:.1e}"


@pytest.mark.parametrize("names", [FEW, pytest.param(list(ENGINES), marks=PROOF)], ids=["few", "all"])
def test_every_engine_trains_the_same_run(train: Train, golden: torch.Tensor, names: list[str]) -> None:
    folders = train({name: ENGINES[name] for name in names}, world_size=2)
    assert_the_same_run(folders, folders["ddp"], golden)


@pytest.mark.proof
@pytest.mark.timeout(900)
@pytest.mark.parametrize("names", [[], ["ddp"]], ids=["one process", "ddp"])
def test_replicas_of_a_sharded_model_train_the_same_run(
    train: Train, golden: torch.Tensor, names: list[str]
) -> None:
    engines = {"replicas": ["parallel.engine=fsdp", "parallel.replicas=2"]}
    folders = train(engines | {name: ENGINES[name] for name in names}, world_size=4)
    one = train({"ddp": ENGINES["ddp"]}, world_size=1)["ddp"]
    assert_the_same_run(folders, one, golden)


@pytest.mark.parametrize("names", [list(HALF)[:1], pytest.param(list(HALF), marks=PROOF)], ids=["few", "all"])
def test_bfloat16_trains_nearly_the_same_run(train: Train, golden: torch.Tensor, names: list[str]) -> None:
    folders = train({name: HALF[name] for name in names}, world_size=2)
    for name, folder in folders.items():
        away = (torch.tensor(losses(folder)) - golden).abs() / golden
        # That it is not float32 shows; bfloat16 has 8 bits, and sums over many samples are better than one.
        assert 1e-6 < away.max() < 0.03 and away.mean() < 5e-3, f"{name}: {away.max():.1e}, {away.mean():.1e}"
        checkpoint = latest(folder / "checkpoints")
        assert checkpoint is not None
        weights = read_full(checkpoint, "model")
        assert all(tensor.dtype == torch.float32 for tensor in weights.values()), name
        # What the optimizer holds is finer than what computes.
        assert any((tensor.bfloat16().float() != tensor).any() for tensor in weights.values()), name


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_compiled_blocks_train_the_same_run(train: Train, golden: torch.Tensor) -> None:
    folders = train({"ddp": ENGINES["ddp"], **COMPILED}, world_size=2)
    assert_the_same_run(folders, folders["ddp"], golden)


@pytest.mark.parametrize(
    "loads",
    [FEW_LOADS, pytest.param(dict.fromkeys(ALL, ALL), marks=PROOF)],
    ids=["few", "all"],
)
def test_what_one_engine_saved_another_loads_on_another_number_of_processes(
    applications: Applications, tmp_path: Path, loads: dict[str, list[str]]
) -> None:
    """Weights, average, both moments and the count of updates; and the loaded weights are those that compute."""
    replicated = {engine: saved for engine, saved in loads.items() if "*" in engine}
    in_threes = {engine: saved for engine, saved in loads.items() if "*" not in engine}
    saves = sorted({engine for saved in loads.values() for engine in saved})
    (tmp_path / "states").mkdir()
    for number, (save, load, size) in enumerate([(saves, {}, 2), ([], in_threes, 3), ([], replicated, 4)]):
        job = tmp_path / f"job-{number}.json"
        job.write_text(json.dumps({"save": save, "load": load, "folder": str(tmp_path / "states")}))
        if save or load:
            applications.run("tests/support/engine_states.py", str(job), world_size=size)
    loaded = sorted(tmp_path.glob("states/*.safetensors"))
    assert len(loaded) == sum(map(len, loads.values()))
    outputs = []
    for path in loaded:
        found = load_file(path)
        outputs.append(found.pop("output"))
        kinds = {name.removesuffix(".pos_embed") for name in found if name.endswith(".pos_embed")}
        assert kinds == {"model", "ema", "ema_0.050", "exp_avg", "exp_avg_sq"}
        for name, tensor in found.items():
            assert torch.equal(tensor, known(name, tensor.shape)), f"{path.stem}: {name}"
    plain = create("DRWKV", input_size=8, in_channels=1, num_classes=3, patch_size=2, hidden_size=12, depth=3)
    weights = {name.removeprefix("model."): t for name, t in found.items() if name.startswith("model.")}
    plain.load_state_dict(weights)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain.eval()(x, torch.tensor([3, 500]), torch.tensor([0, 2]))
    for path, output in zip(loaded, outputs, strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5, msg=path.stem)
