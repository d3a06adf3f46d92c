"""From the bytes of an image file to the pixels that are encoded: decoding and cropping as ADM does both.

ADM (Dhariwal and Nichol, arXiv 2105.05233; image_datasets.py of its release) opens with Pillow, converts to RGB,
and crops a square from the centre. So an EXIF orientation is not applied, transparency is dropped, and an
animation gives its first frame. What ADM would turn into wrong pixels without a word (16-bit gray, which Pillow
clips at 255) is an error here. Which bytes belong to which sample is data_prep.sources'.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970  # Pillow's own limit, beyond which it takes a file for a decompression bomb
# Of Pillow's many formats: some of the others start programs (EPS), or hold no photographs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_DEEP_MODES = ("I", "F")  # what begins so (I;16, I;16B ...) Pillow's convert("RGB") clips at 255
# What Pillow's decoders raise on broken bytes. They read from memory: an OSError here is never the disk's.
_BROKEN = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_pillow_limit = threading.Lock()  # Image.MAX_IMAGE_PIXELS belongs to the whole process

# Pillow warns of large images, odd tags and dropped transparency: nothing that a million lines would mend.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImageError(ValueError):
    """What is wrong with an image, as the end of a sentence that begins with its name."""


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The bytes of an image file -> the whole image in mode RGB. No warning is printed.

    Raises BadImageError: not an image, cut short or broken, of more than `max_pixels`, or of more than 8 bits a
    pixel in one channel, which Pillow would clip.
    """
    if not data:
        raise BadImageError("is empty, a file of 0 bytes")
    try:
        with _open(data) as image:
            _check_size(image.width, image.height, max_pixels, "is")
            image.load()
            if image.mode.startswith(_DEEP_MODES):
                raise BadImageError(
                    f"has mode {image.mode}, more than 8 bits a pixel, which would be clipped at 255; "
                    "scale it to 8 bits"
                )
            return image.convert("RGB")
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError(f"is no image of a known format, it begins with {data[:8]!r}") from None
    except _BROKEN as error:
        raise BadImageError(f"is broken: {error or type(error).__name__}") from None


def center_crop_arr(
    image: Image.Image | np.ndarray, size: int, *, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """ADM's crop: an RGB image, or uint8 (H, W, 3) -> uint8 (size, size, 3).

    Halve with a box filter while the shorter side is at least twice `size`, then resize bicubically until it is
    `size`, then cut the square from the middle. Raises BadImageError for an image so narrow that it would be
    resized to more than `max_pixels`.
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    _check_size(width, height, max_pixels, f"is {image.width} x {image.height}, which for the crop becomes")
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


def decode_and_crop(data: bytes, size: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The bytes of an image file -> uint8 (3, size, size), decoded and cropped. Raises BadImageError."""
    pixels = center_crop_arr(decode_image(data, max_pixels=max_pixels), size, max_pixels=max_pixels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _open(data: bytes) -> Image.Image:
    """Read the header, without Pillow's own limit on pixels: the caller's comes right behind."""
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data), formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _check_size(width: int, height: int, max_pixels: int, verb: str) -> None:
    if not width * height:
        raise BadImageError(f"{verb} {width} x {height}, without a pixel")
    if width * height > max_pixels:
        raise BadImageError(
            f"{verb} {width} x {height}, {width * height} pixels, more than the {max_pixels} allowed"
        )
