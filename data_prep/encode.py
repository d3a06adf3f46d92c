"""Encode images once into a shard set: moments of a VAE, or pixels; by any number of processes, killed at any time.

    python -m data_prep.encode source=ILSVRC/train vae=stabilityai/sd-vae-ft-ema out=s3://bucket/in256

The same under torchrun, as a SLURM array, or typed into several shells: each process claims shards, does them, and
ends when the set is whole; the same command again does what is missing. Every key of EncodeConfig can be given, or
stand in a YAML named by `--config`. What is made is drwkv.data.manifest's; sources, decoding, VAE and writing
are the modules beside this one.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from data_prep.decoding import Decoded, Decoder, DecodingPool, LatentReader, Request
from data_prep.encoder import (
    Arrays,
    Encoder,
    MomentsKeeper,
    Pending,
    PixelEncoder,
    VaeEncoder,
    make_deterministic,
)
from data_prep.sources import BadSampleError, Source, StoredLatents, open_source
from data_prep.writer import CLAIMS, ShardSetWriter, Skipped, check_place
from drwkv import command
from drwkv.compose import load
from drwkv.cpu import keep_freed_memory
from drwkv.data.manifest import Manifest
from drwkv.leases import Leases, wait_sec
from drwkv.storage import StorageError

log = logging.getLogger("drwkv")

UNWRITTEN_SHARDS = 2  # encoded shards that wait in memory for the disk or S3
BATCHES_IN_FLIGHT = 2  # on the device: one computes while the one before comes back
COMMIT = "commit"  # the lease of the one who gathers the index
PROGRESS_SEC = 5.0  # between looks at what all workers have done


@dataclass
class EncodeConfig:
    """All of `python -m data_prep.encode`."""

    source: str = "???"  # folder, tar or s3://... of images, or of latents that others made
    # Layout of the source; "auto": told by the files' names, see data_prep.sources.layouts
    format: str = "auto"
    out: str = "???"  # the shard set to write: a folder, or s3://bucket/prefix
    kind: Literal["moments", "pixels"] = "moments"  # what to store
    vae: str | None = None  # folder or hub name of an AutoencoderKL; needed for moments of images
    resolution: int = 256  # side of the square that is cut out of each image, in pixels
    flip: bool = True  # store the moments of the mirrored image too (pixels are mirrored when they are read)
    seed: int = 0  # 0 <= seed < 2**32; key of the permutation that deals the images out to shards
    samples_per_shard: int = 1024  # most samples of one shard, which is one unit of work
    batch: int = 32  # images of one forward of the VAE; part of the set's identity, as rounding depends on it
    # In which the VAE computes; what is not finite is refused
    dtype: Literal["float32", "bfloat16"] = "float32"
    scale: float | None = None  # of latents; None: the VAE's own
    shift: float | None = None  # of latents; None: the VAE's own
    # An image that cannot be decoded: stop, or list it in the manifest
    on_bad: Literal["fail", "skip"] = "fail"
    max_pixels: int = 178_956_970  # larger images count as bad; the default is Pillow's limit
    limit: int | None = None  # take only so many images, spread evenly over the source; None: all
    workers: int = 4  # decoding processes of each encoding process; 0: decode in it
    cpu_threads: int = 1  # threads of a VAE on a CPU; part of the set's identity, as sums round by thread
    # "cpu", "cuda", "cuda:1"; None: this process's GPU, or the CPU where there is none
    device: str | None = None
    # Local folder for tars on their way to S3; None: the system's temporary folder
    scratch: str | None = None
    lease_sec: float = 60.0  # a worker that gives no sign of life for so long has lost its shard to others
    latents: StoredLatents = field(default_factory=StoredLatents)  # what a source of latents holds


def encode(config: EncodeConfig) -> str:
    """Write the set, or help the others to; returns a summary when it is whole and committed.

    Raises ValueError for what the user can mend: a wrong key, an image that cannot be decoded, another set in `out`.
    """
    _check(config)
    source = open_source(config.source, format=config.format, latents=config.latents)
    chosen = _spread(len(source.names), config.limit)
    names, labels = [source.names[i] for i in chosen.tolist()], source.labels[chosen]
    torch.set_num_threads(config.cpu_threads)
    make_deterministic()
    device = _device(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    decoder = _decoder(config, source)
    pool = DecodingPool(decoder, workers=config.workers, pin=device.type == "cuda")
    encoder = _encoder(config, decoder, device)  # a VAE takes its time, in which the pool's processes start
    writer = ShardSetWriter(
        config.out,
        names=names,
        labels=labels,
        manifest=encoder.describe(_manifest(config, source)),
        scratch=config.scratch,
    )
    if writer.committed() and not writer.missing():
        writer.commit()  # cleans up, should the last worker have been killed after the manifest
        return f"{config.out}: finished already"
    with Leases(writer.storage, CLAIMS, lease_sec=config.lease_sec) as leases, Progress(writer) as progress:
        worker = Worker(config, source, chosen, pool, encoder, writer, leases, progress)
        pauses = wait_sec(config.lease_sec)
        while missing := writer.missing():
            if worker.work(missing):
                pauses = wait_sec(config.lease_sec)
            else:
                # All that is missing is in the hands of others, alive or not.
                time.sleep(next(pauses))
            progress.show()
        # One gathers the index, or every worker would read all sidecars.
        while not writer.committed():
            if leases.claim(COMMIT):
                writer.commit()
            else:
                time.sleep(next(pauses))
    manifest = writer.commit()
    left_out = f", {len(manifest.skipped)} left out (see skipped in the manifest)" if manifest.skipped else ""
    return f"{config.out}: {manifest.num_samples} samples in {writer.num_shards} shards{left_out}"


class Worker:
    """One process's part of the encoding: claims shards, and decodes, encodes and writes them side by side."""

    def __init__(
        self,
        config: EncodeConfig,
        source: Source,
        chosen: np.ndarray,
        pool: DecodingPool,
        encoder: Encoder,
        writer: ShardSetWriter,
        leases: Leases,
        progress: Progress,
    ) -> None:
        self._config, self._source, self._chosen = config, source, chosen
        self._pool, self._encoder, self._writer = pool, encoder, writer
        self._leases, self._progress = leases, progress
        # Workers begin at different places, and so seldom meet.
        self._start = int(os.getpid() * 2654435761 % (1 << 32))

    def work(self, missing: Sequence[int]) -> int:
        """Do those of the missing shards that can be claimed; returns how many that were."""
        unwritten: collections.deque[Future[None]] = collections.deque()
        num_done = 0
        with ThreadPoolExecutor(1, "drwkv-writer") as writing:
            try:
                for shard, samples in self._encoded(missing):
                    while len(unwritten) >= UNWRITTEN_SHARDS:
                        unwritten.popleft().result()
                    unwritten.append(writing.submit(self._write, shard, samples))
                    num_done += 1
                    self._progress.show()
                while unwritten:
                    unwritten.popleft().result()
            finally:
                for waiting in unwritten:
                    waiting.cancel()
        return num_done

    def _write(self, shard: int, samples: list[Arrays | Skipped]) -> None:
        self._writer.write(shard, samples)
        self._leases.release(self._writer.shard_name(shard))

    def _encoded(self, missing: Sequence[int]) -> Iterator[tuple[int, list[Arrays | Skipped]]]:
        """Whole shards' samples, in the order in which they were claimed."""
        in_flight: collections.deque[tuple[Decoded, Pending]] = collections.deque()
        samples: list[Arrays | Skipped] = []
        for decoded in itertools.chain(self._pool.decode(self._requests(missing)), [None]):
            if decoded is not None:
                in_flight.append((decoded, self._encoder.begin(decoded.x)))
            while in_flight and (decoded is None or len(in_flight) >= BATCHES_IN_FLIGHT):
                batch, finish = in_flight.popleft()
                samples += self._kept(batch, finish())
                self._leases.note_progress()
                if len(samples) == len(self._writer.sources_of(batch.shard)):
                    yield batch.shard, samples
                    samples = []

    def _kept(self, batch: Decoded, arrays: list[Arrays]) -> Iterator[Arrays | Skipped]:
        """The batch's samples without its padding; ValueError for a bad one, unless such are skipped."""
        for sample, problem in zip(arrays, batch.problems, strict=False):
            if problem is None:
                yield sample
            elif self._config.on_bad == "skip":
                log.warning("left out: %s", problem)
                yield Skipped(problem)
            else:
                raise ValueError(
                    f"{problem}; mend it, or give on_bad=skip to leave such images out of the set "
                    "(without the file the source is another, and needs another out)"
                )

    def _requests(self, missing: Sequence[int]) -> Iterator[Request]:
        """The batches of each shard that can be claimed, as they are asked for."""
        first = self._start % len(missing)
        for shard in [*missing[first:], *missing[:first]]:
            name = self._writer.shard_name(shard)
            if not self._leases.claim(name):
                continue
            if self._writer.is_finished(shard):
                self._leases.release(name)
                continue
            sources = self._chosen[self._writer.sources_of(shard)]
            for at in range(0, len(sources), self._config.batch):
                some = sources[at : at + self._config.batch].tolist()
                yield Request(shard, [self._source.items[i] for i in some])


