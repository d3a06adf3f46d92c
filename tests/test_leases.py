"""A unit has one worker while that lives, and soon another when it does not; nobody needs a clock that agrees."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import ROOT
from s3_server import NEEDS_S3

from drwkv.leases import Leases
from drwkv.storage import Storage, open_storage

HOLD = """
import sys, time
from drwkv.leases import Leases
from drwkv.storage import open_storage
with Leases(open_storage(sys.argv[1]), "claims", lease_sec=60) as leases:
    print(leases.claim("unit"), flush=True)
    time.sleep(600)
"""


@pytest.fixture(params=["folder", pytest.param("s3", marks=NEEDS_S3)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "folder":
        return open_storage(tmp_path)
    server = request.getfixturevalue("s3")
    request.getfixturevalue("use_s3")(server)
    return open_storage(f"s3://{server.bucket()}/set")


def lease_of(storage: Storage, unit: str = "unit") -> dict:
    return json.loads(storage.read(f"claims/{unit}"))


def pretend(storage: Storage, **changes: object) -> None:
    """Write the lease as another worker would have."""
    storage.write("claims/unit", json.dumps(lease_of(storage) | changes).encode())


def until(happens: Callable[[], bool], within_sec: float) -> bool:
    end = time.monotonic() + within_sec
    while time.monotonic() < end:
        if happens():
            return True
        time.sleep(0.02)
    return False


def test_of_many_workers_one_gets_a_unit_and_when_it_is_released_another(storage):
    def attempt(leases: Leases) -> bool:
        return leases.claim("unit")

    workers = [Leases(storage, "claims", lease_sec=60) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(attempt, workers))
        assert sum(got) == 1
        workers[got.index(True)].release("unit")
        assert sum(pool.map(attempt, workers)) == 1


def test_a_unit_of_a_killed_process_of_this_machine_is_free_at_once(storage):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, storage.path], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "True\n"
    leases = Leases(storage, "claims", lease_sec=600)
    assert not leases.claim("unit")
    holder.kill()
    holder.wait()
    assert until(lambda: leases.claim("unit"), 5)
    holder.stdout.close()


def test_a_number_of_a_process_that_was_given_out_again_is_no_life_sign(storage):
    leases = Leases(storage, "claims", lease_sec=600)
    assert leases.claim("unit")
    pretend(storage, started=lease_of(storage)["started"] - 1, worker="another")
    assert Leases(storage, "claims", lease_sec=600).claim("unit")


def test_a_unit_of_another_machine_is_free_when_its_lease_has_stood_still_for_its_time(storage):
    leases = Leases(storage, "claims", lease_sec=0.5)
    assert leases.claim("unit")
    pretend(storage, machine="elsewhere", worker="another")
    watcher = Leases(storage, "claims", lease_sec=0.5)
    begin = time.monotonic()
    assert not watcher.claim("unit")
    assert until(lambda: watcher.claim("unit"), 10)
    assert time.monotonic() - begin >= 0.5


def test_a_worker_that_lives_keeps_its_unit_for_many_times_the_lease(storage):
    with Leases(storage, "claims", lease_sec=0.8) as leases:
        assert leases.claim("unit")
        pretend(storage, machine="elsewhere")
        leases._owner["machine"] = "elsewhere"  # as the watcher sees a worker of another machine
        watcher = Leases(storage, "claims", lease_sec=0.8)
        assert not until(lambda: watcher.claim("unit"), 3.0)
        assert lease_of(storage)["beat"] > 5
    assert until(lambda: watcher.claim("unit"), 1.0)  # it was released at the end


def test_a_damaged_lease_is_given_time_and_then_taken_over(storage):
    storage.write("claims/unit", b"{")
    watcher = Leases(storage, "claims", lease_sec=0.3)
    assert not watcher.claim("unit")
    assert until(lambda: watcher.claim("unit"), 10)


def test_a_lease_of_no_time_is_refused(storage):
    with pytest.raises(ValueError, match="lease_sec is 0"):
        Leases(storage, "claims", lease_sec=0)
