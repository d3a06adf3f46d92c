"""Pictures of a shard set: a contact sheet of decoded samples, class counts, histograms of what is stored.

Everything is drawn with Pillow. Grids for the reports of runs are drwkv.evaluation.pictures'.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from data_prep.stored_set import StoredSet, counted
from drwkv import rng
from drwkv.data.manifest import Manifest
from drwkv.evaluation.pictures import png_bytes
from drwkv.files import write_whole
from drwkv.latents import decode_latents, encode_pixels, hash_weights, load_vae

SHEET_SAMPLES, SHEET_COLUMNS = 64, 8
TILE_PIXELS = 140  # width that a sample is drawn at, or a little less
PAGE_PIXELS, MARGIN_PIXELS = 1200, 24
MAX_PANELS = 8  # channels that get a histogram
BINS = 61
VAE_BATCH = 8
_PICK_STEP = 2  # steps 0 and 1 of this purpose deal samples out to shards and splits
INK, PALE, BAR = "#222222", "#dddddd", "#4477aa"


def pick_samples(num_samples: int, count: int, seed: int) -> np.ndarray:
    """`count` different sample ids, or all where there are fewer, rising: a pure function of its arguments."""
    if num_samples <= 16 * count:
        keys = rng.bits(seed, rng.Purpose.SHARD_PLAN, torch.arange(num_samples), 1, step=_PICK_STEP)[:, 0]
        return np.sort(keys.argsort(stable=True)[:count].numpy())
    # Of so many few are drawn twice.
    tries = rng.integers(seed, rng.Purpose.SHARD_PLAN, torch.arange(2 * count), num_samples, step=_PICK_STEP)
    return np.sort(list(dict.fromkeys(tries.tolist()))[:count])


def decode_samples(stored: StoredSet, x_BCHW: np.ndarray, vae: str | None = None) -> np.ndarray:
    """Stored arrays as images (B, H, W, 1 or 3) uint8; of moments the mean is decoded, by `vae` or the manifest's.

    ValueError when there is no VAE, it cannot be loaded, or the channels are no colours.
    """
    manifest = stored.manifest
    if manifest.kind == "moments":
        x_BCHW = _decode_moments(manifest, x_BCHW, vae)
    if x_BCHW.shape[1] not in (1, 3):
        raise ValueError(f"{stored.path}: {x_BCHW.shape[1]} channels are no colours that can be drawn")
    return x_BCHW.transpose(0, 2, 3, 1)


def _decode_moments(manifest: Manifest, x_BCHW: np.ndarray, vae: str | None) -> np.ndarray:
    path = vae or manifest.vae_id
    if path is None:
        raise ValueError("the manifest names no VAE that could decode the samples: give --vae")
    loaded = load_vae(path)
    if manifest.vae_hash not in (None, hash_weights(loaded)):
        raise ValueError(
            f"VAE {path}: has not the weights that made this set, whose sha256 the manifest holds"
        )
    assert manifest.scale is not None and manifest.shift is not None
    mean = torch.from_numpy(x_BCHW[:, : manifest.channels].astype(np.float32))
    latents = (mean - manifest.shift) * manifest.scale
    images = [
        encode_pixels(decode_latents(loaded, some, scale=manifest.scale, shift=manifest.shift))
        for some in latents.split(VAE_BATCH)
    ]
    return torch.cat(images).numpy()


def contact_sheet(
    images_BHWC: np.ndarray, captions: Sequence[str], *, columns: int = SHEET_COLUMNS
) -> Image.Image:
    """Images (B, H, W, 1 or 3) uint8 in rows, each with its caption below, cut to the tile's width."""
    height, width, channels = images_BHWC.shape[1:]
    # Small images are enlarged by whole factors, so that their pixels can be seen.
    factor = TILE_PIXELS // width if width <= TILE_PIXELS else TILE_PIXELS / width
    tile_width, tile_height = round(width * factor), round(height * factor)
    method = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    font, gap = ImageFont.load_default(size=11), 4
    line = 16
    rows = -(-len(images_BHWC) // columns)
    columns = min(columns, len(images_BHWC))
    size = (columns * (tile_width + gap) - gap, rows * (tile_height + line + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images_BHWC, captions, strict=True)):
        left, top = i % columns * (tile_width + gap), i // columns * (tile_height + line + gap)
        tile = Image.fromarray(image.repeat(3 // channels, axis=2)).resize((tile_width, tile_height), method)
        sheet.paste(tile, (left, top))
        draw.text(
            (left + tile_width / 2, top + tile_height + 2), _fit(caption, font, tile_width), INK, font, "ma"
        )
    return sheet


def check_target(file: Path) -> None:
    """ValueError, before any work, when no picture can be written as `file`."""
    if file.is_dir():
        raise ValueError(f"{file}: is a folder, give the name of a file in it, such as {file / 'set.png'}")
    if not file.parent.is_dir():
        raise ValueError(f"{file}: there is no folder {file.parent}; make it, or give another file")


def draw_sheet(
    stored: StoredSet, file: str | os.PathLike[str], *, vae: str | None = None, seed: int = 0
) -> str:
    """Draw random samples as the PNG `file`; returns a line that says so, ValueError why there is none."""
    ids = pick_samples(stored.manifest.num_samples, SHEET_SAMPLES, seed)
    x_BCHW = stored.read(ids)
    try:
        images = decode_samples(stored, x_BCHW, vae)
    except ValueError as error:
        raise ValueError(f"{file}: no contact sheet: {error}") from None
    write_whole(Path(file), png_bytes(contact_sheet(images, captions(stored, ids))))
    return f"{file}: {counted(len(ids), 'sample')}"


def captions(stored: StoredSet, ids: np.ndarray) -> list[str]:
    """The class of each sample by name, or its number; sample ids where there are no classes."""
    manifest = stored.manifest
    if not manifest.num_classes:
        return [str(i) for i in ids.tolist()]
    labels = stored.labels[ids].tolist()
    return [manifest.class_names[label] if manifest.class_names else str(label) for label in labels]


def draw_overview(
    stored: StoredSet,
    file: str | os.PathLike[str],
    facts: Sequence[tuple[str, str]],
    *,
    vae: str | None = None,
    seed: int = 0,
    num_values: int = 256,
) -> str:
    """One PNG: `facts` in words, class counts, values of each channel in `num_values` samples, a contact sheet.

    Returns a line that says so; ValueError where the samples cannot be decoded and all else was drawn.
    """
    manifest = stored.manifest
    ids = pick_samples(manifest.num_samples, num_values, seed)
    x_BCHW = stored.read(ids)
    panels = [_facts(stored.path, facts)]
    if manifest.num_classes:
        counts = np.bincount(stored.labels, minlength=manifest.num_classes)
        panels += [_heading("samples of each class"), _class_counts(counts, manifest.class_names)]
    panels += [_heading(f"values of {len(ids)} random samples, by channel"), *_channel_rows(manifest, x_BCHW)]
    shown = pick_samples(len(ids), SHEET_SAMPLES, seed)
    problem = ""
    try:
        images = decode_samples(stored, x_BCHW[shown], vae)
        panels += [_heading("random samples"), contact_sheet(images, captions(stored, ids[shown]))]
    except ValueError as error:
        problem = str(error)
    write_whole(Path(file), png_bytes(_stack(panels)))
    if problem:
        raise ValueError(f"{file}: drawn without samples: {problem}")
    return f"{file}: drawn"


def _channel_rows(manifest: Manifest, x_BCHW: np.ndarray) -> list[Image.Image]:
    """A row of histograms for pixels, two for moments: means in the model's units, and log-variances."""
    shown = min(manifest.channels, MAX_PANELS)
    if manifest.kind == "pixels":
        values = [(f"channel {c}", x_BCHW[:, c]) for c in range(shown)]
        return [_histograms(values, columns=4)]
    assert manifest.scale is not None and manifest.shift is not None
    mean, log_variance = np.split(x_BCHW.astype(np.float32), 2, axis=1)
    mean = (mean - manifest.shift) * manifest.scale
    return [
        _histograms([(f"mean {c}, model's units", mean[:, c]) for c in range(shown)], columns=4),
        _histograms([(f"log-variance {c}", log_variance[:, c]) for c in range(shown)], columns=4),
    ]


def _histograms(values: Sequence[tuple[str, np.ndarray]], *, columns: int) -> Image.Image:
    """Small histograms side by side, each with its title, mean and standard deviation, and the ends of its axis."""
    gap, height = 20, 150
    width = (PAGE_PIXELS - 2 * MARGIN_PIXELS - (columns - 1) * gap) // columns
    rows = -(-len(values) // columns)
    picture = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for i, (title, array) in enumerate(values):
        left, top = i % columns * (width + gap), i // columns * (height + gap)
        x = array.astype(np.float64).ravel()
        draw.text((left, top), title, INK, font)
        draw.text((left + width, top), f"{x.mean():.3g} ± {x.std():.3g}", INK, font, "ra")
        low, high = np.quantile(x, (0.0005, 0.9995))
        low, high = (low, high) if low < high else (low - 0.5, high + 0.5)
        counts, _ = np.histogram(x.clip(low, high), BINS, (low, high))
        bottom = top + height - 20
        _bars(draw, counts, (left, top + 20, left + width, bottom))
        for share, anchor in ((0.0, "la"), (0.5, "ma"), (1.0, "ra")):
            text = f"{low + share * (high - low):.3g}"
            draw.text((left + share * width, bottom + 4), text, INK, font, anchor)
    return picture


def _class_counts(counts: np.ndarray, names: Sequence[str]) -> Image.Image:
    """Bars over the classes in the order of labels; few classes have their names below."""
    width, height, left = PAGE_PIXELS - 2 * MARGIN_PIXELS, 190, 60
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    box = (left, 10, width, height - 24)
    # More classes than pixels: neighbours are averaged.
    bars = np.array([part.mean() for part in np.array_split(counts, min(len(counts), width - left))])
    for share in (0.5, 1.0):
        y = box[3] - share * (box[3] - box[1])
        draw.line((left, y, width, y), PALE)
        draw.text((left - 8, y), f"{share * bars.max():,.4g}", INK, font, "rm")
    draw.text((left - 8, box[3]), "0", INK, font, "rm")
    _bars(draw, bars, box)
    step = (width - left) / len(counts)
    shown = range(len(counts))
    texts = [names[label] if names else str(label) for label in shown]
    if max(font.getlength(text) for text in texts) + 6 > step:
        # No room for a name under each: some labels' numbers instead.
        every = next(n for k in range(9) for n in (10**k, 2 * 10**k, 5 * 10**k) if n * step >= 60)
        shown, texts = range(0, len(counts), every), [f"{label:,}" for label in range(0, len(counts), every)]
    for label, text in zip(shown, texts, strict=True):
        x = left + (label + 0.5) * step
        anchor = "ma" if x + font.getlength(text) / 2 < width else "ra"
        draw.text((x if anchor == "ma" else width, box[3] + 6), text, INK, font, anchor)
    return picture


def _bars(draw: ImageDraw.ImageDraw, counts: np.ndarray, box: tuple[float, float, float, float]) -> None:
    """Bars from the bottom of a box (left, top, right, bottom), the highest as high as it."""
    left, top, right, bottom = box
    step, most = (right - left) / len(counts), max(float(counts.max()), 1e-9)
    gap = 1 if step >= 4 else 0
    for i, count in enumerate(counts.tolist()):
        if count > 0:
            x0, x1 = round(left + i * step), round(left + (i + 1) * step) - 1 - gap
            draw.rectangle((x0, bottom - max(1, count / most * (bottom - top)), max(x0, x1), bottom), BAR)
    draw.line((left, bottom, right, bottom), INK)


def _heading(text: str) -> Image.Image:
    picture = Image.new("RGB", (PAGE_PIXELS - 2 * MARGIN_PIXELS, 30), "white")
    ImageDraw.Draw(picture).text((0, 28), text, INK, ImageFont.load_default(size=17), "ld")
    return picture


def _facts(title: str, facts: Sequence[tuple[str, str]]) -> Image.Image:
    width, line, column = PAGE_PIXELS - 2 * MARGIN_PIXELS, 22, 100
    large, small = ImageFont.load_default(size=20), ImageFont.load_default(size=14)
    picture = Image.new("RGB", (width, 34 + line * len(facts)), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((0, 0), _fit(title, large, width), INK, large)
    for i, (what, how_much) in enumerate(facts):
        draw.text((0, 34 + line * i), what, "#777777", small)
        draw.text((column, 34 + line * i), _fit(how_much, small, width - column), INK, small)
    return picture


def _stack(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels under each other on one page."""
    gap = 12
    height = 2 * MARGIN_PIXELS + sum(panel.height + gap for panel in panels) - gap
    width = max(PAGE_PIXELS, 2 * MARGIN_PIXELS + max(panel.width for panel in panels))
    page = Image.new("RGB", (width, height), "white")
    top = MARGIN_PIXELS
    for panel in panels:
        page.paste(panel, (MARGIN_PIXELS, top))
        top += panel.height + gap
    return page


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, or as much of its beginning as fits."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
