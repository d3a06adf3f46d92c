"""The choice of a launch configuration: what is timed, what is kept, and that processes agree.

There is no GPU in it: the device is a name, the times are injected, and the processes that race are real.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from drwkv.kernels import autotune

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources

GPU = torch.device("cuda", 0)
KEY = (1024, 384, "bfloat16")


@dataclass(frozen=True)
class Tile:
    """A launch configuration of the tests."""

    tokens: int
    num_warps: int
    fused: bool = True


TILES = [Tile(16, 1), Tile(32, 4), Tile(64, 8, fused=False)]
FASTEST_LAST = {TILES[0]: 3.0, TILES[1]: 2.0, TILES[2]: 1.0}


@dataclass
class Stopwatch:
    """Gives stated times and counts how often it was asked."""

    times: dict[Tile, float]
    asked: int = 0

    def __call__(self, tile: Tile) -> float:
        self.asked += 1
        return self.times[tile]


@pytest.fixture(autouse=True)
def new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A GPU called Toy 9000, an empty cache in tmp_path, and nothing in memory; call it to forget again."""
    monkeypatch.setenv("DRWKV_AUTOTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DRWKV_AUTOTUNE", raising=False)
    monkeypatch.setattr(autotune, "_gpu_name", lambda device: "Toy 9000")
    monkeypatch.setattr(autotune, "_is_capturing", lambda device: False)

    def forget() -> None:
        monkeypatch.setattr(autotune, "_chosen", {})
        monkeypatch.setattr(autotune, "_warned_of_folder", False)

    forget()
    return forget


def choose(stopwatch: Callable[[Tile], float], tiles: list[Tile] = TILES) -> Tile:
    return autotune.choose("toy forward", KEY, tiles, GPU, stopwatch)


def kept(tmp_path: Path) -> list[Path]:
    return sorted(path for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_the_fastest_is_timed_once_and_then_remembered() -> None:
    stopwatch = Stopwatch(FASTEST_LAST)
    assert [choose(stopwatch) for _ in range(3)] == [TILES[2]] * 3
    assert stopwatch.asked == len(TILES)


def test_the_next_process_reads_the_choice_and_times_nothing(
    tmp_path: Path, new_process: Callable[[], None]
) -> None:
    choose(Stopwatch(FASTEST_LAST))
    new_process()
    stopwatch = Stopwatch({tile: -ms for tile, ms in FASTEST_LAST.items()})
    assert choose(stopwatch) == TILES[2]
    assert stopwatch.asked == 0
    (path,) = kept(tmp_path)
    assert path.parent.name.startswith("Toy_9000-") and torch.__version__ in path.parent.name
    assert json.loads(path.read_text())["config"] == {"tokens": 64, "num_warps": 8, "fused": False}


def test_other_keys_and_other_candidates_have_their_own_choice(
    tmp_path: Path, new_process: Callable[[], None]
) -> None:
    choose(Stopwatch(FASTEST_LAST))
    autotune.choose("toy forward", (1, *KEY[1:]), TILES, GPU, Stopwatch(FASTEST_LAST))
    new_process()
    assert choose(Stopwatch(FASTEST_LAST), TILES[:2]) == TILES[1]
    assert len(kept(tmp_path)) == 3


@pytest.mark.parametrize("off", [True, False])
def test_zero_in_the_environment_means_the_first_and_no_timing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, off: bool
) -> None:
    choose(Stopwatch(FASTEST_LAST))
    monkeypatch.setenv("DRWKV_AUTOTUNE", "0" if off else "1")
    stopwatch = Stopwatch(FASTEST_LAST)
    assert choose(stopwatch) == TILES[0 if off else 2]
    assert stopwatch.asked == 0


def test_on_a_cpu_and_with_one_candidate_nothing_is_timed(tmp_path: Path) -> None:
    stopwatch = Stopwatch(FASTEST_LAST)
    assert autotune.choose("toy", KEY, TILES, torch.device("cpu"), stopwatch) == TILES[0]
    assert choose(stopwatch, TILES[1:2]) == TILES[1]
    assert stopwatch.asked == 0 and not kept(tmp_path)


def test_capture_of_a_graph_times_nothing_and_keeps_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stopwatch = Stopwatch(FASTEST_LAST)
    monkeypatch.setattr(autotune, "_is_capturing", lambda device: True)
    assert choose(stopwatch) == TILES[0]
    assert stopwatch.asked == 0 and not kept(tmp_path)
    monkeypatch.setattr(autotune, "_is_capturing", lambda device: False)
    assert choose(stopwatch) == TILES[2]
    monkeypatch.setattr(autotune, "_is_capturing", lambda device: True)
    assert choose(stopwatch) == TILES[2], "what is known holds in a graph too"


