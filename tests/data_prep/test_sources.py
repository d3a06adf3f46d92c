"""Sources of files and plain records: image folders, CelebA, CIFAR-10; and what all sources share."""

from __future__ import annotations

import os
import pickle
import tracemalloc
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from image_trees import assert_refused, encoded, random_image, write_image_folder
from PIL import Image

from data_prep.sources import BadSampleError, Item, Source, open_source
from data_prep.sources.encoded import Places, ranges_as_items
from data_prep.sources.lazy import packed


def assert_same(one: Source, other: Source) -> None:
    assert list(one.names) == list(other.names)
    assert one.class_names == other.class_names
    np.testing.assert_array_equal(one.labels, other.labels)
    for a, b in zip(one.items, other.items, strict=True):
        np.testing.assert_array_equal(a.load(), b.load(), err_msg=a.name)


def save(path: Path, seed: int = 0) -> np.ndarray:
    """Write a small image and return its pixels as a decoder sees them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = random_image(np.random.default_rng(seed), 20 + seed, 24)
    path.write_bytes(encoded(image, "PNG"))
    return np.asarray(image)


def test_a_tree_of_class_folders_is_labelled_in_sorted_order(tmp_path):
    names = write_image_folder(tmp_path, 30, num_classes=4, seed=0)
    source = open_source(str(tmp_path))
    assert source.kind == "images" and not source.has_flip
    assert list(source.names) == names and len(source.items) == 30
    assert source.class_names == sorted(path.name for path in tmp_path.iterdir())
    assert source.labels.dtype == np.int64
    for item, name, label in zip(source.items, source.names, source.labels.tolist(), strict=True):
        assert item.name == name and name.startswith(f"{source.class_names[label]}/")
        pixels = item.load()
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(tmp_path / name).convert("RGB")))


def test_the_order_is_of_names_whatever_the_file_system_gives(tmp_path):
    odd = [
        "b/with space.png",
        "b/ünï/日本.PNG",
        "b-x/1.png",
        "b/a/1.png",
        "b/a.png",
        "Z/1.png",
        "é/#5%.png",
        "b/A.png",
    ]
    pixels = {name: save(tmp_path / "one" / name, i) for i, name in enumerate(odd)}
    for i, name in reversed([*enumerate(odd)]):
        save(tmp_path / "other" / name, i)
    one, other = open_source(str(tmp_path / "one")), open_source(f"{tmp_path}/other/")
    assert_same(one, other)
    assert one.class_names == ["Z", "b", "b-x", "é"]
    assert list(one.names)[:6] == [
        "Z/1.png",
        "b/A.png",
        "b/a/1.png",
        "b/a.png",
        "b/with space.png",
        "b/ünï/日本.PNG",
    ]
    for item in one.items:
        np.testing.assert_array_equal(item.load(), pixels[item.name])


def test_a_flat_folder_is_unlabelled_and_other_files_are_not_seen(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", i)
    for name in ("notes.txt", ".hidden.png", "._0.png"):
        (tmp_path / name).write_text("x")
    source = open_source(str(tmp_path))
    assert list(source.names) == ["0.png", "1.png", "2.png"]
    assert source.class_names == [] and source.labels.tolist() == [0, 0, 0]


def test_a_split_is_picked_by_folder_and_never_by_default(tmp_path):
    save(tmp_path / "train/cat/1.png")
    save(tmp_path / "train/dog/2.png")
    save(tmp_path / "val/cat/3.png")
    assert list(open_source(f"{tmp_path}#train").names) == ["cat/1.png", "dog/2.png"]
    assert (
        list(open_source(f"{tmp_path}#val").names)
        == list(open_source(f"{tmp_path}/val").names)
        == ["cat/3.png"]
    )
    assert_refused(tmp_path, f"holds train and val; say which, such as {tmp_path}#train")
    assert_refused(f"{tmp_path}#test", "holds no test split")
    assert_refused(f"{tmp_path}/val#train", "holds no train split")


def test_folders_that_would_shift_labels_or_hold_nothing_are_refused(tmp_path):
    assert_refused(tmp_path / "absent", "absent: no such folder")
    assert_refused(tmp_path, "holds no files")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/readme.txt").write_text("x")
    assert_refused(tmp_path, "no images and no known container among its 1 files (first: 'b/readme.txt')")
    assert_refused(tmp_path, "no images in", format="folder")
    save(tmp_path / "a/1.png")
    assert_refused(tmp_path, "class folder 'b' holds no images, and 0 more")
    (tmp_path / "b/readme.txt").unlink()
    assert_refused(tmp_path, "class folder 'b' holds no images")
    (tmp_path / "b").rmdir()
    assert len(open_source(str(tmp_path)).items) == 1
    save(tmp_path / "stray.png")
    assert_refused(tmp_path, "holds images beside folders of images")
    (tmp_path / "more.tar").write_bytes(b"")
    assert_refused(tmp_path, "holds more than one kind of files (folder, tars)")
    assert_refused(tmp_path, "format is 'zip', expected one of auto, folder,", format="zip")


def test_a_name_that_is_no_utf_8_is_refused(tmp_path):
    save(tmp_path / "good.png")
    os.rename(os.fsencode(tmp_path / "good.png"), os.fsencode(tmp_path) + b"/bad\xff.png")
    assert_refused(tmp_path, "is not UTF-8; rename the file")


def test_a_bad_sample_is_named_and_a_lost_file_is_not_called_bad(tmp_path):
    save(tmp_path / "a/good.png")
    (tmp_path / "a/cut.jpg").write_bytes(encoded(random_image(np.random.default_rng(0), 99, 99))[:1500])
    cut, good = open_source(str(tmp_path)).items
    with pytest.raises(BadSampleError, match="^a/cut.jpg: is broken: image file is truncated"):
        cut.load()
    with pytest.raises(
        BadSampleError, match="^a/good.png: is 20 x 24, 480 pixels, more than the 100 allowed"
    ):
        good.load(max_pixels=100)
    (tmp_path / "a/good.png").unlink()
    with pytest.raises(FileNotFoundError):
        good.load()


def _mean(item: Item) -> float:
    return float(item.load().mean())


def test_items_are_read_by_other_processes(tmp_path):
    write_image_folder(tmp_path, 6, num_classes=2, seed=1)
    source = open_source(str(tmp_path))
    assert max(len(pickle.dumps(item)) for item in source.items) < 500
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(_mean, source.items)) == [_mean(item) for item in source.items]


def test_a_sample_costs_less_than_80_bytes_and_so_imagenet_100_mb():
    num = 150_000
    tracemalloc.start()
    names = packed(f"n01440764/n01440764_{i}.JPEG" for i in range(num))
    place = np.arange(num)
    items = ranges_as_items("root", ["a.tar"], names, Places(np.zeros(num, np.int32), place, place))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / num < 80
    assert items[-1].name == names[num - 1] == f"n01440764/n01440764_{num - 1}.JPEG"
    assert [item.offset for item in items[5:8]] == [5, 6, 7]
    with pytest.raises(IndexError):
        items[num]


def test_celebas_split_is_that_of_its_list(tmp_path):
    pixels = {f"{i:06d}.jpg": save(tmp_path / f"img_align_celeba/{i:06d}.jpg", i) for i in range(1, 6)}
    everything = open_source(str(tmp_path))
    assert everything.class_names == [] and len(everything.items) == 5
    assert_refused(f"{tmp_path}#train", "the split train needs")
    lines = [f"{i:06d}.jpg {split}" for i, split in enumerate("01202", start=1)]
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    for split, expected in (("train", [1, 4]), ("val", [2]), ("test", [3, 5])):
        source = open_source(f"{tmp_path}#{split}")
        assert list(source.names) == [f"img_align_celeba/{i:06d}.jpg" for i in expected]
    np.testing.assert_array_equal(source.items[0].load(), pixels["000003.jpg"])
    (tmp_path / "list_eval_partition.txt").write_text("\n".join(lines[:3]))
    assert_refused(
        f"{tmp_path}#train", "img_align_celeba/000004.jpg and 1 more are not in list_eval_partition.txt"
    )
    (tmp_path / "list_eval_partition.txt").write_text("000001.jpg train")
    assert_refused(
        f"{tmp_path}#train",
        "list_eval_partition.txt:1: '000001.jpg train', expected a file name and 0, 1 or 2",
    )


def write_cifar10(root: Path, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Five batches of 7 records and a test batch; returns all training images (35, 32, 32, 3) and labels."""
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 256, (42, 32, 32, 3)).astype(np.uint8), rng.integers(0, 10, 42)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for k, name in enumerate(names):
        records = [
            bytes([labels[i]]) + images[i].transpose(2, 0, 1).tobytes() for i in range(7 * k, 7 * k + 7)
        ]
        (root / name).write_bytes(b"".join(records))
    (root / "batches.meta.txt").write_text("\n".join(f"class{i}" for i in range(10)) + "\n\n")
    return images, labels


