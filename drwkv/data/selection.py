"""Which samples of a set a run takes: of some classes, a few of each, one side of a held-out split, balanced.

A selection is a table from the rows of a virtual set to those of the real one, made once from the labels. It
rises with the real row, so that a virtual shard is a stretch of a real one, and reading stays as local as
before. Here are the choice, the table and the order over it. The order law itself is order.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from drwkv.data.order import NEVER, Ints, Order, sort_keys, starts
from drwkv.rng import Purpose, key64

Labels = npt.NDArray[np.integer[Any]]
Rows = npt.NDArray[np.signedinteger[Any]]

_ROWS = 4  # first word of a key of Purpose.ORDER; order.py has those below


@dataclass
class SelectionConfig:
    """Which samples of each set an epoch has. Taken in the order of the fields; labels are not renumbered."""

    classes: list[int] | None = None  # labels to take; None: all
    held_out: float = 0.0  # share of each class that is held out, in [0, 1), rounded to whole samples
    part: Literal["train", "held_out", "all"] = "train"  # side of the split: the two never share a sample
    max_per_class: int | None = None  # most samples of a class; None: no limit
    balance: bool = False  # repeat samples until every class comes as often in an epoch as the largest
    # 0 <= seed < 2**32; key of the choice, apart from the run's, so that a split outlives a run
    seed: int = 0

    @property
    def takes_all(self) -> bool:
        """Whether every sample is taken once, so that no table is needed."""
        undivided = self.part == "all" or (self.part == "train" and self.held_out == 0)
        return undivided and self.classes is None and self.max_per_class is None and not self.balance

    def check(self) -> None:
        """ValueError in one line for values that cannot be, or contradict each other."""
        classes = self.classes
        if classes is not None and (not classes or min(classes) < 0 or len(set(classes)) < len(classes)):
            _refuse("classes", classes, "list labels of 0 or more, each once, or set null for all")
        if not 0.0 <= self.held_out < 1.0:
            _refuse("held_out", self.held_out, "give a share of each class in [0, 1)")
        if self.part == "held_out" and self.held_out == 0:
            _refuse(
                "part",
                self.part,
                "nothing is held out: give data.select.held_out, as the training run has it",
            )
        if self.max_per_class is not None and self.max_per_class < 1:
            _refuse("max_per_class", self.max_per_class, "give 1 or more, or null for no limit")
        if not 0 <= self.seed < 1 << 32:
            _refuse("seed", self.seed, "give 0 <= seed < 2**32")


@dataclass(frozen=True)
class Selection:
    """The virtual set of the samples that were taken, shard after shard, as the real one."""

    rows: Rows  # (N,) int32, or int64 where that is too small: virtual row -> real row, rising
    shard_sizes: Ints  # (S,) samples in each virtual shard, all >= 1
    shards: Ints  # (S,) the real shard of each, rising; the others hold nothing that was taken
    num_shards: int  # of the real set


def select(
    labels: Labels,
    shard_sizes: npt.NDArray[np.integer[Any]],
    config: SelectionConfig,
    *,
    where: str = "the set",
) -> Selection:
    """Choose rows by their labels: (num_samples,) >= 0, of shards of `shard_sizes` (num_shards,) rows each.

    In each class the rows are ordered by a key of (config.seed, row). The first round(held_out * count) are held
    out, the rest is for training; of a side the first max_per_class are taken. A sample's side thus depends on
    nothing but its class's rows and the seed.

    With `balance` each class comes Q times an epoch, Q the largest class's count: every sample Q // count times,
    and the first Q % count by key once more. These are the same in every epoch: the virtual set then stays one
    set, whose cut into streams is fixed, so that a node goes on reading the shards that it has.

    `where` names the set in errors. Raises ValueError in one line for a class without a sample in the set, or
    with none on one side of the split. Memory while it works: about 65 bytes a row; the result has 4 a row.
    """
    config.check()
    labels = np.ascontiguousarray(labels)
    num_samples = len(labels)
    classes, taken = _rows_of_classes(labels, config, where)
    keys = sort_keys(num_samples, key64(config.seed, Purpose.ORDER, _ROWS))
    by_class = taken[np.lexsort((keys[taken], labels[taken]))]
    class_of = np.searchsorted(classes, labels[by_class])
    counts = np.bincount(class_of, minlength=len(classes))

    first, last = _side(classes, counts, config, where)
    if config.max_per_class is not None:
        last = np.minimum(last, first + config.max_per_class)
    kept = last - first
    # Each row's place in its class's order of keys, counted from the first of the side.
    place = np.arange(len(by_class)) - (starts(counts) + first)[class_of]
    times = ((place >= 0) & (place < kept[class_of])).astype(np.int64)
    if config.balance:
        repeats, rest = np.divmod(kept.max(), kept)
        times *= repeats[class_of] + (place < rest[class_of])

    times_of_row = np.zeros(num_samples, np.int64)
    times_of_row[by_class] = times
    row_type = np.dtype(np.int32 if num_samples <= 1 << 31 else np.int64)
    rows = np.repeat(np.arange(num_samples, dtype=row_type), times_of_row)
    sizes = np.add.reduceat(times_of_row, starts(shard_sizes))
    shards = np.flatnonzero(sizes)
    return Selection(rows, sizes[shards], shards, len(shard_sizes))


class SelectedOrder(Order):
    """The order of a selection: by Order's law over its virtual rows, in rows and shards of the real set."""

    def __init__(self, selection: Selection, *, seed: int, streams: int = 64, window: int = 8192) -> None:
        super().__init__(selection.shard_sizes, seed=seed, streams=streams, window=window)
        self.selection, self.num_shards = selection, selection.num_shards

    def sample_ids(self, n: npt.NDArray[np.integer]) -> Ints:
        """As Order.sample_ids; a row that was repeated comes as often in an epoch."""
        return self.selection.rows[super().sample_ids(n)].astype(np.int64)

    def next_uses(self, n: int, streams: npt.NDArray[np.integer] | None = None) -> Ints:
        """As Order.next_uses, of the real shards; NEVER for those that hold nothing that was taken."""
        uses = np.full(self.num_shards, NEVER)
        uses[self.selection.shards] = super().next_uses(n, streams)
        return uses


