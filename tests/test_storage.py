"""What a Storage promises, on a folder and on a real S3 alike; then what a folder alone must keep.

Errors of S3 and its answers that go wrong are test_s3.py's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from s3_server import NEEDS_S3
from small_disk import on_small_disk

from drwkv.storage import TEMPORARY, FolderStorage, Storage, StorageError, is_remote, open_storage, split_path

DATA = bytes(range(256)) * 40
MIB = 1 << 20


@pytest.fixture(params=["folder", pytest.param("s3", marks=NEEDS_S3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty place: the path of a folder that is not there yet, or of a prefix in a new bucket."""
    if request.param == "folder":
        return str(tmp_path / "set")
    server = request.getfixturevalue("s3")
    request.getfixturevalue("use_s3")(server)
    return f"s3://{server.bucket()}/some/set"


@pytest.fixture
def storage(place: str) -> Storage:
    return open_storage(place)


def test_what_was_written_is_read(storage: Storage):
    for name, data in (("manifest.json", b"{}"), ("index/samples.npy", DATA), ("empty", b"")):
        storage.write(name, data)
        assert storage.read(name) == data
        assert storage.size(name) == len(data)
        assert storage.exists(name)
        assert storage.where(name) == f"{storage.path}/{name}"


def test_writing_again_replaces_the_whole_file(storage: Storage):
    storage.write("index/file", DATA)
    storage.write("index/file", b"short")
    assert storage.read("index/file") == b"short"


@pytest.mark.parametrize(
    "start, size", [(0, 10), (300, 700), (10_000, 240), (10_200, 100), (10_240, 1), (99_999, 5), (7, 0)]
)
def test_a_range_is_read_as_far_as_the_file_goes(start: int, size: int, storage: Storage):
    storage.write("file", DATA)
    assert storage.read_range("file", start, size) == DATA[start : start + size]


@pytest.mark.parametrize("read", [
    lambda storage, _: storage.read("index/nothing"),
    lambda storage, _: storage.read_range("index/nothing", 0, 10),
    lambda storage, _: storage.size("index/nothing"),
    lambda storage, folder: storage.download("index/nothing", folder / "copy"),
], ids=["read", "read_range", "size", "download"])  # fmt: skip
def test_what_is_not_there_is_not_found_and_named(
    read: Callable[[Storage, Path], object], storage: Storage, tmp_path: Path
):
    storage.write("index/something", b"x")
    with pytest.raises(FileNotFoundError, match="index/nothing"):
        read(storage, tmp_path)
    assert not storage.exists("index/nothing")


def test_names_are_sorted_and_begin_with_what_is_asked_for(place: str):
    storage, beside = open_storage(place), open_storage(f"{place}-beside")
    names = ["train/000.tar", "train/001.tar", "index/a", "manifest.json", "training", "a b+c=d%25é"]
    for name in names:
        storage.write(name, b"x")
    beside.write("other", b"x")
    assert storage.names() == sorted(names)
    assert storage.names("train/") == ["train/000.tar", "train/001.tar"]
    assert storage.names("train/001") == ["train/001.tar"]
    assert storage.names("train") == ["train/000.tar", "train/001.tar", "training"]
    assert storage.names("nothing/") == []


def test_a_place_where_nothing_was_written_has_no_names(storage: Storage):
    assert storage.names() == []
    assert not storage.exists("manifest.json")


def test_what_was_removed_is_gone_and_removing_it_again_is_no_error(storage: Storage):
    storage.write("index/file", DATA)
    storage.remove("index/file")
    assert not storage.exists("index/file")
    storage.remove("index/file")
    assert storage.names() == []


def test_a_new_file_is_written_once_and_its_own_writer_may_say_it_again(storage: Storage):
    assert storage.write_new("claims/7", b"mine")
    assert not storage.write_new("claims/7", b"yours")
    assert storage.read("claims/7") == b"mine"
    assert storage.write_new("claims/7", b"mine")
    storage.remove("claims/7")
    assert storage.write_new("claims/7", b"yours")


def test_of_eight_threads_exactly_one_makes_a_new_file(storage: Storage):
    together = threading.Barrier(8)

    def claim(thread: int) -> list[bool]:
        won = []
        for i in range(10):
            together.wait()
            won.append(storage.write_new(f"claims/{i}", f"thread {thread}".encode()))
        return won

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(claim, range(8)))
    for i, won in enumerate(zip(*results, strict=True)):
        assert sum(won) == 1
        assert storage.read(f"claims/{i}") == f"thread {won.index(True)}".encode()


