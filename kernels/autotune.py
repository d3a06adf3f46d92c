"""Which launch configuration a Triton kernel runs with: `choose`, timed once a key and kept.

Two configurations may differ in the last bits of their sums, so all processes that share the cache folder must
run the same one. Whoever has timed first creates the key's file, which never changes afterwards; everybody
else reads it and drops what they measured. Processes on nodes without a common folder may differ: set
DRWKV_AUTOTUNE_CACHE to a common one, or DRWKV_AUTOTUNE=0.

    DRWKV_AUTOTUNE=0        time nothing: always the first candidate, a pure function of the shape
    DRWKV_AUTOTUNE_CACHE    the cache folder, ~/.cache/drwkv/autotune without it; below it one folder for each
                            GPU name, triton and torch version, in it one JSON file a key; safe to delete

What the candidates are stands beside each kernel; that they all fit the chip is checked by `resources.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

MAX_CANDIDATES = 12
CYCLES_A_SEC = 2e9  # of a GPU, at the most

ConfigT = TypeVar("ConfigT")

_log = logging.getLogger("drwkv.kernels")
_chosen: dict[tuple[str, Hashable, torch.device], Any] = {}
_warned_of_folder = False


def choose(
    kernel: str,
    key: tuple[Hashable, ...],
    candidates: Sequence[ConfigT],
    device: torch.device,
    time_ms: Callable[[ConfigT], float],
) -> ConfigT:
    """The fastest of `candidates` for `kernel` at `key`, as the first process to time it on such a GPU found it.

    kernel: a name that is unique in the package. key: what the speed depends on (sizes, dtypes), of ints, bools
    and strings. candidates: frozen dataclasses of ints and bools, at most MAX_CANDIDATES, a pure function of
    (kernel, key); the first is the default, which runs where nothing can be timed: on a CPU, inside the capture
    of a CUDA graph, with DRWKV_AUTOTUNE=0. time_ms(candidate): milliseconds a launch (`launch_ms`).
    A candidate that asks for more than the chip has is skipped. Raises RuntimeError when all of them do, and
    ValueError for no candidates or too many.
    """
    if not 1 <= len(candidates) <= MAX_CANDIDATES:
        raise ValueError(f"{kernel}: 1 to {MAX_CANDIDATES} candidates can be timed; got {len(candidates)}")
    if len(candidates) == 1 or device.type != "cuda" or os.environ.get("DRWKV_AUTOTUNE") == "0":
        return candidates[0]
    remembered: ConfigT | None = _chosen.get((kernel, key, device))
    if remembered is not None:
        return remembered
    file = _KeyFile(_folder(device), kernel, key, candidates)
    config = file.read()
    if config is None and _is_capturing(device):
        return candidates[0]
    if config is None:
        config = file.publish(_time_all(kernel, key, candidates, time_ms))
    _chosen[kernel, key, device] = config
    return config


def launch_ms(launch: Callable[[], object], *, warm_ups: int = 3, launches: int = 10) -> float:
    """Median milliseconds of `launch`, which starts work on the current CUDA stream; waits for that stream.

    The GPU is kept busy until all launches are queued, so that it is not the host's time that is measured.
    """
    for _ in range(warm_ups):
        launch()
    torch.cuda.current_stream().synchronize()
    begun = time.perf_counter()
    launch()
    host_sec = time.perf_counter() - begun
    torch.cuda.current_stream().synchronize()
    torch.cuda._sleep(int(2 * (launches + 1) * host_sec * CYCLES_A_SEC))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(launches + 1)]
    marks[0].record()
    for mark in marks[1:]:
        launch()
        mark.record()
    marks[-1].synchronize()
    return statistics.median(before.elapsed_time(mark) for before, mark in itertools.pairwise(marks))


def _time_all(
    kernel: str, key: tuple[Hashable, ...], candidates: Sequence[ConfigT], time_ms: Callable[[ConfigT], float]
) -> dict[int, float]:
    """Milliseconds by the candidate's place, without those that do not fit the chip."""
    from triton.runtime import errors

    too_big = (errors.OutOfResources, errors.PTXASError)
    times: dict[int, float] = {}
    faults = []
    for place, candidate in enumerate(candidates):
        try:
            times[place] = time_ms(candidate)
        except too_big as error:
            faults.append(f"{candidate}: {error}")
            _log.warning("%s %s: skipped %s: %s", kernel, key, candidate, error)
    if not times:
        raise RuntimeError(
            f"{kernel}: none of the {len(candidates)} candidates fits this GPU at {key}:\n"
            + "\n".join(faults)
        )
    return times


