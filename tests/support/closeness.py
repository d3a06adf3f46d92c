"""Comparison by relative root mean square in float64, tensor by tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor


def relative_rms(actual: Tensor, exact: Tensor) -> float:
    """The root mean square of the error over that of `exact`; NaN if either holds one."""
    actual, exact = actual.detach().double(), exact.detach().double()
    error = (actual - exact).square().mean().sqrt()
    return float(error / exact.square().mean().sqrt().clamp_min(1e-30))


def assert_close(
    actual: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    tolerance: float,
    names: Collection[str] | None = None,
) -> None:
    """Compare all of `exact`, or what is named, on the channels (the last dimension) that it has."""
    errors = {
        name: relative_rms(actual[name][..., : x.shape[-1]] if x.dim() else actual[name], x)
        for name, x in exact.items()
        if names is None or name in names
    }
    assert errors and all(error <= tolerance for error in errors.values()), errors  # a NaN fails too
