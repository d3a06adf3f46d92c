"""Parquet shards written by pyarrow in the layout of Hugging Face's datasets."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_trees import assert_refused, encoded, random_image
from PIL import Image

from data_prep.sources import BadSampleError, open_source

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

CLASSES = ["tench", "gold fish", "große Muräne"]
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_shard(
    path: Path, images: list[Any], labels: list[Any] | None, *, classes: list[str] | None = CLASSES
) -> None:
    """A shard with row groups of 4; `images` are bytes or None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(images)]
    columns = {"image": pa.array(cells, IMAGE_TYPE)}
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
        features["label"] = {"_type": "ClassLabel", "names": classes}
    table = pa.table(columns)
    if classes:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=4)


def jpegs(num: int) -> list[bytes]:
    return [encoded(random_image(np.random.default_rng(i), 20 + i, 30)) for i in range(num)]


def test_rows_of_all_shards_are_images_with_labels_and_class_names(tmp_path):
    images, labels = jpegs(20), [i % 3 for i in range(20)]
    write_shard(tmp_path / "data/train-00001-of-00002.parquet", images[11:], labels[11:])
    write_shard(tmp_path / "data/train-00000-of-00002.parquet", images[:11], labels[:11])
    source = open_source(str(tmp_path))
    assert source.class_names == CLASSES and source.labels.tolist() == labels
    assert source.names[0] == "data/train-00000-of-00002.parquet#0"
    assert source.names[19] == "data/train-00001-of-00002.parquet#8"
    for i in np.random.default_rng(0).permutation(20).tolist():
        assert source.items[i].name == source.names[i]
        np.testing.assert_array_equal(source.items[i].load(), np.asarray(Image.open(io.BytesIO(images[i]))))
    one = open_source(str(tmp_path / "data/train-00001-of-00002.parquet"))
    assert one.labels.tolist() == labels[11:]


def test_splits_are_picked_and_the_test_sets_labels_of_minus_one_are_none(tmp_path):
    images = jpegs(3)
    write_shard(tmp_path / "train-00000-of-00001.parquet", images, [0, 1, 2])
    write_shard(tmp_path / "test-00000-of-00001.parquet", images, [-1, -1, -1])
    assert_refused(tmp_path, "holds test and train; say which")
    assert open_source(f"{tmp_path}#train").labels.tolist() == [0, 1, 2]
    assert open_source(f"{tmp_path}#test").class_names == []


def test_without_metadata_classes_are_numbers_and_without_labels_there_are_none(tmp_path):
    write_shard(tmp_path / "a.parquet", jpegs(2), [4, 1], classes=None)
    assert open_source(str(tmp_path)).class_names == ["0", "1", "2", "3", "4"]
    write_shard(tmp_path / "a.parquet", jpegs(2), None)
    source = open_source(str(tmp_path))
    assert source.class_names == [] and source.labels.tolist() == [0, 0]
    pq.write_table(pa.table({"jpg": pa.array(jpegs(2), pa.binary())}), tmp_path / "a.parquet")
    assert open_source(str(tmp_path)).items[1].load().shape == (30, 21, 3)


def test_shards_that_do_not_fit_are_refused(tmp_path):
    write_shard(tmp_path / "a.parquet", jpegs(2), [0, 3])
    assert_refused(tmp_path, "labels up to 3, but the schema names 3 classes")
    write_shard(tmp_path / "a.parquet", jpegs(2), [0, 1])
    write_shard(tmp_path / "b.parquet", jpegs(2), None)
    assert_refused(tmp_path, "b.parquet: cannot be read as the others (\"no column 'label'\")")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    assert_refused(tmp_path, "b.parquet: cannot be read as the others")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    assert_refused(tmp_path / "a.parquet", "expected one column of images, found [] in ['text']")
    write_shard(tmp_path / "a.parquet", [], [])
    assert_refused(tmp_path / "a.parquet", "1 parquet files without a row")
    write_shard(tmp_path / "a.parquet", jpegs(2), [0, None])
    assert_refused(tmp_path / "a.parquet", "sample a.parquet#1 has no label, others have")


def test_a_bad_row_is_named(tmp_path):
    images = jpegs(10)
    write_shard(tmp_path / "a.parquet", [images[0], None, images[2][:700], *images[3:]], [0] * 10)
    items = open_source(str(tmp_path)).items
    with pytest.raises(BadSampleError, match="^a.parquet#1: column 'image' holds no bytes"):
        items[1].load()
    with pytest.raises(BadSampleError, match="^a.parquet#2: is broken"):
        items[2].load()
    first = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(2).column(0).data_page_offset
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[first : first + 60] = bytes(60)
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(BadSampleError, match="^a.parquet#9: row group 2 cannot be read"):
        items[9].load()
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(FileNotFoundError):
        items[5].load()


def test_without_pyarrow_the_line_says_what_to_install(root, tmp_path):
    write_shard(tmp_path / "a.parquet", jpegs(1), [0])
    code = (
        f"import sys; sys.modules['pyarrow'] = None; sys.path.insert(0, {str(root)!r})\n"
        "from data_prep.sources import open_source\n"
        f"try: open_source({str(tmp_path)!r})\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == f"{tmp_path}: reading parquet needs pyarrow: pip install pyarrow\n", done.stderr