CLAIM = """
import sys, time
from drwkv.storage import open_storage
path, me, start = sys.argv[1:]
storage = open_storage(path)
storage.exists("warm")
time.sleep(max(0.0, float(start) - time.time()))
print([i for i in range(25) if storage.write_new(f"claims/{i}", me.encode())])
"""


def test_of_three_processes_exactly_one_makes_a_new_file(place: str, root: Path):
    start = str(time.time() + 1.5)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, place, str(me), start], cwd=root, stdout=subprocess.PIPE
        )
        for me in range(3)
    ]
    claims = [
        claimed
        for process in processes
        for claimed in process.communicate()[0].decode().strip("[]\n").split(", ")
    ]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(int(claim) for claim in claims if claim) == list(range(25))


@pytest.mark.parametrize("size", [0, 1000, 16 * MIB, 40 * MIB + 17])
def test_a_file_is_moved_up_and_copied_down_whole(size: int, storage: Storage, tmp_path: Path):
    data = os.urandom(size)
    file = tmp_path / "local"
    file.write_bytes(data)
    storage.write("shards/0.tar", b"what was there")
    storage.upload("shards/0.tar", file)
    assert not file.exists()
    assert storage.size("shards/0.tar") == size
    storage.download("shards/0.tar", file)
    assert file.read_bytes() == data
    assert storage.names() == ["shards/0.tar"]


def test_a_folder_takes_a_file_from_another_file_system(tmp_path: Path):
    with tempfile.NamedTemporaryFile(dir="/dev/shm", delete=False) as file:
        file.write(DATA)
    source = Path(file.name)
    assert source.stat().st_dev != tmp_path.stat().st_dev
    storage = FolderStorage(str(tmp_path))
    storage.upload("shards/0.tar", source)
    assert storage.read("shards/0.tar") == DATA
    assert not source.exists()


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path):
    storage = FolderStorage(str(tmp_path))
    storage.write("manifest.json", b"old")
    storage.temporary("manifest.json").symlink_to("/dev/full")
    with pytest.raises(StorageError) as caught:
        storage.write("manifest.json", DATA)
    assert str(caught.value) == (
        f"{tmp_path}/manifest.json: cannot be written: No space left on device; "
        "free some space and run the same command again"
    )
    assert storage.read("manifest.json") == b"old"
    assert os.listdir(tmp_path / TEMPORARY) == []
    storage.write("manifest.json", DATA)


FILL = """
import os, sys
from pathlib import Path
from drwkv.storage import FolderStorage, StorageError
folder, elsewhere = sys.argv[1:]
storage = FolderStorage(folder)
storage.write("first", bytes(700_000))
for write in (
    lambda: storage.write("second", bytes(700_000)),
    lambda: storage.write_new("third", bytes(700_000)),
    lambda: storage.upload("fourth", Path(elsewhere)),
):
    try:
        write()
    except StorageError as error:
        print(error)
assert storage.names() == ["first"], storage.names()
assert os.listdir(f"{folder}/.tmp") == []
assert os.path.getsize(elsewhere) == 700_000
storage.remove("first")
storage.upload("fourth", Path(elsewhere))
"""


def test_a_full_disk_is_named_and_the_same_works_when_there_is_space(tmp_path: Path, root: Path):
    (tmp_path / "elsewhere").write_bytes(bytes(700_000))
    disk = tmp_path / "disk"
    command = on_small_disk(disk, sys.executable, "-c", FILL, str(disk), str(tmp_path / "elsewhere"))
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        f"{disk}/{name}" for name in ("second", "third", "fourth")
    ]
    assert all("No space left on device; free some space" in line for line in lines)


def test_files_that_are_not_whole_yet_have_no_names(tmp_path: Path):
    storage = FolderStorage(str(tmp_path))
    storage.write("shards/0.tar", DATA)
    storage.temporary("shards/1.tar").write_bytes(DATA[:100])
    assert storage.names() == ["shards/0.tar"]


def test_other_schemes_are_refused():
    with pytest.raises(ValueError, match=r"gs://bucket/x: only folders and s3://bucket/prefix can be opened"):
        open_storage("gs://bucket/x")


def test_slashes_at_the_end_change_nothing(tmp_path: Path):
    assert open_storage(f"{tmp_path}/").path == str(tmp_path)
    assert open_storage("/").path == "/"


def test_a_path_is_split_into_its_place_and_its_name():
    assert split_path("s3://bucket/set/manifest.json") == ("s3://bucket/set", "manifest.json")
    assert split_path("/manifest.json") == ("/", "manifest.json")
    assert split_path("manifest.json") == (".", "manifest.json")
    assert is_remote("s3://bucket/set") and not is_remote(Path("set"))
