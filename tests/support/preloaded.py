"""A process that has imported what the applications import, and forks into them: a start without seconds of imports.

    python tests/support/preloaded.py FD

reads requests from the socket FD, one JSON line each, and answers each with one: `{"start": ...}` with the new
process's id, `{"poll": id}` with its exit code, or null while it runs. Beside the time, a process differs in one thing
from one that Python started: its strings hash as those of all forks do, so several preloaded ones are used in turn.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

OUT, ERR = 1, 2


class Fork:
    """A process that was forked, with the part of subprocess.Popen's interface that tests use."""

    def __init__(self, origin: Preloaded, pid: int) -> None:
        self._origin, self.pid, self.returncode = origin, pid, None

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs."""
        if self.returncode is None:
            self.returncode = self._origin.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; raises subprocess.TimeoutExpired."""
        begin, pause = time.monotonic(), 0.002
        while (code := self.poll()) is None:
            if timeout is not None and time.monotonic() - begin > timeout:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Preloaded:
    """The side of the tests: one such process, started at once, ended by `close`."""

    def __init__(self, root: Path) -> None:
        self._lock = threading.Lock()
        mine, its = socket.socketpair()
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""
        }  # fmt: skip
        command = [sys.executable, __file__, str(its.fileno())]
        self._process = subprocess.Popen(command, cwd=root, env=environment, pass_fds=[its.fileno()])
        its.close()
        self._lines = mine.makefile("rw")
        mine.close()

    def start(self, arguments: list[str], *, cwd: Path, environment: dict[str, str], log: Path) -> Fork:
        """`python ARGUMENTS`, its output appended to `log`."""
        request = {"arguments": arguments, "cwd": str(cwd), "environment": environment, "log": str(log)}
        return Fork(self, self.ask({"start": request}))

    def ask(self, request: dict[str, Any]) -> Any:
        """The answer to a request."""
        with self._lock:
            self._lines.write(json.dumps(request) + "\n")
            self._lines.flush()
            return json.loads(self._lines.readline())

    def close(self) -> None:
        """End it; what it has forked goes on."""
        self._lines.close()
        self._process.wait()


def preload() -> None:
    """Import what the applications do, now or in the course of a run."""
    for module in (
        "train_dist", "sample_dist", "data_prep.encode", "drwkv.parallel.deepspeed", "torch.utils.tensorboard",
        "torch._dynamo", "torch._functorch.aot_autograd", "torch.onnx",
    ):  # fmt: skip
        importlib.import_module(module)


def serve(channel: socket.socket) -> dict[str, Any] | None:
    """Answer requests; returns in each fork what it is to run, and None here when nobody asks any more."""
    lines = channel.makefile("rw")
    while line := lines.readline():
        request = json.loads(line)
        if "start" in request:
            answer: int | None = os.fork()
            if answer == 0:
                os.close(channel.fileno())
                return request["start"]
        else:
            ended, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        lines.write(json.dumps(answer) + "\n")
        lines.flush()
    return None


def become(job: dict[str, Any]) -> None:
    """Be `python ARGUMENTS` from here on: SCRIPT, -m MODULE or -c PROGRAM, and what follows."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, OUT)
    os.dup2(log, ERR)
    os.close(log)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["cwd"])
    tempfile.tempdir = None  # TMPDIR may be another
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests' own shell may have it ignored
    # A module that others have imported already is about to run as the main one.
    warnings.filterwarnings("ignore", message=".*found in sys.modules after import", category=RuntimeWarning)
    first, *rest = job["arguments"]
    if first == "-m":
        module, *rest = rest
        sys.argv, sys.path[0] = [first, *rest], job["cwd"]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    if first == "-c":
        program, *rest = rest
        first = f"{job['log']}.{os.getpid()}.py"
        Path(first).write_text(program)
        sys.path[0] = ""
    else:
        sys.path[0] = str(Path(first).resolve().parent)
    sys.argv = [first, *rest]
    runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    preload()
    to_run = serve(socket.socket(fileno=int(sys.argv[1])))
    if to_run is not None:
        become(to_run)
