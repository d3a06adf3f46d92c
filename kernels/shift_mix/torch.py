"""The `torch` backend of shift_mix: forward and backward in ATen calls, made for the CPU, right on any device.

The samples pass in blocks that fit the cache, so that each tensor is read from memory once and nothing of the
size of x is made but the results. Registration is in `registration.py`, the derivation in `README.md`.
Shapes: B batch (b: of one block), N = K + h w tokens, D channels, M mixes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from drwkv.kernels.shift_mix.registration import register

BLOCK_ELEMENTS = 400_000  # 1.6 MB of float32: smaller blocks cost calls, larger ones leave the cache


def shift_mix_torch(
    x: Tensor, mixes: Tensor, grid: tuple[int, int], out_dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """shift_mix with a backward that saves x and mixes alone; arguments as in `op.shift_mix`, unchecked."""
    return tuple(_shift_mix(x, mixes, *grid, out_dtype))


def _forward(x_BND: Tensor, mixes_MD: Tensor, h: int, w: int, out_dtype: torch.dtype) -> list[Tensor]:
    dtype = _state_dtype(x_BND, mixes_MD)
    mixes = mixes_MD.to(dtype).unbind()
    outs = [x_BND.new_empty(x_BND.shape, dtype=out_dtype) for _ in mixes]
    for block in _blocks(x_BND):
        x_bND = x_BND[block].to(dtype)
        out_blocks = [out_BND[block] for out_BND in outs]

        # The neighbours, in the place of the last output where that has the right dtype; zero at the border.
        xx_bND = out_blocks[-1] if out_dtype == dtype else torch.empty_like(x_bND)
        xx_bND.zero_()
        for reader, source in _pairs(xx_bND, x_bND, h, w):
            reader.copy_(source)

        for out_bND, mix_D in zip(out_blocks, mixes, strict=True):
            if out_dtype == dtype:
                torch.lerp(xx_bND, x_bND, mix_D, out=out_bND)
            else:
                out_bND.copy_(torch.lerp(xx_bND, x_bND, mix_D))
    return outs


def _backward(
    grads: Sequence[Tensor], x_BND: Tensor, mixes_MD: Tensor, h: int, w: int
) -> tuple[Tensor, Tensor]:
    dtype = _state_dtype(x_BND, mixes_MD)
    own_weights, shared_weights = mixes_MD.to(dtype).unbind(), (1 - mixes_MD.to(dtype)).unbind()
    gx_BND = torch.empty_like(x_BND, memory_format=torch.contiguous_format)
    sums: list[Tensor] = []  # of each block, for each mix
    for block in _blocks(x_BND):
        x_bND = x_BND[block].to(dtype)
        g_blocks = [grad_BND[block].to(dtype) for grad_BND in grads]
        gx_bND = gx_BND[block]
        own_bND = gx_bND if gx_bND.dtype == dtype else torch.empty_like(x_bND)
        shared_bND = torch.empty_like(own_bND)

        # grad mix_m = sum of g_m (x - xx); the two factors stand where grad x will.
        delta_bND, product_bND = own_bND.copy_(x_bND), shared_bND
        for reader, source in _pairs(delta_bND, x_bND, h, w):
            reader.sub_(source)
        sums += [torch.mul(g_bND, delta_bND, out=product_bND).sum((0, 1)) for g_bND in g_blocks]

        # grad x: each token's own share, sum of g_m mix_m, and the share of the neighbour that it was to its reader.
        for share_bND, weights in ((own_bND, own_weights), (shared_bND, shared_weights)):
            torch.mul(g_blocks[0], weights[0], out=share_bND)
            for g_bND, weight_D in zip(g_blocks[1:], weights[1:], strict=True):
                share_bND.addcmul_(g_bND, weight_D)
        for reader, source in _pairs(shared_bND, own_bND, h, w):
            source.add_(reader)
        if own_bND is not gx_bND:
            gx_bND.copy_(own_bND)
    if not sums:
        return gx_BND, mixes_MD.new_zeros(mixes_MD.shape)
    gmixes_MD = torch.stack(sums).unflatten(0, (-1, len(grads))).sum(0)
    return gx_BND, gmixes_MD.to(mixes_MD.dtype)


def _pairs(readers_bND: Tensor, sources_bND: Tensor, h: int, w: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views (reader, source) of one shape which hold together every element beside the neighbour that it reads."""
    _, num_tokens, channels = readers_bND.shape
    tokens, quarter = num_tokens - h * w, channels // 4
    if quarter:
        # The neighbour on the left, on the right, above, below: so many tokens before the reader.
        for i, (rows, columns, step) in enumerate(
            ((h, w - 1, 1), (h, w - 1, -1), (h - 1, w, w), (h - 1, w, -w))
        ):
            shape = (rows, columns, i * quarter, quarter)
            yield (
                _part(readers_bND, tokens + max(step, 0), w, *shape),
                _part(sources_bND, tokens + max(-step, 0), w, *shape),
            )
    if channels % 4:
        yield readers_bND[..., 4 * quarter :], sources_bND[..., 4 * quarter :]
    if tokens:
        whole = slice(0, 4 * quarter)
        yield readers_bND[:, :tokens, whole], sources_bND[:, :tokens, whole]


def _part(x_bND: Tensor, first: int, w: int, rows: int, columns: int, channel: int, channels: int) -> Tensor:
    """The tokens `first` + row w + column as (b, rows, columns, channels); one call where slices would be five."""
    b_stride, n_stride, d_stride = x_bND.stride()
    return x_bND.as_strided(
        (x_bND.shape[0], rows, columns, channels),
        (b_stride, w * n_stride, n_stride, d_stride),
        x_bND.storage_offset() + first * n_stride + channel * d_stride,
    )


def _blocks(x_BND: Tensor) -> list[slice]:
    """Slices of samples, the first the longest; one block off the CPU, where every call is a launch."""
    batch, num_tokens, channels = x_BND.shape
    size = batch if x_BND.device.type != "cpu" else max(1, BLOCK_ELEMENTS // (num_tokens * channels))
    return [slice(start, min(start + size, batch)) for start in range(0, batch, max(1, size))]


def _state_dtype(x: Tensor, mixes: Tensor) -> torch.dtype:
    return torch.promote_types(torch.float32, torch.promote_types(x.dtype, mixes.dtype))


_shift_mix, _shift_mix_backward = register("shift_mix", _forward, _backward)
