"""Selections: by class, split, limit and balance; what is taken keeps its rows, its shards and the order's law."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drwkv.compose import load
from drwkv.config import TrainConfig
from drwkv.data.loader import DataConfig, open_data
from drwkv.data.order import NEVER, Mixture, Order
from drwkv.data.selection import SelectedOrder, SelectionConfig, select

few = settings(deadline=None, max_examples=60, derandomize=True)


@st.composite
def labelled_sets(draw):
    """Labels and shard sizes of a small set, where every class has 4 samples or more."""
    sizes = np.array(draw(st.lists(st.integers(1, 30), min_size=2, max_size=8)) + [40])
    num_classes = draw(st.integers(1, 5))
    labels = np.random.default_rng(draw(st.integers(0, 99))).integers(0, num_classes, sizes.sum())
    labels[: 4 * num_classes] = np.arange(4 * num_classes) % num_classes
    return labels.astype(np.int32), sizes


def rows_of(labels, sizes, **options):
    return select(labels, sizes, SelectionConfig(**options)).rows


@few
@given(labelled=labelled_sets(), held_out=st.floats(0.2, 0.8), seed=st.integers(0, 2**32 - 1))
def test_both_sides_of_a_split_are_apart_and_together_all_with_the_exact_share_of_each_class(
    labelled, held_out, seed
):
    labels, sizes = labelled
    train, held = (
        rows_of(labels, sizes, held_out=held_out, part=part, seed=seed) for part in ("train", "held_out")
    )
    assert np.array_equal(np.sort(np.concatenate([train, held])), np.arange(len(labels)))
    for label, count in Counter(labels.tolist()).items():
        assert (labels[held] == label).sum() == int(held_out * count + 0.5)


def test_a_split_depends_on_its_seed_and_not_on_the_other_choices():
    labels = np.arange(3000, dtype=np.int32) % 10
    held = rows_of(labels, [3000], held_out=0.1, part="held_out")
    other = rows_of(labels, [3000], held_out=0.1, part="held_out", seed=1)
    assert len(np.intersect1d(held, other)) < 80  # of 300; 30 by chance
    some = rows_of(labels, [1000, 2000], held_out=0.1, part="held_out", classes=[7, 3])
    assert np.array_equal(some, held[np.isin(labels[held], [3, 7])])
    limited = rows_of(labels, [3000], held_out=0.1, max_per_class=50, balance=True)
    assert len(limited) == 500 and not np.isin(limited, held).any()
    larger = rows_of(labels, [3000], held_out=0.3, part="held_out")
    assert np.isin(held, larger).all()


def test_the_held_out_rows_are_spread_over_the_set_and_keep_their_values():
    """Changing these values moves samples from one side of everybody's splits to the other."""
    labels = np.zeros(20_000, np.int32)
    held = rows_of(labels, [20_000], held_out=0.25, part="held_out")
    assert np.abs(np.histogram(held, bins=20, range=(0, 20_000))[0] - 250).max() < 60
    assert held[:6].tolist() == [1, 4, 8, 9, 14, 16]


@few
@given(labelled=labelled_sets(), limit=st.none() | st.integers(1, 20), held_out=st.sampled_from([0.0, 0.4]))
def test_balanced_classes_come_equally_often_and_samples_of_one_class_differ_by_one_repeat(
    labelled, limit, held_out
):
    labels, sizes = labelled
    once = rows_of(labels, sizes, max_per_class=limit, held_out=held_out)
    rows = rows_of(labels, sizes, max_per_class=limit, held_out=held_out, balance=True)
    largest = max(Counter(labels[once].tolist()).values())
    assert set(Counter(labels[rows].tolist()).values()) == {largest}
    assert np.array_equal(np.unique(rows), once)  # all that is taken unbalanced, nothing else
    for label in np.unique(labels):
        repeats = Counter(rows[labels[rows] == label].tolist()).values()
        assert max(repeats) - min(repeats) <= 1


@few
@given(labelled=labelled_sets(), classes=st.sets(st.integers(0, 4), min_size=1), balance=st.booleans())
def test_rows_rise_and_each_virtual_shard_is_a_stretch_of_its_real_one(labelled, classes, balance):
    labels, sizes = labelled
    classes &= set(labels.tolist())
    if not classes:
        return
    selection = select(labels, sizes, SelectionConfig(classes=sorted(classes), balance=balance))
    assert set(labels[selection.rows].tolist()) == classes
    assert (np.diff(selection.rows) >= 0).all() and selection.rows.dtype == np.int32
    shard_of_row = np.repeat(np.arange(len(sizes)), sizes)
    by_virtual_shard = np.repeat(selection.shards, selection.shard_sizes)
    assert np.array_equal(shard_of_row[selection.rows], by_virtual_shard)
    assert selection.shard_sizes.min() >= 1 and selection.num_shards == len(sizes)


