"""The verify command finds each kind of damage and names shard and sample."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path

import foreign_sets
import numpy as np
import pytest
from faulty_proxy import Fault, Kind
from PIL import Image

from data_prep import verify
from data_prep.foreign_tars import Told
from data_prep.index import index_set
from data_prep.pictures import pick_samples
from data_prep.verify import BrokenSetError
from data_prep.writer import ShardSetWriter
from drwkv import command
from drwkv.data.manifest import Manifest
from drwkv.data.shards import ShardSet
from drwkv.storage import StorageError

TOLD = dataclasses.replace(foreign_sets.TOLD, form="moments")
MOMENTS = np.random.default_rng(0).standard_normal((20, 2, 2, 2)).astype(np.float16)


def write_set(out: Path, moments: np.ndarray) -> Path:
    manifest = Manifest(
        kind="moments",
        num_classes=3,
        channels=1,
        height=2,
        width=2,
        resolution=16,
        crop="adm-center",
        dtype="float16",
        seed=0,
        samples_per_shard=8,
        has_flip=True,
        vae_id="test/vae",
        vae_hash="0" * 64,
        scale=1.0,
        shift=0.0,
    )
    names = [f"s{i}" for i in range(20)]
    writer = ShardSetWriter(out, names=names, labels=np.arange(20) % 3, manifest=manifest)
    writer.write_arrays({"moments.npy": moments, "moments_flip.npy": moments[..., ::-1].copy()})
    for tar in out.glob("*.tar"):
        tar.chmod(0o644)
    return out


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("sound") / "set", MOMENTS)


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "set")


def overwrite(path: Path, sample_id: int, field: str, data: bytes, *, at: int = 0) -> Path:
    """Write `data` into the tar at (index field + at) of a sample; returns the tar."""
    shards = ShardSet.open(path)
    row = shards.rows_of(0) if sample_id < shards.shard_sizes[0] else None
    assert row is not None, "the tests damage the first shard"
    file = path / shards.shard_names[0]
    with open(file, "r+b") as stream:
        stream.seek(int(row[field][sample_id]) + at)
        stream.write(data)
    return file


def test_a_sound_set_is_summed_up_in_a_line(sound):
    summary = verify.verify(str(sound))
    assert "sound: 20 samples in 3 shards, moments 2x2x2 float16, 3 classes, 6 to 7 each" in summary
    assert (
        f"mean {MOMENTS.astype(np.float64).mean():.4g}, std {MOMENTS.astype(np.float64).std():.4g}" in summary
    )


@pytest.mark.parametrize("field", ["offset", "flip_offset"])
def test_a_flipped_byte_names_shard_and_sample(damaged, field):
    overwrite(damaged, 4, field, b"\x55\xaa", at=130)
    with pytest.raises(ValueError, match="sample 4 in shard-000000.tar differs .*crc32c") as caught:
        verify.verify(str(damaged))
    assert "\n" not in str(caught.value) and str(damaged) in str(caught.value)


def test_a_label_changed_in_the_tar_alone_is_found(damaged):
    # The label's file stands one 512-byte header and one block before the array's header.
    label = ShardSet.open(damaged).labels[2]
    overwrite(damaged, 2, "offset", b"%d" % ((label + 1) % 3), at=-1024)
    with pytest.raises(ValueError, match=f"sample 2 in shard-000000.tar differs .label {label} in the index"):
        verify.verify(str(damaged))


def test_a_broken_tar_header_names_the_shard(damaged):
    overwrite(damaged, 3, "offset", b"\xff" * 512, at=-512)
    with pytest.raises(ValueError, match="shard-000000.tar"):
        verify.verify(str(damaged))


def test_values_that_are_not_finite_name_shard_and_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(ShardSetWriter, "_check_arrays", lambda self, arrays, source: None)
    moments = MOMENTS.copy()
    moments[9, 0, 1, 1] = np.inf
    path = write_set(tmp_path / "set", moments)
    row = (path / "index/sources.txt").read_text().split().index("s9")
    with pytest.raises(ValueError, match=f"shard-00000.*tar: sample {row}: moments.npy is not finite"):
        verify.verify(str(path))


def test_a_changed_source_list_or_a_lost_shard_is_found(damaged):
    with open(damaged / "index/sources.txt", "a") as file:
        file.write("one more\n")
    with pytest.raises(ValueError, match="sources.txt: missing, or not of the hash"):
        verify.verify(str(damaged))
    os.unlink(damaged / "shard-000001.tar")
    with pytest.raises(ValueError, match="shard-000001.tar is missing"):
        verify.verify(str(damaged))


def test_the_command_prints_the_summary_or_one_line_and_code_2(sound, damaged, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["verify", str(sound)])
    with pytest.raises(SystemExit) as finished:
        command.run(verify.main)
    assert not finished.value.code
    assert "sound: 20 samples" in capsys.readouterr().out
    overwrite(damaged, 4, "offset", b"\x55\xaa", at=130)
    monkeypatch.setattr(sys, "argv", ["verify", str(damaged)])
    with pytest.raises(SystemExit) as exit_:
        command.run(verify.main)
    printed = capsys.readouterr()
    assert exit_.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1


def test_all_broken_samples_are_found_and_told_one_a_line(damaged, monkeypatch, capsys):
    broken = [0, 3, 5]
    for sample_id in reversed(broken):  # to open a set, its first sample is read
        overwrite(damaged, sample_id, "offset", b"\x55\xaa", at=130)
    os.truncate(damaged / "shard-000002.tar", 2000)
    with pytest.raises(
        BrokenSetError, match="sample 0 in shard-000000.tar differs.*, and 3 more; restore"
    ) as caught:
        verify.verify(str(damaged))
    assert [f"sample {i} in shard-000000.tar" in caught.value.problems[k] for k, i in enumerate(broken)] == [
        True
    ] * 3
    assert "shard-000002.tar has 2000 bytes, but had" in caught.value.problems[3]
    monkeypatch.setattr(sys, "argv", ["verify", str(damaged)])
    with pytest.raises(SystemExit) as exit_:
        command.run(verify.main)
    *told, last = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and told == caught.value.problems
    assert last == f"error: {caught.value}"


def test_of_many_broken_samples_the_first_20_are_told_and_all_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(ShardSetWriter, "_check_arrays", lambda self, arrays, source: None)
    path = write_set(tmp_path / "set", np.full_like(MOMENTS, np.nan))
    with pytest.raises(BrokenSetError, match="sample 0: moments.npy is not finite, and 39 more") as caught:
        verify.verify(str(path))
    assert len(caught.value.problems) == 20


def test_processes_find_what_one_finds(sound, damaged):
    assert verify.verify(str(sound), jobs=3) == verify.verify(str(sound))
    overwrite(damaged, 4, "offset", b"\x55\xaa", at=130)
    with pytest.raises(BrokenSetError) as alone:
        verify.verify(str(damaged))
    with pytest.raises(BrokenSetError) as together:
        verify.verify(str(damaged), jobs=3)
    assert str(alone.value) == str(together.value)


@pytest.mark.parametrize(("channel", "value", "said"), [
    (0, 60.0, "moments.npy has a latent of 60 in the model's units, the most is 50"),
    (1, -31.0, "moments.npy has log-variances from -31 to .*, expected -30 to 20"),
    (1, 21.0, "moments.npy has log-variances from .* to 21, expected -30 to 20"),
])  # fmt: skip
def test_values_that_no_latent_has_name_shard_and_sample(tmp_path, channel, value, said):
    moments = MOMENTS.copy()
    moments[9, channel, 0, 1] = value
    path = write_set(tmp_path / "set", moments)
    row = (path / "index/sources.txt").read_text().split().index("s9")
    with pytest.raises(BrokenSetError, match=f"sample {row}: {said}"):
        verify.verify(str(path))
    if channel == 0:
        assert "sound" in verify.verify(str(path), max_latent=100.0)


def test_the_table_holds_each_channels_mean_and_std_in_both_units(tmp_path):
    folder = foreign_sets.write_foreign_tars(tmp_path / "set")
    index_set(str(folder), TOLD)
    mean, log_variance = np.split(foreign_sets.MOMENTS.astype(np.float64), 2, axis=1)
    std = np.exp(log_variance / 2)
    lines = verify.verify(str(folder)).splitlines()[-2:]
    for c, line in enumerate(lines):
        m, s = mean[:, c].mean(), mean[:, c].std()
        drawn = np.sqrt(s**2 + (std[:, c] ** 2).mean()) * 0.5
        expected = [c, m, s, std[:, c].mean(), std[:, c].std(), (m - 0.1) * 0.5, s * 0.5, drawn]
        np.testing.assert_allclose([float(word) for word in line.split()], expected, rtol=6e-3, atol=1e-4)


def test_foreign_tars_that_are_newer_than_their_index_are_sent_to_the_indexer(tmp_path):
    folder = foreign_sets.write_foreign_tars(tmp_path / "set")
    index_set(str(folder), TOLD)
    assert "sound: 40 samples in 3 shards" in verify.verify(str(folder))
    remedy = f"run `python -m data_prep.index {folder} --again`"
    overwrite(folder, 2, "flip_offset", b"\x01", at=200)
    with pytest.raises(BrokenSetError, match="sample 2 .* in b-0.tar differs .flip_crc32c") as caught:
        verify.verify(str(folder))
    assert remedy in str(caught.value)
    shutil.copy(folder / "b-2.tar", folder / "b-0.tar")
    with pytest.raises(
        BrokenSetError, match="b-0.tar has .* bytes, but had .* when its index was made"
    ) as caught:
        verify.verify(str(folder))
    assert remedy in str(caught.value)


def test_without_checksums_values_are_looked_at_and_that_is_said(tmp_path):
    folder = foreign_sets.write_foreign_tars(tmp_path / "set")
    index_set(str(folder), TOLD, headers_only=True)
    assert "the index has no checksums" in verify.verify(str(folder))
    overwrite(folder, 2, "offset", np.float32(np.nan).tobytes(), at=128)
    with pytest.raises(BrokenSetError, match="b-0.tar: sample 2 .*: vae.mean_std.npy is not finite"):
        verify.verify(str(folder))


def test_log_variances_that_training_cuts_are_counted_in_tars_of_others(tmp_path):
    moments = np.zeros((3, 2, 2, 2), np.float16)
    moments[1, 1] = -40
    members = [(f"{i}.moments.npy", foreign_sets.npy(x)) for i, x in enumerate(moments)]
    foreign_sets.write_tar(tmp_path / "set/a.tar", members)
    index_set(str(tmp_path / "set"), Told(scale=1.0, resolution=16, label_member="none"))
    summary = verify.verify(str(tmp_path / "set"))
    assert "unlabelled" in summary and "4 log-variances lie outside [-30, 20]: training cuts them" in summary


LOST = (Kind.ERROR, Kind.RESET, Kind.ERROR_AFTER, Kind.RESET_AFTER, Kind.TRUNCATED)


def test_on_s3_each_tar_is_read_once_and_only_what_is_broken_there_is_told(
    sound, damaged, s3, faulty_s3, use_s3
):
    server, proxy = faulty_s3
    bucket = s3.bucket()
    for file in (path for path in sound.rglob("*") if path.is_file()):
        s3.client().upload_file(str(file), bucket, f"set/{file.relative_to(sound)}")
    use_s3(server)
    summary = verify.verify(f"s3://{bucket}/set")
    assert summary.replace(f"s3://{bucket}/set", str(sound)) == verify.verify(str(sound))
    reads = [line for line in proxy.requests if line.startswith("GET") and line.endswith(".tar")]
    assert len(reads) == len(set(reads)) == 3
    flips = (Fault(1.0, (Kind.FLIPPED_DOWN,), f"^GET .*{name}", at_most=2) for name in
             ("shard-000000.tar", "shard-000001.tar", "samples.npy", "shards.json", "manifest.json"))  # fmt: skip
    proxy.faults = (*flips, Fault(0.2, LOST))
    assert verify.verify(f"s3://{bucket}/set") == summary
    assert proxy.counts[Kind.FLIPPED_DOWN] == 10 and len(proxy.struck) > 10
    tar = overwrite(damaged, 4, "offset", b"\x55\xaa", at=130)
    s3.client().upload_file(str(tar), bucket, "set/shard-000000.tar")
    s3.client().delete_object(Bucket=bucket, Key="set/shard-000001.tar")
    proxy.faults = (Fault(0.2, LOST),)
    with pytest.raises(
        BrokenSetError, match="sample 4 in shard-000000.tar differs.*, and 1 more; "
    ) as caught:
        verify.verify(f"s3://{bucket}/set")
    assert caught.value.problems[1] == f"s3://{bucket}/set/shard-000001.tar is missing"
    with pytest.raises(StorageError, match="no such bucket"):
        verify.verify("s3://no-such-bucket/set")


def test_the_sheet_shows_random_samples_by_seed(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (200, 3, 4, 4)).astype(np.uint8)
    manifest = Manifest(kind="pixels", num_classes=0, channels=3, height=4, width=4, resolution=4, crop="none",
                        dtype="uint8", seed=0, samples_per_shard=100)  # fmt: skip
    writer = ShardSetWriter(tmp_path / "set", names=list(map(str, range(200))), labels=np.zeros(200, int),
                            manifest=manifest)  # fmt: skip
    writer.write_arrays({"img.npy": images})
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        verify.main([str(tmp_path / "set"), "--jobs", "1", "--sheet", str(tmp_path / name), "--seed", seed])
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'c'}: 64 samples\n")
    sheets = [(tmp_path / name).read_bytes() for name in "abc"]
    assert sheets[0] == sheets[1] != sheets[2]
    pixels = np.asarray(Image.open(tmp_path / "a"))
    # The first tile, each of its pixels enlarged, is a sample of the set.
    ids = pick_samples(200, 64, 0)
    first = ShardSet.open(tmp_path / "set").read(ids[:1])[0][0]
    np.testing.assert_array_equal(pixels[17:140:35, 17:140:35], first.transpose(1, 2, 0))


def test_a_sheet_that_cannot_be_drawn_is_a_line_and_code_2_behind_the_summary(
    sound, tmp_path, monkeypatch, capsys
):
    sheet, vae = tmp_path / "a.png", tmp_path / "no vae"
    arguments = [str(sound), "--jobs", "1", "--sheet", str(sheet), "--vae", str(vae)]
    monkeypatch.setattr(sys, "argv", ["verify", *arguments])
    with pytest.raises(SystemExit) as exit_:
        command.run(verify.main)
    printed = capsys.readouterr()
    assert exit_.value.code == 2 and "sound: 20 samples in 3 shards" in printed.out
    assert printed.err.startswith(f"error: {sheet}: no contact sheet: VAE {vae}: cannot be loaded")
    assert not sheet.exists()


def test_a_sheet_that_cannot_be_a_file_is_refused_before_the_work(sound, tmp_path, capsys):
    for sheet, said in ((tmp_path, "is a folder"), (tmp_path / "gone/a.png", "there is no folder .*gone")):
        with pytest.raises(ValueError, match=f"{sheet}: {said}"):
            verify.main([str(sound), "--jobs", "1", "--sheet", str(sheet)])
    assert not capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_sample_whose_key_is_not_its_row_is_named_by_both(tmp_path):
    folder = foreign_sets.write_foreign_tars(tmp_path / "set")
    index_set(str(folder), TOLD)
    overwrite(folder, 2, "offset", b"\x55\xaa", at=130)
    with pytest.raises(BrokenSetError, match=r"sample 2 \(train.v1/x/00002\.\*\) in b-0.tar differs"):
        verify.verify(str(folder))
