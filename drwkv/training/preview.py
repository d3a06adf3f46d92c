"""Sample grids while a run goes on, drawn from the EMA on all ranks. Whole sample sets: sample_dist.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from drwkv.data.manifest import Manifest
from drwkv.diffusion.gaussian import GaussianProcess
from drwkv.evaluation.pictures import grid_image
from drwkv.latents import encode_pixels, open_decoder
from drwkv.models.config import ModelConfig
from drwkv.parallel.distributed import World
from drwkv.parallel.engine import Engine
from drwkv.sampling import draw
from drwkv.training.ema import Ema
from drwkv.training.monitor import MonitorConfig

ROWS_WITHOUT_CLASSES, MOST_ROWS = 8, 16


class Preview:
    """Draws the same images 0, 1, 2, ... of the run's seed each time, so that grids of two steps can be compared."""

    def __init__(
        self, process: GaussianProcess, config: MonitorConfig, model: ModelConfig, manifest: Manifest, *, seed: int,
        world: World,
    ) -> None:  # fmt: skip
        self._process, self._config, self._model = process, config, model
        self._seed, self._world = seed, world
        self._decode: Callable[[Tensor], Tensor] = lambda x0: x0
        if config.grid_every_steps and config.vae is not None:
            if manifest.kind == "pixels":
                raise ValueError(
                    f"config key 'monitor.vae' is {config.vae!r}, but the data are pixels: give monitor.vae=null"
                )
            self._decode = open_decoder(config.vae, manifest, where="data.paths", device=world.device)

    def draw(self, engine: Engine, ema: Ema) -> np.ndarray:
        """One row a class (the first classes, if there are more than 16) -> uint8 (H, W, C) grid. Collective."""
        num_classes, columns, shape = self._model.num_classes, self._config.grid_columns, self._model.shape
        rows = min(num_classes or ROWS_WITHOUT_CLASSES, MOST_ROWS)
        ids = torch.arange(rows * columns)

        # Each rank draws as many, since a sharded model's forward is a collective: the last ones may be drawn twice.
        share = -(-len(ids) // self._world.size)
        mine = ids.roll(-self._world.rank * share)[:share].to(self._world.device)
        engine.module.eval()
        with engine.autocast(), ema.swapped_in():
            x0 = draw(
                engine.module,
                self._process,
                self._config.grid_sampler,
                ids=mine,
                labels=mine % rows if num_classes else None,
                num_classes=num_classes,
                shape=shape,
                seed=self._seed,
            ).float()
        engine.module.train()
        # One at a time: a VAE's forward takes far more memory than the latents.
        mine_drawn = torch.cat([encode_pixels(self._decode(one)) for one in x0.split(1)])
        images = np.concatenate(self._world.gather(mine_drawn.cpu().numpy()))[: len(ids)]
        labels = (ids % rows).numpy() if num_classes else None
        return np.asarray(grid_image(images.transpose(0, 2, 3, 1), labels, columns=columns).convert("RGB"))
