"""Writing a shard set: the plan, one shard as one unit of work, and the commit; in a folder or on S3.

The plan, which source goes into which shard and slot, is a pure function of the source list and the seed.
A shard is written to a temporary file and put in place whole; its index rows lie beside it as a sidecar until
`commit` gathers them and writes the manifest last. So any number of workers may write, any may be killed at
any time, and the same call again does what is missing and ends in the same bytes.

The layout is drwkv.data.manifest's. Where samples come from is digits.py's and encode.py's; who writes which shard
is leases.py's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import torch
from webdataset.writer import TarWriter

from data_prep.stored_set import StoredSet
from data_prep.tar_samples import index_tar
from data_prep.unvouched import open_unvouched
from drwkv import rng
from drwkv.data import manifest as layout
from drwkv.data.manifest import Manifest, ShardEntry
from drwkv.storage import TEMPORARY, is_remote, no_space_is_named, open_storage

log = logging.getLogger("drwkv")

PLAN_NAME = "plan.json"  # the manifest to be, while the set is being written
PARTS, CLAIMS = "index/parts", "index/claims"  # sidecars of shards, and leases; gone after the commit
SCRATCH = "drwkv"  # begin of the names of tars that are not in place yet
_REQUESTS = 16  # small files read or removed at once
_OURS = re.compile(r"shard-\d{6,}\.tar|index/(samples\.npy|shards\.json|sources\.txt)")


@dataclass(frozen=True)
class Skipped:
    """In place of a sample's arrays: its source is left out of the set."""

    reason: str  # one line


def deal_out(num_samples: int, seed: int) -> np.ndarray:
    """The keyed permutation of the sources: (num_samples,) int64, row r of the plan holds source [r]."""
    words = rng.bits(seed, rng.Purpose.SHARD_PLAN, torch.arange(num_samples), 2).numpy().astype(np.uint64)
    return np.argsort((words[:, 0] << np.uint64(32)) | words[:, 1], kind="stable")


def hash_sources(names: Sequence[str], labels: np.ndarray) -> str:
    """sha256 of the source list: what the plan is a function of, beside the seed."""
    digest = hashlib.sha256()
    for name, label in zip(names, labels.tolist(), strict=True):
        digest.update(f"{name}\t{label}\n".encode())
    return digest.hexdigest()


def check_place(out: str | os.PathLike[str]) -> str | None:
    """The name of the manifest or plan that `out` holds, None where a new set can begin; nothing is written.

    Raises ValueError for a place that no set can be written to, or that holds files of others.
    """
    storage = open_storage(out)
    if not is_remote(out):
        there = next(path for path in (Path(out), *Path(out).absolute().parents) if path.exists())
        if not there.is_dir():
            raise ValueError(f"{out}: {there} is a file, but the shard set needs a folder; give another path")
    for name in (layout.MANIFEST_NAME, PLAN_NAME):
        with contextlib.suppress(FileNotFoundError):
            storage.read(name)
            return name
    if not is_remote(out) and not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{out}: {there} cannot be written to; give another path, or mend its permissions")
    strangers = [
        name for name in storage.names(settled=False) if not name.startswith((f"{PARTS}/", f"{CLAIMS}/"))
    ]
    if not strangers:
        return None
    for name in (PLAN_NAME, layout.MANIFEST_NAME):  # another worker has just written it
        if storage.exists(name):
            return name
    if ours := [name for name in strangers if _OURS.fullmatch(name)]:
        raise ValueError(
            f"{out}: holds {ours[0]!r} as a shard set does, but no {layout.MANIFEST_NAME}; restore that from a copy, "
            "give another folder, or, if this was such a set, delete all that is in it and run the same command again"
        )
    raise ValueError(f"{out}: not empty and no shard set (holds {strangers[0]!r}); give another folder")


