"""A real S3 for the tests: Ceph's RADOS Gateway on loopback, started once a session, when first asked for.

A pytest plugin (see pyproject.toml); its fixtures stand at the end. One monitor, one OSD that keeps everything in
memory and one gateway, in the foreground as children of pytest and gone when it is; they start in 3 s and need
190 MB. Root is not needed. What breaks the server's answers is faulty_proxy.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import socket
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty_proxy import FaultyProxy

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw")
PACKAGES = "ceph-mon ceph-osd ceph-mgr radosgw ceph-common"
NEEDS_S3 = pytest.mark.needs(*PROGRAMS, apt=PACKAGES)
START_SEC = 60.0

# Everything listens on loopback. The pools are small and single, as there is one OSD; the monitor proposes without
# its usual second of waiting, and the gateway talks to it unencrypted, as nobody has a key. What is removed is
# forgotten in seconds in place of hours.
CONFIG = """
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{mon_port}/0]
mon_initial_members = a
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_msgr1 = false
ms_bind_ipv6 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
auth_allow_insecure_global_id_reclaim = true
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
osd_class_load_list = *
osd_class_default_list = *
osd_objectstore = memstore
memstore_device_bytes = 4294967296
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
mon_max_pg_per_osd = 1000
mon_data_avail_crit = 1
mon_data_avail_warn = 2
paxos_propose_interval = 0.1
paxos_min_wait = 0.02
run_dir = {folder}
admin_socket = {folder}/$name.asok
log_file = {folder}/$name.log
mon_cluster_log_file = {folder}/cluster.log
crash_dir = {folder}
mon_data = {folder}/mon
osd_data = {folder}/osd
[client.rgw]
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw_enable_usage_log = false
rgw_run_sync_thread = false
rgw_gc_obj_min_wait = 2
rgw_gc_processor_period = 2
rgw_gc_processor_max_time = 2
ms_mon_client_mode = crc
"""


@dataclasses.dataclass(frozen=True)
class S3Server:
    """A server as one user sees it; `dataclasses.replace` gives another endpoint or other keys."""

    endpoint: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use the server, and nothing else of AWS's settings."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def client(self) -> Any:
        """A plain boto3 client, for arranging and looking."""
        import boto3  # takes a moment, and this plugin is loaded by every run of pytest
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )

    def bucket(self) -> str:
        """The name of a new bucket, empty and this user's own."""
        name = f"bucket-{uuid.uuid4().hex[:16]}"
        self.client().create_bucket(Bucket=name)
        return name


class RadosGateway:
    """The daemons of one small Ceph with their files in `folder`; a context that starts and ends them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.mon_port = _free_ports(2)
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> RadosGateway:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def user(self, name: str) -> S3Server:
        """Make a user; returns the server as this one sees it."""
        keys = {"access_key": f"{name}-key", "secret_key": f"{name}-secret"}
        options = [f"--{key.replace('_', '-')}={value}" for key, value in keys.items()]
        create = ["user", "create", f"--uid={name}", f"--display-name={name}", *options]
        self._run("radosgw-admin", "--no-mon-config", "-n", "client.rgw", *create)
        return S3Server(self.endpoint, **keys)

    def stop(self) -> None:
        """End the daemons; all that they hold is in memory, so nothing is lost by killing them."""
        for daemon in reversed(self.daemons):
            daemon.kill()
            daemon.wait()
        self.daemons.clear()

    def _start(self) -> None:
        for name in ("mon", "osd"):
            (self.folder / name).mkdir()
        fsid, osd = str(uuid.uuid4()), str(uuid.uuid4())
        values = {"fsid": fsid, "folder": self.folder, "port": self.port, "mon_port": self.mon_port}
        (self.folder / "ceph.conf").write_text(CONFIG.format(**values))
        monitors, address = str(self.folder / "monitors"), f"[v2:127.0.0.1:{self.mon_port}/0]"
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monitors)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monitors)
        self._spawn("ceph-mon", "-i", "a")
        self._run("ceph", "osd", "new", osd)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._spawn("ceph-osd", "-i", "0")
        self._run("radosgw-admin", "--no-mon-config", "-n", "client.rgw", "user", "list")  # makes its pools
        self._spawn("radosgw", "-n", "client.rgw")
        self._wait_for_answer()

    def _run(self, program: str, *arguments: str) -> None:
        command = [program, "-c", f"{self.folder}/ceph.conf", *arguments]
        subprocess.run(command, check=True, timeout=START_SEC, **self._surroundings())

    def _spawn(self, program: str, *arguments: str) -> None:
        # Whatever kills pytest, the kernel kills its daemons with it.
        command = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            program,
            "-f",
            "-c",
            f"{self.folder}/ceph.conf",
            *arguments,
        ]
        self.daemons.append(subprocess.Popen(command, **self._surroundings()))

    def _surroundings(self) -> dict[str, Any]:
        out = (self.folder / "output.txt").open("ab")
        return {
            "stdin": subprocess.DEVNULL,
            "stdout": out,
            "stderr": out,
            "env": {"PATH": os.environ["PATH"]},
        }

    def _wait_for_answer(self) -> None:
        deadline = time.monotonic() + START_SEC
        while time.monotonic() < deadline and self.daemons[-1].poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(self.endpoint, timeout=START_SEC).close()
                return
            time.sleep(0.02)
        output = (self.folder / "output.txt").read_text(errors="replace")
        raise RuntimeError(f"the S3 server did not start; {self.folder} holds its logs:\n{output[-2000:]}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as opened:
        probes = [opened.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever uses the server needs its programs; without them it is skipped, and named as skipped."""
    for item in items:
        if "s3_users" in getattr(item, "fixturenames", ()):
            item.add_marker(NEEDS_S3)


@pytest.fixture(scope="session")
def s3_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[S3Server, S3Server]]:
    """The server as its two users see it, who may not touch each other's buckets."""
    with RadosGateway(tmp_path_factory.mktemp("rgw")) as gateway:
        yield gateway.user("drwkv"), gateway.user("stranger")


@pytest.fixture(scope="session")
def s3(s3_users: tuple[S3Server, S3Server]) -> S3Server:
    """The server, for everyday use."""
    return s3_users[0]


@pytest.fixture(scope="session")
def s3_as_stranger(s3_users: tuple[S3Server, S3Server]) -> S3Server:
    """The server as a user sees it to whom everything that `s3` makes is denied."""
    return s3_users[1]


@pytest.fixture
def use_s3(monkeypatch: pytest.MonkeyPatch) -> Callable[[S3Server], None]:
    """use_s3(server): from now on this process itself uses that server, and none of AWS's other settings."""
    from drwkv import s3 as library

    def use(server: S3Server) -> None:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        # A process has one client, made of the environment that it first met. A new cache rather than a cleared
        # one: a thread that an earlier test left behind may be making a client for the old one at this moment.
        fresh = functools.lru_cache(maxsize=1)(library._client.__wrapped__)
        monkeypatch.setattr(library, "_client", fresh)

    return use


@pytest.fixture
def faulty_s3(s3: S3Server) -> Iterator[tuple[S3Server, FaultyProxy]]:
    """The server behind a proxy that breaks nothing yet, and that proxy: set its `faults`."""
    with FaultyProxy(s3.endpoint) as proxy:
        yield dataclasses.replace(s3, endpoint=proxy.endpoint), proxy
