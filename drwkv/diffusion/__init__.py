"""The maths of diffusion: processes, samplers and guidance as pure functions. Networks: drwkv.models."""
