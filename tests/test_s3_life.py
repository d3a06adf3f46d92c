"""The life of a set on S3 while one request in twenty fails in any way: encoded, indexed, read for three epochs."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from cached_sets import INDEX_BYTES, RANK, TAR_BYTES, watch, what_was_read, write_job
from faulty_proxy import Fault, FaultyProxy, Kind
from image_trees import write_image_folder
from processes import Applications
from s3_server import S3Server

from drwkv.data.loader import DataConfig, open_data

NUM_IMAGES, PER_SHARD, NUM_EPOCHS, BATCH = 7000, 10, 3, 16
STREAMS = 16
WANTS_BYTES = 32 << 10  # in which the ranks tell each other what they need next, beside the budget
TIMES = 20  # that each kind of fault strikes the encoding, and the reading, at the least
ANSWERS = (Kind.TRUNCATED, Kind.FLIPPED_DOWN)  # only an answer with a body can suffer these, a third of all
# A read has no body to be flipped on its way
READING = tuple(kind for kind in Kind if kind is not Kind.FLIPPED_UP)


@pytest.mark.proof
@pytest.mark.timeout(3000)
def test_a_set_is_made_indexed_and_read_right_in_order_and_once_though_one_request_in_twenty_fails(
    applications: Applications,
    s3: S3Server,
    faulty_s3: tuple[S3Server, FaultyProxy],
    use_s3,
    tmp_path: Path,
    capsys,
) -> None:
    tree, local, bucket = tmp_path / "tree", tmp_path / "local", s3.bucket()
    write_image_folder(tree, NUM_IMAGES, num_classes=10, seed=0, sizes=(8, 12))
    made, foreign = f"s3://{bucket}/made", f"s3://{bucket}/foreign"
    server, proxy = faulty_s3
    use_s3(server)
    proxy.faults = (
        Fault(0.06, ANSWERS, match="^GET"),
        Fault(0.08, (Kind.FLIPPED_UP,), match="^PUT"),
        Fault(0.03, tuple(kind for kind in READING if kind not in ANSWERS)),
    )  # fmt: skip

    applications.run(*encoding(tree, local))
    workers = [applications.start(*encoding(tree, made)) for _ in range(2)]
    for worker in workers:
        assert worker.wait(900).codes == [0], worker.log.read_text()
    assert hashes(s3, bucket, "made") == {
        str(path.relative_to(local)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in local.rglob("*")
        if path.is_file()
    }
    told = {"encode": struck_since(proxy, 0)}

    client = s3.client()
    tars = sorted(path.name for path in local.glob("*.tar"))
    for tar in tars:
        client.copy({"Bucket": bucket, "Key": f"made/{tar}"}, bucket, f"foreign/{tar}")
    before = len(proxy.struck)
    applications.run("-m", "data_prep.index", foreign, timeout_sec=900)
    rows = client.get_object(Bucket=bucket, Key="foreign/index/samples.npy")["Body"].read()
    assert rows == (local / "index/samples.npy").read_bytes()
    told["index"] = struck_since(proxy, before)

    shards = 114  # of 700, and the index has its place where 14 would
    num_batches = NUM_EPOCHS * NUM_IMAGES // BATCH
    options = dict(shards=shards, num_batches=num_batches, batch_size=BATCH, streams=STREAMS)
    job = write_job(tmp_path, foreign, **options)
    before = len(proxy.struck)
    finished, most_bytes = watch(applications.start(RANK, str(job), world_size=2), tmp_path / "cache")
    assert finished.codes == [0, 0], finished.output
    assert most_bytes <= shards * TAR_BYTES + INDEX_BYTES + WANTS_BYTES
    assert 4 * most_bytes < sum((local / tar).stat().st_size for tar in tars)
    told["read"] = struck_since(proxy, before)

    found = np.array(sorted(what_was_read(tmp_path, range(2))))  # n, sample id, label, crc32c of x
    assert found[:, 0].tolist() == list(range(BATCH * num_batches))
    data = open_data(DataConfig(paths=[str(local)], streams=STREAMS, window=16, workers=0), seed=0)
    assert (data.order.locate(found[:, 0])[1] == found[:, 1]).all()
    x, y = data.sets[0].read(found[:, 1])
    assert [google_crc32c.value(image.tobytes()) for image in x] == found[:, 3].tolist()
    assert (y == found[:, 2]).all()

    share = len(proxy.struck) / len(proxy.requests)
    with capsys.disabled():
        print(f"\n{len(proxy.struck)} of {len(proxy.requests)} requests were struck, {100 * share:.1f} %")
        for part, counts in told.items():
            print(f"{part}: " + ", ".join(f"{counts[kind]} x {kind}" for kind in Kind))
    assert 0.04 < share < 0.07
    for part, kinds, times in (
        ("encode", tuple(Kind), TIMES),
        ("index", READING, 1),
        ("read", READING, TIMES),
    ):
        assert all(told[part][kind] >= times for kind in kinds), (part, told[part])


def encoding(tree: Path, out: Path | str) -> list[str]:
    """Arguments that write the set of pixels."""
    return [
        "-m", "data_prep.encode", f"source={tree}", f"out={out}", "kind=pixels", "resolution=4",
        f"samples_per_shard={PER_SHARD}", f"batch={PER_SHARD}", "workers=0",
    ]  # fmt: skip


def hashes(s3: S3Server, bucket: str, prefix: str) -> dict[str, str]:
    """Every object under a prefix with the hash of its bytes, as a plain client reads them."""
    client = s3.client()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    keys = [entry["Key"] for page in pages for entry in page["Contents"]]
    bodies = ((key, client.get_object(Bucket=bucket, Key=key)["Body"].read()) for key in keys)
    return {key.removeprefix(f"{prefix}/"): hashlib.sha256(body).hexdigest() for key, body in bodies}


def struck_since(proxy: FaultyProxy, before: int) -> Counter[Kind]:
    """How often each kind has struck since so many faults."""
    return Counter(kind for kind, _ in proxy.struck[before:])
