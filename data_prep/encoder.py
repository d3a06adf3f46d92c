"""From decoded images to what a shard stores: moments by a VAE, pixels as they are, or moments that others made.

Each kind says what it is in the manifest and turns one decoded batch into the arrays of each sample. Batches have
one shape and a padded end, and no setting that tries several algorithms is used: the same image in the same place
gives the same bits in every process.

Shape suffixes: B batch, C channels, H W pixels, h w latent pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from drwkv.data.manifest import Manifest
from drwkv.latents import LOG_VARIANCE_RANGE, decode_pixels, hash_weights, load_vae, vae_scaling

USUAL_FACTOR = 8  # pixels of one latent pixel, where no VAE says
Arrays = Mapping[str, np.ndarray]
Pending = Callable[
    [], list[Arrays]
]  # waits for the device, then gives the arrays of each sample of the batch


class Encoder(Protocol):
    """What encode.py asks of each kind of set."""

    def describe(self, manifest: Manifest) -> Manifest:
        """The manifest with this encoder's own fields filled in."""

    def begin(self, x_BCHW: Tensor) -> Pending:
        """Start on a batch, as the decoder gave it, without waiting for the device."""


class PixelEncoder:
    """uint8 pixels as they are."""

    def __init__(self, *, resolution: int) -> None:
        self._resolution = resolution

    def describe(self, manifest: Manifest) -> Manifest:
        size = self._resolution
        return dataclasses.replace(
            manifest, kind="pixels", channels=3, height=size, width=size, dtype="uint8", has_flip=False
        )

    def begin(self, x_BCHW: Tensor) -> Pending:
        # Copied, or the decoder's shared memory would stay until the shard is written
        images = x_BCHW.clone().numpy()
        return lambda: [{"img.npy": image} for image in images]


class VaeEncoder:
    """Moments (2C, h, w) float16 of an image, and of its mirror image if `flip`, by a diffusers AutoencoderKL.

    `scale` and `shift` None: those of the VAE's own config. Raises ValueError for a VAE that cannot be loaded, or a
    resolution that it does not divide.
    """

    def __init__(
        self,
        vae: str,
        *,
        resolution: int,
        flip: bool,
        batch: int,
        dtype: str,
        device: torch.device,
        scale: float | None = None,
        shift: float | None = None,
    ) -> None:
        self._path, self._resolution, self._flip, self._batch = vae, resolution, flip, batch
        self._dtype, self._device = dtype, device
        self._vae = load_vae(vae, dtype=getattr(torch, dtype), device=device)
        self._vae_hash = hash_weights(load_vae(vae)) if dtype != "float32" else hash_weights(self._vae)
        own_scale, own_shift = vae_scaling(self._vae)
        self._scale = own_scale if scale is None else scale
        self._shift = own_shift if shift is None else shift
        factor = 2 ** (len(self._vae.config.block_out_channels) - 1)
        if resolution % factor:
            raise ValueError(
                f"resolution is {resolution}, but VAE {vae} makes one latent pixel of {factor}: give a multiple"
            )
        if self._vae.config.in_channels != 3:
            raise ValueError(f"VAE {vae}: takes {self._vae.config.in_channels} channels, images have 3")
        self._size, self._channels = resolution // factor, int(self._vae.config.latent_channels)
        if device.type == "cuda":
            self._vae.to(memory_format=torch.channels_last)

    def describe(self, manifest: Manifest) -> Manifest:
        return dataclasses.replace(
            manifest,
            kind="moments",
            channels=self._channels,
            height=self._size,
            width=self._size,
            dtype="float16",
            has_flip=self._flip,
            vae_id=self._path,
            vae_hash=self._vae_hash,
            scale=self._scale,
            shift=self._shift,
            encode_dtype=self._dtype,
            encode_batch=self._batch,
            encode_threads=torch.get_num_threads() if self._device.type == "cpu" else None,
        )

    @torch.inference_mode()
    def begin(self, x_BCHW: Tensor) -> Pending:
        x_BCHW = decode_pixels(x_BCHW.to(self._device, non_blocking=True)).to(self._vae.dtype)
        if self._device.type == "cuda":
            x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)
        views = [x_BCHW, x_BCHW.flip(-1)] if self._flip else [x_BCHW]
        moments = [_to_float16(self._vae.encode(view).latent_dist.parameters) for view in views]
        ready = None
        if self._device.type == "cuda":
            moments = [
                torch.empty_like(m, device="cpu", pin_memory=True).copy_(m, non_blocking=True)
                for m in moments
            ]
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(self._device))

        def finish() -> list[Arrays]:
            if ready is not None:
                ready.synchronize()
            return _by_sample([m.numpy() for m in moments])

        return finish


class MomentsKeeper:
    """Moments that others made, kept as they are; x is (B, copies, 2C, h, w) float16.

    `vae`: the one that made them, if the user knows; it gives scale, shift and the size of the images.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        flip: bool,
        scale: float | None,
        shift: float | None,
        vae: str | None = None,
    ) -> None:
        self._vae, self._factor = vae, USUAL_FACTOR
        self._vae_hash: str | None = None
        if vae is not None:
            loaded = load_vae(vae)
            own_scale, own_shift = vae_scaling(loaded)
            scale, shift = own_scale if scale is None else scale, own_shift if shift is None else shift
            self._vae_hash = hash_weights(loaded)
            self._factor = 2 ** (len(loaded.config.block_out_channels) - 1)
        if scale is None:
            raise ValueError(
                "latents that others made do not say by what factor a model wants them: give vae=..., or scale=... "
                "(such as 0.18215) and shift=... if there is one"
            )
        self._shape, self._flip, self._scale, self._shift = shape, flip, scale, shift or 0.0

    def describe(self, manifest: Manifest) -> Manifest:
        channels, height, width = self._shape
        return dataclasses.replace(
            manifest,
            kind="moments",
            crop="none",
            channels=channels // 2,
            height=height,
            width=width,
            resolution=height * self._factor,
            vae_id=self._vae,
            vae_hash=self._vae_hash,
            dtype="float16",
            has_flip=self._flip,
            scale=self._scale,
            shift=self._shift,
        )

    def begin(self, x_BCHW: Tensor) -> Pending:
        # Copied, or the decoder's shared memory would stay until the shard is written
        copies = x_BCHW.clone().unbind(1)
        return lambda: _by_sample([copy.numpy() for copy in copies])


def _to_float16(moments_BChw: Tensor) -> Tensor:
    """float16, the log-variance cut to the range that the trainer cuts it to; what does not fit is not finite."""
    mean, log_variance = moments_BChw.float().chunk(2, dim=1)
    cut = torch.where(log_variance.isfinite(), log_variance.clamp(*LOG_VARIANCE_RANGE), torch.nan)
    return torch.cat([mean, cut], dim=1).to(torch.float16)


def _by_sample(views: list[np.ndarray]) -> list[Arrays]:
    names = ("moments.npy", "moments_flip.npy")[: len(views)]
    return [dict(zip(names, arrays, strict=True)) for arrays in zip(*views, strict=True)]


def make_deterministic() -> None:
    """Settings under which the same batch gives the same bits in every process of this machine."""
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
