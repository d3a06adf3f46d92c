"""S3Storage where things go wrong: what a user must mend is said in one line, and broken answers are survived.

What it shares with a folder is test_storage.py's. The server is real, and so are its refusals.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from faulty_proxy import Fault, FaultyProxy, Kind
from s3_server import S3Server
from small_disk import on_small_disk

from drwkv.s3 import S3Storage
from drwkv.storage import StorageError

MIB = 1 << 20
Use = Callable[[S3Server], None]

OPERATIONS: dict[str, Callable[[S3Storage, Path], object]] = {
    "read": lambda storage, _: storage.read("set/file"),
    "read_range": lambda storage, _: storage.read_range("set/file", 0, 10),
    "size": lambda storage, _: storage.size("set/file"),
    "exists": lambda storage, _: storage.exists("set/file"),
    "names": lambda storage, _: storage.names(),
    "write": lambda storage, _: storage.write("set/file", b"x"),
    "write_new": lambda storage, _: storage.write_new("set/file", b"x"),
    "upload": lambda storage, folder: storage.upload("set/file", _file(folder, 1000)),
    "upload in parts": lambda storage, folder: storage.upload("set/file", _file(folder, 6 * MIB)),
    "download": lambda storage, folder: storage.download("set/file", folder / "copy"),
    "remove": lambda storage, _: storage.remove("set/file"),
}
every_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
Operation = Callable[[S3Storage, Path], object]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest parts that S3 allows, so that 6 MiB go up in two."""
    monkeypatch.setattr("drwkv.s3.PART_BYTES", 5 * MIB)


def _file(folder: Path, size: int) -> Path:
    path = folder / "local"
    path.write_bytes(os.urandom(size))
    return path


def _refusal(storage: S3Storage, operation: Operation, folder: Path, within_sec: float = 5.0) -> str:
    """The one line with which an operation is refused, soon."""
    started = time.monotonic()
    with pytest.raises(StorageError) as caught:
        operation(storage, folder)
    assert time.monotonic() - started < within_sec
    assert "\n" not in str(caught.value)
    return str(caught.value)


@every_operation
def test_a_bucket_that_is_not_there_is_named(operation: Operation, s3: S3Server, use_s3: Use, tmp_path: Path):
    use_s3(s3)
    line = _refusal(S3Storage("s3://no-such-bucket/set"), operation, tmp_path)
    assert line == (
        f"s3://no-such-bucket: there is no such bucket at {s3.endpoint}: create it, or correct the path"
    )


@every_operation
def test_access_that_is_denied_is_named(
    operation: Operation, s3: S3Server, s3_as_stranger: S3Server, use_s3: Use, tmp_path: Path
):
    bucket = s3.bucket()
    s3.client().put_object(Bucket=bucket, Key="set/file", Body=b"theirs")
    use_s3(s3_as_stranger)
    line = _refusal(S3Storage(f"s3://{bucket}"), operation, tmp_path)
    assert line.startswith(f"s3://{bucket}") and f"access denied at {s3.endpoint}" in line
    assert s3.client().get_object(Bucket=bucket, Key="set/file")["Body"].read() == b"theirs"


@pytest.mark.parametrize("wrong, said", [
    ({"access_key": "nobody"}, "the key id is not known at {}: check AWS_ACCESS_KEY_ID or the profile"),
    ({"secret_key": "guessed"}, "the secret key is wrong at {}: check AWS_SECRET_ACCESS_KEY or the profile"),
])  # fmt: skip
def test_a_wrong_key_is_named_without_being_shown(
    wrong: dict[str, str], said: str, s3: S3Server, use_s3: Use, tmp_path: Path
):
    storage = S3Storage(f"s3://{s3.bucket()}/set")
    use_s3(replace(s3, **wrong))
    for operation in ("read", "names", "write", "write_new", "exists"):
        line = _refusal(storage, OPERATIONS[operation], tmp_path)
        assert said.format(s3.endpoint) in line
        assert "guessed" not in line and s3.secret_key not in line


