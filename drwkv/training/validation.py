"""The loss on held-out samples while a run goes on, by ranges of t, of the trained weights and of their average.

A bank of samples, each with its timestep and its noise, is fixed by (validation.seed, the set) and read once at the
start. Every term of a sample's loss is computed in a micro-batch of one shape, and the means are taken in the bank's
order: so the numbers are a function of the weights alone, not of ranks, engine, batch size or the run's seed. What is
drawn for a sample of the bank is objective.py's; grids of samples are preview.py's.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from drwkv import rng
from drwkv.compose import require
from drwkv.data.loader import Batch, Data, DataConfig, ModelInput, check_alike, open_data
from drwkv.data.order import Mixture, Order, permute
from drwkv.data.selection import SelectedOrder, SelectionConfig
from drwkv.training.monitor import Monitor, cut_back, every, read_lines
from drwkv.training.objective import Objective
from drwkv.training.state import TrainState

log = logging.getLogger("drwkv")

# Where in the sets the bank lies: in a few rows of 64 places, so that it touches few shards of a large set.
STREAMS, WINDOW = 64, 64
PLACES = 1  # step of Purpose.VALIDATION: a sample's place within its range of t; objective.py has the others


@dataclass
class ValidationConfig:
    """What is measured on held-out samples, and how often."""

    every_steps: int = 0  # steps between validations; 0: none
    # Committed shard sets, folders or S3 prefixes; []: the part of data.paths that data.select.held_out holds out
    paths: list[str] = field(default_factory=list)
    num_samples: int = 1000  # samples of the bank, a multiple of bins
    bins: int = 10  # equal ranges of t, of which each has as many samples
    # Samples of one forward on one rank; sums round by shape, so it moves the last digits
    micro_batch: int = 25
    seed: int = 0  # 0 <= seed < 2**32; key of the bank, apart from the run's, so that runs can be compared


def check_validation(config: ValidationConfig, select: SelectionConfig, num_timesteps: int) -> None:
    """ValueError that names the key, for values that cannot be, or where nothing is held out."""
    for key, least in (("every_steps", 0), ("num_samples", 1), ("bins", 1), ("micro_batch", 1)):
        value = getattr(config, key)
        require(value >= least, f"validation.{key}", value, f"give {least} or more")
    require(0 <= config.seed < 2**32, "validation.seed", config.seed, "give 0 <= seed < 2**32")
    advice = f"give diffusion.num_timesteps={num_timesteps} or less"
    require(config.bins <= num_timesteps, "validation.bins", config.bins, advice)
    advice = f"give a multiple of validation.bins={config.bins}"
    require(config.num_samples % config.bins == 0, "validation.num_samples", config.num_samples, advice)
    if config.every_steps and not config.paths:
        advice = "no sample is held out: give validation.paths=[SET], or data.select.held_out=0.05 to hold some out"
        require(select.held_out > 0, "validation.every_steps", config.every_steps, advice)
        advice = (
            "validation reads the part held_out of data.paths: train on part=train, or give validation.paths"
        )
        require(select.part == "train", "data.select.part", select.part, advice)


@dataclass(frozen=True)
class Bank:
    """Which samples are measured, and at which t: sample j is row `ids[j]` of set `which[j]`."""

    data: Data
    which: np.ndarray  # (N,) int64
    ids: np.ndarray  # (N,) int64, rising within a set
    t: np.ndarray  # (N,) int64; sample j lies in range j mod bins
    bounds: list[int]  # (bins + 1,) where the ranges of t begin and end

    @functools.cached_property
    def name(self) -> str:
        """The same for the same samples and timesteps: numbers of another name are not to be compared."""
        checksum = google_crc32c.Checksum("".join(s.index_hash for s in self.data.sets).encode())
        for part in (self.which, self.ids, self.t):
            checksum.update(part.astype("<i8").tobytes())
        return checksum.hexdigest().decode()

    def read(self, j: np.ndarray) -> Batch:
        """Samples j (B,), rising or wrapped, as they are stored: no flip."""
        x = np.empty((len(j), *self.data.sets[0].sample_shape), self.data.sets[0].manifest.dtype)
        y = np.empty(len(j), np.int64)
        for k, shard_set in enumerate(self.data.sets):
            mine = np.flatnonzero(self.which[j] == k)
            if mine.size:
                x[mine], y[mine] = shard_set.read(self.ids[j[mine]])
        sample_id = torch.from_numpy(self.ids[j])
        return Batch(torch.from_numpy(j), sample_id, torch.from_numpy(x), torch.from_numpy(y))


def open_bank(config: ValidationConfig, training: Data, model: ModelInput, num_timesteps: int) -> Bank | None:
    """Open the held-out sets and choose the bank; None where there is no validation.

    Raises ValueError in one line for sets that do not fit the model or the training sets, that hold too few samples,
    or that are trained on.
    """
    if not config.every_steps:
        return None
    data = open_data(_held_out(config, training.config), seed=config.seed)
    data.check_fits(model)
    check_alike([training.sets[0], *data.sets], key="validation.paths")
    ids = [
        np.sort(order.sample_ids(np.arange(count)))
        for order, count in zip(_orders(data), _counts(config, data), strict=True)
    ]
    _check_apart(config, data, ids, training)
    which = np.repeat(np.arange(len(ids)), [len(rows) for rows in ids])
    bounds = [b * num_timesteps // config.bins for b in range(config.bins + 1)]
    return Bank(data, which, np.concatenate(ids), timesteps(config, bounds), bounds)


def timesteps(config: ValidationConfig, bounds: list[int]) -> np.ndarray:
    """t (N,) of the bank: of sample j in range j mod bins, and spread evenly inside it; a function of (seed, j)."""
    j = np.arange(config.num_samples)
    first, per_bin = np.array(bounds)[j % config.bins], config.num_samples // config.bins
    width = np.diff(bounds)[j % config.bins]
    key = rng.key64(config.seed, rng.Purpose.VALIDATION, PLACES)
    place = permute(j // config.bins, per_bin, key)
    word = rng.bits(config.seed, rng.Purpose.VALIDATION, torch.from_numpy(j), 1, step=PLACES)[:, 0].numpy()
    return first + (place * width + (word * width >> 32)) // per_bin


def _held_out(config: ValidationConfig, training: DataConfig) -> DataConfig:
    """What to open: the named sets, or the other side of the training sets. Order and seed are the bank's own."""
    base = replace(training, streams=STREAMS, window=WINDOW, flip=False, on_corrupt="raise")
    if config.paths:
        classes = SelectionConfig(classes=training.select.classes)
        return replace(base, paths=config.paths, weights=None, select=classes)
    other = replace(training.select, part="held_out", max_per_class=None, balance=False)
    return replace(base, select=other)


