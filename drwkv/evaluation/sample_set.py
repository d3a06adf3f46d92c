"""A set of sampled images on disk: chunks that are there whole or not at all, and the one file that ADM's tools read.

    SET/set.json                identity: whatever decides the bytes of image i
    SET/chunks/000000.npz       arr_0 uint8 (N, H, W, C), arr_1 int64 (N,) labels; ids [chunk * size, ...)
    SET/chunks/000000.json      written after its npz: the chunk's mark, with the crc32c of the npz
    SET/samples.npz             arr_0 and arr_1 of the whole set, in the order of ids

Drawing the images is sampling.py's, sharing out the work sample_dist.py's.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from drwkv.files import write_whole


class SampleSet:
    """The sample set in `folder`, in chunks of `chunk` images, `num_samples` in all."""

    def __init__(self, folder: Path, *, num_samples: int, chunk: int) -> None:
        self.folder, self.num_samples, self.chunk = folder, num_samples, chunk

    @property
    def samples_file(self) -> Path:
        """The file of the whole set."""
        return self.folder / "samples.npz"

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Make the folder this set's. ValueError, naming the key, if it holds a set of another identity."""
        path = self.folder / "set.json"
        now = json.loads(json.dumps(dict(identity)))
        if not path.exists():
            write_whole(path, (json.dumps(now, indent=1) + "\n").encode())
            return
        held = json.loads(path.read_text())
        for key in sorted(held.keys() | now.keys()):
            if held.get(key) != now.get(key):
                raise ValueError(
                    f"{self.folder}: holds samples whose {key} is {held.get(key)!r}, not {now.get(key)!r}: "
                    "give another out=FOLDER, or set it back"
                )

    def ids(self, chunk: int) -> range:
        """Numbers of the images of a chunk."""
        return range(chunk * self.chunk, min((chunk + 1) * self.chunk, self.num_samples))

    def missing(self) -> list[int]:
        """The chunks that have no mark, or that of a shorter chunk, in order."""
        return [c for c in range(-(-self.num_samples // self.chunk)) if not self._is_whole(c)]

    def write(self, chunk: int, images: np.ndarray, labels: np.ndarray) -> None:
        """Commit a chunk: images uint8 (N, H, W, C) and labels int64 (N,). Written twice, the bytes are the same."""
        buffer = io.BytesIO()
        np.savez(buffer, arr_0=images, arr_1=labels)
        data = buffer.getvalue()
        self._file(chunk).with_suffix(".json").unlink(missing_ok=True)  # the old mark is not of the new bytes
        write_whole(self._file(chunk), data)
        mark = {"num_samples": len(images), "crc32c": google_crc32c.value(data)}
        write_whole(self._file(chunk).with_suffix(".json"), (json.dumps(mark) + "\n").encode())

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images and labels of each chunk, in order. ValueError for a chunk whose bytes are not what was written."""
        for chunk in range(-(-self.num_samples // self.chunk)):
            data = self._file(chunk).read_bytes()
            if (
                google_crc32c.value(data)
                != json.loads(self._file(chunk).with_suffix(".json").read_text())["crc32c"]
            ):
                raise ValueError(
                    f"{self._file(chunk)}: its bytes have changed; delete it and run the command again"
                )
            with np.load(io.BytesIO(data)) as arrays:
                count = len(self.ids(chunk))
                yield arrays["arr_0"][:count], arrays["arr_1"][:count]

    def first(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of the first `count` ids, or of all if there are fewer."""
        images: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        for some_images, some_labels in self.chunks():
            images.append(some_images)
            labels.append(some_labels)
            if sum(map(len, labels)) >= count:
                break
        return np.concatenate(images)[:count], np.concatenate(labels)[:count]

    def assemble(self) -> None:
        """Write samples.npz out of the chunks, one at a time, and put it in place by rename; nobody draws any more."""
        for left_by_the_killed in (self.folder / "chunks").glob("*.tmp*"):
            left_by_the_killed.unlink(missing_ok=True)
        first, _ = next(self.chunks())
        temporary = self.samples_file.with_suffix(".npz.tmp")
        with zipfile.ZipFile(temporary, "w", allowZip64=True) as archive:
            for name, index, shape in [("arr_0", 0, first.shape[1:]), ("arr_1", 1, ())]:
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    dtype = first.dtype if index == 0 else np.dtype(np.int64)
                    header = {"descr": dtype.str, "fortran_order": False, "shape": (self.num_samples, *shape)}
                    np.lib.format.write_array_header_1_0(member, header)
                    for arrays in self.chunks():
                        member.write(np.ascontiguousarray(arrays[index], dtype=dtype).tobytes())
        temporary.replace(self.samples_file)

    def _file(self, chunk: int) -> Path:
        return self.folder / "chunks" / f"{chunk:06d}.npz"

    def _is_whole(self, chunk: int) -> bool:
        try:
            mark = json.loads(self._file(chunk).with_suffix(".json").read_text())
        except FileNotFoundError:
            return False
        return self._file(chunk).exists() and mark["num_samples"] >= len(self.ids(chunk))
