"""Who stands where: a thread on each rank that says what this rank is doing, and ends a run that stands still.

Each rank puts its place (step, phase, collectives so far) on the ranks' board a few times a minute. A rank that makes
no move for `health.stall_sec`, or leaves with an error, says so on the board, once for all; the threads of the others
see it, write down where their own code stands, and end their process where a collective would wait for ever. What the
loop decides together, step by step, is health.py's. Rank 0 writes what it sees to `status.json`, for people and
schedulers.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import math
import os
import secrets
import socket
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from drwkv.files import write_whole
from drwkv.parallel.distributed import World
from drwkv.training.health import STALLED, HealthConfig, PeerFailure, exit_code
from drwkv.training.monitor import StepRecord

log = logging.getLogger("drwkv")
STATUS = "status.json"
STACKS = "stalls"  # folder of where each rank's code stood
FAILED = "failed"  # key on the board: who ended the run, and why
PATIENT = frozenset(
    {"setting up", "drawing a grid", "validating", "ended"}
)  # phases that may take their time
SILENT_BEATS = 3  # without a sign of life for so many beats, a rank is taken for gone


@dataclass(frozen=True)
class Place:
    """Where a rank stands."""

    moves: int  # counts every change of step or phase; all ranks make the same ones
    step: int
    phase: str
    collectives: int  # begun so far, over all process groups
    beat: int  # signs of life so far
    host: str
    pid: int

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase} (pid {self.pid} on {self.host})"


class Watch:
    """This rank's place among all, from `with` to its end.

    `at` is what the loop says; everything else happens in a thread. An error that leaves the block is told to the
    other ranks, and one that a lost rank has caused is raised as PeerFailure, which names that rank. Collective.
    """

    def __init__(self, folder: Path, config: HealthConfig, world: World, *, timeout_sec: float) -> None:
        self._folder, self._world, self._beat_sec = folder, world, config.heartbeat_sec
        self._stall_sec = stall_sec(config, timeout_sec)
        self._board = dist.PrefixStore(f"watch/{world.from_first(secrets.token_hex(4))}", world.board)
        self._place = Place(0, 0, "setting up", 0, 0, socket.gethostname(), os.getpid())
        self._moved, self._lock = time.monotonic(), threading.Lock()
        self._numbers: dict[str, Any] = {}
        self._over, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="drwkv-watch", daemon=True)

    def at(self, step: int, phase: str) -> None:
        """Say where this rank is; every rank must say the same, in the same order."""
        with self._lock:
            self._place = replace(self._place, moves=self._place.moves + 1, step=step, phase=phase)
            self._moved = time.monotonic()

    def note(self, record: StepRecord, loss: float, skipped: bool) -> None:
        """Keep the last numbers for `status.json`."""
        shown = loss if math.isfinite(loss) else None
        self._numbers = {"last_step": record.step, "n": record.n, "loss": shown, "skipped": skipped}

    def __enter__(self) -> Watch:
        self._publish()
        self._world.barrier()  # from here on every rank's place can be read
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cause = None
        if error is None:
            self.at(self._place.step, "ended")
        elif isinstance(error, PeerFailure) or not _is_of_collective(error):
            self._tell(f"{type(error).__name__}: {error}", exit_code(error))
        else:
            cause = self._who_is_lost()
        self._over.set()
        self._thread.join()
        if self._world.is_first and error is not None:
            self._write_status("failed", reason=str(cause or error))
        if cause is not None:
            raise cause from error

    def end(self, state: str, reason: str | None = None) -> None:
        """Write into `status.json` how the run ended."""
        self._ended = True
        if self._world.is_first:
            self._write_status(state, reason=reason)

    # The rest runs in the thread, or at the end.

    def _run(self) -> None:
        seen_failed = 0
        while not self._over.wait(self._beat_sec):
            self._beat()
            if self._world.is_first and not self._ended:
                self._write_status("running")
            try:
                self._publish()
                failed = self._failed()
            except (
                RuntimeError
            ):  # the board is gone with the process that held it: the collectives will say so
                continue
            if failed is not None:
                seen_failed += 1
                if seen_failed == 1 and failed["code"] == STALLED:
                    self._write_stacks()
                if seen_failed > SILENT_BEATS:
                    self._leave(failed)
            elif self._stands_still():
                self._report_stall()

    def _stands_still(self) -> bool:
        if not self._stall_sec or self._place.phase in PATIENT:
            return False
        return time.monotonic() - self._moved > self._stall_sec

    def _report_stall(self) -> None:
        moves = self._place.moves
        places, silent = self._places_and_silent()
        if self._place.moves != moves:
            return  # it went on after all
        text = blame(places, silent, self._stall_sec)
        if self._tell(text, STALLED):
            log.error("%s; where each rank's code stands is in %s", text, self._folder / STACKS)

    def _places_and_silent(self) -> tuple[list[Place], set[int]]:
        """All places, and the ranks that gave no sign of life while this one waited for it."""
        before = self._places()
        for _ in range(SILENT_BEATS):
            time.sleep(self._beat_sec)
            self._beat()
            self._publish()
        after = self._places()
        return after, {rank for rank, place in enumerate(after) if place.beat == before[rank].beat}

    def _who_is_lost(self) -> PeerFailure | None:
        """What broke a collective: the rank that said why it left, or the ranks that left without a word."""
        try:
            if (failed := self._failed()) is None:
                places, silent = self._places_and_silent()
                failed = self._failed()
        except RuntimeError:
            return PeerFailure("the process that held the ranks together is gone: rank 0, or its launcher", 1)
        if failed is not None:
            return PeerFailure(failed["text"], failed["code"])
        if not silent:
            return None
        lost = "; ".join(f"rank {rank} is gone, last seen at {places[rank]}" for rank in sorted(silent))
        self._tell(lost, 1)
        return PeerFailure(lost, 1)

    def _tell(self, text: str, code: int) -> bool:
        """Say why the run ends, if nobody has; whether this rank was the first."""
        said = {"rank": self._world.rank, "text": text, "code": code}
        if code != STALLED and not text.startswith("rank ") and self._world.size > 1:
            said["text"] = f"rank {self._world.rank} stopped the run: {text}"
        try:
            found = json.loads(self._board.compare_set(FAILED, "", json.dumps(said)))
        except RuntimeError:  # the board is gone
            return True
        return bool(found == said)

    def _failed(self) -> dict[str, Any] | None:
        return dict(json.loads(self._board.get(FAILED))) if self._board.check([FAILED]) else None

    def _beat(self) -> None:
        collectives = _num_collectives()
        with self._lock:
            self._place = replace(self._place, beat=self._place.beat + 1, collectives=collectives)

    def _publish(self) -> None:
        self._board.set(f"rank{self._world.rank}", json.dumps(vars(self._place)))

    def _places(self) -> list[Place]:
        keys = [f"rank{rank}" for rank in range(self._world.size)]
        return [Place(**json.loads(text)) for text in self._board.multi_get(keys)]

    def _write_stacks(self) -> None:
        """Where this rank's threads stand, and on a GPU what NCCL has recorded of its collectives."""
        folder = self._folder / STACKS
        folder.mkdir(parents=True, exist_ok=True)
        name = f"step_{self._place.step:08d}_rank_{self._world.rank:05d}"
        with (folder / f"{name}.txt").open("w") as file:
            file.write(f"{self._place}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        recorder = getattr(dist.distributed_c10d, "_dump_nccl_trace_json", None)
        if recorder is not None and self._world.device.type == "cuda":
            (folder / f"{name}.nccl.json").write_bytes(recorder())

    def _leave(self, failed: dict[str, Any]) -> None:
        """End this process from its thread: the loop is in a collective that nobody will complete."""
        if self._world.is_first:
            state = "stalled" if failed["code"] == STALLED else "failed"
            self._write_status(state, reason=failed["text"])
        log.error("%s", failed["text"])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failed["code"])

    def _write_status(self, state: str, *, reason: str | None = None) -> None:
        place = self._place
        status = {
            "state": state,
            "reason": reason,
            "step": place.step,
            "phase": place.phase,
            "in_phase_sec": round(time.monotonic() - self._moved, 1),
            "time": time.time(),
            "host": place.host,
            "pid": place.pid,
            "job": os.environ.get("SLURM_JOB_ID"),
            "ranks": self._world.size,
            **self._numbers,
        }
        try:
            write_whole(self._folder / STATUS, json.dumps(status, indent=1).encode())
        except OSError as error:
            log.warning("%s cannot be written: %s", self._folder / STATUS, error)


