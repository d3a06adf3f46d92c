"""The faster scan that the kernel tests give to Triton's interpreter computes what the interpreter's own does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.interpreter import ScanOps
from triton_interpreter import scan_elements

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _add_and_multiply(a, b, c, d):  # type: ignore[no-untyped-def]
    return a + c, b * d


@triton.jit
def _scan(p_x, p_y, reverse: tl.constexpr):  # type: ignore[no-untyped-def]
    o_tile = tl.arange(0, 8)[:, None] * 4 + tl.arange(0, 4)[None, :]
    x, y = tl.associative_scan(
        (tl.load(p_x + o_tile), tl.load(p_y + o_tile)), 0, _add_and_multiply, reverse=reverse
    )
    tl.store(p_x + o_tile, x)
    tl.store(p_y + o_tile, y)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_interpreter_scans_rows_as_it_scans_elements(
    reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scanned() -> tuple[Tensor, Tensor]:
        x, y = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        _scan[(1,)](x, y, reverse)
        return x, y

    by_rows = scanned()
    monkeypatch.setattr(ScanOps, "generic_scan", scan_elements)
    assert all(map(torch.equal, by_rows, scanned()))