def test_keys_that_are_missing_are_named(
    s3: S3Server, use_s3: Use, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    use_s3(s3)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    line = _refusal(S3Storage("s3://bucket/set"), OPERATIONS["read"], tmp_path)
    assert "s3://bucket/set/set/file: no usable key" in line and "set AWS_ACCESS_KEY_ID" in line


def test_an_endpoint_that_nobody_answers_is_named_within_half_a_minute(
    s3: S3Server, use_s3: Use, tmp_path: Path
):
    use_s3(replace(s3, endpoint="http://127.0.0.1:9"))
    line = _refusal(S3Storage("s3://bucket/set"), OPERATIONS["read"], tmp_path, within_sec=30.0)
    assert "s3://bucket/set/set/file: cannot read it" in line and "http://127.0.0.1:9" in line


def test_a_path_without_a_bucket_is_refused():
    with pytest.raises(ValueError, match="s3:///set: no bucket is named; give s3://bucket/prefix"):
        S3Storage("s3:///set")


COMMAND = """
import sys
from drwkv.command import run
from drwkv.storage import open_storage
run(lambda arguments: open_storage(arguments[0]).names() and None)
"""


def test_a_command_ends_with_one_line_and_code_2(s3: S3Server, root: Path):
    run = subprocess.run(
        [sys.executable, "-c", COMMAND, "s3://no-such-bucket/set"],
        cwd=root,
        env={**os.environ, **s3.environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: s3://no-such-bucket: there is no such bucket")
    assert len(run.stderr.splitlines()) == 1


DOWNLOAD = """
import sys
from pathlib import Path
from drwkv.storage import StorageError, open_storage
folder, path = sys.argv[1:]
try:
    open_storage(path).download("shard", Path(folder) / "shard")
except StorageError as error:
    print(error)
"""


def test_a_download_to_a_full_disk_is_named_at_once(s3: S3Server, root: Path, tmp_path: Path):
    bucket, disk = s3.bucket(), tmp_path / "disk"
    s3.client().put_object(Bucket=bucket, Key="shard", Body=bytes(2 * MIB))
    started = time.monotonic()
    run = subprocess.run(
        on_small_disk(disk, sys.executable, "-c", DOWNLOAD, str(disk), f"s3://{bucket}"),
        cwd=root,
        env={**os.environ, **s3.environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{disk}/shard: cannot be written: No space left on device; free some space")
    assert time.monotonic() - started < 10


def test_a_list_goes_on_past_a_thousand_names(s3: S3Server, use_s3: Use):
    use_s3(s3)
    bucket, plain = s3.bucket(), s3.client()
    names = [f"{i:04d}" for i in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: plain.put_object(Bucket=bucket, Key=f"set/{name}", Body=b"x"), names))
    storage = S3Storage(f"s3://{bucket}/set")
    assert storage.names() == names
    assert storage.names("10") == names[1000:1100]


def test_an_object_of_another_program_is_held_against_its_etag(
    s3: S3Server, faulty_s3: tuple[S3Server, FaultyProxy], use_s3: Use
):
    server, proxy = faulty_s3
    bucket, data = s3.bucket(), os.urandom(50_000)
    s3.client().put_object(Bucket=bucket, Key="foreign", Body=data)
    use_s3(server)
    proxy.faults = (Fault(1.0, (Kind.FLIPPED_DOWN,), at_most=3),)
    assert S3Storage(f"s3://{bucket}").read("foreign") == data
    assert proxy.counts == {Kind.FLIPPED_DOWN: 3}


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("name", ["write_new", "upload in parts", "names", "download"])
def test_each_fault_alone_is_survived(
    kind: Kind, name: str, s3: S3Server, faulty_s3: tuple[S3Server, FaultyProxy], use_s3: Use, tmp_path: Path
):
    """One request of each method is struck, of the upload in parts its beginning, a part and its completion."""
    server, proxy = faulty_s3
    bucket, plain = s3.bucket(), s3.client()
    if name in ("names", "download"):
        plain.put_object(Bucket=bucket, Key="set/file", Body=b"there")
    use_s3(server)
    patterns = ("^POST .*uploads", "^PUT", "^POST .*uploadId", "^HEAD", "^GET")
    proxy.faults = tuple(Fault(1.0, (kind,), pattern, at_most=1) for pattern in patterns)
    result = OPERATIONS[name](S3Storage(f"s3://{bucket}"), tmp_path)
    assert result == {"write_new": True, "names": ["set/file"]}.get(name)
    stored = plain.get_object(Bucket=bucket, Key="set/file")["Body"].read()
    assert len(stored) == {"write_new": 1, "upload in parts": 6 * MIB}.get(name, 5)
    if name == "download":
        assert (tmp_path / "copy").read_bytes() == b"there"


def test_an_upload_whose_id_was_damaged_begins_again(s3: S3Server, use_s3: Use, tmp_path: Path):
    storage = S3Storage(f"s3://{s3.bucket()}")
    fault = Fault(1.0, (Kind.FLIPPED_DOWN,), "^POST .*uploads", at_most=1)
    ids: set[str] = set()
    for seed in itertools.count():  # it says which bit is flipped: until that is one of the id
        with FaultyProxy(s3.endpoint, fault, seed=seed) as proxy:
            use_s3(replace(s3, endpoint=proxy.endpoint))
            storage.upload("shard", _file(tmp_path, 6 * MIB))
            assert storage.size("shard") == 6 * MIB
            ids = {uploads[0] for line in proxy.requests if (uploads := re.findall("uploadId=([^&]+)", line))}
        if len(ids) == 2:
            break


def _use_everything(storage: S3Storage, number: int, folder: Path) -> None:
    """One of everything that a Storage can do, on names of its own; each result is checked."""
    numbers = random.Random(number)
    size = 6 * MIB if number % 50 == 7 else numbers.randrange(1, 60_000)
    data, file, name = numbers.randbytes(size), folder / str(number), f"{number:06d}"
    file.write_bytes(data)
    storage.upload(f"shards/{name}", file)
    assert storage.size(f"shards/{name}") == size
    storage.download(f"shards/{name}", file)
    assert file.read_bytes() == data
    file.unlink()

    start = numbers.randrange(size)
    expected = data[start : start + 5000]
    # A range has no checksum of its own: its reader has one, and asks again.
    assert any(storage.read_range(f"shards/{name}", start, 5000) == expected for _ in range(20))

    storage.write(f"files/{name}", data[:5000])
    assert storage.read(f"files/{name}") == data[:5000]
    assert storage.write_new(f"claims/{name}", name.encode())
    assert not storage.write_new(f"claims/{name}", b"somebody else")
    assert storage.read(f"claims/{name}") == name.encode()
    assert storage.names(f"claims/{name}") == [f"claims/{name}"]
    storage.remove(f"claims/{name}")
    assert not storage.exists(f"claims/{name}")


IN_BODIES = (Kind.TRUNCATED, Kind.FLIPPED_DOWN, Kind.FLIPPED_UP)  # which not every request has
OTHERS = tuple(kind for kind in Kind if kind not in IN_BODIES)


@pytest.mark.parametrize("rate, others, times", [
    # 503 SlowDown makes boto3 do as it says, which takes its time; above each operation meets it once.
    pytest.param(0.3, tuple(kind for kind in OTHERS if kind is not Kind.SLOW_DOWN), 8, id="30 % but for SlowDown"),
    pytest.param(0.05, OTHERS, 20, id="5 %", marks=pytest.mark.proof),
])  # fmt: skip
def test_with_broken_answers_every_byte_is_right_in_the_end(
    rate: float,
    others: tuple[Kind, ...],
    times: int,
    s3: S3Server,
    faulty_s3: tuple[S3Server, FaultyProxy],
    use_s3: Use,
    tmp_path: Path,
):
    server, proxy = faulty_s3
    use_s3(server)
    storage = S3Storage(f"s3://{s3.bucket()}/set")
    proxy.faults = (
        Fault(rate, others, "^(HEAD|DELETE)"),
        Fault(0.6 * rate, IN_BODIES, "^(GET|PUT|POST)"),
        Fault(0.4 * rate, others, "^(GET|PUT|POST)"),
    )
    done = 0
    with ThreadPoolExecutor(24) as pool:
        while min(proxy.counts[kind] for kind in IN_BODIES + others) < times:
            numbers = range(done, done + 24)
            done += len(list(pool.map(lambda number: _use_everything(storage, number, tmp_path), numbers)))
    assert abs(len(proxy.struck) / len(proxy.requests) - rate) < 0.25 * rate
    proxy.faults = ()
    names = [f"{number:06d}" for number in range(done)]
    assert storage.names() == [f"{kind}/{name}" for kind in ("files", "shards") for name in names]


def test_of_eight_threads_one_wins_also_when_answers_are_lost(
    s3: S3Server, faulty_s3: tuple[S3Server, FaultyProxy], use_s3: Use
):
    server, proxy = faulty_s3
    use_s3(server)
    storage = S3Storage(f"s3://{s3.bucket()}")
    proxy.faults = (Fault(0.5, (Kind.ERROR_AFTER, Kind.RESET_AFTER), "^PUT"),)
    with ThreadPoolExecutor(8) as pool:
        for i in range(8):
            claims = [f"thread {thread}".encode() for thread in range(8)]
            won = list(pool.map(lambda claim: storage.write_new(f"claims/{i}", claim), claims))  # noqa: B023
            assert sum(won) == 1
            assert storage.read(f"claims/{i}") == claims[won.index(True)]
    assert len(proxy.struck) >= 4  # of the 8 that the server did
