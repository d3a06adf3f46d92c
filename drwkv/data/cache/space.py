"""Room in a node's cache: what counts against the budget, and which shards leave for which others.

The rule is Belady's, for the order is known: what is needed last leaves first, and only for what is needed sooner.
A shard on its way in holds its bytes from the start, and one on its way out until its last reader has closed it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from drwkv.data.cache.folder import CacheFolder, Place
from drwkv.data.cache.life import Demand
from drwkv.data.order import NEVER
from drwkv.storage import StorageError

DISK_MARGIN_BYTES = 1 << 20  # left free on the disk for demands and errors
SPACE_LOCK = "space.lock"
GIB = float(1 << 30)


def farthest(
    distances: np.ndarray, num_bytes: np.ndarray, nearer_than: int, needed_bytes: int
) -> np.ndarray | None:
    """Which of the held shards to evict for one that is needed in `nearer_than` counters.

    distances, num_bytes (N,) int64; of equals the first goes first. Indices of the fewest with the greatest
    distances that free `needed_bytes`; None when those that are needed later than the new one are too few.
    """
    last_first = np.argsort(-distances, kind="stable")
    last_first = last_first[distances[last_first] > nearer_than]
    freed = np.cumsum(num_bytes[last_first])
    if needed_bytes > (freed[-1] if len(freed) else 0):
        return None
    return last_first[: int(np.searchsorted(freed, needed_bytes)) + 1]


@dataclass(frozen=True)
class Space:
    """The budget of a cache folder, on the account of one process.

    Runs that share a folder may allow it different budgets; the largest of the living is everybody's.
    """

    folder: CacheFolder
    owner: str  # id of the process's life sign
    budget_bytes: int  # as this process has it

    def budget(self) -> int:
        """The bytes that the folder may hold now."""
        return max(self.budget_bytes, self.folder.largest_budget())

    def reserve(self, demand: Demand, num_bytes: int, distance: int) -> Path | None:
        """A file to fetch into, for which there is room; shards that are needed later than `distance` are evicted.

        None: not now, as some still read what was evicted, or all else is needed sooner; ask again.
        Raises StorageError when nothing of ours could make room on the disk for what is needed at once.
        """
        with self.folder.locked(SPACE_LOCK):
            self.folder.clear_leaving()
            leaving, room = self.folder.bytes_leaving(), self._room()
            if num_bytes > room + leaving:
                places, sizes, distances = self._by_distance(demand)
                chosen = farthest(distances, sizes, distance, num_bytes - room - leaving)
                if chosen is None:
                    if distance <= 0 and not leaving:
                        self._check_disk(num_bytes)
                    return None
                for i in chosen.tolist():
                    self.folder.evict(places[i])
                self.folder.clear_leaving()
                room = self._room()
            return self.folder.new_incoming(self.owner, num_bytes) if num_bytes <= room else None

    def _room(self) -> int:
        """Bytes that may be taken now, by the budget and on the disk."""
        of_disk = self.folder.free_bytes() - DISK_MARGIN_BYTES
        return min(self.budget() - self.folder.used_bytes(), of_disk)

    def _check_disk(self, num_bytes: int) -> None:
        """StorageError when it is the disk that is full, and not of files that are still on their way."""
        free = self.folder.free_bytes() - DISK_MARGIN_BYTES
        if free < num_bytes and not self.folder.bytes_incoming():
            raise StorageError(
                f"{self.folder.path}: no space left on its disk for {num_bytes / GIB:.3g} GiB that are needed now, "
                f"and nothing here can be evicted for them; free some, or give another folder by data.cache"
            )

    def _by_distance(self, demand: Demand) -> tuple[list[Place], np.ndarray, np.ndarray]:
        """All whole shards, those of the set opened longest ago first; (N,) their bytes and (N,) their distances."""
        places, sizes, distances = list[Place](), [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for held in sorted(self.folder.held(), key=lambda held: held.opened):
            of_shards = np.full(len(held.numbers), NEVER)
            if (of_set := demand.get(held.key)) is not None:
                # What a living process has open leaves after what none has.
                known = held.numbers < len(of_set)
                of_shards[known] = of_set[held.numbers[known]]
                of_shards = np.minimum(of_shards, NEVER - 1)
            elif not len(held.numbers):
                self.folder.remove_set(held.key)
            places += zip(itertools.repeat(held.key), held.numbers.tolist())
            sizes.append(held.shard_bytes)
            distances.append(of_shards)
        return places, np.concatenate(sizes), np.concatenate(distances)
