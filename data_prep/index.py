"""From a tar to its index rows: where each sample's members lie, their checksums, and the label.

What a row means is drwkv.data.manifest's; who writes rows to disk is writer.py.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence

import google_crc32c
import numpy as np

from drwkv.data.manifest import FLIP_INDEX_ROW, INDEX_ROW, LABEL_MEMBER

Members = dict[str, tuple[int, int]]  # extension -> (offset, size) in the tar


def index_tar(
    path: str | os.PathLike[str], *, shard: int, members: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    """Keys and index rows of all samples in one tar, in file order.

    `members` names the extensions of the arrays, the main one first and the mirrored one, if any, second.
    Raises ValueError naming tar and key: not a whole tar, a member missing or unknown, a label that is none.
    """
    rows: list[tuple[int, ...]] = []
    keys: list[str] = []
    wanted = {*members, LABEL_MEMBER}
    with open(path, "rb") as file:
        for key, found in _samples(path):
            if found.keys() != wanted:
                raise ValueError(f"{path}: sample {key} has {sorted(found)}, expected {sorted(wanted)}")
            label = _read_label(file.fileno(), *found[LABEL_MEMBER], where=f"{path}: sample {key}")
            (offset, size, crc), *flip = (
                (offset, size, _crc32c(file.fileno(), offset, size, where=f"{path}: sample {key}"))
                for offset, size in (found[member] for member in members)
            )
            rows.append((offset, size, crc, shard, label, *(value for place in flip for value in place)))
            keys.append(key)
    return keys, np.array(rows, FLIP_INDEX_ROW if len(members) == 2 else INDEX_ROW)


def _samples(path: str | os.PathLike[str]) -> Iterator[tuple[str, Members]]:
    """Neighbouring members of one key, as WebDataset groups them: the key ends at the name's first dot."""
    key, found = "", Members()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, name = os.path.split(member.name)
                stem, _, extension = name.partition(".")
                if os.path.join(folder, stem) != key:
                    if found:
                        yield key, found
                    key, found = os.path.join(folder, stem), {}
                if extension in found:
                    raise ValueError(f"{path}: sample {key} has member {extension} twice")
                found[extension] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a whole tar ({error}); write this shard again") from None
    if found:
        yield key, found


def _crc32c(fd: int, offset: int, size: int, *, where: str) -> int:
    data = os.pread(fd, size, offset)
    if len(data) != size:
        raise ValueError(f"{where} is cut short: {len(data)} bytes at {offset}, expected {size}")
    return google_crc32c.value(data)


def _read_label(fd: int, offset: int, size: int, *, where: str) -> int:
    text = os.pread(fd, size, offset)
    try:
        return int(text.decode("ascii"))
    except ValueError:
        raise ValueError(f"{where} has label {text[:40]!r}, expected a whole number") from None
