"""The digits command, from scikit-learn's images to two committed sets, and its errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from data_prep import digits
from drwkv.data.shards import ShardSet


def run(*arguments: str, module: str = "data_prep.digits") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    done = run(str(folder))
    assert done.returncode == 0, done.stderr
    assert "train: written: 1438 images" in done.stdout and "test: written: 359 images" in done.stdout
    return folder


def test_gray_values_survive_the_way_to_uint8_and_back():
    values = np.arange(17)
    pixels = digits.to_uint8(values)
    assert pixels.dtype == np.uint8 and pixels[0] == 0 and pixels[16] == 255
    np.testing.assert_array_equal(pixels, np.floor(values * 255 / 16 + 0.5))
    np.testing.assert_array_equal(digits.from_uint8(pixels), values)


def test_the_two_sets_hold_every_digit_once_with_its_own_label(out):
    bundle, seen = load_digits(), []
    for name, size in (("train", 1438), ("test", 359)):
        shards = ShardSet.open(out / name)
        x, y = shards.read(np.arange(shards.num_samples))
        sources = [int(line.split("/")[1]) for line in (out / name / "index/sources.txt").read_text().split()]
        np.testing.assert_array_equal(digits.from_uint8(x[:, 0]), bundle.images[sources])
        np.testing.assert_array_equal(y, bundle.target[sources])
        assert (shards.num_samples, shards.num_classes, shards.sample_shape) == (size, 10, (1, 8, 8))
        seen += sources
    assert sorted(seen) == list(range(1797))


def test_the_split_is_stratified_and_a_function_of_the_seed_alone():
    _, labels = digits.load_images()
    train, test = digits.split(labels, test_fraction=0.2, seed=0)
    counts, held_out = np.bincount(labels), np.bincount(labels[test])
    np.testing.assert_array_equal(held_out, np.floor(0.2 * counts + 0.5))
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(1797))
    np.testing.assert_array_equal(digits.split(labels, test_fraction=0.2, seed=0)[1], test)
    assert digits.split(labels, test_fraction=0.2, seed=1)[1].tolist() != test.tolist()


def test_the_same_command_again_says_that_it_is_finished(out):
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = run(str(out))
    assert again.returncode == 0 and again.stdout.count("finished already") == 2
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seed", "1"), "holds another set: seed 0 there, 1 now"),
        (("--samples-per-shard", "100"), "samples_per_shard 256 there, 100 now"),
        (("--test-fraction", "1.5"), "--test-fraction is 1.5"),
        (("--test-fraction", "0.001"), "takes 0 of the 178 images of class 0"),
        (("--seed", "-1"), "seed is -1"),
        (("--samples-per-shard", "0"), "samples_per_shard is 0"),
    ],
)
def test_a_wrong_argument_is_one_line_that_says_what_to_do(out, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        digits.main([str(out), *arguments])
    assert "\n" not in str(caught.value)


def test_an_error_ends_the_command_with_one_line_and_code_2(out):
    done = run(str(out), "--seed", "1")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
