"""What reading costs: beside webdataset's reader, at a late epoch, of a very large index, on two cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep import bench
from drwkv.data.shards import ShardSet


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return bench.write_latents(tmp_path_factory.mktemp("speed") / "latents", 4096)


def test_the_loader_is_seven_times_as_fast_as_webdatasets_own_reader(latents):
    """Ours in the order law's shuffled order, theirs in the tars' own; by the best of short rounds of each."""
    ours, theirs = bench.loader_rate(latents, rounds=3), bench.webdataset_rate(latents, rounds=2)
    assert ours >= bench.LEAST["times webdataset"] * theirs


def test_both_readers_of_the_bench_give_the_same_latents(latents):
    rows = ShardSet.open(latents)
    sources = np.load(Path(latents) / "index/samples.npy")
    assert rows.num_samples == len(sources) == 4096
    batch = next(bench.webdataset_batches(latents, 512))
    np.testing.assert_array_equal(batch.numpy(), rows.read(np.arange(512))[0])


def test_imagenets_size_starts_at_epoch_1399_in_half_a_second(tmp_path):
    path = bench.write_repeated(tmp_path, bench.IMAGENET, samples_per_shard=1024)
    assert ShardSet.open(path).num_samples == bench.IMAGENET
    assert min(bench.cold_start_sec(path) for _ in range(3)) < bench.MOST["cold start s"]


@pytest.mark.proof
def test_a_hundred_million_samples_open_in_a_second_and_200_mb(tmp_path):
    path = bench.write_repeated(tmp_path, bench.MANY, samples_per_shard=bench.SAMPLES_PER_SHARD)
    seconds, megabytes = min(bench.opening(path) for _ in range(3))
    assert seconds < bench.MOST["opening s"] and megabytes < bench.MOST["opening MB"]


@pytest.mark.proof
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core")
def test_the_bench_keeps_every_promise_on_a_quiet_machine(tmp_path):
    finished = subprocess.run(
        [sys.executable, "-m", "data_prep.bench", "--folder", str(tmp_path)], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
