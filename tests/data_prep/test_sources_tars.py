"""Images read in place from tars: ILSVRC's nested ones and WebDataset's."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from image_trees import (
    assert_refused,
    encoded,
    random_image,
    tar_bytes,
    write_ilsvrc_tars,
    write_image_folder,
)
from PIL import Image
from scipy.io import savemat

from data_prep import tar_reader
from data_prep.sources import BadSampleError, open_source
from data_prep.tar_reader import open_range, tar_members
from drwkv.storage import FolderStorage, open_storage


def test_ilsvrcs_tar_is_the_same_source_as_the_tree_it_unpacks_to(tmp_path):
    write_image_folder(tmp_path / "tree", 40, num_classes=5, seed=0)
    tar = write_ilsvrc_tars(tmp_path / "tree", tmp_path / "tars")
    tree, packed = open_source(str(tmp_path / "tree")), open_source(str(tmp_path / "tars"))
    assert list(packed.names) == list(tree.names) and packed.class_names == tree.class_names
    np.testing.assert_array_equal(packed.labels, tree.labels)
    for one, other in zip(packed.items, tree.items, strict=True):
        assert one.name == other.name
        np.testing.assert_array_equal(one.load(), other.load())
    assert list(open_source(str(tar)).names) == list(tree.names)


class CountingStorage(FolderStorage):
    """A folder that counts the bytes read from it."""

    bytes_read = 0

    def read_range(self, name: str, start: int, size: int) -> bytes:
        self.bytes_read += size
        return super().read_range(name, start, size)


def test_scanning_a_tar_reads_headers_and_no_bodies(tmp_path):
    bodies = {f"{i}.jpg": bytes(100_000) for i in range(200)}
    (tmp_path / "big.tar").write_bytes(tar_bytes(bodies))
    storage = CountingStorage(str(tmp_path))
    with open_range(storage, "big.tar") as reader:
        assert [member.name for member in tar_members(reader, where="big.tar")] == list(bodies)
    assert storage.bytes_read <= (len(bodies) + 2) * tar_reader.LOCAL_READAHEAD < 0.05 * 200 * 100_000


@pytest.mark.parametrize("readahead", [1, 700, 4096, 1 << 20])
def test_a_range_reads_as_a_file_of_its_own(tmp_path, readahead):
    data = np.random.default_rng(0).integers(0, 256, 50_000).astype(np.uint8).tobytes()
    (tmp_path / "file").write_bytes(data)
    expected, rng = io.BytesIO(data[1000:41_000]), np.random.default_rng(1)
    with open_range(open_storage(tmp_path), "file", start=1000, size=40_000, readahead=readahead) as reader:
        for _ in range(300):
            whence = int(rng.integers(3))
            offset = int(rng.integers(0, 45_000)) if whence == 0 else int(rng.integers(-900, 900))
            if whence != 1 or expected.tell() + offset >= 0:
                assert reader.seek(offset, whence) == expected.seek(offset, whence)
            size = int(rng.integers(0, 3000))
            assert reader.read(size) == expected.read(size)
    with open_range(open_storage(tmp_path), "file", start=49_000, size=9_999) as reader:
        assert reader.read() == data[49_000:]
    with pytest.raises(FileNotFoundError):
        open_range(open_storage(tmp_path), "absent")


def test_a_tar_that_is_cut_or_broken_anywhere_is_refused(tmp_path):
    whole = tar_bytes({f"{i}.txt": b"x" * 700 for i in range(5)})
    file = tmp_path / "a.tar"

    def names() -> list[str]:
        with open_range(open_storage(tmp_path), "a.tar") as reader:
            return [member.name for member in tar_members(reader, where="a.tar")]

    file.write_bytes(whole)
    assert names() == [f"{i}.txt" for i in range(5)]
    file.write_bytes(tar_bytes({}))
    assert names() == []
    # Cut in a body, at a member's end, in a header, before the mark of the end; a header overwritten.
    for data in (
        whole[:5000],
        whole[:3072],
        whole[:3300],
        whole[: 5 * 1536],
        whole[:3072] + b"?" * 512 + whole[3584:],
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.tar: not a whole tar") as caught:
            names()
        assert "\n" not in str(caught.value)


def test_a_broken_training_tar_is_refused_by_the_name_of_its_part(tmp_path):
    write_image_folder(tmp_path / "tree", 12, num_classes=3, seed=0)
    tar = write_ilsvrc_tars(tmp_path / "tree", tmp_path)
    data = tar.read_bytes()
    with tarfile.open(tar) as outer:
        second = outer.getmembers()[1]
        with tarfile.open(fileobj=outer.extractfile(second)) as inner:
            header = second.offset_data + inner.getmembers()[2].offset
    tar.write_bytes(data[:header] + b"?" * 512 + data[header + 512 :])
    assert_refused(tar, "ILSVRC2012_img_train.tar!n10000017.tar: not a whole tar")
    tar.write_bytes(data[: second.offset])
    assert_refused(tar, "ILSVRC2012_img_train.tar: not a whole tar (ends at byte")
    tar.write_bytes(tar_bytes({"n10000000.tar": tar_bytes({})}))
    assert_refused(tar, "class tar n10000000.tar holds no images")
    tar.write_bytes(tar_bytes({"readme.tar": b""}))
    assert_refused(tar, "member 'readme' is no class tar")
    tar.write_bytes(tar_bytes({}))
    assert_refused(tar, "holds no class tars")


def test_an_image_that_the_tar_lost_after_opening_is_a_bad_sample(tmp_path):
    write_image_folder(tmp_path / "tree", 4, num_classes=2, seed=0)
    tar = write_ilsvrc_tars(tmp_path / "tree", tmp_path)
    items = sorted(open_source(str(tar)).items, key=lambda item: item.offset)
    with open(tar, "r+b") as file:
        file.truncate(items[-1].offset + 100)
    with pytest.raises(BadSampleError, match=f"^{items[-1].name}: is cut short: 100 bytes, expected "):
        items[-1].load()


# ILSVRC numbers its classes in an order of its own; the last synset is an inner node of WordNet.
SYNSETS = ["n02119789", "n01440764", "n03000000", "n00001740"]
TRUTH = [2, 1, 3, 3, 1]


def write_val(root: Path) -> list[bytes]:
    """The validation tar and its development kit; returns the images in order."""
    images = [encoded(random_image(np.random.default_rng(i), 40, 30 + i)) for i in range(len(TRUTH))]
    members = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": images[i] for i in (3, 0, 4, 2, 1)}
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(members))
    synsets = np.zeros(
        4, dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    )
    for i, synset in enumerate(SYNSETS):
        synsets[i] = (float(i + 1), synset, "some words", 3.0 if i == 3 else 0.0)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets.reshape(-1, 1)})
    kit = tar_bytes(
        {
            "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"".join(
                b"%d\n" % i for i in TRUTH
            ),
        }
    )
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(kit))
    return images


def test_the_validation_tar_is_labelled_by_the_development_kit(tmp_path):
    images = write_val(tmp_path)
    source = open_source(str(tmp_path))
    assert list(source.names) == [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(5)]
    assert source.class_names == sorted(SYNSETS[:3])
    assert [source.class_names[label] for label in source.labels] == [SYNSETS[number - 1] for number in TRUTH]
    for item, image in zip(source.items, images, strict=True):
        np.testing.assert_array_equal(item.load(), np.asarray(Image.open(io.BytesIO(image))))
    kit = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    kit.write_bytes(kit.read_bytes()[:300])
    assert_refused(tmp_path, "ILSVRC2012_devkit_t12.tar.gz: not the development kit of 2012")
    kit.unlink()
    unlabelled = open_source(str(tmp_path))
    assert unlabelled.class_names == [] and not unlabelled.labels.any()
    write_image_folder(tmp_path / "tree", 2, num_classes=1, seed=0)
    write_ilsvrc_tars(tmp_path / "tree", tmp_path)
    assert_refused(tmp_path, "holds train and val; say which")
    assert len(open_source(f"{tmp_path}#val").items) == 5 and len(open_source(f"{tmp_path}#train").items) == 2


def test_webdatasets_tars_are_read_as_webdataset_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    for shard in range(3):
        with webdataset.TarWriter(str(tmp_path / f"set-{shard:03d}.tar")) as writer:
            for i in range(5):
                form = ("JPEG", "PNG", "WEBP")[i % 3]
                image = encoded(
                    random_image(rng, 30 + i, 40), form, **({"lossless": True} if form == "WEBP" else {})
                )
                extension = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[form]
                writer.write({"__key__": f"dir.v1/ä {shard}{i}", extension: image, "cls": (shard + i) % 4})
    source = open_source(str(tmp_path))
    reference = [
        *webdataset.WebDataset(sorted(map(str, tmp_path.glob("*.tar"))), shardshuffle=False).decode("pilrgb")
    ]
    assert len(reference) == len(source.items) == 15
    assert source.class_names == ["0", "1", "2", "3"]
    for item, label, sample in zip(source.items, source.labels, reference, strict=True):
        assert sample["__key__"] in item.name and label == sample["cls"]
        (image,) = (sample[key] for key in ("jpg", "png", "webp") if key in sample)
        np.testing.assert_array_equal(item.load(), np.asarray(image.convert("RGB")))
    assert source.names[0] == "set-000.tar!dir.v1/ä 00.jpg"
    assert list(open_source(str(tmp_path / "set-001.tar")).names) == list(source.names)[5:10]


def write_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    path.write_bytes(tar_bytes(dict(members)))
    return path


def test_labels_come_from_cls_or_json_or_are_missing_everywhere(tmp_path):
    image = encoded(random_image(np.random.default_rng(0), 20, 20))
    description = json.dumps({"label": 3, "caption": "a cat"}).encode()
    tar = write_tar(
        tmp_path / "a.tar", ("0.json", description), ("0.JPG", image), ("1.jpg", image), ("1.cls", b" 1\n")
    )
    assert open_source(str(tar)).labels.tolist() == [3, 1]
    both = write_tar(tmp_path / "b.tar", ("0.cls", b"2"), ("0.jpg", image), ("0.json", description))
    assert open_source(str(both)).labels.tolist() == [2]
    none = write_tar(
        tmp_path / "c.tar", ("0.jpg", image), ("0.json", b'{"caption": ""}'), ("1.jpg", image), ("2.txt", b"")
    )
    source = open_source(str(none))
    assert source.class_names == [] and len(source.items) == 2
    some = write_tar(tmp_path / "d.tar", ("0.jpg", image), ("0.cls", b"1"), ("1.jpg", image))
    assert_refused(some, "sample d.tar!1.jpg has no label, others have")
    assert_refused(
        write_tar(tmp_path / "e.tar", ("0.jpg", image), ("0.cls", b"cat")), "0.cls gives the label b'cat'"
    )
    assert_refused(
        write_tar(tmp_path / "f.tar", ("0.jpg", image), ("0.cls", b"-1")), "has label -1, expected 0 or more"
    )
    assert_refused(
        write_tar(tmp_path / "g.tar", ("0.jpg", image), ("0.png", image)), "sample 0 has two images"
    )
    assert_refused(write_tar(tmp_path / "h.tar", ("0.txt", b"")), "1 tars without an image")


def test_shards_of_several_splits_are_picked_by_their_names(tmp_path):
    image = encoded(random_image(np.random.default_rng(0), 20, 20))
    for name in ("set-train-0000.tar", "set-train-0001.tar", "set-validation-0000.tar"):
        write_tar(tmp_path / name, ("0.jpg", image), ("0.cls", b"0"))
    assert len(open_source(f"{tmp_path}#train").items) == 2
    assert list(open_source(f"{tmp_path}#val").names) == ["set-validation-0000.tar!0.jpg"]
    assert_refused(tmp_path, "holds train and val; say which")
    assert_refused(f"{tmp_path}/absent.tar", "no such file")
