"""Backbones by name: `create("DRWKV-H/2", input_size=32, in_channels=4, num_classes=1000)`.

Each family lives in a file of its own (`drwkv.py`); what they share in `layers.py`; what they cost in
`cost.py`. Here is only the register of names. A new family adds one line to `FAMILIES`.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from drwkv.models import drwkv

__all__ = ["FAMILIES", "Family", "create", "names", "options"]


@dataclass(frozen=True)
class Family:
    """A backbone class and its named sizes: `FAMILY-SIZE/PATCH`, or the bare `FAMILY` with all options given.

    The class takes keyword arguments alone and has `init_weights(seed)`.
    """

    build: Callable[..., nn.Module]
    sizes: Mapping[str, Mapping[str, int]]
    patch_sizes: tuple[int, ...]


FAMILIES: dict[str, Family] = {
    "DRWKV": Family(drwkv.DiffusionRWKV, drwkv.SIZES, drwkv.PATCH_SIZES),
}


def names() -> list[str]:
    """Every name that `create` knows: the bare families, then their sizes."""
    sized = [
        f"{family}-{size}/{patch}"
        for family, entry in FAMILIES.items()
        for size in entry.sizes
        for patch in entry.patch_sizes
    ]
    return [*FAMILIES, *sized]


def options(name: str) -> dict[str, Any]:
    """The arguments that a name stands for, e.g. "DRWKV-S/2" -> patch_size 2, hidden_size 384, depth 13."""
    if name not in (known := names()):
        by_case = {other.lower(): other for other in known}
        nearest = difflib.get_close_matches(name.lower(), by_case, n=1, cutoff=0.0)[0]
        raise ValueError(f"no model is called {name!r}; did you mean {by_case[nearest]!r}?")
    family, _, size_and_patch = name.partition("-")
    if not size_and_patch:
        return {}
    size, _, patch = size_and_patch.partition("/")
    return {**FAMILIES[family].sizes[size], "patch_size": int(patch)}


def create(
    name: str,
    *,
    input_size: int | tuple[int, int],
    in_channels: int,
    num_classes: int | None = None,
    seed: int = 0,
    **overrides: Any,
) -> nn.Module:
    """Build a backbone and initialise each of its parameters from (seed, parameter name).

    input_size is (H, W) of the images or latents, or one number for a square. num_classes None makes an
    unconditional model. `overrides` are keyword arguments of the family's class, and win over the name. The
    global random state is neither read nor moved. Inside `with torch.device(...)` the model is made on that
    device; on "meta" it has shapes alone.

    >>> model = create("DRWKV", input_size=8, in_channels=1, patch_size=2, hidden_size=64, depth=3)

    Raises ValueError for an unknown name or option, naming the nearest known one, and for impossible values.
    """
    arguments = options(name) | overrides
    build = FAMILIES[name.partition("-")[0]].build
    known = inspect.signature(build).parameters
    for key in overrides:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{name} has no option {key}={overrides[key]!r}; did you mean {nearest!r}?")
    given = {"input_size": input_size, "in_channels": in_channels, "num_classes": num_classes, **arguments}
    missing = [key for key, p in known.items() if p.default is inspect.Parameter.empty and key not in given]
    if missing:
        raise ValueError(
            f"{name} needs {'=, '.join(missing)}= (or take a named size, such as {names()[-1]!r})"
        )

    # Build without values first, so that torch's own initialisation draws nothing.
    device = torch.get_default_device()
    with torch.device("meta"):
        model = build(**given)
    if device.type != "meta":
        cast(Any, model.to_empty(device=device)).init_weights(seed)
    return model
