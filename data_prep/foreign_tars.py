"""What is to be known of WebDataset tars before they are a shard set: told by the user, by their VAE, by their first
sample, or by an earlier manifest; all of it ends in the draft of a manifest.

Reading the rest of the tars and writing the index is index.py's.
"""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data_prep.tar_reader import open_range
from data_prep.tar_samples import NPY_HEAD_BYTES, Sample, SampleLayout, read_samples
from drwkv.data import manifest as layout
from drwkv.data.manifest import Manifest
from drwkv.storage import Storage

NO_LABEL = "none"  # on the command line: the tars hold no labels
KINDS = {"uint8": "pixels", "float16": "moments", "float32": "moments"}  # by what the arrays hold
USUAL_MEMBERS = ("moments.npy", "img.npy")
FORMS = ("moments", "sampled")  # mean and log-variance, or one draw from them, of which no set can be indexed
KNOWN_FORMS = {4: "sampled", 8: "moments"}  # by channels, as data_prep.encode takes latents that others made
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Told:
    """What the user says of the tars; None: not said, so taken from the tars, the VAE or the manifest before."""

    kind: str | None = None  # "moments" or "pixels"
    form: str | None = None  # one of FORMS, of arrays that are no pixels
    scale: float | None = None  # of latents
    shift: float | None = None  # of latents
    vae_id: str | None = None  # folder or hub name of the VAE that made the moments
    member: str | None = None  # extension of the array member
    flip_member: str | None = None  # that of the mirrored image's moments
    label_member: str | None = None  # that of the label; "" or "none": unlabelled
    num_classes: int | None = None  # labels are below it
    resolution: int | None = None  # height of the images in pixels
    crop: str | None = None  # "none" or "adm-center"

    def filled_from(self, before: Manifest) -> Told:
        """What was not said now, as an earlier manifest has it."""
        there = _told_by(before)
        if self.vae_id not in (None, there.vae_id):
            there = dataclasses.replace(there, scale=None, shift=None, resolution=None)
        if self.label_member is not None:
            there = dataclasses.replace(there, num_classes=None)
        if self.member not in (None, there.member):
            there = dataclasses.replace(there, form=None)
        return dataclasses.replace(
            there, **{key: value for key, value in vars(self).items() if value is not None}
        )

    def differences(self, before: Manifest) -> list[str]:
        """What was said now and is not so in an earlier manifest."""
        there = vars(_told_by(before))
        return [
            f"{key} {there[key]!r} there, {value!r} now"
            for key, value in vars(self).items()
            if value is not None
            and there[key] != ("" if value == NO_LABEL and key == "label_member" else value)
        ]


def _told_by(manifest: Manifest) -> Told:
    member, flip_member = (*manifest.members, None)[:2]
    names = {field.name for field in dataclasses.fields(Told)} & vars(manifest).keys()
    form = "moments" if manifest.kind == "moments" else None
    return Told(
        **{name: getattr(manifest, name) for name in names}, form=form, member=member, flip_member=flip_member
    )  # fmt: skip


