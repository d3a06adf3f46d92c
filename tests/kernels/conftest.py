"""Triton's interpreter runs with the faster scan of `tests/support/triton_interpreter.py`."""

from __future__ import annotations

from drwkv.kernels import backends

if backends.HAS_TRITON:
    from triton.runtime.interpreter import ScanOps
    from triton_interpreter import scan_rows

    ScanOps.generic_scan = scan_rows
