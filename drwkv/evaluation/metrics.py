"""Metrics of a sample set: Frechet distance, precision and recall, class agreement, near copies.

Here: the definitions, float64 numpy, deterministic, memory bounded by blocks. Not here: features
(features.py), which metric is reported against what (protocol.py), the page (report.py).

Shapes: N, M rows of features; D features; images uint8 (N, H, W, C).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from drwkv.evaluation.features import check_features, check_images, check_labels

BLOCK_ELEMENTS = 2**23  # distances held at once: 64 MiB of float64


class Classifier(Protocol):
    """What `class_agreement` needs of a classifier."""

    def predict(self, images: np.ndarray) -> np.ndarray: ...


def gaussian_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), as FID takes them."""
    features = check_features(features, "the")
    return features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians: FID's formula, arXiv 1706.08500 eq. 6.

    |mu1 - mu2|^2 + Tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)). The trace of the root is the sum of the
    roots of the eigenvalues of sigma1^(1/2) sigma2 sigma1^(1/2), which is symmetric: safe for singular
    covariances.
    """
    mu1, mu2, sigma1, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, mu2, sigma1, sigma2))
    dim = mu1.size
    if mu1.shape != (dim,) or mu2.shape != (dim,) or sigma1.shape != (dim, dim) or sigma2.shape != (dim, dim):
        shapes = ", ".join(str(a.shape) for a in (mu1, sigma1, mu2, sigma2))
        raise ValueError(f"Frechet distance of shapes {shapes}: give (D,), (D, D), (D,), (D, D) with one D")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("Frechet distance of statistics with NaN or infinity: check the features")
    values, vectors = np.linalg.eigh(sigma1)
    root1 = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root1 @ sigma2 @ root1).clip(min=0)
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(cross).sum()
    return max(float(distance), 0.0)


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall of features (N, D), (M, D): Kynkaanniemi et al., 1904.06991 eq. 1, 2.

    Precision: the share of fake rows within the ball of some real row, whose radius is the distance to its
    k-th nearest other real row. Recall: the same with the roles exchanged. Distances are Euclidean.
    """
    real, fake = check_features(real, "the real"), check_features(fake, "the fake")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real features have {real.shape[1]} columns, fake {fake.shape[1]}: make them equal")
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(
            f"k={k} neighbours with {len(real)} real and {len(fake)} fake rows: need 1 <= k < both"
        )
    centre = real.mean(axis=0)  # distances stay, their rounding gets smaller
    real, fake = real - centre, fake - centre
    precision = _share_inside(fake, real, _kth_neighbour(real, k))
    recall = _share_inside(real, fake, _kth_neighbour(fake, k))
    return precision, recall


def class_agreement(
    classifier: Classifier, images: np.ndarray, labels: np.ndarray
) -> tuple[float, dict[int, float]]:
    """The share of images that the classifier gives the label asked for: overall, and for each class."""
    labels = check_labels(labels, check_images(images, "the judged"), "the judged")
    right = classifier.predict(images) == labels
    return float(right.mean()), {int(c): float(right[labels == c].mean()) for c in np.unique(labels)}


@dataclass(frozen=True)
class NearCopies:
    """How close samples come to single training images, measured by how close real unseen images come."""

    threshold: float  # RMS pixel distance in [0, 1] at or under which a sample is a near copy
    rate: float  # share of samples at or under it
    held_out_rate: float  # the same share of the held-out images: the percentile, by construction
    identical: int  # samples all of whose pixels lie within the tolerance of one training image
    median_distance: float  # median RMS distance of the samples to their nearest training image
    held_out_median_distance: float  # the same of the held-out images
    distances: np.ndarray  # (N,) RMS distance of each sample to its nearest training image
    nearest: np.ndarray  # (N,) int64 position of that image in the training set

    @property
    def ratio(self) -> float:
        """Rate over the held-out images' rate: 1 is as real unseen images, above is memorising."""
        return self.rate / self.held_out_rate


def near_copies(
    fake: np.ndarray, train: np.ndarray, held_out: np.ndarray, *, percentile: float = 1.0, tolerance: int = 0
) -> NearCopies:
    """Near copies of training images among the samples; all images uint8 (N, H, W, C) of one size.

    The threshold is the `percentile`-th percentile of the held-out images' distances to their nearest
    training image, so real unseen data scores percentile / 100. `tolerance` (0..255 levels) is how far each
    pixel of an "identical" image may be off: half a gray step for data with few gray values. Distances are
    exact.
    """
    check_images(train, "the training")
    check_images(fake, "the sample", like=train)
    check_images(held_out, "the held-out", like=train)
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile={percentile}: give more than 0 and at most 100")
    own, nearest = _nearest(fake, train)
    floor, _ = _nearest(held_out, train)
    threshold = float(np.percentile(floor, percentile))
    off = np.abs(fake.astype(np.int16) - train[nearest].astype(np.int16)).max(axis=(1, 2, 3))
    return NearCopies(
        threshold=threshold,
        rate=float((own <= threshold).mean()),
        held_out_rate=float((floor <= threshold).mean()),
        identical=int((off <= tolerance).sum()),
        median_distance=float(np.median(own)),
        held_out_median_distance=float(np.median(floor)),
        distances=own,
        nearest=nearest,
    )


# Distances in blocks of rows.


def _blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS // max(1, num_columns))
    return (slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows))


def _by_blocks(
    a_ND: np.ndarray, b_MD: np.ndarray, reduce: Callable[[np.ndarray, slice], np.ndarray]
) -> np.ndarray:
    """`reduce` of the squared distances (rows, M) of each block of rows of a to all of b; joined (N, ...)."""
    b_squared = np.einsum("md,md->m", b_MD, b_MD)
    results = []
    for rows in _blocks(len(a_ND), len(b_MD)):
        a = a_ND[rows]
        squared = np.einsum("nd,nd->n", a, a)[:, None] + b_squared - 2 * (a @ b_MD.T)
        results.append(reduce(squared.clip(min=0), rows))
    return np.concatenate(results)


def _kth_neighbour(features: np.ndarray, k: int) -> np.ndarray:
    """Squared distance (N,) of each row to its k-th nearest other row."""

    def kth(squared: np.ndarray, rows: slice) -> np.ndarray:
        squared[np.arange(len(squared)), np.arange(rows.start, rows.stop)] = np.inf  # not itself
        return np.partition(squared, k - 1, axis=1)[:, k - 1]

    return _by_blocks(features, features, kth)


def _share_inside(points: np.ndarray, centres: np.ndarray, squared_radii: np.ndarray) -> float:
    return float(
        _by_blocks(points, centres, lambda squared, _: np.any(squared <= squared_radii, axis=1)).mean()
    )


def _nearest(images: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """RMS pixel distance in [0, 1] (N,) and position (N,) of each image's nearest training image.

    Squares of uint8 values are whole numbers, so float64 holds every sum exactly.
    """
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (images, train))

    def nearest(squared: np.ndarray, rows: slice) -> np.ndarray:
        return np.stack([squared.min(axis=1), squared.argmin(axis=1)], axis=1)

    found = _by_blocks(a, b, nearest)
    return np.sqrt(found[:, 0] / a.shape[1]) / 255, found[:, 1].astype(np.int64)