@dataclass(frozen=True)
class ArrayHeader:
    """The npy header that every array of the set opens with."""

    data: bytes
    shape: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def of(cls, data: bytes, where: str) -> ArrayHeader:
        """Of an npy file of which `data` is the beginning; ValueError when no set can hold such an array."""
        file = io.BytesIO(data)
        try:
            shape, fortran_order, dtype = layout.read_npy_header(file)
        except ValueError as error:
            raise ValueError(f"{where} is no npy array that can be read ({error})") from None
        if fortran_order or len(shape) != 3 or dtype.str not in ("|u1", "<f2", "<f4"):
            order = " in Fortran order" if fortran_order else ""
            raise ValueError(
                f"{where} is an array of {dtype} {shape}{order}; a set holds uint8 images (C, H, W) or "
                "little-endian float16 or float32 moments (2C, h, w)"
            )
        return cls(data[: file.tell()], shape, dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole npy file."""
        return len(self.data) + int(np.prod(self.shape)) * self.dtype.itemsize


def look_inside(source: Storage, tar: str, told: Told) -> tuple[SampleLayout, ArrayHeader]:
    """The members to take, and the header of the first array; ValueError naming what should be said."""
    where = source.where(tar)
    with open_range(source, tar) as reader:
        first = next(read_samples(reader, SampleLayout((), "", strict=False), where=where), None)
    if first is None:
        raise ValueError(f"{where}: holds no samples, members named KEY.EXTENSION")
    label = layout.LABEL_MEMBER if told.label_member is None else told.label_member
    label = "" if label == NO_LABEL else label
    members = SampleLayout(
        (_main_member(first, told, source, tar), *_given(told.flip_member)), label, strict=False
    )
    if label and label not in first.places:
        raise ValueError(
            f"{where}: sample {first.key} has {sorted(first.places)} and no label {label!r}: give --label-member NAME, "
            f"or --label-member {NO_LABEL} for an unlabelled set"
        )
    members.check(first, where)
    place = first.places[members.arrays[0]]
    head = source.read_range(tar, place.offset, min(place.size, NPY_HEAD_BYTES))
    return members, ArrayHeader.of(head, f"{where}: sample {first.key}: {members.arrays[0]}")


def _main_member(first: Sample, told: Told, source: Storage, tar: str) -> str:
    usual = [name for name in USUAL_MEMBERS if name in first.places] if told.member is None else [told.member]
    where = source.where(tar)
    image = next((name for name in (told.member, *first.places) if name and _is_image(name)), None)
    if image in first.places and (not usual or usual == [image]):
        raise ValueError(
            f"{where}: sample {first.key} has an image, {image}, where an array is needed: make a set of the images by "
            f"`python -m data_prep.encode source={source.path} out=SET`, or give --member NAME for another member"
        )
    if len(usual) != 1:
        raise ValueError(
            f"{where}: sample {first.key} has {sorted(first.places)}: give --member NAME for the one that is the array"
        )
    return usual[0]


def _is_image(extension: str) -> bool:
    return extension.lower().endswith(IMAGE_SUFFIXES)


def _given(name: str | None) -> tuple[str, ...]:
    return () if name is None else (name,)


def draft_manifest(
    storage: Storage, told: Told, members: SampleLayout, header: ArrayHeader, *, checksums: bool
) -> Manifest:
    """The manifest, but for what the samples tell."""
    kind = KINDS[header.dtype.name]
    if told.kind not in (None, kind):
        raise ValueError(
            f"{storage.path}: --kind is {told.kind}, but {members.arrays[0]} holds {header.dtype.name}"
        )
    if told.num_classes and not members.label:
        raise ValueError(
            f"{storage.path}: --num-classes is {told.num_classes}, but the set is to have no labels"
        )
    channels, height, width = header.shape
    scale, shift, resolution, vae_hash = told.scale, told.shift, told.resolution, None
    if kind == "moments":
        vae = None if told.vae_id is None else _VaeFacts.load(told.vae_id)
        _check_form(storage.path, told, members.arrays[0], header.shape, vae)
        if vae is not None:
            vae_hash = vae.hash
            scale = vae.scale if scale is None else scale
            shift = vae.shift if shift is None else shift
            resolution = height * vae.factor if resolution is None else resolution
        missing = [
            name for name, value in (("--scale", scale), ("--resolution", resolution)) if value is None
        ]
        if missing:
            raise ValueError(
                f"{storage.path}: the tars do not say {' and '.join(missing)}: give it, or --vae FOLDER to take it from"
            )
        channels, shift = channels // 2, shift or 0.0
    elif any(value is not None for value in (told.form, told.scale, told.shift, told.vae_id)):
        raise ValueError(
            f"{storage.path}: --form, --scale, --shift and --vae are for moments, but the tars hold pixels"
        )
    manifest = Manifest(
        kind=kind,
        num_classes=0,  # this, and how many samples there are, is known at the end
        channels=channels,
        height=height,
        width=width,
        resolution=resolution or height,
        crop=told.crop or "none",
        dtype=header.dtype.name,
        seed=0,
        samples_per_shard=1,
        num_samples=1,
        has_flip=len(members.arrays) == 2,
        vae_id=told.vae_id,
        vae_hash=vae_hash,
        scale=scale,
        shift=shift,
        member_names=list(members.arrays),
        label_member=members.label,
        checksums=checksums,
    )
    manifest.check(storage.path)
    return manifest


def _check_form(path: str, told: Told, member: str, shape: tuple[int, ...], vae: _VaeFacts | None) -> None:
    """ValueError unless the arrays are moments: by what was said, the VAE's channels, their name, or theirs."""
    channels = shape[0]
    form = told.form
    if form is None and vae is not None:
        form = "sampled" if vae.channels == channels else "moments"
    if form is None:
        form = "moments" if "moments" in member or channels % 2 else KNOWN_FORMS.get(channels)
    repack = (
        "unpack them into class folders of .npy and run `python -m data_prep.encode source=FOLDER "
        f"latents.form=sampled latents.scale={told.scale or 'SCALE'} out=SET`"
    )
    if form not in FORMS or (form == "sampled" and told.form is None and vae is None):
        guess = ", as sampled latents usually have" if form == "sampled" else ""
        raise ValueError(
            f"{path}: {member} has {channels} channels{guess}, and its name does not say what they are: give "
            "--form moments for a mean and a log-variance, half of the channels each; sampled latents have no "
            f"log-variance, which training needs: {repack}"
        )
    if form == "sampled":
        raise ValueError(
            f"{path}: {member} holds sampled latents of {channels} channels, and training needs moments, mean and "
            f"log-variance: {repack}"
        )
    if channels % 2:
        raise ValueError(
            f"{path}: {member} has shape {shape}: moments are a mean and a log-variance, so an even number of channels"
        )
    if vae is not None and vae.channels != channels // 2:
        raise ValueError(
            f"{path}: {told.vae_id} makes latents of {vae.channels} channels, the tars hold {channels // 2}"
        )


@dataclass(frozen=True)
class _VaeFacts:
    """What a VAE says of the moments that it makes."""

    hash: str
    scale: float
    shift: float
    factor: int  # image pixels of one latent pixel
    channels: int

    @classmethod
    def load(cls, path: str) -> _VaeFacts | None:
        """None, and a line that says so, where it cannot be loaded."""
        from drwkv.latents import hash_weights, load_vae, vae_scaling  # torch, which only this needs

        try:
            vae = load_vae(path)
        except ValueError as error:
            tqdm.write(f"{error}; the set goes without the hash of its weights")
            return None
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        return cls(hash_weights(vae), *vae_scaling(vae), factor, int(vae.config.latent_channels))
