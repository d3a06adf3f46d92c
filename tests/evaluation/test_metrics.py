"""Each metric against its definition written plainly here, closed forms, and real digits."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from drwkv.evaluation import metrics
from drwkv.evaluation.metrics import (
    class_agreement,
    frechet_distance,
    gaussian_statistics,
    near_copies,
    precision_recall,
)


def random_features(seed: int, rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, columns))


def random_images(seed: int, count: int, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 5, 4, channels)).astype(np.uint8)


# Frechet distance.


def test_gaussian_statistics_are_the_mean_and_the_unbiased_covariance():
    features = random_features(0, 50, 4)
    mu, sigma = gaussian_statistics(features)
    centred = features - features.sum(0) / 50
    np.testing.assert_allclose(mu, features.sum(0) / 50, rtol=1e-12)
    np.testing.assert_allclose(sigma, centred.T @ centred / 49, rtol=1e-10, atol=1e-12)


def test_frechet_distance_of_one_dimension_is_the_closed_form():
    distance = frechet_distance(np.array([1.0]), np.array([[4.0]]), np.array([-2.0]), np.array([[9.0]]))
    assert distance == pytest.approx((1 + 2) ** 2 + (2 - 3) ** 2, rel=1e-12)


def test_frechet_distance_of_commuting_covariances_is_the_closed_form():
    rotation = scipy.linalg.qr(random_features(1, 6, 6))[0]
    a, b = np.arange(1.0, 7.0), np.arange(6.0, 0.0, -1.0)
    mu = random_features(2, 2, 6)
    distance = frechet_distance(mu[0], (rotation * a) @ rotation.T, mu[1], (rotation * b) @ rotation.T)
    assert distance == pytest.approx(((mu[0] - mu[1]) ** 2).sum() + ((a**0.5 - b**0.5) ** 2).sum(), rel=1e-10)


def test_frechet_distance_agrees_with_the_matrix_square_root_of_scipy():
    mu1, sigma1 = gaussian_statistics(random_features(3, 40, 8) * np.arange(1, 9))
    mu2, sigma2 = gaussian_statistics(random_features(4, 60, 8) + 0.3)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_zero_of_itself_even_with_fewer_rows_than_columns():
    statistics = gaussian_statistics(random_features(5, 5, 30))
    assert frechet_distance(*statistics, *statistics) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_is_symmetric_with_a_singular_covariance():
    one = gaussian_statistics(random_features(6, 4, 10))
    two = gaussian_statistics(random_features(7, 300, 10) * 2)
    assert frechet_distance(*one, *two) == pytest.approx(frechet_distance(*two, *one), rel=1e-6)


# Precision and recall.


def plain_precision_recall(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    def distance(a, b):
        return float(np.sqrt(((a - b) ** 2).sum()))

    def covered(points, centres):
        radii = [
            sorted(distance(c, other) for j, other in enumerate(centres) if j != i)[k - 1]
            for i, c in enumerate(centres)
        ]
        inside = [any(distance(p, c) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        return sum(inside) / len(inside)

    return covered(fake, real), covered(real, fake)


def test_precision_and_recall_of_a_tiny_set_are_the_exact_counts():
    real = np.array([[0.0], [1.0], [2.0], [10.0]])  # radii at k = 1: 1, 1, 1, 8
    fake = np.array([[0.5], [18.0], [18.5], [30.0]])  # radii at k = 1: 17.5, 0.5, 0.5, 11.5
    precision, recall = precision_recall(real, fake, k=1)
    # 0.5 lies in a ball of real; 18 is on the edge of 10's; 18.5 and 30 lie outside
    assert precision == 2 / 4
    assert recall == 4 / 4  # 0.5's ball of 17.5 holds all
    assert precision_recall(real, fake[1:], k=1) == (1 / 3, 0.0)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_agree_with_the_definition(k):
    real, fake = random_features(8, 40, 3), random_features(9, 30, 3) * 1.5 + 0.4
    assert precision_recall(real, fake, k) == plain_precision_recall(real, fake, k)


def test_precision_and_recall_do_not_depend_on_the_blocks(monkeypatch):
    real, fake = random_features(10, 101, 5), random_features(11, 77, 5)
    whole = precision_recall(real, fake)
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 350)
    assert precision_recall(real, fake) == whole
    assert 0 < whole[0] < 1


def test_blocks_bound_the_number_of_distances_held_at_once(monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 350)
    sizes = [(rows.stop - rows.start) * 77 for rows in metrics._blocks(101, 77)]
    assert max(sizes) <= 350 and sum(sizes) == 101 * 77


def test_copies_of_the_real_set_have_precision_and_recall_one():
    real = random_features(12, 30, 4)
    assert precision_recall(real, real[::-1]) == (1.0, 1.0)


def test_a_collapsed_set_has_precision_without_recall():
    real = random_features(13, 200, 4)
    fake = real[:1] + 1e-3 * random_features(14, 50, 4)
    precision, recall = precision_recall(real, fake)
    assert precision == 1.0 and recall <= 1 / 200


# Class agreement.


class Threshold:
    def predict(self, images):
        return (images.mean(axis=(1, 2, 3)) > 127).astype(np.int64)


def test_class_agreement_counts_overall_and_per_class():
    images = np.zeros((6, 2, 2, 1), np.uint8)
    images[3:] = 255
    overall, by_class = class_agreement(Threshold(), images, np.array([0, 0, 1, 1, 1, 0]))
    assert overall == 4 / 6
    assert by_class == {0: 2 / 3, 1: 2 / 3}


# Near copies.


def test_near_copies_agree_with_the_definition():
    train, held_out, fake = random_images(0, 30, 3), random_images(1, 40, 3), random_images(2, 20, 3)
    fake[4] = train[7]
    fake[9] = np.clip(train[2].astype(int) + 3, 0, 255)

    def nearest(image):
        distances = [np.sqrt(((image / 255 - t / 255) ** 2).mean()) for t in train]
        return min(distances), int(np.argmin(distances))

    result = near_copies(fake, train, held_out, percentile=10)
    floor = [nearest(image)[0] for image in held_out]
    own = [nearest(image) for image in fake]
    assert result.threshold == pytest.approx(np.percentile(floor, 10), rel=1e-9)
    assert result.rate == np.mean([d <= np.percentile(floor, 10) for d, _ in own])
    assert result.held_out_rate == 4 / 40
    assert result.ratio == pytest.approx(result.rate / (4 / 40))
    np.testing.assert_allclose(result.distances, [d for d, _ in own], rtol=1e-9)
    assert result.nearest.tolist() == [i for _, i in own]
    assert result.distances[4] == 0
    assert result.identical == 1
    assert near_copies(fake, train, held_out, tolerance=3).identical == 2


def test_the_training_set_is_all_near_copies(digits):
    train, held_out = digits
    result = near_copies(train.images, train.images, held_out.images)
    assert (result.rate, result.identical, result.median_distance) == (1.0, len(train.images), 0.0)
    assert result.ratio > 50


def test_held_out_digits_are_near_copies_at_the_rate_of_the_percentile(digits):
    train, held_out = digits
    result = near_copies(held_out.images, train.images, held_out.images)
    assert 0.005 < result.rate < 0.015
    assert (result.ratio, result.identical) == (1.0, 0)


def test_noise_is_no_near_copy(digits):
    train, held_out = digits
    noise = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 1)).astype(np.uint8)
    assert near_copies(noise, train.images, held_out.images).rate == 0


# Bad input.

FEATURES, IMAGES = random_features(15, 10, 3), random_images(3, 10)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: gaussian_statistics(FEATURES[:1]), "1 rows: metrics need at least 2"),
        (lambda: gaussian_statistics(np.where(FEATURES > 1, np.nan, FEATURES)), "NaN or infinity in"),
        (lambda: gaussian_statistics(FEATURES[:, 0]), r"float64 \(10,\)"),
        (lambda: precision_recall(FEATURES, FEATURES[:, :2]), "3 columns, fake 2"),
        (lambda: precision_recall(FEATURES, FEATURES[:3]), "k=3 neighbours with 10 real and 3 fake"),
        (lambda: precision_recall(FEATURES, FEATURES, k=0), "k=0"),
        (lambda: frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3)), r"shapes \(2,\)"),
        (lambda: frechet_distance(np.full(2, np.nan), np.eye(2), np.zeros(2), np.eye(2)), "NaN or infinity"),
        (lambda: near_copies(IMAGES[:1], IMAGES, IMAGES), "the sample has 1 images"),
        (
            lambda: near_copies(IMAGES, IMAGES, IMAGES[:, :4]),
            r"the held-out images.*\(4, 4, 1\).*\(5, 4, 1\)",
        ),
        (lambda: near_copies(IMAGES.astype(np.float32), IMAGES, IMAGES), "the sample images are float32"),
        (lambda: near_copies(IMAGES[..., 0], IMAGES, IMAGES), r"shape \(10, 5, 4\)"),
        (lambda: near_copies(IMAGES, IMAGES, IMAGES, percentile=0), "percentile=0"),
        (lambda: class_agreement(Threshold(), IMAGES, np.zeros(9, int)), r"int64 \(9,\).*shape \(10,\)"),
        (lambda: class_agreement(Threshold(), IMAGES, np.zeros(10)), "float64"),
        (lambda: class_agreement(Threshold(), IMAGES, np.full(10, -1)), "labels hold -1"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
