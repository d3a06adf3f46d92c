"""Checkpoints on a real S3: whole or not there, found again through every harm, and left by every end of a run."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_proxy import Fault, Kind
from processes import Applications, losses

from drwkv import s3 as s3_module
from drwkv.parallel import World, session
from drwkv.storage import Storage, open_storage
from drwkv.training.checkpoint import (
    MARK,
    CheckpointConfig,
    Checkpoints,
    latest,
    read_full,
    read_scalars,
    shapes,
    whole_checkpoints,
)
from drwkv.training.checkpoint_s3 import SET_ASIDE
from drwkv.training.trained import open_trained

ONE, TWO = "step_00000001", "step_00000002"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with session() as alone:
        yield alone
        gc.collect()


@pytest.fixture
def place(s3, use_s3) -> str:
    """A prefix in a new bucket."""
    use_s3(s3)
    return f"s3://{s3.bucket()}/run/checkpoints"


@pytest.fixture
def config(tmp_path: Path) -> CheckpointConfig:
    return CheckpointConfig(temporary=str(tmp_path / "temporary"))


def state(value: float) -> dict[str, torch.Tensor]:
    return {"model.a": torch.full((3, 5), value), "ema.a": torch.full((3, 5), 2 * value)}


def save_steps(place: str, world: World, config: CheckpointConfig, steps: list[int]) -> Checkpoints:
    checkpoints = Checkpoints(place, config, world)
    for step in steps:
        checkpoints.save(step, state(float(step)), {"step": step, "n": 10 * step}, wait=True)
    return checkpoints


def test_what_was_saved_to_s3_is_read_back_and_nothing_stays_on_the_node(
    place: str, world: World, config: CheckpointConfig, tmp_path: Path
) -> None:
    checkpoints = save_steps(place, world, config, [3])
    found = checkpoints.newest()
    assert found == latest(place) == f"{place}/step_00000003"
    target = {name: torch.full_like(tensor, float("nan")) for name, tensor in state(0.0).items()}
    assert checkpoints.restore(found, target) == read_scalars(found) == {"step": 3, "n": 30}
    assert all(torch.equal(target[name], tensor) for name, tensor in state(3.0).items())
    assert torch.equal(read_full(found, "ema")["a"], torch.full((3, 5), 6.0))
    assert shapes(found) == {"model.a": torch.Size([3, 5]), "ema.a": torch.Size([3, 5])}
    assert list((tmp_path / "temporary").iterdir()) == []


def flip_byte(storage: Storage, name: str) -> None:
    content = bytearray(storage.read(name))
    content[-3] ^= 16
    storage.write(name, bytes(content))


HARMS: dict[str, Callable[[Storage], Any]] = {
    "flipped byte": lambda storage: flip_byte(storage, f"{TWO}/model-00001.safetensors"),
    "missing object": lambda storage: storage.remove(f"{TWO}/ema-00001.safetensors"),
    "empty object": lambda storage: storage.write(f"{TWO}/ema-00001.safetensors", b""),
    "empty mark": lambda storage: storage.write(f"{TWO}/{MARK}", b""),
    "garbage in the mark": lambda storage: storage.write(f"{TWO}/{MARK}", b"[1, \xff"),
    "garbage in state.json": lambda storage: storage.write(
        f"{TWO}/state.json", b"x" * storage.size(f"{TWO}/state.json")
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_newest_on_s3_is_told_and_kept_and_the_one_before_is_taken(
    place: str, world: World, config: CheckpointConfig, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(place, world, config, [1, 2])
    storage = open_storage(place)
    HARMS[harm](storage)
    checkpoints = Checkpoints(place, config, world)
    assert checkpoints.newest() == f"{place}/{ONE}"
    assert f"{TWO} is damaged" in caplog.text
    assert storage.exists(f"{TWO}/{SET_ASIDE}") and not storage.exists(f"{TWO}/{MARK}")
    assert Checkpoints(place, config, world).newest() == f"{place}/{ONE}"
    checkpoints.save(2, state(7.0), {"step": 2, "n": 20}, wait=True)
    assert checkpoints.newest() == f"{place}/{TWO}" and not storage.exists(f"{TWO}/{SET_ASIDE}")


def test_damaged_checkpoints_alone_on_s3_do_not_let_a_run_begin_anew(
    place: str, world: World, config: CheckpointConfig
) -> None:
    checkpoints = save_steps(place, world, config, [2])
    flip_byte(open_storage(place), f"{TWO}/model-00001.safetensors")
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{TWO} is damaged and there is no whole checkpoint before"):
            checkpoints.newest()


def test_what_killed_saves_left_on_s3_is_taken_away_at_the_next_start(
    place: str, s3, world: World, config: CheckpointConfig
) -> None:
    save_steps(place, world, config, [1])
    bucket, _, prefix = place.removeprefix("s3://").partition("/")
    s3.client().create_multipart_upload(Bucket=bucket, Key=f"{prefix}/{TWO}/model-00001.safetensors")
    storage = open_storage(place)
    storage.write(f"{TWO}/ema-00001.safetensors", b"half a save")
    before = storage.names(ONE)
    Checkpoints(place, config, world)
    assert storage.names() == before
    assert "Uploads" not in s3.client().list_multipart_uploads(Bucket=bucket)


def test_checkpoints_on_s3_are_pruned_and_those_of_a_left_history_discarded(
    place: str, world: World, config: CheckpointConfig
) -> None:
    config.keep_last, config.keep_every_steps = 2, 10
    checkpoints = save_steps(place, world, config, [10, 11, 12, 13])
    assert [read_scalars(found)["step"] for found in whole_checkpoints(place)] == [10, 12, 13]
    checkpoints.discard_after(12)
    assert {name.split("/")[0] for name in open_storage(place).names()} == {"step_00000010", "step_00000012"}


def test_a_store_that_fails_at_a_save_is_heard_of_and_the_older_checkpoint_stays(
    faulty_s3, use_s3, world: World, config: CheckpointConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, proxy = faulty_s3
    use_s3(server)
    place = f"s3://{server.bucket()}/run"
    checkpoints = save_steps(place, world, config, [1])
    monkeypatch.setattr(s3_module, "ATTEMPTS", 2)  # it would go on for a minute
    proxy.faults = (Fault(rate=1.0, kinds=(Kind.ERROR,), match=f"PUT .*/{TWO}/"),)
    checkpoints.save(2, state(2.0), {"step": 2, "n": 20}, wait=False)
    deadline = time.monotonic() + 60
    while checkpoints.failure() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    said = f"checkpoint in {place} could not be saved: rank 0: {place}/{TWO}/model-00001.safetensors: cannot write"
    assert said in str(checkpoints.failure())
    with pytest.raises(OSError, match="could not be saved"):
        checkpoints.finish()
    proxy.faults = ()
    assert Checkpoints(place, config, world).newest() == f"{place}/{ONE}"


def test_a_temporary_folder_without_space_is_named_with_its_key(
    place: str, world: World, config: CheckpointConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(place, config, world)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 50})())
    with pytest.raises(OSError, match=r"0 MB are free .* give checkpoint\.temporary another folder"):
        checkpoints.save(1, state(1.0), {"step": 1, "n": 10}, wait=True)


def arguments(digits: Path, folder: Path, steps: int, *more: str) -> list[str]:
    return [
        "--config", "configs/digits.yaml", f"run.folder={folder}", f"run.total_steps={steps}",
        f"data.paths=[{digits / 'train'}]", "run.batch_size=48", "monitor.grid_every_steps=0",
        "monitor.tensorboard_every_steps=0", "model.options.hidden_size=32", "model.options.depth=3",
        "monitor.progress=false", *more,
    ]  # fmt: skip


@pytest.mark.proof
def test_two_processes_save_to_s3_and_one_goes_on_as_the_unbroken_run(
    applications: Applications, digits: Path, place: str, tmp_path: Path
) -> None:
    folder, more = tmp_path / "remote", (f"checkpoint.folder={place}", "checkpoint.every_steps=4")
    jobs = [arguments(digits, tmp_path / "local", 12), arguments(digits, folder, 6, *more)]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    applications.run("tests/support/training_runs.py", str(tmp_path / "jobs.json"), world_size=2)
    assert [read_scalars(found)["step"] for found in whole_checkpoints(place)] == [4, 6]
    applications.run("train_dist.py", *arguments(digits, folder, 12, *more))
    assert f"continuing from {place}/step_00000006: step 6" in (folder / "log.txt").read_text()
    assert losses(folder) == pytest.approx(losses(tmp_path / "local"), rel=1e-5)
    assert not (folder / "checkpoints").exists()
    trained = [open_trained(path, "ema") for path in (str(folder), place, f"{place}/step_00000012")]
    ema = read_full(f"{place}/step_00000012", "ema")
    for found in trained:
        assert found.name == f"{place}/step_00000012"
        assert all(torch.equal(tensor, ema[name]) for name, tensor in found.model.state_dict().items())


def test_a_run_killed_while_it_uploads_goes_on_from_the_checkpoint_before(
    applications: Applications, digits: Path, faulty_s3, use_s3, tmp_path: Path
) -> None:
    server, proxy = faulty_s3
    use_s3(server)
    place, folder = f"s3://{server.bucket()}/run", tmp_path / "run"
    temporary = tmp_path / "temporary"
    more = (f"checkpoint.folder={place}", f"checkpoint.temporary={temporary}", "checkpoint.every_steps=4")
    # One file of the second save does not come through.
    proxy.faults = (Fault(rate=1.0, kinds=(Kind.RESET,), match="PUT .*/step_00000008/exp_avg-00002"),)
    group = applications.start("train_dist.py", *arguments(digits, folder, 8, *more), world_size=2)
    deadline = time.monotonic() + 90
    while not proxy.counts[Kind.RESET] and time.monotonic() < deadline and group.running():
        time.sleep(0.02)
    group.kill()
    group.wait()
    storage = open_storage(place)
    assert storage.names("step_00000008/") and not storage.exists(f"step_00000008/{MARK}")
    assert list(temporary.iterdir())
    proxy.faults = ()
    applications.run("train_dist.py", *arguments(digits, folder, 8, *more))
    log = (folder / "log.txt").read_text()
    assert f"checkpoint {place}/step_00000008 was never finished: removed" in log
    assert f"continuing from {place}/step_00000004: step 4" in log
    assert latest(place) == f"{place}/step_00000008"
    assert list(temporary.iterdir()) == []
