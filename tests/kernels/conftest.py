"""What the kernel tests share: fresh memory full of NaN, and Triton's interpreter with a faster scan.

The scan is that of `tests/support/triton_interpreter.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from drwkv.kernels import backends

if backends.HAS_TRITON:
    from triton.runtime.interpreter import ScanOps
    from triton_interpreter import scan_rows

    ScanOps.generic_scan = scan_rows


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """Memory that an operator allocates and forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
