"""Every random number of drwkv: a pure function of (seed, purpose, n).

Here: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in plain
integer arithmetic, and the uniform, normal and integer variates made of it. Its key is (seed, purpose),
its counter (element // 4, step, n & 0xffffffff, n >> 32); element e of a row is output word e % 4.
Row i therefore depends on n[i] alone: not on the batch it stands in, the rank, the device or the history.
Not here: which sample is the n-th (data/order.py), and what the numbers are used for.

Shape suffixes: B rows (one per n), K blocks of four elements.
"""

from __future__ import annotations

import enum
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_CPU_CHUNK, _GPU_CHUNK = 1 << 16, 1 << 21  # blocks of four at a time: 4 MB and 130 MB of scratch

Word = TypeVar("Word", int, Tensor)
Writer = Callable[[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]], None]


class Purpose(enum.IntEnum):
    """What a number is for: the second key word of Philox. Never renumber: runs would change."""

    PARAMETER = 1
    ORDER = 2
    FLIP = 3
    POSTERIOR = 4
    TIMESTEP = 5
    NOISE = 6
    LABEL_DROP = 7
    STOCHASTIC_DEPTH = 8
    SHARD_PLAN = 9
    SAMPLE_NOISE = 10
    SAMPLE_STEP = 11
    VALIDATION = 12


def bits(seed: int, purpose: int, n: Tensor, num: int, *, step: int = 0) -> Tensor:
    """Random words: n (B,) int64 >= 0 on any device -> (B, num) int64 in [0, 2**32), the same on all devices.

    `step` (32 bits) tells apart several draws for one n and purpose, such as the steps of a sampler.
    Raises ValueError for a seed, purpose or step outside [0, 2**32), an n that is not (B,) int64, and a
    negative n; the last on the CPU only, for a look at values on a GPU would stall its stream.
    """
    return _fill(seed, purpose, n, num, step, torch.int64, _write_bits)


def uniform(seed: int, purpose: int, n: Tensor, num: int, *, step: int = 0) -> Tensor:
    """Uniform variates: n (B,) int64 -> (B, num) float32 in [0, 1), multiples of 2**-24."""
    return _fill(seed, purpose, n, num, step, torch.float32, _write_uniform)


def normal(seed: int, purpose: int, n: Tensor, shape: Sequence[int], *, step: int = 0) -> Tensor:
    """Standard normal variates: n (B,) int64 -> (B, *shape) float32.

    Box-Muller on pairs of words, in float64 and then rounded: CPU and GPU agree to 1e-6. |z| <= 6.77.
    """
    z = _fill(seed, purpose, n, math.prod(shape), step, torch.float32, _write_normal)
    return z.reshape(len(n), *shape)


def integers(seed: int, purpose: int, n: Tensor, high: int, *, step: int = 0) -> Tensor:
    """Whole numbers: n (B,) int64 -> (B,) int64 in [0, high), high <= 2**31, uniform to high / 2**32."""
    if not 1 <= high <= 1 << 31:
        raise ValueError(f"rng.integers: high is {high}, give 1 to 2**31")
    return (bits(seed, purpose, n, 1, step=step)[:, 0] * high) >> 32


def name_key(name: str) -> int:
    """The 63-bit key of a parameter's name (sha256), to be used as its n: the same in every process."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def key64(seed: int, purpose: int, *words: int) -> int:
    """A 64-bit key for arithmetic on the host: Philox chained over any number of words in [0, 2**64)."""
    _check_words(seed=seed, purpose=purpose)
    low, high = len(words), 0
    for word in words or (0,):
        if not 0 <= word < 1 << 64:
            raise ValueError(f"rng.key64: a word is {word}, give 0 to 2**64 - 1")
        low, high, *_ = _philox(word & _MASK, word >> 32, low, high, (seed, purpose))
    return high << 32 | low


def _philox(c0: Word, c1: Word, c2: Word, c3: Word, key: tuple[int, int]) -> tuple[Word, Word, Word, Word]:
    """Ten rounds on the counter (c0, c1, c2, c3), given as ints or as int64 tensors, which are overwritten.

    A product of two words fills 64 bits and wraps in int64; its halves are still right, for the shift's
    sign bits are masked off. The low halves are masked only where they are used, a round later.
    """
    k0, k1 = key
    for _ in range(10):
        c0 *= _MULTIPLIERS[0]
        c2 *= _MULTIPLIERS[1]
        c1 ^= c2 >> 32
        c1 ^= k0
        c1 &= _MASK
        c3 ^= c0 >> 32
        c3 ^= k1
        c3 &= _MASK
        c0, c1, c2, c3 = c1, c2, c3, c0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    c1 &= _MASK
    c3 &= _MASK
    return c0, c1, c2, c3


def _fill(
    seed: int, purpose: int, n: Tensor, num: int, step: int, dtype: torch.dtype, write: Writer
) -> Tensor:
    """(B, num) of `dtype`: `write` turns the four words of each block into its four elements."""
    _check_words(seed=seed, purpose=purpose, step=step)
    if n.dtype != torch.int64 or n.dim() != 1:
        raise ValueError(f"rng: n is {n.dtype} of shape {tuple(n.shape)}, give int64 of shape (B,)")
    if not 0 <= num <= 1 << 34:
        raise ValueError(f"rng: {num} elements for each n, give 0 to 2**34")
    if n.device.type == "cpu" and len(n) and int(n.min()) < 0:
        raise ValueError(f"rng: n holds {int(n.min())}, give counters >= 0")

    num_blocks = -(-num // 4)
    out_BK4 = torch.empty(len(n), num_blocks, 4, dtype=dtype, device=n.device)
    chunk = _CPU_CHUNK if n.device.type == "cpu" else _GPU_CHUNK
    columns = max(1, min(num_blocks, chunk))
    rows = max(1, chunk // columns)
    for i in range(0, len(n), rows):
        n_B1 = n[i : i + rows, None]
        for j in range(0, num_blocks, columns):
            out = out_BK4[i : i + rows, j : j + columns]
            counter = torch.empty(4, *out.shape[:2], dtype=torch.int64, device=n.device)
            counter[0] = torch.arange(j, j + out.shape[1], device=n.device)
            counter[1] = step
            counter[2] = n_B1 & _MASK
            counter[3] = n_B1 >> 32
            write(out, _philox(counter[0], counter[1], counter[2], counter[3], (seed, int(purpose))))
    return out_BK4.flatten(1)[:, :num].contiguous()


def _write_bits(out: Tensor, words: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    for i, word in enumerate(words):
        out[..., i] = word


def _write_uniform(out: Tensor, words: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    for i, word in enumerate(words):
        word >>= 8
        out[..., i] = word  # 24 bits are exact in float32
    out *= 2.0**-24


def _write_normal(out: Tensor, words: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    for i in (0, 2):
        radius = words[i].double().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = words[i + 1].double().mul_(2 * math.pi * 2.0**-32)
        out[..., i] = angle.cos().mul_(radius)
        out[..., i + 1] = angle.sin_().mul_(radius)


def _check_words(**words: int) -> None:
    for name, word in words.items():
        if not 0 <= word <= _MASK:
            raise ValueError(f"rng: {name} is {word}, give 0 to 2**32 - 1")
