"""The identity of a run: what may not change while it goes on, and what older checkpoints mean by what they lack."""

from __future__ import annotations

import pytest

from drwkv.compose import load
from drwkv.config import TrainConfig, identity
from drwkv.training.state import check_identity


def test_a_checkpoint_from_before_the_objective_had_keys_goes_on_with_the_defaults_alone() -> None:
    now = identity(TrainConfig(), {})
    old = {key: value for key, value in now.items() if not key.startswith("objective.")}
    assert len(old) == len(now) - 3
    check_identity(old, now, where="step_1")
    for override, was in {
        "weight=min_snr": "'none'",
        "vlb_weight=0.5": "1.0",
        "min_snr_gamma=3": "5.0",
    }.items():
        changed = identity(load(TrainConfig, [f"objective.{override}"]), {})
        key, _, value = override.partition("=")
        with pytest.raises(ValueError, match=rf"step_1: objective.{key} was {was} and is '?{value}"):
            check_identity(old, changed, where="step_1")
