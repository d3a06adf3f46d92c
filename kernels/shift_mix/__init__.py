"""q_shift and the lerps of Diffusion-RWKV's mixes in one pass: `shift_mix` and nothing else is public.

`op.py` holds the public function, `reference.py` the equation, `torch.py` and `triton.py` the backends,
`README.md` the derivation.
"""

from drwkv.kernels.shift_mix.op import shift_mix

__all__ = ["shift_mix"]
