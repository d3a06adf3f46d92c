"""LightningDiT's shards of latents: *.safetensors with latents, latents_flip (N, C, h, w) and labels (N,).

Its script draws once from the posterior of the image and of its mirror; nothing is scaled or normalised, for the
trainer does that. Rows are read by ranges of bytes, so a shard is never whole in memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.sources import BadSampleError, Item, Source
from data_prep.sources.labels import numbered
from data_prep.sources.layouts import Listing
from data_prep.sources.lazy import Lazy, packed
from data_prep.sources.moments import Numbers, definite
from data_prep.unvouched import open_unvouched

# safetensors' name -> numpy's; bfloat16, which numpy lacks, as its bits
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}


@dataclass(frozen=True)
class SafetensorsLatents(Item):
    """One row of the tensors of a shard."""

    root: str  # path of the storage
    file: str  # name in it
    dtype: str  # safetensors' name of it
    offsets: tuple[int, ...]  # first byte of the row in latents, and in latents_flip if there are
    numbers: Numbers

    def load_latents(self, *, flip: bool = False) -> np.ndarray:
        size = int(np.prod(self.numbers.shape)) * np.dtype(_DTYPES[self.dtype]).itemsize
        data = open_unvouched(self.root).read_range(self.file, self.offsets[int(flip)], size)
        if len(data) != size:
            raise BadSampleError(f"{self.name}: is cut short: {len(data)} bytes, expected {size}")
        return self.numbers.moments(_array(data, self.dtype).reshape(self.numbers.shape), self.name)


def open_safetensors(listing: Listing) -> Source:
    """Shards of latents, in the order of their names; with labels and mirrored latents if all have them."""
    shards = listing.of_split([name for name in listing.names if name.endswith(".safetensors")])
    if not shards:
        raise ValueError(f"{listing.spec}: holds no safetensors files")
    headers = [_safetensors_header(listing, shard) for shard in shards]
    keys = sorted(headers[0])
    for shard, header in zip(shards, headers, strict=True):
        if sorted(header) != keys or "latents" not in header:
            where = listing.storage.where(shard)
            raise ValueError(
                f"{where}: holds {_few(sorted(header))}, expected {_few(keys) if 'latents' in keys else 'latents'}"
            )
    arrays = [key for key in ("latents", "latents_flip") if key in keys]
    first = headers[0]["latents"]["shape"]
    if len(first) != 4:
        raise ValueError(
            f"{listing.storage.where(shards[0])}: latents have shape {first}, expected (N, C, h, w)"
        )
    numbers = definite(listing, (first[1], first[2], first[3]), default_scale=1.0)

    counts: list[int] = []
    labels: list[int | None] = []
    for shard, header in zip(shards, headers, strict=True):
        counts.append(_check_shard(listing, shard, header, arrays, numbers.shape))
        labels += _shard_labels(listing, shard, header, counts[-1])
    ends = np.cumsum(counts)
    names = packed(
        f"{shard}#{row}" for shard, count in zip(shards, counts, strict=True) for row in range(count)
    )

    def make(i: int) -> SafetensorsLatents:
        shard = int(np.searchsorted(ends, i, side="right"))
        row, header = i - int(ends[shard]) + counts[shard], headers[shard]
        dtype = header["latents"]["dtype"]
        size = int(np.prod(numbers.shape)) * np.dtype(_DTYPES[dtype]).itemsize
        offsets = tuple(header[key]["data_offsets"][0] + row * size for key in arrays)
        return SafetensorsLatents(names[i], listing.storage.path, shards[shard], dtype, offsets, numbers)

    array, class_names = numbered(labels, names, where=listing.spec)
    return Source(
        Lazy(len(names), make), names, array, class_names, kind="moments", has_flip=len(arrays) == 2
    )


def _few(keys: Sequence[str]) -> str:
    """For a message: a file of weights has hundreds of tensors."""
    return f"{keys[:3]}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _safetensors_header(listing: Listing, name: str) -> dict[str, dict[str, Any]]:
    """Key -> dtype, shape and data_offsets, these counted from the file's begin."""
    where = listing.storage.where(name)
    try:
        size = int.from_bytes(listing.storage.read_range(name, 0, 8), "little")
        if size > listing.storage.size(name):
            raise ValueError("its header is longer than the file")
        header = json.loads(listing.storage.read_range(name, 8, size))
        header.pop("__metadata__", None)
        for tensor in header.values():
            tensor["data_offsets"] = [8 + size + offset for offset in tensor["data_offsets"]]
            if max(tensor["data_offsets"]) > listing.storage.size(name):
                raise ValueError("it is cut short")
        return header
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not a whole safetensors file ({error})") from None


def _check_shard(
    listing: Listing, shard: str, header: dict[str, Any], arrays: Sequence[str], shape: tuple[int, int, int]
) -> int:
    """Samples in the shard; its arrays are of one length, type and shape."""
    num_samples = int(header["latents"]["shape"][0])
    dtype = header["latents"]["dtype"]
    for key in arrays:
        found = header[key]
        if dtype not in _DTYPES or found["dtype"] != dtype or found["shape"] != [num_samples, *shape]:
            where = listing.storage.where(shard)
            raise ValueError(
                f"{where}: {key} are {found['dtype']} {found['shape']}, expected {[num_samples, *shape]} "
                f"of one type, {', '.join(_DTYPES)}"
            )
    return num_samples


def _shard_labels(
    listing: Listing, shard: str, header: dict[str, Any], num_samples: int
) -> Sequence[int | None]:
    if "labels" not in header:
        return [None] * num_samples
    labels = header["labels"]
    if labels["dtype"] not in ("I64", "I32") or labels["shape"] != [num_samples]:
        where = listing.storage.where(shard)
        raise ValueError(
            f"{where}: labels are {labels['dtype']} {labels['shape']}, expected I64 [{num_samples}]"
        )
    first, end = labels["data_offsets"]
    return _array(listing.storage.read_range(shard, first, end - first), labels["dtype"]).tolist()


def _array(data: bytes, dtype: str) -> np.ndarray:
    """The numbers of a safetensors tensor, flat; bfloat16 as float32."""
    array = np.frombuffer(data, _DTYPES[dtype])
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array
