"""What the processes of a node tell each other in the cache's folder, and what they may take away."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from cached_sets import eventually

from drwkv.data.cache import NodeCache
from drwkv.data.cache.folder import MTIME_TICK_NS, CacheFolder
from drwkv.data.cache.life import LifeSign
from drwkv.data.cache.locks import open_shared
from drwkv.data.cache.space import GIB, Space
from drwkv.data.open_files import OpenFile


@pytest.fixture
def folder(tmp_path: Path) -> CacheFolder:
    return CacheFolder(tmp_path / "cache")


def hold(folder: CacheFolder, key: str, *numbers: int, num_bytes: int = 100) -> None:
    for name in ("index", "shards"):
        (folder.set_folder(key) / name).mkdir(parents=True, exist_ok=True)
    (folder.set_folder(key) / "source.json").write_text("{}")
    for number in numbers:
        folder.shard_file(key, number).write_bytes(bytes(num_bytes))


def forked_child() -> int:
    """A child that holds every descriptor of this process until it is killed."""
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    return child


def test_a_child_forked_while_a_lock_is_held_does_not_hold_it_on(folder):
    entered, leave = threading.Event(), threading.Event()

    def hold_space() -> None:
        with folder.locked("space.lock"):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=hold_space)
    thread.start()
    entered.wait()
    hold(folder, "set", 0)
    read = OpenFile(open_shared(folder.shard_file("set", 0)))
    child = forked_child()
    try:
        leave.set()
        thread.join()
        fd = folder.try_lock("space.lock")
        assert fd is not None
        os.close(fd)
        # Nor what it does not read.
        del read
        folder.evict(("set", 0))
        folder.clear_leaving()
        assert folder.bytes_leaving() == 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_what_comes_and_goes_is_seen_at_once_though_the_list_is_kept(folder, monkeypatch):
    hold(folder, "set", *range(5))
    for number in range(5, 10):
        assert sorted(folder.held_set("set").numbers) == list(range(number - 5, number))
        folder.evict(("set", number - 5))
        hold(folder, "set", number, num_bytes=200)
    assert folder.held_set("set").num_bytes == 5 * 200
    # Nothing is read again while nothing changes.
    shards = folder.set_folder("set") / "shards"
    os.utime(shards, ns=(0, os.stat(shards).st_mtime_ns - 2 * MTIME_TICK_NS))
    folder.held_set("set")
    monkeypatch.setattr(os, "listdir", lambda path: pytest.fail("the folder was listed again"))
    assert folder.held_set("set").num_bytes == 5 * 200


def test_a_set_that_a_living_process_opens_is_not_removed_by_one_that_does_not_know_it_yet(folder):
    life = LifeSign(folder.ranks)
    hold(folder, "opened")
    hold(folder, "abandoned")
    hold(folder, "full", 0)
    life.publish({"opened": np.zeros(0, np.int64)})
    long_ago = {"full": np.array([7])}
    assert Space(folder, life.id, 150).reserve(long_ago, 100, 5) is not None
    assert {held.key for held in folder.held()} == {"opened", "full"}
    # Nor one whose index is being fetched, by whoever that is.
    life.end()
    with folder.locked("sets/opened.lock"):
        folder.remove_set("opened")
    assert folder.set_folder("opened").exists()
    folder.remove_set("opened")
    assert not folder.set_folder("opened").exists()


def test_a_file_on_its_way_counts_by_the_blocks_that_it_has_not_by_its_size(folder, monkeypatch):
    free, incoming = folder.free_bytes(), folder.new_incoming("somebody", int(GIB))
    with open(incoming, "wb") as file:
        file.truncate(int(GIB))
    assert abs(free - int(GIB) - folder.free_bytes()) < int(GIB) // 2


def test_runs_that_share_a_folder_have_the_largest_of_their_budgets(tmp_path):
    small, large = (NodeCache(str(tmp_path / "cache"), gib) for gib in (1, 3))
    space = small.session().space
    assert space.budget() == GIB
    large.session()
    assert space.budget() == 3 * GIB
    large.close()
    assert space.budget() == GIB
    small.close()


def test_a_living_process_shows_that_its_files_are_no_old_rubbish(tmp_path, monkeypatch):
    monkeypatch.setattr("drwkv.data.cache.session.REPUBLISH_SEC", 0.1)
    cache = NodeCache(str(tmp_path / "cache"))
    cache.session()
    files = {cache.folder.ranks / f"{cache.session().life.id}.{kind}" for kind in ("lock", "npz")}
    cache.session().publish()
    for file in files:
        os.utime(file, (0, 0))
    monkeypatch.setattr("drwkv.data.cache.session.PUBLISH_SEC", 0.1)
    eventually(lambda: all(file.stat().st_mtime > 0 for file in files))
    cache.close()
