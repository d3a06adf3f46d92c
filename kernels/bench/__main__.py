"""The command line of the bench; what it measures is told in `__init__.py`.

Prints one row a case and one PASS or FAIL line a requirement, and exits 1 when a requirement is not met.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from drwkv.kernels import resources
from drwkv.kernels.bench import cases, gates, report
from drwkv.kernels.bench.measure import measure_all


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 if a requirement is not met."""
    parser = argparse.ArgumentParser(
        prog="python -m drwkv.kernels.bench", description="Time the operators on this machine."
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: cpu)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--plot", type=Path, help="draw time over T into this image file")
    parser.add_argument(
        "--markdown", type=Path, help="put the results into this page, in place of this machine's"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes, to see that everything runs; no gates"
    )
    parser.add_argument(
        "--resources",
        action="store_true",
        help="time nothing: sum up what the Triton kernels take of each chip; needs no GPU",
    )
    options = parser.parse_args(arguments)
    if options.resources:
        return _resources(options.markdown)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return _operators(torch.device(options.device), options.tiny, options.plot, options.markdown)


def _operators(device: torch.device, tiny: bool, plot: Path | None, page: Path | None) -> int:
    plan = cases.TINY if tiny else cases.GPU if device.type == "cuda" else cases.CPU
    name = report.machine(device)
    print(f"{name}; {report.versions()}\n")
    results = measure_all(plan, device)
    found = gates.verdicts(results, device.type)
    table, verdicts = report.operators_table(results), "\n".join(map(str, found))
    print(f"{table}\n\n{verdicts}")

    picture = ""
    if plot is not None:
        from drwkv.kernels.bench.plot import draw

        draw(results, plan, device, name, plot)
        place = os.path.relpath(plot, page.parent) if page else plot
        picture = f"![time over T, forward and backward]({place})\n\n"
    if page is not None:
        report.write_section(
            page, f"Operators: {name}", f"{report.versions()}.\n\n{picture}{table}\n\n```\n{verdicts}\n```"
        )
    return gates.exit_code(found)


def _resources(page: Path | None) -> int:
    rows = resources.table(sorted(resources.OPERATORS), sorted(resources.CHIPS), instructions=False, jobs=2)
    num_faults = sum(bool(row.resources.fault(row.capability)) for row in rows)
    told = f"{len(rows)} compilations, {num_faults} of them with a fault; {report.versions()}."
    table = report.resources_table(rows)
    print(f"{table}\n\n{told}")
    if page is not None:
        report.write_section(page, "Registers and shared memory", f"{told}\n\n{table}")
    return 1 if num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
