"""Checkpoints: whole or not there, kept as asked, refused where they do not fit."""

from __future__ import annotations

import gc
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from drwkv.parallel import World, session
from drwkv.training import checkpoint_files
from drwkv.training.checkpoint import (
    MARK,
    CheckpointConfig,
    Checkpoints,
    latest,
    read_full,
    read_scalars,
    whole_checkpoints,
)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with session() as alone:
        yield alone
        gc.collect()


def state(value: float) -> dict[str, torch.Tensor]:
    return {
        "model.a": torch.full((3, 5), value),
        "ema.a": torch.full((3, 5), 2 * value),
        "model.b": torch.full((7,), value),
    }


def save_steps(folder: Path, world: World, config: CheckpointConfig, steps: list[int]) -> Checkpoints:
    checkpoints = Checkpoints(folder, config, world)
    for step in steps:
        checkpoints.save(step, state(float(step)), {"step": step, "n": 10 * step}, wait=True)
    return checkpoints


def test_what_was_saved_is_read_back(tmp_path: Path, world: World) -> None:
    checkpoints = save_steps(tmp_path, world, CheckpointConfig(), [3])
    found = latest(tmp_path)
    assert found is not None and found.name == "step_00000003"
    target = {name: torch.full_like(tensor, float("nan")) for name, tensor in state(0.0).items()}
    assert checkpoints.restore(found, target) == {"step": 3, "n": 30}
    assert all(torch.equal(target[name], tensor) for name, tensor in state(3.0).items())
    assert torch.equal(read_full(found, "ema")["a"], torch.full((3, 5), 6.0))


def test_a_checkpoint_holds_no_pickle(tmp_path: Path, world: World) -> None:
    save_steps(tmp_path, world, CheckpointConfig(), [1])
    names = {path.name for path in (tmp_path / "step_00000001").iterdir()}
    assert all(name.endswith((".safetensors", ".json")) or name == MARK for name in names), names


def test_weights_changed_while_a_save_is_under_way_do_not_reach_it(tmp_path: Path, world: World) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(asynchronous=True), world)
    tensors = {"model.a": torch.ones(512, 1024)}
    checkpoints.save(1, tensors, {"step": 1, "n": 1}, wait=False)
    tensors["model.a"].fill_(float("nan"))
    checkpoints.finish()
    found = latest(tmp_path)
    assert found is not None and torch.equal(read_full(found, "model")["a"], torch.ones(512, 1024))


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        (CheckpointConfig(keep_last=2), [40, 50]),
        (CheckpointConfig(keep_last=1, keep_every_steps=20), [20, 40, 50]),
        (CheckpointConfig(keep_last=0), [50]),
    ],
)
def test_the_last_few_and_every_kth_are_kept_and_never_none(
    tmp_path: Path, world: World, config: CheckpointConfig, kept: list[int]
) -> None:
    save_steps(tmp_path, world, config, [10, 20, 30, 40, 50])
    assert [read_scalars(path)["step"] for path in whole_checkpoints(tmp_path)] == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:08d}" for step in kept]


@pytest.mark.parametrize("harm", ["no mark", "short file", "missing file", "broken mark"])
def test_latest_passes_over_a_checkpoint_that_is_not_whole(tmp_path: Path, world: World, harm: str) -> None:
    save_steps(tmp_path, world, CheckpointConfig(), [1, 2])
    newest = tmp_path / "step_00000002"
    data = next(newest.glob("*.safetensors"))
    match harm:
        case "no mark":
            (newest / MARK).unlink()
        case "short file":
            data.write_bytes(data.read_bytes()[:-1])
        case "missing file":
            data.unlink()
        case "broken mark":
            (newest / MARK).write_text('{"files": ')
    found = latest(tmp_path)
    assert found is not None and found.name == "step_00000001"
    Checkpoints(tmp_path, CheckpointConfig(), world)
    assert not newest.exists()
    set_aside = list(tmp_path.glob("damaged_*_step_00000002"))
    assert len(set_aside) == (0 if harm == "no mark" else 1)


