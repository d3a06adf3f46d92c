"""The stream gives the trainer's batches to plain loops, DataLoader workers and WebDataset pipelines, and goes on."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
import webdataset
from torch.utils.data import DataLoader

from drwkv.data.loader import DataConfig, open_data
from drwkv.data.selection import SelectionConfig
from drwkv.data.stream import ShardStream

# As many workers as make the batches uneven, be the cores fewer.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def path(written) -> str:
    return str(written(kind="pixels", num_samples=103, samples_per_shard=10, seed=0))


def stream_of(path, **options) -> ShardStream:
    return ShardStream(path, **({"batch_size": 12, "seed": 5, "streams": 4, "window": 8} | options))


def take(batches, num: int) -> list[dict[str, torch.Tensor]]:
    return list(itertools.islice(batches, num))


def same(found, expected) -> bool:
    """Whether two lists of batches are equal, bit for bit."""
    return len(found) == len(expected) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(found, expected, strict=True)
    )


def sample_ids(batches) -> dict[int, int]:
    """n -> sample id, every n at most once."""
    pairs = [pair for b in batches for pair in zip(b["n"].tolist(), b["sample_id"].tolist(), strict=True)]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def test_the_batches_are_those_of_the_trainer(path):
    select = SelectionConfig(held_out=0.2)
    stream = stream_of(path, flip=True, select=select, start=30, rank=1, world_size=2)
    config = DataConfig([path], streams=4, window=8, flip=True, select=select)
    trainer = open_data(config, seed=5).batches(12, 30, world=SimpleNamespace(rank=1, size=2))
    assert same(take(stream, 20), [vars(batch) for [batch] in take(trainer, 20)])
    trainer.close()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_data_loader_with_workers_gives_the_same_batches_in_the_same_order(path, num_workers):
    loaded = DataLoader(stream_of(path, flip=True), batch_size=None, num_workers=num_workers)
    assert same(take(loaded, 20), take(stream_of(path, flip=True), 20))


def test_a_spawned_worker_opens_the_set_itself(path):
    stream = stream_of(path)
    loaded = DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert same(take(loaded, 4), take(stream_of(path), 4))
    with pytest.raises(ValueError, match="state_after"):
        stream.state_dict()


@pytest.mark.parametrize("num_workers", [0, 2, 4])
def test_epochs_end_with_every_sample_once_in_each(path, num_workers):
    whole = take(DataLoader(stream_of(path, epochs=2), batch_size=None, num_workers=num_workers), 99)
    assert [len(batch["n"]) for batch in whole] == [12] * 17 + [2]
    found = sample_ids(whole)
    assert sorted(found) == list(range(206))
    assert all(sorted(found[n] for n in range(e, e + 103)) == list(range(103)) for e in (0, 103))
    assert not take(stream_of(path, epochs=2, start=206), 1)


def test_a_last_batch_smaller_than_the_world_goes_to_the_first_ranks(path):
    ranks = [take(stream_of(path, epochs=2, rank=rank, world_size=3), 99) for rank in range(3)]
    assert [len(batches) for batches in ranks] == [18, 18, 17]  # 17 * 12 + 2 samples
    assert sorted(sample_ids(itertools.chain(*ranks))) == list(range(206))


def test_a_webdataset_pipeline_starts_with_a_stream(path):
    def brighten(batch):
        return batch["x"].float() / 255, batch["y"]

    stages = (webdataset.map(brighten), webdataset.slice(9))
    expected = [brighten(batch) for batch in take(stream_of(path), 9)]
    pipeline = webdataset.DataPipeline(stream_of(path), *stages)
    loaded = DataLoader(webdataset.DataPipeline(stream_of(path), stages[0]), batch_size=None, num_workers=2)
    for found in (list(pipeline), take(loaded, 9)):
        assert len(found) == 9
        for (x, y), (expected_x, expected_y) in zip(found, expected, strict=True):
            assert torch.equal(x, expected_x) and torch.equal(y, expected_y)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_restart_on_another_world_and_batch_size_goes_on_with_the_next_sample(path, num_workers):
    unbroken = sample_ids(take(stream_of(path), 30))
    first, states = {}, []
    for rank in range(2):
        stream = stream_of(path, rank=rank, world_size=2)
        batches = take(DataLoader(stream, batch_size=None, num_workers=num_workers), 9)
        first |= sample_ids(batches)
        states.append(json.loads(json.dumps(stream.state_after(batches[-1]))))
    assert states[0] == states[1] and states[0]["n"] == 108 and len(first) == 108

    rest = {}
    for rank in range(3):
        stream = stream_of(path, batch_size=28, rank=rank, world_size=3)
        stream.load_state_dict(states[0])
        rest |= sample_ids(take(DataLoader(stream, batch_size=None, num_workers=num_workers), 9))
    assert not first.keys() & rest.keys()
    assert first | rest == unbroken


def test_the_state_counts_what_was_handed_out_in_this_process(path):
    stream = stream_of(path, start=7)
    assert stream.state_dict()["n"] == 7
    batches = iter(stream)
    for taken in range(1, 5):
        batch = next(batches)
        assert stream.state_dict() == stream.state_after(batch)
        assert stream.state_dict()["n"] == 7 + 12 * taken
    batches.close()
    stream.load_state_dict(stream.state_dict())
    assert int(next(iter(stream))["n"].min()) == 55
    ended = stream_of(path, epochs=1)
    *_, last = ended
    assert ended.state_dict()["n"] == ended.state_after(last)["n"] == 103


def test_a_stream_that_workers_read_knows_its_state_by_the_batch_alone(path):
    stream = stream_of(path)
    batches = iter(DataLoader(stream, batch_size=None, num_workers=2))
    batch = next(batches)
    with pytest.raises(ValueError, match=r"read ahead of the loop.*state_after\(batch\)"):
        stream.state_dict()
    assert stream.state_after(batch)["n"] == 12
    del batches
    stream.load_state_dict(stream.state_after(batch))
    assert stream.state_dict()["n"] == 12


def test_a_state_of_another_stream_is_refused_in_one_line(path, write_pixels):
    state = stream_of(path).state_dict()
    for other, key in (
        (stream_of(path, seed=6), "seed was 5 and is 6 here"),
        (stream_of(path, window=9), "window was 8 and is 9"),
        (stream_of(path, select=SelectionConfig(held_out=0.3)), "select was None"),
        (stream_of(write_pixels("other", 50)), "index_hashes was"),
    ):
        with pytest.raises(ValueError, match=key) as caught:
            other.load_state_dict(state)
        assert "\n" not in str(caught.value) and other.state_dict()["n"] == 0
    with pytest.raises(ValueError, match="keys n and data"):
        stream_of(path).load_state_dict({"step": 3})
    with pytest.raises(ValueError, match="n = 0, this stream began at 24"):
        stream_of(path, start=24).state_after(next(iter(stream_of(path))))


def test_the_rank_is_the_launchers_unless_it_is_given(path, monkeypatch):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert same(take(stream_of(path), 3), take(stream_of(path, rank=2, world_size=3), 3))
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        assert same(take(stream_of(path), 3), take(stream_of(path, rank=0, world_size=1), 3))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 1}, "rank is 1 and world_size None"),
        ({"rank": 3, "world_size": 3}, "rank 3 of 3"),
        ({"rank": 0, "world_size": 13}, "batch_size 12 is less than 13 ranks"),
        ({"start": -1}, "start at n = -1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"workers": -1}, "workers is -1"),
    ],
)
def test_what_cannot_be_streamed_is_refused_at_once_in_one_line(path, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        stream_of(path, **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="not a committed shard set"):
        ShardStream("nowhere", batch_size=1)