def _rows_of_classes(labels: Labels, config: SelectionConfig, where: str) -> tuple[Labels, Ints]:
    """The classes to take, rising, and the rows that have them."""
    found = np.unique(labels)
    if config.classes is None:
        return found, np.arange(len(labels))
    classes = np.sort(np.array(config.classes))
    if absent := np.setdiff1d(classes, found).tolist():
        advice = f"{where} has no sample of class {absent[0]}: its labels are {found[0]} to {found[-1]}"
        _refuse("classes", config.classes, advice)
    return classes, np.flatnonzero(np.isin(labels, classes))


def _side(classes: Labels, counts: Ints, config: SelectionConfig, where: str) -> tuple[Ints, Ints]:
    """Where the chosen side of the split begins and ends in each class's order of keys."""
    num_held = np.floor(config.held_out * counts + 0.5).astype(np.int64)
    if config.part == "all":
        return np.zeros_like(counts), counts
    one_sided = np.flatnonzero((num_held == 0) | (num_held == counts))
    if config.held_out > 0 and one_sided.size:
        k = one_sided[0]
        advice = (
            f"it takes {num_held[k]} of the {counts[k]} samples of class {classes[k]} in {where}: "
            "give a share that leaves both sides some, or leave the class out by data.select.classes"
        )
        _refuse("held_out", config.held_out, advice)
    return (num_held, counts) if config.part == "train" else (np.zeros_like(counts), num_held)


def _refuse(key: str, value: object, advice: str) -> None:
    raise ValueError(f"config key 'data.select.{key}' is {value!r}: {advice}")
