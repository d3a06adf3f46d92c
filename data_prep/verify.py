"""Is a shard set what it says? Reads every byte of it and compares with index and manifest.

    python -m data_prep.verify SET [--jobs N] [--max-latent X] [--sheet PNG [--vae VAE] [--seed N]]

SET is a folder or s3://bucket/prefix, of which each tar is streamed once. Checked: manifest and index hashes, sizes,
each tar's members, labels and checksums against the index, label range, npy headers, that values are finite and in the
range of latents, the source list. Prints a summary, and mean and standard deviation of each channel; --sheet draws
random samples, decoded. All broken samples are found: the first 20 are told in full, the rest counted, and the exit
code is 2. One shard's check is shard_check.py's.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import operator
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_prep.shard_check import KEPT_PROBLEMS, Limits, ShardJob, ShardReport, check_shard
from data_prep.stored_set import StoredSet, counted
from drwkv import command
from drwkv.data import manifest as layout

MAX_LATENT = 50.0  # in the model's units, where latents have a standard deviation of about 1


class BrokenSetError(ValueError):
    """A set that is not what it says; `problems` holds the first of all that was found, one line each."""

    def __init__(self, message: str, problems: list[str]) -> None:
        super().__init__(message)
        self.problems = problems


def verify(path: str, *, jobs: int = 1, max_latent: float = MAX_LATENT) -> str:
    """A summary of the set at `path`, its first line all that most want to know.

    jobs: processes that read shards. max_latent: the largest |latent| that is allowed, in the model's units.
    Raises BrokenSetError naming shard and sample when the set is not sound.
    """
    from drwkv.latents import LOG_VARIANCE_RANGE  # torch, which the processes that read shards do without

    stored = StoredSet(path)
    limits = Limits(max_latent, LOG_VARIANCE_RANGE)
    sources, source_problems = _read_sources(stored)
    report = _sum(list(_reports(stored, sources, jobs, limits)))
    problems = [*report.problems, *source_problems][:KEPT_PROBLEMS]
    if num_problems := report.num_problems + len(source_problems):
        more = f", and {num_problems - 1} more" if num_problems > 1 else ""
        remedy = stored.remedy if report.num_problems else "restore that file, or write the set again"
        raise BrokenSetError(f"{problems[0]}{more}; {remedy}", problems)
    return "\n".join(
        [_first_line(stored, report), *_notes(stored, report, limits), *_channel_lines(stored, report)]
    )


def _reports(stored: StoredSet, sources: list[str], jobs: int, limits: Limits) -> Iterator[ShardReport]:
    """What was found in each shard, in their order."""
    shards = range(len(stored.entries))
    todo = (_job(stored, shard, sources, limits) for shard in shards)
    bar = functools.partial(tqdm, total=len(shards), unit="shard", disable=None)
    if min(jobs, len(shards)) == 1:
        yield from bar(map(check_shard, todo))
        return
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(min(jobs, len(shards)), context) as pool:
        yield from bar(pool.map(check_shard, todo))


def _job(stored: StoredSet, shard: int, sources: list[str], limits: Limits) -> ShardJob:
    entry, rows, first = stored.entries[shard], stored.rows_of(shard), int(stored.first_rows[shard])
    top = max(stored.manifest.num_classes - 1, 0)
    wrong = np.flatnonzero((rows["label"] < 0) | (rows["label"] > top))
    if wrong.size:
        raise ValueError(
            f"{stored.storage.where(layout.ROWS_NAME)}: sample {first + wrong[0]} has label "
            f"{rows['label'][wrong[0]]}, but the manifest allows 0..{top}"
        )
    keys = None
    if stored.manifest.is_foreign and sources:
        keys = [name.removeprefix(f"{entry.name}/") for name in sources[first : first + len(rows)]]
    return ShardJob(
        path=stored.path,
        manifest=stored.manifest,
        entry=entry,
        shard=shard,
        first_row=first,
        rows=rows,
        keys=keys,
        limits=limits,
    )


def _sum(reports: list[ShardReport]) -> ShardReport:
    return ShardReport(
        stored=functools.reduce(operator.add, (report.stored for report in reports)),
        std=functools.reduce(operator.add, (report.std for report in reports)),
        num_read=sum(report.num_read for report in reports),
        num_cut=sum(report.num_cut for report in reports),
        num_problems=sum(report.num_problems for report in reports),
        problems=[problem for report in reports for problem in report.problems],
    )


def _read_sources(stored: StoredSet) -> tuple[list[str], list[str]]:
    """The source of each sample, and what is wrong with the list."""
    where = stored.storage.where(layout.SOURCES_NAME)
    try:
        text = stored.storage.read(layout.SOURCES_NAME)
    except FileNotFoundError:
        text = b""
    if layout.sha256(text) != json.loads(stored.shard_list)["sources_sha256"]:
        return [], [f"{where}: missing, or not of the hash that {layout.SHARD_LIST_NAME} gives"]
    sources = text.decode().split("\n")[:-1]
    if len(sources) != stored.manifest.num_samples:
        return [], [f"{where}: {len(sources)} sources for {stored.manifest.num_samples} samples"]
    return sources, []


def _first_line(stored: StoredSet, report: ShardReport) -> str:
    m = stored.manifest
    counts = np.bincount(stored.labels, minlength=max(m.num_classes, 1))
    shape = "x".join(map(str, m.sample_shape))
    spread = f"{counts.min()} to {counts.max()} each" if m.num_classes else "unlabelled"
    mean = report.stored.mean.mean()
    std = max(report.stored.mean_square.mean() - mean**2, 0.0) ** 0.5
    return (
        f"{stored.path}: sound: {counted(m.num_samples, 'sample')} in {counted(len(stored.entries), 'shard')}, "
        f"{m.kind} {shape} {m.dtype}, {counted(m.num_classes, 'class', 'classes')}, {spread}, "
        f"mean {mean:.4g}, std {std:.4g}, index {m.index_hash[:12]}"
    )


def _notes(stored: StoredSet, report: ShardReport, limits: Limits) -> list[str]:
    notes = []
    if not stored.manifest.checksums:
        notes.append(
            "  the index has no checksums: damage that leaves values finite and in range is not seen"
        )
    if report.num_cut:
        low, high = limits.log_variance
        notes.append(
            f"  {report.num_cut} log-variances lie outside [{low:g}, {high:g}]: training cuts them to it"
        )
    return notes


def _channel_lines(stored: StoredSet, report: ShardReport) -> list[str]:
    """A table with a line a channel."""
    m = stored.manifest
    if m.kind == "pixels":
        values = zip(report.stored.mean, report.stored.std, strict=True)
        return [
            "  channel      mean       std",
            *(f"  {c:7d} {a:9.4g} {b:9.4g}" for c, (a, b) in enumerate(values)),
        ]
    assert m.scale is not None and m.shift is not None
    lines = [
        "                 as stored                       in the model's units",
        "  channel    mean of  std of   posterior std     mean of  std of  std of a",
        "              means    means    mean     std      means    means   drawn z",
    ]
    for c in range(m.channels):
        mean, std = report.stored.mean[c], report.stored.std[c]
        # The variance of z = mean + std eps is that of the means and, on average, the posterior's.
        drawn = (std**2 + report.std.mean_square[c]) ** 0.5 * m.scale
        numbers = (
            mean,
            std,
            report.std.mean[c],
            report.std.std[c],
            (mean - m.shift) * m.scale,
            std * m.scale,
            drawn,
        )
        lines.append(f"  {c:7d} " + " ".join(f"{number:8.3g}" for number in numbers))
    return lines


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.verify", description="check every byte of a shard set"
    )
    parser.add_argument("set", help="folder or s3://bucket/prefix of a committed shard set")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (one a core)"
    )
    parser.add_argument(
        "--max-latent", type=float, default=MAX_LATENT, help=f"largest |latent| ({MAX_LATENT:g})"
    )
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw random samples, decoded")
    parser.add_argument("--vae", help="what decodes them (the manifest's)")
    parser.add_argument("--seed", type=int, default=0, help="which samples are drawn (0)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        raise ValueError(f"--jobs is {options.jobs}: give 1 or more")
    if options.sheet:
        from data_prep.pictures import check_target, draw_sheet

        check_target(options.sheet)
    try:
        print(verify(options.set, jobs=options.jobs, max_latent=options.max_latent))
    except BrokenSetError as error:
        if len(error.problems) > 1:
            print(*error.problems, sep="\n", file=sys.stderr)
        raise
    if options.sheet:
        print(draw_sheet(StoredSet(options.set), options.sheet, vae=options.vae, seed=options.seed))


if __name__ == "__main__":
    command.run(main)
