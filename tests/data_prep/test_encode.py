"""Encoding gives one set of bytes by any road: any number of processes, any layout of the source, any kills."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from faulty_proxy import Fault, Kind
from image_trees import write_ilsvrc_tars, write_image_folder
from PIL import Image
from processes import ROOT, Applications
from small_disk import on_small_disk
from small_vae import save_small_vae

from data_prep import encode as encode_module
from data_prep.encode import EncodeConfig, encode
from data_prep.images import center_crop_arr
from drwkv.data.manifest import read_manifest
from drwkv.data.shards import ShardSet
from drwkv.latents import decode_pixels, load_vae

NUM_IMAGES, NUM_CLASSES, RESOLUTION = 2000, 20, 32
NUM_KILLS = 10  # of each layout of the source


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return save_small_vae(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images") / "train"
    write_image_folder(root, NUM_IMAGES, num_classes=NUM_CLASSES, seed=1)
    return root


@pytest.fixture(scope="module")
def ilsvrc(tree, tmp_path_factory) -> Path:
    return write_ilsvrc_tars(tree, tmp_path_factory.mktemp("ilsvrc"))


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("few") / "train"
    write_image_folder(root, 50, num_classes=5, seed=2)
    return root


def arguments(source: Path, vae: Path, out: Path | str, **options: object) -> list[str]:
    given = {"source": source, "vae": vae, "out": out, "resolution": RESOLUTION, "samples_per_shard": 50}
    given |= {"batch": 16, "workers": 1} | options
    return ["-m", "data_prep.encode", *(f"{key}={value}" for key, value in given.items())]


def config(source: Path, vae: Path | None, out: Path | str, **options: object) -> EncodeConfig:
    given = dict(source=str(source), vae=vae and str(vae), out=str(out), resolution=RESOLUTION)
    return EncodeConfig(**(given | dict(samples_per_shard=16, batch=8, workers=0) | options))  # type: ignore[arg-type]


def bytes_of(folder: Path) -> dict[str, str]:
    """Every file below a folder, with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(tree, vae, tmp_path_factory, applications) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    applications.run(*arguments(tree, vae, out))
    return out


def holders(out: Path) -> set[int]:
    """Processes that hold a shard's lease."""
    found = set()
    for lease in (out / "index/claims").glob("shard-*"):
        with contextlib.suppress(FileNotFoundError, ValueError):
            found.add(json.loads(lease.read_text())["pid"])
    return found


def encode_under_kills(
    command: list[str],
    out: Path,
    applications: Applications,
    *,
    num_processes: int,
    num_kills: int,
    most_sec: float,
) -> None:
    """Keep `num_processes` running and kill one after another, each at work on a shard; all end well."""
    chance = random.Random(num_processes)
    workers = [applications.start(*command) for _ in range(num_processes)]
    kills = 0
    while kills < num_kills:
        assert any(worker.running() for worker in workers), f"whole after {kills} kills: make the set larger"
        victims = [
            worker for worker in workers if worker.running() and worker.processes[0].pid in holders(out)
        ]
        if not victims:
            time.sleep(0.02)
            continue
        victim = chance.choice(victims)
        time.sleep(chance.uniform(0.0, most_sec))
        at_work = victim.running() and victim.processes[0].pid in holders(out)
        victim.kill(signal.SIGKILL)
        victim.wait()
        kills += at_work
        workers[workers.index(victim)] = applications.start(*command)
    for worker in workers:
        assert worker.wait(600).codes == [0], worker.log.read_text()


@pytest.mark.timeout(600)
@pytest.mark.proof
@pytest.mark.parametrize(("layout", "num_processes"), [("folder", 2), ("ilsvrc", 3)])
def test_processes_killed_at_random_moments_leave_the_bytes_of_an_undisturbed_one(
    layout, num_processes, undisturbed, tree, ilsvrc, vae, tmp_path, applications
):
    source, out = {"folder": tree, "ilsvrc": ilsvrc}[layout], tmp_path / "set"
    command = arguments(source, vae, out, workers=0)
    encode_under_kills(
        command, out, applications, num_processes=num_processes, num_kills=NUM_KILLS, most_sec=0.5
    )
    assert bytes_of(out) == bytes_of(undisturbed)


@pytest.mark.proof
@pytest.mark.timeout(1800)
def test_twenty_thousand_images_from_folder_and_tars_are_the_same_bytes_through_forty_kills(
    vae, tmp_path, applications
):
    write_image_folder(tmp_path / "tree", 20_000, num_classes=100, seed=3)
    tars = write_ilsvrc_tars(tmp_path / "tree", tmp_path / "ilsvrc")
    options: dict[str, object] = {"samples_per_shard": 256, "batch": 32}
    applications.run(*arguments(tmp_path / "tree", vae, tmp_path / "undisturbed", **options))
    for source, num_processes in ((tmp_path / "tree", 2), (tars, 3)):
        out = tmp_path / f"set-{num_processes}"
        command = arguments(source, vae, out, **options)
        encode_under_kills(
            command, out, applications, num_processes=num_processes, num_kills=20, most_sec=3.0
        )
        assert bytes_of(out) == bytes_of(tmp_path / "undisturbed")


