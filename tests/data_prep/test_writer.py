"""What the writer leaves behind: the same bytes by any road, kills included, and tars that others read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data_prep.tar_samples import index_tar
from data_prep.writer import ShardSetWriter, deal_out
from drwkv.data.manifest import Manifest
from drwkv.data.shards import ShardSet

NUM_SAMPLES = 90
MANIFEST = Manifest(
    kind="moments",
    num_classes=7,
    channels=2,
    height=4,
    width=4,
    resolution=32,
    crop="adm-center",
    dtype="float16",
    seed=11,
    samples_per_shard=16,
    has_flip=True,
    vae_id="test/vae",
    vae_hash="0" * 64,
    scale=0.5,
    shift=0.0,
)
MOMENTS = np.random.default_rng(0).standard_normal((NUM_SAMPLES, 4, 4, 4)).astype(np.float16)
ARRAYS = {"moments.npy": MOMENTS, "moments_flip.npy": MOMENTS[..., ::-1].copy()}
LABELS = np.arange(NUM_SAMPLES) % 7
NAMES = [f"n{i % 7:08d}/{i}.JPEG" for i in range(NUM_SAMPLES)]


def writer_for(out: Path, manifest: Manifest = MANIFEST) -> ShardSetWriter:
    return ShardSetWriter(out, names=NAMES, labels=LABELS, manifest=manifest)


def write_shard(writer: ShardSetWriter, shard: int) -> None:
    writer.write(
        shard, ({name: array[i] for name, array in ARRAYS.items()} for i in writer.sources_of(shard))
    )


def tree_hashes(root: Path) -> dict[str, str]:
    """Every file and folder below root, with the hash of its bytes."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(root.rglob("*"))
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "set"
    writer_for(out).write_arrays(ARRAYS)
    return out


def test_two_writes_in_another_shard_order_give_the_same_bytes(reference, tmp_path):
    writer = writer_for(tmp_path / "set")
    assert writer.missing() == list(range(6))
    for shard in (4, 0, 5, 2, 1, 3):
        write_shard(writer, shard)
    write_shard(writer, 2)  # a unit done twice is harmless
    writer.commit()
    assert tree_hashes(tmp_path / "set") == tree_hashes(reference)
    assert sorted(tree_hashes(reference))[:4] == [
        "index",
        "index/samples.npy",
        "index/shards.json",
        "index/sources.txt",
    ]


def test_another_seed_deals_the_samples_out_otherwise(reference, tmp_path):
    writer_for(tmp_path / "set", dataclasses.replace(MANIFEST, seed=12)).write_arrays(ARRAYS)
    ours, theirs = (Path(p, "index/sources.txt").read_text().split() for p in (reference, tmp_path / "set"))
    assert ours != theirs and sorted(ours) == sorted(theirs) == sorted(NAMES)
    permutation = deal_out(1000, 0)
    assert (
        sorted(permutation.tolist()) == list(range(1000))
        and abs(np.corrcoef(permutation, np.arange(1000))[0, 1]) < 0.1
    )


KILL_LOOP = """
import json, os, random, signal, sys, time
sys.path[:0] = sys.argv[2:]
from test_writer import ARRAYS, Path, writer_for
from data_prep.writer import ShardSetWriter
out, rand, outcomes = Path(sys.argv[1]), random.Random(0), []

def child():
    writer_for(out).write_arrays(ARRAYS)
    os._exit(0)

begin = time.perf_counter()
if (pid := os.fork()) == 0:
    out = out.with_name("timed")
    child()
os.waitpid(pid, 0)
whole = time.perf_counter() - begin
for attempt in range(200):
    if (pid := os.fork()) == 0:
        child()
    time.sleep(rand.random() * whole * (0.1 + 0.03 * attempt))  # the first ones die early on any machine
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    # What stands now must be readable, or not pretend to be a set.
    outcomes.append([os.WIFSIGNALED(status), (out / "manifest.json").exists(), len(list(out.glob("*.tar")))])
    if not os.WIFSIGNALED(status):
        break
print(json.dumps(outcomes))
"""


