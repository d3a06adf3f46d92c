"""One shard held against its index: every byte, every row, every value; and what the values are like.

Runs in processes of its own, so importing it costs no torch. Which shards, and what is said of them, is verify.py's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from data_prep.tar_samples import Sample, SampleLayout, read_samples, row_of
from data_prep.tar_stream import open_stream
from drwkv.data import manifest as layout
from drwkv.data.manifest import Manifest, ShardEntry
from drwkv.storage import Storage, StorageError, is_remote, open_storage

ATTEMPTS = 3  # reads from S3 of what looks broken: it may be the way, not the shard
BATCH_BYTES = 8 << 20  # of values looked at together
KEPT_PROBLEMS = 20  # told in full of one shard


@dataclass
class ChannelSums:
    """Sums from which mean and standard deviation of each channel come; (C,) float64 each."""

    num_values: int  # of one channel
    total: np.ndarray
    squares: np.ndarray

    @classmethod
    def zeros(cls, channels: int) -> ChannelSums:
        return cls(0, np.zeros(channels), np.zeros(channels))

    @classmethod
    def of(cls, x_BCHW: np.ndarray) -> ChannelSums:
        x = x_BCHW.astype(np.float64)
        return cls(x[:, 0].size, x.sum(axis=(0, 2, 3)), np.einsum("bchw,bchw->c", x, x))

    def __add__(self, other: ChannelSums) -> ChannelSums:
        return ChannelSums(
            self.num_values + other.num_values, self.total + other.total, self.squares + other.squares
        )

    @property
    def mean(self) -> np.ndarray:
        return self.total / max(self.num_values, 1)

    @property
    def mean_square(self) -> np.ndarray:
        return self.squares / max(self.num_values, 1)

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.mean_square - self.mean**2, 0.0))


@dataclass(frozen=True)
class Limits:
    """What values moments may have."""

    max_latent: float  # largest |mean| in the model's units
    log_variance: tuple[float, float]  # least and most


@dataclass(frozen=True)
class ShardJob:
    """One shard to check, and what it should be."""

    path: str  # of the set
    manifest: Manifest
    entry: ShardEntry
    shard: int
    first_row: int  # sample id of the first sample
    rows: np.ndarray  # of the index
    keys: list[str] | None  # of the samples, where the source list names them
    limits: Limits
    header: bytes = field(init=False)  # that an array of the set usually opens with

    def __post_init__(self) -> None:
        array = np.empty(self.manifest.sample_shape, self.manifest.dtype)
        object.__setattr__(self, "header", layout.npy_bytes(array)[: -array.nbytes])


@dataclass
class ShardReport:
    """What was found."""

    stored: ChannelSums  # of the sound samples, as stored
    std: ChannelSums  # of moments: exp(log_variance / 2)
    num_read: int = 0  # samples
    num_cut: int = 0  # log-variances out of range in tars of others, which a trainer cuts to it
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)  # the first of them

    def add(self, problem: str) -> None:
        self.num_problems += 1
        if len(self.problems) < KEPT_PROBLEMS:
            self.problems.append(problem)


def check_shard(job: ShardJob) -> ShardReport:
    """Read the shard once. What is wrong with it stands in the report; StorageError when the store refuses."""
    storage = open_storage(job.path)
    where = storage.where(job.entry.name)
    report = _empty(job)
    try:
        size = storage.size(job.entry.name)
        if size != job.entry.num_bytes:
            report.add(f"{where} has {size} bytes, but had {job.entry.num_bytes} when its index was made")
            return report
        for _ in range(ATTEMPTS if is_remote(job.path) else 1):
            report = _empty(job)
            try:
                _read_through(job, storage, report)
                break
            except StorageError:
                raise
            except ValueError as error:
                unread = len(job.rows) - report.num_read
                report.add(f"{error}; {unread} of its {len(job.rows)} samples were not reached")
    except FileNotFoundError:
        report.add(f"{where} is missing")
    except OSError as error:
        report.add(f"{where} cannot be read ({error.strerror})")
    return report


def _empty(job: ShardJob) -> ShardReport:
    return ShardReport(
        ChannelSums.zeros(job.manifest.sample_shape[0]), ChannelSums.zeros(job.manifest.channels)
    )


def _read_through(job: ShardJob, storage: Storage, report: ShardReport) -> None:
    """ValueError when the tar cannot be read to its end."""
    shape = SampleLayout.of(job.manifest)
    where = storage.where(job.entry.name)
    batch = _Batch(job, report)
    try:
        with open_stream(storage, job.entry.name) as reader:
            for sample in read_samples(reader, shape, where=where):
                slot = report.num_read
                report.num_read += 1
                if slot >= len(job.rows):
                    continue
                problem, arrays = "", {}
                for again in _readings(sample, job, storage):
                    try:
                        arrays = _arrays_of(again, slot, job, shape, where)
                        break
                    except ValueError as error:
                        problem = str(error)
                if arrays:
                    batch.add(slot, sample.key, arrays)
                else:
                    report.add(problem)
    finally:
        batch.look()
    if report.num_read != len(job.rows):
        report.add(f"{where} holds {report.num_read} samples, the index says {len(job.rows)}")


def _readings(sample: Sample, job: ShardJob, storage: Storage) -> Iterator[Sample]:
    """The sample as it was read; on S3 read again for those who are not content with it."""
    yield sample
    if is_remote(job.path):
        for _ in range(ATTEMPTS):
            data = {
                name: storage.read_range(job.entry.name, *sample.places[name]) for name in sample.data
            }  # fmt: skip
            yield Sample(sample.key, sample.places, data)


def _name_of(job: ShardJob, slot: int, key: str) -> str:
    """A sample by its row, and by its key in the tar where that is another."""
    row = job.first_row + slot
    same = key.isdecimal() and int(key) == row
    return f"sample {row}" if same else f"sample {row} ({key}.*)"


def _arrays_of(
    sample: Sample, slot: int, job: ShardJob, shape: SampleLayout, where: str
) -> dict[str, np.ndarray]:
    """The sample's arrays; ValueError when it is not what index and manifest say."""
    what = f"{job.path}: {_name_of(job, slot, sample.key)} in {job.entry.name}"
    row = row_of(sample, shape, shard=job.shard, where=where, checksums=job.manifest.checksums)
    expected = job.rows[slot].item()
    if row != expected:
        names = job.rows.dtype.names or ()
        differing = "; ".join(
            f"{name} {there} in the index, {here} in the tar"
            for name, there, here in zip(names, expected, row, strict=True)
            if there != here
        )
        raise ValueError(f"{what} differs ({differing})")
    if job.keys is not None and sample.key != job.keys[slot]:
        raise ValueError(f"{what} has key {sample.key}, but {layout.SOURCES_NAME} says {job.keys[slot]}")
    arrays = {}
    for name in shape.arrays:
        data, dtype = sample.data[name], np.dtype(job.manifest.dtype)
        try:
            start = len(job.header)
            if not data.startswith(job.header):
                start = layout.npy_header_size(data, shape=job.manifest.sample_shape, dtype=dtype)
            arrays[name] = np.frombuffer(data, dtype, offset=start).reshape(job.manifest.sample_shape)
        except ValueError as error:
            raise ValueError(
                f"{what}: {name} is not the array that the manifest announces: {error}"
            ) from None
    return arrays


