"""What is measured, on which features, against what: the protocol of small labelled images (the digits).

Here: `evaluate`, which turns three sets of images into the numbers of a report, each beside its floor: the
same number for real data in the samples' place. Not here: the metrics themselves (metrics.py), the page
(report.py).

Frechet distance, precision and recall are taken on raw pixels. The SVM's decision values were tried and
left: in their few, saturated dimensions uniform noise reaches a precision of 0.6 and training digits under
noise of standard deviation 60/255 one of 0.86, where pixels give 0.0 and 0.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from drwkv.evaluation.features import SvmClassifier, check_images, check_labels, pixel_features
from drwkv.evaluation.metrics import (
    NearCopies,
    class_agreement,
    frechet_distance,
    gaussian_statistics,
    near_copies,
    precision_recall,
)


@dataclass
class EvaluateConfig:
    """Shard sets of pixels that a sample set is measured against; both or none."""

    # The training split: fits the classifier, shows copies; None: nothing is measured
    train: str | None = None
    held_out: str | None = None  # the held-out split: the reference of every distance


@dataclass(frozen=True)
class LabelledImages:
    """A set of images, uint8 (N, H, W, C) with C = 1 or 3, and their labels, int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Metric:
    """One number of the table, and what real data scores in the samples' place."""

    value: float
    floor: float
    better: Literal["higher", "lower", "as the floor"]
    meaning: str  # one line for the reader of the page


# The rows of the table, in order: name, which way is better, and what it is.
METRICS: tuple[tuple[str, Literal["higher", "lower", "as the floor"], str], ...] = (
    ("class_agreement", "higher", "share that an SVM fitted on the training split calls as asked"),
    ("frechet_distance", "lower", "of Gaussians fitted to the pixels in [0, 1], to the held-out split"),
    ("precision", "higher", "share of samples among the held-out images"),
    ("recall", "higher", "share of held-out images among the samples"),
    ("near_copy_rate", "as the floor", "share nearer to a training image than the threshold"),
    ("near_copy_ratio", "as the floor", "that share over the held-out images' share"),
    (
        "identical_images",
        "lower",
        "samples whose every pixel is within the tolerance of one training image's",
    ),
    ("distance_to_training", "as the floor", "median RMS pixel distance to the nearest training image"),
)


@dataclass(frozen=True)
class ClassScore:
    """One class: how many samples, and their agreement beside the held-out images' (None: it has none)."""

    count: int
    agreement: float
    floor: float | None


@dataclass(frozen=True)
class Evaluation:
    """The numbers of a sample set, with the sets they were taken from."""

    metrics: dict[str, Metric]
    per_class: dict[int, ClassScore]
    copies: NearCopies
    protocol: dict[str, Any]  # what was done, JSON-able
    samples: LabelledImages
    train: LabelledImages
    held_out: LabelledImages


def evaluate(
    samples: LabelledImages,
    train: LabelledImages,
    held_out: LabelledImages,
    *,
    neighbours: int = 3,
    percentile: float = 1.0,
    tolerance: int = 8,
) -> Evaluation:
    """All numbers of `samples` (labels: the classes asked for), against the held-out split as the reference.

    `neighbours` is k of precision and recall, `percentile` and `tolerance` are those of `near_copies`; 8 is
    half a gray step of the digits. Pure and deterministic. Raises ValueError for sets that are too small,
    not uint8, of different image sizes, or with labels that the training split lacks.
    """
    for name, part in [("training", train), ("held-out", held_out), ("sample", samples)]:
        check_images(
            part.images, f"the {name}", like=train.images if isinstance(train.images, np.ndarray) else None
        )
        check_labels(part.labels, part.images, f"the {name}")
    unknown = np.setdiff1d(samples.labels, train.labels)
    if len(unknown):
        raise ValueError(
            f"sample label {unknown[0]} does not occur in training, whose labels go to {train.labels.max()}"
        )

    # Judge the labels.
    classifier = SvmClassifier().fit(train.images, train.labels)
    agreement, by_class = class_agreement(classifier, samples.images, samples.labels)
    agreement_floor, by_class_floor = class_agreement(classifier, held_out.images, held_out.labels)

    # Compare the distributions; the floor is training images, as many of each class as the samples have.
    stand_in = train.images[same_classes(train.labels, samples.labels)]
    reference = pixel_features(held_out.images)
    distances = _distribution(reference, pixel_features(samples.images), neighbours)
    distances_floor = _distribution(reference, pixel_features(stand_in), neighbours)

    # Look for memorised training images; the floor is held-out images.
    copies = near_copies(
        samples.images, train.images, held_out.images, percentile=percentile, tolerance=tolerance
    )
    equals_floor = near_copies(held_out.images, train.images, held_out.images, tolerance=tolerance).identical

    found = (agreement, *distances, copies.rate, copies.ratio, copies.identical, copies.median_distance)
    floors = (
        *(agreement_floor, *distances_floor, copies.held_out_rate, 1.0),
        *(equals_floor, copies.held_out_median_distance),
    )
    metrics = {
        name: Metric(value, floor, better, meaning)
        for (name, better, meaning), value, floor in zip(METRICS, found, floors, strict=True)
    }
    per_class = {
        label: ClassScore(int((samples.labels == label).sum()), value, by_class_floor.get(label))
        for label, value in by_class.items()
    }
    protocol = {
        "features": "pixels in [0, 1]",
        "classifier": "SVM, RBF kernel, gamma 0.256 on pixels in [0, 1], C = 1, fitted on the training split",
        "reference": "the held-out split",
        "floor": "held-out images for class agreement and copies; for the rest training images, the first of "
        "each class, as many as the samples have, against the held-out split",
        "neighbours": neighbours,
        "near_copy_percentile": percentile,
        "near_copy_threshold": copies.threshold,
        "identical_tolerance": tolerance,
        "num_samples": len(samples.images),
        "num_train": len(train.images),
        "num_held_out": len(held_out.images),
        "num_floor": len(stand_in),
        "image_size": list(samples.images.shape[1:]),
    }
    return Evaluation(metrics, per_class, copies, protocol, samples, train, held_out)


def same_classes(labels: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Positions in `labels`, ascending: the first of each class, as many as `wanted` has or all there are."""
    chosen = [np.flatnonzero(labels == c)[: int((wanted == c).sum())] for c in np.unique(wanted)]
    return np.sort(np.concatenate(chosen))


def _distribution(reference: np.ndarray, features: np.ndarray, neighbours: int) -> tuple[float, float, float]:
    distance = frechet_distance(*gaussian_statistics(features), *gaussian_statistics(reference))
    return distance, *precision_recall(reference, features, neighbours)
