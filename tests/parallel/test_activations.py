"""Activation checkpointing changes memory and time, and no gradient."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from drwkv.cpu import keep_freed_memory
from drwkv.models import create
from drwkv.parallel.activations import ActivationConfig, checkpoint_blocks

MOST = 1.20  # time of selective checkpointing, over that of none
ROUNDS = 8


def model(
    config: ActivationConfig, *, input_size: int = 8, hidden_size: int = 24, depth: int = 5
) -> nn.Module:
    """A model whose gates are open, so that every block has a part in the output."""
    built = create(
        "DRWKV",
        input_size=input_size,
        in_channels=2,
        num_classes=3,
        patch_size=2,
        hidden_size=hidden_size,
        depth=depth,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    built.num_checkpointed = checkpoint_blocks(built.blocks_in_order(), config)  # type: ignore[operator]
    return built


def gradients(built: nn.Module, size: int = 8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, keep = torch.randn(3, 2, size, size, generator=generator), torch.ones(built.depth, 3)  # type: ignore[arg-type]
    keep[1, 0] = 0.0
    out = built(x, torch.tensor([0, 10, 999]), torch.tensor([0, 1, 3]), keep=keep)
    out.square().mean().backward()
    return {
        name: parameter.grad for name, parameter in built.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize(
    ("config", "num_checkpointed"),
    [
        (ActivationConfig("full"), 5),
        (ActivationConfig("selective"), 5),
        (ActivationConfig("full", every=2), 3),
        (ActivationConfig("selective", every=5), 1),
        (ActivationConfig("none", every=2), 0),
        (ActivationConfig("full", blocks=2), 2),
        (ActivationConfig("selective", blocks=0), 0),
        (ActivationConfig("full", blocks=9), 5),
    ],
)
def test_gradients_are_those_without(config: ActivationConfig, num_checkpointed: int) -> None:
    built = model(config)
    assert built.num_checkpointed == num_checkpointed
    expected, found = gradients(model(ActivationConfig())), gradients(built)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@pytest.mark.proof
def test_selective_checkpointing_costs_at_most_a_fifth_of_the_time() -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    models = {
        mode: model(ActivationConfig(mode), input_size=64, hidden_size=384, depth=7)  # type: ignore[arg-type]
        for mode in ("none", "selective")
    }
    best = dict.fromkeys(models, float("inf"))
    for _ in range(ROUNDS):
        for mode, built in models.items():
            begin = time.thread_time()
            gradients(built, size=64)
            best[mode] = min(best[mode], time.thread_time() - begin)
    assert best["selective"] <= MOST * best["none"], best
