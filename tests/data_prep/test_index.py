"""Tars that others wrote become a set that the trainer reads, whatever is odd about them; what cannot, is named."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import foreign_sets
import numpy as np
import pytest
from faulty_proxy import Fault, FaultyProxy, Kind
from foreign_sets import (
    KEYS,
    LABELS,
    MIRRORED,
    MOMENTS,
    NUM_CLASSES,
    NUM_SAMPLES,
    members_of,
    npy,
    write_tar,
)
from processes import Applications
from s3_server import S3Server
from small_vae import save_small_vae

from data_prep.foreign_tars import Told
from data_prep.index import index_set, main
from data_prep.writer import ShardSetWriter
from drwkv.data.manifest import Manifest, read_manifest
from drwkv.data.shards import ShardSet

TOLD = dataclasses.replace(foreign_sets.TOLD, form="moments")  # neither name nor 4 channels say so
ARGUMENTS = [
    "--form",
    "moments",
    "--scale",
    "0.5",
    "--shift",
    "0.1",
    "--resolution",
    "32",
    "--label-member",
    "class",
]
ARGUMENTS += ["--member", "vae.mean_std.npy", "--flip-member", "flipped.npy"]
Use = Callable[[S3Server], None]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    return foreign_sets.write_foreign_tars(tmp_path / "set")


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set that nobody changes."""
    folder = foreign_sets.write_foreign_tars(tmp_path_factory.mktemp("indexed") / "set")
    index_set(str(folder), TOLD)
    return folder


