"""Features of images, and the classifier that judges labels: numpy arrays in, numpy arrays out.

Here: what an image is to the metrics. Not here: the metrics (metrics.py), which features a data set's
protocol takes (protocol.py). Images are uint8 (N, H, W, C) with C = 1 or 3, labels int64 (N,), features
float64 (N, D); another extractor is one more function or class of that shape.
"""

from __future__ import annotations

import numpy as np


def check_images(images: np.ndarray, name: str, like: np.ndarray | None = None) -> np.ndarray:
    """`images` if 2 or more, uint8 (N, H, W, C) and of the size of `like`; else ValueError by `name`."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        kind = images.dtype if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"{name} images are {kind}: give a uint8 array of shape (N, H, W, C)")
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"{name} images have shape {images.shape}: give (N, H, W, C) with 1 or 3 channels")
    if len(images) < 2:
        raise ValueError(f"{name} has {len(images)} images: metrics need at least 2")
    if like is not None and images.shape[1:] != like.shape[1:]:
        sizes = f"{images.shape[1:]}, the reference's {like.shape[1:]}"
        raise ValueError(f"{name} images are of size (H, W, C) = {sizes}: make them equal")
    return images


def check_labels(labels: np.ndarray, images: np.ndarray, name: str) -> np.ndarray:
    """`labels` if they are whole numbers >= 0, one an image; else ValueError by `name`."""
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{name} labels are {labels.dtype} {labels.shape}: give integers of shape ({len(images)},)"
        )
    if len(labels) and labels.min() < 0:
        raise ValueError(f"{name} labels hold {labels.min()}: classes count from 0")
    return labels.astype(np.int64)


def check_features(features: np.ndarray, name: str) -> np.ndarray:
    """`features` as float64 if they are at least 2 finite rows (N, D); else ValueError by `name`."""
    features = np.asarray(features)
    if features.ndim != 2 or features.shape[1] == 0 or not np.issubdtype(features.dtype, np.number):
        raise ValueError(f"{name} features are {features.dtype} {features.shape}: give numbers (N, D)")
    if len(features) < 2:
        raise ValueError(f"{name} features have {len(features)} rows: metrics need at least 2")
    features = features.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise ValueError(f"{name} features hold NaN or infinity in {len(bad)} rows, first row {bad[0]}")
    return features


def pixel_features(images: np.ndarray) -> np.ndarray:
    """Pixels as features: (N, H, W, C) uint8 -> (N, H W C) float64 in [0, 1]."""
    check_images(images, "the")
    return images.reshape(len(images), -1).astype(np.float64) / 255


class SvmClassifier:
    """A support vector machine with an RBF kernel on pixels in [0, 1], fitted on a training split.

    gamma is 0.001 on scikit-learn's digits, whose gray values are 0..16: 0.256 on [0, 1]. Fitted on 4/5 of
    them, 0.99 of the rest is right. Nothing in it is random. For images of a few hundred pixels, such as
    digits.

    Example: `SvmClassifier().fit(train_images, train_labels).predict(samples)`
    """

    def __init__(self, gamma: float = 0.001 * 16**2, penalty: float = 1.0) -> None:
        # scikit-learn takes a second to import, and only who classifies needs it.
        from sklearn.svm import SVC

        self._svm = SVC(gamma=gamma, C=penalty)
        self._like: np.ndarray | None = None

    def fit(self, images: np.ndarray, labels: np.ndarray) -> SvmClassifier:
        """Fit on images (N, H, W, C) uint8 and labels (N,); returns itself."""
        labels = check_labels(labels, check_images(images, "the training"), "the training")
        if len(np.unique(labels)) < 2:
            raise ValueError(
                f"the training labels hold the one class {labels[0]}: a classifier needs at least 2"
            )
        self._svm.fit(pixel_features(images), labels)
        self._like = images[:1]
        return self

    def predict(self, images: np.ndarray) -> np.ndarray:
        """The label of each image, (N,) int64."""
        if self._like is None:
            raise ValueError("the SVM is not fitted: call fit(images, labels) first")
        features = pixel_features(check_images(images, "the", like=self._like))
        return np.asarray(self._svm.predict(features), dtype=np.int64)
