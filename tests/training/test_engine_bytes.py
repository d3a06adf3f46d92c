"""What the engines hold of weights, gradients and moments, counted in their own processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import Applications

from drwkv.compose import load
from drwkv.config import TrainConfig
from drwkv.training.memory import predict

SHARDED = ("fsdp", "zero3")


def held(applications: Applications, out: Path, model: str, size: int, engine: str) -> int:
    """Bytes of the fullest of four ranks, with all gradients there."""
    program = "tests/support/engine_bytes.py"
    applications.run(program, model, str(size), str(out), engine, world_size=4, timeout_sec=600)
    return json.loads(out.read_text())[engine]


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_sharding_over_four_takes_at_most_a_third_and_is_as_forecast(
    applications: Applications, tmp_path: Path
) -> None:
    model, size = "DRWKV-M/2", 16
    whole = held(applications, tmp_path / "ddp", model, size, "ddp")
    for engine in ("ddp", *SHARDED):
        found = whole if engine == "ddp" else held(applications, tmp_path / engine, model, size, engine)
        if engine in SHARDED:
            assert found <= whole / 3, f"{engine}: {found / whole:.3f} of what ddp holds"
        config = load(
            TrainConfig,
            [
                f"model.name={model}",
                f"model.input_size=[{size},{size}]",
                "model.num_classes=10",
                f"parallel.engine={engine}",
            ],
        )
        memory = predict(config, 4)
        expected = memory.weights + memory.gradients + memory.moments
        assert found == pytest.approx(expected, rel=0.1), (
            f"{engine}: forecast {expected / 1e6:.0f} MB, held {found / 1e6:.0f}"
        )
