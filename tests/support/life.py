"""One segment of a run's life: `train_dist.py` with a mishap at a given step, on a given rank.

    python life.py '{"kind": "nan", "rank": 1, "steps": [3, 4]}' ARGUMENTS...      as one of the ranks

Kinds: nan (the loss of one rank is not finite at these steps), sleep (one rank stands still in the first of them),
data (one rank's data fails there), disk (what one rank saves from there on meets a full disk), none.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

import train_dist
from drwkv import command
from drwkv.data.loader import Data
from drwkv.training.checkpoint import step_of
from drwkv.training.checkpoint_files import ShardWriter
from drwkv.training.objective import Objective

FOR_EVER_SEC = 600


def strike(kind: str, rank: int, steps: list[int], batch_size: int) -> None:
    """Put the mishap in the place of what works."""
    plain_inputs, plain_losses, plain_write = Objective.inputs, Objective.losses, ShardWriter.write_data
    plain_batches = Data.batches
    mine = int(os.environ.get("RANK", "0")) == rank
    at = [-1]  # the step whose batch was looked at last

    def inputs(self: Objective, batch: Any) -> Any:
        at[0] = int(batch.n[0]) // batch_size
        if kind == "sleep" and mine and at[0] in steps:
            time.sleep(FOR_EVER_SEC)
        return plain_inputs(self, batch)

    def losses(self: Objective, model: Any, given: Any) -> torch.Tensor:
        found = plain_losses(self, model, given)
        return found * float("nan") if kind == "nan" and mine and at[0] in steps else found

    def batches(self: Data, batch_size: int, start: int, **options: Any) -> Iterator[Any]:
        for i, batch in enumerate(plain_batches(self, batch_size, start, **options)):
            if kind == "data" and mine and start // batch_size + i in steps:
                raise OSError("shard 7 is gone")
            yield batch

    def write_data(self: ShardWriter, plan: Any, planner: Any) -> Any:
        if kind == "disk" and mine and step_of(self._name) >= steps[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._name)
        return plain_write(self, plan, planner)

    Objective.inputs, Objective.losses = inputs, losses  # type: ignore[method-assign]
    Data.batches, ShardWriter.write_data = batches, write_data  # type: ignore[method-assign, assignment]


def main() -> None:
    mishap = json.loads(sys.argv.pop(1))
    strike(mishap["kind"], mishap.get("rank", 0), mishap.get("steps", []), mishap["batch_size"])
    command.run(train_dist.main)


if __name__ == "__main__":
    main()
