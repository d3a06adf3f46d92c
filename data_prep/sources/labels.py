"""Labels where a source gives numbers alone: checked, and the classes named by their numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST_CLASSES = 1_000_000  # larger labels are numbers of something else


def numbered(
    labels: Sequence[int | None], names: Sequence[str], *, where: str
) -> tuple[np.ndarray, list[str]]:
    """(labels (M,) int64, class names "0", "1" ...); zeros and no names where no sample has a label.

    Raises ValueError naming the sample: some have labels and it has none, or it is below 0.
    """
    if all(label is None for label in labels):
        return np.zeros(len(labels), np.int64), []
    for name, label in zip(names, labels, strict=True):
        if label is None:
            raise ValueError(f"{where}: sample {name} has no label, others have")
        if label < 0:
            raise ValueError(f"{where}: sample {name} has label {label}, expected 0 or more")
    array = np.array(labels, np.int64)
    if array.max() >= MOST_CLASSES:
        name = names[int(array.argmax())]
        raise ValueError(
            f"{where}: sample {name} has label {array.max()}: an id? expected less than {MOST_CLASSES}"
        )
    return array, [str(i) for i in range(int(array.max()) + 1)]
