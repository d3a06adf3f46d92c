"""Pictures for reports and logs: labelled grids of small images, and a curve as SVG.

Here: arrays and numbers to pixels and markup. Not here: the page around them (report.py).
Images are uint8 (N, H, W, C) with C = 1 or 3.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from drwkv.files import write_whole

TILE_PIXELS = 48  # tiny images are enlarged to about this
GAP_PIXELS = 2
CURVE_POINTS = 400  # longer curves are averaged down to so many


def tile_row(images: np.ndarray, *, scale: int | None = None) -> Image.Image:
    """Images side by side, enlarged `scale` times by repeating pixels (None: to about 48 pixels)."""
    return _grid([("", images)], columns=max(1, len(images)), scale=scale)


def grid_image(
    images: np.ndarray,
    labels: np.ndarray | None,
    *,
    columns: int = 10,
    scale: int | None = None,
    names: Sequence[str] | None = None,
) -> Image.Image:
    """A grid with one row a class, ascending: its label at the left, then its first `columns` images.

    `names[label]` is written if given, else the number. `labels` None: rows are filled in order, without
    text. `scale` enlarges by repeating pixels (None: tiles of about 48 pixels).
    """
    if images.ndim != 4 or images.shape[3] not in (1, 3) or images.dtype != np.uint8 or len(images) == 0:
        raise ValueError(
            f"grid of {images.dtype} {images.shape}: give 1 or more uint8 images (N, H, W, 1 or 3)"
        )
    if columns < 1 or (scale is not None and scale < 1):
        raise ValueError(f"grid with columns={columns}, scale={scale}: give 1 or more")
    if labels is None:
        columns = min(columns, len(images))
        return _grid([("", images[i : i + columns]) for i in range(0, len(images), columns)], columns, scale)
    if labels.shape != (len(images),):
        raise ValueError(
            f"grid of {len(images)} images with labels of shape {labels.shape}: give one an image"
        )
    classes = [int(c) for c in np.unique(labels)]
    rows = [(names[c] if names is not None else str(c), images[labels == c][:columns]) for c in classes]
    return _grid(rows, min(columns, max(len(row) for _, row in rows)), scale)


def save_grid(
    images: np.ndarray,
    labels: np.ndarray | None,
    path: str | os.PathLike[str],
    *,
    columns: int = 10,
    scale: int | None = None,
    names: Sequence[str] | None = None,
) -> Path:
    """Write `grid_image` as PNG to `path` (by rename, so never half), and return the path."""
    picture = grid_image(images, labels, columns=columns, scale=scale, names=names)
    return write_whole(Path(path), png_bytes(picture))


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def png_data_uri(picture: Image.Image) -> str:
    """The picture as a data URI for an `img` element."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode()


def _grid(rows: list[tuple[str, np.ndarray]], columns: int, scale: int | None) -> Image.Image:
    height, width, channels = rows[0][1].shape[1:]
    scale = scale or max(1, round(TILE_PIXELS / max(height, width)))
    tile_height, tile_width = height * scale, width * scale
    font = ImageFont.load_default(size=max(10, min(20, tile_height // 2)))
    margin = max(math.ceil(font.getlength(text)) for text, _ in rows)
    margin += 4 * GAP_PIXELS if margin else 0
    size = (
        margin + columns * (tile_width + GAP_PIXELS) + GAP_PIXELS,
        len(rows) * (tile_height + GAP_PIXELS) + GAP_PIXELS,
    )
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for r, (text, images) in enumerate(rows):
        top = GAP_PIXELS + r * (tile_height + GAP_PIXELS)
        if text:
            draw.text((margin / 2, top + tile_height / 2), text, fill="black", font=font, anchor="mm")
        for c, image in enumerate(images):
            tile = image.repeat(scale, axis=0).repeat(scale, axis=1).repeat(3 // channels, axis=2)
            picture.paste(Image.fromarray(tile), (margin + GAP_PIXELS + c * (tile_width + GAP_PIXELS), top))
    return picture


# The curve.


def curve_svg(points: Sequence[tuple[float, float]], *, width: int = 720, height: int = 260) -> str:
    """Points (step, value) as an SVG element: values light, their running mean dark, y logarithmic if > 0.

    Non-finite values are left out. Of several values of one step the last counts.
    """
    last = {float(x): float(y) for x, y in points}
    kept = sorted((x, y) for x, y in last.items() if math.isfinite(x) and math.isfinite(y))
    if len(kept) < 2:
        raise ValueError(f"curve of {len(kept)} finite points: give at least 2")
    x, y = np.array(kept).T
    smooth = _running_mean(y, max(1, len(y) // 25))
    x, y, smooth = (_averaged(a, CURVE_POINTS) for a in (x, y, smooth))
    log = bool((y > 0).all())
    left, top, right, bottom = 56, 10, width - 12, height - 30
    low, high = float(min(y.min(), smooth.min())), float(max(y.max(), smooth.max()))
    if high == low:
        low, high = (low / 2, high * 2) if log else (low - 1, high + 1)

    def place_x(value: np.ndarray) -> np.ndarray:
        return left + (value - x[0]) / (x[-1] - x[0]) * (right - left)

    def place_y(value: np.ndarray) -> np.ndarray:
        a, b, v = (np.log(low), np.log(high), np.log(value)) if log else (low, high, value)
        return bottom - (v - a) / (b - a) * (bottom - top)

    def line(values: np.ndarray, color: str, stroke: float) -> str:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(place_x(x), place_y(values), strict=True))
        return f'<polyline fill="none" stroke="{color}" stroke-width="{stroke}" points="{path}"/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">'
    ]
    for tick in _ticks(low, high, log):
        at = float(place_y(np.array(tick)))
        parts.append(f'<line x1="{left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')
        parts.append(
            f'<text x="{left - 6}" y="{at + 4:.1f}" font-size="11" text-anchor="end">{tick:g}</text>'
        )
    for tick in _ticks(float(x[0]), float(x[-1]), False):
        at = float(place_x(np.array(tick)))
        parts.append(
            f'<text x="{at:.1f}" y="{height - 12}" font-size="11" text-anchor="middle">{tick:,.10g}</text>'
        )
    return "".join([*parts, line(y, "#a9c4e4", 1), line(smooth, "#1f4e8c", 1.8), "</svg>"])


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each place (fewer at the start)."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (total[ends] - total[starts]) / (ends - starts)


def _averaged(values: np.ndarray, count: int) -> np.ndarray:
    if len(values) <= count:
        return values
    return np.array([part.mean() for part in np.array_split(values, count)])


def _ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers within [low, high]: 1, 2, 5 times powers of ten if logarithmic, else about five steps."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [m * 10.0**p for p in powers for m in (1, 2, 5)]
        ticks = [t for t in ticks if low <= t <= high]
        if len(ticks) >= 2:
            return ticks if len(ticks) <= 10 else ticks[:: math.ceil(len(ticks) / 10)]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
