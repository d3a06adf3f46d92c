"""A thread on each rank that says where this rank is, looks after the others, and ends a run that stands still.

Each rank puts its place (step, phase, collectives so far) on the ranks' board a few times a minute, and looks whether
the next rank still does. A rank that makes no move for `health.stall_sec`, finds another silent for `health.lost_sec`,
or leaves with an error, says so on the board, once for all; the threads of the others see it, write down where their
own code stands, and end their process where a collective would wait for ever. What the loop decides together, step by
step, is health.py's. Rank 0 writes what it sees to `status.json`, for people and schedulers.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from drwkv.files import write_whole
from drwkv.parallel.distributed import PATIENCE, World
from drwkv.training.board import Board, Place, blame, num_collectives
from drwkv.training.health import STALLED, HealthConfig, PeerFailure, exit_code
from drwkv.training.monitor import StepRecord

log = logging.getLogger("drwkv")
STATUS = "status.json"
STACKS = "stalls"  # folder of where each rank's code stood
FINISHED = "finished"  # state of a run that has done all its steps
SETTING_UP = "setting up"  # phase before the first step
OF_THE_RUN = ("step", "last_step", "n", "loss", "skipped")  # numbers that hold until a start makes others
# Phases that take their time: PATIENCE times as long.
PATIENT = frozenset({SETTING_UP, "saving", "going back", "drawing a grid", "validating"})
ENDED = "ended"
NO_BOARD = "the process that held the ranks together is gone: rank 0, or its launcher"
SILENT_BEATS = 3  # waited for signs of life, and for the loop to hear of a failure by itself
SPARE_BEATS = 9  # between noticing a stall and the time at which collectives give up
LAST_WORDS_SEC = 5.0  # for what is written before a process ends itself: the file system may be what hangs
DEADLINE_SEC = 600.0  # in which this thread must get on, where stalls are not looked for


class Watch:
    """This rank's place among all, from `with` to its end.

    `at` is what the loop says; everything else happens in a thread. An error that leaves the block is told to the
    other ranks, and one that a lost rank has caused is raised as PeerFailure, which names that rank. Collective.
    """

    def __init__(self, folder: Path, config: HealthConfig, world: World, *, timeout_sec: float) -> None:
        self._folder, self._world, self._beat_sec = folder, world, config.heartbeat_sec
        self._stall_sec, self._lost_sec = stall_sec(config, timeout_sec), config.lost_sec
        self._board, self._place = Board(world), Place.first(SETTING_UP)
        self._moved, self._lock = time.monotonic(), threading.Lock()
        self._next_seen: tuple[int, float] | None = None  # beat of the next rank, and when it was new
        self._numbers: dict[str, Any] = {}
        self._before: dict[str, Any] = {}  # what `status.json` said of the run before this start
        self._over, self._ended = threading.Event(), False
        self._saying: threading.Thread | None = None  # writes status.json
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
        if self._world.is_first:
            self._before = _read_status(self._folder / STATUS)
        self._board.publish(self._place)
        self._world.barrier()  # from here on every rank's place can be read
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        cause = None
        if error is None:
            self.at(self._place.step, ENDED)
        elif isinstance(error, PeerFailure) or not _is_of_collective(error):
            self._tell(error)
        elif (cause := self._who_is_lost()) is None:
            self._tell(error)  # all others live: it was this rank's own
        self._over.set()
        self._thread.join(SILENT_BEATS * self._beat_sec + LAST_WORDS_SEC)
        faulthandler.cancel_dump_traceback_later()
        if self._world.is_first and error is not None:
            why = cause or error
            _in_time(lambda: self._write_last_status(_state_of(exit_code(why)), str(why)))
        if cause is not None:
            raise cause from error

    def end(self, state: str, reason: str | None = None) -> None:
        """Write into `status.json` how the run ended."""
        with self._lock:
            self._ended = True
        if self._world.is_first:
            self._write_last_status(state, reason)

    def _tell(self, error: BaseException) -> None:
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, PeerFailure):
            text = str(error)
        elif self._world.size > 1:
            text = f"rank {self._world.rank} stopped the run: {text}"
        self._board.tell(text, exit_code(error))

    # The rest runs in the thread, or at the end.

    def _run(self) -> None:
        failed: dict[str, Any] | None = None
        beats_left = SILENT_BEATS
        while not self._over.wait(self._beat_sec):
            # Where the store does not answer, or a file system, no line below returns: then this ends the process.
            deadline_sec = max(self._stall_sec or DEADLINE_SEC, 2 * self._lost_sec)
            faulthandler.dump_traceback_later(deadline_sec, exit=True, file=sys.__stderr__ or sys.stderr)
            if failed is not None:
                beats_left -= 1
                if beats_left < 0 and not self._ended:
                    self._leave(failed)
                continue
            try:
                self._beat()
                if (failed := self._board.failed()) is None:
                    self._look_at_next()
                    if self._stands_still():
                        self._report_stall()
            except RuntimeError:
                failed = {"text": NO_BOARD, "code": 1}
            if failed is not None and failed["code"] == STALLED:
                _in_time(self._write_stacks)
            elif self._world.is_first:
                self._say_running()
        self._board_says_ended()

    def _board_says_ended(self) -> None:
        try:
            self._board.publish(self._place)
        except RuntimeError:  # nobody is left to hear of it
            return

    def _beat(self) -> None:
        collectives = num_collectives()
        with self._lock:
            self._place = replace(self._place, beat=self._place.beat + 1, collectives=collectives)
        self._board.publish(self._place)

    def _look_at_next(self) -> None:
        """Tell all when the next rank has given no sign of life for too long."""
        rank, now = (self._world.rank + 1) % self._world.size, time.monotonic()
        if rank == self._world.rank:
            return
        place = self._board.place_of(rank)
        if self._next_seen is None or place.beat != self._next_seen[0] or place.phase == ENDED:
            self._next_seen = place.beat, now
        elif now - self._next_seen[1] > self._lost_sec:
            self._board.tell(f"rank {rank} is gone, last seen at {place}", 1)

    def _stands_still(self) -> bool:
        if not self._stall_sec or self._place.phase == ENDED:
            return False
        patience = PATIENCE if self._place.phase in PATIENT else 1
        return time.monotonic() - self._moved > patience * self._stall_sec

    def _report_stall(self) -> None:
        moves = self._place.moves
        places, silent = self._places_and_silent()
        if self._place.moves != moves:
            return  # it went on after all
        text = blame(places, silent, time.monotonic() - self._moved)
        if self._board.tell(text, STALLED):
            _in_time(
                lambda: log.error("%s; where each rank's code stands is in %s", text, self._folder / STACKS)
            )

    def _places_and_silent(self) -> tuple[list[Place], set[int]]:
        """All places, and the ranks that gave no sign of life while this one waited for it."""
        before = self._board.places()
        for _ in range(SILENT_BEATS):
            time.sleep(self._beat_sec)
            self._beat()
        after = self._board.places()
        return after, {rank for rank, place in enumerate(after) if place.beat == before[rank].beat}

    def _who_is_lost(self) -> PeerFailure | None:
        """What broke a collective: the rank that said why it left, or the ranks that left without a word."""
        try:
            if (failed := self._board.failed()) is None:
                places, silent = self._places_and_silent()
                failed = self._board.failed()
        except RuntimeError:
            return PeerFailure(NO_BOARD, 1)
        if failed is not None:
            return PeerFailure(failed["text"], failed["code"])
        if not silent:
            return None
        lost = "; ".join(f"rank {rank} is gone, last seen at {places[rank]}" for rank in sorted(silent))
        self._board.tell(lost, 1)
        return PeerFailure(lost, 1)

    def _write_stacks(self) -> None:
        """Where this rank's threads stand, and on a GPU what NCCL has recorded of its collectives."""
        folder = self._folder / STACKS
        folder.mkdir(parents=True, exist_ok=True)
        name = f"step_{self._place.step:08d}_rank_{self._world.rank:05d}"
        with (folder / f"{name}.txt").open("w") as file:
            file.write(f"{self._place}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        recorder = getattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", None)
        if recorder is not None and self._world.device.type == "cuda":
            (folder / f"{name}.nccl.json").write_bytes(recorder())

    def _leave(self, failed: dict[str, Any]) -> None:
        """End this process from its thread: the loop is in a collective that nobody will complete."""

        def last_words() -> None:
            if self._world.is_first:
                self._write_last_status(_state_of(failed["code"]), failed["text"])
            log.error("%s", failed["text"])
            sys.stdout.flush()
            sys.stderr.flush()

        _in_time(last_words)
        os._exit(failed["code"])

    def _say_running(self) -> None:
        """Write `status.json` apart from this thread, which is to go on though the file system hangs."""
        with self._lock:
            if not self._ended and (self._saying is None or not self._saying.is_alive()):
                self._saying = threading.Thread(
                    target=self._write_status, args=("running", None), daemon=True
                )
                self._saying.start()

    def _write_last_status(self, state: str, reason: str | None) -> None:
        if self._saying is not None:
            self._saying.join(LAST_WORDS_SEC)
        self._write_status(state, reason)

    def _write_status(self, state: str, reason: str | None) -> None:
        place, before = self._place, {}
        if place.phase == SETTING_UP:
            if self._before.get("state") == FINISHED:
                return  # that still holds: what is only looked at again, or refused, has not begun
            before = {key: value for key, value in self._before.items() if key in OF_THE_RUN}
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
            **before,
            **self._numbers,
        }
        try:
            write_whole(self._folder / STATUS, json.dumps(status, indent=1).encode())
        except OSError as error:
            log.warning("%s cannot be written: %s", self._folder / STATUS, error)


def stall_sec(config: HealthConfig, timeout_sec: float) -> float:
    """How long a rank may stand still: as set, or so long that all have left when collectives give up."""
    if config.stall_sec is not None:
        return config.stall_sec
    return timeout_sec - max(0.05 * timeout_sec, SPARE_BEATS * config.heartbeat_sec)


def _read_status(path: Path) -> dict[str, Any]:
    """What an earlier start has left; {} where that is nothing that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _state_of(code: int) -> str:
    """What `status.json` calls a run that ended with an exit code of its own."""
    return "stalled" if code == STALLED else "failed"


def _in_time(work: Callable[[], None]) -> None:
    """Do what may hang, or fail, on a file system, and go on after LAST_WORDS_SEC all the same."""

    def attempt() -> None:
        try:
            work()
        except OSError as error:
            print(f"cannot be written: {error}", file=sys.stderr)

    thread = threading.Thread(target=attempt, name="drwkv-last-words", daemon=True)
    thread.start()
    thread.join(LAST_WORDS_SEC)


def _is_of_collective(error: BaseException) -> bool:
    """Whether a collective failed, rather than this rank's own work."""
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "ProcessGroup")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
