"""The picture of the bench: time over T at a fixed number of tokens, forward and backward side by side.

Needs matplotlib, which comes with the extra `dev`. Tables are in `report.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from drwkv.kernels.bench.cases import ATTENTION, Plan
from drwkv.kernels.bench.measure import Direction, Result, Results

# Colours that differ in brightness as well (Okabe and Ito), and shapes for those who see none.
COLOURS = {"bi_wkv": "#0072B2", "bi_wkv_gated": "#56B4E9", "shift_mix_3": "#009E73", ATTENTION: "#D55E00"}
MARKERS = {"bi_wkv": "o", "bi_wkv_gated": "s", "shift_mix_3": "^", ATTENTION: "D"}
NAMES = {"shift_mix_3": "shift_mix, 3 mixes", ATTENTION: "attention"}

Series = dict[tuple[str, str], list[Result]]  # (operator, backend) -> results by rising T


def draw(results: Results, plan: Plan, device: torch.device, machine: str, file: Path) -> None:
    """Write the plan's series to an image file, whose ending tells its kind."""
    cases = plan.series(device)
    series: Series = {}
    for case in cases:
        if case in results:
            series.setdefault((case.operator, case.backend), []).append(results[case])

    figure = Figure(figsize=(10, 5), layout="constrained")
    figure.suptitle(
        f"{plan.tokens:,} tokens in all (B = {plan.tokens:,} / T), C = {plan.channels:,}, "
        f"{str(cases[0].dtype).removeprefix('torch.')}; {machine}",
        fontsize=11,
    )
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, ("forward", "backward"), strict=True):
        _draw_one(axes, series, name, plan.lengths)
    panels[0].set_ylabel("time (ms)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(file, dpi=130)


def _draw_one(axes: Axes, series: Series, name: str, lengths: tuple[int, ...]) -> None:
    copies: dict[int, float] = {}
    for (operator, backend), found in series.items():
        times = [_direction(result, name) for result in found]
        tokens = [result.case.shape[1] for result in found]
        axes.plot(
            tokens,
            [direction.ms for direction in times],
            color=COLOURS[operator],
            marker=MARKERS[operator],
            markersize=5,
            linewidth=1.8,
            linestyle="--" if backend == "torch" and (operator, "triton") in series else "-",
            label=f"{NAMES.get(operator, operator)} ({backend})",
        )
        if operator == "bi_wkv":
            copies = {T: direction.copy_ms for T, direction in zip(tokens, times, strict=True)}
    axes.plot(
        list(copies), list(copies.values()), color="0.45", linestyle=":", label="copy of bi_wkv's least bytes"
    )
    axes.set_title(name, fontsize=10)
    axes.set_xlabel("T (tokens of one sequence)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{T:,}" for T in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:,g}"))
    axes.grid(color="0.9", which="both", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _direction(result: Result, name: str) -> Direction:
    return result.forward if name == "forward" else result.backward
