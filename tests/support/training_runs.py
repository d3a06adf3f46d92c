"""Several runs of train_dist.py one after another in the same processes, to pay for their start once.

    python training_runs.py JOB.json        the job: a list of argument lists, a run each

Where one run fails, the others are not tried.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import train_dist
from drwkv.compose import load
from drwkv.config import TrainConfig
from drwkv.parallel import World, session


def main() -> None:
    runs = json.loads(Path(sys.argv[1]).read_text())
    with session(timeout_sec=120.0) as world:

        @contextmanager
        def the_same(**_: Any) -> Iterator[World]:
            yield world

        train_dist.session = the_same  # type: ignore[assignment]
        for arguments in runs:
            train_dist.train(load(TrainConfig, arguments))
            gc.collect()


if __name__ == "__main__":
    main()
