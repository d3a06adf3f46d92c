"""The size of each step's global batch, and the stream of batches that goes by it.

Which sample is the n-th knows nothing of batch sizes (drwkv.data), so a run's sizes may change at any step. The
counters are state.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from drwkv.data.loader import Batch


@dataclass
class BatchStage:
    """One stage of the batch size."""

    from_step: int  # first optimizer step of the stage, at least 1
    batch_size: int  # samples of each global batch from there on


def batch_size_at(step: int, first: int, stages: Sequence[BatchStage]) -> int:
    """Samples of the global batch of `step` (0 is the first): `first` until the first of the stages, by rising step."""
    begun = [stage.batch_size for stage in stages if stage.from_step <= step]
    return begun[-1] if begun else first


class Batches:
    """This rank's micro-batches of the global batch [n, n + its size), wherever the run stands.

    What is read ahead is of one size. Where the size changes, or the run goes on from another n than that where the
    last batch ended (it went back), what was read ahead is dropped and reading begins anew at n.
    """

    def __init__(self, open_at: Callable[[int, int], Generator[list[Batch], None, None]]) -> None:
        """`open_at(batch_size, n)` gives the batches of that size from n on."""
        self._open_at = open_at
        self._stream: Generator[list[Batch], None, None] | None = None
        self._batch_size, self._n = 0, 0  # of the batch that the open stream gives next

    def next(self, n: int, batch_size: int) -> list[Batch]:
        """The micro-batches of [n, n + batch_size)."""
        if self._stream is None or (batch_size, n) != (self._batch_size, self._n):
            self.close()
            self._stream = self._open_at(batch_size, n)
        self._batch_size, self._n = batch_size, n + batch_size
        return next(self._stream)

    def close(self) -> None:
        """End what reads ahead."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
