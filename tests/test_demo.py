"""The demo, whole and timed: what `make demo` promises, proved on the machine that runs this."""

from __future__ import annotations

import json
import subprocess
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest


@pytest.mark.proof
@pytest.mark.timeout(1200)
def test_the_demo_learns_the_digits_in_five_minutes_and_neither_copies_nor_collapses(
    root: Path, tmp_path: Path
) -> None:
    subprocess.run(["make", "demo", f"FOLDER={tmp_path}"], cwd=root, check=True)
    log = (tmp_path / "run" / "log.txt").read_text().splitlines()
    begun, ended = (datetime.fromisoformat(line.split(",")[0]) for line in (log[0], log[-1]))
    assert (ended - begun).total_seconds() < 300
    metrics = json.loads((tmp_path / "samples" / "report.json").read_text())["metrics"]
    value = {name: metric["value"] for name, metric in metrics.items()}
    assert value["class_agreement"] >= 0.90
    assert value["recall"] >= 0.5
    assert value["near_copy_rate"] <= 0.05
    assert value["identical_images"] == 0
    with np.load(tmp_path / "samples" / "samples.npz") as arrays:
        assert np.bincount(arrays["arr_1"]).tolist() == [100] * 10
        assert len(np.unique(arrays["arr_0"], axis=0)) == 1000
