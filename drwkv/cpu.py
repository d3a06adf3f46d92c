"""How a process that computes on a CPU deals with its memory."""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = (1 << 31) - 1  # bytes


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed for the next tensor, from now on; False where the C library is not glibc.

    Else glibc maps each large tensor anew and hands it back to the kernel when it is freed, and every page of every
    tensor costs a fault: a third of the time of a small VAE. The process stays as large as it ever was.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _NEVER) and mallopt(_TRIM_THRESHOLD, _NEVER))
