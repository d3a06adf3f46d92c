"""What a run folder says of itself: the resolved config, the code and versions it ran with, and how it was stopped.

Checkpoints are in checkpoint.py, numbers and pictures in monitor.py.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import subprocess
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from drwkv.data.manifest import Manifest
from drwkv.files import write_whole
from drwkv.parallel.distributed import World
from drwkv.storage import open_storage

if TYPE_CHECKING:
    from drwkv.training.warm_start import Origin

log = logging.getLogger("drwkv")
REQUEUE = "requeue"
CONFIG = "config.yaml"
DATA = "data.json"
PACKAGES = ("torch", "numpy", "deepspeed", "diffusers", "safetensors", "webdataset", "triton")


def begin(
    folder: Path, config: Any, manifest: Manifest, world: World, *, step: int, origin: Origin | None = None
) -> None:
    """Write config.yaml and the data's manifest, and add this start to starts.jsonl.

    Checkpoints that lie elsewhere get both files too: who has them alone can sample.
    """
    if not world.is_first:
        return
    content = {
        CONFIG: OmegaConf.to_yaml(OmegaConf.structured(config)).encode(),
        DATA: json.dumps(asdict(manifest), indent=1).encode(),
    }
    for name, data in content.items():
        write_whole(folder / name, data)
        if config.checkpoint.folder is not None:
            open_storage(config.checkpoint.folder).write(name, data)
    start = {
        "time": time.time(),
        "step": step,
        "world_size": world.size,
        "device": str(world.device),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": versions(),
        "start_from": asdict(origin) if origin else None,
    }
    with (folder / "starts.jsonl").open("a") as file:
        file.write(json.dumps(start) + "\n")
        file.flush()
        os.fsync(file.fileno())
    log.info("run %s: from step %d on %d processes (%s)", folder, step, world.size, world.device.type)
    if origin:
        log.info("first weights: %s of %s (sha256 %s)", origin.weights, origin.path, origin.sha256)
        if origin.vae_hash not in (None, manifest.vae_hash):
            log.warning("first weights: trained on latents of another VAE, sha256 %s", origin.vae_hash)
        if origin.process not in (None, config.diffusion):
            log.warning("first weights: trained for another process, %s", origin.process)
    elif config.run.start_from:
        log.info("run.start_from=%s is left aside: the run has its own checkpoints", config.run.start_from)


def withdraw_requeue(folder: Path, world: World) -> None:
    """Drop an old request to requeue: whatever becomes of this start, it is another one that asks."""
    if world.is_first:
        (folder / REQUEUE).unlink(missing_ok=True)


def versions() -> dict[str, str | None]:
    """Version of each package whose numbers a run depends on; None where it is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def ask_requeue(folder: Path, world: World, *, reason: str, step: int) -> None:
    """Leave the file that a job's wrapper acts on: the run is not finished and wants to be queued again."""
    if world.is_first:
        (folder / REQUEUE).write_text(
            json.dumps({"reason": reason, "step": step, "time": time.time()}) + "\n"
        )
        log.info("run %s: stopped by %s after step %d; the same command continues it", folder, reason, step)


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that this code runs from, with `+changes` if it differs; None outside a checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
