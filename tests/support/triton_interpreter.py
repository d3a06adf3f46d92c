"""Triton's interpreter, with its scan of whole rows at a time: as written it calls the function element by element.

A scan of (32, 16) elements takes 32 calls in place of 512, and the kernel tests minutes in place of hours. The
result is the same (`test_interpreter_scan.py` compares the two).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime import interpreter

scan_elements = interpreter.ScanOps.generic_scan


def scan_rows(self: interpreter.ScanOps, tensors: list[Any]) -> list[Any]:
    """`ScanOps.generic_scan` with one call of the combining function a step of the scanned axis."""
    rows = [np.moveaxis(x.handle.data, self.axis, 0) for x in tensors]
    dtypes = [x.dtype for x in tensors]
    out = [np.empty_like(x) for x in rows]
    total = tuple(self.to_tensor(x[0], dtype) for x, dtype in zip(rows, dtypes, strict=True))
    for i in range(len(rows[0])):
        if i:
            row = [self.to_tensor(x[i], dtype) for x, dtype in zip(rows, dtypes, strict=True)]
            total = self.combine_fn.fn(*total, *row)
            total = total if isinstance(total, tuple) else (total,)
        for x, part in zip(out, total, strict=True):
            x[i] = part.handle.data
    return [
        self.to_tensor(np.ascontiguousarray(np.moveaxis(x, 0, self.axis)), dtype)
        for x, dtype in zip(out, dtypes, strict=True)
    ]
