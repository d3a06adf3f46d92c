"""Training from S3 is training from a folder: the same losses, and trouble is one line for the user."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from faulty_proxy import Fault, Kind
from processes import Applications, Group, losses

from drwkv.storage import open_storage

STEPS = 12


def arguments(folder: Path, shards: str, *more: str) -> list[str]:
    return [
        "train_dist.py", "--config", "configs/digits.yaml", f"run.folder={folder}", f"run.total_steps={STEPS}",
        f"data.paths=[{shards}]", "run.batch_size=48", "monitor.grid_every_steps=0", "checkpoint.every_steps=100",
        "model.options.hidden_size=32", "model.options.depth=3", "monitor.progress=false", *more,
    ]  # fmt: skip


@pytest.fixture
def on_s3(digits: Path, s3, use_s3) -> str:
    """The training digits, copied to a bucket."""
    use_s3(s3)
    place = f"s3://{s3.bucket()}/digits"
    source, target = open_storage(digits / "train"), open_storage(place)
    for name in source.names():
        target.write(name, source.read(name))
    return place


def test_losses_from_s3_through_faults_are_those_from_a_folder(
    applications: Applications, digits: Path, on_s3: str, faulty_s3, use_s3, tmp_path: Path
) -> None:
    applications.run(*arguments(tmp_path / "local", str(digits / "train")), world_size=2)
    server, proxy = faulty_s3
    proxy.faults = (Fault(rate=0.2, kinds=tuple(kind for kind in Kind if kind is not Kind.SLOW_DOWN)),)
    use_s3(server)
    cache = [f"data.cache={tmp_path / 'cache'}", "data.cache_gib=0.1"]
    applications.run(*arguments(tmp_path / "remote", on_s3, *cache), world_size=2)
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    assert sum(proxy.counts.values()) >= 1


def test_a_shard_that_is_gone_from_the_bucket_ends_the_run_in_one_line(
    applications: Applications, on_s3: str, tmp_path: Path
) -> None:
    open_storage(on_s3).remove("shard-000003.tar")
    error = applications.refused(*arguments(tmp_path / "run", on_s3, f"data.cache={tmp_path / 'cache'}"))
    assert f"{on_s3}/shard-000003.tar" in error


def test_a_bucket_that_is_not_there_ends_the_run_before_anything_is_written(
    applications: Applications, on_s3: str, tmp_path: Path
) -> None:
    error = applications.refused(*arguments(tmp_path / "run", "s3://no-such-bucket-at-all/digits"))
    assert "s3://no-such-bucket-at-all: there is no such bucket" in error
    assert not (tmp_path / "run").exists()


def wait_until_it_stands_still(group: Group, folder: Path) -> None:
    """Until no step has ended for three seconds, though some had."""
    lines, since, end = 0, time.monotonic(), time.monotonic() + 90
    while not lines or time.monotonic() - since < 3:
        assert group.running() and time.monotonic() < end, group.log.read_text()
        metrics = folder / "metrics.jsonl"
        now = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        if now != lines:
            lines, since = now, time.monotonic()
        time.sleep(0.1)


@pytest.mark.proof
def test_a_signal_during_an_outage_saves_and_asks_to_be_requeued(
    applications: Applications, on_s3: str, faulty_s3, use_s3, tmp_path: Path
) -> None:
    server, proxy = faulty_s3
    use_s3(server)
    folder = tmp_path / "run"
    shards = f"data.cache={tmp_path / 'cache'}"
    # The first batches need few shards; the others do not come.
    proxy.faults = (Fault(rate=1.0, kinds=(Kind.RESET,), match="shard-00000[2-9]"),)
    more = [
        "run.batch_size=2",
        "data.prefetch=2",
        "data.streams=2",
        "data.window=16",
        "run.total_steps=100000",
    ]
    group = applications.start(*arguments(folder, on_s3, shards, *more), world_size=2)
    wait_until_it_stands_still(group, folder)
    assert proxy.counts[Kind.RESET]
    group.kill(signal.SIGTERM)
    finished = group.wait(60)
    assert finished.codes == [0, 0], finished.output
    assert (folder / "requeue").exists()
