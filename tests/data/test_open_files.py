"""How a shard is read: mapped where that is safe, only the pages that are asked for, with room for enough files."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from drwkv.data import open_files
from drwkv.data.open_files import LocalFiles, OpenFile
from drwkv.data.shards import ShardSet

MIB = 1 << 20


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A file of 8 MiB, whole on the disk, and its bytes."""
    content = np.random.default_rng(0).integers(0, 256, 8 * MIB).astype(np.uint8)
    with open(tmp_path / "large", "wb") as file:
        file.write(content.tobytes())
        file.flush()
        os.fsync(file.fileno())
    return tmp_path / "large", content


def copy_out(file: OpenFile, starts: list[int], size: int, *, file_bytes: int = 8 * MIB) -> np.ndarray:
    target = np.zeros((len(starts), size), np.uint8)
    places = (np.arange(len(starts)) * size).tolist()
    assert file.copy_out(starts, size, target.reshape(-1), places, file_bytes=file_bytes) == []
    return target


@pytest.mark.parametrize("safe", [True, False])
def test_the_same_bytes_come_with_and_without_a_mapping(large, safe, monkeypatch):
    path, content = large
    monkeypatch.setattr(open_files, "on_block_device", lambda device: safe)
    [file] = [LocalFiles([str(path)]).get(0)]
    found = copy_out(file, [5, 3 * MIB + 1, 8 * MIB - 1000], 1000)
    for row, start in zip(found, (5, 3 * MIB + 1, 8 * MIB - 1000), strict=True):
        np.testing.assert_array_equal(row, content[start : start + 1000])
    assert (file._mapped is not None) == safe


def test_only_files_on_a_block_device_of_this_machine_are_mapped():
    devices = {os.makedev(*map(int, name.split(":"))) for name in os.listdir("/sys/dev/block")}
    assert all(map(open_files.on_block_device, devices))
    assert not open_files.on_block_device(os.stat("/proc").st_dev)
    assert not open_files.on_block_device(os.makedev(0xEB1, 0xF0B))  # as Lustre's, which is no zero


def test_where_mapping_fails_the_file_is_read_without_and_that_is_told_once(large, monkeypatch, caplog):
    path, content = large

    def refuse(*arguments: object, **options: object) -> torch.Tensor:
        raise RuntimeError("unable to mmap: Cannot allocate memory (12)\nmore lines")

    monkeypatch.setattr(open_files, "on_block_device", lambda device: True)
    monkeypatch.setattr(torch, "from_file", refuse)
    file = LocalFiles([str(path)]).get(0)
    for _ in range(2):
        np.testing.assert_array_equal(copy_out(file, [MIB], 1000)[0], content[MIB : MIB + 1000])
    assert [record.message.count("without a mapping") for record in caplog.records] == [1]
    assert "\n" not in caplog.text.strip()


def test_a_cold_file_gives_the_pages_that_are_asked_for_and_not_megabytes_around_them(large, monkeypatch):
    path, content = large
    if not open_files.on_block_device(os.stat(path).st_dev):
        pytest.skip("the temporary files are on no block device")
    file = LocalFiles([str(path)]).get(0)
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if in_page_cache(file.fd, 7 * MIB):
        pytest.skip("this file system keeps its pages")
    start = 4 * MIB
    np.testing.assert_array_equal(copy_out(file, [start], 1000)[0], content[start : start + 1000])
    assert file._mapped is not None and in_page_cache(file.fd, start)
    assert not any(in_page_cache(file.fd, start + away) for away in (-64 << 10, 64 << 10, MIB))


def in_page_cache(fd: int, start: int) -> bool:
    """Asking brings the page itself in, so each can be asked about once."""
    try:
        return os.preadv(fd, [bytearray(1)], start, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            pytest.skip("this file system cannot tell what is in page cache")
        raise


def test_a_set_keeps_a_quarter_of_the_descriptors_open_after_raising_the_soft_limit():
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 5008))\n"
        "from drwkv.data.open_files import most_open\n"
        "print(most_open(), *resource.getrlimit(resource.RLIMIT_NOFILE))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.split() == ["1252", "5008", "5008"]


@contextlib.contextmanager
def no_more_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first_free = os.open("/", os.O_RDONLY)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_want_of_descriptors_is_no_damage_of_a_sample_and_leads_to_no_other_in_its_place(write_pixels):
    shards = ShardSet.open(write_pixels(), on_corrupt="replace")
    shards.read(np.array([0]))  # which imports what is imported late
    with no_more_descriptors(), pytest.raises(OSError) as caught:
        shards.read(np.array([50]))
    assert caught.value.errno == errno.EMFILE and not isinstance(caught.value, ValueError)
    assert not shards.replaced and len(shards.read(np.array([50]))[0]) == 1
