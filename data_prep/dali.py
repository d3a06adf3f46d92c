"""Index files for NVIDIA DALI's WebDataset reader, so that the same tars feed `fn.readers.webdataset`.

The format is that of DALI's own wds2idx, version 1.2: a line `v1.2 SAMPLES`, then for each sample one line of
`EXTENSION OFFSET SIZE NAME` for each member, all parted by single blanks; offsets are those of the bodies.
Files that are of no sample, such as `__info__.json`, are left out as WebDataset leaves them out; wds2idx takes those
for samples.
"""

from __future__ import annotations

import contextlib
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from data_prep.tar_reader import open_range, tar_members
from data_prep.tar_samples import split_name
from data_prep.unvouched import open_unvouched
from drwkv.storage import TEMPORARY, is_remote, open_storage

VERSION = "v1.2"


def index_text(reader: io.BufferedReader, *, where: str) -> str:
    """The index file of one tar; ValueError naming `where`: not a whole tar, no samples, a name with a blank."""
    lines: list[list[str]] = []
    last = None
    for member in tar_members(reader, where=where):
        if (name := split_name(member.name)) is None:
            continue
        key, extension = name
        if len(member.name.split()) != 1:
            raise ValueError(
                f"{where}: member {member.name!r} has a blank in its name, which DALI's index cannot hold"
            )
        if key != last:
            lines.append([])
            last = key
        lines[-1] += [extension, str(member.offset_data), str(member.size), member.name]
    if not lines:
        raise ValueError(f"{where}: holds no samples, members named KEY.EXTENSION")
    return "".join(f"{line}\n" for line in [f"{VERSION} {len(lines)}", *map(" ".join, lines)])


def export(path: str, tars: list[str], out: str, *, jobs: int) -> None:
    """Write TAR's name with .idx for .tar into `out`, a folder or S3 prefix, for each of the tars at `path`.

    ValueError when `out` is a file, or lies in one.
    """
    if not is_remote(out):
        there = next(place for place in (Path(out), *Path(out).absolute().parents) if place.exists())
        if not there.is_dir():
            raise ValueError(
                f"{there}: is a file; give --dali a folder, or nothing for index files beside the tars"
            )
    source, target = open_unvouched(path), open_storage(out)

    def one(tar: str) -> None:
        with open_range(source, tar) as reader:
            text = index_text(reader, where=source.where(tar))
        target.write(f"{tar.removesuffix('.tar')}.idx", text.encode())

    with ThreadPoolExecutor(jobs) as pool:
        for _ in tqdm(pool.map(one, tars), total=len(tars), unit="tar", disable=None):
            pass
    if not is_remote(out):
        with contextlib.suppress(OSError):  # others write there
            (Path(out) / TEMPORARY).rmdir()