class _Batch:
    """Arrays of some samples, looked at together, for numpy's sake."""

    def __init__(self, job: ShardJob, report: ShardReport) -> None:
        self._job, self._report = job, report
        self._slots: list[int] = []
        self._keys: list[str] = []
        self._arrays: list[dict[str, np.ndarray]] = []
        one = int(np.prod(job.manifest.sample_shape)) * np.dtype(job.manifest.dtype).itemsize
        self._limit = max(1, BATCH_BYTES // one)

    def add(self, slot: int, key: str, arrays: dict[str, np.ndarray]) -> None:
        self._slots.append(slot)
        self._keys.append(key)
        self._arrays.append(arrays)
        if len(self._slots) == self._limit:
            self.look()

    def look(self) -> None:
        """Report values that no array of the set may have, and add the sound samples to the sums."""
        if not self._slots:
            return
        sound = np.ones(len(self._slots), bool)
        main, *_ = members = self._job.manifest.members
        for member in members:
            x_BCHW = np.stack([arrays[member] for arrays in self._arrays])
            for i, problem in self._problems(x_BCHW):
                sound[i] = False
                self._report.add(
                    f"{self._job.path}: {self._job.entry.name}: "
                    f"{_name_of(self._job, self._slots[i], self._keys[i])}: {member} {problem}"
                )
        x_BCHW = np.stack([arrays[main] for arrays in self._arrays])[sound]
        self._report.stored += ChannelSums.of(x_BCHW)
        if self._job.manifest.kind == "moments":
            low, high = self._job.limits.log_variance
            log_variance = x_BCHW[:, self._job.manifest.channels :].astype(np.float32)
            self._report.std += ChannelSums.of(np.exp(log_variance.clip(low, high) / 2))
        self._slots, self._keys, self._arrays = [], [], []

    def _problems(self, x_BCHW: np.ndarray) -> Iterator[tuple[int, str]]:
        """(position in the batch, what is wrong with its values)."""
        manifest = self._job.manifest
        if manifest.kind != "moments":
            return
        finite = np.isfinite(x_BCHW).all(axis=(1, 2, 3))
        yield from ((i, "is not finite") for i in np.flatnonzero(~finite).tolist())
        assert manifest.scale is not None and manifest.shift is not None
        mean, log_variance = np.split(x_BCHW.astype(np.float32), 2, axis=1)
        limits = self._job.limits
        largest = np.abs((mean - manifest.shift) * manifest.scale).max(axis=(1, 2, 3))
        for i in np.flatnonzero(finite & (largest > limits.max_latent)).tolist():
            yield (
                i,
                f"has a latent of {largest[i]:.4g} in the model's units, the most is {limits.max_latent:g}",
            )
        low, high = limits.log_variance
        outside = finite[:, None, None, None] & ((log_variance < low) | (log_variance > high))
        if manifest.member_names:
            self._report.num_cut += int(outside.sum())
            return
        for i in np.flatnonzero(outside.any(axis=(1, 2, 3))).tolist():
            least, most = log_variance[i].min(), log_variance[i].max()
            yield i, f"has log-variances from {least:.4g} to {most:.4g}, expected {low:g} to {high:g}"
