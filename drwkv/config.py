"""From dataclasses, a YAML file and the command line to one checked configuration.

Here is only composing, loading, checking and dumping. Each dataclass stands beside the code that it configures;
what a field means is said there.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from drwkv.data.loader import DataConfig
from drwkv.diffusion.gaussian import GaussianConfig
from drwkv.evaluation.protocol import EvaluateConfig
from drwkv.models.config import ModelConfig
from drwkv.parallel.engine import ParallelConfig
from drwkv.sampling import SamplerConfig, check_sampler
from drwkv.training.checkpoint import CheckpointConfig
from drwkv.training.ema import EmaConfig
from drwkv.training.health import HealthConfig
from drwkv.training.monitor import MonitorConfig
from drwkv.training.optimizer import OptimizerConfig

T = TypeVar("T")


@dataclass
class RunConfig:
    """One training run: where it lives and how long it goes."""

    folder: str = "runs/unnamed"  # everything that the run writes; the same folder again continues the run
    seed: int = 0  # 0 <= seed < 2**32; every random number is a function of it
    total_steps: int = 1000  # optimizer steps of the whole run, restarts included
    batch_size: int = 128  # samples of one global batch, whatever the number of ranks
    accumulate: int = 1  # micro-batches that a rank cuts its piece of the batch into
    label_drop: float = 0.1  # probability of replacing a label by "no label"; without effect without classes
    audit: bool = False  # every rank writes (n, sample id, hash of x_t) of all it trains on


@dataclass
class TrainConfig:
    """All of `train_dist.py`."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: GaussianConfig = field(default_factory=GaussianConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)


@dataclass
class SampleConfig:
    """All of `sample_dist.py`."""

    checkpoint: str = (
        "???"  # run folder (its latest whole checkpoint), one checkpoint folder, .pt or .safetensors
    )
    weights: Literal["ema", "model"] = "ema"  # which of the two sets of weights
    out: str = "???"  # folder of the sample set; the same folder again continues the set
    num_samples: int = 1000  # images in the set
    seed: int = 0  # 0 <= seed < 2**32; image i is a function of (seed, i)
    micro_batch: int = (
        50  # images of one forward; part of the set's identity, as small matmuls round by shape
    )
    chunk: int = 100  # images of one unit of work, a multiple of micro_batch
    cpu_threads: int = 1  # threads of each process on a CPU; part of the identity, as sums round by thread
    vae: str | None = (
        None  # folder or hub name of the VAE that decodes latents; None: the one of the training data
    )
    grid_columns: int = 10  # images of each class in the grid
    tf32: bool = True  # GPU: float32 matmuls may use TF32; part of the identity
    timeout_sec: float = 3600.0  # longest that a process may take for one chunk before the others give up
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def load(schema: type[T], arguments: Sequence[str]) -> T:
    """Compose defaults <- `--config FILE` <- `key.sub=value ...` into a checked instance of the dataclass `schema`.

    Raises FileNotFoundError for a missing file, ValueError naming key, value, file and the nearest right key else.
    """
    path, overrides = _split_arguments(arguments)
    merged = OmegaConf.structured(schema)
    if path is not None:
        merged = _merge(schema, merged, _read_yaml(path), source=str(path))
    for override in overrides:
        merged = _merge(schema, merged, _parse_override(override), source="command line")
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ValueError(
            f"config key {missing[0]!r} has no value: give {missing[0]}=... on the command line or in --config"
        )
    try:
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ValueError(f"config: {_first_line(error)}") from None


def dump(config: Any, path: Path) -> None:
    """Write the resolved configuration as YAML, every field with its value."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def read_dumped(schema: type[T], path: Path) -> T:
    """Read back what `dump` wrote."""
    return load(schema, ["--config", str(path)])


def identity(config: TrainConfig, data: dict[str, Any]) -> dict[str, Any]:
    """What must not change while a run goes on, by config key, as JSON holds it; `data` is the data's own identity."""
    kept: dict[str, Any] = {"run.seed": config.run.seed, "run.label_drop": config.run.label_drop}
    for group in ("model", "diffusion"):
        kept |= {f"{group}.{key}": value for key, value in asdict(getattr(config, group)).items()}
    kept["model.options"].pop("kernel_backend", None)  # who computes is not what is computed
    kept |= {f"data.{key}": value for key, value in data.items() if key != "seed"}
    return json.loads(json.dumps(kept))


