"""The laws of the trainer on the demo's own config: the same run whatever the ranks, the engine and the restarts.

Label drop and stochastic depth are on. Runs are real processes on gloo; what was trained on is read from the audit
that every rank writes, not from the counter.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import Applications, audit, losses, metrics

from drwkv.training.checkpoint import latest, read_full, read_scalars

STEPS = 50
BATCH = 64
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(applications: Applications, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train the demo's config for STEPS steps in a folder of its own, once for the same arguments."""
    done: dict[tuple, Path] = {}

    def train(*overrides: str, world_size: int = 1, folder: Path | None = None, steps: int = STEPS) -> Path:
        key = (overrides, world_size, folder, steps)
        if key not in done:
            place = folder or tmp_path_factory.mktemp("run")
            applications.run(
                "train_dist.py", "--config", "configs/digits.yaml", f"run.folder={place}", f"run.total_steps={steps}",
                f"data.paths=[{digits / 'train'}]", f"run.batch_size={BATCH}", "run.audit=true",
                "monitor.progress=false", "monitor.grid_every_steps=0", "checkpoint.every_steps=1000",
                "run.label_drop=0.1", "model.options.drop_path_rate=0.1", *overrides, world_size=world_size,
            )  # fmt: skip
            done[key] = place
        return done[key]

    return train


def assert_same_losses(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """The loss of every step agrees to `tolerance`, and it is the loss of a model that learns."""
    a, b = torch.tensor(losses(one)), torch.tensor(losses(other))
    assert len(a) == len(b) == STEPS
    worst = ((a - b).abs() / b).max().item()
    assert worst <= tolerance, f"losses differ by {worst:.2e}, at step {(a - b).abs().argmax().item()}"
    assert a[-10:].mean() < 0.9 * a[:5].mean()


def tensors(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    checkpoint = latest(folder / "checkpoints")
    assert checkpoint is not None and read_scalars(checkpoint)["step"] == STEPS
    return read_full(checkpoint, prefix)


def assert_same_bits(one: Path, other: Path) -> None:
    """Weights, averages and moments are equal to the last bit."""
    assert losses(one) == losses(other)
    for prefix in ("model", "ema", "exp_avg", "exp_avg_sq"):
        a, b = tensors(one, prefix), tensors(other, prefix)
        assert a.keys() == b.keys() and a
        different = [name for name in a if not torch.equal(a[name], b[name])]
        assert not different, f"{prefix}: {different}"


@pytest.mark.parametrize("world_size", [pytest.param(n, marks=pytest.mark.proof) for n in (2, 3, 4)])
def test_any_number_of_processes_trains_the_same_run(run: Run, world_size: int) -> None:
    one, many = run(), run(world_size=world_size)
    assert_same_losses(one, many)
    assert audit(one) == audit(many)
    assert len(list((many / "audit").glob("rank_*.jsonl"))) == world_size


def test_the_audit_holds_every_n_once_and_the_noised_samples_differ(run: Run) -> None:
    rows = audit(run())
    assert [n for _, n, _, _ in rows] == list(range(STEPS * BATCH))
    assert all(step == n // BATCH for step, n, _, _ in rows)
    assert len({x_t for *_, x_t in rows}) == STEPS * BATCH


def test_the_losses_are_the_golden_ones(run: Run) -> None:
    """A change of the losses is a change of the run's meaning: make the file anew only on purpose, and say why."""
    lines = (Path(__file__).parents[1] / "golden" / "digits_losses.txt").read_text().splitlines()
    golden = torch.tensor([float(line.split()[1]) for line in lines if not line.startswith("#")])
    found = torch.tensor(losses(run()))
    worst = ((found - golden).abs() / golden).max().item()
    assert worst <= 1e-3, f"a loss is {worst:.1e} from the golden one"  # another CPU rounds otherwise


@pytest.mark.proof
@pytest.mark.parametrize("engine", ["fsdp", "ddp"])
def test_two_micro_batches_train_the_same_samples_as_one_batch_twice_their_size(
    run: Run, engine: str
) -> None:
    whole, cut = run(world_size=2), run("run.accumulate=2", f"parallel.engine={engine}", world_size=2)
    assert_same_losses(whole, cut)
    assert audit(whole) == audit(cut)


DDP = ("parallel.engine=ddp", "parallel.fixed_buckets=true")


@pytest.mark.parametrize(
    "overrides", [pytest.param((), id="fsdp"), pytest.param(DDP, id="ddp", marks=pytest.mark.proof)]
)
def test_resume_continues_bit_for_bit(run: Run, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    unbroken = run(*overrides, world_size=2)
    run(*overrides, world_size=2, folder=tmp_path, steps=STEPS // 2)
    run(*overrides, world_size=2, folder=tmp_path)
    assert_same_bits(unbroken, tmp_path)
    assert audit(unbroken) == audit(tmp_path)


@pytest.mark.proof
def test_resume_on_another_world_size_and_engine_continues_the_run(run: Run, tmp_path: Path) -> None:
    run(world_size=2, folder=tmp_path, steps=20)
    run("parallel.engine=ddp", world_size=1, folder=tmp_path, steps=35)
    run(world_size=3, folder=tmp_path)
    assert_same_losses(run(), tmp_path)
    assert audit(run()) == audit(tmp_path)


@pytest.mark.proof
def test_a_batch_size_changed_in_mid_run_keeps_the_order(run: Run, tmp_path: Path) -> None:
    run(world_size=2, folder=tmp_path, steps=20)
    run("run.batch_size=48", world_size=2, folder=tmp_path, steps=40)
    by_n = {n: (sample, x_t) for _, n, sample, x_t in audit(run())}
    rows = audit(tmp_path)
    assert [n for _, n, _, _ in rows] == list(range(20 * BATCH + 20 * 48))
    assert all(by_n[n] == (sample, x_t) for _, n, sample, x_t in rows)
    assert [line["num_samples"] for line in metrics(tmp_path)] == [BATCH] * 20 + [48] * 20


def test_a_finished_run_says_so_and_changes_nothing(
    run: Run, applications: Applications, digits: Path
) -> None:
    folder = run()
    told = {"log.txt", "status.json"}  # that it was asked again
    before = {
        path: path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in told
    }
    finished = applications.run(
        "train_dist.py", "--config", str(folder / "config.yaml"), f"run.total_steps={STEPS}",
    )  # fmt: skip
    assert f"is finished: {STEPS} of {STEPS} steps are done" in finished.output
    after = {
        path: path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in told
    }
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert before == after
