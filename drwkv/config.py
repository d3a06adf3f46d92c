"""What makes up a training run and a sample set: the dataclasses of all parts, their checks, and a run's identity.

Composing them from YAML and the command line is compose.py's. Each part's dataclass stands beside the code that it
configures; what a field means is said there.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from drwkv.compose import require
from drwkv.data.loader import DataConfig
from drwkv.diffusion.gaussian import GaussianConfig
from drwkv.evaluation.protocol import EvaluateConfig
from drwkv.models.config import ModelConfig
from drwkv.parallel.activations import ActivationConfig
from drwkv.parallel.engine import ParallelConfig
from drwkv.sampling import SamplerConfig, check_sampler
from drwkv.storage import is_remote
from drwkv.training.batches import BatchStage, batch_size_at
from drwkv.training.checkpoint import CheckpointConfig
from drwkv.training.ema import EmaConfig
from drwkv.training.health import HealthConfig
from drwkv.training.monitor import MonitorConfig
from drwkv.training.objective import ObjectiveConfig
from drwkv.training.optimizer import OptimizerConfig
from drwkv.training.power_ema import WIDEST
from drwkv.training.profiling import ProfileConfig
from drwkv.training.validation import ValidationConfig, check_validation
from drwkv.training.watch import stall_sec


@dataclass
class RunConfig:
    """One training run: where it lives and how long it goes."""

    folder: str = "runs/unnamed"  # everything that the run writes; the same folder again continues the run
    seed: int = 0  # 0 <= seed < 2**32; every random number is a function of it
    total_steps: int = 1000  # optimizer steps of the whole run, restarts included
    batch_size: int = 128  # samples of one global batch, whatever the number of ranks, until the first stage
    batch_stages: list[BatchStage] = field(default_factory=list)  # by rising from_step; empty: one size
    accumulate: int = 1  # micro-batches that a rank cuts its piece of the batch into
    label_drop: float = 0.1  # probability of replacing a label by "no label"; without effect without classes
    # Windows [n0, n1) of samples to pass over; every batch that touches one counts as consumed, not applied
    skip: list[list[int]] = field(default_factory=list)
    # Weights of a new run: run folder, checkpoint, .pt or .safetensors; None: made from the seed
    start_from: str | None = None
    start_weights: Literal["ema", "model"] = "ema"  # which of its two sets; weights and average start from it
    audit: bool = False  # every rank writes (n, sample id, hash of x_t) of all it trains on

    def batch_size_at(self, step: int) -> int:
        """Samples of the global batch of `step`; 0 is the first."""
        return batch_size_at(step, self.batch_size, self.batch_stages)

    @property
    def largest_batch(self) -> int:
        """Samples of the largest batch that any step has."""
        return max([self.batch_size, *(stage.batch_size for stage in self.batch_stages)])


@dataclass
class TrainConfig:
    """All of `train_dist.py`."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: GaussianConfig = field(default_factory=GaussianConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)


@dataclass
class SampleConfig:
    """All of `sample_dist.py`."""

    # Run folder or s3://bucket/prefix (the newest is taken), one step_N, .pt or .safetensors
    checkpoint: str = "???"
    weights: Literal["ema", "model"] = "ema"  # which of the two sets of weights
    out: str = "???"  # folder of the sample set; the same folder again continues the set
    num_samples: int = 1000  # images in the set
    seed: int = 0  # 0 <= seed < 2**32; image i is a function of (seed, i)
    # Images of one forward; part of the set's identity, as small matmuls round by shape
    micro_batch: int = 50
    chunk: int = 100  # images of one unit of work, a multiple of micro_batch
    cpu_threads: int = 1  # threads of each process on a CPU; part of the identity, as sums round by thread
    # Folder or hub name of the VAE that decodes latents; None: the one of the training data
    vae: str | None = None
    grid_columns: int = 10  # images of each class in the grid
    tf32: bool = True  # GPU: float32 matmuls may use TF32; part of the identity
    timeout_sec: float = 3600.0  # longest that a process may take for one chunk before the others give up
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def identity(config: TrainConfig, data: dict[str, Any]) -> dict[str, Any]:
    """What must not change while a run goes on, by config key, as JSON holds it; `data` is the data's own identity."""
    kept: dict[str, Any] = {"run.seed": config.run.seed, "run.label_drop": config.run.label_drop}
    for group in ("model", "diffusion", "objective"):
        kept |= {f"{group}.{key}": value for key, value in asdict(getattr(config, group)).items()}
    kept["model.options"].pop("kernel_backend", None)  # who computes is not what is computed
    kept |= {f"data.{key}": value for key, value in data.items() if key != "seed"}
    return json.loads(json.dumps(kept))


