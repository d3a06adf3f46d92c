"""Bi-WKV, the bidirectional linear-cost mixing of Diffusion-RWKV: `bi_wkv` and `bi_wkv_gated` are public.

`op.py` holds the public functions, `reference.py` the equation, `torch.py` and `triton.py` the linear-time backends,
`README.md` the derivation.
"""

from drwkv.kernels.wkv.op import bi_wkv, bi_wkv_gated

__all__ = ["bi_wkv", "bi_wkv_gated"]
