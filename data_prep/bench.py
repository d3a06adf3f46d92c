"""How fast shards are read: `python -m data_prep.bench [--folder FOLDER]`, all from page cache.

Prints the loader's latents of 16 KiB (float16 moments at 256px) a second as batch tensors beside those of
webdataset's own reader with its npy decoder, same tars, batch and thread, nothing shuffled there; what two
processes bring on two cores; the time from opening ImageNet's size at epoch 1,399 to the first batch; and what
it takes to open 100 M samples. Other programs on the machine only slow this down, so the best of several
rounds counts. It fails when a promise of the README is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import webdataset

from data_prep.writer import ShardSetWriter
from drwkv import command
from drwkv.data import manifest as layout
from drwkv.data.loader import DataConfig, open_data
from drwkv.data.manifest import Manifest
from drwkv.data.shards import ShardSet

IMAGENET, LATE_EPOCH = 1_281_167, 1_399
MANY, SAMPLES_PER_SHARD = 100_000_000, 8192
BATCH, ROUND_SEC, ROUNDS = 512, 0.6, 5
LEAST = {"latents/s": 150_000, "times webdataset": 7.0, "times one core": 1.7}
MOST = {"cold start s": 0.5, "opening s": 1.0, "opening MB": 200.0}


def write_latents(
    folder: Path, num_samples: int, *, size: int = 32, samples_per_shard: int = 2048, channels: int = 4
) -> str:
    """A shard set of random float16 moments (2 channels, size, size), in page cache; its path."""
    manifest = Manifest(
        kind="moments", num_classes=1000, channels=channels, height=size, width=size, resolution=8 * size,
        crop="adm-center", dtype="float16", seed=0, samples_per_shard=samples_per_shard,
        vae_id="none", vae_hash="0" * 64, scale=0.18215, shift=0.0,
    )  # fmt: skip
    moments = np.random.default_rng(0).standard_normal((num_samples, 2 * channels, size, size), np.float32)
    names = [f"latent-{i}" for i in range(num_samples)]
    writer = ShardSetWriter(folder, names=names, labels=np.arange(num_samples) % 1000, manifest=manifest)
    writer.write_arrays({"moments.npy": moments.astype(np.float16)})
    return str(folder)


def write_repeated(folder: Path, num_samples: int, *, samples_per_shard: int) -> str:
    """A set of that many tiny latents whose shards are all one file under many names; its path."""
    seed_set = ShardSet.open(
        write_latents(
            folder / "one", samples_per_shard, size=2, samples_per_shard=samples_per_shard, channels=1
        )
    )
    [entry] = layout.shard_list_from_json((folder / "one" / layout.SHARD_LIST_NAME).read_text())
    rows = np.array(seed_set.rows_of(0))
    (folder / "index").mkdir()
    entries = []
    with open(folder / layout.ROWS_NAME, "wb") as file:
        header = np.lib.format.header_data_from_array_1_0(np.empty(0, rows.dtype)) | {"shape": (num_samples,)}
        np.lib.format.write_array_header_1_0(file, header)
        for shard in range(-(-num_samples // samples_per_shard)):
            mine = rows[: min(samples_per_shard, num_samples - shard * samples_per_shard)]
            mine["shard"] = shard
            file.write(mine.tobytes())
            name = f"shard-{shard:06d}.tar"
            os.link(folder / "one" / entry.name, folder / name)
            entries.append(layout.ShardEntry(name, len(mine), entry.num_bytes, layout.sha256(mine.tobytes())))
    shard_list = layout.shard_list_to_json(entries, layout.sha256(b""))
    (folder / layout.SHARD_LIST_NAME).write_text(shard_list)
    manifest = json.loads(seed_set.manifest.to_json())
    manifest |= {"num_samples": num_samples, "index_hash": layout.sha256(shard_list.encode())}
    (folder / layout.MANIFEST_NAME).write_text(json.dumps(manifest))
    return str(folder)


def best_rate(batches: Iterator[object], batch_size: int, *, rounds: int = ROUNDS) -> float:
    """Most samples a second of any round of ROUND_SEC."""
    best = 0.0
    for _ in range(rounds):
        start, num_batches = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < ROUND_SEC:
            next(batches)
            num_batches += 1
        best = max(best, num_batches * batch_size / elapsed)
    return best


@contextlib.contextmanager
def checked_batches(path: str, *, batch_size: int = BATCH, workers: int = 0) -> Iterator[Iterator[object]]:
    """Our loader's batches in the order law's shuffled order, after an epoch in which every sample was checked."""
    data = open_data(DataConfig(paths=[path], workers=workers), seed=0)
    with contextlib.closing(data.batches(batch_size, 0)) as batches:
        for _ in range(-(-data.num_samples // batch_size) + 1):
            next(batches)
        yield batches


def loader_rate(path: str, *, batch_size: int = BATCH, workers: int = 0, rounds: int = ROUNDS) -> float:
    """Samples a second of those."""
    with checked_batches(path, batch_size=batch_size, workers=workers) as batches:
        return best_rate(batches, batch_size, rounds=rounds)


def webdataset_batches(path: str, batch_size: int) -> Iterator[torch.Tensor]:
    """The moments of whole batches in the tars' own order, by webdataset's reader, epoch after epoch."""
    tars = sorted(map(str, Path(path).glob("*.tar")))
    for _ in itertools.count():
        samples = webdataset.WebDataset(tars, shardshuffle=False).decode().to_tuple("moments.npy", "cls")
        for x, _ in samples.batched(batch_size, partial=False):
            yield torch.from_numpy(x)


def webdataset_rate(path: str, *, batch_size: int = BATCH, rounds: int = ROUNDS) -> float:
    """Samples a second of those."""
    return best_rate(webdataset_batches(path, batch_size), batch_size, rounds=rounds)


def rate_when_told(path: str, core: int) -> None:
    """What each process of `rate_of_processes` does: get ready, and read for ROUND_SEC whenever it is told."""
    os.sched_setaffinity(0, [core])
    with checked_batches(path) as batches:
        print("ready", flush=True)
        for word in sys.stdin:
            if word.strip() == "end":
                return
            print(best_rate(batches, BATCH, rounds=1), flush=True)


def rate_of_processes(path: str, cores: Sequence[int]) -> float:
    """Samples a second of as many processes as cores, each pinned to its own, all at the same time; the best round."""
    code = "import sys; from data_prep.bench import rate_when_told; rate_when_told(sys.argv[1], int(sys.argv[2]))"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, path, str(core)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )
        for core in cores
    ]  # fmt: skip

    def hear() -> list[str]:
        return [process.stdout.readline() for process in running if process.stdout]

    def say(word: str) -> None:
        for process in running:
            assert process.stdin
            process.stdin.write(f"{word}\n")

    hear()
    best = 0.0
    for _ in range(ROUNDS):
        say("go")
        best = max(best, sum(map(float, hear())))
    say("end")
    for process in running:
        process.communicate()
    return best


def cold_start_sec(path: str) -> float:
    """Seconds from opening to the first batch at LATE_EPOCH."""
    start = time.perf_counter()
    data = open_data(DataConfig(paths=[path], workers=2), seed=0)
    batches = data.batches(BATCH, LATE_EPOCH * data.num_samples)
    next(batches)
    elapsed = time.perf_counter() - start
    batches.close()
    return elapsed


def opening(path: str) -> tuple[float, float]:
    """Seconds and MB of memory that it takes a new process to open a set."""
    code = (
        "import time; from data_prep.bench import resident_mb; from drwkv.data.loader import DataConfig, open_data; "
        f"before, start = resident_mb(), time.perf_counter(); data = open_data(DataConfig(paths=[{path!r}]), seed=0); "
        "print(time.perf_counter() - start, resident_mb() - before)"
    )
    seconds, megabytes = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    return float(seconds), float(megabytes)


def resident_mb() -> float:
    """Memory that this process has in use."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1e3


