"""All that watches over a run, put together: the folder's lock, signals, the watch over all ranks, and the health."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drwkv.parallel.distributed import World
from drwkv.training.health import Health, HealthConfig, Signals
from drwkv.training.run_lock import RunLock
from drwkv.training.watch import Watch


@contextmanager
def supervised(config: HealthConfig, folder: Path, world: World, *, timeout_sec: float) -> Iterator[Health]:
    """The health of a run, as long as it lasts; `timeout_sec` bounds collectives. Collective.

    Raises ValueError where another run holds the folder, and PeerFailure in the place of what a lost rank causes.
    """
    with (
        RunLock(folder, config.lock_sec, world) as lock,
        Signals() as signals,
        Watch(folder, config, world, timeout_sec=timeout_sec) as watch,
    ):
        yield Health(config, world, signals, watch, lock)
