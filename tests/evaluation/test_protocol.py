"""The digits' protocol on real digits and on sets with a known fault; and the classifier it rests on."""

from __future__ import annotations

import numpy as np
import pytest

from drwkv.evaluation.features import SvmClassifier, pixel_features
from drwkv.evaluation.protocol import LabelledImages, evaluate, same_classes


@pytest.fixture(scope="module")
def noisy(digits) -> LabelledImages:
    """300 held-out-like digits: training digits under noise."""
    train, _ = digits
    noise = np.random.default_rng(0).normal(0, 40, train.images[:300].shape)
    return LabelledImages(np.clip(train.images[:300] + noise, 0, 255).astype(np.uint8), train.labels[:300])


def test_the_classifier_reads_held_out_digits(digits):
    train, held_out = digits
    predicted = SvmClassifier().fit(train.images, train.labels).predict(held_out.images)
    assert (predicted == held_out.labels).mean() >= 0.98


def test_pixel_features_are_the_pixels_in_unit_range():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3)).astype(np.uint8)
    features = pixel_features(images)
    assert features.dtype == np.float64 and features.shape == (3, 60)
    assert features[2, (1 * 5 + 2) * 3 + 1] == images[2, 1, 2, 1] / 255


def test_an_unfitted_classifier_and_other_image_sizes_are_refused(digits):
    train, _ = digits
    with pytest.raises(ValueError, match="not fitted"):
        SvmClassifier().predict(train.images)
    with pytest.raises(ValueError, match=r"\(4, 8, 1\).*\(8, 8, 1\)"):
        SvmClassifier().fit(train.images[:100], train.labels[:100]).predict(train.images[:, :4])


def test_training_images_score_the_floor_and_are_found_out_as_copies(digits):
    train, held_out = digits
    chosen = same_classes(train.labels, np.repeat(np.arange(10), 100))
    samples = LabelledImages(train.images[chosen], train.labels[chosen])
    evaluation = evaluate(samples, train, held_out)
    for name in ("frechet_distance", "precision", "recall"):
        metric = evaluation.metrics[name]
        assert metric.value == metric.floor, name
    assert evaluation.metrics["recall"].value > 0.8 and evaluation.metrics["precision"].value > 0.8
    assert evaluation.metrics["near_copy_rate"].value == 1.0
    assert evaluation.metrics["identical_images"].value == 1000
    assert evaluation.metrics["class_agreement"].floor >= 0.98
    assert evaluation.protocol["num_floor"] == evaluation.protocol["num_samples"] == 1000


def test_each_fault_shows_in_its_own_number(digits, noisy):
    train, held_out = digits
    good = evaluate(noisy, train, held_out).metrics
    swapped = evaluate(LabelledImages(noisy.images, (noisy.labels + 1) % 10), train, held_out).metrics
    assert good["class_agreement"].value > 0.9 and swapped["class_agreement"].value < 0.1
    assert swapped["frechet_distance"].value == good["frechet_distance"].value
    means = np.stack([train.images[train.labels == c].mean(0) for c in noisy.labels]).astype(np.uint8)
    averaged = evaluate(LabelledImages(means, noisy.labels), train, held_out).metrics
    assert averaged["class_agreement"].value == 1.0
    assert averaged["recall"].value < 0.05 < 0.5 < good["recall"].value
    assert averaged["frechet_distance"].value > 2 * good["frechet_distance"].value > 0


def test_agreement_is_given_for_each_class_that_was_sampled(digits, noisy):
    train, held_out = digits
    two = np.isin(noisy.labels, [3, 7])
    evaluation = evaluate(LabelledImages(noisy.images[two], noisy.labels[two]), train, held_out)
    assert list(evaluation.per_class) == [3, 7]
    weighted = sum(score.count * score.agreement for score in evaluation.per_class.values()) / two.sum()
    assert weighted == pytest.approx(evaluation.metrics["class_agreement"].value)
    assert all(score.floor > 0.9 for score in evaluation.per_class.values())


def test_the_same_images_give_the_same_numbers(digits, noisy):
    first, second = (evaluate(noisy, *digits) for _ in range(2))
    assert first.metrics == second.metrics and first.protocol == second.protocol


def test_same_classes_takes_the_first_of_each_class():
    labels, wanted = np.array([1, 0, 1, 0, 1, 2]), np.array([1, 1, 0, 0, 0])
    assert same_classes(labels, wanted).tolist() == [0, 1, 2, 3]


def test_a_label_that_training_lacks_is_refused(digits, noisy):
    with pytest.raises(ValueError, match="sample label 12 does not occur in training.*go to 9"):
        evaluate(LabelledImages(noisy.images, np.full(300, 12)), *digits)


def test_samples_of_another_size_are_refused(digits, noisy):
    with pytest.raises(ValueError, match=r"the sample images.*\(8, 7, 1\).*\(8, 8, 1\)"):
        evaluate(LabelledImages(noisy.images[:, :, :7], noisy.labels), *digits)
