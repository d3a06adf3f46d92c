"""Writing a shard set: the plan, one shard as one unit of work, and the commit.

The plan, which source goes into which shard and slot, is a pure function of the source list and the seed.
A shard is written to a temporary file, synced, and renamed; its index rows lie beside it as a sidecar until
`commit` gathers them and writes the manifest last. So any number of workers may write, any may be killed at
any time, and the same call again does what is missing and ends in the same bytes.

The layout is drwkv.data.manifest's. Where samples come from is digits.py's (and other sources').
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from webdataset.writer import TarWriter

from data_prep.index import index_tar
from drwkv import rng
from drwkv.data import manifest as layout
from drwkv.data.manifest import Manifest, ShardEntry

PLAN_NAME = "plan.json"  # the manifest to be, while the set is being written
_PARTS, _TEMPORARY = "index/parts", ".tmp"


def deal_out(num_samples: int, seed: int) -> np.ndarray:
    """The keyed permutation of the sources: (num_samples,) int64, row r of the set holds source [r]."""
    words = rng.bits(seed, rng.Purpose.SHARD_PLAN, torch.arange(num_samples), 2).numpy().astype(np.uint64)
    return np.argsort((words[:, 0] << np.uint64(32)) | words[:, 1], kind="stable")


def hash_sources(names: Sequence[str], labels: np.ndarray) -> str:
    """sha256 of the source list: what the plan is a function of, beside the seed."""
    digest = hashlib.sha256()
    for name, label in zip(names, labels.tolist(), strict=True):
        digest.update(f"{name}\t{label}\n".encode())
    return digest.hexdigest()


class ShardSetWriter:
    """Writes, or goes on writing, the shard set in folder `out`.

    `names` and `labels` are the source list in its canonical order, `manifest` what the set shall be (its
    source_hash, num_samples and index_hash are filled in here). One process or many work like this:

        writer = ShardSetWriter(out, names=names, labels=labels, manifest=manifest)
        for shard in writer.missing():
            writer.write(shard, ({"img.npy": load(names[i])} for i in writer.sources_of(shard)))
        writer.commit()

    or by `writer.write_arrays({"img.npy": images})` where all fits in memory. Raises ValueError when `out`
    holds another set, or files that are not of a set.
    """

    def __init__(
        self, out: str | os.PathLike[str], *, names: Sequence[str], labels: np.ndarray, manifest: Manifest
    ):
        self.out = Path(out)
        self.names, self.labels = names, labels
        self.manifest = dataclasses.replace(
            manifest, num_samples=len(names), source_hash=hash_sources(names, labels), index_hash=""
        )
        self.manifest.check(str(self.out))
        self._check_sources()
        self.num_shards = -(-len(names) // manifest.samples_per_shard)
        self._permutation = deal_out(len(names), manifest.seed)
        self._begin()

    def shard_name(self, shard: int) -> str:
        return f"shard-{shard:06d}.tar"

    def first_row(self, shard: int) -> int:
        """Sample id of the shard's first sample; shards differ in size by one sample at most."""
        return shard * len(self.names) // self.num_shards

    def sources_of(self, shard: int) -> np.ndarray:
        """Positions in the source list of the shard's samples, in the order in which `write` wants them."""
        return self._permutation[self.first_row(shard) : self.first_row(shard + 1)]

    def committed(self) -> bool:
        return (self.out / layout.MANIFEST_NAME).exists()

    def missing(self) -> list[int]:
        """Shards that no one has finished yet."""
        if self.committed():
            return []
        return [i for i in range(self.num_shards) if not (self.out / self.shard_name(i)).exists()]

    def write(self, shard: int, samples: Iterable[Mapping[str, np.ndarray]]) -> None:
        """Write one whole shard: `samples` gives the array members of each of `sources_of(shard)`, in order.

        Raises ValueError naming the source when an array is not what the manifest says, or not finite.
        """
        temporary = self._temporary(self.shard_name(shard))
        with self._unless_committed():
            keys = self._write_tar(temporary, shard, samples)
            found, rows = index_tar(temporary, shard=shard, members=self.manifest.members)
            assert found == keys, f"{temporary}: wrote keys {keys[:3]}..., reads back {found[:3]}..."
            # The sidecar first: where there is a finished shard, there are its rows.
            self._publish(layout.npy_bytes(rows), self._part(shard))
            self._rename(temporary, self.out / self.shard_name(shard))

    def write_arrays(self, arrays: Mapping[str, np.ndarray]) -> Manifest:
        """Write what is missing of the set and commit; `arrays`: each member of all sources (M, ...)."""
        for shard in self.missing():
            samples = ({name: array[i] for name, array in arrays.items()} for i in self.sources_of(shard))
            self.write(shard, samples)
        return self.commit()

    def commit(self) -> Manifest:
        """Gather the sidecars into the index and write the manifest, last; does nothing when that is done."""
        if not self.committed():
            if missing := self.missing():
                raise ValueError(
                    f"{self.out}: {len(missing)} of {self.num_shards} shards are not written yet "
                    f"(first: {self.shard_name(missing[0])}); write them before the commit"
                )
            with self._unless_committed():
                self._write_index()
        self._clean()
        return layout.read_manifest(self.out)

    def _write_tar(
        self, file_name: Path, shard: int, samples: Iterable[Mapping[str, np.ndarray]]
    ) -> list[str]:
        """The shard's samples as a synced tar; returns their keys."""
        keys: list[str] = []
        with open(file_name, "wb") as file:
            with TarWriter(file, user="", group="", mode=0o444, mtime=0, encoder=False) as tar:
                for source, arrays in zip(self.sources_of(shard).tolist(), samples, strict=True):
                    self._check_arrays(arrays, self.names[source])
                    keys.append(f"{self.first_row(shard) + len(keys):09d}")
                    sample: dict[str, object] = {name: layout.npy_bytes(a) for name, a in arrays.items()}
                    sample |= {"__key__": keys[-1], layout.LABEL_MEMBER: b"%d" % self.labels[source]}
                    tar.write(sample)
            _sync(file)
        return keys

    def _write_index(self) -> None:
        parts = [self._rows_of(shard) for shard in range(self.num_shards)]
        sources = "".join(f"{self.names[i]}\n" for i in self._permutation.tolist()).encode()
        entries = [self._entry(shard, rows) for shard, rows in enumerate(parts)]
        shard_list = layout.shard_list_to_json(entries, layout.sha256(sources)).encode()
        self._publish(sources, self.out / layout.SOURCES_NAME)
        self._publish(layout.npy_bytes(np.concatenate(parts)), self.out / layout.ROWS_NAME)
        self._publish(shard_list, self.out / layout.SHARD_LIST_NAME)
        whole = dataclasses.replace(self.manifest, index_hash=layout.sha256(shard_list))
        self._publish(whole.to_json().encode(), self.out / layout.MANIFEST_NAME)

    @contextlib.contextmanager
    def _unless_committed(self) -> Iterator[None]:
        """Another worker that ended the whole set meanwhile has taken our temporary files away: no error."""
        try:
            yield
        except FileNotFoundError:
            if not self.committed():
                raise

    def _begin(self) -> None:
        """Claim the folder for this plan, or find out that it holds another."""
        for name in (layout.MANIFEST_NAME, PLAN_NAME):
            file = self.out / name
            if not file.exists():
                continue
            begun = Manifest.from_json(file.read_text(encoding="utf-8"), str(file))
            differing = [
                f"{key} {getattr(begun, key)!r} there, {value!r} now"
                for key, value in dataclasses.asdict(self.manifest).items()
                if key != "index_hash" and getattr(begun, key) != value
            ]
            if differing:
                raise ValueError(
                    f"{file}: the folder holds another set: {'; '.join(differing)}; "
                    "give another folder, or delete this one"
                )
            break
        else:
            if strangers := [p.name for p in self._entries() if p.name != _TEMPORARY]:
                raise ValueError(
                    f"{self.out}: not empty and no shard set (holds {strangers[0]!r}); give another folder"
                )
            (self.out / _TEMPORARY).mkdir(parents=True, exist_ok=True)
            self._publish(self.manifest.to_json().encode(), self.out / PLAN_NAME)
        if not self.committed():
            (self.out / _TEMPORARY).mkdir(exist_ok=True)
            (self.out / _PARTS).mkdir(parents=True, exist_ok=True)

    def _entries(self) -> list[Path]:
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"{self.out}: a file, but the shard set needs a folder; give another path")
        return sorted(self.out.iterdir()) if self.out.exists() else []

    def _check_sources(self) -> None:
        labels, top = self.labels, max(self.manifest.num_classes - 1, 0)
        if len(labels) and not (0 <= labels.min() and labels.max() <= top):
            wrong = int(np.flatnonzero((labels < 0) | (labels > top))[0])
            raise ValueError(f"source {self.names[wrong]} has label {labels[wrong]}, expected 0..{top}")
        if bad := [name for name in self.names if "\n" in name or "\t" in name]:
            raise ValueError(f"source name {bad[0]!r} holds a line break or a tab; rename the file")

    def _check_arrays(self, arrays: Mapping[str, np.ndarray], source: str) -> None:
        assert set(arrays) == set(self.manifest.members), f"{set(arrays)} != {self.manifest.members}"
        for member, array in arrays.items():
            if array.shape != self.manifest.sample_shape or array.dtype != np.dtype(self.manifest.dtype):
                raise ValueError(
                    f"source {source}: {member} is {array.dtype} {array.shape}, "
                    f"the set holds {self.manifest.dtype} {self.manifest.sample_shape}"
                )
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ValueError(f"source {source}: {member} is not finite; encode in float32 or bfloat16")

    def _rows_of(self, shard: int) -> np.ndarray:
        if self._part(shard).exists():
            return np.load(self._part(shard), allow_pickle=False)
        return index_tar(self.out / self.shard_name(shard), shard=shard, members=self.manifest.members)[1]

    def _entry(self, shard: int, rows: np.ndarray) -> ShardEntry:
        name = self.shard_name(shard)
        return ShardEntry(name, len(rows), (self.out / name).stat().st_size, layout.sha256(rows.tobytes()))

    def _part(self, shard: int) -> Path:
        return self.out / _PARTS / f"{self.shard_name(shard)}.npy"

    def _temporary(self, name: str) -> Path:
        """A path of this process alone: a unit done twice at once is then harmless."""
        return self.out / _TEMPORARY / f"{name}.{socket.gethostname()}.{os.getpid()}"

    def _publish(self, data: bytes, target: Path) -> None:
        temporary = self._temporary(target.name)
        with open(temporary, "wb") as file:
            file.write(data)
            _sync(file)
        self._rename(temporary, target)

    def _rename(self, temporary: Path, target: Path) -> None:
        os.replace(temporary, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _clean(self) -> None:
        """Take away what only the writing needed; a set killed just here is cleaned by the next call."""
        for leftover in (_PARTS, _TEMPORARY):
            shutil.rmtree(self.out / leftover, ignore_errors=True)
        (self.out / PLAN_NAME).unlink(missing_ok=True)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
