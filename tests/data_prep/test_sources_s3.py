"""Every layout is the same source on S3 as in a folder: same names, labels and samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from image_trees import (
    assert_refused,
    encoded,
    random_image,
    tar_bytes,
    write_ilsvrc_tars,
    write_image_folder,
)
from s3_server import S3Server
from safetensors.torch import save_file

from data_prep.sources import StoredLatents, open_source

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

LAYOUTS = ("folder", "ilsvrc", "tars", "parquet", "cifar10", "celeba", "npy", "safetensors")


def write_all(root: Path) -> None:
    """One small data set of each layout, each in the folder of its name."""
    for name in LAYOUTS:
        (root / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    write_image_folder(root / "folder", 7, num_classes=3, seed=0)
    write_ilsvrc_tars(root / "folder", root / "ilsvrc")
    images = [encoded(random_image(rng, 30, 30)) for _ in range(4)]
    members = {
        f"{i}.{end}": data
        for i, image in enumerate(images)
        for end, data in (("jpg", image), ("cls", b"%d" % i))
    }
    (root / "tars/a.tar").write_bytes(tar_bytes(members))
    pq.write_table(
        pa.table({"image": images, "label": [0, 1, 2, 3]}), root / "parquet/a.parquet", row_group_size=2
    )
    (root / "cifar10/test_batch.bin").write_bytes((rng.integers(0, 10, (5, 3073)).astype(np.uint8)).tobytes())
    (root / "celeba/img_align_celeba").mkdir()
    (root / "celeba/img_align_celeba/000001.jpg").write_bytes(images[0])
    np.save(root / "npy/0.npy", rng.standard_normal((2, 8, 4, 4)).astype(np.float32))
    z = torch.randn(3, 4, 4, 4)
    save_file(
        {"latents": z, "latents_flip": -z, "labels": torch.arange(3)}, root / "safetensors/a.safetensors"
    )


@pytest.fixture
def bucket(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for key, value in s3.environment.items():
        monkeypatch.setenv(key, value)
    return s3.bucket()


def test_every_layout_is_the_same_on_s3_as_in_a_folder(s3, bucket, tmp_path):
    write_all(tmp_path)
    client = s3.client()
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        client.put_object(Bucket=bucket, Key=f"sets/{file.relative_to(tmp_path)}", Body=file.read_bytes())
    for layout in LAYOUTS:
        here = open_source(f"{tmp_path}/{layout}")
        there = open_source(f"s3://{bucket}/sets/{layout}", latents=StoredLatents())
        assert list(there.names) == list(here.names) and len(here.names) > 0, layout
        assert there.class_names == here.class_names and there.labels.tolist() == here.labels.tolist(), layout
        for one, other in zip(there.items, here.items, strict=True):
            if here.kind == "images":
                np.testing.assert_array_equal(one.load(), other.load(), err_msg=layout)
            else:
                np.testing.assert_array_equal(one.load_latents(), other.load_latents(), err_msg=layout)


def test_a_prefix_without_files_and_a_bucket_that_is_not_there_are_named(s3, bucket):
    assert_refused(f"s3://{bucket}/sets", f"s3://{bucket}/sets: holds no files")
    assert_refused(f"s3://{bucket}/sets/a.tar", f"s3://{bucket}/sets/a.tar: no such file")
    assert_refused("s3://no-such-bucket-at-all/sets", "s3://no-such-bucket-at-all: there is no such bucket")
