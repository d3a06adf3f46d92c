"""Sample sets: the same bytes on any number of processes and over any restart, and measured."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import Applications

NUM_SAMPLES = 130


@pytest.fixture(scope="module")
def trained(applications: Applications, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a small model that has seen 30 batches of digits."""
    folder = tmp_path_factory.mktemp("trained")
    applications.run(
        "train_dist.py", "--config", "configs/digits.yaml", f"run.folder={folder}", "run.total_steps=30",
        f"data.paths=[{digits / 'train'}]", "run.batch_size=32", "model.options.hidden_size=32",
        "model.options.depth=3", "monitor.progress=false", "monitor.grid_every_steps=10", "ema.decay=0.9",
    )  # fmt: skip
    return folder


def arguments(trained: Path, out: Path, *more: str) -> list[str]:
    return [
        "sample_dist.py", "--config", "configs/digits_sample.yaml", f"checkpoint={trained}", f"out={out}",
        f"num_samples={NUM_SAMPLES}", "micro_batch=10", "chunk=20", "sampler.steps=8", *more,
    ]  # fmt: skip


def digest(folder: Path) -> dict[str, str]:
    """Hash of the set's file and of every chunk."""
    files = [folder / "samples.npz", *sorted((folder / "chunks").iterdir())]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def alone(applications: Applications, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set drawn by one process."""
    out = tmp_path_factory.mktemp("alone")
    applications.run(*arguments(trained, out))
    return out


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_processes_draws_the_same_bytes(
    applications: Applications, trained: Path, alone: Path, tmp_path: Path, world_size: int
) -> None:
    applications.run(*arguments(trained, tmp_path), world_size=world_size)
    assert digest(tmp_path) == digest(alone)


def test_a_set_killed_and_run_again_has_the_same_bytes(
    applications: Applications, trained: Path, alone: Path, tmp_path: Path
) -> None:
    for wanted in (1, 3, 5):
        group = applications.start(*arguments(trained, tmp_path), world_size=2)
        while group.running() and len(list(tmp_path.glob("chunks/*.npz"))) < wanted:
            time.sleep(0.002)
        group.kill()
        group.wait()
        assert not (tmp_path / "samples.npz").exists()
    applications.run(*arguments(trained, tmp_path))
    assert digest(tmp_path) == digest(alone)


def test_an_image_does_not_depend_on_how_many_are_drawn(
    applications: Applications, trained: Path, alone: Path, tmp_path: Path
) -> None:
    applications.run(*arguments(trained, tmp_path, "num_samples=25"))
    with np.load(tmp_path / "samples.npz") as few, np.load(alone / "samples.npz") as all_of_them:
        assert np.array_equal(few["arr_0"], all_of_them["arr_0"][:25])
        assert len(np.unique(few["arr_0"], axis=0)) == 25


def test_the_set_has_the_layout_that_adm_reads(alone: Path) -> None:
    with np.load(alone / "samples.npz", allow_pickle=False) as arrays:
        assert list(arrays) == ["arr_0", "arr_1"]
        assert arrays["arr_0"].shape == (NUM_SAMPLES, 8, 8, 1) and arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_1"], np.arange(NUM_SAMPLES) % 10)
    with Image.open(alone / "grid.png") as grid:
        assert grid.width > 8 * 10 and grid.height > 8 * 10


def test_another_seed_or_sampler_in_the_same_folder_is_refused(
    applications: Applications, trained: Path, alone: Path
) -> None:
    before = digest(alone)
    line = applications.refused(*arguments(trained, alone, "seed=1"))
    assert "seed is 0, not 1" in line and str(alone) in line
    assert "sampler.steps is 8, not 9" in applications.refused(*arguments(trained, alone, "sampler.steps=9"))
    assert digest(alone) == before


def test_a_damaged_chunk_is_named(
    applications: Applications, trained: Path, alone: Path, tmp_path: Path
) -> None:
    applications.run(*arguments(trained, tmp_path, "num_samples=40"))
    chunk = tmp_path / "chunks" / "000001.npz"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
    assert "000001.npz: its bytes have changed" in applications.refused(
        *arguments(trained, tmp_path, "num_samples=40")
    )


def test_the_report_holds_numbers_beside_their_floor_and_the_page_stands_alone(
    applications: Applications, trained: Path, digits: Path, tmp_path: Path
) -> None:
    references = [f"evaluate.train={digits / 'train'}", f"evaluate.held_out={digits / 'test'}"]
    finished = applications.run(*arguments(trained, tmp_path, *references))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["run"]["num_samples"] == NUM_SAMPLES and report["run"]["seed"] == 0
    agreement = report["metrics"]["class_agreement"]
    assert agreement["floor"] > 0.97 and 0 <= agreement["value"] < agreement["floor"]
    page = (tmp_path / "report.html").read_text()
    assert (
        page.count("data:image/png;base64,") >= 2 and "<svg" in page and "http" not in page.split("<svg")[0]
    )
    assert f"page:    {tmp_path / 'report.html'}" in finished.output


def test_weights_of_a_step_folder_and_of_the_model_are_read(
    applications: Applications, trained: Path, alone: Path, tmp_path: Path
) -> None:
    step = trained / "checkpoints" / "step_00000030"
    applications.run(*arguments(step, tmp_path / "ema"))
    assert digest(tmp_path / "ema") == digest(alone)
    applications.run(*arguments(step, tmp_path / "model", "weights=model"))
    assert digest(tmp_path / "model") != digest(alone)


def test_what_is_no_checkpoint_is_refused(applications: Applications, digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no such file or folder" in applications.refused(*arguments(tmp_path / "nothing", out))
    assert "no whole checkpoint" in applications.refused(*arguments(digits, out))
    assert not out.exists()