def check_train(config: TrainConfig) -> None:
    """Check values against each other; ValueError names the key, the value and what to do."""
    run = config.run
    require(0 <= run.seed < 2**32, "run.seed", run.seed, "give 0 <= seed < 2**32")
    require(0.0 <= run.label_drop < 1.0, "run.label_drop", run.label_drop, "give a probability in [0, 1)")
    check_parallel(config.parallel)
    for key in ("total_steps", "batch_size", "accumulate"):
        require(getattr(run, key) >= 1, f"run.{key}", getattr(run, key), "give 1 or more")
    for window in run.skip:
        require(
            len(window) == 2 and 0 <= window[0] < window[1],
            "run.skip",
            window,
            "give [n0, n1] with 0 <= n0 < n1",
        )
    _check_ema(config.ema)
    objective, advice = config.objective, "give a finite number above 0"
    require(
        0.0 < objective.min_snr_gamma < math.inf, "objective.min_snr_gamma", objective.min_snr_gamma, advice
    )
    advice = "give a finite number, 0 or more"
    require(0.0 <= objective.vlb_weight < math.inf, "objective.vlb_weight", objective.vlb_weight, advice)
    require(config.optimizer.lr > 0, "optimizer.lr", config.optimizer.lr, "give a positive rate")
    _check_optimizer(config.optimizer)
    betas = (config.optimizer.beta1, config.optimizer.beta2)
    require(
        all(0.0 <= beta < 1.0 for beta in betas), "optimizer.beta1, beta2", betas, "give decays in [0, 1)"
    )
    _check_health(config)
    for key in ("every_steps", "keep_last", "keep_every_steps"):
        value = getattr(config.checkpoint, key)
        require(value >= (key == "keep_last"), f"checkpoint.{key}", value, "give a positive number")
    place = config.checkpoint.folder
    known = place is None or "://" not in place or is_remote(place)
    require(known, "checkpoint.folder", place, "give a folder, or s3://bucket/prefix")
    _check_grids(config)
    check_validation(config.validation, config.data.select, config.diffusion.num_timesteps)
    _check_stages(config)
    steps = config.profile.steps
    require(
        not steps or (len(steps) == 2 and 0 <= steps[0] <= steps[1]), "profile.steps", steps,
        "give the first and the last step, as in [20, 25], or [] for none",
    )  # fmt: skip


def _check_stages(config: TrainConfig) -> None:
    for key, stages in (
        ("optimizer.stages", config.optimizer.stages),
        ("run.batch_stages", config.run.batch_stages),
    ):
        starts = [stage.from_step for stage in stages]
        require(starts == sorted(set(starts)), key, starts, "list them by rising from_step")
    for stage in config.run.batch_stages:
        advice = "run.batch_size is that of step 0: give 1 or more"
        require(stage.from_step >= 1, "run.batch_stages.from_step", stage.from_step, advice)
        require(stage.batch_size >= 1, "run.batch_stages.batch_size", stage.batch_size, "give 1 or more")


def _check_ema(ema: EmaConfig) -> None:
    require(0.0 <= ema.decay < 1.0, "ema.decay", ema.decay, "give a decay in [0, 1)")
    for width in ema.widths:
        fits = 0 < width <= WIDEST and width == round(width, 3)
        advice = f"give 0 < width <= {WIDEST:.4f} with three decimals at most, as EDM2's [0.05, 0.1]"
        require(fits, "ema.widths", width, advice)
    require(len(set(ema.widths)) == len(ema.widths), "ema.widths", ema.widths, "give each width once")
    every_steps = ema.snapshot_every_steps
    require(
        every_steps >= 0, "ema.snapshot_every_steps", every_steps, "give a positive number, or 0 for none"
    )
    advice = "there is nothing to take snapshots of: give ema.widths, as [0.05, 0.1]"
    require(bool(ema.widths) or not every_steps, "ema.snapshot_every_steps", every_steps, advice)


def check_parallel(parallel: ParallelConfig) -> None:
    """Check how a model is to run on many ranks; ValueError as `check_train`."""
    for key, value in (
        ("blocks_per_unit", parallel.blocks_per_unit),
        ("replicas", parallel.replicas),
        ("activations.every", parallel.activations.every),
    ):
        require(value >= 1, f"parallel.{key}", value, "give 1 or more")
    _check_activations(parallel.activations)
    engine, is_zero = parallel.engine, parallel.engine.startswith("zero")
    can_replicate, can_compile = parallel.replicas == 1 or engine == "fsdp", engine != "zero3"
    require(
        can_replicate, "parallel.replicas", parallel.replicas, f"engine {engine} has none: give engine=fsdp"
    )
    holders = {"none": True, "optimizer": is_zero, "all": engine == "fsdp"}
    advice = f"engine {engine} cannot: zero1 to zero3 take optimizer, fsdp takes all"
    require(holders[parallel.offload], "parallel.offload", parallel.offload, advice)
    fits = parallel.precision != "bf16_params" or engine != "ddp"
    advice = "engine ddp has no float32 copy of the weights beside: give precision=bf16, or engine=fsdp"
    require(fits, "parallel.precision", parallel.precision, advice)
    advice = "the hooks of engine zero3 are in the blocks and would break every graph: give fsdp, or zero2"
    require(can_compile or not parallel.compile, "parallel.compile", parallel.compile, advice)


