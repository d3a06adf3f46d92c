"""What stands beside the tars of a shard set: manifest, index rows and shard list; and the npy header inside.

    SET/shard-000000.tar ...  members KEY.cls, and KEY.img.npy or KEY.moments.npy [+ KEY.moments_flip.npy]
    SET/index/samples.npy     one INDEX_ROW (FLIP_INDEX_ROW) a sample, shard-major: row number = sample id
    SET/index/shards.json     name, samples, bytes and hash of its index rows, for each shard
    SET/index/sources.txt     the source name of each sample, one a line, in row order
    SET/manifest.json         written last: the commit mark

SET is a folder or an S3 prefix.

The hashes form a chain: manifest -> shards.json -> rows of one shard -> bytes of one sample. So a set of any
size opens after hashing shards.json alone, and each shard's rows are checked when it is first read.

Reading samples is shards.py's; writing all of this is data_prep.writer's.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from drwkv.storage import is_remote, open_storage

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
SHARD_LIST_NAME = "index/shards.json"
ROWS_NAME = "index/samples.npy"
SOURCES_NAME = "index/sources.txt"
LABEL_MEMBER = "cls"

# offset, size and crc32c are those of the whole member file (npy header and data) inside the tar.
INDEX_ROW = np.dtype(
    [("offset", "<u8"), ("size", "<u4"), ("crc32c", "<u4"), ("shard", "<u4"), ("label", "<i4")]
)
FLIP_INDEX_ROW = np.dtype(
    INDEX_ROW.descr + [("flip_offset", "<u8"), ("flip_size", "<u4"), ("flip_crc32c", "<u4")]
)


# A header is parsed by Python's `ast`, which in two threads at once fails now and then (CPython 3.11, SystemError).
_parsing = threading.Lock()


@dataclass(frozen=True)
class Manifest:
    """All that a trainer must know of a shard set before it reads a sample."""

    kind: str  # "pixels" (uint8 images) or "moments" (float16 mean and log-variance of a VAE)
    num_classes: int  # labels are 0..num_classes-1; 0: unlabelled, every label is 0
    channels: int  # channels of the model's input: moments hold twice as many
    height: int  # rows of the stored array
    width: int  # columns of the stored array
    resolution: int  # height of the images in pixels
    crop: str  # how the images were cropped: "none" or "adm-center"
    dtype: str  # numpy name of the stored type: "uint8" or "float16"
    seed: int  # key of the permutation that dealt the samples out to shards
    samples_per_shard: int  # most samples in one shard
    has_flip: bool = False  # whether moments of the mirrored image are stored too
    vae_id: str | None = None  # folder or hub name of the VAE; None for pixels
    vae_hash: str | None = None  # sha256 of the VAE's weights; None for pixels
    scale: float | None = None  # latents are (z - shift) * scale; None for pixels
    shift: float | None = None  # see scale; None for pixels
    encode_dtype: str | None = None  # type in which the VAE encoded: "float32" or "bfloat16"; None: not ours
    # Images of one forward of the VAE: rounding depends on it; None: not ours
    encode_batch: int | None = None
    encode_threads: int | None = None  # CPU threads of the VAE: so does it on them; None: a GPU, or not ours
    class_names: list[str] = field(default_factory=list)  # in the order of labels; []: not known
    skipped: dict[str, str] = field(default_factory=dict)  # sources left out, and why; the commit fills it in
    member_names: list[str] = field(default_factory=list)  # array members as others named them; []: our own
    label_member: str = LABEL_MEMBER  # member that holds the label; "" where there is none
    checksums: bool = True  # whether the index holds each member's crc32c; False: 0 stands there
    num_samples: int = 0  # samples in the set; the writer fills it in
    # sha256 of the source list, names and labels, with those left out; the writer fills it in
    source_hash: str = ""
    index_hash: str = ""  # sha256 of index/shards.json; the commit fills it in
    format: int = FORMAT_VERSION  # version of this layout

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape of one stored array: (C, H, W) for pixels, (2C, h, w) for moments."""
        return (self.channels * (2 if self.kind == "moments" else 1), self.height, self.width)

    @property
    def members(self) -> tuple[str, ...]:
        """Extensions of the array members of a sample, the main one first."""
        if self.member_names:
            return tuple(self.member_names)
        if self.kind == "pixels":
            return ("img.npy",)
        return ("moments.npy", "moments_flip.npy") if self.has_flip else ("moments.npy",)

    @property
    def is_foreign(self) -> bool:
        """Whether others wrote the tars, and only the index is ours."""
        return bool(self.member_names)

    def remedy(self, path: str, what: str = "that shard") -> str:
        """What to do about a file of the set at `path` that is missing or damaged; the end of a sentence."""
        if self.is_foreign:
            return f"restore it, or run `python -m data_prep.index {path} --again` if the tars have changed"
        return f"restore it, or delete {what} and run the command that wrote it again"

    @property
    def row_dtype(self) -> np.dtype:
        return FLIP_INDEX_ROW if self.has_flip else INDEX_ROW

    def check(self, where: str) -> None:
        """Raise a ValueError that names `where` when the fields contradict each other."""
        allowed = {"pixels": ["uint8"], "moments": ["float16", "float32"]}.get(self.kind)
        if allowed is None:
            raise ValueError(f"{where}: kind is {self.kind!r}, expected 'pixels' or 'moments'")
        if self.dtype not in allowed:
            names = " or ".join(map(repr, allowed))
            raise ValueError(f"{where}: dtype is {self.dtype!r}, but a set of {self.kind} holds {names}")
        if self.has_flip and self.kind == "pixels":
            raise ValueError(f"{where}: has_flip is true, but pixels are mirrored when they are read")
        for key in ("num_samples", "channels", "height", "width", "samples_per_shard"):
            if getattr(self, key) < 1:
                raise ValueError(f"{where}: {key} is {getattr(self, key)}, expected at least 1")
        if self.num_classes < 0:
            raise ValueError(f"{where}: num_classes is {self.num_classes}, expected 0 (unlabelled) or more")
        if self.kind == "moments" and (self.scale is None or self.shift is None):
            raise ValueError(f"{where}: moments need scale and shift, from the VAE's config")
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"{where}: {len(self.class_names)} class_names for num_classes {self.num_classes}; give one each"
            )
        if self.member_names and len(self.member_names) != 1 + self.has_flip:
            raise ValueError(f"{where}: member_names are {self.member_names}, expected {1 + self.has_flip}")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Parse and check; `where` is the file to name in the ValueError."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON ({error}); write the set again") from None
        if not isinstance(values, dict):
            raise ValueError(f"{where}: expected a JSON object, found {type(values).__name__}")
        if values.get("format") != FORMAT_VERSION:
            raise ValueError(
                f"{where}: shard set format {values.get('format')!r}, this program reads {FORMAT_VERSION}; "
                "write the set again with this version"
            )
        fields = {field.name: str(field.type) for field in dataclasses.fields(cls)}
        for key in fields.keys() - values.keys():
            raise ValueError(f"{where}: key {key!r} is missing; write the set again")
        for key in values.keys() - fields.keys():
            raise ValueError(f"{where}: unknown key {key!r}")
        for key, kind in fields.items():
            if not _is_a(values[key], kind):
                raise ValueError(f"{where}: {key} is {values[key]!r}, expected {kind}")
        manifest = cls(**values)
        manifest.check(where)
        return manifest