def stall_sec(config: HealthConfig, timeout_sec: float) -> float:
    """How long a rank may stand still: as set, or a little less than a collective may take (`timeout_sec`)."""
    return 0.95 * timeout_sec if config.stall_sec is None else config.stall_sec


def blame(places: list[Place], silent: set[int], stood_sec: float) -> str:
    """One line for people: which ranks hold up the others, as far as their places tell."""
    progress = [(place.moves, place.collectives) for place in places]
    behind = [rank for rank, made in enumerate(progress) if made == min(progress)]
    if silent:
        named, why = sorted(silent), "without a sign of life"
    elif len(behind) < len(places):
        named, why = behind, "behind all others"
    else:
        return f"all {len(places)} ranks stand still since {stood_sec:.0f} s at {places[0]}"
    shown = "; ".join(f"rank {rank} at {places[rank]}" for rank in named[:8])
    more = f" and {len(named) - 8} more" if len(named) > 8 else ""
    others = next((place for rank, place in enumerate(places) if rank not in named), None)
    waiting = f"; the others wait at step {others.step}, {others.phase}" if others else ""
    return f"{shown}{more} {'stands' if len(named) == 1 else 'stand'} still since {stood_sec:.0f} s, {why}{waiting}"


def _num_collectives() -> int:
    """Collectives that this rank has begun; a rank that stands outside of one has begun fewer than those in it."""
    count = 0
    for group in dist.distributed_c10d._world.pg_map:
        with contextlib.suppress(RuntimeError):  # a backend that does not count
            count += group._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return count


def _is_of_collective(error: BaseException) -> bool:
    """Whether a collective failed, rather than this rank's own work."""
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "ProcessGroup")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
