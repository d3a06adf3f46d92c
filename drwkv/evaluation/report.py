"""The report of a sample set: report.json, grid.png and one self-contained page, report.html.

Here: what goes into the files. Not here: the numbers (protocol.py, metrics.py), the pictures (pictures.py).
The page needs nothing beside itself: images are embedded, the curve is inline SVG, there is no script.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from drwkv.evaluation.pictures import (
    curve_svg,
    grid_image,
    png_bytes,
    png_data_uri,
    save_grid,
    tile_row,
)
from drwkv.evaluation.protocol import Evaluation
from drwkv.files import write_whole

__all__ = ["ReportFiles", "save_grid", "write_report"]

STRIP_PIXELS = 24  # tiny images in the strip of a class are enlarged to about this
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd }
td.n { font-variant-numeric: tabular-nums }
img { image-rendering: pixelated; max-width: 100%; display: block }
small { color: #666 }
"""


@dataclass(frozen=True)
class ReportFiles:
    """Where the report lies."""

    json: Path
    html: Path
    grid: Path


def write_report(
    folder: str | PathLike[str],
    evaluation: Evaluation,
    *,
    losses: Sequence[tuple[int, float]],
    run: Mapping[str, Any],
    title: str = "Samples",
    columns: int = 10,
) -> ReportFiles:
    """Write report.json, report.html and grid.png into `folder`, each by rename, the JSON last.

    `run` says where the samples come from (checkpoint, weights, sampler, steps, guidance, seed, ...):
    JSON-able, kept in report.json as it is and shown on the page. `losses` are (step, loss); fewer than 2
    finite ones: no curve.
    """
    folder = Path(folder)
    record = as_record(evaluation, run, title)
    # Make all three before anything is written.
    content = json.dumps(record, indent=2, allow_nan=False, default=_plain) + "\n"
    page = render_page(evaluation, losses=losses, run=run, title=title, columns=columns)
    samples = evaluation.samples
    grid = png_bytes(grid_image(samples.images, samples.labels, columns=columns))
    return ReportFiles(
        grid=write_whole(folder / "grid.png", grid),
        html=write_whole(folder / "report.html", page.encode()),
        json=write_whole(folder / "report.json", content.encode()),
    )


def as_record(evaluation: Evaluation, run: Mapping[str, Any], title: str) -> dict[str, Any]:
    """The content of report.json."""
    copies = asdict(evaluation.copies)
    del copies["distances"], copies["nearest"]
    return {
        "title": title,
        "metrics": {name: asdict(metric) for name, metric in evaluation.metrics.items()},
        "per_class": {str(label): asdict(score) for label, score in evaluation.per_class.items()},
        "near_copies": {**copies, "ratio": evaluation.copies.ratio},
        "protocol": evaluation.protocol,
        "run": dict(run),
    }


def render_page(
    evaluation: Evaluation,
    *,
    losses: Sequence[tuple[int, float]],
    run: Mapping[str, Any],
    title: str,
    columns: int = 10,
) -> str:
    """The HTML page."""
    samples = evaluation.samples
    grid = grid_image(samples.images, samples.labels, columns=columns)
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p><img alt="samples, one class a row" src="{png_data_uri(grid)}"></p>',
        "<h2>Numbers</h2>",
        "<p>Each beside its floor: the number that real data scores in the samples' place.</p>",
        _metrics_table(evaluation),
        "<h2>Classes</h2>",
        _class_table(evaluation, columns),
        "<h2>Nearest training images</h2>",
        "<p>The samples that lie nearest to a training image (above), and that image (below).</p>",
        _nearest_pairs(evaluation, columns),
        *_loss_section(losses),
        "<h2>How it was made</h2>",
        _settings_table(run),
        "<h2>How it was measured</h2>",
        _settings_table(evaluation.protocol),
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join(sections)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _metrics_table(evaluation: Evaluation) -> str:
    rows = [["", "samples", "real data", "better", ""]]
    for name, metric in evaluation.metrics.items():
        rows.append(
            [
                name.replace("_", " "),
                *map(_number, (metric.value, metric.floor)),
                metric.better,
                metric.meaning,
            ]
        )
    return _table(rows, head=True)


def _class_table(evaluation: Evaluation, columns: int) -> str:
    samples = evaluation.samples
    scale = max(1, round(STRIP_PIXELS / max(samples.images.shape[1:3])))
    rows = ["<tr><th>class</th><th>samples</th><th>agreement</th><th>real data</th><th></th></tr>"]
    for label, score in evaluation.per_class.items():
        strip = tile_row(samples.images[samples.labels == label][: 2 * columns], scale=scale)
        image = f'<img alt="samples of class {label}" src="{png_data_uri(strip)}">'
        numbers = [str(label), str(score.count), _number(score.agreement), _number(score.floor)]
        cells = "".join(f'<td class="n">{number}</td>' for number in numbers)
        rows.append(f"<tr>{cells}<td>{image}</td></tr>")
    return "<table>" + "\n".join(rows) + "</table>"


def _nearest_pairs(evaluation: Evaluation, columns: int) -> str:
    copies = evaluation.copies
    closest = np.argsort(copies.distances, kind="stable")[:columns]
    pairs = [evaluation.samples.images[closest], evaluation.train.images[copies.nearest[closest]]]
    picture = grid_image(np.concatenate(pairs), None, columns=len(closest))
    distances = ", ".join(_number(float(d)) for d in copies.distances[closest])
    return (
        f'<p><img alt="samples and their nearest training images" src="{png_data_uri(picture)}"></p>'
        f"<p><small>RMS distances: {distances}; a near copy: up to {_number(copies.threshold)}.</small></p>"
    )


def _loss_section(losses: Sequence[tuple[int, float]]) -> list[str]:
    by_step = dict(losses)
    finite = sorted((step, loss) for step, loss in by_step.items() if np.isfinite(loss))
    left_out = f" ({len(by_step) - len(finite)} not finite, left out)" if len(finite) < len(by_step) else ""
    if len(finite) < 2:
        return ["<h2>Training loss</h2>", f"<p>No curve: {len(finite)} finite losses{left_out}.</p>"]
    caption = f"{len(finite)} steps{left_out}, the last at step {finite[-1][0]}; dark: running mean"
    return ["<h2>Training loss</h2>", curve_svg(finite), f"<p><small>{caption}</small></p>"]


def _settings_table(settings: Mapping[str, Any]) -> str:
    rows = [[str(key).replace("_", " "), _setting(value)] for key, value in settings.items()]
    return _table(rows, head=False)


def _table(rows: Sequence[Sequence[str]], *, head: bool) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [line(row, "th" if head and r == 0 else "td") for r, row in enumerate(rows)]
    return "<table>" + "\n".join(lines) + "</table>"


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=_plain)


def _number(value: float | None) -> str:
    return "none" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def _plain(value: Any) -> Any:
    """What json does not know: numpy's numbers, paths."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PathLike):
        return str(value)
    raise TypeError(f"report: a {type(value).__name__} cannot be written as JSON")