HARMS: dict[str, tuple[str, Callable[[bytes], bytes | None]]] = {  # file -> what becomes of its bytes
    "flipped byte": ("model-00001.safetensors", lambda data: data[:-3] + bytes([data[-3] ^ 16]) + data[-2:]),
    "missing file": ("ema-00001.safetensors", lambda data: None),
    "empty file": ("ema-00001.safetensors", lambda data: b""),
    "empty mark": (MARK, lambda data: b""),
    "garbage in the mark": (MARK, lambda data: b"[1, \xff"),
    "garbage in state.json": ("state.json", lambda data: b"x" * len(data)),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("when", ["at a start", "when a run goes back"])
def test_every_harm_to_the_newest_is_told_and_the_one_before_is_taken(
    tmp_path: Path, world: World, harm: str, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = save_steps(tmp_path, world, CheckpointConfig(), [1, 2])
    name, change = HARMS[harm]
    file = tmp_path / "step_00000002" / name
    content = change(file.read_bytes())
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    if when == "at a start":
        checkpoints = Checkpoints(tmp_path, CheckpointConfig(), world)
    assert checkpoints.newest(at_most_n=20) == tmp_path / "step_00000001"
    assert re.search(r"step_00000002.* is damaged", caplog.text)
    assert len(list(tmp_path.glob("damaged_*_step_00000002"))) == 1
    checkpoints.save(2, state(7.0), {"step": 2, "n": 20}, wait=True)
    assert checkpoints.newest() == tmp_path / "step_00000002"


def test_a_damaged_checkpoint_is_not_read_for_sampling(tmp_path: Path, world: World) -> None:
    save_steps(tmp_path, world, CheckpointConfig(), [1])
    harmed = tmp_path / "step_00000001" / "ema-00001.safetensors"
    harmed.write_bytes(HARMS["flipped byte"][1](harmed.read_bytes()))
    with pytest.raises(ValueError, match=r"is damaged: ema-00001\.safetensors has crc32c"):
        read_full(tmp_path / "step_00000001", "ema")


def test_damaged_checkpoints_alone_do_not_let_a_run_begin_anew(tmp_path: Path, world: World) -> None:
    checkpoints = save_steps(tmp_path, world, CheckpointConfig(), [1, 2])
    for step in (1, 2):
        harmed = tmp_path / f"step_{step:08d}" / "model-00001.safetensors"
        harmed.write_bytes(HARMS["flipped byte"][1](harmed.read_bytes()))
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"damaged_.* is damaged and there is no whole checkpoint before"
        ):
            checkpoints.newest()
    for damaged in tmp_path.glob("damaged_*"):
        shutil.rmtree(damaged)
    assert checkpoints.newest() is None


def test_a_save_that_cannot_be_read_back_is_never_marked(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = save_steps(tmp_path, world, CheckpointConfig(), [1])
    reopen = checkpoint_files._reopen

    def damaged(path: Path) -> dict[str, int]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return reopen(path)

    monkeypatch.setattr(checkpoint_files, "_reopen", damaged)
    with pytest.raises(OSError, match="cannot be read back"):
        checkpoints.save(2, state(2.0), {"step": 2, "n": 20}, wait=True)
    assert latest(tmp_path) == tmp_path / "step_00000001"


def test_the_error_of_a_background_save_is_known_without_waiting(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    checkpoints = Checkpoints(tmp_path, CheckpointConfig(asynchronous=True), world)
    monkeypatch.setattr(checkpoint_files, "_reopen", full)
    checkpoints.save(1, state(1.0), {"step": 1, "n": 1}, wait=False)
    deadline = time.monotonic() + 60
    while checkpoints.failure() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "no space left" in str(checkpoints.failure())
    with pytest.raises(OSError, match="checkpoint .* could not be saved: rank 0: no space left"):
        checkpoints.finish()


def test_checkpoints_of_a_history_that_was_left_are_discarded(tmp_path: Path, world: World) -> None:
    checkpoints = save_steps(tmp_path, world, CheckpointConfig(), [10, 20, 30])
    checkpoints.discard_after(10)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000010"]
    checkpoints.save(20, state(-1.0), {"step": 20, "n": 7}, wait=True)
    assert read_scalars(tmp_path / "step_00000020")["n"] == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.a": torch.zeros(3, 6)}, r"model\.a is \(3, 5\) there and \(3, 6\)"),
        ({"ema.a": None}, r"ema\.a is \(3, 5\) there and missing"),
        ({"model.c": torch.zeros(1)}, r"model\.c is missing there and \(1,\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_name(
    tmp_path: Path, world: World, change: dict[str, torch.Tensor | None], message: str
) -> None:
    checkpoints = save_steps(tmp_path, world, CheckpointConfig(), [1])
    wanted = {name: tensor for name, tensor in (state(0.0) | change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        checkpoints.restore(tmp_path / "step_00000001", wanted)


def test_the_mark_lists_every_file_with_its_size(tmp_path: Path, world: World) -> None:
    save_steps(tmp_path, world, CheckpointConfig(), [1])
    folder = tmp_path / "step_00000001"
    sizes = json.loads((folder / MARK).read_text())["files"]
    assert sizes == {p.name: p.stat().st_size for p in folder.iterdir() if p.name != MARK}
