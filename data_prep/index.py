"""Make a shard set of WebDataset tars that others wrote: an index and a manifest beside them, the tars as they are.

    python -m data_prep.index SET --scale 0.18215 --resolution 256       tars of KEY.moments.npy and KEY.cls
    python -m data_prep.index SET --member latent.npy --form moments --scale 0.18215 --resolution 256
    python -m data_prep.index SET --member image.npy --label-member none
    python -m data_prep.index SET --again                                after the tars have changed
    python -m data_prep.index SET --dali [FOLDER]                        index files for NVIDIA DALI, and nothing else

SET is a folder or s3://bucket/prefix that holds *.tar, which are taken in the order of their names. Shape and type come
from the first array, and each array must have the same npy header. Every byte is read once (on S3 until two reads
agree), so that the trainer can check what it reads; with --headers-only just tar headers, npy headers and labels, and
the set has no checksums. The manifest is written last; the same command again does what is missing, or says that all
is there. From a tar to its rows is tar_samples.py's.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep import dali
from data_prep.foreign_tars import (
    FORMS,
    KINDS,
    NO_LABEL,
    USUAL_MEMBERS,
    ArrayHeader,
    Told,
    draft_manifest,
    look_inside,
)
from data_prep.stored_set import counted
from data_prep.tar_reader import open_range
from data_prep.tar_samples import Sample, SampleLayout, read_samples, row_of
from data_prep.tar_stream import open_stream
from data_prep.unvouched import open_unvouched
from data_prep.writer import PLAN_NAME, hash_sources
from drwkv import command
from drwkv.data import manifest as layout
from drwkv.data.manifest import Manifest, ShardEntry
from drwkv.storage import TEMPORARY, Storage, is_remote, open_storage

__all__ = ["Told", "index_set"]


@dataclass(frozen=True)
class IndexedTar:
    """What is to be known of one tar."""

    entry: ShardEntry
    keys: list[str]
    rows: np.ndarray


def index_set(
    path: str, told: Told | None = None, *, again: bool = False, headers_only: bool = False, jobs: int = 8
) -> str:
    """Write index and manifest of the tars at `path`, a folder or S3 prefix; returns a summary in one line.

    Raises ValueError when the tars are no set or what is needed of them was not said; then nothing is written.
    """
    told = told or Told()
    storage, tars = open_storage(path), list_tars(path)
    before = _manifest_before(storage)
    if before is not None and not again:
        _check_unchanged(storage, before, told, tars, jobs)
        return f"{path}: finished already: {_counts(before.num_samples, tars)}"
    if before is not None:
        told = told.filled_from(before)
    source = open_unvouched(path)
    members, header = look_inside(source, tars[0], told)
    draft = draft_manifest(storage, told, members, header, checksums=not headers_only)

    def one(shard: int) -> IndexedTar:
        return _index_one(source, tars[shard], shard, members, header, headers_only=headers_only)

    with ThreadPoolExecutor(jobs) as pool:
        found = list(tqdm(pool.map(one, range(len(tars))), total=len(tars), unit="tar", disable=None))
    manifest = _write(storage, draft, found, told, replace=before is not None)
    shape = "x".join(map(str, manifest.sample_shape))
    return (
        f"{path}: {_counts(manifest.num_samples, tars)}, {manifest.kind} {shape} {manifest.dtype}, "
        + counted(manifest.num_classes, "class", "classes")
        + ("" if manifest.checksums else "; without checksums: damage to the values will not be seen")
    )


def _counts(num_samples: int, tars: list[str]) -> str:
    return f"{counted(num_samples, 'sample')} in {counted(len(tars), 'shard')}"


def list_tars(path: str) -> list[str]:
    """Names of the tars at `path` itself, not below it, sorted; ValueError when there are none."""
    if not is_remote(path) and not Path(path).is_dir():
        raise ValueError(f"{path}: no such folder; give a folder or s3://bucket/prefix that holds *.tar")
    names = [name for name in open_storage(path).names() if "/" not in name]
    if tars := [name for name in names if name.endswith(".tar")]:
        return tars
    packed = next((f"; {name} is compressed: unpack it first" for name in names if ".tar." in name), "")
    raise ValueError(f"{path}: holds no *.tar{packed}")


def _manifest_before(storage: Storage) -> Manifest | None:
    """The manifest of an earlier run of this command; ValueError when it is of another's making."""
    if storage.exists(PLAN_NAME):
        raise ValueError(
            f"{storage.path}: a set that is being written: run the data_prep command that writes it to its end"
        )
    try:
        text = storage.read(layout.MANIFEST_NAME).decode()
    except FileNotFoundError:
        return None
    manifest = Manifest.from_json(text, storage.where(layout.MANIFEST_NAME))
    if not manifest.member_names:
        raise ValueError(
            f"{storage.path}: a set of our own writing has its index; where it is damaged, restore the shard or encode "
            "it again"
        )
    return manifest