class Progress:
    """A bar over what all workers have done, on the terminal of the first of them."""

    def __init__(self, writer: ShardSetWriter) -> None:
        self._writer, self._next = writer, 0.0
        rank = next((os.environ[key] for key in ("RANK", "SLURM_PROCID") if key in os.environ), "0")
        total = len(writer.names)
        self._bar = tqdm(
            total=total, initial=self._num_done(), unit="img", disable=rank != "0", smoothing=0.05
        )
        self._redirected = logging_redirect_tqdm()

    def __enter__(self) -> Progress:
        self._redirected.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(StorageError, OSError):  # or it would hide what ended the work
            self.show(now=True)
        self._bar.close()
        self._redirected.__exit__(None, None, None)

    def show(self, *, now: bool = False) -> None:
        """Look at what is done, every few seconds at most."""
        if self._bar.disable or (time.monotonic() < self._next and not now):
            return
        self._next = time.monotonic() + PROGRESS_SEC
        self._bar.update(max(self._num_done() - self._bar.n, 0))

    def _num_done(self) -> int:
        missing = self._writer.missing()
        left = sum(len(self._writer.sources_of(shard)) for shard in missing)
        return len(self._writer.names) - left


def _decoder(config: EncodeConfig, source: Source) -> Decoder | LatentReader:
    """What reads this source for this kind of set."""
    if source.kind != "moments":
        return Decoder(batch=config.batch, resolution=config.resolution, max_pixels=config.max_pixels)
    if config.kind != "moments":
        raise ValueError(f"{config.source}: holds latents, of which no pixels can be made: give kind=moments")
    return LatentReader(batch=config.batch, shape=_first_shape(source), flip=source.has_flip and config.flip)


