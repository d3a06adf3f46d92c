"""The verify command finds each kind of damage and names shard and sample."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep import verify
from data_prep.writer import ShardSetWriter
from drwkv import command
from drwkv.data.manifest import Manifest
from drwkv.data.shards import ShardSet

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