def bytes_of(folder: Path) -> dict[str, str]:
    """Every file below a folder, with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(path: Path | str, told: Told = TOLD, **options: bool) -> str:
    """The one line with which the tars are refused, nothing being left behind."""
    before = sorted(Path(path).rglob("*")) if Path(path).exists() else []
    with pytest.raises(ValueError) as caught:
        index_set(str(path), told, **options)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert before == (sorted(Path(path).rglob("*")) if Path(path).exists() else [])
    return str(caught.value)


def test_odd_tars_become_a_set_that_the_trainer_reads(indexed: Path):
    shards = ShardSet.open(indexed)
    x, y = shards.read(np.arange(NUM_SAMPLES))
    np.testing.assert_array_equal(x, MOMENTS)
    np.testing.assert_array_equal(y, LABELS)
    np.testing.assert_array_equal(shards.read(np.arange(40), np.ones(40, bool))[0], MIRRORED)
    manifest = shards.manifest
    assert (manifest.kind, manifest.sample_shape, manifest.dtype) == ("moments", (4, 4, 6), "float32")
    assert (manifest.scale, manifest.shift, manifest.resolution, manifest.num_classes) == (
        0.5,
        0.1,
        32,
        NUM_CLASSES,
    )
    assert shards.shard_names == ["b-0.tar", "b-1.tar", "b-2.tar"] and manifest.samples_per_shard == 15
    sources = (indexed / "index/sources.txt").read_text().splitlines()
    assert sources == [f"b-{i // 15}.tar/{KEYS[i]}" for i in range(NUM_SAMPLES)]
    assert sorted(path.name for path in indexed.iterdir()) == [*shards.shard_names, "index", "manifest.json"]


def test_a_flipped_bit_in_a_foreign_tar_is_seen_by_the_checksums(tars: Path):
    index_set(str(tars), TOLD)
    row = np.load(tars / "index/samples.npy")[3]
    with open(tars / "b-0.tar", "r+b") as file:
        file.seek(int(row["offset"]) + 200)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ValueError, match="sample 3 in b-0.tar .vae.mean_std.npy.*corrupt"):
        ShardSet.open(tars).read(np.array([3]))


def test_with_headers_only_the_same_places_come_without_checksums(tars: Path, indexed: Path):
    summary = index_set(str(tars), TOLD, headers_only=True)
    assert "without checksums" in summary and not read_manifest(tars).checksums
    rows, whole = np.load(tars / "index/samples.npy"), np.load(indexed / "index/samples.npy")
    assert not rows["crc32c"].any() and not rows["flip_crc32c"].any()
    for name in ("offset", "size", "shard", "label", "flip_offset", "flip_size"):
        np.testing.assert_array_equal(rows[name], whole[name])
    np.testing.assert_array_equal(ShardSet.open(tars).read(np.arange(NUM_SAMPLES))[0], MOMENTS)


def test_unlabelled_pixels_need_nothing_to_be_said_but_that(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8)).astype(np.uint8)
    write_tar(tmp_path / "set/x.tar", ((f"{i}.img.npy", npy(image)) for i, image in enumerate(images)))
    assert "give --label-member NAME, or --label-member none" in refused(tmp_path / "set", Told())
    main([str(tmp_path / "set"), "--label-member", "none"])
    shards = ShardSet.open(tmp_path / "set")
    assert (shards.num_classes, shards.manifest.kind, shards.manifest.resolution) == (0, "pixels", 8)
    np.testing.assert_array_equal(shards.read(np.arange(6))[0], images)


@pytest.mark.parametrize(("name", "channels", "form", "said"), [
    ("latent.npy", 4, None, "4 channels, as sampled latents usually have, and its name does not say what they are"),
    ("latent.npy", 16, None, "16 channels, and its name does not say what they are: give --form moments"),
    ("latent.npy", 3, None, "so an even number of channels"),
    ("latent.npy", 8, "sampled", "holds sampled latents of 8 channels"),
    ("latent.npy", 4, "moments", ""),
    ("latent.npy", 8, None, ""),
    ("moments.npy", 4, None, ""),
    ("vae.moments.npy", 16, None, ""),
])  # fmt: skip
def test_sampled_latents_are_not_taken_for_moments(
    tmp_path: Path, name: str, channels: int, form: str | None, said: str
):
    latents = np.random.default_rng(0).standard_normal((2, channels, 4, 4)).astype(np.float16)
    write_tar(tmp_path / "set/x.tar", ((f"{i}.{name}", npy(x)) for i, x in enumerate(latents)))
    told = Told(member=name, form=form, scale=0.18215, resolution=32, label_member="none")
    if said:
        line = refused(tmp_path / "set", told)
        assert said in line and ("latents.form=sampled latents.scale=0.18215" in line or channels == 3)
        return
    index_set(str(tmp_path / "set"), told)
    assert read_manifest(tmp_path / "set").channels == channels // 2


def test_tars_of_images_are_sent_to_the_encoder(tmp_path: Path):
    write_tar(tmp_path / "set/x.tar", [("0.jpg", b"JFIF" * 50), ("0.cls", b"0"), ("0.vit.npy", b"")])
    for told in (Told(), Told(member="jpg")):
        assert f"data_prep.encode source={tmp_path / 'set'} out=SET" in refused(tmp_path / "set", told)
    assert "vit.npy is no npy array" in refused(tmp_path / "set", Told(member="vit.npy"))


def bad_tar(case: str, folder: Path) -> None:
    """`folder` with three sound tars, the middle one made bad."""
    foreign_sets.write_foreign_tars(folder)
    tar, members = folder / "b-1.tar", [list(members_of(i)) for i in (15, 16, 17)]
    array = members[1][0][0]
    if case == "no mark of its end":
        data = tar.read_bytes()
        with tarfile.open(tar) as opened:
            end = max(m.offset_data + -(-m.size // 512) * 512 for m in opened)
        tar.write_bytes(data[:end])
        return
    if case == "cut short":
        tar.write_bytes(tar.read_bytes()[:5000])
        return
    if case == "no samples":
        members = []
    elif case == "no number":
        members[1][3] = (members[1][3][0], b"cat")
    elif case == "negative":
        members[1][3] = (members[1][3][0], b"-1")
    elif case == "a member is missing":
        del members[1][2]
    elif case == "a member twice":
        members[1].append(members[1][0])
    elif case == "another shape":
        members[1][0] = (array, npy(MOMENTS[0][:2]))
    elif case == "another type":
        members[1][0] = (array, npy(MOMENTS[0].astype(np.float64)))
    elif case == "bytes behind":
        members[1][0] = (array, npy(MOMENTS[0]) + b"x")
    elif case == "no npy":
        members[1][0] = (array, b"JFIF" * 50)
    write_tar(tar, (member for sample in members for member in sample))


@pytest.mark.parametrize("headers_only", [False, True])
@pytest.mark.parametrize(("case", "said"), [
    ("no mark of its end", "not a whole tar (ends at byte"),
    ("cut short", "not a whole tar"),
    ("no samples", "holds no samples"),
    ("no number", "00016 has label b'cat', expected a whole number"),
    ("negative", "00016 has label b'-1', expected a whole number"),
    ("a member is missing", "00016 has ['class', 'json', 'vae.mean_std.npy'], expected"),
    ("a member twice", "00016 has member vae.mean_std.npy twice"),
    ("another shape", "00016: vae.mean_std.npy is float32 (2, 4, 6), the set's first array float32 (4, 4, 6)"),
    ("another type", "00016: vae.mean_std.npy is an array of float64 (4, 4, 6)"),
    ("bytes behind", "00016: vae.mean_std.npy has 513 bytes and a header of 128, expected 512 and 128"),
    ("no npy", "00016: vae.mean_std.npy is no npy array"),
])  # fmt: skip
def test_a_bad_tar_is_named_and_nothing_is_written(tmp_path: Path, case: str, said: str, headers_only: bool):
    bad_tar(case, tmp_path / "set")
    line = refused(tmp_path / "set", headers_only=headers_only)
    assert "b-1.tar" in line and said in line


@pytest.mark.parametrize(("told", "said"), [
    ({}, "give --member NAME for the one that is the array"),
    ({"member": "vae.mean_std.npy"}, "give --label-member NAME, or --label-member none"),
    ({"label_member": "class", "member": "vae.mean_std.npy", "form": "moments"},
     "the tars do not say --scale and --resolution: give it, or --vae FOLDER"),
    ({**vars(TOLD), "kind": "pixels"}, "--kind is pixels, but vae.mean_std.npy holds float32"),
    ({**vars(TOLD), "num_classes": 3}, "has label 4, but --num-classes is 3; give 5 or more, or none"),
    ({**vars(TOLD), "label_member": "none", "num_classes": 3}, "--num-classes is 3, but the set is to have no labels"),
    ({**vars(TOLD), "flip_member": "gone"}, "has ['class', 'flipped.npy', 'json', 'vae.mean_std.npy'], expected"),
    ({**vars(TOLD), "member": "json"}, "json is no npy array"),
    ({**vars(TOLD), "form": None}, "has 4 channels, as sampled latents usually have, and its name does not say"),
    ({**vars(TOLD), "form": "sampled"}, "holds sampled latents of 4 channels, and training needs moments"),
])  # fmt: skip
def test_what_should_be_said_is_asked_for(tars: Path, told: dict, said: str):
    assert said in refused(tars, Told(**told))


def test_places_without_tars_and_sets_of_our_own_are_refused(tmp_path: Path):
    assert "no such folder" in refused(tmp_path / "gone")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed/a.tar.gz").write_bytes(b"")
    assert "holds no *.tar; a.tar.gz is compressed: unpack it first" in refused(tmp_path / "packed")
    ours = tmp_path / "ours"
    manifest = Manifest(kind="pixels", num_classes=1, channels=1, height=2, width=2, resolution=2, crop="none",
                        dtype="uint8", seed=0, samples_per_shard=2)  # fmt: skip
    writer = ShardSetWriter(ours, names=list("abcd"), labels=np.zeros(4, int), manifest=manifest)
    images = np.zeros((4, 1, 2, 2), np.uint8)
    writer.write(0, ({"img.npy": images[i]} for i in writer.sources_of(0)))
    assert "a set that is being written" in refused(ours)
    writer.write_arrays({"img.npy": images})
    assert "restore the shard or encode it again" in refused(ours, again=True)


def test_changed_tars_are_refused_until_they_are_indexed_again(tars: Path, indexed: Path):
    index_set(str(tars), TOLD)
    assert bytes_of(tars) == bytes_of(indexed)
    assert "finished already: 40 samples in 3 shards" in index_set(str(tars))
    assert "indexed already, otherwise: scale 0.5 there, 0.7 now" in refused(tars, Told(scale=0.7))
    write_tar(tars / "b-2.tar", (member for i in (3, 2, 1) for member in members_of(i)))
    write_tar(tars / "b-3.tar", members_of(39))
    line = refused(tars)
    assert "b-2.tar has changed since the index was made" in line and "2 tars changed in all" in line
    assert f"run `python -m data_prep.index {tars} --again`" in line
    index_set(str(tars), again=True)  # what was said before still holds
    x, y = ShardSet.open(tars).read(np.arange(34))
    order = [*range(30), 3, 2, 1, 39]
    np.testing.assert_array_equal(x, MOMENTS[order])
    np.testing.assert_array_equal(y, LABELS[order])
    assert "form 'moments' there, 'sampled' now" in refused(tars, Told(form="sampled"))
    assert "latents.form=sampled latents.scale=0.5" in refused(tars, Told(form="sampled"), again=True)
    index_set(str(tars), Told(scale=0.7), again=True)
    assert read_manifest(tars).scale == 0.7 and read_manifest(tars).shift == 0.1
    index_set(str(tars), Told(label_member="none"), again=True)
    assert ShardSet.open(tars).num_classes == 0
    index_set(str(tars), Told(label_member="class"), again=True)
    assert ShardSet.open(tars).num_classes == 5


def test_scale_resolution_and_hash_come_from_a_vae_that_can_be_loaded(tmp_path: Path, capsys):
    vae = save_small_vae(tmp_path / "vae", scale=0.25)
    moments = np.zeros((2, 8, 4, 4), np.float16)
    for name in ("set", "set2"):
        members = [(f"{i}.{end}", data) for i in range(2) for end, data in
                   (("moments.npy", npy(moments[i])), ("cls", b"0"))]  # fmt: skip
        write_tar(tmp_path / name / "x.tar", members)
    index_set(str(tmp_path / "set"), Told(vae_id=str(vae)))
    manifest = read_manifest(tmp_path / "set")
    assert (manifest.scale, manifest.shift, manifest.resolution) == (0.25, 0.0, 16)
    assert manifest.vae_id == str(vae) and len(manifest.vae_hash or "") == 64
    for latents, said in ((4, "holds sampled latents of 4 channels"), (6, "the tars hold 3")):
        write_tar(tmp_path / f"of{latents}/x.tar", [("0.z.npy", npy(np.zeros((latents, 4, 4), np.float16)))])
        told = Told(vae_id=str(vae), member="z.npy", label_member="none")
        assert said in refused(tmp_path / f"of{latents}", told)
    gone = str(tmp_path / "no such/vae")
    index_set(str(tmp_path / "set2"), Told(vae_id=gone, scale=0.3, resolution=16))
    assert "cannot be loaded" in capsys.readouterr().out
    assert (
        read_manifest(tmp_path / "set2").vae_id == gone and read_manifest(tmp_path / "set2").vae_hash is None
    )


KILL_LOOP = """
import os, random, signal, sys, time
sys.path[:0] = sys.argv[2:]
from test_index import TOLD, index_set
chance, kills = random.Random(1), 0
for attempt in range(200):
    if (pid := os.fork()) == 0:
        index_set(sys.argv[1], TOLD)
        os._exit(0)
    time.sleep(chance.random() * 0.05)
    os.kill(pid, signal.SIGKILL)
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    kills += killed
    if not killed and kills >= 5:
        break