def test_a_candidate_that_does_not_fit_is_skipped_and_named(caplog: pytest.LogCaptureFixture) -> None:
    def big_tiles_fail(tile: Tile) -> float:
        if tile.tokens == 64:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return FASTEST_LAST[tile]

    with caplog.at_level(logging.WARNING, logger="drwkv.kernels"):
        assert choose(big_tiles_fail) == TILES[1]
    assert "skipped Tile(tokens=64" in caplog.text and "232448" in caplog.text


def test_when_none_fits_the_error_says_so(tmp_path: Path) -> None:
    def fail(tile: Tile) -> float:
        raise OutOfResources(300_000 + tile.tokens, 232_448, "shared memory")

    with pytest.raises(RuntimeError, match=r"(?s)toy forward: none of the 3 candidates fits.*1024.*300064"):
        choose(fail)
    assert not kept(tmp_path)


def test_other_errors_of_a_launch_are_not_swallowed() -> None:
    def fail(tile: Tile) -> float:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        choose(fail)


@pytest.mark.parametrize("count", [0, 13])
def test_the_number_of_candidates_is_bounded(count: int) -> None:
    with pytest.raises(ValueError, match=f"toy forward: 1 to 12 candidates can be timed; got {count}"):
        choose(Stopwatch(FASTEST_LAST), [Tile(n, 1) for n in range(count)])


@pytest.mark.parametrize(
    "damage",
    [b"", b"\xff\x00", b"[1]", b"null", b"[" * 100_000, b'{"config": {"tokens": 7}}', b'{"config": {"tokens'],
)
def test_a_damaged_file_is_timed_again_and_replaced_for_all(
    tmp_path: Path, new_process: Callable[[], None], caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    choose(Stopwatch(FASTEST_LAST))
    (path,) = kept(tmp_path)
    path.write_bytes(damage)
    new_process()
    stopwatch = Stopwatch({TILES[0]: 1.0, TILES[1]: 0.5, TILES[2]: 2.0})
    with caplog.at_level(logging.WARNING, logger="drwkv.kernels"):
        assert choose(stopwatch) == TILES[1]
    assert stopwatch.asked == 3 and "damaged" in caplog.text
    new_process()
    assert choose(Stopwatch(FASTEST_LAST)) == TILES[1], "the new choice stands"


def test_a_folder_that_cannot_be_written_warns_once_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    # Root may write anywhere else
    monkeypatch.setenv("DRWKV_AUTOTUNE_CACHE", str(tmp_path / "file" / "below"))
    stopwatch = Stopwatch(FASTEST_LAST)
    with caplog.at_level(logging.WARNING, logger="drwkv.kernels"):
        assert [choose(stopwatch) for _ in range(2)] == [TILES[2]] * 2
        autotune.choose("another", KEY, TILES, GPU, stopwatch)
    assert stopwatch.asked == 6
    assert caplog.text.count("autotune cannot keep its choices in") == 1


def test_an_entry_that_cannot_be_read_does_not_hang(tmp_path: Path, new_process: Callable[[], None]) -> None:
    choose(Stopwatch(FASTEST_LAST))
    (path,) = kept(tmp_path)
    path.unlink()
    path.mkdir()  # reading it is an OSError, linking over it too
    new_process()
    assert choose(Stopwatch(FASTEST_LAST)) == TILES[2]


RACER = """
import sys, time
from pathlib import Path
import torch
from drwkv.kernels import autotune
from test_autotune import KEY, TILES, GPU
autotune._gpu_name = lambda device: "Toy 9000"
autotune._is_capturing = lambda device: False
rank, start = int(sys.argv[1]), Path(sys.argv[2])
times = {tile: float((place - rank) % len(TILES)) for place, tile in enumerate(TILES)}
(start.parent / f"ready_{rank}").touch()
while not start.exists():
    time.sleep(0.001)
print([TILES.index(autotune.choose(f"toy {n}", KEY, TILES, GPU, times.__getitem__)) for n in range(200)])
"""


def test_processes_that_race_agree(tmp_path: Path) -> None:
    """Three processes, each of which measures another candidate as the fastest, over 200 keys, half of them damaged."""
    for n in range(0, 200, 2):
        autotune.choose(f"toy {n}", KEY, TILES, GPU, Stopwatch(FASTEST_LAST))
    for path in kept(tmp_path):
        path.write_bytes(b"{")
    start = tmp_path / "start"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(rank), str(start)],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("ready_*"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        start.touch()
        choices = [racer.communicate(timeout=60)[0].strip() for racer in racers]
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert choices[0] and choices == [choices[0]] * 3
    assert len(kept(tmp_path)) == 300, "one file a key beside the damaged ones, nothing half-written"
