"""The show command says what a set is, and draws it, reading no more than it must."""

from __future__ import annotations

import time
from pathlib import Path

import foreign_sets
import numpy as np
import pytest
from PIL import Image
from small_vae import save_small_vae

from data_prep import show
from data_prep.foreign_tars import Told
from data_prep.index import index_set
from data_prep.pictures import decode_samples, pick_samples
from data_prep.stored_set import StoredSet
from data_prep.writer import ShardSetWriter, Skipped
from drwkv.data import manifest as layout
from drwkv.data.manifest import FLIP_INDEX_ROW, Manifest, ShardEntry
from drwkv.latents import hash_weights, load_vae

NUM_SAMPLES = 50


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_vae(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture(scope="module")
def latents(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Moments of 50 images, one left out."""
    out = tmp_path_factory.mktemp("latents") / "set"
    manifest = Manifest(
        kind="moments", num_classes=3, channels=4, height=4, width=4, resolution=16, crop="adm-center",
        dtype="float16", seed=7, samples_per_shard=20, vae_id=str(vae), vae_hash=hash_weights(load_vae(str(vae))),
        scale=0.18215, shift=0.0, encode_dtype="float32", encode_batch=32, encode_threads=1,
        class_names=["cat", "dog", "tench, Tinca tinca"],
    )  # fmt: skip
    names = [f"{i:04d}.JPEG" for i in range(NUM_SAMPLES + 1)]
    writer = ShardSetWriter(out, names=names, labels=np.arange(NUM_SAMPLES + 1) % 5 // 2, manifest=manifest)
    moments = np.random.default_rng(0).standard_normal((NUM_SAMPLES, 8, 4, 4)).astype(np.float16)
    for shard in writer.missing():
        sources = writer.sources_of(shard)
        writer.write(
            shard,
            (
                Skipped("is no image") if i == NUM_SAMPLES else {"moments.npy": moments[i]}
                for i in sources.tolist()
            ),
        )
    writer.commit()
    return out


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    show.main(list(map(str, arguments)))
    return capsys.readouterr().out.splitlines()


def test_all_that_the_manifest_and_the_index_say_is_printed(latents, vae, capsys):
    lines = shown(capsys, latents)
    manifest = layout.read_manifest(latents)
    sizes = [file.stat().st_size for file in sorted(latents.glob("*.tar"))]
    assert lines[0] == str(latents)
    said = {line[:12].strip(): line[12:] for line in lines[1:] if line[:12].strip()}
    assert said["samples"] == f"50, of {sum(sizes) / 50 / 1024:.1f} KiB each in the tars"
    assert said["shards"].startswith("3 of 16 to 17 samples (median 17), ")
    assert said["holds"] == "moments 8x4x4 float16 (moments.npy), of images of 16 px, crop adm-center"
    assert said["mirrored"] == "not there: train without flips"
    assert said["VAE"] == f"{vae}, weights sha256 {manifest.vae_hash[:12]}..."
    assert said["latents"] == "(z - 0) * 0.18215"
    assert said["encoded"] == "in float32, 32 images at once, on 1 CPU threads"
    assert (
        said["classes"]
        == "3, from 10 samples (tench, Tinca tinca) to 20 (cat), named cat, dog, tench, Tinca tinca"
    )
    assert said["left out"] == "1 of the sources" and "            0050.JPEG: is no image" in lines
    assert said["seed"] == "7 (at most 20 samples a shard)"
    assert (
        said["hashes"]
        == f"index sha256 {manifest.index_hash[:12]}..., sources sha256 {manifest.source_hash[:12]}..."
    )


def test_the_picture_is_drawn_by_the_vae_and_is_the_same_for_a_seed(latents, tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert (
            shown(capsys, latents, "--picture", tmp_path / name, "--seed", seed)[-1]
            == f"{tmp_path / name}: drawn"
        )
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b
    assert len(a) and c == a  # all 50 samples are drawn, whatever the seed
    whole = np.asarray(Image.open(tmp_path / "a"))
    # colours: decoded samples
    assert whole.shape[1] == 1200 and len(np.unique(whole.reshape(-1, 3), axis=0)) > 1000
    with pytest.raises(
        ValueError, match=f"{tmp_path / 'd'}: drawn without samples: VAE {tmp_path / 'no vae'}: cannot be"
    ):
        shown(capsys, latents, "--picture", tmp_path / "d", "--vae", tmp_path / "no vae")
    assert capsys.readouterr().out.startswith(str(latents))
    assert Image.open(tmp_path / "d").height < whole.shape[0]


def test_another_vae_than_the_sets_own_draws_nothing(latents, tmp_path):
    stored = StoredSet(latents)
    other = save_small_vae(tmp_path / "other", seed=1)
    x = stored.read(np.arange(2))
    assert decode_samples(stored, x).shape == (2, 16, 16, 3)
    with pytest.raises(ValueError, match="has not the weights that made this set"):
        decode_samples(stored, x, str(other))


def test_picked_samples_are_different_and_a_function_of_the_seed():
    for num_samples in (10, 65, 1024, 1025, 1_281_167):
        picked = pick_samples(num_samples, 64, seed=3)
        assert len(set(picked.tolist())) == len(picked) == min(num_samples, 64)
        assert picked.min() >= 0 and picked.max() < num_samples and (np.diff(picked) > 0).all()
        np.testing.assert_array_equal(picked, pick_samples(num_samples, 64, seed=3))
        assert num_samples <= 64 or not np.array_equal(picked, pick_samples(num_samples, 64, seed=4))
    assert abs(pick_samples(1_281_167, 1000, seed=0).mean() / 1_281_167 - 0.5) < 0.05


def test_a_sample_that_is_damaged_is_named_and_not_drawn(tmp_path):
    folder = foreign_sets.write_foreign_tars(tmp_path / "set")
    index_set(
        str(folder),
        Told(scale=1.0, resolution=32, member="vae.mean_std.npy", label_member="class", form="moments"),
    )
    stored = StoredSet(folder)
    np.testing.assert_array_equal(stored.read(np.array([7, 3])), foreign_sets.MOMENTS[[7, 3]])
    data = bytearray((folder / "b-0.tar").read_bytes())
    data[int(stored.rows_of(0)["offset"][3]) + 150] ^= 1
    (folder / "b-0.tar").write_bytes(data)
    with pytest.raises(ValueError, match="sample 3 in b-0.tar is corrupt.*data_prep.index .* --again"):
        show.main([str(folder), "--picture", str(tmp_path / "a.png")])
    assert not (tmp_path / "a.png").exists()


def test_a_lost_shard_or_a_folder_for_a_picture_is_one_line(tmp_path):
    folder = foreign_sets.write_foreign_tars(tmp_path / "set")
    index_set(
        str(folder),
        Told(scale=1.0, resolution=32, member="vae.mean_std.npy", label_member="class", form="moments"),
    )
    with pytest.raises(ValueError, match=f"{tmp_path}: is a folder, give the name of a file in it"):
        show.main([str(folder), "--picture", str(tmp_path)])
    (folder / "b-1.tar").unlink()
    with pytest.raises(ValueError, match="b-1.tar is missing, and sample .* is in it; restore it, or run"):
        show.main([str(folder), "--picture", str(tmp_path / "a.png")])
    assert not (tmp_path / "a.png").exists()


def test_a_set_on_s3_is_shown_from_its_index_alone(latents, s3, faulty_s3, use_s3, capsys, tmp_path):
    server, proxy = faulty_s3
    bucket = s3.bucket()
    for file in (path for path in latents.rglob("*") if path.is_file()):
        s3.client().upload_file(str(file), bucket, f"set/{file.relative_to(latents)}")
    use_s3(server)
    assert shown(capsys, f"s3://{bucket}/set")[1:] == shown(capsys, latents)[1:]
    assert not [line for line in proxy.requests if ".tar" in line]
    for name, path in (("a", f"s3://{bucket}/set"), ("b", latents)):
        shown(capsys, path, "--picture", tmp_path / name)
    there, here = (np.asarray(Image.open(tmp_path / name)) for name in "ab")
    np.testing.assert_array_equal(there[60:], here[60:])  # below the title, which is the path


def test_a_set_of_the_size_of_imagenet_is_shown_in_a_moment(tmp_path, capsys):
    num_samples, per_shard = 1_281_167, 1024
    rows = np.zeros(num_samples, FLIP_INDEX_ROW)
    rows["label"] = np.arange(num_samples) % 1000
    parts = [rows[at : at + per_shard] for at in range(0, num_samples, per_shard)]
    entries = [
        ShardEntry(f"shard-{i:06d}.tar", len(part), 37_000_000, layout.sha256(part.tobytes()))
        for i, part in enumerate(parts)
    ]
    shard_list = layout.shard_list_to_json(entries, "0" * 64).encode()
    manifest = Manifest(
        kind="moments", num_classes=1000, channels=4, height=32, width=32, resolution=256, crop="adm-center",
        dtype="float16", seed=0, samples_per_shard=per_shard, has_flip=True, scale=0.18215, shift=0.0,
        num_samples=num_samples, index_hash=layout.sha256(shard_list),
        skipped={f"n01440764/{i}.JPEG": "is cut short" for i in range(30)},
    )  # fmt: skip
    (tmp_path / "index").mkdir()
    (tmp_path / layout.SHARD_LIST_NAME).write_bytes(shard_list)
    np.save(tmp_path / layout.ROWS_NAME, rows)
    (tmp_path / layout.MANIFEST_NAME).write_text(manifest.to_json())
    started = time.monotonic()
    lines = shown(capsys, tmp_path)
    assert time.monotonic() - started < 2.0
    assert "samples     1,281,167, of 35.3 KiB each in the tars" in lines
    assert "classes     1,000, from 1,281 samples (167) to 1,282 (0)" in lines
    assert "            and 20 more: see skipped in the manifest" in lines
    assert sum("is cut short" in line for line in lines) == 10


@pytest.mark.parametrize(("break_it", "said"), [
    (lambda path: (path / "manifest.json").unlink(), "not a committed shard set"),
    (lambda path: (path / "index/samples.npy").unlink(), "index/samples.npy is missing, though there is a manifest"),
    (lambda path: (path / "index/shards.json").write_text("{}"), "index/shards.json: sha256 .*another|shards.json"),
])  # fmt: skip
def test_what_is_missing_is_one_line_and_code_2(tmp_path, applications, break_it, said):
    folder = foreign_sets.write_foreign_tars(tmp_path / "set")
    index_set(
        str(folder),
        Told(scale=1.0, resolution=32, member="vae.mean_std.npy", label_member="class", form="moments"),
    )
    break_it(folder)
    line = applications.refused("-m", "data_prep.show", str(folder))
    assert any(part in line for part in said.split("|")), line