def reference_moments(tree: Path, vae_folder: Path, names: list[str], *, mirrored: bool) -> np.ndarray:
    """The moments of each image by the plain road: open, crop, encode alone."""
    vae, moments = load_vae(str(vae_folder)), []
    for name in names:
        pixels = center_crop_arr(np.asarray(Image.open(tree / name).convert("RGB")), RESOLUTION)
        pixels = pixels[:, ::-1] if mirrored else pixels
        x = decode_pixels(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
        with torch.no_grad():
            moments.append(vae.encode(x).latent_dist.parameters[0].numpy())
    return np.stack(moments)


def test_latents_are_the_vaes_moments_of_the_cropped_image_and_of_its_mirror_image(few, vae, tmp_path):
    summary = encode(config(few, vae, tmp_path / "set"))
    assert summary == f"{tmp_path / 'set'}: 50 samples in 4 shards"
    shards = ShardSet.open(tmp_path / "set")
    names = (tmp_path / "set/index/sources.txt").read_text().splitlines()
    ids = np.arange(50)
    for mirrored in (False, True):
        x, y = shards.read(ids, np.full(50, mirrored))
        expected = reference_moments(few, vae, names, mirrored=mirrored)
        np.testing.assert_allclose(x.astype(np.float32), expected, rtol=2e-3, atol=2e-3)
    manifest = shards.manifest
    assert [manifest.class_names[label] for label in y.tolist()] == [name.split("/")[0] for name in names]
    assert (manifest.scale, manifest.shift) == (0.18215, 0.0) and manifest.has_flip
    assert (manifest.encode_dtype, manifest.encode_batch, manifest.encode_threads) == ("float32", 8, 1)
    assert manifest.crop == "adm-center" and manifest.sample_shape == (8, 8, 8) and manifest.skipped == {}


def test_scale_shift_and_flips_are_settings(few, vae, tmp_path):
    encode(config(few, vae, tmp_path / "set", scale=0.5, shift=0.25, flip=False, limit=20))
    manifest = read_manifest(tmp_path / "set")
    assert (manifest.scale, manifest.shift, manifest.has_flip, manifest.num_samples) == (0.5, 0.25, False, 20)
    classes = ShardSet.open(tmp_path / "set").labels
    assert np.bincount(classes).tolist() == [4] * 5  # the limit spreads over the source


def test_pixels_are_the_cropped_images(few, tmp_path):
    encode(config(few, None, tmp_path / "set", kind="pixels", workers=1))
    names = (tmp_path / "set/index/sources.txt").read_text().splitlines()
    x, _ = ShardSet.open(tmp_path / "set").read(np.arange(50))
    for i, name in enumerate(names):
        pixels = center_crop_arr(np.asarray(Image.open(few / name).convert("RGB")), RESOLUTION)
        np.testing.assert_array_equal(x[i], pixels.transpose(2, 0, 1))


def test_batch_and_padding_do_not_touch_each_other(few, vae, tmp_path):
    """An image's moments depend on its batch's shape, never on who else stands in the batch."""
    encode(config(few, vae, tmp_path / "all", samples_per_shard=50))
    broken = tmp_path / "tree"
    for path in sorted(few.rglob("*.JPEG")):
        (broken / path.relative_to(few)).parent.mkdir(parents=True, exist_ok=True)
        (broken / path.relative_to(few)).write_bytes(path.read_bytes())
    names = (tmp_path / "all/index/sources.txt").read_text().splitlines()
    (broken / names[7]).write_bytes(b"no image")
    encode(config(broken, vae, tmp_path / "skipped", samples_per_shard=50, on_bad="skip"))
    whole, _ = ShardSet.open(tmp_path / "all").read(np.delete(np.arange(50), 7))
    left, _ = ShardSet.open(tmp_path / "skipped").read(np.arange(49))
    np.testing.assert_array_equal(whole, left)
    manifest = read_manifest(tmp_path / "skipped")
    assert list(manifest.skipped) == [names[7]] and manifest.skipped[names[7]].startswith("is no image")
    assert (tmp_path / "skipped/index/sources.txt").read_text().splitlines() == names[:7] + names[8:]
    assert encode(config(broken, vae, tmp_path / "skipped", samples_per_shard=50, on_bad="skip")).endswith(
        "already"
    )


def test_a_bad_image_is_named_and_when_it_is_mended_the_same_command_completes(
    few, vae, tmp_path, applications
):
    tree = tmp_path / "tree"
    for path in few.rglob("*.JPEG"):
        (tree / path.relative_to(few)).parent.mkdir(parents=True, exist_ok=True)
        (tree / path.relative_to(few)).write_bytes(path.read_bytes())
    victim = sorted(tree.rglob("*.JPEG"))[17]
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    command = arguments(tree, vae, tmp_path / "set", samples_per_shard=16, batch=8)
    with pytest.raises(ValueError) as caught:
        encode(config(tree, vae, tmp_path / "set"))
    assert str(victim.relative_to(tree)) in str(caught.value) and "on_bad=skip" in str(caught.value)
    assert not (tmp_path / "set/manifest.json").exists()
    victim.write_bytes(whole)
    applications.run(*command)
    encode(config(few, vae, tmp_path / "undisturbed"))
    assert bytes_of(tmp_path / "set") == bytes_of(tmp_path / "undisturbed")


def test_moments_that_are_not_finite_are_refused_by_name(few, vae, tmp_path, monkeypatch):
    broken = load_vae(str(vae))
    broken.encoder.conv_out.weight.data[0, 0, 0, 0] = float("inf")
    monkeypatch.setattr("data_prep.encoder.load_vae", lambda *_, **__: broken)
    with pytest.raises(
        ValueError, match=r"source n\d+/n\d+_\d+.JPEG: moments.npy is not finite; encode in float32"
    ):
        encode(config(few, vae, tmp_path / "set"))
    assert not list((tmp_path / "set").glob("*.tar"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["vae=null"], "'vae' is null"),
        (["resolution=30"], "resolution is 30, but VAE .* 4: give a multiple"),
        (["on_bad=ignore"], "'on_bad'.*ignore"),
        (["btach=8"], "'btach'.*batch"),
        (["source=nowhere"], "nowhere"),
        (["out=gs://bucket/set"], "only folders and s3://"),
        (["out=/proc/version/set", "vae=nowhere"], "/proc/version is a file"),
        (["limit=0"], "'limit' is 0"),
        (["device=gpu"], "'device' is 'gpu': give cpu, cuda or cuda:N"),
        (["device=cuda:9"], "'device' is 'cuda:9', but there are . GPUs"),
    ],
)
def test_wrong_settings_are_one_line_and_nothing_is_written(few, vae, tmp_path, capsys, options, message):
    given = arguments(few, vae, tmp_path / "set", workers=0)[2:]
    with pytest.raises(ValueError, match=message) as caught:
        encode_module.main(given + options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists()


def test_ctrl_c_is_one_line_and_code_130_and_the_same_command_goes_on(tree, few, vae, tmp_path, applications):
    command = arguments(tree, vae, tmp_path / "set", workers=4, samples_per_shard=20)
    worker = applications.start(*command)
    while not list((tmp_path / "set").glob("*.tar")):
        assert worker.running(), worker.log.read_text()
        time.sleep(0.05)
    for process in [worker.processes[0].pid, *descendants(worker.processes[0].pid)]:  # as a terminal does
        os.kill(process, signal.SIGINT)
    ended = worker.wait(60)
    assert ended.codes == [130] and ended.lines[-1] == "interrupted; the same command again goes on"
    assert not any(word in ended.output for word in ("Traceback", "Warning", "DataLoader")), ended.output


def test_a_source_that_cannot_be_read_is_one_line_from_a_decoding_process_too(
    few, vae, tmp_path, applications
):
    tree = tmp_path / "tree"
    for path in few.rglob("*.JPEG"):
        (tree / path.relative_to(few)).parent.mkdir(parents=True, exist_ok=True)
        (tree / path.relative_to(few)).symlink_to(path)
    victim = sorted(tree.rglob("*.JPEG"))[3]
    victim.unlink()
    victim.symlink_to(tmp_path / "nowhere")
    error = applications.refused(*arguments(tree, vae, tmp_path / "set", workers=1))
    assert victim.name in error and len(error) < 400


def test_another_vae_or_another_source_does_not_go_on_with_a_set(few, vae, tmp_path):
    encode(config(few, vae, tmp_path / "set", limit=20))
    other = save_small_vae(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="holds another set: vae_hash '[0-9a-f]{64}' there"):
        encode(config(few, other, tmp_path / "set", limit=20))
    with pytest.raises(ValueError, match="holds another set: .*source_hash"):
        encode(config(few, vae, tmp_path / "set", limit=21))
    same = save_small_vae(tmp_path / "same")  # elsewhere, but the same weights
    assert encode(config(few, same, tmp_path / "set", limit=20)).endswith("finished already")


FULL_AND_FREE = """
head -c {filler} /dev/zero > {disk}/filler && {command} && exit 1
test ! -e {disk}/set/manifest.json && rm {disk}/filler && {command} && cp -r {disk}/set {kept}
"""


def test_a_full_disk_is_one_line_and_with_space_again_the_set_is_completed(few, vae, tmp_path):
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    command = [sys.executable, *arguments(few, vae, disk / "set", samples_per_shard=16, batch=8, workers=0)]
    script = FULL_AND_FREE.format(filler=950_000, disk=disk, command=shlex.join(command), kept=kept)
    disk.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        on_small_disk(disk, "sh", "-c", script), cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (error,) = (line for line in finished.stderr.splitlines() if line.startswith("error: "))
    assert "No space left on device; free some space and run the same command again" in error
    encode(config(few, vae, tmp_path / "undisturbed"))
    assert bytes_of(kept) == bytes_of(tmp_path / "undisturbed")


def test_the_tars_are_read_by_webdataset_and_by_tar(undisturbed):
    tars = sorted(undisturbed.glob("*.tar"))
    listed = subprocess.run(
        ["tar", "tf", tars[0]], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert listed[:3] == [f"000000000.{name}" for name in ("cls", "moments.npy", "moments_flip.npy")]
    samples = list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False).decode())
    assert len(samples) == NUM_IMAGES
    x, y = ShardSet.open(undisturbed).read(np.arange(NUM_IMAGES))
    for i in range(0, NUM_IMAGES, 97):
        np.testing.assert_array_equal(samples[i]["moments.npy"], x[i])
        assert samples[i]["cls"] == y[i]


