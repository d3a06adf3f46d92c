"""torch.compile by block: one compilation for all blocks of one kind. Which blocks, and what wraps them: __init__.py.

Compiled code belongs to the code of `forward`, not to a block, so the second block of a kind finds that of the first;
what is built in otherwise (LN_0, a skip that is joined by a linear layer) is a guard, and makes another kind. A model
of any depth so has three, and starts as fast with 37 blocks as with 7. A later process takes the compiled code from
the cache on disk (TORCHINDUCTOR_CACHE_DIR).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

# Of the code that all blocks share, with 3 kinds: for the first batch size, for any other, for one sample, and the
# same without gradients for grids and validation, with autocast or not. Beyond its limit (8) dynamo gives the compiled
# code up for good, with a warning alone.
MOST_COMPILATIONS = 64


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile the forward of each block in place; hooks, which engines hang on modules, stay outside of it."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_COMPILATIONS)
    for block in blocks:
        block.forward = torch.compile(block.forward)
