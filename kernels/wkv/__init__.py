"""Bi-WKV, the bidirectional linear-cost mixing of Diffusion-RWKV: `bi_wkv` and nothing else is public.

`op.py` holds the public function, `reference.py` the equation, `torch.py` the linear-time backend,
`README.md` the derivation.
"""

from drwkv.kernels.wkv.op import bi_wkv

__all__ = ["bi_wkv"]
