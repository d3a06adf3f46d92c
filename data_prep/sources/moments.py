"""What numbers that others stored as latents are, and how they become moments: mean and log-variance.

A draw from the posterior cannot be told from moments by its values, only by its channels, and not always; what is
open the user says by StoredLatents. The files are npy.py's and safetensors.py's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.sources import BadSampleError
from data_prep.sources.layouts import Listing
from drwkv.latents import LOG_VARIANCE_RANGE


@dataclass(frozen=True)
class Numbers:
    """What the stored numbers are, and the shape of one sample's; StoredLatents made definite."""

    shape: tuple[int, int, int]  # (C, h, w) of samples, (2C, h, w) of moments
    sampled: bool
    scale: float
    shift: float

    def moments(self, stored: np.ndarray, name: str) -> np.ndarray:
        """float16 (2C, h, w). Raises BadSampleError naming the sample."""
        if stored.shape != self.shape:
            raise BadSampleError(
                f"{name}: has shape {stored.shape}, the first of its source has {self.shape}"
            )
        found = stored.astype(np.float32)
        if self.sampled:
            mean = found / self.scale + self.shift
            found = np.concatenate([mean, np.full_like(mean, LOG_VARIANCE_RANGE[0])])
        if not (np.abs(found) <= np.finfo(np.float16).max).all():
            raise BadSampleError(f"{name}: holds numbers that are not finite in float16")
        mean, log_variance = np.split(found, 2)
        # Training cuts the log-variance to this range anyway.
        return np.concatenate([mean, log_variance.clip(*LOG_VARIANCE_RANGE)]).astype(np.float16)


def definite(listing: Listing, shape: tuple[int, int, int], default_scale: float | None) -> Numbers:
    """What the user said and the shape says, together; ValueError where that leaves it open."""
    said = listing.latents
    form = {4: "sampled", 8: "moments"}.get(shape[0], "auto") if said.form == "auto" else said.form
    if form not in ("sampled", "moments"):
        raise ValueError(
            f"{listing.spec}: latents of {shape[0]} channels may be samples or moments (form {form!r}); "
            "say which, latents.form=sampled or latents.form=moments"
        )
    if form == "moments":
        if shape[0] % 2:
            raise ValueError(
                f"{listing.spec}: {shape[0]} channels cannot be moments, mean and log-variance; "
                "give latents.form=sampled"
            )
        if said.scale not in (None, 1.0) or said.shift:
            raise ValueError(
                f"{listing.spec}: moments are of unscaled latents; give no latents.scale and no latents.shift"
            )
        return Numbers(shape, sampled=False, scale=1.0, shift=0.0)
    scale = default_scale if said.scale is None else said.scale
    if scale is None:
        raise ValueError(
            f"{listing.spec}: samples of latents in .npy files were scaled by the one who made them; "
            "give that scale as latents.scale, latents.scale=0.18215 for DiT's and SiT's"
        )
    if not scale > 0:
        raise ValueError(f"{listing.spec}: latents.scale is {scale}, give more than 0")
    return Numbers(shape, sampled=True, scale=scale, shift=said.shift)