class _KeyFile(Generic[ConfigT]):
    """The choice for one key on disk: `NAME.json` or, where that is damaged, `NAME.1.json`, and so on.

    A file is linked into place when it is complete and never changed, and the first whole one counts: so two
    readers cannot see different choices, whatever is damaged and whoever mends it.
    """

    def __init__(
        self, folder: Path | None, kernel: str, key: tuple[Hashable, ...], candidates: Sequence[ConfigT]
    ) -> None:
        identity = repr((kernel, key, tuple(candidates))).encode()
        self.name = f"{_file_name(kernel)}-{hashlib.sha256(identity).hexdigest()[:16]}"
        self.folder, self.kernel, self.key, self.candidates = folder, kernel, key, candidates

    def read(self) -> ConfigT | None:
        """The choice that stands on disk, None without one."""
        if self.folder is None:
            return None
        try:
            config, free = self._first_whole(self.folder)
        except OSError as error:
            _warn_of_folder(self.folder, error)
            return None
        if config is None and free.name != f"{self.name}.json":
            _log.warning("%s: autotune times again, for a file is damaged before %s", self.kernel, free)
        return config

    def publish(self, times: dict[int, float]) -> ConfigT:
        """The choice that stands: the fastest by `times`, unless another process has published before."""
        fastest = min(times, key=lambda place: times[place])
        told = {
            "kernel": self.kernel,
            "key": repr(self.key),
            "config": dataclasses.asdict(self.candidates[fastest]),  # type: ignore[call-overload]
            "milliseconds": {repr(self.candidates[place]): ms for place, ms in times.items()},
        }
        if self.folder is None:
            return self.candidates[fastest]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.folder, prefix=".", suffix=".tmp") as temporary:
                json.dump(told, temporary, indent=1)
                os.fchmod(temporary.fileno(), 0o644)  # a folder may serve many users
                temporary.flush()
                os.fsync(temporary.fileno())
                while True:
                    config, free = self._first_whole(self.folder)
                    if config is not None:
                        return config
                    try:
                        os.link(temporary.name, free)
                        return self.candidates[fastest]
                    except FileExistsError:
                        time.sleep(0.01)  # somebody was faster: read theirs, once this node sees it
        except OSError as error:
            _warn_of_folder(self.folder, error)
            return self.candidates[fastest]

    def _first_whole(self, folder: Path) -> tuple[ConfigT | None, Path]:
        """(choice, its path), or (None, the first path that is free)."""
        path, generation = folder / f"{self.name}.json", 0
        while True:
            try:
                config = self._parse(path.read_bytes())
            except FileNotFoundError:
                return None, path
            if config is not None:
                return config, path
            generation += 1
            path = folder / f"{self.name}.{generation}.json"

    def _parse(self, text: bytes) -> ConfigT | None:
        """The candidate that a file names, None if it names none."""
        try:
            told = json.loads(text)
        except (ValueError, RecursionError):
            return None
        config = told.get("config") if isinstance(told, dict) else None
        for candidate in self.candidates:
            if dataclasses.asdict(candidate) == config:  # type: ignore[call-overload]
                return candidate
        return None


def _folder(device: torch.device) -> Path | None:
    """The cache folder of this GPU's kind and these versions, None where a home is wanted and there is none."""
    from triton import __version__ as triton_version

    versions = f"{_gpu_name(device)}-{triton_version}-{torch.__version__}"
    set_by_user = os.environ.get("DRWKV_AUTOTUNE_CACHE")
    try:
        cache = Path(set_by_user) if set_by_user else Path.home() / ".cache" / "drwkv" / "autotune"
    except RuntimeError as error:
        _warn_of_folder(Path("~"), error)
        return None
    return cache / _file_name(versions)


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text)


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _is_capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _warn_of_folder(folder: Path, error: Exception) -> None:
    global _warned_of_folder
    if not _warned_of_folder:
        _warned_of_folder = True
        _log.warning(
            "autotune cannot keep its choices in %s (%s): every process times for itself, and ranks may differ in "
            "the last bits; set DRWKV_AUTOTUNE_CACHE to a common writable folder, or DRWKV_AUTOTUNE=0",
            folder,
            error,
        )
