"""What is this shard set? Prints its manifest in words, and draws it.

    python -m data_prep.show SET [--picture PNG [--vae VAE] [--seed N]]

SET is a folder or s3://bucket/prefix. Printed: samples, shards and sizes, what is stored and how it was made, classes,
what was left out, hashes. --picture draws class counts, the values of each channel and decoded samples on one page.
Only the index and a few hundred samples are read: whether the bytes are right is data_prep.verify's question.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.stored_set import StoredSet
from drwkv import command

SHOWN_NAMES = 5  # classes by name
SHOWN_SKIPPED = 10  # sources left out
DRAWN = ("samples", "shards", "size", "holds", "VAE", "classes")  # facts that head the picture


def facts(stored: StoredSet) -> Iterator[tuple[str, str]]:
    """(what, how much), in the order of interest; "" goes on with the one before."""
    m = stored.manifest
    sizes = np.array([entry.num_bytes for entry in stored.entries])
    counts = np.array([entry.num_samples for entry in stored.entries])
    shape = "x".join(map(str, m.sample_shape))
    yield "samples", f"{m.num_samples:,}, of {_bytes(sizes.sum() / m.num_samples)} each in the tars"
    yield "shards", f"{len(sizes):,} of {_spread(counts, _count, ' samples')}, {_spread(sizes, _bytes)}"
    yield "size", _bytes(float(sizes.sum()))
    yield "made by", "others, indexed by data_prep.index" if stored.manifest.is_foreign else "this program"
    yield (
        "holds",
        f"{m.kind} {shape} {m.dtype} ({', '.join(m.members)}), of images of {m.resolution} px, crop {m.crop}",
    )
    if m.kind == "moments":
        yield (
            "mirrored",
            "moments of the mirrored images are there" if m.has_flip else "not there: train without flips",
        )
        yield "VAE", f"{m.vae_id or 'not known'}, weights {_hash(m.vae_hash)}"
        yield "latents", f"(z - {m.shift:g}) * {m.scale:g}"
        if m.encode_dtype:
            where = "a GPU" if m.encode_threads is None else f"{m.encode_threads} CPU threads"
            yield "encoded", f"in {m.encode_dtype}, {m.encode_batch} images at once, on {where}"
    yield "classes", ", ".join(_classes(stored)) if m.num_classes else "none: unlabelled"
    yield "left out", f"{len(m.skipped):,} of the sources" if m.skipped else "nothing"
    for name, reason in list(m.skipped.items())[:SHOWN_SKIPPED]:
        yield "", f"{name}: {reason}"
    if len(m.skipped) > SHOWN_SKIPPED:
        yield "", f"and {len(m.skipped) - SHOWN_SKIPPED:,} more: see skipped in the manifest"
    yield "seed", f"{m.seed} (at most {m.samples_per_shard:,} samples a shard)"
    yield "checksums", "crc32c of each member" if m.checksums else "none"
    yield "hashes", f"index {_hash(m.index_hash)}, sources {_hash(m.source_hash)}"


def _classes(stored: StoredSet) -> Iterator[str]:
    m = stored.manifest
    counts = np.bincount(stored.labels, minlength=m.num_classes)
    names = m.class_names or list(map(str, range(m.num_classes)))
    least, most = int(counts.argmin()), int(counts.argmax())
    yield f"{m.num_classes:,}"
    if counts[least] == counts[most]:
        yield f"{counts[least]:,} samples each"
    else:
        yield f"from {counts[least]:,} samples ({names[least]}) to {counts[most]:,} ({names[most]})"
    if m.class_names:
        more = ", ..." if len(names) > SHOWN_NAMES else ""
        yield f"named {', '.join(names[:SHOWN_NAMES])}{more}"


def _spread(values: np.ndarray, text: Callable[[float], str], unit: str = "") -> str:
    """Least, median and most, or the one value that all have."""
    if values.min() == values.max():
        return f"{text(float(values[0]))}{unit}"
    least, middle, most = (text(float(value)) for value in (values.min(), np.median(values), values.max()))
    return f"{least} to {most}{unit} (median {middle})"


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _bytes(count: float) -> str:
    """1,536 -> 1.5 KiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} bytes" if unit == "bytes" else f"{count:,.1f} {unit}"


def _hash(value: str | None) -> str:
    return f"sha256 {value[:12]}..." if value else "of unknown hash"


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.show", description="say what a shard set is")
    parser.add_argument("set", help="folder or s3://bucket/prefix of a committed shard set")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="draw counts, values and samples")
    parser.add_argument("--vae", help="what decodes the samples (the manifest's)")
    parser.add_argument("--seed", type=int, default=0, help="which samples are drawn (0)")
    options = parser.parse_args(arguments)
    if options.picture:
        from data_prep.pictures import check_target, draw_overview  # torch, which the text does without

        check_target(options.picture)
    stored = StoredSet(options.set)
    known = list(facts(stored))
    print(stored.path, *(f"{what:<12}{how_much}" for what, how_much in known), sep="\n")
    if options.picture:
        print(
            draw_overview(
                stored,
                options.picture,
                [fact for fact in known if fact[0] in DRAWN],
                vae=options.vae,
                seed=options.seed,
            )
        )


if __name__ == "__main__":
    command.run(main)
