"""Images of every kind that turns up, against a plain statement of ADM's rule; bad ones are named, in silence."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_trees import encoded, random_image
from PIL import Image

from data_prep.images import BadImageError, center_crop_arr, decode_and_crop, decode_image


def adm_crop(data: bytes, size: int) -> np.ndarray:
    """ADM's rule, step by step: open, load, RGB, halve by boxes, resize bicubically, cut."""
    image = Image.open(io.BytesIO(data))
    image.load()
    image = image.convert("RGB")
    while True:
        width, height = image.size
        if min(width, height) < 2 * size:
            break
        image = image.resize((width // 2, height // 2), resample=Image.BOX)
    ratio = size / min(width, height)
    array = np.array(image.resize((round(width * ratio), round(height * ratio)), resample=Image.BICUBIC))
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size].transpose(2, 0, 1)


def images() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    wide = random_image(rng, 211, 97)
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: to be turned by 90 degrees
    palette = wide.quantize(17)
    alpha = random_image(rng, 211, 97, "L")
    see_through = wide.copy()
    see_through.putalpha(alpha)
    frames = [random_image(rng, 70, 90) for _ in range(3)]
    deep_rgb = io.BytesIO()
    deep_rgb.write(b"P6 5 4 65535\n" + rng.integers(0, 256, 5 * 4 * 6).astype(np.uint8).tobytes())
    return {
        "jpeg": encoded(wide, quality=70),
        "progressive": encoded(wide, progressive=True),
        "gray": encoded(wide.convert("L")),
        "cmyk": encoded(wide.convert("CMYK")),
        "turned by EXIF": encoded(wide, exif=exif),
        "palette": encoded(palette, "PNG"),
        "palette with one clear colour": encoded(palette, "PNG", transparency=3),
        "palette with many clear colours": encoded(palette, "PNG", transparency=bytes(range(17))),
        "rgb with a clear colour": encoded(wide, "PNG", transparency=(1, 2, 3)),
        "gray with alpha": encoded(see_through.convert("LA"), "PNG"),
        "rgb with alpha": encoded(see_through, "PNG"),
        "one bit": encoded(alpha.convert("1"), "PNG"),
        "webp": encoded(wide, "WEBP", lossless=True),
        "bmp": encoded(wide, "BMP"),
        "tiff": encoded(wide, "TIFF"),
        "moving": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "sixteen bits a colour": deep_rgb.getvalue(),
        "one pixel wide": encoded(random_image(rng, 1, 40), "PNG"),
        "one pixel": encoded(random_image(rng, 1, 1), "PNG"),
        "tall": encoded(random_image(rng, 33, 400)),
    }


# pytest undoes the filter that data_prep.images sets; that it holds is proved in a process of its own below.
SILENT = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


@SILENT
@pytest.mark.parametrize("size", [8, 32, 33, 48, 64])
def test_every_kind_of_image_is_decoded_and_cropped_as_adm_does(size):
    for kind, data in images().items():
        found = decode_and_crop(data, size)
        assert found.dtype == np.uint8 and found.shape == (3, size, size) and found.flags.c_contiguous
        np.testing.assert_array_equal(found, adm_crop(data, size), err_msg=kind)


def test_the_crop_is_adms_at_every_size_around_a_halving():
    rng = np.random.default_rng(1)
    for width in (63, 64, 65, 127, 128, 129, 255, 256, 300):
        for height in (64, 127, 128, 257):
            data = encoded(random_image(rng, width, height), "PNG")
            np.testing.assert_array_equal(
                center_crop_arr(np.asarray(decode_image(data)), 32).transpose(2, 0, 1), adm_crop(data, 32)
            )


def test_an_exif_orientation_is_not_applied():
    image = random_image(np.random.default_rng(2), 60, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = decode_image(encoded(image, "PNG", exif=exif))
    assert decoded.size == (60, 20)
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image))


def test_a_moving_image_gives_its_first_frame():
    rng = np.random.default_rng(3)
    frames = [random_image(rng, 30, 30).quantize(64) for _ in range(3)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(np.asarray(decode_image(data)), np.asarray(frames[0].convert("RGB")))


def giant_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"0"))
        + chunk(b"IEND", b"")
    )


