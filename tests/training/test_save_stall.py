"""A save in the background holds the loop up for little more than the copy of the state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import Applications

MOST = 0.25  # of the time of a save that the loop waits for


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_a_save_in_the_background_stalls_the_loop_for_a_quarter_of_a_save_at_most(
    applications: Applications, tmp_path: Path
) -> None:
    job = {
        "engines": ["ddp", "fsdp", "zero2"], "folder": str(tmp_path / "checkpoints"), "hidden_size": 272,
        "tries": 6, "out": str(tmp_path / "seconds.json"),
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(job))
    applications.run("tests/support/save_stall.py", str(tmp_path / "job.json"), world_size=2, timeout_sec=800)
    found = json.loads((tmp_path / "seconds.json").read_text())
    print(json.dumps(found, indent=1))
    for engine, seconds in found.items():
        assert seconds["state_mb"] > 300
        # ZeRO gathers every tensor over the ranks before it can be copied.
        exempt = seconds["gather"] if engine.startswith("zero") else 0.0
        assert seconds["stall"] - exempt < MOST * seconds["synchronous"], (engine, seconds)
        # Nor may the writing behind the loop stop it for long, as one that holds Python's lock would.
        assert seconds["pause"] < MOST * seconds["synchronous"], (engine, seconds)
