"""Where samples come from: one interface over the layouts in which images, and latents of others, are kept.

    source = open_source("imagenet")           # a folder, a file of it, or s3://bucket/prefix
    pixels = source.items[0].load()            # uint8 (H, W, 3), whole
    source.names[0], source.labels[0], source.class_names

Opening lists files and reads headers and labels, in one canonical order that depends on names alone; samples are
read by their items, one at a time, in whatever process they were sent to. One module a family of layouts; which
of them a path holds is layouts.py's. Decoding and cropping are data_prep.images'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.images import MAX_PIXELS


class BadSampleError(ValueError):
    """One sample is not what its source should hold; the line names it. What to do then is a policy's."""


@dataclass(frozen=True)
class Item:
    """Where one sample's bytes lie: small, picklable, and read by itself in any process.

    OSError, FileNotFoundError among them, is the storage's trouble and not the sample's: it passes through.
    """

    name: str  # the source's own name of the sample, the same wherever the source lies

    def load(self, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """The image, before any crop: uint8 (H, W, 3). Raises BadSampleError."""
        raise TypeError(f"{self.name} holds latents, not an image")

    def load_latents(self, *, flip: bool = False) -> np.ndarray:
        """The moments as shard sets store them, of the mirrored image if `flip`: float16 (2C, h, w).

        Raises BadSampleError; `flip` is for sources with `has_flip`.
        """
        raise TypeError(f"{self.name} holds an image, not latents")


@dataclass(frozen=True)
class Source:
    """All samples of one place, in canonical order; a million of them take some 100 MB."""

    items: Sequence[Item]  # made when asked for
    names: Sequence[str]  # of the items, in the same order
    labels: np.ndarray  # (M,) int64; all 0 where unlabelled
    class_names: list[str]  # in label order; [] for unlabelled
    kind: str = "images"  # "images", or "moments" for latents that others made
    # Whether there are latents of the mirrored images too; images are mirrored at will
    has_flip: bool = False


@dataclass(frozen=True)
class StoredLatents:
    """What the numbers in a source of latents are; what files do not say, the user must.

    "sampled": z = (x - shift) scale, where x was drawn once from the posterior. It is repacked as moments with mean
    x and the least log-variance, -30, so that training draws x again and again; the posterior is lost.
    "moments": mean and log-variance of x itself, stacked.
    """

    form: str = "auto"  # "sampled", "moments", or "auto": 4 channels are samples and 8 are moments of 4
    # What the samples were multiplied by; None: 1 for LightningDiT, who stores x; must be given for DiT and SiT
    scale: float | None = None
    shift: float = 0.0  # of samples


def open_source(spec: str, *, format: str = "auto", latents: StoredLatents | None = None) -> Source:
    """Open a folder, one file, or s3://bucket/prefix, with #train, #val or #test behind it to pick a split.

    `format` is one of layouts.FORMATS, or "auto" to tell by the files' names. Raises ValueError in one line:
    nothing there, more than one layout or split, a broken container, a missing label.
    """
    from data_prep.sources.layouts import open_layout  # its modules build on this one

    return open_layout(spec, format, latents or StoredLatents())
