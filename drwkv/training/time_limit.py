"""When the job that a run is part of must end, by its scheduler or by the config, so that the run can save before."""

from __future__ import annotations

import logging
import math
import os
import re
import subprocess
import time

from drwkv.parallel.distributed import World

log = logging.getLogger("drwkv")
TIME_LIMIT = "TIME_LIMIT"  # stands in the request to requeue where else a signal's name does
SQUEUE_SEC = 30.0  # longest wait for an answer of the scheduler


class TimeLimit:
    """The end of this job, which is near `grace_sec` before, or when three quarters of a short job's time are over.

    Collective, as one rank asks for all.
    """

    def __init__(self, max_hours: float | None, grace_sec: float, world: World) -> None:
        asked = max_hours is None and world.is_first
        left = (
            world.from_first(seconds_left() if asked else math.inf) if max_hours is None else 3600 * max_hours
        )
        grace_sec = min(grace_sec, left / 4)
        self._stop_at = time.monotonic() + left - grace_sec
        if math.isfinite(left):
            log.info("this job ends in %.0f s; the run saves %.0f s before", left, grace_sec)

    def is_near(self) -> bool:
        """Whether the run is to stop now."""
        return time.monotonic() >= self._stop_at


def seconds_left() -> float:
    """Time that SLURM leaves the job of this process; infinite outside of a job, and for a job without a limit."""
    if (end := os.environ.get("SLURM_JOB_END_TIME", "")).isdigit():
        return int(end) - time.time()
    if (job := os.environ.get("SLURM_JOB_ID")) is None:
        return math.inf
    try:
        asked = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%L"], capture_output=True, text=True, timeout=SQUEUE_SEC
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("the time limit of job %s is not known (%s): set health.max_hours", job, error)
        return math.inf
    return parse_time_left(asked.stdout.strip())


def parse_time_left(text: str) -> float:
    """Seconds of squeue's %L, `days-hours:minutes:seconds`; infinite for UNLIMITED and what is no time."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text)
    if found is None:
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((24 * days + hours) * 60 + minutes) * 60 + seconds
