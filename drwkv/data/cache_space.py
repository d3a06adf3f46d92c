"""Room in a node's cache: what counts against the budget, and which shards leave for which others.

The rule is Belady's, for the order is known: what is needed last leaves first, and only for what is needed sooner.
A shard on its way in holds its bytes from the start, and one on its way out until its last reader has closed it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from drwkv.data.cache_folder import CacheFolder, Demand, HeldShard
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
    """The budget of a cache folder, on the account of one process."""

    folder: CacheFolder
    owner: str  # id of the process's life sign
    budget_bytes: int

    def reserve(self, demand: Demand, num_bytes: int, distance: int) -> Path | None:
        """A file to fetch into, for which there is room; shards that are needed later than `distance` are evicted.

        None: not now, as some still read what was evicted, or all else is needed sooner; ask again.
        Raises StorageError when nothing of ours could make room on the disk for what is needed at once.
        """
        with self.folder.locked(SPACE_LOCK):
            self.folder.clear_leaving()
            leaving, room = self.folder.bytes_leaving(), self._room()
            if num_bytes > room + leaving:
                shards, distances = self._by_distance(demand)
                sizes = np.array([shard.num_bytes for shard in shards], np.int64)
                chosen = farthest(distances, sizes, distance, num_bytes - room - leaving)
                if chosen is None:
                    if distance <= 0 and not leaving:
                        self._check_disk(num_bytes)
                    return None
                for i in chosen.tolist():
                    self.folder.evict(shards[i])
                self.folder.clear_leaving()
                room = self._room()
            return self.folder.new_incoming(self.owner, num_bytes) if num_bytes <= room else None

    def _room(self) -> int:
        """Bytes that may be taken now, by the budget and on the disk."""
        of_disk = self.folder.free_bytes() - DISK_MARGIN_BYTES
        return min(self.budget_bytes - self.folder.used_bytes(), of_disk)

    def _check_disk(self, num_bytes: int) -> None:
        """StorageError when it is the disk that is full, and not of files that are still on their way."""
        free = self.folder.free_bytes() - DISK_MARGIN_BYTES
        if free < num_bytes and not self.folder.bytes_incoming():
            raise StorageError(
                f"{self.folder.path}: no space left on its disk for {num_bytes / GIB:.3g} GiB that are needed now, "
                f"and nothing here can be evicted for them; free some, or give another folder by data.cache"
            )

    def _by_distance(self, demand: Demand) -> tuple[list[HeldShard], np.ndarray]:
        """All whole shards, those of the set that was opened longest ago first, and how far they are needed."""
        shards, distances = [], []
        for held in sorted(self.folder.held(), key=lambda held: held.opened):
            of_set = demand.get(held.key)
            for shard in held.shards:
                if of_set is None:
                    distances.append(NEVER)
                else:  # what a living process has open leaves after what none has
                    known = shard.number < len(of_set)
                    distances.append(min(int(of_set[shard.number]), NEVER - 1) if known else NEVER - 1)
                shards.append(shard)
            if of_set is None and not held.shards:
                self.folder.remove_set(held.key)
        return shards, np.array(distances, np.int64)