def bad_images() -> dict[str, tuple[bytes, str]]:
    image = random_image(np.random.default_rng(4), 90, 80)
    jpeg, png = encoded(image), encoded(image, "PNG")
    deep = Image.fromarray(np.arange(0, 60000, 10, dtype=np.uint16).reshape(60, 100))
    other_order = Image.frombytes("I;16B", (10, 10), bytes(200))
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    return {
        "empty": (b"", "is empty, a file of 0 bytes"),
        "not an image": (b"<html>404</html>", "is no image of a known format, it begins with b'<html>40'"),
        "PostScript, which starts a program": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "no image",
        ),
        "cut JPEG": (jpeg[: len(jpeg) // 2], "is broken: image file is truncated"),
        "cut PNG": (png[: len(png) // 2], "is broken: "),
        "damaged PNG": (bytes(flipped), "is broken: "),
        "header alone": (jpeg[:20], "is no image"),
        "16-bit PNG": (encoded(deep, "PNG"), "has mode I;16, more than 8 bits a pixel"),
        "16-bit TIFF": (encoded(deep, "TIFF"), "has mode I;16, more than 8 bits"),
        "16-bit TIFF of the other byte order": (
            encoded(other_order, "TIFF"),
            "has mode I;16B, more than 8 bits",
        ),
        "32-bit TIFF": (encoded(deep.convert("I"), "TIFF"), "has mode I, more than 8 bits"),
        "float TIFF": (encoded(deep.convert("F"), "TIFF"), "has mode F, more than 8 bits"),
        "over the limit": (
            giant_png(20_000, 10_000),
            "is 20000 x 10000, 200000000 pixels, more than the 178956970",
        ),
        "where Pillow warns": (giant_png(10_000, 10_000), "is broken: "),
    }


@pytest.mark.parametrize("kind", bad_images())
def test_a_bad_image_is_told_in_one_line_that_says_what_is_wrong(kind, recwarn):
    data, message = bad_images()[kind]
    with pytest.raises(BadImageError) as caught:
        decode_image(data)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not recwarn.list


def test_max_pixels_is_the_users_in_both_directions():
    data = encoded(random_image(np.random.default_rng(5), 30, 20))
    assert decode_image(data, max_pixels=600).size == (30, 20)
    with pytest.raises(BadImageError, match="is 30 x 20, 600 pixels, more than the 599 allowed"):
        decode_image(data, max_pixels=599)
    with pytest.raises(BadImageError, match="is broken"):  # past the limit: it is decoded, and ends too soon
        decode_image(giant_png(20_000, 10_000), max_pixels=1 << 30)


def test_a_sliver_that_the_crop_would_blow_up_is_refused():
    sliver = Image.new("RGB", (1, 20_000))
    with pytest.raises(BadImageError, match="is 1 x 20000, which for the crop becomes 512 x 10240000"):
        center_crop_arr(sliver, 512)


@SILENT
def test_no_bytes_make_the_decoder_raise_anything_else():
    rng = np.random.default_rng(6)
    samples = [*images().values()]
    for i in range(1500):
        data = bytearray(samples[i % len(samples)])
        for _ in range(1 + i % 4):
            data[rng.integers(min(len(data), 300))] = rng.integers(256)
        try:
            decode_image(
                bytes(data[: rng.integers(1, len(data) + 1)] if i % 3 == 0 else data), max_pixels=1 << 20
            )
        except BadImageError as error:
            assert str(error)


def test_decoding_prints_nothing(root: Path):
    code = (
        "from test_images import *\n"
        "for data in images().values(): decode_image(data)\n"
        "for data, _ in bad_images().values():\n"
        "    try: decode_image(data)\n"
        "    except BadImageError: pass\n"
    )
    paths = [str(root), str(root / "tests/support"), str(root / "tests/data_prep")]
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", f"import sys; sys.path[:0] = {paths}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
    )
    assert done.stdout == "" and "PIL" not in done.stderr and "Decompression" not in done.stderr, done.stderr