def test_a_writer_killed_again_and_again_ends_in_the_same_bytes(reference, tmp_path):
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    done = subprocess.run(
        [sys.executable, "-c", KILL_LOOP, str(tmp_path / "set"), *paths],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    kills = [outcome for outcome in outcomes if outcome[0]]
    assert len(kills) >= 3 and not outcomes[-1][0] and outcomes[-1][1], outcomes
    assert any(0 < tars < 6 for _, _, tars in kills), outcomes
    assert tree_hashes(tmp_path / "set") == tree_hashes(reference)


@pytest.mark.parametrize("fault_at", [0, 1, 2, 7, 12, 13, 14, 15, 16])  # of 1 + 2 * 6 + 4 renames
def test_a_writer_stopped_before_a_rename_ends_in_the_same_bytes(reference, tmp_path, monkeypatch, fault_at):
    calls, real = [], os.replace

    def stop(source: object, target: object) -> None:
        calls.append(target)
        if len(calls) == fault_at + 1:
            raise KeyboardInterrupt
        real(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        writer_for(tmp_path / "set").write_arrays(ARRAYS)
    monkeypatch.undo()
    assert not (tmp_path / "set/manifest.json").exists()
    with pytest.raises(ValueError, match="not a committed shard set.*its writing has not ended"):
        ShardSet.open(tmp_path / "set")
    writer_for(tmp_path / "set").write_arrays(ARRAYS)
    assert tree_hashes(tmp_path / "set") == tree_hashes(reference)


def test_lost_sidecars_are_made_anew_from_the_tars(reference, tmp_path):
    writer = writer_for(tmp_path / "set")
    for shard in range(6):
        write_shard(writer, shard)
    for part in (tmp_path / "set/index/parts").iterdir():
        part.unlink()
    writer.commit()
    assert tree_hashes(tmp_path / "set") == tree_hashes(reference)


def test_a_worker_that_is_overtaken_by_another_ends_quietly(reference, tmp_path):
    slow, fast = writer_for(tmp_path / "set"), writer_for(tmp_path / "set")

    def samples():
        for i in slow.sources_of(0):
            yield {name: array[i] for name, array in ARRAYS.items()}
        fast.write_arrays(ARRAYS)  # the other does all, commits and cleans up

    slow.write(0, samples())
    slow.commit()
    assert slow.missing() == []
    assert tree_hashes(tmp_path / "set") == tree_hashes(reference)


def test_unmodified_webdataset_reads_every_sample(reference):
    urls = [str(path) for path in sorted(reference.glob("*.tar"))]
    shards = ShardSet.open(reference)
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    plain, labels = shards.read(np.arange(NUM_SAMPLES))
    mirrored, _ = shards.read(np.arange(NUM_SAMPLES), np.ones(NUM_SAMPLES, bool))
    assert len(samples) == NUM_SAMPLES
    for i, sample in enumerate(samples):
        assert sample["__key__"] == f"{i:09d}" and sample["cls"] == labels[i]
        np.testing.assert_array_equal(sample["moments.npy"], plain[i])
        np.testing.assert_array_equal(sample["moments_flip.npy"], mirrored[i])
    sources = (reference / "index/sources.txt").read_text().split()
    np.testing.assert_array_equal(plain, MOMENTS[[NAMES.index(name) for name in sources]])


def test_tar_lists_the_members_with_fixed_owner_mode_and_time(reference):
    listing = subprocess.run(
        ["tar", "tvf", str(reference / "shard-000000.tar"), "--full-time", "--utc", "--numeric-owner"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert [line.split()[-1] for line in listing[:3]] == [
        "000000000.cls",
        "000000000.moments.npy",
        "000000000.moments_flip.npy",
    ]
    assert {tuple(line.split()[i] for i in (0, 1, 3, 4)) for line in listing} == {
        ("-r--r--r--", "0/0", "1970-01-01", "00:00:00")
    }


def test_a_folder_of_another_set_or_of_other_files_is_refused(reference, tmp_path):
    with pytest.raises(ValueError, match="holds another set: seed 11 there, 5 now"):
        writer_for(reference, dataclasses.replace(MANIFEST, seed=5))
    begun = tmp_path / "begun"
    writer_for(begun)
    with pytest.raises(ValueError, match="plan.json.*samples_per_shard 16 there, 8 now"):
        writer_for(begun, dataclasses.replace(MANIFEST, samples_per_shard=8))
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("")
    with pytest.raises(ValueError, match="not empty and no shard set .holds 'thesis.tex'"):
        writer_for(tmp_path / "home")
    with pytest.raises(ValueError, match="/proc/version is a file, but the shard set needs a folder"):
        writer_for(Path("/proc/version/set"))
    with pytest.raises(ValueError, match="6 of 6 shards are not written yet"):
        writer_for(begun).commit()
    with pytest.raises(ValueError, match="a file, but the shard set needs a folder"):
        writer_for(tmp_path / "home/thesis.tex")


def test_a_bad_source_is_named_and_its_shard_is_not_written(tmp_path):
    writer = writer_for(tmp_path / "set")
    source = int(writer.sources_of(1)[3])
    for bad, message in (
        (
            MOMENTS
            * np.where(np.arange(NUM_SAMPLES) == source, np.nan, 1)[:, None, None, None].astype(np.float16),
            "not finite",
        ),
        (MOMENTS.astype(np.float32), "is float32 .4, 4, 4., the set holds float16 .4, 4, 4."),
        (MOMENTS[:, :3], "is float16 .3, 4, 4."),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            writer.write(
                1, ({"moments.npy": bad[i], "moments_flip.npy": MOMENTS[i]} for i in writer.sources_of(1))
            )
        assert "\n" not in str(caught.value)
        if message == "not finite":
            assert NAMES[source] in str(caught.value)
    assert writer.missing() == list(range(6))
    with pytest.raises(ValueError, match=r"has label 7, expected 0\.\.6"):
        ShardSetWriter(tmp_path / "other", names=NAMES, labels=LABELS + 1, manifest=MANIFEST)


def test_tars_with_broken_samples_are_not_indexed(reference, tmp_path):
    tar = tmp_path / "shard.tar"
    data = (reference / "shard-000000.tar").read_bytes()
    tar.write_bytes(data[:700])
    with pytest.raises(ValueError, match="shard.tar"):
        index_tar(tar, shard=0, members=MANIFEST.members)
    tar.write_bytes(data)
    with pytest.raises(ValueError, match="sample 000000000 has .*moments_flip.npy.*expected"):
        index_tar(tar, shard=0, members=("moments.npy",))
    keys, rows = index_tar(tar, shard=0, members=MANIFEST.members)
    np.testing.assert_array_equal(rows, np.load(reference / "index/samples.npy")[: len(rows)])
    assert keys == [f"{i:09d}" for i in range(15)]


def test_the_same_call_restores_a_shard_that_was_deleted_and_refuses_other_values(reference, tmp_path):
    out = tmp_path / "set"
    writer_for(out).write_arrays(ARRAYS)
    (out / "shard-000002.tar").unlink()
    writer = writer_for(out)
    assert writer.missing() == [2]
    other = {name: array + np.float16(1) for name, array in ARRAYS.items()}
    with pytest.raises(
        ValueError, match="shard-000002.tar: written anew it has other values than the index says"
    ):
        writer.write_arrays(other)
    assert not (out / "shard-000002.tar").exists()
    writer.write_arrays(ARRAYS)
    assert tree_hashes(out) == tree_hashes(reference)


def test_the_same_call_restores_a_shard_that_was_cut(reference, tmp_path, caplog):
    out = tmp_path / "set"
    writer_for(out).write_arrays(ARRAYS)
    tar = out / "shard-000002.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    writer = writer_for(out)
    assert writer.missing() == [2] and not writer.is_finished(2)
    assert "shard-000002.tar: 5000 bytes, but the index says" in caplog.text
    other = {name: array + np.float16(1) for name, array in ARRAYS.items()}
    with pytest.raises(ValueError, match="shard-000002.tar: written anew it has other values"):
        writer.write_arrays(other)
    assert tar.stat().st_size == 5000
    writer.write_arrays(ARRAYS)
    assert writer.missing() == [] and tree_hashes(out) == tree_hashes(reference)


@pytest.mark.parametrize("name", ["index/samples.npy", "index/shards.json", "index/sources.txt"])
def test_a_committed_set_with_a_lost_or_damaged_index_is_refused_until_it_is_deleted(
    name, reference, tmp_path
):
    out = tmp_path / "set"
    writer_for(out).write_arrays(ARRAYS)
    for damage in (lambda: (out / name).write_bytes((out / name).read_bytes()[:100]), (out / name).unlink):
        damage()
        with pytest.raises(ValueError, match=f"{name}.*restore it, or delete the set and run the command"):
            writer_for(out)
    shutil.rmtree(out)
    writer_for(out).write_arrays(ARRAYS)
    assert tree_hashes(out) == tree_hashes(reference)


def test_a_set_without_its_manifest_or_with_a_broken_one_says_what_to_do(reference, tmp_path):
    out = tmp_path / "set"
    writer_for(out).write_arrays(ARRAYS)
    manifest = (out / "manifest.json").read_bytes()
    for broken in (manifest[:100], b"\xff" + manifest):
        (out / "manifest.json").write_bytes(broken)
        with pytest.raises(
            ValueError, match="manifest.json: not valid JSON.*restore that file, or delete all"
        ):
            writer_for(out)
    (out / "manifest.json").unlink()
    with pytest.raises(ValueError, match="'index/samples.npy' as a shard set does.*restore that from a copy"):
        writer_for(out)
    (out / "manifest.json").write_bytes(manifest)
    assert writer_for(out).missing() == [] and tree_hashes(out) == tree_hashes(reference)