print(kills)
"""


def test_indexing_killed_again_and_again_ends_in_the_same_bytes(tars: Path, indexed: Path, root: Path):
    paths = [str(Path(__file__).parent), str(root / "tests/support"), str(root)]
    done = subprocess.run(
        [sys.executable, "-c", KILL_LOOP, str(tars), *paths],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 5
    assert bytes_of(tars) == bytes_of(indexed)


@pytest.mark.parametrize("fault_at", range(4))  # sources, rows, shard list, manifest
def test_indexing_again_that_is_stopped_half_way_is_completed_by_the_same_command(
    tars: Path, monkeypatch: pytest.MonkeyPatch, fault_at: int
):
    index_set(str(tars), TOLD)
    write_tar(tars / "b-2.tar", (member for i in (3, 2, 1) for member in members_of(i)))
    calls, real = [], os.replace

    def stop(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == fault_at + 1:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        index_set(str(tars), again=True)
    monkeypatch.undo()
    with pytest.raises(ValueError):
        ShardSet.open(tars)
    index_set(str(tars), again=True)
    np.testing.assert_array_equal(ShardSet.open(tars).labels, LABELS[[*range(30), 3, 2, 1]])


LOST = (Kind.ERROR, Kind.RESET, Kind.ERROR_AFTER, Kind.RESET_AFTER, Kind.TRUNCATED)


@pytest.mark.parametrize("headers_only", [False, True])
def test_on_s3_broken_answers_leave_the_same_bytes_as_in_a_folder(
    headers_only: bool,
    tars: Path,
    s3: S3Server,
    faulty_s3: tuple[S3Server, FaultyProxy],
    use_s3: Use,
    tmp_path: Path,
):
    server, proxy = faulty_s3
    bucket = s3.bucket()
    for tar in tars.iterdir():
        s3.client().upload_file(str(tar), bucket, f"some/where/{tar.name}")
    use_s3(server)
    flips = (Fault(1.0, (Kind.FLIPPED_DOWN,), f"^GET .*b-{i}.tar", at_most=3) for i in range(3))
    proxy.faults = (*flips, Fault(0.3, LOST))
    index_set(f"s3://{bucket}/some/where", TOLD, headers_only=headers_only)
    assert proxy.counts[Kind.FLIPPED_DOWN] == 9 and len(proxy.struck) >= 13, proxy.counts
    proxy.faults = ()
    assert "finished already" in index_set(f"s3://{bucket}/some/where")
    index_set(str(tars), TOLD, headers_only=headers_only)
    for name in ("manifest.json", "index/samples.npy", "index/shards.json", "index/sources.txt"):
        there = s3.client().get_object(Bucket=bucket, Key=f"some/where/{name}")["Body"].read()
        assert there == (tars / name).read_bytes(), name


def test_a_tar_that_comes_in_many_parts_from_s3_gives_the_same_rows(
    indexed: Path, s3: S3Server, use_s3: Use, monkeypatch: pytest.MonkeyPatch
):
    bucket = s3.bucket()
    for tar in indexed.glob("*.tar"):
        s3.client().upload_file(str(tar), bucket, f"set/{tar.name}")
    use_s3(s3)
    monkeypatch.setattr("drwkv.s3.PART_BYTES", 3001)
    index_set(f"s3://{bucket}/set", TOLD)
    rows = s3.client().get_object(Bucket=bucket, Key="set/index/samples.npy")["Body"].read()
    assert rows == (indexed / "index/samples.npy").read_bytes()


def test_the_command_ends_with_a_line_and_the_same_again_says_that_it_is_done(
    tars: Path, applications: Applications
):
    command = ["-m", "data_prep.index", str(tars), *ARGUMENTS]
    line = applications.run(*command).lines[-1]
    assert line == f"{tars}: 40 samples in 3 shards, moments 4x4x6 float32, 5 classes"
    assert "finished already" in applications.run(*command).lines[-1]
    os.truncate(tars / "b-1.tar", 4000)
    assert "b-1.tar has changed" in applications.refused(*command)
    assert "not a whole tar" in applications.refused(*command, "--again")


# DALI's documented index: `v1.2 SAMPLES`, then one line a sample of EXTENSION OFFSET SIZE NAME for each member.


def test_dali_index_files_say_where_each_member_is(tars: Path, tmp_path: Path):
    write_tar(tars / "b-2.tar", (member for i in range(30, 40) for member in members_of(i)[::-1]))
    main([str(tars), "--dali", str(tmp_path / "idx")])
    assert sorted(path.name for path in (tmp_path / "idx").glob("*.idx")) == ["b-0.idx", "b-1.idx", "b-2.idx"]
    for shard, first in enumerate((0, 15, 30)):
        data = (tars / f"b-{shard}.tar").read_bytes()
        head, *lines = (tmp_path / f"idx/b-{shard}.idx").read_text().splitlines()
        assert head == f"v1.2 {len(lines)}" and len(lines) == (15, 15, 10)[shard]
        for i, line in enumerate(lines, first):
            words = line.split(" ")
            found = {}
            for extension, offset, size, name in zip(*(iter(words),) * 4, strict=True):
                assert name == f"{KEYS[i]}.{extension}"
                found[name] = data[int(offset) : int(offset) + int(size)]
            assert found == dict(members_of(i))


def test_dali_index_files_stand_beside_the_tars_of_a_committed_set_and_change_nothing_else(
    indexed: Path, tmp_path
):
    copy = shutil.copytree(indexed, tmp_path / "set")
    main([str(copy), "--dali"])
    added = bytes_of(copy).keys() - bytes_of(indexed).keys()
    assert added == {"b-0.idx", "b-1.idx", "b-2.idx"}
    assert bytes_of(indexed).items() <= bytes_of(copy).items()
    assert not (copy / ".tmp").exists()
    for file in (copy / "manifest.json", copy / "manifest.json/idx"):
        with pytest.raises(ValueError, match="manifest.json: is a file; give --dali a folder"):
            main([str(copy), "--dali", str(file)])
    write_tar(tmp_path / "blank/a.tar", [("a b.cls", b"1")])
    with pytest.raises(ValueError, match="a.tar: member 'a b.cls' has a blank in its name"):
        main([str(tmp_path / "blank"), "--dali"])