def _is_a(value: Any, kind: str) -> bool:
    if value is None:
        return kind.endswith("| None")
    name = kind.removesuffix(" | None")
    if name == "float":
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if name == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if name == "list[str]":
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
    if name == "dict[str, str]":
        return isinstance(value, dict) and all(isinstance(entry, str) for entry in value.values())
    return isinstance(value, {"str": str, "bool": bool}[name])


@dataclass(frozen=True)
class ShardEntry:
    """One line of index/shards.json."""

    name: str  # file name inside the set's folder
    num_samples: int  # samples in the tar
    num_bytes: int  # size of the tar file
    rows_sha256: str  # hash of its rows of index/samples.npy


def shard_list_to_json(entries: list[ShardEntry], sources_sha256: str) -> str:
    """The text of index/shards.json; its sha256 is the manifest's index_hash."""
    rows = ",\n".join("    " + json.dumps(dataclasses.asdict(entry)) for entry in entries)
    return f'{{\n  "sources_sha256": {json.dumps(sources_sha256)},\n  "shards": [\n{rows}\n  ]\n}}\n'


def shard_list_from_json(text: str) -> list[ShardEntry]:
    return [ShardEntry(**entry) for entry in json.loads(text)["shards"]]


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the shard set at `path`, a folder or S3 prefix.

    ValueError when there is none, or it is not sound.
    """
    storage = open_storage(path)
    file = storage.where(MANIFEST_NAME)
    try:
        text = storage.read(MANIFEST_NAME).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); write the set again") from None
    except (FileNotFoundError, NotADirectoryError):
        found = "nothing of that name is there, or its writing has not ended"
        if not is_remote(path):
            there = Path(path).is_dir()
            found = "the folder exists, so its writing has not ended" if there else "no such folder"
        raise ValueError(
            f"{path}: not a committed shard set: {file} is missing ({found}); "
            "run the data_prep command that writes it (again)"
        ) from None
    return Manifest.from_json(text, file)


def check_fits(
    manifest: Manifest,
    *,
    path: str,
    input_size: int | tuple[int, int],
    in_channels: int,
    num_classes: int | None,
) -> None:
    """Raise a one-line ValueError when a model of this input cannot be trained on the set at `path`.

    `num_classes` None is an unconditional model, which fits labelled and unlabelled sets alike.
    """
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    file = open_storage(path).where(MANIFEST_NAME)
    if (manifest.height, manifest.width) != (height, width):
        raise ValueError(
            f"input_size is {height}x{width}, but {file} holds {manifest.kind} of "
            f"{manifest.height}x{manifest.width}: set input_size to that, or take another shard set"
        )
    if manifest.channels != in_channels:
        raise ValueError(
            f"in_channels is {in_channels}, but {file} holds {manifest.kind} for {manifest.channels} "
            f"channels: set in_channels={manifest.channels}, or take another shard set"
        )
    if num_classes is not None and manifest.num_classes != num_classes:
        held = f"{manifest.num_classes} classes" if manifest.num_classes else "no labels (num_classes 0)"
        fix = f"num_classes={manifest.num_classes}" if manifest.num_classes else "num_classes=null"
        raise ValueError(
            f"num_classes is {num_classes}, but {file} has {held}: set {fix}, or take another shard set"
        )


def npy_bytes(array: np.ndarray) -> bytes:
    """The bytes of an npy file of version 1.0 holding `array`; the same array gives the same bytes."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def read_npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran order, dtype) of the npy file that `stream` begins with, safe from any thread.

    The stream stands behind the header then. ValueError for what is no npy file of version 1.0 or 2.0.
    """
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy version {version}, expected (1, 0) or (2, 0)")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with _parsing:
        return read(stream)


def npy_header_size(data: bytes, *, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Length of the npy header that opens `data`; ValueError unless it says `shape`, `dtype`, C order."""
    stream = io.BytesIO(data)
    found_shape, fortran_order, found_dtype = read_npy_header(stream)
    if fortran_order or found_shape != shape or found_dtype != dtype:
        order = " in Fortran order" if fortran_order else ""
        raise ValueError(f"npy array of {found_dtype} {found_shape}{order}, expected {dtype} {shape}")
    return stream.tell()


def npy_array(data: bytes) -> np.ndarray:
    """The array in the bytes of an npy file, safe from any thread. ValueError, EOFError."""
    with _parsing:
        array: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return array


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
