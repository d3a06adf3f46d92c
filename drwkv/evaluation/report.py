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
    write_whole,
)
from drwkv.evaluation.protocol import Evaluation

__all__ = ["ReportFiles", "save_grid", "write_report"]

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color:
#222 } table { border-collapse: collapse; margin: .5rem 0 } th, td { padding: .2rem .8rem .2rem 0;
text-align: left } th { border-bottom: 1px solid #999 } td { border-bottom: 1px solid #eee } td.n {
font-variant-numeric: tabular-nums } img { image-rendering: pixelated; max-width: 100% } small { color: #666
} td img { display: block }
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
    """Write report.json, report.html and grid.png into `folder`, each by rename, report.json last.

    `run` says where the samples come from (checkpoint, weights, sampler, steps, guidance, seed, ...):
    JSON-able, kept in report.json as it is and shown on the page. `losses` are (step, loss); fewer than 2
    finite ones: no curve.
    """
    folder = Path(folder)
    record = as_record(evaluation, run, title)
    content = (
        json.dumps(record, indent=2, allow_nan=False, default=_plain) + "\n"
    )  # fails before anything is written
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
    return _table(rows)


def _class_table(evaluation: Evaluation, columns: int) -> str:
    samples = evaluation.samples
    rows = ["<tr><th>class</th><th>samples</th><th>agreement</th><th>real data</th><th></th></tr>"]
    for label, score in evaluation.per_class.items():
        strip = png_data_uri(
            tile_row(samples.images[samples.labels == label][: 2 * columns], scale=_strip_scale(samples))
        )
        cells = [str(label), str(score.count), _number(score.agreement), _number(score.floor)]
        image = f'<img alt="samples of class {label}" src="{strip}">'
        rows.append(
            "<tr>" + "".join(f'<td class="n">{cell}</td>' for cell in cells) + f"<td>{image}</td></tr>"
        )
    return "<table>" + "\n".join(rows) + "</table>"


def _nearest_pairs(evaluation: Evaluation, columns: int) -> str:
    copies = evaluation.copies
    closest = np.argsort(copies.distances, kind="stable")[:columns]
    pairs = [evaluation.samples.images[closest], evaluation.train.images[copies.nearest[closest]]]
    picture = grid_image(np.concatenate(pairs), None, columns=len(closest))
    distances = ", ".join(_number(float(d)) for d in copies.distances[closest])
    return (
        f'<p><img alt="samples and their nearest training images" src="{png_data_uri(picture)}"></p>'
        f"<p><small>RMS pixel distances: {distances}; a near copy: up to {_number(copies.threshold)}.</small></p>"
    )


def _loss_section(losses: Sequence[tuple[int, float]]) -> list[str]:
    finite = [(step, loss) for step, loss in losses if np.isfinite(loss)]
    left_out = f" ({len(losses) - len(finite)} not finite, left out)" if len(finite) < len(losses) else ""
    if len(finite) < 2:
        return ["<h2>Training loss</h2>", f"<p>No curve: {len(finite)} finite losses{left_out}.</p>"]
    caption = f"{len(finite)} steps{left_out}, the last at step {finite[-1][0]}; dark: running mean"
    return ["<h2>Training loss</h2>", curve_svg(finite), f"<p><small>{caption}</small></p>"]


def _settings_table(settings: Mapping[str, Any]) -> str:
    return _table(
        [["", ""], *([str(key).replace("_", " "), _setting(value)] for key, value in settings.items())]
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + "\n".join([line(rows[0], "th"), *(line(row, "td") for row in rows[1:])]) + "</table>"


def _setting(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=_plain)


def _number(value: float | None) -> str:
    return "none" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


def _strip_scale(samples: Any) -> int:
    return max(1, round(24 / max(samples.images.shape[1:3])))


def _plain(value: Any) -> Any:
    """What json does not know: numpy's numbers, paths."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, PathLike):
        return str(value)
    raise TypeError(f"report: a {type(value).__name__} cannot be written as JSON")