def _check_unchanged(storage: Storage, before: Manifest, told: Told, tars: list[str], jobs: int) -> None:
    """ValueError unless the set that is there is one of these tars, and is what was said."""
    advice = f"run `python -m data_prep.index {storage.path} --again`"
    if differences := told.differences(before):
        raise ValueError(
            f"{storage.path}: indexed already, otherwise: {'; '.join(differences)}; {advice} with that"
        )
    text = storage.read(layout.SHARD_LIST_NAME)
    if layout.sha256(text) != before.index_hash:
        raise ValueError(f"{storage.where(layout.SHARD_LIST_NAME)}: not of this manifest; {advice}")
    there = {entry.name: entry.num_bytes for entry in layout.shard_list_from_json(text.decode())}
    with ThreadPoolExecutor(jobs) as pool:
        now = dict(zip(tars, pool.map(storage.size, tars), strict=True))
    if changed := sorted(name for name in there.keys() | now.keys() if there.get(name) != now.get(name)):
        raise ValueError(
            f"{storage.path}: {changed[0]} has changed since the index was made "
            f"({there.get(changed[0], 'no')} bytes then, {now.get(changed[0], 'none')} now), "
            f"{counted(len(changed), 'tar')} changed in all; {advice}"
        )


def _index_one(
    source: Storage, tar: str, shard: int, members: SampleLayout, header: ArrayHeader, *, headers_only: bool
) -> IndexedTar:
    """Read one tar; ValueError naming tar and key when a sample is not like the others."""
    where = source.where(tar)
    keys: list[str] = []
    rows: list[tuple[int, ...]] = []
    opened = open_range(source, tar) if headers_only else open_stream(source, tar)
    with opened as reader:
        array_bytes = len(header.data) if headers_only else None
        for sample in read_samples(reader, members, where=where, array_bytes=array_bytes):
            for name in members.arrays:
                _check_array(sample, name, header, where)
            if "\n" in sample.key:
                raise ValueError(f"{where}: key {sample.key!r} holds a line break; name it otherwise")
            keys.append(sample.key)
            rows.append(row_of(sample, members, shard=shard, where=where, checksums=not headers_only))
        num_bytes = reader.seek(0, io.SEEK_END)
    if not keys:
        raise ValueError(f"{where}: holds no samples, members named KEY.EXTENSION; take it away")
    table = np.array(rows, members.row_dtype)
    return IndexedTar(ShardEntry(tar, len(keys), num_bytes, layout.sha256(table.tobytes())), keys, table)


def _check_array(sample: Sample, name: str, header: ArrayHeader, where: str) -> None:
    """ValueError unless the array has the same header as the first, and the bytes that this announces."""
    if sample.data[name].startswith(header.data) and sample.places[name].size == header.num_bytes:
        return
    what = f"{where}: sample {sample.key}: {name}"
    found = ArrayHeader.of(sample.data[name], what)
    if (found.shape, found.dtype) != (header.shape, header.dtype):
        raise ValueError(
            f"{what} is {found.dtype} {found.shape}, the set's first array {header.dtype} {header.shape}: "
            "all must be alike"
        )
    raise ValueError(
        f"{what} has {sample.places[name].size} bytes and a header of {len(found.data)}, expected {header.num_bytes} "
        f"and {len(header.data)}; write that array again"
    )