class ShardSetWriter:
    """Writes, or goes on writing, the shard set `out`, a folder or S3 prefix.

    `names` and `labels` are the source list in its canonical order, `manifest` what the set shall be (its
    source_hash, num_samples, skipped and index_hash are filled in here). One process or many work like this:

        writer = ShardSetWriter(out, names=names, labels=labels, manifest=manifest)
        for shard in writer.missing():
            writer.write(shard, ({"img.npy": load(names[i])} for i in writer.sources_of(shard)))
        writer.commit()

    or by `writer.write_arrays({"img.npy": images})` where all fits in memory. `scratch` is the local folder where
    tars are made before they go up to S3. Raises ValueError when `out` holds another set, or files that are not of one.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        *,
        names: Sequence[str],
        labels: np.ndarray,
        manifest: Manifest,
        scratch: str | os.PathLike[str] | None = None,
    ):
        self.out = os.fspath(out)
        self.storage = open_storage(out)
        self.names, self.labels = names, labels
        self.manifest = dataclasses.replace(
            manifest, num_samples=len(names), source_hash=hash_sources(names, labels), index_hash=""
        )
        self.manifest.check(self.out)
        self._check_sources()
        self.num_shards = -(-len(names) // manifest.samples_per_shard)
        self._permutation = deal_out(len(names), manifest.seed)
        self._scratch = Path(scratch or tempfile.gettempdir()) if is_remote(out) else Path(out) / TEMPORARY
        self._damaged: dict[int, int] = {}  # shard whose tar had another size -> bytes that it shall have
        self._clear_scratch()
        self._begin()

    def shard_name(self, shard: int) -> str:
        return f"shard-{shard:06d}.tar"

    def first_row(self, shard: int) -> int:
        """Place in the plan of the shard's first sample; planned shards differ in size by one sample at most."""
        return shard * len(self.names) // self.num_shards

    def sources_of(self, shard: int) -> np.ndarray:
        """Positions in the source list of the shard's samples, in the order in which `write` wants them."""
        return self._permutation[self.first_row(shard) : self.first_row(shard + 1)]

    def committed(self) -> bool:
        return self.storage.exists(layout.MANIFEST_NAME)

    def missing(self) -> list[int]:
        """Shards that no one has finished yet, or that somebody has deleted or cut since."""
        finished = set(self.storage.names("shard-", settled=False))
        return [
            i for i in range(self.num_shards) if self.shard_name(i) not in finished or self._is_damaged(i)
        ]

    def is_finished(self, shard: int) -> bool:
        """Whether one shard is in place."""
        return self.storage.exists(self.shard_name(shard)) and not self._is_damaged(shard)

    def write(self, shard: int, samples: Iterable[Mapping[str, np.ndarray] | Skipped]) -> None:
        """Write one whole shard: `samples` gives the array members of each of `sources_of(shard)`, in order.

        A sample that is Skipped is left out and stands in the manifest with its reason.
        Raises ValueError naming the source when an array is not what the manifest says, or not finite.
        """
        temporary = self._temporary(self.shard_name(shard))
        try:
            with self._unless_committed():
                keys, skipped = self._write_tar(temporary, shard, samples)
                found, rows = index_tar(temporary, shard=shard, members=self.manifest.members)
                assert found == keys, f"{temporary}: wrote keys {keys[:3]}..., reads back {found[:3]}..."
                if self.committed():
                    self._check_restored(shard, rows)
                elif self.is_finished(shard):
                    return  # another worker was faster, and its sidecars are right for its tar
                else:
                    # The sidecars first: where there is a finished shard, there are its rows.
                    part = {
                        "num_bytes": temporary.stat().st_size,
                        "skipped": {str(source): reason for source, reason in skipped.items()},
                    }
                    self.storage.write(f"{self._part(shard)}.npy", layout.npy_bytes(rows))
                    self.storage.write(f"{self._part(shard)}.json", (json.dumps(part) + "\n").encode())
                self.storage.upload(self.shard_name(shard), temporary)
        finally:
            temporary.unlink(missing_ok=True)

    def write_arrays(self, arrays: Mapping[str, np.ndarray]) -> Manifest:
        """Write what is missing of the set and commit; `arrays`: each member of all sources (M, ...)."""
        for shard in self.missing():
            samples = ({name: array[i] for name, array in arrays.items()} for i in self.sources_of(shard))
            self.write(shard, samples)
        return self.commit()

    def commit(self) -> Manifest:
        """Gather the sidecars into the index and write the manifest, last; does nothing when that is done."""
        if not self.committed():
            # A list of names may be damaged on its way from S3; the single look is not.
            if missing := [shard for shard in self.missing() if not self.is_finished(shard)]:
                raise ValueError(
                    f"{self.out}: {len(missing)} of {self.num_shards} shards are not written yet "
                    f"(first: {self.shard_name(missing[0])}); write them before the commit"
                )
            with self._unless_committed():
                self._write_index()
        self._clean()
        return layout.read_manifest(self.out)

    def _write_tar(
        self, path: Path, shard: int, samples: Iterable[Mapping[str, np.ndarray] | Skipped]
    ) -> tuple[list[str], dict[int, str]]:
        """The shard's samples as a tar; returns their keys, and source -> reason of those left out."""
        keys: list[str] = []
        skipped: dict[int, str] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        with no_space_is_named(str(path)), open(path, "wb") as file:
            with TarWriter(file, user="", group="", mode=0o444, mtime=0, encoder=False) as tar:
                sources = self.sources_of(shard).tolist()
                for slot, (source, arrays) in enumerate(zip(sources, samples, strict=True)):
                    if isinstance(arrays, Skipped):
                        skipped[source] = arrays.reason.removeprefix(f"{self.names[source]}: ")
                        continue
                    self._check_arrays(arrays, self.names[source])
                    keys.append(f"{self.first_row(shard) + slot:09d}")
                    sample: dict[str, object] = {name: layout.npy_bytes(a) for name, a in arrays.items()}
                    sample |= {"__key__": keys[-1], layout.LABEL_MEMBER: b"%d" % self.labels[source]}
                    tar.write(sample)
        if not keys:
            source, reason = next(iter(skipped.items()))
            raise ValueError(
                f"{self.out}: no sample is left of {self.shard_name(shard)}, the first was left out because "
                f"{self.names[source]}: {reason}; is the source what it should be?"
            )
        return keys, skipped

    def _check_restored(self, shard: int, rows: np.ndarray) -> None:
        """ValueError unless a shard of a committed set, written anew, is the one that the index knows."""
        try:
            shard_list = self.storage.read(layout.SHARD_LIST_NAME)
        except FileNotFoundError as error:
            raise ValueError(
                f"{error.filename or error}: missing, though there is a manifest; restore it, or delete the whole set"
            ) from None
        entry = layout.shard_list_from_json(shard_list.decode())[shard]
        if layout.sha256(rows.tobytes()) != entry.rows_sha256:
            raise ValueError(
                f"{self.storage.where(entry.name)}: written anew it has other values than the index says (made on "
                "another kind of machine, or by another version?); restore it from a copy, or delete the whole set"
            )

    def _write_index(self) -> None:
        shards = range(self.num_shards)
        with ThreadPoolExecutor(_REQUESTS) as pool:
            read = list(pool.map(self._read_part, shards))
        rows, parts = [part[0] for part in read], [part[1] for part in read]
        skipped = {int(source): reason for part in parts for source, reason in part["skipped"].items()}
        kept = [source for source in self._permutation.tolist() if source not in skipped]
        sources = "".join(f"{self.names[i]}\n" for i in kept).encode()
        entries = [
            ShardEntry(
                self.shard_name(i), len(rows[i]), parts[i]["num_bytes"], layout.sha256(rows[i].tobytes())
            )
            for i in shards
        ]
        shard_list = layout.shard_list_to_json(entries, layout.sha256(sources)).encode()
        self.storage.write(layout.SOURCES_NAME, sources)
        self.storage.write(layout.ROWS_NAME, layout.npy_bytes(np.concatenate(rows)))
        self.storage.write(layout.SHARD_LIST_NAME, shard_list)
        whole = dataclasses.replace(
            self.manifest,
            num_samples=len(kept),
            skipped={self.names[source]: skipped[source] for source in sorted(skipped)},
            index_hash=layout.sha256(shard_list),
        )
        if not self.storage.write_new(layout.MANIFEST_NAME, whole.to_json().encode()):
            raise ValueError(
                f"{self.storage.where(layout.MANIFEST_NAME)}: another worker has committed another set here; "
                "do all workers have the same program, sources and settings?"
            )

    @contextlib.contextmanager
    def _unless_committed(self) -> Iterator[None]:
        """Another worker that ended the whole set meanwhile has taken our temporary files away: no error."""
        try:
            yield
        except FileNotFoundError:
            if not self.committed():
                raise

    def _begin(self) -> None:
        """Claim the place for this plan, or find out that it holds another."""
        name = check_place(self.out)
        if name is None and not self.storage.write_new(PLAN_NAME, self.manifest.to_json().encode()):
            name = PLAN_NAME
        if name is None:
            return
        try:
            self._compare(name)
        except FileNotFoundError:  # the plan: another worker has just ended the set
            name = layout.MANIFEST_NAME
            self._compare(name)
        if name == layout.MANIFEST_NAME:
            self._check_committed()

    def _check_committed(self) -> None:
        """ValueError unless the index is the manifest's; tars that have another size than it says become missing."""
        stored = StoredSet(self.out)
        for shard in range(len(stored.entries)):
            stored.rows_of(shard)
        try:
            sources = self.storage.read(layout.SOURCES_NAME)
        except FileNotFoundError:
            sources = b""
        if layout.sha256(sources) != json.loads(stored.shard_list)["sources_sha256"]:
            raise ValueError(
                f"{self.storage.where(layout.SOURCES_NAME)}: missing, or not of the hash that "
                f"{layout.SHARD_LIST_NAME} gives; {stored.manifest.remedy(self.out, 'the set')}"
            )
        with ThreadPoolExecutor(_REQUESTS) as pool:
            sizes = pool.map(self._size, range(self.num_shards))
            for shard, (size, entry) in enumerate(zip(sizes, stored.entries, strict=True)):
                if size not in (None, entry.num_bytes):
                    self._damaged[shard] = entry.num_bytes
                    log.warning(
                        "%s: %d bytes, but the index says %d: it is written anew",
                        self.storage.where(entry.name), size, entry.num_bytes,
                    )  # fmt: skip

    def _size(self, shard: int) -> int | None:
        """Bytes of a shard's tar; None where there is none."""
        try:
            return self.storage.size(self.shard_name(shard))
        except FileNotFoundError:
            return None

    def _is_damaged(self, shard: int) -> bool:
        """Whether a tar that had another size than the index says still has it."""
        return shard in self._damaged and self._size(shard) != self._damaged[shard]

    def _compare(self, name: str) -> None:
        where = self.storage.where(name)
        text = self.storage.read(name).decode(errors="replace")
        try:
            begun = dataclasses.asdict(Manifest.from_json(text, where))
        except ValueError as error:
            raise ValueError(
                f"{error}: restore that file, or delete all that is in {self.out} and run the same command again"
            ) from None
        begun["num_samples"] += len(begun["skipped"])
        # A VAE is what its weights are, whatever path a worker has it at; the first worker's path stays.
        self.manifest = dataclasses.replace(self.manifest, vae_id=begun["vae_id"])
        differing = [
            f"{key} {_short(begun[key])} there, {_short(value)} now"
            for key, value in dataclasses.asdict(self.manifest).items()
            if key not in ("index_hash", "skipped") and begun[key] != value
        ]
        if differing:
            raise ValueError(
                f"{where}: the folder holds another set: {'; '.join(differing)}; "
                "give another folder, or delete this one"
            )

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

    def _read_part(self, shard: int) -> tuple[np.ndarray, dict]:
        """A finished shard's index rows and what stands beside them; made anew from its tar if they are lost."""
        try:
            rows = layout.npy_array(self.storage.read(f"{self._part(shard)}.npy"))
            part = json.loads(self.storage.read(f"{self._part(shard)}.json"))
            if self._fits(shard, rows):
                return rows, part
        except FileNotFoundError:
            if self.committed():
                raise
        tar = self._temporary(self.shard_name(shard))
        tar.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.storage.download(self.shard_name(shard), tar)
            keys, rows = index_tar(tar, shard=shard, members=self.manifest.members)
            skipped = {
                str(source): "left out when its shard was written"
                for slot, source in enumerate(self.sources_of(shard).tolist())
                if f"{self.first_row(shard) + slot:09d}" not in keys
            }
            return rows, {"num_bytes": tar.stat().st_size, "skipped": skipped}
        finally:
            tar.unlink(missing_ok=True)

    def _fits(self, shard: int, rows: np.ndarray) -> bool:
        """Whether rows are of the tar that is there: two workers on unlike machines may have written one each."""
        tars = open_unvouched(self.out)
        for row in rows[[0, -1]]:
            data = tars.read_range(self.shard_name(shard), int(row["offset"]), int(row["size"]))
            if google_crc32c.value(data) != row["crc32c"]:
                return False
        return True

    def _part(self, shard: int) -> str:
        return f"{PARTS}/{self.shard_name(shard)}"

    def _temporary(self, name: str) -> Path:
        """A path of this process and thread alone: a unit done twice at once is then harmless."""
        return (
            self._scratch / f"{SCRATCH}.{name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
        )

    def _clean(self) -> None:
        """Take away what only the writing needed; a set killed just here is cleaned by the next call."""
        leftovers = [
            name for folder in (PARTS, CLAIMS) for name in self.storage.names(f"{folder}/", settled=False)
        ]
        with ThreadPoolExecutor(_REQUESTS) as pool:
            list(pool.map(self.storage.remove, [*leftovers, PLAN_NAME]))
        self.storage.clean_up()
        if not is_remote(self.out):
            for folder in (PARTS, CLAIMS):
                shutil.rmtree(Path(self.out) / folder, ignore_errors=True)

    def _clear_scratch(self) -> None:
        """Remove tars that killed processes of this machine left in the scratch folder."""
        for path in self._scratch.glob(f"{SCRATCH}.*.{socket.gethostname()}.*"):
            pid = path.name.split(".")[-2]
            if not Path(f"/proc/{pid}").exists():
                path.unlink(missing_ok=True)


def _short(value: object) -> str:
    """For a message of one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