def _orders(data: Data) -> Sequence[Order]:
    """The order of each set."""
    return data.order.orders if isinstance(data.order, Mixture) else [data.order]


def _counts(config: ValidationConfig, data: Data) -> list[int]:
    """How many samples each set gives, by the weights of training or in proportion; ValueError if one holds fewer."""
    weights = data.config.weights or [order.num_samples for order in _orders(data)]
    ends = np.floor(np.cumsum(weights) / np.sum(weights) * config.num_samples + 0.5).astype(np.int64)
    counts = np.diff(ends, prepend=0).tolist()
    for shard_set, order, count in zip(data.sets, _orders(data), counts, strict=True):
        most = config.num_samples * order.num_samples // max(count, 1) // config.bins * config.bins
        advice = f"{shard_set.path} has {order.num_samples} held-out samples, and {count} are asked of it: "
        advice += (
            f"give {most} or less, a multiple of validation.bins"
            if most
            else f"give fewer validation.bins than {config.bins}"
        )
        fits = count <= order.num_samples
        require(fits, "validation.num_samples", config.num_samples, advice)
    return counts


def _check_apart(config: ValidationConfig, data: Data, ids: list[np.ndarray], training: Data) -> None:
    """No sample of the bank is trained on, as far as the sets' own numbering tells."""
    for shard_set, rows in zip(data.sets, ids, strict=True):
        for other, order in zip(training.sets, _orders(training), strict=True):
            if other.index_hash != shard_set.index_hash:
                continue
            trained = isinstance(order, SelectedOrder) and not np.isin(rows, order.selection.rows).any()
            advice = (
                f"{shard_set.path} holds samples that are trained on: take the set out of data.paths, or leave "
                "validation.paths empty and give data.select.held_out"
            )
            require(trained, "validation.paths", config.paths, advice)


