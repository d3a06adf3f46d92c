"""What a model costs: parameters and multiply-adds, from its configuration alone.

    python -m drwkv.models.cost --input-size 32 --channels 4 --classes 1000

Here are the formulas, one line a layer; the layers themselves are in `drwkv.py` and `layers.py`. A
multiply-add is one of a matrix product; an image costs twice as many FLOPs forward and six times as many in
training. Norms, lerps, gates and bi_wkv (linear in T, under 0.1 % of the arithmetic) cost bytes rather
than arithmetic, and are not counted. The "Gflops" of the paper's Table 1 are these multiply-adds at 64
tokens: 32x32 images with patch 4.

Symbols: D hidden width, L blocks, p patch size, C and O input and output channels, R hidden rate of the
channel mix, N classes, T tokens of the image at hand, T0 tokens of the native size, K conditioning tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import nn

from drwkv.models import create, names

NUM_FREQUENCIES = 256  # of the timestep embedding


@dataclass(frozen=True)
class LayerCost:
    """One kind of layer, all its copies together."""

    layer: str
    num_params: int
    num_macs: int  # multiply-adds of one forward pass of one image


@dataclass(frozen=True)
class Cost:
    """A whole model at one input size."""

    num_params: int
    num_macs: int  # multiply-adds of one forward pass of one image
    num_tokens: int  # image tokens T


class _HasConfig(Protocol):
    config: dict[str, Any]


def drwkv_layers(config: Mapping[str, Any], input_size: tuple[int, int]) -> list[LayerCost]:
    """Every layer of a Diffusion-RWKV; `config` as `DiffusionRWKV.config`, `input_size` the image at hand."""
    D, L, p, R = config["hidden_size"], config["depth"], config["patch_size"], config["hidden_rate"]
    C, N = config["in_channels"], config["num_classes"]
    O = 2 * C if config["learn_variance"] else C  # noqa: E741
    T, T0 = num_tokens(input_size, p), num_tokens(tuple(config["input_size"]), p)
    in_context = config["conditioning"] == "in-context"
    K = 0 if not in_context else 1 if N is None else 2
    vectors = {"adaln-zero": 6, "adaln": 4, "in-context": 0}[config["conditioning"]]
    skips = L // 2 if config["skip"] == "concat" else 0
    final_vectors = 0 if in_context else 2
    return [
        LayerCost("patch embedding", D * C * p**2 + D, T * D * C * p**2),
        LayerCost("positions", T0 * D, 0),
        LayerCost("time embedding", NUM_FREQUENCIES * D + D**2 + 2 * D, NUM_FREQUENCIES * D + D**2),
        LayerCost("label table", 0 if N is None else (N + 1) * D, 0),
        LayerCost("norms", L * 4 * D + 2 * D + 2 * D, 0),
        LayerCost("spatial mix", L * (4 * D**2 + 5 * D), L * (T + K) * 4 * D**2),
        LayerCost("channel mix", L * ((2 * R + 1) * D**2 + 2 * D), L * (T + K) * (2 * R + 1) * D**2),
        LayerCost("modulation", L * vectors * (D**2 + D), L * vectors * D**2),
        LayerCost("skips", skips * (2 * D**2 + D), skips * (T + K) * 2 * D**2),
        LayerCost("final modulation", final_vectors * (D**2 + D), final_vectors * D**2),
        LayerCost("output", (D + 1) * O * p**2, T * D * O * p**2),
    ]


FORMULAS = {"DRWKV": drwkv_layers}  # family -> its layers


def num_tokens(input_size: tuple[int, int], patch_size: int) -> int:
    """Image tokens T of an (H, W) input. Raises ValueError where the patch does not divide it."""
    H, W = input_size
    if H % patch_size or W % patch_size:
        raise ValueError(f"an input of {H}x{W} is not divisible by patch_size={patch_size}")
    return (H // patch_size) * (W // patch_size)


def layer_costs(
    model: nn.Module | Mapping[str, Any], input_size: int | tuple[int, int] | None = None
) -> list[LayerCost]:
    """The cost of each kind of layer of a model, or of its `config`; input_size None: the native one."""
    config = model if isinstance(model, Mapping) else cast(_HasConfig, model).config
    if input_size is None:
        input_size = tuple(config["input_size"])
    elif isinstance(input_size, int):
        input_size = (input_size, input_size)
    return FORMULAS[config["name"]](config, input_size)


def cost(model: nn.Module | Mapping[str, Any], input_size: int | tuple[int, int] | None = None) -> Cost:
    """Parameters, multiply-adds and tokens of a model, or of its `config`; input_size None: native."""
    config = model if isinstance(model, Mapping) else cast(_HasConfig, model).config
    layers = layer_costs(config, input_size)
    size = config["input_size"] if input_size is None else input_size
    H, W = (size, size) if isinstance(size, int) else size
    return Cost(
        num_params=sum(layer.num_params for layer in layers),
        num_macs=sum(layer.num_macs for layer in layers),
        num_tokens=num_tokens((H, W), config["patch_size"]),
    )


def table(model_names: Sequence[str], *, input_size: int, in_channels: int, num_classes: int | None) -> str:
    """A table of models with their parameters, tokens and multiply-adds at one input size."""
    lines = [
        f"{'model':<12} {'parameters':>13} {'tokens':>7} {'GMAC/image':>11} {'training TFLOP/image':>21}"
    ]
    for name in model_names:
        with torch.device("meta"):
            model = create(name, input_size=input_size, in_channels=in_channels, num_classes=num_classes)
        c = cost(model)
        gmac, tflop = c.num_macs / 1e9, 6e-12 * c.num_macs
        lines.append(f"{name:<12} {c.num_params:>13,} {c.num_tokens:>7,} {gmac:>11.2f} {tflop:>21.3f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of the models named on the command line, or of all sizes that divide the input."""
    parser = argparse.ArgumentParser(prog="python -m drwkv.models.cost", description="what models cost")
    parser.add_argument("models", nargs="*", metavar="MODEL", help="names such as DRWKV-H/2; none: all sizes")
    parser.add_argument("--input-size", type=int, default=32, help="height = width of the image or latent")
    parser.add_argument("--channels", type=int, default=4, help="channels of the image or latent")
    parser.add_argument("--classes", type=int, default=1000, help="0: unconditional")
    given = parser.parse_args(arguments)
    size, num_classes = given.input_size, given.classes or None
    chosen = given.models or [n for n in names() if "/" in n and size % int(n.partition("/")[2]) == 0]
    try:
        print(table(chosen, input_size=size, in_channels=given.channels, num_classes=num_classes))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