def test_shards_without_a_selected_sample_are_never_used():
    labels, sizes = np.array([0] * 30 + [1] * 20 + [0] * 10 + [1] * 40), np.array([30, 20, 10, 40])
    selection = select(labels, sizes, SelectionConfig(classes=[1]))
    assert selection.shards.tolist() == [1, 3] and selection.shard_sizes.tolist() == [20, 40]
    order = SelectedOrder(selection, seed=1, streams=4, window=8)
    assert order.num_samples == 60 and order.num_shards == 4
    assert np.array_equal(np.sort(order.sample_ids(np.arange(60, 120))), np.flatnonzero(labels == 1))
    virtual = Order([20, 40], seed=1, streams=4, window=8)
    for n in range(130):
        expected = virtual.next_uses(n)
        assert order.next_uses(n).tolist() == [NEVER, expected[0], NEVER, expected[1]]
    mixture = Mixture([order, Order([9], seed=1, streams=2)], [1, 1], seed=1, block=8)
    assert mixture.num_shards == 5 and mixture.num_samples == 69
    uses = mixture.next_uses(0)
    assert (uses[[0, 2]] == NEVER).all() and (uses[[1, 3, 4]] < NEVER).all()


def test_a_million_labels_are_selected_in_under_a_second():
    labels = np.random.default_rng(0).integers(0, 1000, 1251 * 1024).astype(np.int32)
    start_sec = time.thread_time()  # whatever else the machine does
    selection = select(labels, np.full(1251, 1024), SelectionConfig(held_out=0.1, balance=True))
    assert time.thread_time() - start_sec < 1.0
    assert selection.rows.nbytes == 4 * len(selection.rows)
    assert len(set(np.bincount(labels[selection.rows]).tolist())) == 1


def test_a_run_takes_only_the_selected_samples_and_their_own_labels(digits):
    path = str(digits / "train")
    train, held = (
        open_data(
            DataConfig([path], select=SelectionConfig(classes=[3, 8], held_out=0.25, part=part, seed=5)),
            seed=0,
        )
        for part in ("train", "held_out")
    )
    assert train.num_samples + held.num_samples == np.isin(train.sets[0].labels, [3, 8]).sum()
    ids = {}
    for data in (train, held):
        batches = data.batches(data.num_samples, 0)
        [batch] = next(batches)
        batches.close()
        ids[data.num_samples] = set(batch.sample_id.tolist())
        assert set(batch.y.tolist()) == {3, 8}
        assert np.array_equal(data.sets[0].labels[batch.sample_id.numpy()], batch.y.numpy())
    assert [len(found) for found in ids.values()] == [train.num_samples, held.num_samples]
    assert not set.intersection(*ids.values())


def test_sets_are_mixed_by_what_is_selected_of_them(write_pixels):
    paths = [write_pixels("a", 50), write_pixels("b", 90)]
    data = open_data(DataConfig(paths, select=SelectionConfig(max_per_class=3)), seed=0)
    assert data.num_samples == 60 and data.order.counts.tolist() == [512, 512]


def test_the_selection_is_part_of_the_identity_where_it_selects(digits):
    path = str(digits / "train")

    def identity(**options):
        return open_data(DataConfig([path], select=SelectionConfig(**options)), seed=0).identity()["select"]

    assert identity() is identity(part="all", held_out=0.2) is identity(seed=7) is None
    found = [identity(**o) for o in ({"held_out": 0.1}, {"held_out": 0.1, "seed": 1}, {"balance": True})]
    assert found[0] != found[1] != found[2] and found[0]["held_out"] == 0.1


def test_a_selection_is_set_from_the_command_line():
    config = load(
        TrainConfig, ["data.select.held_out=0.1", "data.select.classes=[1,2]", "data.select.part=held_out"]
    )
    assert config.data.select == SelectionConfig(classes=[1, 2], held_out=0.1, part="held_out")
    with pytest.raises(ValueError, match=r"'data.select.part' cannot be 'test'"):
        load(TrainConfig, ["data.select.part=test"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": []}, r"classes' is \[\]: list labels"),
        ({"classes": [1, 1]}, r"classes' is \[1, 1\]: list labels"),
        ({"classes": [-1]}, r"classes' is \[-1\]"),
        ({"classes": [0, 9]}, r"classes' is \[0, 9\]: SET has no sample of class 9: its labels are 0 to 4"),
        ({"held_out": 1.0}, r"held_out' is 1.0: give a share"),
        ({"held_out": -0.1}, "held_out' is -0.1"),
        ({"part": "held_out"}, "part' is 'held_out': nothing is held out"),
        ({"held_out": 0.01}, "held_out' is 0.01: it takes 0 of the 10 samples of class 0 in SET"),
        ({"held_out": 0.99, "part": "held_out"}, "held_out' is 0.99: it takes 10 of the 10 samples of class 0"),
        ({"max_per_class": 0}, "max_per_class' is 0"),
        ({"seed": 2**32}, "seed' is 4294967296"),
    ],
)  # fmt: skip
def test_what_cannot_be_selected_is_refused_in_one_line_that_names_the_key(options, message):
    labels = np.repeat(np.array([0, 1, 2, 4]), 10)
    with pytest.raises(ValueError, match=message) as caught:
        select(labels, np.array([40]), SelectionConfig(**options), where="SET")
    assert "\n" not in str(caught.value) and "'data.select." in str(caught.value)


def test_an_index_whose_labels_were_changed_is_refused_before_it_selects(write_pixels):
    path = write_pixels()
    file = f"{path}/index/samples.npy"
    rows = np.load(file)
    rows["label"][57] += 1
    with open(file, "wb") as out:
        np.save(out, rows)
    with pytest.raises(ValueError, match="do not have the hash"):
        open_data(DataConfig([path], select=SelectionConfig(balance=True)), seed=0)