class Validation:
    """Measures the bank after every so many steps, and writes validation.jsonl and TensorBoard's scalars."""

    def __init__(
        self, config: ValidationConfig, bank: Bank | None, objective: Objective, state: TrainState,
        monitor: Monitor, folder: Path,
    ) -> None:  # fmt: skip
        self._config, self._bank, self._objective, self._state = config, bank, objective, state
        self._monitor, self._world = monitor, state.engine.world
        self._path = folder / "validation.jsonl"
        self._batches: list[tuple[Batch, Tensor]] = []
        self.rewind(state.step)

    def rewind(self, step: int) -> None:
        """Go on from `step`: what was measured later is cut back; what was measured there still holds."""
        if not self._world.is_first:
            return
        cut_back(self._path, step + 1)
        for line in read_lines(self._path):
            if line["step"] == step:  # TensorBoard has dropped all from this step on
                self._show(line)

    def read(self, interrupted: Callable[[], bool]) -> None:
        """Read this rank's micro-batches of the bank, and keep them; may fail on one rank alone.

        Each rank has as many, since a sharded model's forward is a collective: the last ones are measured twice. The
        last of all is filled up with the bank's first samples, so that all have one shape. Once `interrupted` says
        yes, the rest is left unread.
        """
        if self._bank is None:
            return
        size, num_samples = self._config.micro_batch, self._config.num_samples
        num_batches = -(-num_samples // size)
        share = -(-num_batches // self._world.size)
        for k in range(self._world.rank * share, (self._world.rank + 1) * share):
            if interrupted():
                return
            start = k % num_batches * size
            batch = self._bank.read(np.arange(start, start + size) % num_samples)
            tensors = [*vars(batch).values(), torch.from_numpy(self._bank.t[batch.n.numpy()])]
            if self._world.device.type == "cuda":  # copies of what is not pinned wait for the device
                tensors = [tensor.pin_memory() for tensor in tensors]
            *of_batch, t = tensors
            self._batches.append((Batch(*of_batch), t))

    def due(self, step: int) -> bool:
        """Whether to measure after `step` steps."""
        return every(step, self._config.every_steps)

    def measure(self) -> None:
        """Measure both sets of weights as they stand now, and show the numbers. Collective."""
        module = self._state.engine.module
        module.eval()
        lines = [self._line("raw")]
        with self._state.ema.swapped_in():
            lines.append(self._line("ema"))
        module.train()
        if self._world.is_first:
            with self._path.open("a") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
            for line in lines:
                self._show(line)
            losses = " and ".join(f"{line['loss'] or math.nan:.4f} ({line['weights']})" for line in lines)
            seconds = sum(line["seconds"] for line in lines)
            log.info(
                "validation after step %d: loss %s on %d held-out samples, in %.1f s",
                self._state.step, losses, self._config.num_samples, seconds,
            )  # fmt: skip

    def _line(self, weights: str) -> dict[str, Any]:
        assert self._bank is not None
        begun, bounds, bins = time.perf_counter(), self._bank.bounds, self._config.bins
        terms = self._terms()
        by_t = [
            {"t_from": bounds[b], "t_to": bounds[b + 1], **_means(terms, slice(b, None, bins))}
            for b in range(bins)
        ]
        return {
            "step": self._state.step, "n": self._state.n, "weights": weights,
            "bank": self._bank.name, **_means(terms, slice(None)),
            "bins": by_t, "seconds": time.perf_counter() - begun,
        }  # fmt: skip

    @torch.no_grad()
    def _terms(self) -> dict[str, np.ndarray]:
        """Each term (N,) of the losses of the whole bank, float64, in its order; waits for the device once."""
        assert self._bank is not None
        engine, found = self._state.engine, []
        for batch, t in self._batches:
            inputs = self._objective.held_out_inputs(batch, t, seed=self._config.seed)
            with engine.autocast():
                terms = self._objective.terms(engine.module, inputs)
            found.append(torch.stack([*terms.values()]))
        names = list(terms)
        mine: Tensor = torch.cat(found, dim=1).double()
        whole = np.concatenate(self._world.gather(mine.cpu().numpy()), axis=1)[:, : self._config.num_samples]
        return dict(zip(names, whole, strict=True))

    def _show(self, line: dict[str, Any]) -> None:
        """The scalars of one line of validation.jsonl."""
        weights, width = line["weights"], len(str(line["bins"][-1]["t_from"]))
        numbers = {f"validation/{name}_{weights}": line[name] for name in ("loss", "mse", "vb")}
        for row in line["bins"]:
            name = f"t_{row['t_from']:0{width}d}_{row['t_to']:0{width}d}"
            numbers[f"validation_{weights}/{name}"] = row["loss"]
        self._monitor.show(
            line["step"], {name: value for name, value in numbers.items() if value is not None}
        )


def _means(terms: dict[str, np.ndarray], chosen: slice) -> dict[str, float | None]:
    """The mean of each term; None, as JSON has it, where it is not finite."""
    means = {name: float(values[chosen].mean()) for name, values in terms.items()}
    return {name: mean if math.isfinite(mean) else None for name, mean in means.items()}