def measure(folder: Path) -> dict[str, float]:
    """All numbers of this bench, printed as they come."""
    found: dict[str, float] = {}

    def tell(name: str, value: float, what: str) -> None:
        found[name] = value
        print(f"{value:12,.4g}  {name:18} {what}", flush=True)

    path = write_latents(folder / "latents", 16_384)
    tell("latents/s", loader_rate(path), f"of 16 KiB, batches of {BATCH}, read in the training loop itself")
    tell("latents/s threaded", loader_rate(path, workers=2), "the same, read ahead by 2 threads")
    tell("webdataset/s", webdataset_rate(path), "webdataset's reader and npy decoder, no shuffle")
    tell("times webdataset", found["latents/s"] / found["webdataset/s"], "")
    if len(cores := sorted(os.sched_getaffinity(0))[:2]) == 2:
        one, two = (rate_of_processes(path, cores[:n]) for n in (1, 2))
        tell("times one core", two / one, f"two processes on two cores ({two:,.0f}/s) against one on one")
    path = write_repeated(folder / "imagenet", IMAGENET, samples_per_shard=1024)
    seconds = min(cold_start_sec(path) for _ in range(3))
    tell(
        "cold start s",
        seconds,
        f"from opening {IMAGENET:,} samples to the first batch of epoch {LATE_EPOCH:,}",
    )
    path = write_repeated(folder / "many", MANY, samples_per_shard=SAMPLES_PER_SHARD)
    seconds, megabytes = min(opening(path) for _ in range(3))
    tell("opening s", seconds, f"of {MANY:,} samples in {MANY // SAMPLES_PER_SHARD + 1:,} shards")
    tell("opening MB", megabytes, "of memory for that")
    return found


def main(arguments: Sequence[str]) -> int:
    """The command line: 1 when a promise is broken."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.bench", description="Measure the reading of shards."
    )
    parser.add_argument("--folder", help="where to put some 4 GiB for the while; default: a temporary folder")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=parser.parse_args(arguments).folder) as folder:
        found = measure(Path(folder))
    broken = [
        f"{name} is {found[name]:.4g}, promised {few:g}" for name, few in LEAST.items() if found[name] < few
    ]
    broken += [
        f"{name} is {found[name]:.4g}, promised {most:g}" for name, most in MOST.items() if found[name] > most
    ]
    print("\n".join(broken) or "all promises kept")
    return 1 if broken else 0


if __name__ == "__main__":
    command.run(main)
