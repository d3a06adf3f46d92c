"""What the bench prints and writes: tables, the machine's name, and sections of BENCHMARKS.md.

The picture is in `plot.py`.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from drwkv.kernels.bench.cases import ATTENTION
from drwkv.kernels.bench.measure import Result, Results
from drwkv.kernels.resources import Row

HEAD = (
    "operator",
    "backend",
    "B",
    "T",
    "C",
    "dtype",
    "ms",
    "GB/s",
    "of a copy",
    "torch's time",
    "SDPA's time",
)


def machine(device: torch.device) -> str:
    """The name under which this machine's results stand: the GPU's, or the CPU's with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu_info = Path("/proc/cpuinfo")
    found = re.search(
        r"^model name\s*: (.+)$", cpu_info.read_text() if cpu_info.exists() else "", re.MULTILINE
    )
    return f"{found[1].strip() if found else 'unknown CPU'}, {len(os.sched_getaffinity(0))} cores"


def versions() -> str:
    """What the results depend on beside the machine."""
    words = [f"torch {torch.__version__}"]
    if importlib.util.find_spec("triton") is not None:
        from triton import __version__ as triton_version

        words.append(f"triton {triton_version}")
    return ", ".join([*words, f"CPU threads: {torch.get_num_threads()}"])


def operators_table(results: Results) -> str:
    """A row a case; cells with a slash are forward / backward."""
    return markdown_table(HEAD, [_cells(result, results) for result in results.values()], num_words=2)


def _cells(result: Result, results: Results) -> list[str]:
    case = result.case
    pairs = [f"{_short(result.forward.ms)} / {_short(result.backward.ms)}"]
    if case.operator == ATTENTION or case.backend.startswith("loop"):
        pairs += ["", ""]  # bytes are not what they are made of
    else:
        pairs += [
            f"{result.forward.gb_per_s:.1f} / {result.backward.gb_per_s:.1f}",
            f"{result.forward.of_copy:.0%} / {result.backward.of_copy:.0%}",
        ]
    for other in (replace(case, backend="torch"), replace(case, operator=ATTENTION, backend="sdpa")):
        yardstick = results.get(other)
        pairs.append(_ratios(yardstick, result) if yardstick and other != case else "")
    return [
        case.operator, case.backend, *map(str, case.shape), str(case.dtype).removeprefix("torch."), *pairs
    ]  # fmt: skip


def _ratios(yardstick: Result, result: Result) -> str:
    forward, backward = (
        yardstick.forward.ms / result.forward.ms,
        yardstick.backward.ms / result.backward.ms,
    )
    return f"{_short(forward)} x / {_short(backward)} x"


def _short(x: float) -> str:
    """Two or three digits, never in powers of ten."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def resources_table(rows: Sequence[Row]) -> str:
    """The rows of `drwkv.kernels.resources` by kernel and chip: the range of what its compilations take."""
    families: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        families.setdefault((row.operator, row.name.split()[0], row.capability), []).append(row)
    cells = []
    for (operator, kernel, capability), found in families.items():
        taken = [row.resources for row in found]
        cells.append(
            [operator, kernel, f"sm_{capability}", str(len(found)), _range(x.registers for x in taken),
             _range(x.spill_stores + x.spill_loads for x in taken), _range(x.shared_bytes for x in taken),
             _range(x.warps for x in taken)]
        )  # fmt: skip
    head = (
        "operator",
        "kernel",
        "chip",
        "compilations",
        "registers",
        "spills B",
        "shared B",
        "resident warps",
    )
    return markdown_table(head, cells, num_words=3)


def _range(values: Iterable[int]) -> str:
    least, *_, most = sorted([*values] * 2)
    return str(least) if least == most else f"{least} to {most}"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], num_words: int = 1) -> str:
    """A table that reads the same in a terminal and on a page: the first `num_words` columns to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        padded[:num_words] = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)][
            :num_words
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < num_words else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join(map(line, (head, rule, *rows)))


def write_section(file: Path, heading: str, body: str) -> None:
    """Put `body` under `## heading` in place of what stood there; other sections stay as they are."""
    text = file.read_text() if file.exists() else "# Benchmarks\n"
    file.write_text(replaced(text, heading, body))


def replaced(text: str, heading: str, body: str) -> str:
    """The page with that section new: where it was, or at the end."""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    section = f"## {heading}\n{body.strip()}\n"
    place = next(
        (i for i, part in enumerate(parts) if part.partition("\n")[0] == f"## {heading}"), len(parts)
    )
    parts[place : place + 1] = [section]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)