def objects_of(client, bucket: str, prefix: str) -> dict[str, str]:
    """Every object under a prefix, with the hash of its bytes, as a plain client reads them."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
    return {
        key.removeprefix(f"{prefix}/"): hashlib.sha256(
            client.get_object(Bucket=bucket, Key=key)["Body"].read()
        ).hexdigest()
        for key in keys
    }


@pytest.mark.timeout(600)
def test_a_set_on_s3_is_the_same_bytes_though_requests_fail_and_workers_are_killed(
    undisturbed, tree, vae, s3, faulty_s3, use_s3, applications
):
    server, proxy = faulty_s3
    proxy.faults = (*(Fault(0.2, (kind,), at_most=2) for kind in Kind), Fault(rate=0.1))
    use_s3(server)
    bucket, chance = s3.bucket(), random.Random(0)
    command = arguments(tree, vae, f"s3://{bucket}/sets/tree", workers=0)
    workers = [applications.start(*command) for _ in range(2)]
    for victim in (0, 1):
        time.sleep(chance.uniform(4.0, 6.0))
        workers[victim].kill(signal.SIGKILL)
        workers[victim].wait()
        workers[victim] = applications.start(*command)
    for worker in workers:
        assert worker.wait().codes == [0], worker.log.read_text()
    assert objects_of(s3.client(), bucket, "sets/tree") == bytes_of(undisturbed)
    assert all(proxy.counts[kind] >= 1 for kind in Kind), proxy.counts
    assert any("manifest.json" in line for line in proxy.requests)


@pytest.mark.parametrize("trouble", ["bucket", "secret", "denied"])
def test_a_bucket_that_cannot_be_used_is_one_line(trouble, few, vae, s3, s3_as_stranger, use_s3):
    bucket = s3.bucket()
    server, message = {
        "bucket": (s3, "there is no such bucket"),
        "secret": (dataclasses.replace(s3, secret_key="wrong"), "the secret key is wrong"),
        "denied": (s3_as_stranger, "access denied"),
    }[trouble]
    use_s3(server)
    place = f"s3://{bucket}{'-not' if trouble == 'bucket' else ''}/set"
    with pytest.raises(ValueError, match=f"{bucket}.*{message}") as caught:
        encode(config(few, vae, place))
    assert "\n" not in str(caught.value)
    assert objects_of(s3.client(), bucket, "set") == {}


def descendants(pid: int) -> set[int]:
    """All processes that a process started, and those that they started."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | descendants(child)
    return found


def test_a_killed_worker_leaves_no_process_behind(tree, vae, tmp_path, applications):
    out = tmp_path / "set"
    worker = applications.start(*arguments(tree, vae, out, workers=2))
    while not holders(out):
        assert worker.running(), worker.log.read_text()
        time.sleep(0.05)
    helpers = descendants(worker.processes[0].pid)
    assert len(helpers) >= 2
    worker.kill(signal.SIGKILL)
    worker.wait()
    end = time.monotonic() + 30
    while left := [pid for pid in helpers if _is_running(pid)]:
        assert time.monotonic() < end, left
        time.sleep(0.2)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