def test_cifar10s_records_are_images_and_labels(tmp_path):
    images, labels = write_cifar10(tmp_path)
    train, test = open_source(f"{tmp_path}#train"), open_source(f"{tmp_path}#test")
    assert train.class_names == [f"class{i}" for i in range(10)]
    assert train.names[0] == "data_batch_1.bin#0" and train.names[34] == "data_batch_5.bin#6"
    np.testing.assert_array_equal(train.labels, labels[:35])
    np.testing.assert_array_equal(np.stack([item.load() for item in train.items]), images[:35])
    np.testing.assert_array_equal(np.stack([item.load() for item in test.items]), images[35:])
    assert_same(open_source(f"{tmp_path}/test_batch.bin"), test)
    assert_refused(tmp_path, "holds test and train; say which")


def test_cifar10_that_is_cut_or_is_something_else_is_refused(tmp_path):
    write_cifar10(tmp_path)
    source = open_source(f"{tmp_path}#test")
    data = (tmp_path / "test_batch.bin").read_bytes()
    (tmp_path / "test_batch.bin").write_bytes(data[:-5])
    with pytest.raises(BadSampleError, match="^test_batch.bin#6: is cut short: 3067 bytes, expected 3072"):
        source.items[6].load()
    assert_refused(f"{tmp_path}#test", "test_batch.bin: 21506 bytes are not whole records of 3073")
    (tmp_path / "test_batch.bin").write_bytes(data[: 2 * 3073] + b"\x64" + data[1:3073])
    assert_refused(f"{tmp_path}#test", "record 2 has label 100, expected 0..9")
    (tmp_path / "batches.meta.txt").write_text("cat\ndog\n")
    assert_refused(f"{tmp_path}#train", "names 2 classes, expected 10")
