"""Between what is stored and what the model sees: pixels as floats, latents out of moments, and the VAE.

Scale and shift are data: they come from the VAE's own config, stand in the shard set's manifest, and are
handed in here; no constant stands in the code.

Shape suffixes: B batch, C channels, H W pixels, h w latent pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from drwkv.data.manifest import Manifest

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # as AutoencoderKL clamps it


def decode_pixels(x_BCHW: Tensor) -> Tensor:
    """uint8 (B, C, H, W) as stored -> float32 in [-1, 1]: x / 127.5 - 1."""
    return x_BCHW.to(torch.float32) / 127.5 - 1.0


def encode_pixels(x_BCHW: Tensor) -> Tensor:
    """Float (B, C, H, W), meant to be in [-1, 1] -> uint8: clamp(127.5 x + 128), cut, not rounded (ADM)."""
    return (127.5 * x_BCHW.float() + 128.0).clamp(0, 255).to(torch.uint8)


def sample_posterior(moments_BChw: Tensor, eps_BChw: Tensor, *, scale: float, shift: float) -> Tensor:
    """Moments (B, 2C, h, w) and normal noise (B, C, h, w) -> the model's latents (B, C, h, w), float32.

    z = (mean + exp(log_variance / 2) eps - shift) scale; the moments' first half is the mean.
    """
    if moments_BChw.shape[1] != 2 * eps_BChw.shape[1]:
        raise ValueError(
            f"moments of {moments_BChw.shape[1]} channels need noise of {moments_BChw.shape[1] // 2}, "
            f"got {eps_BChw.shape[1]}"
        )
    mean, log_variance = moments_BChw.float().chunk(2, dim=1)
    std = (0.5 * log_variance.clamp(*LOG_VARIANCE_RANGE)).exp()
    return (mean + std * eps_BChw - shift) * scale


def load_vae(path: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    """A diffusers AutoencoderKL from a folder, or from the hub by name; frozen, safetensors weights only.

    SDXL's VAEs overflow in float16: give float32 or bfloat16. Raises ValueError naming the path.
    """
    # Importing diffusers takes seconds, and pixel-space runs never need it.
    from diffusers import AutoencoderKL

    if dtype == torch.float16:
        raise ValueError(f"VAE {path}: float16 overflows in SDXL's VAEs; give float32 or bfloat16")
    try:
        vae = AutoencoderKL.from_pretrained(
            path,
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=Path(path).is_dir(),
            low_cpu_mem_usage=False,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"VAE {path}: cannot be loaded ({reason}); give a folder with config.json and "
            "diffusion_pytorch_model.safetensors, or a name on the hub"
        ) from None
    return vae.to(device).eval().requires_grad_(False)


def vae_scaling(vae: Any) -> tuple[float, float]:
    """(scale, shift) of the VAE's own config; a config without a shift has shift 0."""
    config = vae.config
    return float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)


@torch.no_grad()
def decode_latents(vae: Any, z_BChw: Tensor, *, scale: float, shift: float) -> Tensor:
    """The model's latents (B, C, h, w) -> images (B, 3, H, W) float32, about [-1, 1]; in the VAE's dtype."""
    latents = z_BChw.float() / scale + shift
    return vae.decode(latents.to(vae.dtype)).sample.float()


def open_decoder(
    path: str, manifest: Manifest | None, *, where: str, device: torch.device | str
) -> Callable[[Tensor], Tensor]:
    """From latents (B, C, h, w) of `where` to images (B, 3, H, W) by the VAE at `path`, which must be the right one.

    Scale and shift are those of the `manifest` of the latents, or, where it has none, of the VAE's own config.
    """
    vae = load_vae(path, device=device)
    if manifest is not None and manifest.vae_hash:
        check_weights(vae, manifest.vae_hash, path=path, where=where)
    own_scale, own_shift = vae_scaling(vae)
    scale = own_scale if manifest is None or manifest.scale is None else manifest.scale
    shift = own_shift if manifest is None or manifest.shift is None else manifest.shift
    return partial(decode_latents, vae, scale=scale, shift=shift)


def hash_weights(module: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of all parameters and buffers, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_weights(vae: nn.Module, expected: str, *, path: str, where: str) -> None:
    """ValueError in one line unless `vae`, loaded from `path` in float32, is the one that made `where`."""
    found = hash_weights(vae)
    if found != expected:
        raise ValueError(
            f"VAE {path}: its weights have sha256 {found[:12]}..., but the latents of {where} were made by "
            f"one with {expected[:12]}...: give vae=FOLDER of that one"
        )
