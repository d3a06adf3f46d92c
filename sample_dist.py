"""Draw a sample set and measure it: `python sample_dist.py --config configs/NAME.yaml checkpoint=... num_samples=...`.

The same under torchrun, on any number of processes: image i is a function of (seed, i), so the set has the same bytes.
The same command again draws what is missing; a finished set is only measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from drwkv import command, latents
from drwkv.compose import load
from drwkv.config import SampleConfig, check_sample
from drwkv.data.shards import ShardSet
from drwkv.diffusion.gaussian import GaussianProcess
from drwkv.evaluation.pictures import save_grid
from drwkv.evaluation.protocol import LabelledImages, evaluate
from drwkv.evaluation.report import write_report
from drwkv.evaluation.sample_set import SampleSet
from drwkv.parallel import World, session
from drwkv.sampling import check_sampler, draw, labels_of
from drwkv.training.trained import TrainedModel, open_trained

GRID_IMAGES = 100  # in a grid that stands alone


def sample(config: SampleConfig) -> None:
    """Draw, or go on with, the sample set that `config` describes, as one of the processes that were started.

    Raises ValueError or FileNotFoundError for what the user can mend, before anything is written.
    """
    check_sample(config)
    references = open_references(config)
    trained = open_trained(config.checkpoint, config.weights)
    check_sampler(config.sampler, trained.process.num_timesteps, trained.num_classes)
    torch.backends.cuda.matmul.allow_tf32 = config.tf32
    with session(timeout_sec=config.timeout_sec, cpu_threads=config.cpu_threads) as world:
        samples = SampleSet(Path(config.out), num_samples=config.num_samples, chunk=config.chunk)
        _draw_missing(config, trained, samples, world)
        if world.is_first:
            samples.assemble()
            measure(config, trained, samples, references)


def _draw_missing(config: SampleConfig, trained: TrainedModel, samples: SampleSet, world: World) -> None:
    process, decode = GaussianProcess(**vars(trained.process)), decoder(config, trained, world)

    # Say whose set this is, and share out what is missing.
    identity = set_identity(config, trained, world)
    failure = None
    if world.is_first:
        try:
            samples.claim(identity)
        except ValueError as error:
            failure = str(error)
    if failure := world.from_first(failure):
        raise ValueError(failure)
    missing = world.from_first(samples.missing())
    if world.is_first and not missing:
        print(f"sample set {samples.folder} is finished: {config.num_samples} images are there")

    # Draw chunk by chunk.
    model, num_classes = trained.model.to(world.device).eval(), trained.num_classes
    rounds = range(0, len(missing), world.size)
    for first in tqdm(rounds, unit="round", desc="sampling", disable=not world.is_first):
        for chunk in missing[first + world.rank : first + world.size : world.size]:
            ids = torch.as_tensor(samples.ids(chunk), device=world.device)
            labels = labels_of(ids, num_classes)
            images = []
            for start in range(0, len(ids), config.micro_batch):
                # A short tail is filled up with further ids: the shape of a forward is part of how it rounds.
                padded = torch.arange(config.micro_batch, device=world.device) + ids[start]
                x0 = draw(
                    model, process, config.sampler, ids=padded, labels=labels_of(padded, num_classes),
                    num_classes=num_classes, shape=trained.shape, seed=config.seed,
                )  # fmt: skip
                images.append(decode(x0)[: len(ids) - start])
            drawn = np.concatenate(images)
            samples.write(chunk, drawn, np.full(len(drawn), -1) if labels is None else labels.cpu().numpy())
        world.barrier()


def set_identity(config: SampleConfig, trained: TrainedModel, world: World) -> dict[str, object]:
    """All that decides the bytes of image i, and how they are cut into chunks."""
    manifest = trained.manifest
    return {
        "weights": latents.hash_weights(trained.model),
        "seed": config.seed,
        "labels": "i mod classes",
        "micro_batch": config.micro_batch,
        "chunk": config.chunk,
        "device": world.device.type,
        "cpu_threads": config.cpu_threads if world.device.type == "cpu" else None,
        "tf32": config.tf32 if world.device.type == "cuda" else None,
        "vae": config.vae or (manifest.vae_id if manifest else None),
        "scale": manifest.scale if manifest else None,
        "shift": manifest.shift if manifest else None,
        **{f"process.{key}": value for key, value in asdict(trained.process).items()},
        **{f"sampler.{key}": value for key, value in asdict(config.sampler).items()},
    }


def decoder(config: SampleConfig, trained: TrainedModel, world: World) -> Callable[[Tensor], np.ndarray]:
    """From x_0 (B, C, H, W) to images uint8 (B, H, W, C): pixels as they are, latents through the VAE."""
    manifest = trained.manifest
    if config.vae is None and manifest is None and trained.shape[0] not in (1, 3):
        raise ValueError(
            f"{trained.name}: draws {trained.shape[0]} channels, which are latents: give vae=FOLDER to decode them"
        )
    if config.vae is None and (manifest is None or manifest.kind == "pixels"):
        to_images: Callable[[Tensor], Tensor] = lambda x0: x0  # noqa: E731
    else:
        path = config.vae or (manifest.vae_id if manifest else None)
        assert path is not None
        to_images = latents.open_decoder(path, manifest, where=trained.name, device=world.device)
    return lambda x0: latents.encode_pixels(to_images(x0)).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def open_references(config: SampleConfig) -> tuple[LabelledImages, LabelledImages] | None:
    """The training and the held-out split to measure against, read whole; None if the config names none."""
    paths = (config.evaluate.train, config.evaluate.held_out)
    if paths == (None, None):
        return None
    if None in paths:
        raise ValueError("config keys 'evaluate.train' and 'evaluate.held_out': give both, or neither")
    train, held_out = (read_images(str(path)) for path in paths)
    return train, held_out


def read_images(path: str) -> LabelledImages:
    """Every image of a shard set of pixels, uint8 (N, H, W, C), with its label."""
    shards = ShardSet.open(path)
    if shards.manifest.kind != "pixels":
        raise ValueError(f"{path}: holds {shards.manifest.kind}, and samples are measured against pixels")
    x, y = shards.read(np.arange(shards.num_samples))
    return LabelledImages(np.ascontiguousarray(x.transpose(0, 2, 3, 1)), y)


def measure(
    config: SampleConfig, trained: TrainedModel, samples: SampleSet,
    references: tuple[LabelledImages, LabelledImages] | None,
) -> None:  # fmt: skip
    """Write the grid, and the report if there is something to measure against; say where they are."""
    if references is None or trained.num_classes is None:
        images, labels = samples.first(GRID_IMAGES)
        save_grid(
            images,
            None if labels[0] < 0 else labels,
            samples.folder / "grid.png",
            columns=config.grid_columns,
        )
        print(f"samples: {samples.samples_file}\ngrid:    {samples.folder / 'grid.png'}")
        return
    images, labels = samples.first(config.num_samples)
    train, held_out = references
    evaluation = evaluate(LabelledImages(images, labels), train, held_out)
    files = write_report(
        samples.folder, evaluation, losses=trained.losses, columns=config.grid_columns,
        run={"checkpoint": trained.name, "weights": config.weights, "num_samples": config.num_samples,
             "seed": config.seed, "sampler": asdict(config.sampler)},
    )  # fmt: skip
    for name, metric in evaluation.metrics.items():
        print(f"{name:24s} {metric.value:8.4f}   real data {metric.floor:8.4f}")
    print(
        f"samples: {samples.samples_file}\ngrid:    {files.grid}\npage:    {files.html}\nnumbers: {files.json}"
    )


def main(arguments: Sequence[str]) -> int:
    """The command line: returns the exit code."""
    sample(load(SampleConfig, arguments))
    return 0


if __name__ == "__main__":
    command.run(main)
