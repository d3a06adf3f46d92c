"""The real digits, split once for all tests of evaluation."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from drwkv.evaluation.protocol import LabelledImages


@pytest.fixture(scope="session")
def digits() -> tuple[LabelledImages, LabelledImages]:
    """(training, held-out): every fifth image of each class is held out."""
    bundle = load_digits()
    images = ((bundle.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)[..., None]
    labels = bundle.target.astype(np.int64)
    held_out = np.zeros(len(labels), bool)
    for c in range(10):
        held_out[np.flatnonzero(labels == c)[::5]] = True
    return LabelledImages(images[~held_out], labels[~held_out]), LabelledImages(
        images[held_out], labels[held_out]
    )
