"""A run in which the loss of one rank is not a number at chosen steps."""

from __future__ import annotations


def poisoned(bad_steps: str) -> str:
    """A program that trains with the loss of one rank made NaN at some steps, given as a Python set."""
    return f"""
import sys, torch, train_dist
from drwkv.training.objective import Objective
from drwkv import command
plain, calls = Objective.losses, [0]
def losses(self, model, inputs):
    calls[0] += 1
    found = plain(self, model, inputs)
    import os
    if calls[0] - 1 in {bad_steps} and os.environ.get("RANK", "1") == "1":
        found = found * torch.tensor([float("nan")] + [1.0] * (len(found) - 1))
    return found
Objective.losses = losses
command.run(train_dist.main)
"""
