"""Diffusion-RWKV at full scale: backbones, diffusion, streaming data, parallel training, sampling, evaluation.

Nothing is imported here, so that `import drwkv` is quick; open the subpackage that names your subject.
"""

__version__ = "0.1.0"