def _check_optimizer(config: OptimizerConfig) -> None:
    most = config.max_grad_norm
    require(
        most is None or most > 0,
        "optimizer.max_grad_norm",
        most,
        "give a norm above 0, or null for no clipping",
    )
    require(config.eps > 0, "optimizer.eps", config.eps, "give a number above 0")
    for key in ("warmup_steps", "weight_decay"):
        require(getattr(config, key) >= 0, f"optimizer.{key}", getattr(config, key), "give 0 or more")
    for stage in config.stages:
        require(stage.lr > 0, "optimizer.stages.lr", stage.lr, "give a positive rate")


def _check_health(config: TrainConfig) -> None:
    health, timeout_sec = config.health, config.parallel.timeout_sec
    row = health.max_nonfinite_in_row
    require(row >= 1, "health.max_nonfinite_in_row", row, "give 1 or more")
    for key in ("max_rollbacks", "spike_deviations", "max_spikes_in_row", "grace_sec"):
        value = getattr(health, key)
        require(value >= 0, f"health.{key}", value, "give 0 or more")
    for key in ("heartbeat_sec", "lock_sec", "lost_sec"):
        value = getattr(health, key)
        require(value > 0, f"health.{key}", value, "give a time above 0")
    require(
        health.max_hours is None or health.max_hours > 0,
        "health.max_hours",
        health.max_hours,
        "give a time above 0",
    )
    limit = stall_sec(health, timeout_sec)
    advice = f"give less than parallel.timeout_sec={timeout_sec}, at which collectives give up, or 0"
    require(0 <= limit < timeout_sec, "health.stall_sec", limit, advice)
    if any(map(is_remote, [*config.data.paths, *config.validation.paths])):
        patience = config.data.timeout_sec
        advice = f"give less than {limit or timeout_sec} s, when other ranks give up (health.stall_sec)"
        require(0 < patience < (limit or timeout_sec), "data.timeout_sec", patience, advice)


def _check_activations(config: ActivationConfig) -> None:
    for key in ("blocks", "budget_gib"):
        value = getattr(config, key)
        if value is None:
            continue
        require(value >= 0, f"parallel.activations.{key}", value, "give 0 or more, or null")
        advice = "with activations.checkpoint=none no block is checkpointed: give full or selective"
        require(config.checkpoint != "none", f"parallel.activations.{key}", value, advice)
        advice = (
            f"activations.every={config.every} says which blocks are checkpointed too: leave one of them out"
        )
        require(config.every == 1, f"parallel.activations.{key}", value, advice)
    both = config.blocks is not None and config.budget_gib is not None
    advice = f"activations.budget_gib={config.budget_gib} chooses their number too: leave one of them out"
    require(not both, "parallel.activations.blocks", config.blocks, advice)


def _check_grids(config: TrainConfig) -> None:
    monitor, channels = config.monitor, config.model.in_channels
    for key in ("tensorboard_every_steps", "grid_every_steps", "ranks_every_steps"):
        require(getattr(monitor, key) >= 0, f"monitor.{key}", getattr(monitor, key), "give 0 or more")
    peak, looks = monitor.peak_tflops, monitor.ranks_every_steps
    require(looks >= 0, "monitor.ranks_every_steps", looks, "give 0 for none, or more")
    require(peak is None or peak >= 0, "monitor.peak_tflops", peak, "give TFLOP/s, 0 for no MFU, or null")
    if monitor.grid_every_steps:
        require(monitor.grid_columns >= 1, "monitor.grid_columns", monitor.grid_columns, "give 1 or more")
        advice = (
            f"the model's {channels} channels are no pixels: give monitor.vae=FOLDER to decode them, or 0"
        )
        is_shown = channels in (1, 3) or monitor.vae is not None
        require(is_shown, "monitor.grid_every_steps", monitor.grid_every_steps, advice)
        check_sampler(monitor.grid_sampler, config.diffusion.num_timesteps, config.model.num_classes)


def check_ranks(config: TrainConfig, world_size: int) -> None:
    """ValueError if some rank would have a micro-batch without a sample, or replicas would differ in size."""
    run, replicas = config.run, config.parallel.replicas
    advice = f"{world_size} processes cannot be cut into so many alike: give a divisor"
    require(world_size % replicas == 0, "parallel.replicas", replicas, advice)
    least = world_size * run.accumulate
    advice = f"{world_size} processes x run.accumulate={run.accumulate} need {least} samples or more a batch"
    require(run.batch_size >= least, "run.batch_size", run.batch_size, advice)
    for stage in run.batch_stages:
        require(stage.batch_size >= least, "run.batch_stages.batch_size", stage.batch_size, advice)


def check_sample(config: SampleConfig) -> None:
    """Check values against each other; ValueError names the key, the value and what to do."""
    require(0 <= config.seed < 2**32, "seed", config.seed, "give 0 <= seed < 2**32")
    for key in ("num_samples", "micro_batch", "chunk", "cpu_threads", "grid_columns"):
        require(getattr(config, key) >= 1, key, getattr(config, key), "give 1 or more")
    require(
        config.chunk % config.micro_batch == 0,
        "chunk",
        config.chunk,
        f"give a multiple of micro_batch={config.micro_batch}",
    )
