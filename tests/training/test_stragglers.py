"""A rank that waits for data, or works longer than the others, is found and named."""

from __future__ import annotations

import logging

import pytest
from processes import ROOT, Applications

from drwkv.parallel import session
from drwkv.training.stragglers import Stragglers, slow_ranks, warn_of_slow_devices


def test_a_rank_is_slow_when_it_is_far_from_the_median() -> None:
    assert slow_ranks([0.02, 0.03, 0.11], [1.0, 1.4, 1.2]) == {}
    assert slow_ranks([0.5, 0.55, 0.5], [1.0, 1.0, 1.0]) == {}, "all wait alike"
    assert slow_ranks([0.02] * 5 + [0.43], [1.0] * 6) == {
        ("wait", 5): "rank 5 waited 43% of its time for data; the median is 2%"
    }
    assert slow_ranks([0.0, 0.0], [0.5, 0.8]) == {
        ("work", 1): "rank 1 worked 0.8 s on each of its steps; the median is 0.5 s"
    }


def test_one_slow_look_is_no_news_three_are_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "drwkv")
    looks = iter([0.5, 0.0, 0.5, 0.5, 0.5, 0.5, 0.0])
    monkeypatch.setattr(
        "drwkv.training.stragglers.of_all_ranks", lambda *_: [[0.0, 1.0], [0.0, 1.0], [next(looks), 1.0]]
    )
    told = []
    with session() as world:
        ranks = Stragglers(world, 1)
        for _ in range(7):
            with ranks.working():
                pass
            assert ranks.compare()["data_wait_max_rank"] in (0.0, 2.0)
            told.append(len(caplog.messages))
    assert told == [0, 0, 0, 0, 1, 1, 1]
    assert caplog.messages == ["rank 2 waited 50% of its time for data; the median is 0%"]


def test_a_device_far_below_the_others_is_named(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_slow_devices([7.9e14, 7.8e14, 3.1e14, 7.9e14])
    assert caplog.messages == [
        "rank 2: its matmuls reach 310 TFLOP/s; the median is 790 TFLOP/s, and all wait for the slowest"
    ]


def test_both_ranks_of_a_real_world_learn_who_waited_and_who_worked(applications: Applications) -> None:
    finished = applications.run(str(ROOT / "tests/support/slow_ranks.py"), world_size=2)
    for rank in range(2):
        said = next(line for line in finished.lines if line.startswith(f"rank {rank} knows:"))
        assert "data_wait_max_rank 1" in said and "work over 2" in said, finished.output
    warnings = [line for line in finished.lines if "the median is" in line]
    assert len(warnings) == 2, finished.output
    assert any("rank 1 waited " in line for line in warnings)
    assert any("rank 0 worked " in line for line in warnings)