def _write(
    storage: Storage, draft: Manifest, found: list[IndexedTar], told: Told, *, replace: bool
) -> Manifest:
    """Index files, then the manifest."""
    names = [f"{tar.entry.name}/{key}" for tar in found for key in tar.keys]
    rows = np.concatenate([tar.rows for tar in found])
    num_classes = int(rows["label"].max()) + 1 if draft.label_member else 0
    if told.num_classes is not None:
        if num_classes > told.num_classes:
            raise ValueError(
                f"{storage.path}: {names[int(rows['label'].argmax())]} has label {num_classes - 1}, "
                f"but --num-classes is {told.num_classes}; give {num_classes} or more, or none"
            )
        num_classes = told.num_classes
    sources = "".join(f"{name}\n" for name in names).encode()
    shard_list = layout.shard_list_to_json([tar.entry for tar in found], layout.sha256(sources)).encode()
    manifest = dataclasses.replace(
        draft,
        num_classes=num_classes,
        num_samples=len(names),
        samples_per_shard=max(len(tar.keys) for tar in found),
        source_hash=hash_sources(names, rows["label"]),
        index_hash=layout.sha256(shard_list),
    )
    manifest.check(storage.path)
    storage.write(layout.SOURCES_NAME, sources)
    storage.write(layout.ROWS_NAME, layout.npy_bytes(rows))
    storage.write(layout.SHARD_LIST_NAME, shard_list)
    text = manifest.to_json().encode()
    if replace:
        storage.write(layout.MANIFEST_NAME, text)
    elif not storage.write_new(layout.MANIFEST_NAME, text):
        raise ValueError(
            f"{storage.where(layout.MANIFEST_NAME)}: another process has just indexed these tars otherwise"
        )
    if not is_remote(storage.path):
        with contextlib.suppress(OSError):
            shutil.rmtree(Path(storage.path) / TEMPORARY)
    return manifest


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.index", description="make a shard set of WebDataset tars that others wrote"
    )
    add = parser.add_argument
    add("set", help="folder or s3://bucket/prefix that holds *.tar")
    add("--kind", choices=sorted(set(KINDS.values())), help="what the arrays hold (told by their type)")
    add(
        "--form",
        choices=FORMS,
        help="what arrays of floats hold (told by name, channels or VAE, where they do)",
    )
    add("--scale", type=float, help="latents are (z - shift) * scale (the VAE's own)")
    add("--shift", type=float, help="see --scale (the VAE's own, or 0)")
    add("--vae", dest="vae_id", help="folder or hub name of the VAE that made the moments")
    add("--member", help=f"array member (one of {', '.join(USUAL_MEMBERS)})")
    add("--flip-member", help="member with the moments of the mirrored image (none)")
    add(
        "--label-member",
        help=f"member with the label, {NO_LABEL!r} for an unlabelled set ({layout.LABEL_MEMBER})",
    )
    add("--num-classes", type=int, help="labels are below it (the largest label + 1)")
    add("--resolution", type=int, help="height of the images in pixels (for moments: as the VAE has it)")
    add("--crop", choices=("none", "adm-center"), help="how the images were cropped (none)")
    add("--headers-only", action="store_true", help="read no values: faster, and no checksums")
    add("--again", action="store_true", help="index anew; what is not given stays as it is in the manifest")
    add(
        "--dali",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="write NVIDIA DALI's .idx files, beside the tars or there",
    )
    add("--jobs", type=int, default=8, help="tars read at once (8)")
    return parser


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    options = _parser().parse_args(arguments)
    if options.jobs < 1:
        raise ValueError(f"--jobs is {options.jobs}: give 1 or more")
    if options.dali is not None:
        tars, out = list_tars(options.set), options.dali or options.set
        dali.export(options.set, tars, out, jobs=options.jobs)
        print(f"{out}: {counted(len(tars), 'index file')} for DALI")
        return
    told = Told(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Told)})
    print(
        index_set(
            options.set, told, again=options.again, headers_only=options.headers_only, jobs=options.jobs
        )
    )


if __name__ == "__main__":
    command.run(main)