def _encoder(config: EncodeConfig, decoder: Decoder | LatentReader, device: torch.device) -> Encoder:
    """What turns that into what is stored."""
    if isinstance(decoder, LatentReader):
        return MomentsKeeper(
            shape=decoder.shape, flip=decoder.flip, scale=config.scale, shift=config.shift, vae=config.vae
        )
    if config.kind == "pixels":
        return PixelEncoder(resolution=config.resolution)
    if config.vae is None:
        raise ValueError(
            "config key 'vae' is null: moments need one, give vae=FOLDER or a hub name, or kind=pixels"
        )
    return VaeEncoder(
        config.vae,
        resolution=config.resolution,
        flip=config.flip,
        batch=config.batch,
        dtype=config.dtype,
        device=device,
        scale=config.scale,
        shift=config.shift,
    )


def _first_shape(source: Source) -> tuple[int, int, int]:
    """The shape of the first latents that can be read; others must have the same."""
    problem = None
    for item in source.items:
        try:
            c, h, w = item.load_latents().shape
        except BadSampleError as error:
            problem = problem or error
        else:
            return c, h, w
    raise problem or ValueError("the source holds no latents")


def _device(config: EncodeConfig) -> torch.device:
    """The device asked for, or this process's GPU. ValueError if there is no such device."""
    if config.device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        local = next((os.environ[key] for key in ("LOCAL_RANK", "SLURM_LOCALID") if key in os.environ), "0")
        return torch.device("cuda", int(local) % torch.cuda.device_count())
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise ValueError(f"config key 'device' is {config.device!r}: give cpu, cuda or cuda:N") from None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= count):
        raise ValueError(
            f"config key 'device' is {config.device!r}, but there are {count} GPUs: give another, or null"
        )
    return device if device.type == "cpu" else torch.device("cuda", device.index or 0)


def _manifest(config: EncodeConfig, source: Source) -> Manifest:
    """What is known before the encoder has its say."""
    return Manifest(
        kind=config.kind,
        num_classes=len(source.class_names),
        class_names=list(source.class_names),
        channels=3,
        height=config.resolution,
        width=config.resolution,
        resolution=config.resolution,
        crop="adm-center",
        dtype="uint8",
        seed=config.seed,
        samples_per_shard=config.samples_per_shard,
    )


def _spread(num_sources: int, limit: int | None) -> np.ndarray:
    """Positions of the sources to take: all, or `limit` at even distances."""
    if limit is None or limit >= num_sources:
        return np.arange(num_sources)
    return np.arange(limit) * num_sources // limit


def _check(config: EncodeConfig) -> None:
    for key in ("resolution", "samples_per_shard", "batch", "max_pixels", "cpu_threads"):
        if getattr(config, key) < 1:
            raise ValueError(f"config key {key!r} is {getattr(config, key)}: give 1 or more")
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"config key 'limit' is {config.limit}: give 1 or more, or null for all")
    if config.workers < 0:
        raise ValueError(f"config key 'workers' is {config.workers}: give 0 or more")
    if not 0 <= config.seed < 1 << 32:
        raise ValueError(f"config key 'seed' is {config.seed}: give 0 <= seed < 2**32")
    if not (math.isfinite(config.lease_sec) and config.lease_sec > 0):
        raise ValueError(f"config key 'lease_sec' is {config.lease_sec}: give a time above 0")
    if config.scratch is not None and not Path(config.scratch).is_dir():
        raise ValueError(
            f"config key 'scratch' is {config.scratch!r}: there is no such folder, make it first"
        )
    check_place(config.out)


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it tells where it found the keys
    # The number of workers is the user's
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    config = load(EncodeConfig, arguments)
    try:
        print(encode(config))
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise ValueError(f"{reason}: batch={config.batch} is too much for this GPU, give less") from None


if __name__ == "__main__":
    command.run(main)