def check_train(config: TrainConfig) -> None:
    """Check values against each other; ValueError names the key, the value and what to do."""
    run = config.run
    _require(0 <= run.seed < 2**32, "run.seed", run.seed, "give 0 <= seed < 2**32")
    _require(0.0 <= run.label_drop < 1.0, "run.label_drop", run.label_drop, "give a probability in [0, 1)")
    units = config.parallel.blocks_per_unit
    _require(units >= 1, "parallel.blocks_per_unit", units, "give 1 or more")
    for key in ("total_steps", "batch_size", "accumulate"):
        _require(getattr(run, key) >= 1, f"run.{key}", getattr(run, key), "give 1 or more")
    _require(0.0 <= config.ema.decay < 1.0, "ema.decay", config.ema.decay, "give a decay in [0, 1)")
    _require(config.optimizer.lr > 0, "optimizer.lr", config.optimizer.lr, "give a positive rate")
    betas = (config.optimizer.beta1, config.optimizer.beta2)
    _require(
        all(0.0 <= beta < 1.0 for beta in betas), "optimizer.beta1, beta2", betas, "give decays in [0, 1)"
    )
    row = config.health.max_nonfinite_in_row
    _require(row >= 1, "health.max_nonfinite_in_row", row, "give 1 or more")
    for key in ("every_steps", "keep_last", "keep_every_steps"):
        value = getattr(config.checkpoint, key)
        _require(value >= (key == "keep_last"), f"checkpoint.{key}", value, "give a positive number")
    _check_grids(config)
    starts = [stage.from_step for stage in config.optimizer.stages]
    _require(starts == sorted(set(starts)), "optimizer.stages", starts, "list them by rising from_step")


def _check_grids(config: TrainConfig) -> None:
    monitor, channels = config.monitor, config.model.in_channels
    if monitor.grid_every_steps:
        _require(monitor.grid_columns >= 1, "monitor.grid_columns", monitor.grid_columns, "give 1 or more")
        advice = f"grids are drawn of pixels, and the model has {channels} channels: set it to 0"
        _require(channels in (1, 3), "monitor.grid_every_steps", monitor.grid_every_steps, advice)
        check_sampler(monitor.grid_sampler, config.diffusion.num_timesteps, config.model.num_classes)


def check_ranks(run: RunConfig, world_size: int) -> None:
    """ValueError if some rank would have a micro-batch without a sample."""
    least = world_size * run.accumulate
    advice = f"{world_size} processes x run.accumulate={run.accumulate} need {least} samples or more a batch"
    _require(run.batch_size >= least, "run.batch_size", run.batch_size, advice)


def check_sample(config: SampleConfig) -> None:
    """Check values against each other; ValueError names the key, the value and what to do."""
    _require(0 <= config.seed < 2**32, "seed", config.seed, "give 0 <= seed < 2**32")
    for key in ("num_samples", "micro_batch", "chunk", "cpu_threads", "grid_columns"):
        _require(getattr(config, key) >= 1, key, getattr(config, key), "give 1 or more")
    _require(
        config.chunk % config.micro_batch == 0,
        "chunk",
        config.chunk,
        f"give a multiple of micro_batch={config.micro_batch}",
    )


def _require(holds: bool, key: str, value: Any, advice: str) -> None:
    if not holds:
        raise ValueError(f"config key {key!r}: {value!r} is not possible: {advice}")


def _split_arguments(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    path, overrides, rest = None, [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--config":
            if not rest:
                raise ValueError("--config needs a file: --config configs/NAME.yaml")
            path = Path(rest.pop(0))
        elif argument.startswith("--config="):
            path = Path(argument.removeprefix("--config="))
        elif re.match(r"^[A-Za-z_][\w.]*=", argument):
            overrides.append(argument)
        else:
            raise ValueError(
                f"command line: {argument!r} is not understood: give --config FILE or key.sub=value"
            )
    return path, overrides


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        raise FileNotFoundError(
            f"--config {path}: no such file" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        )
    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise ValueError(f"{path}: not readable as YAML: {_first_line(error)}") from None
    if not isinstance(content, DictConfig):
        raise ValueError(f"{path}: holds a list, not keys with values")
    return content


def _parse_override(override: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"command line: {override!r} is not understood: {_first_line(error)}") from None


def _merge(schema: type, base: DictConfig, change: DictConfig, *, source: str) -> DictConfig:
    _check_keys(schema, OmegaConf.to_container(change), source, prefix="")
    try:
        return OmegaConf.merge(base, change)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        value = OmegaConf.select(change, key) if key != "?" else None
        raise ValueError(f"{source}: config key {key!r} cannot be {value!r}: {_first_line(error)}") from None


def _check_keys(schema: type, content: Any, source: str, prefix: str) -> None:
    """Refuse keys that the dataclass does not have, naming the nearest that it has."""
    if not isinstance(content, dict):
        raise ValueError(
            f"{source}: config key {prefix.rstrip('.')!r} is a group of keys, not one value: {content!r}"
        )
    known = {f.name for f in fields(schema)}
    hints = get_type_hints(schema)
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(f"{prefix}{key}", _all_keys(schema, prefix), n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
            raise ValueError(f"{source}: unknown config key {prefix + str(key)!r} (value {value!r}): {hint}")
        if is_dataclass(hints[key]):
            _check_keys(hints[key], value, source, prefix=f"{prefix}{key}.")


def _all_keys(schema: type, prefix: str = "") -> set[str]:
    hints = get_type_hints(schema)
    keys = set()
    for f in fields(schema):
        keys.add(prefix + f.name)
        if is_dataclass(hints[f.name]):
            keys |= _all_keys(hints[f.name], f"{prefix}{f.name}.")
    return keys


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
