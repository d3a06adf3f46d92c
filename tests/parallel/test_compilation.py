"""Blocks of one kind share one compilation, at any depth, and a later start finds it on disk."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from drwkv.models import create
from drwkv.parallel.activations import ActivationConfig, checkpoint_blocks
from drwkv.parallel.compilation import compile_blocks

KINDS = 3  # of blocks: the first, which has LN_0; the shallow ones and the middle; those that take a skip
START = """
import sys, time, torch
from torch._dynamo.utils import counters
from drwkv.models import create
from drwkv.parallel.compilation import compile_blocks
model = create("DRWKV", input_size=8, in_channels=1, patch_size=2, hidden_size=16, depth=int(sys.argv[1]))
compile_blocks(model.blocks_in_order())
begin = time.perf_counter()
model(torch.randn(2, 1, 8, 8), torch.zeros(2)).square().mean().backward()
caches = counters["inductor"]
print(time.perf_counter() - begin, caches["fxgraph_cache_miss"], caches["fxgraph_cache_hit"])
"""


@pytest.fixture
def without_code_generation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dynamo captures and guards as ever, and runs what it captured: how often is what is counted here."""
    before = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = before


def compiled(depth: int, config: ActivationConfig) -> nn.Module:
    model = create("DRWKV", input_size=8, in_channels=1, patch_size=2, hidden_size=16, depth=depth)
    blocks = model.blocks_in_order()  # type: ignore[operator]
    checkpoint_blocks(blocks, config)
    compile_blocks(blocks)
    return model


def train(model: nn.Module, batch_size: int) -> None:
    keep = torch.ones(model.depth, batch_size)  # type: ignore[arg-type]
    model(torch.randn(batch_size, 1, 8, 8), torch.zeros(batch_size), keep=keep).square().mean().backward()


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (ActivationConfig("none"), KINDS),
        pytest.param(ActivationConfig("full"), KINDS, marks=pytest.mark.proof),
        (ActivationConfig("selective"), KINDS),
        (ActivationConfig("full", every=2), 2 * KINDS - 1),  # the one with LN_0 is always checkpointed
    ],
    ids=str,
)
def test_twenty_five_blocks_compile_as_often_as_there_are_kinds(
    without_code_generation: None, config: ActivationConfig, kinds: int
) -> None:
    train(compiled(25, config), 4)
    assert counters["stats"]["unique_graphs"] == counters["frames"]["ok"] == kinds


def test_uneven_micro_batches_and_grids_stay_within_the_limit(
    without_code_generation: None,
) -> None:
    model = compiled(7, ActivationConfig("none"))
    for batch_size in (5, 4, 1, 7):
        train(model, batch_size)
    with torch.no_grad():
        for batch_size in (80, 64):
            model(torch.randn(batch_size, 1, 8, 8), torch.zeros(batch_size))
    found = counters["frames"]["ok"]
    assert found == counters["frames"]["total"] > 8, (
        "every frame was compiled, and more than dynamo allows alone"
    )
    train(model, 6)
    model.zero_grad()
    assert counters["frames"]["ok"] == found, "any other batch size finds what is there"


@pytest.mark.proof
def test_depth_costs_no_compilation_and_a_later_start_compiles_nothing(tmp_path: Path, root: Path) -> None:
    def start(depth: int, cache: str) -> tuple[float, int, int]:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / cache),
            "PYTHONPATH": str(root),
        }
        told = subprocess.run(
            [sys.executable, "-c", START, str(depth)],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split()
        return float(told[0]), int(told[1]), int(told[2])

    shallow, deep, again = start(7, "7"), start(25, "25"), start(25, "25")
    assert shallow[1:] == deep[1:] == (2 * KINDS, 0), "forward and backward of each kind"
    assert again[1:] == (0, 2 * KINDS)
    assert deep[0] < 1.5 * shallow[0]
    assert again[0] < 0.5 * deep[0]
